package proxy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// doubting is a provider of tokens that can be made to doubt all of a subject, or never to answer of it.
type doubting struct {
	why    atomic.Pointer[error]         // of subject ann; nil: she counts
	silent atomic.Pointer[chan struct{}] // of all others; nil: they count
}

// Verify implements token.Provider.
func (d *doubting) Verify(ctx context.Context, raw string, _ time.Time) (token.Verified, error) {
	var claims jwt.Claims
	parsed, err := jwt.ParseSigned(raw, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return token.Verified{}, err
	}
	if err := parsed.UnsafeClaimsWithoutVerification(&claims); err != nil {
		return token.Verified{}, err
	}
	if why := d.why.Load(); why != nil && claims.Subject == "ann" {
		return token.Verified{}, *why
	}
	if silent := d.silent.Load(); silent != nil && claims.Subject != "ann" {
		<-*silent
		return token.Verified{}, ctx.Err()
	}
	return token.Verified{Caller: policy.Caller{Provider: "corp", Subject: claims.Subject, Proof: policy.ProofOIDC}, Expires: claims.Expiry.Time()}, nil
}

// doubtingLab is a proxy that takes the tokens of such a provider, with a service whose answers are under way.
func newDoubtingLab(t *testing.T) (*webLab, *doubting, func(subject string) io.Reader) {
	t.Helper()
	d, service := &doubting{}, newHeld()
	l := newWebLab(t, webConfig{http: "{authenticate: [oidc], providers: [corp]}", access: `[{subjects: ["corp/*"]}]`, handler: service, change: func(c *Config) {
		c.Tokens = d.verifier(t, c)
	}})
	i := newIssuer(t)
	return l, d, func(subject string) io.Reader {
		t.Helper()
		r, err := http.NewRequest(http.MethodGet, "https://"+l.addr+"/", nil)
		l.must(err)
		r.Header.Set("Authorization", "Bearer "+tokenOf(l, i, subject))
		client := l.client(nobody, alpnHTTP2)
		answer, err := client.Do(r)
		l.must(err)
		t.Cleanup(func() { answer.Body.Close() })
		if answer.StatusCode != 200 {
			t.Fatalf("answer %s", answer.Status)
		}
		<-service.began
		return answer.Body
	}
}

// verifier has the tokens of corp looked at by the one provider.
func (d *doubting) verifier(t *testing.T, c *Config) *token.Verifier {
	t.Helper()
	v, err := token.New(token.Config{Policy: c.Policy.Set, Logger: slog.New(slog.DiscardHandler), Custom: map[string]token.Provider{"corp": d},
		Dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("nobody is asked") }})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// tokenOf is one of corp for a day.
func tokenOf(l *webLab, i issuer, subject string) string {
	l.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key, KeyID: "one"}}, nil)
	l.must(err)
	raw, err := jwt.Signed(signer).Claims(jwt.Claims{Issuer: "https://login.example.org", Subject: subject, Audience: jwt.Audience{"web"},
		IssuedAt: jwt.NewNumericDate(time.Now()), Expiry: jwt.NewNumericDate(time.Now().Add(24 * time.Hour))}).Serialize()
	l.must(err)
	return raw
}

// again is a policy that lets in the same, so that all is asked anew.
const again = `[{subjects: ["corp/*"]}, {subjects: ["corp/eve"]}]`

// TestSlowVerificationsHoldUpNobody: a token that counts no more ends its request while the looks at many others take their time.
func TestSlowVerificationsHoldUpNobody(t *testing.T) {
	t.Parallel()
	l, d, ask := newDoubtingLab(t)
	for range 20 {
		ask("bob")
	}
	ann := ask("ann")
	refused := error(token.ErrSignature)
	d.why.Store(&refused)
	answer := make(chan struct{})
	d.silent.Store(&answer)
	t.Cleanup(func() { close(answer) })
	l.write("{authenticate: [oidc], providers: [corp]}", again)
	if _, err := io.ReadAll(ann); err == nil {
		t.Error("the answer ended well")
	}
	if r := l.find(flow.EventRequest, flow.ReasonSessionEnded); r.Identity != "corp/ann" {
		t.Errorf("record %+v", r)
	}
}

// TestKeysThatAreNotKnownNow: that nobody can tell whether a token still counts ends no request, for a while. It is cut when it is known
// to count no more, without anything else that would have it asked for; and when the while is over.
func TestKeysThatAreNotKnownNow(t *testing.T) {
	t.Parallel()
	unknown := fmt.Errorf("%w: the cable is out", token.ErrNoKeys)
	for name, end := range map[string]func(*webLab, *doubting){
		"refused later":  func(_ *webLab, d *doubting) { why := error(token.ErrSignature); d.why.Store(&why) },
		"never answered": func(l *webLab, _ *doubting) { l.ahead.Store(int64(2 * keysPatience)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, d, ask := newDoubtingLab(t)
			ann := ask("ann")
			d.why.Store(&unknown)
			l.write("{authenticate: [oidc], providers: [corp]}", again)
			s := l.proxy.room.snapshot()[0]
			l.eventually("the doubt", func() bool { return !s.isSettled() })
			if end := s.wasCut(); end != nil || s.served().snapshot()[0].ctx.Err() != nil {
				t.Fatalf("is cut, though nothing is known against it: %v", end)
			}
			d.why.Store(nil)
			l.eventually("the end of the doubt", s.isSettled)
			d.why.Store(&unknown)
			l.write("{authenticate: [oidc], providers: [corp]}", `[{subjects: ["corp/*"]}]`)
			l.eventually("the doubt", func() bool { return !s.isSettled() })
			end(l, d)
			if _, err := io.ReadAll(ann); err == nil {
				t.Error("the answer ended well")
			}
			l.find(flow.EventRequest, flow.ReasonSessionEnded)
		})
	}
}

func (l *webLab) eventually(what string, ok func() bool) {
	l.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			l.Fatalf("%s: not within %s", what, patience)
		}
	}
}

// TestCertificateNewerThanTheConnection: a client whose handshake takes its time on a busy machine shows a certificate that was made
// since it connected. It was valid when it was shown, and a recheck must not say otherwise.
func TestCertificateNewerThanTheConnection(t *testing.T) {
	t.Parallel()
	service := newHeld()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: service})
	ca := newRoot(t)
	l.proxy.cfg.Identity.(own).AddX509Authority(ca.certificate)
	raw, err := net.Dial("tcp", l.addr)
	l.must(err)
	defer raw.Close()
	l.eventually("the proxy to accept", func() bool { return len(l.proxy.room.snapshot()) == 1 })
	s := l.proxy.room.snapshot()[0]
	l.eventually("another second of certificates", func() bool { return time.Now().Truncate(time.Second).After(s.accepted) })
	config := l.tlsAs(nobody, alpnHTTP1)
	config.Certificates = []tls.Certificate{ca.issue(webID.URL())}
	c := tls.Client(raw, config)
	_, err = fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	l.must(err)
	l.eventually("the request at the service", func() bool { return len(service.began) == 1 || s.wasCut() != nil })
	l.proxy.ask(l.proxy.room.snapshot(), (*session).recheck)
	if end := s.wasCut(); end != nil {
		t.Errorf("is cut by a recheck: %s", end.detail)
	}
	close(service.end)
}

// root signs certificates that begin at the second that they are made in.
type root struct {
	*testing.T
	key         *ecdsa.PrivateKey
	certificate *x509.Certificate
}

func newRoot(t *testing.T) root {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{domain.ID().URL()}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return root{t, key, certificate}
}

func (r root) issue(id *url.URL) tls.Certificate {
	r.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: time.Now().Truncate(time.Second), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{id}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, r.certificate, r.key.Public(), r.key)
	if err != nil {
		r.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: r.key}
}
