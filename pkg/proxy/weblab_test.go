package proxy

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

func itoa(n int) string { return strconv.Itoa(n) }

var (
	domain  = spiffeid.RequireTrustDomainFromString("example.org")
	webID   = spiffeid.RequireFromPath(domain, "/app/web")
	mallory = spiffeid.RequireFromPath(domain, "/app/mallory")
	proxyID = spiffeid.RequireFromPath(domain, "/sallyport/proxy/node-1")
)

const identityTTL = 48 * time.Hour

const patience = 10 * time.Second // that something hangs, not how fast it is

// own is the proxy's identity, by a real authority.
type own struct {
	*x509svid.SVID
	*x509bundle.Bundle

	mu      *sync.Mutex
	changed *chan struct{} // guarded by mu
}

func (o own) GetX509SVID() (*x509svid.SVID, error) { return o.SVID, nil }

func (o own) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return o.Bundle.GetX509BundleForTrustDomain(td)
}

func (o own) Changed() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return *o.changed
}

// withdraw takes all authorities away.
func (o own) withdraw() {
	for _, a := range o.X509Authorities() {
		o.RemoveX509Authority(a)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	close(*o.changed)
	*o.changed = make(chan struct{})
}

// webLab is a proxy whose connections are all for one service on this host. Only the way to it is missing: what the datapath
// does for the proxy is tested with it.
type webLab struct {
	*testing.T
	proxy     *Proxy
	authority *devauthority.Authority
	addr      string         // of the proxy
	service   netip.AddrPort // of the service
	backend   net.Listener   // of the service
	records   *log
	policy    string // path of the file
	ahead     atomic.Int64
}

// webConfig is what tests change.
type webConfig struct {
	http, access string // YAML
	handler      http.Handler
	listener     net.Listener // of the service; nil: handler serves HTTP
	change       func(*Config)
}

// onlyWeb lets the one identity do everything.
const onlyWeb = `[{identities: ["spiffe://example.org/app/web"]}]`

func newWebLab(t *testing.T, c webConfig) *webLab {
	t.Helper()
	l := &webLab{T: t, records: &log{}, policy: filepath.Join(t.TempDir(), "policy.yaml")}
	l.serve(c)
	authority, err := devauthority.New(domain, devauthority.Options{TTL: identityTTL})
	l.must(err)
	l.authority = authority
	svid, err := authority.Issue(proxyID)
	l.must(err)
	l.write(c.http, c.access)
	quiet := slog.New(slog.DiscardHandler)
	changed := make(chan struct{})
	cfg := Config{
		ListenPort: 1, MaxConnections: 1000, HandshakeTimeout: patience, IdleTimeout: time.Hour, DialTimeout: patience,
		Identity: own{svid, authority.Bundle(), &sync.Mutex{}, &changed}, Policy: NewPolicyFile(l.policy, quiet), Report: l.records.add, Logger: quiet,
	}
	if c.change != nil {
		c.change(&cfg)
	}
	l.must(cfg.validate())
	l.proxy = newProxy(cfg, nil)
	l.proxy.now = func() time.Time { return time.Now().Add(time.Duration(l.ahead.Load())) }
	l.run()
	return l
}

// serve starts the service.
func (l *webLab) serve(c webConfig) {
	l.Helper()
	listener := c.listener
	if listener == nil {
		var err error
		listener, err = net.Listen("tcp4", "127.0.0.1:0")
		l.must(err)
		server := &http.Server{Handler: c.handler, Protocols: new(http.Protocols)}
		server.Protocols.SetHTTP1(true)
		server.Protocols.SetUnencryptedHTTP2(true)
		go func() { _ = server.Serve(listener) }()
		l.Cleanup(func() { server.Close() })
	}
	l.backend, l.service = listener, addrPort(listener.Addr())
}

// run accepts clients, and has their connections looked after as Run does.
func (l *webLab) run() {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	l.must(err)
	l.addr = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var helpers sync.WaitGroup
	helpers.Go(func() { l.proxy.recheck(ctx) })
	helpers.Go(func() { l.proxy.expire(ctx) })
	helpers.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			s := newSession(l.proxy, c.(*net.TCPConn))
			s.server = l.service
			l.proxy.begin(s)
		}
	})
	l.Cleanup(func() {
		cancel()
		listener.Close()
		l.proxy.drain(context.Background())
		helpers.Wait()
	})
}

func (l *webLab) must(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

// write makes a policy for the service, and has the proxy read it if it is there.
func (l *webLab) write(http, access string) {
	l.Helper()
	if http != "" {
		http = "  http: " + http + "\n"
	}
	text := fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: web}
spec:
  target: Host
  ports: [%d]
%s  access: %s
---
apiVersion: sallyport.dev/v1alpha1
kind: IdentityProvider
metadata: {name: corp}
spec: {issuer: "https://login.example.org", audiences: [web]}
`, l.service.Port(), http, access)
	l.must(os.WriteFile(l.policy, []byte(text), 0o600))
	if l.proxy == nil {
		return
	}
	before := l.proxy.cfg.Policy.Set()
	l.proxy.cfg.Policy.read()
	if l.proxy.cfg.Policy.Set() == before {
		l.Fatalf("policy is not taken: %s", l.proxy.cfg.Policy.trouble)
	}
}

// tlsAs is how a client with that identity meets the proxy; nobody: without one.
func (l *webLab) tlsAs(id spiffeid.ID, protocols ...string) *tls.Config {
	l.Helper()
	c := tlsconfig.TLSClientConfig(l.authority.Bundle(), tlsconfig.AuthorizeID(proxyID))
	if !id.IsZero() {
		svid, err := l.authority.Issue(id)
		l.must(err)
		c = tlsconfig.MTLSClientConfig(svid, l.authority.Bundle(), tlsconfig.AuthorizeID(proxyID))
	}
	c.NextProtos = protocols
	return c
}

var nobody spiffeid.ID

// client speaks HTTP/1.1 or HTTP/2 with the proxy.
func (l *webLab) client(id spiffeid.ID, protocol string) *http.Client {
	l.Helper()
	t := &http.Transport{TLSClientConfig: l.tlsAs(id), Protocols: new(http.Protocols)}
	t.Protocols.SetHTTP1(protocol == alpnHTTP1)
	t.Protocols.SetHTTP2(protocol == alpnHTTP2)
	l.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t, Timeout: patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// dial is a connection to write bytes on.
func (l *webLab) dial(id spiffeid.ID, protocols ...string) *tls.Conn {
	l.Helper()
	c, err := tls.Dial("tcp", l.addr, l.tlsAs(id, protocols...))
	l.must(err)
	l.Cleanup(func() { c.Close() })
	l.must(c.SetDeadline(time.Now().Add(patience)))
	return c
}

// get asks for a path, and gives status and text.
func (l *webLab) get(c *http.Client, path string, header ...string) (int, string) {
	l.Helper()
	r, err := http.NewRequest(http.MethodGet, "https://"+l.addr+path, nil)
	l.must(err)
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	return l.do(c, r)
}

func (l *webLab) do(c *http.Client, r *http.Request) (int, string) {
	l.Helper()
	answer, err := c.Do(r)
	l.must(err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	l.must(err)
	return answer.StatusCode, string(text)
}

// find waits for a record.
func (l *webLab) find(event flow.Event, reason flow.Reason) flow.Record {
	l.Helper()
	var have []string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		l.proxy.denials.flush()
		all := l.records.all()
		if i := slices.IndexFunc(all, func(r flow.Record) bool { return r.Event == event && r.Reason == reason }); i >= 0 {
			return all[i]
		}
		have = nil
		for _, r := range all {
			have = append(have, fmt.Sprintf("%s %s %s", r.Event, r.Reason, r.Detail))
		}
	}
	l.Fatalf("no record %s %s among:\n%s", event, reason, strings.Join(have, "\n"))
	return flow.Record{}
}

// all is a copy of what was reported.
func (l *log) all() []flow.Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.records)
}

// tlsPair is a connection of a client that has been proven, and its other end.
func tlsPair(t *testing.T) (*client, *tls.Conn) {
	t.Helper()
	authority, err := devauthority.New(domain, devauthority.Options{})
	if err != nil {
		t.Fatal(err)
	}
	svid, err := authority.Issue(proxyID)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	theirs, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	ours, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	raw := &peeked{TCPConn: ours.(*net.TCPConn)}
	server := tls.Server(raw, tlsconfig.TLSServerConfig(svid))
	far := tls.Client(theirs, tlsconfig.TLSClientConfig(authority.Bundle(), tlsconfig.AuthorizeID(proxyID)))
	done := make(chan error, 1)
	go func() { done <- far.Handshake() }()
	if err := server.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close(); far.Close() })
	return &client{Conn: server, raw: raw}, far
}

func pemOf(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
