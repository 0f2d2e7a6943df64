package extauthz

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/proxy"
)

var (
	domain  = spiffeid.RequireTrustDomainFromString("example.org")
	webID   = spiffeid.RequireFromPath(domain, "/app/web")
	mallory = spiffeid.RequireFromPath(domain, "/app/mallory")
	proxyID = spiffeid.RequireFromPath(domain, "/sallyport/proxy/node-1")
	gateway = spiffeid.RequireFromPath(domain, "/gateway")
)

const resources = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: web}
spec:
  target: Pod
  ports: [8080]
  addresses: ["10.2.0.2"]
  http: {hosts: [web.example.org]}
  access: [{identities: ["spiffe://example.org/app/web"], routes: [{methods: [GET], paths: ["/public/*"]}]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec:
  target: Host
  ports: [5432]
  access: [{identities: ["spiffe://example.org/app/web"]}]
`

// lab is a server with a real authority behind it, and real sockets before it.
type lab struct {
	*testing.T
	authority *devauthority.Authority
	socket    string
	tcp       string
	stop      func()

	mu      sync.Mutex
	records []flow.Record // guarded by mu
}

// own is the server's identity.
type own struct {
	*x509svid.SVID
	*x509bundle.Bundle
}

func (o own) GetX509SVID() (*x509svid.SVID, error) { return o.SVID, nil }

func newLab(t *testing.T, change func(*Config)) *lab {
	t.Helper()
	l := &lab{T: t, socket: filepath.Join(t.TempDir(), "authz.sock")}
	authority, err := devauthority.New(domain, devauthority.Options{})
	l.must(err)
	l.authority = authority
	svid, err := authority.Issue(proxyID)
	l.must(err)
	identity := own{svid, authority.Bundle()}
	file := filepath.Join(t.TempDir(), "policy.yaml")
	l.must(os.WriteFile(file, []byte(resources), 0o600))
	quiet := slog.New(slog.DiscardHandler)
	judge, err := proxy.NewJudge(proxy.JudgeConfig{Trust: identity, Policy: proxy.NewPolicyFile(file, quiet), Report: l.report})
	l.must(err)
	cfg := Config{Judge: judge, Socket: l.socket, GID: os.Getgid(), Listen: []string{"127.0.0.1:0"}, Gateways: []spiffeid.ID{gateway}, Identity: identity}
	if change != nil {
		change(&cfg)
	}
	server, err := New(cfg)
	l.must(err)
	if len(cfg.Listen) > 0 {
		l.tcp = server.Addrs()[len(server.Addrs())-1].String()
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	l.stop = sync.OnceFunc(func() {
		cancel()
		l.must(<-done)
	})
	t.Cleanup(l.stop)
	return l
}

func (l *lab) must(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

func (l *lab) report(r flow.Record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records = append(l.records, r)
}

func (l *lab) last() flow.Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.records) == 0 {
		return flow.Record{}
	}
	return l.records[len(l.records)-1]
}

// denial is the first of a reason: those that are like it are counted.
func (l *lab) denial(reason string) flow.Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.records {
		if r.Event == flow.EventDeny && r.Reason.String() == reason {
			return r
		}
	}
	return flow.Record{}
}

// local is another proxy on this node.
func (l *lab) local() authv3.AuthorizationClient {
	return l.client("unix:"+l.socket, insecure.NewCredentials())
}

// remote is one elsewhere, with that identity.
func (l *lab) remote(id spiffeid.ID) authv3.AuthorizationClient {
	l.Helper()
	svid, err := l.authority.Issue(id)
	l.must(err)
	return l.client(l.tcp, credentials.NewTLS(tlsconfig.MTLSClientConfig(svid, l.authority.Bundle(), tlsconfig.AuthorizeID(proxyID))))
}

func (l *lab) client(target string, creds credentials.TransportCredentials) authv3.AuthorizationClient {
	l.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithNoProxy())
	l.must(err)
	l.Cleanup(func() { conn.Close() })
	return authv3.NewAuthorizationClient(conn)
}

// ask gives an answer, or fails the test.
func (l *lab) ask(c authv3.AuthorizationClient, in *authv3.CheckRequest) *authv3.CheckResponse {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.Context(), 10*time.Second)
	defer cancel()
	out, err := c.Check(ctx, in)
	l.must(err)
	l.must(out.ValidateAll()) // as Envoy does
	return out
}

func (l *lab) pem(id spiffeid.ID) string {
	l.Helper()
	svid, err := l.authority.Issue(id)
	l.must(err)
	return escaped(svid.Certificates[0])
}

// escaped writes a certificate as Envoy does.
func escaped(cert *x509.Certificate) string {
	return url.PathEscape(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})))
}

func socketAddress(ip string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: ip,
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
}

// tcpCheck has the attributes that Envoy's network filter fills in, with include_peer_certificate.
func (l *lab) tcpCheck(port uint32, id spiffeid.ID) *authv3.CheckRequest {
	a := &authv3.AttributeContext{
		Source:            &authv3.AttributeContext_Peer{Address: socketAddress("10.1.0.2", 40000)},
		Destination:       &authv3.AttributeContext_Peer{Address: socketAddress("10.2.0.2", port), Principal: proxyID.String()},
		ContextExtensions: map[string]string{}, MetadataContext: &corev3.Metadata{},
	}
	if !id.IsZero() {
		a.Source.Principal, a.Source.Certificate = id.String(), l.pem(id)
	}
	return &authv3.CheckRequest{Attributes: a}
}

// httpCheck has those of its HTTP filter, with encode_raw_headers.
func (l *lab) httpCheck(id spiffeid.ID, method, path string, header ...string) *authv3.CheckRequest {
	in := l.tcpCheck(8080, id)
	h := &authv3.AttributeContext_HttpRequest{Id: "7434520463519021", Method: method, Path: path, Host: "web.example.org", Scheme: "https",
		Protocol: "HTTP/2", Size: -1, HeaderMap: &corev3.HeaderMap{}}
	header = append([]string{":authority", h.Host, ":method", method, ":path", path, ":scheme", "https", "x-forwarded-proto", "https",
		"x-request-id", "c7b3b6b4-5d2a-4d5d-9a57-7f3a9e6f0001"}, header...)
	for i := 0; i < len(header); i += 2 {
		h.HeaderMap.Headers = append(h.HeaderMap.Headers, &corev3.HeaderValue{Key: header[i], RawValue: []byte(header[i+1])})
	}
	in.Attributes.Request = &authv3.AttributeContext_Request{Http: h}
	return in
}

func codeOf(out *authv3.CheckResponse) codes.Code { return codes.Code(out.GetStatus().GetCode()) }

// set are the headers that an answer has the other proxy set.
func set(all []*corev3.HeaderValueOption) map[string]string {
	out := map[string]string{}
	for _, h := range all {
		if h.AppendAction == corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD {
			out[h.Header.Key] = h.Header.Value
		}
	}
	return out
}

// TestHTTP: a request is let in with what the service has to be told, and without what the client says under the same names.
func TestHTTP(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	for name, c := range map[string]authv3.AuthorizationClient{"socket": l.local(), "mTLS": l.remote(gateway)} {
		out := l.ask(c, l.httpCheck(webID, "GET", "/public/a?b=c", "x-sallyport-groups", "admins", "x-forwarded-client-cert", "By=x", "x-forwarded-for", "10.9.9.9", "x-fine", "kept"))
		headers := set(out.GetOkResponse().GetHeaders())
		if codeOf(out) != codes.OK || headers["x-sallyport-identity"] != webID.String() || headers["x-sallyport-proof"] != "spiffe" ||
			headers["x-forwarded-for"] != "10.1.0.2" || headers["x-forwarded-host"] != "web.example.org" {
			t.Errorf("%s: %v", name, out)
		}
		if got := out.GetOkResponse().GetHeadersToRemove(); !slices.Equal(got, []string{"x-forwarded-client-cert", "x-sallyport-groups"}) {
			t.Errorf("%s: removes %q", name, got)
		}
		if m := out.GetDynamicMetadata().AsMap(); m["service"] != "web" || m["identity"] != webID.String() || m["reason"] != "IDENTITY" {
			t.Errorf("%s: metadata %v", name, m)
		}
		r := l.last()
		if r.Event != flow.EventRequest || r.Service != "web" || r.Identity != webID.String() || r.Request.Path != "/public/a" || r.Request.Rule == "" ||
			r.Client.String() != "10.1.0.2:40000" || r.Server.String() != "10.2.0.2:8080" {
			t.Errorf("%s: record %+v of %+v", name, r, r.Request)
		}
		if want := map[string]string{"socket": "asked by who may use the socket", "mTLS": "asked by " + gateway.String()}[name]; r.Detail != want {
			t.Errorf("%s: detail %q", name, r.Detail)
		}
	}
}

// TestRefusals are answers with a status for the client, a reason for its people, and a record.
func TestRefusals(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	c := l.local()
	for name, test := range map[string]struct {
		in     *authv3.CheckRequest
		code   codes.Code
		status int
		reason string
	}{
		"nobody":         {l.httpCheck(spiffeid.ID{}, "GET", "/public/a"), codes.Unauthenticated, 401, "LOGIN_NEEDED"},
		"not allowed":    {l.httpCheck(webID, "GET", "/admin"), codes.PermissionDenied, 403, "NOT_AUTHORISED"},
		"somebody else":  {l.httpCheck(mallory, "GET", "/public/a"), codes.PermissionDenied, 403, "NOT_AUTHORISED"},
		"path trick":     {l.httpCheck(webID, "GET", "/public/../admin"), codes.PermissionDenied, 400, "BAD_REQUEST"},
		"connect":        {l.httpCheck(webID, "CONNECT", "/public/a"), codes.PermissionDenied, 405, "BAD_REQUEST"},
		"no such token":  {l.httpCheck(spiffeid.ID{}, "GET", "/public/a", "authorization", "Bearer x.y.z"), codes.Unauthenticated, 401, "LOGIN_NEEDED"},
		"double account": {l.httpCheck(webID, "GET", "/public/a", "authorization", "Basic a", "authorization", "Basic b"), codes.PermissionDenied, 400, "BAD_REQUEST"},
	} {
		out := l.ask(c, test.in)
		d := out.GetDeniedResponse()
		if codeOf(out) != test.code || int(d.GetStatus().GetCode()) != test.status || !strings.HasPrefix(d.GetBody(), test.reason+": ") ||
			!strings.Contains(d.GetBody(), "\nhint: ") || set(d.GetHeaders())["cache-control"] != "no-store" {
			t.Errorf("%s: %v", name, out)
		}
		if r := l.denial(test.reason); r.Service != "web" || r.Request == nil || r.Request.Status < 400 {
			t.Errorf("%s: record %+v", name, r)
		}
	}
}

// TestTCP: what Envoy's network filter asks has no request, and no answer but yes or no.
func TestTCP(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	c := l.local()
	if out := l.ask(c, l.tcpCheck(5432, webID)); codeOf(out) != codes.OK || out.GetHttpResponse() != nil {
		t.Errorf("allowed: %v", out)
	}
	if r := l.last(); r.Event != flow.EventOpen || r.Service != "postgres" || r.Request != nil {
		t.Errorf("record %+v", r)
	}
	for name, in := range map[string]*authv3.CheckRequest{
		"mallory": l.tcpCheck(5432, mallory), "nobody": l.tcpCheck(5432, spiffeid.ID{}), "another port": l.tcpCheck(5433, webID), "HTTP as bytes": l.tcpCheck(8080, webID),
	} {
		if out := l.ask(c, in); codeOf(out) == codes.OK || out.GetHttpResponse() != nil {
			t.Errorf("%s: %v", name, out)
		}
	}
}

// hostile are questions that must not be answered with yes, whatever else they say.
func (l *lab) hostile() map[string]*authv3.CheckRequest {
	change := func(f func(*authv3.AttributeContext, *authv3.AttributeContext_HttpRequest)) *authv3.CheckRequest {
		in := l.httpCheck(webID, "GET", "/public/a")
		f(in.Attributes, in.Attributes.Request.Http)
		return in
	}
	type attributes = authv3.AttributeContext
	type http = authv3.AttributeContext_HttpRequest
	header := func(key, value string) *authv3.CheckRequest {
		return change(func(_ *attributes, h *http) {
			h.HeaderMap.Headers = append(h.HeaderMap.Headers, &corev3.HeaderValue{Key: key, RawValue: []byte(value)})
		})
	}
	two := l.pem(webID) + l.pem(mallory)
	return map[string]*authv3.CheckRequest{
		"empty":                  {},
		"no attributes":          {Attributes: &attributes{}},
		"principal alone":        change(func(a *attributes, _ *http) { a.Source.Certificate = "" }),
		"principal of another":   change(func(a *attributes, _ *http) { a.Source.Principal = mallory.String() }),
		"certificate of another": change(func(a *attributes, _ *http) { a.Source.Certificate = l.pem(mallory) }),
		"principal with a look":  change(func(a *attributes, _ *http) { a.Source.Principal = "spiffe://example.org/app/web/../web" }),
		"two certificates":       change(func(a *attributes, _ *http) { a.Source.Certificate = two }),
		"no certificate":         change(func(a *attributes, _ *http) { a.Source.Certificate = "%zz" }),
		"garbage in PEM": change(func(a *attributes, _ *http) {
			a.Source.Certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
		}),
		"no source":                  change(func(a *attributes, _ *http) { a.Source.Address = nil }),
		"a name for an address":      change(func(a *attributes, _ *http) { a.Source.Address = socketAddress("localhost", 1) }),
		"no destination":             change(func(a *attributes, _ *http) { a.Destination = nil }),
		"port beyond":                change(func(a *attributes, _ *http) { a.Destination.Address = socketAddress("10.2.0.2", 65536+8080) }),
		"service of another address": change(func(a *attributes, _ *http) { a.ContextExtensions[extensionService] = "postgres" }),
		"no such service":            change(func(a *attributes, _ *http) { a.ContextExtensions[extensionService] = "mail" }),
		"path differs from :path":    change(func(_ *attributes, h *http) { h.Path = "/public/b" }),
		"method from :method":        change(func(_ *attributes, h *http) { h.Method = "HEAD" }),
		"host from :authority":       change(func(_ *attributes, h *http) { h.Host = "mail.example.org" }),
		"host header":                header("host", "mail.example.org"),
		"second :path":               header(":path", "/admin"),
		"fragment":                   change(func(_ *attributes, h *http) { h.Fragment = "x" }),
		"query beside":               change(func(_ *attributes, h *http) { h.Query = "x" }),
		"headers in two ways":        change(func(_ *attributes, h *http) { h.Headers = map[string]string{"x": "y"} }),
		"header of two values": change(func(_ *attributes, h *http) {
			h.HeaderMap.Headers = append(h.HeaderMap.Headers, &corev3.HeaderValue{Key: "x", Value: "a", RawValue: []byte("b")})
		}),
		"header with a line end": header("x-fine", "a\r\nx-sallyport-identity: b"),
		"header of no name":      header("", "a"),
		"header with a blank":    header("x sallyport", "a"),
		"look-alike":             header("x_sallyport_identity", "spiffe://example.org/admin"),
		"length twice": change(func(_ *attributes, h *http) {
			h.HeaderMap.Headers = append(h.HeaderMap.Headers, raw("content-length", "1"), raw("content-length", "2"))
		}),
		"length below nothing":     header("content-length", "-1"),
		"length with a sign":       header("content-length", "+1"),
		"escaped dots":             l.httpCheck(webID, "GET", "/public/%2e%2e/admin"),
		"double slash":             l.httpCheck(webID, "GET", "//public/a"),
		"spelt in another way":     l.httpCheck(webID, "GET", "/publi%63/a"),
		"absolute":                 l.httpCheck(webID, "GET", "http://web.example.org/public/a"),
		"no path":                  l.httpCheck(webID, "GET", ""),
		"a method that is none":    l.httpCheck(webID, "GET /public/a HTTP/1.1\r\nx:", "/public/a"),
		"another protocol":         l.httpCheck(webID, "GET", "/public/a", "upgrade", "h2c", "connection", "upgrade"),
		"a body with a websocket":  l.httpCheck(webID, "GET", "/public/a", "upgrade", "websocket", "content-length", "5"),
		"trailers announced":       header("trailer", "x-sallyport-identity"),
		"a path that is not UTF-8": l.httpCheck(webID, "GET", "/public/%ff"),
	}
}

func raw(key, value string) *corev3.HeaderValue {
	return &corev3.HeaderValue{Key: key, RawValue: []byte(value)}
}

// TestHostileQuestions also holds that the question that they are made from is a good one.
func TestHostileQuestions(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	for name, c := range map[string]authv3.AuthorizationClient{"socket": l.local(), "mTLS": l.remote(gateway)} {
		for what, in := range l.hostile() {
			if out := l.ask(c, in); codeOf(out) == codes.OK {
				t.Errorf("%s by %s: %v", what, name, out)
			}
		}
		if out := l.ask(c, l.httpCheck(webID, "GET", "/public/a")); codeOf(out) != codes.OK {
			t.Errorf("by %s: %v", name, out)
		}
	}
}

// TestWebSocket: a switch of protocols has no body where nothing says that it has one.
func TestWebSocket(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	for name, header := range map[string][]string{"no length": nil, "length 0": {"content-length", "0"}} {
		in := l.httpCheck(webID, "GET", "/public/a", append([]string{"upgrade", "websocket", "connection", "Upgrade"}, header...)...)
		if out := l.ask(l.local(), in); codeOf(out) != codes.OK {
			t.Errorf("%s: %v", name, out)
		}
	}
	in := l.httpCheck(webID, "GET", "/public/a", "upgrade", "websocket", "connection", "Upgrade", "transfer-encoding", "chunked")
	if out := l.ask(l.local(), in); codeOf(out) == codes.OK {
		t.Errorf("with a body in chunks: %v", out)
	}
}

// TestJoinedHeaders is what Envoy sends without encode_raw_headers.
func TestJoinedHeaders(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	in := l.httpCheck(webID, "GET", "/public/a")
	h := in.Attributes.Request.Http
	h.HeaderMap, h.Headers = nil, map[string]string{":path": "/public/a", ":method": "GET", ":authority": "web.example.org", "x-real-ip": "10.9.9.9"}
	out := l.ask(l.local(), in)
	if codeOf(out) != codes.OK || !slices.Equal(out.GetOkResponse().GetHeadersToRemove(), []string{"x-real-ip"}) {
		t.Errorf("%v", out)
	}
}

// TestPrincipal counts only where the configuration says so.
func TestPrincipal(t *testing.T) {
	t.Parallel()
	for _, believe := range []bool{false, true} {
		l := newLab(t, func(c *Config) { c.BelievePrincipal = believe })
		in := l.httpCheck(webID, "GET", "/public/a")
		in.Attributes.Source.Certificate = ""
		if out := l.ask(l.local(), in); (codeOf(out) == codes.OK) != believe {
			t.Errorf("believePrincipal %v: %v", believe, out)
		}
		for _, other := range []string{"CN=web", "web.example.org", "spiffe://partner.example/app/web", "spiffe://example.org", "SPIFFE://example.org/app/web"} {
			in.Attributes.Source.Principal = other
			if out := l.ask(l.local(), in); codeOf(out) == codes.OK {
				t.Errorf("believePrincipal %v, %s: %v", believe, other, out)
			}
		}
	}
}

// TestHostServiceFromElsewhere: an address of another node's gateway is none of this node's.
func TestHostServiceFromElsewhere(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	c := l.remote(gateway)
	in := l.tcpCheck(5432, webID)
	in.Attributes.Destination.Address = socketAddress("192.0.2.1", 5432)
	if out := l.ask(c, in); codeOf(out) == codes.OK {
		t.Errorf("by port alone: %v", out)
	}
	in.Attributes.ContextExtensions[extensionService] = "postgres"
	if out := l.ask(c, in); codeOf(out) != codes.OK {
		t.Errorf("by name: %v", out)
	}
}

// TestWhoMayAsk: nobody but the gateways by TCP, never in the clear; by the socket whom its mode lets in.
func TestWhoMayAsk(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	stranger, err := devauthority.New(domain, devauthority.Options{})
	l.must(err)
	forged, err := stranger.Issue(gateway)
	l.must(err)
	for name, creds := range map[string]credentials.TransportCredentials{
		"in the clear":           insecure.NewCredentials(),
		"without a certificate":  credentials.NewTLS(tlsconfig.TLSClientConfig(l.authority.Bundle(), tlsconfig.AuthorizeID(proxyID))),
		"of another authority":   credentials.NewTLS(tlsconfig.MTLSClientConfig(forged, l.authority.Bundle(), tlsconfig.AuthorizeID(proxyID))),
		"a client of a service":  l.credsOf(webID),
		"the proxy's own family": l.credsOf(proxyID),
	} {
		_, err := l.client(l.tcp, creds).Check(t.Context(), l.httpCheck(webID, "GET", "/public/a"))
		if status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
	info, err := os.Stat(l.socket)
	l.must(err)
	if info.Mode().Perm() != 0o660 {
		t.Errorf("the socket's mode is %v", info.Mode())
	}
}

func (l *lab) credsOf(id spiffeid.ID) credentials.TransportCredentials {
	l.Helper()
	svid, err := l.authority.Issue(id)
	l.must(err)
	return credentials.NewTLS(tlsconfig.MTLSClientConfig(svid, l.authority.Bundle(), tlsconfig.AuthorizeID(proxyID)))
}

// TestLargeQuestions: what is larger than Envoy's headers can be is an error, which it takes for a no.
func TestLargeQuestions(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	_, err := l.local().Check(t.Context(), l.httpCheck(webID, "GET", "/public/a", "x-large", strings.Repeat("x", maxMessage)))
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%v", err)
	}
	if out := l.ask(l.local(), l.httpCheck(webID, "GET", "/public/a", "x-large", strings.Repeat("x", 64<<10))); codeOf(out) == codes.OK {
		t.Errorf("beyond the service's headerBytes: %v", out)
	}
}

// TestTooManyQuestions: the one over the bound is refused at once, and not kept waiting.
func TestTooManyQuestions(t *testing.T) {
	t.Parallel()
	s := &Server{free: make(chan struct{}, 1)}
	s.free <- struct{}{}
	entered, leave, left := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		_, _ = s.bound(t.Context(), nil, nil, func(ctx context.Context, _ any) (any, error) {
			if _, bounded := ctx.Deadline(); !bounded {
				t.Error("a question may take for ever")
			}
			close(entered)
			<-leave
			return nil, nil
		})
		close(left)
	}()
	<-entered
	if _, err := s.bound(t.Context(), nil, nil, nil); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("the second: %v", err)
	}
	close(leave)
	<-left
	if _, err := s.bound(t.Context(), nil, nil, func(context.Context, any) (any, error) { return nil, nil }); err != nil {
		t.Errorf("after the first: %v", err)
	}
}

// TestStop leaves no socket, and a start replaces one that is left.
func TestStop(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.stop()
	if _, err := os.Lstat(l.socket); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	path := filepath.Join(t.TempDir(), "authz.sock")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	l.must(err)
	left.SetUnlinkOnClose(false)
	left.Close()
	again := newLab(t, func(c *Config) { c.Socket = path })
	again.socket = path
	if out := again.ask(again.local(), again.httpCheck(webID, "GET", "/public/a")); codeOf(out) != codes.OK {
		t.Errorf("after the start: %v", out)
	}
	for name, cfg := range map[string]Config{"nothing": {}, "nobody may ask": {Judge: &proxy.Judge{}, Listen: []string{"127.0.0.1:0"}},
		"no such folder": {Judge: &proxy.Judge{}, Socket: "/none/authz.sock"}} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: starts", name)
		}
	}
}
