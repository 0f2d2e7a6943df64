package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
)

const webName = "web.example.org"

// httpPolicy is the service of policyFor, as HTTP.
func httpPolicy(access string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: web}
spec:
  target: Pod
  ports: [%d]
  addresses: ["10.2.0.2", "fd00:2::2"]
  http: {authenticate: [spiffe, jwt], audiences: [%s], certificate: public, hosts: [%s]}
  access: %s
`, port, webName, webName, access)
}

// webCertificate makes one that curl believes and the proxy's user can read.
func (b *bench) webCertificate() {
	b.Helper()
	certFile, keyFile := filepath.Join(b.Dir, "web.pem"), filepath.Join(b.Dir, "web.key")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	b.must(err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: webName}, DNSNames: []string{webName}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	b.must(err)
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	b.must(err)
	b.must(os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644))
	b.must(os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o644))
}

// newHTTPBench is a bench whose service speaks HTTP, and is served as that.
func newHTTPBench(t *testing.T) *bench {
	t.Helper()
	b := newBench(t, func(s *settings) { s.certificate = true })
	b.writePolicy(httpPolicy(`[{identities: ["spiffe://example.org/app/web"], routes: [{methods: [GET], paths: ["/public/*"]}]}]`))
	for _, f := range lab.Families() {
		l, err := b.Pod.Listen(b.target(f))
		b.must(err)
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s from %s as %s by %s\n", r.RequestURI, r.RemoteAddr, r.Header.Get("X-Sallyport-Identity"), r.Header.Get("X-Sallyport-Proof"))
		})}
		go func() { _ = server.Serve(l) }()
		b.Cleanup(func() { server.Close() })
	}
	b.until(func() bool { return strings.Count(b.proxy.Output(), "policy in force") > 1 })
	return b
}

// curl asks from the client's side, and gives what is printed, with the status in the last line.
func (b *bench) curl(f lab.Family, args ...string) string {
	b.Helper()
	addr := b.Pod.Addr(f).String()
	if f == lab.IPv6 {
		addr = "[" + addr + "]"
	}
	out, err := b.Client.Run(b.ctx, "curl", append([]string{"-sS", "--max-time", "10", "--cacert", filepath.Join(b.Dir, "web.pem"), "--write-out", "%{http_code} %{http_version}",
		"--path-as-is", "--resolve", fmt.Sprintf("%s:%d:%s", webName, port, addr)}, args...)...)
	b.must(err)
	return out
}

// TestCurl asks as people do, through px, in both protocols and families.
func TestCurl(t *testing.T) {
	b := newHTTPBench(t)
	svid, err := b.authority.Issue(web)
	b.must(err)
	cert, key, err := svid.Marshal()
	b.must(err)
	files := filepath.Join(b.Dir, "svid.pem")
	b.must(os.WriteFile(files, append(cert, key...), 0o600))
	token, err := b.authority.IssueToken(web, webName)
	b.must(err)
	base := fmt.Sprintf("https://%s:%d", webName, port)
	for _, f := range lab.Families() {
		for _, version := range []string{"--http1.1", "--http2"} {
			want := fmt.Sprintf(" as %s by ", web)
			out := b.curl(f, version, "--cert", files, base+"/public/a?b")
			if !strings.HasPrefix(out, "/public/a?b from "+fromAddr(b, f)) || !strings.Contains(out, want+"spiffe\n200") {
				t.Errorf("%s %s by certificate: %s", f, version, out)
			}
			out = b.curl(f, version, "-H", "Authorization: Bearer "+token, base+"/public/a")
			if !strings.Contains(out, want+"jwt\n200") {
				t.Errorf("%s %s by token: %s", f, version, out)
			}
		}
	}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"nobody":       {[]string{base + "/public/a"}, "LOGIN_NEEDED"},
		"not allowed":  {[]string{"--cert", files, base + "/admin"}, "NOT_AUTHORISED"},
		"another path": {[]string{"--cert", files, base + "/public/../admin"}, "BAD_REQUEST"},
		"bad token":    {[]string{"-H", "Authorization: Bearer " + token + "x", base + "/public/a"}, "TOKEN_REFUSED"},
	} {
		if out := b.curl(lab.IPv4, c.args...); !strings.HasPrefix(out, c.want) {
			t.Errorf("%s: %s", name, out)
		}
		b.find("DENY", c.want)
	}
	r := b.find("REQUEST", "IDENTITY")
	if r.Request.GetPath() != "/public/a" || r.Request.Status != 200 || r.Identity != web.String() || r.Service != "web" {
		t.Errorf("record %v", r)
	}
}

func fromAddr(b *bench, f lab.Family) string {
	if f == lab.IPv6 {
		return "[" + b.Client.Addr(f).String() + "]:"
	}
	return b.Client.Addr(f).String() + ":"
}

// TestProxyProtocolFromStrangers: what a load balancer would say of a client's address is no TLS here, whoever says it.
func TestProxyProtocolFromStrangers(t *testing.T) {
	b := newHTTPBench(t)
	for _, preamble := range []string{"PROXY TCP4 10.9.9.9 10.2.0.2 1234 5432\r\n", "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x0a\x09\x09\x09\x0a\x02\x00\x02\x04\xd2\x15\x38"} {
		c := b.plain(b.target(lab.IPv4))
		_, err := c.Write([]byte(preamble))
		b.must(err)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%q: client sees %v, want a reset", preamble, err)
		}
	}
	if r := b.find("DENY", "NO_TLS"); !strings.HasPrefix(r.Client, b.Client.Addr(lab.IPv4).String()+":") {
		t.Errorf("record %v", r)
	}
}

// TestTellsWhatItWorksWith: the agent hears of the web certificate and of the provider, and that it cannot be reached.
func TestTellsWhatItWorksWith(t *testing.T) {
	t.Parallel()
	b := newBench(t, func(s *settings) { s.certificate = true })
	b.writePolicy(httpPolicy(`[{identities: ["spiffe://example.org/app/web"]}]`) + `---
apiVersion: sallyport.dev/v1alpha1
kind: IdentityProvider
metadata: {name: corp}
spec: {issuer: "https://login.example.org", audiences: [web]}
`)
	b.until(func() bool {
		s := b.records.lastState()
		return len(s.GetCertificates()) == 1 && s.GetCertificates()[0].GetName() == "public" && s.GetCertificates()[0].GetUntil() != nil &&
			len(s.GetProviders()) == 1 && strings.HasPrefix(s.GetProviders()[0].GetProblem(), "its tokens are refused")
	})
}
