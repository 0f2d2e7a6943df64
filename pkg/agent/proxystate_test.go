package agent

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const ofACompany = `apiVersion: sallyport.dev/v1alpha1
kind: IdentityProvider
metadata: {name: corp}
spec: {issuer: "https://login.example.org", audiences: [web]}
---
`

// TestProxyStates: status has what the proxy tells of what this node has, for as long as it tells it.
func TestProxyStates(t *testing.T) {
	t.Parallel()
	now := time.Hour
	states := &proxyStates{boot: func() time.Duration { return now }}
	d := newDirectory(t)
	d.write("r.yaml", ofACompany+podAndHost)
	d.reload()
	n := &node{proxyStates: states, resources: d.resources, log: slog.New(slog.DiscardHandler)}
	n.cfg.Spec.Proxy.Certificates = []policy.WebCertificate{{Name: "public"}}
	r := newReporting(t)
	r.server.states = states
	tell := func(s *api.ProxyState) {
		t.Helper()
		_, err := r.client.State(t.Context(), s)
		must(t, err)
	}
	reply := func() *api.StatusReply {
		reply := &api.StatusReply{}
		must(t, n.proxyParts(t.Context(), reply))
		return reply
	}
	end := timestamppb.New(time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC))
	tell(&api.ProxyState{Instance: "a", Certificates: []*api.WebCertificate{{Name: "public", Until: end, Problem: "it ends soon\n; see why"}, {Name: "made-up", Problem: "x"}},
		Providers: []*api.Provider{{Name: "corp", Fetched: end, Keys: 2}, {Name: "made-up", Problem: "x"}}})
	got := reply()
	if len(got.WebCertificates) != 1 || got.WebCertificates[0].Until.AsTime() != end.AsTime() || len(got.Providers) != 1 || got.Providers[0].Keys != 2 ||
		len(got.Problems) != 1 || got.Problems[0] != "web certificate public: it ends soon; see why" {
		t.Errorf("%v", got)
	}
	tell(&api.ProxyState{Instance: "b", Providers: []*api.Provider{{Name: "corp", Problem: "cable is out"}}}) // beside it, as authz
	tell(&api.ProxyState{Instance: "a", Certificates: []*api.WebCertificate{{Name: "public", Until: end}}})
	if got := reply(); strings.Join(got.Problems, ";") != "identity provider corp: cable is out" || len(got.WebCertificates) != 1 {
		t.Errorf("told anew: %v", got)
	}
	now += stateStays + 1
	if got := reply(); len(got.WebCertificates)+len(got.Providers)+len(got.Problems) != 0 {
		t.Errorf("nobody repeats it: %v", got)
	}
	for _, wrong := range []*api.ProxyState{{}, {Instance: strings.Repeat("x", maxInstance+1)}, {Instance: "c", Providers: make([]*api.Provider, mostParts+1)}} {
		for i := range wrong.Providers {
			wrong.Providers[i] = &api.Provider{}
		}
		if _, err := r.client.State(t.Context(), wrong); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%d providers, instance %q: %v", len(wrong.Providers), wrong.Instance, err)
		}
	}
	for i := range 2 * keptStates {
		tell(&api.ProxyState{Instance: strings.Repeat("d", i+1)})
	}
	if len(states.told) != keptStates {
		t.Errorf("%d are kept", len(states.told))
	}
}
