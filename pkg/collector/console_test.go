package collector

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// browse is a browser's side: it shows a certificate, and takes the collector's own.
func (r *running) browse(as identity) *http.Client {
	c := tlsconfig.MTLSClientConfig(as, as, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(domain, "/sallyport/collector")))
	return &http.Client{Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}, Timeout: 30 * time.Second}
}

func (r *running) page(t *testing.T, c *http.Client, path string) (int, string) {
	t.Helper()
	resp := must(c.Get("https://" + r.ConsoleAddr().String() + path))(t)
	defer resp.Body.Close()
	return resp.StatusCode, string(must(io.ReadAll(resp.Body))(t))
}

func startConsole(t *testing.T, change func(*Config)) *running {
	t.Helper()
	return start(t, newIDs(t), func(c *Config) {
		c.Console.Listen = "127.0.0.1:0"
		c.Actors = []string{"spiffe://example.org/ops/carol", "spiffe://example.org/robot"}
		if change != nil {
			change(c)
		}
	})
}

// TestConsoleKnowsItsReaders: who reads is who proves it by a certificate, as at the rpc, and the same people may act.
func TestConsoleKnowsItsReaders(t *testing.T) {
	t.Parallel()
	r := startConsole(t, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(critical, grantEntry(1, "01J8ZQ4X5M3T9V0Y2B7C6D1E4F", "ACTIVATED"))
	const grant = "/grant?id=01J8ZQ4X5M3T9V0Y2B7C6D1E4F"

	for _, path := range []string{"/", "/flows", "/reviews", "/nodes", "/losses", grant} {
		code, body := r.page(t, r.browse(r.ids.of("/ops/alice")), path)
		if code != http.StatusOK || !strings.Contains(body, "Read as spiffe://example.org/ops/alice, who may look and not act") {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	_, body := r.page(t, r.browse(r.ids.of("/ops/alice")), grant)
	if !strings.Contains(body, "Proof verified") || !strings.Contains(body, "as the collector itself tells it") || strings.Contains(body, "<form method=\"post\"") {
		t.Errorf("a reader sees %s", body)
	}
	if _, body := r.page(t, r.browse(r.ids.of("/ops/carol")), grant); !strings.Contains(body, "action=\"/statement\"") {
		t.Errorf("an actor sees %s", body)
	}
	for _, stranger := range []string{"/shop/checkout", "/robot", "/sallyport/agent/node-1", "/sallyport/collector"} {
		if resp, err := r.browse(r.ids.of(stranger)).Get("https://" + r.ConsoleAddr().String() + "/"); err == nil {
			t.Errorf("%s was let in: %s", stranger, resp.Status)
		}
	}
	foreign := newIDs(t).of("/ops/alice") // of an authority that nobody here trusts
	bundle := r.ids.of("/ops/alice").Bundle
	if resp, err := r.browse(identity{foreign.SVID, bundle}).Get("https://" + r.ConsoleAddr().String() + "/"); err == nil {
		t.Errorf("a forged certificate was let in: %s", resp.Status)
	}
	nobody := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	if resp, err := nobody.Get("https://" + r.ConsoleAddr().String() + "/"); err == nil {
		t.Errorf("somebody without a certificate was let in: %s", resp.Status)
	}
}

// TestBrowsersAreLookedAtAgain: what a handshake let in is asked for its rights at each call, as at the rpc.
func TestBrowsersAreLookedAtAgain(t *testing.T) {
	t.Parallel()
	p := must(newPeers(domain, []string{"spiffe://example.org/ops/*"}, []string{"spiffe://example.org/robot"}))(t)
	service := inside{p.browsers(&query{}, &ingest{log: slog.New(slog.DiscardHandler)})}
	as := func(path string) context.Context {
		return context.WithValue(t.Context(), browserKey{}, spiffeid.RequireFromPath(domain, path))
	}
	for name, ctx := range map[string]context.Context{"nobody": t.Context(), "an actor who is no reader": as("/robot"), "a stranger": as("/shop/checkout")} {
		if _, err := service.Nodes(ctx, nil); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := drain(service.Flows(ctx, &api.FlowQuery{})); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, ctx := range map[string]context.Context{"nobody": t.Context(), "a reader": as("/ops/alice")} {
		if _, err := service.Act(ctx, &api.ActRequest{Node: "node-1"}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s acts: %v", name, err)
		}
	}
}

// TestConsoleForgetsWhoEnded: a connection outlives the certificate that it was opened with, and what it may does not.
func TestConsoleForgetsWhoEnded(t *testing.T) {
	t.Parallel()
	now := &clock{t: time.Now()}
	r := startConsole(t, func(c *Config) { c.Now = now.now })
	browser := r.browse(r.ids.of("/ops/alice"))
	browser.Transport.(*http.Transport).DisableKeepAlives = false
	if code, body := r.page(t, browser, "/"); code != http.StatusOK {
		t.Fatalf("at first: %d %s", code, body)
	}
	now.pass(2 * time.Hour)
	if code, body := r.page(t, browser, "/"); code != http.StatusForbidden || !strings.Contains(body, "your certificate has ended") {
		t.Errorf("after its end: %d %s", code, body)
	}
}

// TestConsoleActsAsItsReader: the rpc sees who is at the browser, and refuses a reader who is no actor, whatever the browser sends.
func TestConsoleActsAsItsReader(t *testing.T) {
	t.Parallel()
	r := startConsole(t, nil)
	post := func(as string, header http.Header) (int, string) {
		t.Helper()
		form := url.Values{"node": {"node-9"}, "grant": {"01J8ZQ4X5M3T9V0Y2B7C6D1E4F"}, "why": {"enough"}}
		req := must(http.NewRequest(http.MethodPost, "https://"+r.ConsoleAddr().String()+"/revoke", strings.NewReader(form.Encode())))(t)
		for name, values := range header {
			req.Header[name] = values
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		resp := must(r.browse(r.ids.of(as)).Do(req))(t)
		defer resp.Body.Close()
		return resp.StatusCode, string(must(io.ReadAll(resp.Body))(t))
	}
	if code, body := post("/ops/alice", nil); code != http.StatusForbidden || !strings.Contains(body, "is not among the collector&#39;s actors") {
		t.Errorf("a reader: %d %s", code, body)
	}
	if code, body := post("/ops/carol", nil); code == http.StatusOK || !strings.Contains(body, "node &#34;node-9&#34; is not connected") || !strings.Contains(body, "sallyport grant revoke") {
		t.Errorf("an actor: %d %s", code, body)
	}
	for _, from := range []http.Header{{"Sec-Fetch-Site": {"cross-site"}}, {"Sec-Fetch-Site": {"same-site"}}, {"Origin": {"https://evil.example"}}} {
		if code, body := post("/ops/carol", from); code != http.StatusForbidden || !strings.Contains(body, "That came from another site") {
			t.Errorf("from elsewhere %v: %d %s", from, code, body)
		}
	}
}

// TestConsoleCertificate: where browsers come, a certificate that they know is shown, and a new file counts at the next connection.
func TestConsoleCertificate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certificate, key := filepath.Join(dir, "web.pem"), filepath.Join(dir, "web.key")
	roots := webCertificate(t, certificate, key)
	r := startConsole(t, func(c *Config) { c.Console.Certificate, c.Console.Key = certificate, key })
	me := r.ids.of("/ops/alice")
	visit := func(roots *x509.CertPool) error {
		c := tlsconfig.MTLSWebClientConfig(me, roots)
		resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}}).Get("https://" + r.ConsoleAddr().String() + "/")
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	if err := visit(roots); err != nil {
		t.Fatal(err)
	}
	renewed := webCertificate(t, certificate, key)
	if visit(roots) == nil || visit(renewed) != nil {
		t.Errorf("the old certificate is shown still")
	}
}

// webCertificate writes a new one for 127.0.0.1, and gives who trusts it.
func webCertificate(t *testing.T, certificate, key string) *x509.CertPool {
	t.Helper()
	private := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der := must(x509.CreateCertificate(rand.Reader, c, c, private.Public(), private))(t)
	for path, block := range map[string]*pem.Block{certificate: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(private))(t)}} {
		var out bytes.Buffer
		if err := pem.Encode(&out, block); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	roots := x509.NewCertPool()
	roots.AddCert(must(x509.ParseCertificate(der))(t))
	return roots
}
