package extauthz

import (
	"encoding/json"
	"os"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	httpauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_src/v3"
	tcpauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/ext_authz/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protopath"
	"google.golang.org/protobuf/reflect/protorange"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// TestEnvoysConfiguration: every name in the recipe is one of Envoy's, every value is in its bounds, both filters close when
// nobody answers, and trailers of requests, of which no question tells, are taken off. There is no Envoy to be had for tests: what it does with it is not held here.
func TestEnvoysConfiguration(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../deploy/examples/other-proxies/envoy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var tree any
	if err := yaml.Unmarshal(text, &tree); err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	var b bootstrapv3.Bootstrap
	if err := protojson.Unmarshal(data, &b); err != nil {
		t.Fatal(err)
	}
	filters, trailers := 0, false
	err = protorange.Range(b.ProtoReflect(), func(p protopath.Values) error {
		m, ok := p.Index(-1).Value.Interface().(protoreflect.Message)
		if !ok {
			return nil
		}
		switch f := m.Interface().(type) {
		case *httpauthzv3.ExtAuthz:
			filters++
			if f.FailureModeAllow || !f.IncludePeerCertificate || !f.EncodeRawHeaders {
				t.Errorf("HTTP: %v", f)
			}
		case *mutationv3.HeaderMutation:
			for _, m := range f.GetMutations().GetRequestTrailersMutations() {
				trailers = trailers || m.GetRemoveOnMatch().GetKeyMatcher().GetSafeRegex().GetRegex() == ".*"
			}
		case *tcpauthzv3.ExtAuthz:
			filters++
			if f.FailureModeAllow || !f.IncludePeerCertificate {
				t.Errorf("TCP: %v", f)
			}
		}
		if v, ok := m.Interface().(interface{ ValidateAll() error }); ok {
			return v.ValidateAll()
		}
		return nil
	})
	if err != nil || filters != 2 || !trailers {
		t.Errorf("%d filters ask, trailers are taken off: %v, %v", filters, trailers, err)
	}
}
