package proxy

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// issuer signs JWT-SVIDs.
type issuer struct {
	*testing.T
	key    *ecdsa.PrivateKey
	bundle *jwtbundle.Bundle
}

func newIssuer(t *testing.T) issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i := issuer{t, key, jwtbundle.New(domain)}
	if err := i.bundle.AddJWTAuthority("one", key.Public()); err != nil {
		t.Fatal(err)
	}
	return i
}

// token says that the subject asks the audience.
func (i issuer) token(subject, audience string, ttl time.Duration) string {
	i.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key, KeyID: "one"}}, nil)
	if err != nil {
		i.Fatal(err)
	}
	now := time.Now()
	raw, err := jwt.Signed(signer).Claims(jwt.Claims{Subject: subject, Audience: jwt.Audience{audience}, IssuedAt: jwt.NewNumericDate(now),
		Expiry: jwt.NewNumericDate(now.Add(ttl))}).Serialize()
	if err != nil {
		i.Fatal(err)
	}
	return raw
}

// verify has the proxy verify tokens of the issuer.
func (i issuer) verify(c *Config) {
	i.Helper()
	v, err := token.New(token.Config{Policy: c.Policy.Set, Bundles: i.bundle, Logger: slog.New(slog.DiscardHandler),
		Dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("nobody is asked") }})
	if err != nil {
		i.Fatal(err)
	}
	c.Tokens = v
}

const byToken = "{authenticate: [spiffe, jwt], audiences: [web]}"

func TestTokens(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	l := newWebLab(t, webConfig{http: byToken, access: onlyWeb, handler: http.HandlerFunc(echo), change: i.verify})
	for _, protocol := range []string{alpnHTTP1, alpnHTTP2} {
		c := l.client(nobody, protocol)
		status, text := l.get(c, "/", "Authorization", "Bearer "+i.token(webID.String(), "web", time.Minute))
		if status != 200 || !lines(text)["X-Sallyport-Identity: "+webID.String()] || !lines(text)["X-Sallyport-Proof: jwt"] {
			t.Errorf("%s: %d %s", protocol, status, text)
		}
		if strings.Contains(text, "Authorization") {
			t.Errorf("%s: the service was given the token:\n%s", protocol, text)
		}
		if status, text = l.get(c, "/"); status != 401 || !strings.Contains(text, "LOGIN_NEEDED") {
			t.Errorf("%s: without a token, on the same connection: %d %s", protocol, status, text)
		}
		if status, text = l.get(c, "/", "Authorization", "Bearer "+i.token(webID.String(), "other", time.Minute)); status != 401 || !strings.Contains(text, "TOKEN_REFUSED") {
			t.Errorf("%s: a token for another: %d %s", protocol, status, text)
		}
		if status, _ = l.get(c, "/", "Authorization", "Bearer "+i.token(mallory.String(), "web", time.Minute)); status != 403 {
			t.Errorf("%s: a token of somebody who may not: %d", protocol, status)
		}
		if status, _ = l.get(c, "/", "Authorization", "Bearer x", "Authorization", "Bearer y"); status != 400 {
			t.Errorf("%s: two tokens: %d", protocol, status)
		}
	}
	status, text := l.get(l.client(webID, alpnHTTP1), "/", "Authorization", "Basic of-the-service")
	if status != 200 || !lines(text)["Authorization: Basic of-the-service"] || !lines(text)["X-Sallyport-Proof: spiffe"] {
		t.Errorf("a certificate, and an Authorization that is the service's: %d %s", status, text)
	}
	if r := l.find(flow.EventRequest, flow.ReasonIdentity); r.Proof != "jwt" || r.Identity != webID.String() {
		t.Errorf("record %+v", r)
	}
	if r := l.find(flow.EventDeny, flow.ReasonLoginNeeded); r.Identity != "" {
		t.Errorf("a request without a token has the identity of another: %+v", r)
	}
	l.find(flow.EventDeny, flow.ReasonTokenRefused)
}

// TestTokensOfAProviderThatIsAway: a new token would be no better, so none is asked for.
func TestTokensOfAProviderThatIsAway(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	l := newWebLab(t, webConfig{http: "{authenticate: [oidc], providers: [corp]}", access: `[{subjects: ["corp/*"]}]`, handler: http.HandlerFunc(echo), change: i.verify})
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key, KeyID: "one"}}, nil)
	l.must(err)
	raw, err := jwt.Signed(signer).Claims(jwt.Claims{Issuer: "https://login.example.org", Subject: "ann", Audience: jwt.Audience{"web"},
		IssuedAt: jwt.NewNumericDate(time.Now()), Expiry: jwt.NewNumericDate(time.Now().Add(time.Minute))}).Serialize()
	l.must(err)
	status, text := l.get(l.client(nobody, alpnHTTP1), "/", "Authorization", "Bearer "+raw)
	if status != 503 || !strings.Contains(text, "TOKEN_REFUSED") || !strings.Contains(text, "send the same token") {
		t.Errorf("%d %s", status, text)
	}
	if r := l.find(flow.EventDeny, flow.ReasonTokenRefused); !strings.Contains(r.Detail, "corp: not fetched yet") {
		t.Errorf("record %+v", r)
	}
}

// TestLoginPages: a record tells a login that failed.
func TestLoginPages(t *testing.T) {
	t.Parallel()
	if s := loginPage(http.StatusSeeOther); s != "a page of the login" {
		t.Error(s)
	}
	if s := loginPage(http.StatusServiceUnavailable); !strings.Contains(s, "503") || !strings.Contains(s, "the proxy's log") {
		t.Error(s)
	}
}

// TestTokensEndUnderRequests: by their time, and by the trust that they were believed by.
func TestTokensEndUnderRequests(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		ttl time.Duration
		end func(*webLab, issuer)
	}{
		"expiry": {2 * time.Second, func(*webLab, issuer) {}},
		"trust": {time.Hour, func(l *webLab, i issuer) {
			i.bundle.RemoveJWTAuthority("one")
			l.write(byToken, `[{identities: ["spiffe://example.org/app/web"]}, {identities: ["spiffe://example.org/app/more"]}]`)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			i, service := newIssuer(t), newHeld()
			l := newWebLab(t, webConfig{http: byToken, access: onlyWeb, handler: service, change: i.verify})
			r, err := http.NewRequest(http.MethodGet, "https://"+l.addr+"/", nil)
			l.must(err)
			r.Header.Set("Authorization", "Bearer "+i.token(webID.String(), "web", c.ttl))
			client := l.client(nobody, alpnHTTP2)
			client.Timeout = time.Minute // of tokens the skew is allowed for
			answer, err := client.Do(r)
			l.must(err)
			defer answer.Body.Close()
			c.end(l, i)
			if name == "trust" {
				if text, err := io.ReadAll(answer.Body); err == nil {
					t.Errorf("the answer ended well: %q", text)
				}
				l.find(flow.EventRequest, flow.ReasonSessionEnded)
				return
			}
			for _, s := range l.proxy.room.snapshot() {
				s.expire(time.Now().Add(time.Hour)) // as the clock will
			}
			if text, err := io.ReadAll(answer.Body); err == nil {
				t.Errorf("the answer ended well: %q", text)
			}
			l.find(flow.EventRequest, flow.ReasonSessionEnded)
		})
	}
}

// TestMethodsThatAreNotTaken: a proof of identity that the service does not take is none.
func TestMethodsThatAreNotTaken(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	l := newWebLab(t, webConfig{http: "{authenticate: [jwt], audiences: [web]}", access: onlyWeb, handler: http.HandlerFunc(echo), change: i.verify})
	if status, _ := l.get(l.client(webID, alpnHTTP1), "/"); status != 401 {
		t.Errorf("a certificate where tokens alone count: %d", status)
	}
	l.write("{}", onlyWeb)
	if _, err := l.client(nobody, alpnHTTP1).Get("https://" + l.addr); err == nil {
		t.Error("a client without certificate where certificates alone count is answered")
	}
}

// TestNobodyIsRecorded: a client that comes and goes without a request.
func TestNobodyIsRecorded(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: byToken, access: onlyWeb, handler: http.HandlerFunc(echo)})
	l.dial(nobody).Close()
	l.find(flow.EventDeny, flow.ReasonLoginNeeded)
}

// writeCertificate makes a web certificate for the name.
func writeCertificate(t *testing.T, f policy.WebCertificate, name string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Second), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(f.CertFile, []byte(pemOf(der)), 0o600),
		os.WriteFile(f.KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// TestWebCertificates: by name, read again when they change, the last good one kept.
func TestWebCertificates(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := policy.WebCertificate{Name: "public", CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	i := newIssuer(t)
	certificates := NewCertificates([]policy.WebCertificate{f}, slog.New(slog.DiscardHandler))
	l := newWebLab(t, webConfig{http: "{authenticate: [jwt], audiences: [web], certificate: public}", access: onlyWeb, handler: http.HandlerFunc(echo),
		change: func(c *Config) { i.verify(c); c.Certificates = certificates }})
	if _, err := tls.Dial("tcp", l.addr, &tls.Config{InsecureSkipVerify: true}); err == nil {
		t.Error("is served without its certificate")
	}
	if r := l.find(flow.EventDeny, flow.ReasonNoOwnIdentity); !strings.Contains(r.Detail, f.CertFile) {
		t.Errorf("record %+v", r)
	}
	for serial := int64(1); serial <= 2; serial++ {
		writeCertificate(t, f, "web.example.org", serial)
		certificates.look()
		l.servedBy(f, i, serial)
	}
	l.must(os.WriteFile(f.KeyFile, []byte("no key"), 0o600))
	certificates.look()
	writeCertificate(t, policy.WebCertificate{CertFile: f.CertFile, KeyFile: filepath.Join(dir, "other.pem")}, "web.example.org", 3)
	certificates.look()
	c, err := tls.Dial("tcp", l.addr, &tls.Config{InsecureSkipVerify: true})
	l.must(err)
	if got := c.ConnectionState().PeerCertificates[0].SerialNumber.Int64(); got != 2 {
		t.Errorf("certificate %d is shown, want the last good one", got)
	}
	c.Close()
	if _, err := certificates.Get("other"); err == nil || !strings.Contains(err.Error(), "spec.proxy.certificates") {
		t.Errorf("a certificate that is not there: %v", err)
	}
}

// servedBy asks as a client of the web does, in TLS 1.2.
func (l *webLab) servedBy(f policy.WebCertificate, i issuer, serial int64) {
	l.Helper()
	text, err := os.ReadFile(f.CertFile)
	l.must(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	c, err := tls.Dial("tcp", l.addr, &tls.Config{RootCAs: roots, ServerName: "web.example.org", MaxVersion: tls.VersionTLS12})
	l.must(err)
	defer c.Close()
	if got := c.ConnectionState().PeerCertificates[0].SerialNumber.Int64(); got != serial {
		l.Errorf("certificate %d is shown, want %d", got, serial)
	}
	_, err = fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: web.example.org\r\nAuthorization: Bearer %s\r\n\r\n", i.token(webID.String(), "web", time.Minute))
	l.must(err)
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	l.must(err)
	if answer.StatusCode != 200 {
		l.Errorf("answer %s", answer.Status)
	}
}

// TestWhatIsSaidOfWebCertificates: whether clients are refused meanwhile, or until when the last good one lasts.
func TestWhatIsSaidOfWebCertificates(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := policy.WebCertificate{Name: "public", CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	var said strings.Builder
	certificates := NewCertificates([]policy.WebCertificate{f}, slog.New(slog.NewTextHandler(&said, nil)))
	for _, step := range []struct {
		change func()
		says   string
	}{
		{func() {}, "no web certificate: clients of services that name it are refused"},
		{func() { writeCertificate(t, f, "web.example.org", 1) }, "web certificate in use"},
		{func() { certificates.warn(f, time.Now().Add(45*time.Minute)) }, "web certificate ends soon"},
		{func() { _ = os.WriteFile(f.KeyFile, []byte("no key"), 0o600) }, "keep last good web certificate"},
	} {
		step.change()
		certificates.look()
		if !strings.Contains(said.String(), step.says) {
			t.Errorf("want %q, it says %s", step.says, said.String())
		}
		said.Reset()
		certificates.look()
		if said.Len() > 0 {
			t.Errorf("it is said again: %s", said.String())
		}
	}
}

// TestStatesOfWebCertificates: what people who ask the agent are told, from none to one that has ended.
func TestStatesOfWebCertificates(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := policy.WebCertificate{Name: "public", CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	certificates := NewCertificates([]policy.WebCertificate{f}, slog.New(slog.DiscardHandler))
	for _, step := range []struct {
		change  func()
		at      time.Duration
		problem string
	}{
		{func() {}, 0, "clients of services that name it are refused: read web certificate public from " + f.CertFile},
		{func() { writeCertificate(t, f, "web.example.org", 1) }, 0, ""},
		{func() {}, 45 * time.Minute, "it ends soon; see why"},
		{func() { _ = os.WriteFile(f.KeyFile, []byte("no key"), 0o600) }, 0, "the last good one stays in use: read web certificate public"},
		{func() {}, 2 * time.Hour, "it has ended, and browsers refuse it; see why"},
	} {
		step.change()
		certificates.look()
		got := certificates.states(time.Now().Add(step.at))[0]
		if got.GetName() != "public" || !strings.HasPrefix(got.GetProblem(), step.problem) || step.problem == "" && got.GetProblem() != "" {
			t.Errorf("want the problem %q: %v", step.problem, got)
		}
		if in := time.Until(got.GetUntil().AsTime()); got.GetUntil() != nil && (in < 50*time.Minute || in > time.Hour) {
			t.Errorf("it is valid for %s", in)
		}
		if none := strings.HasPrefix(got.GetProblem(), "clients"); none != (got.GetUntil() == nil) {
			t.Errorf("there is none: %v", got)
		}
	}
}
