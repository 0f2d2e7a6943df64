package proxy

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// withTokens is what stands behind the rules of a service that takes JWT-SVIDs.
const withTokens = "\n  tokens: {audiences: [web], certificate: web}"

// tokenLab is a lab whose service sends back what it gets, and takes tokens.
func tokenLab(t *testing.T, i issuer) (*webLab, *tls.Config) {
	t.Helper()
	return newTokenLab(t, onlyWeb+withTokens, i.verify)
}

func newTokenLab(t *testing.T, access string, verify func(*Config)) (*webLab, *tls.Config) {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	client := &tls.Config{ServerName: "web.example.org", RootCAs: x509.NewCertPool(), NextProtos: []string{api.ConnectProtocol}}
	l := newWebLab(t, webConfig{listener: listener, access: access, change: func(c *Config) {
		dir := t.TempDir()
		f := policy.WebCertificate{Name: "web", CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
		writeCertificate(t, f, "web.example.org", 1)
		pem, err := os.ReadFile(f.CertFile)
		if err != nil || !client.RootCAs.AppendCertsFromPEM(pem) {
			t.Fatal(err)
		}
		c.Certificates = NewCertificates([]policy.WebCertificate{f}, c.Logger)
		verify(c)
	}})
	return l, client
}

// shown is a connection on which something was written, with the answer to that.
type shown struct {
	*tls.Conn
	in     *bufio.Reader
	status int
	text   string
}

func (l *webLab) show(c *tls.Config, text string) shown {
	l.Helper()
	conn, err := tls.Dial("tcp", l.addr, c)
	l.must(err)
	l.Cleanup(func() { conn.Close() })
	l.must(conn.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(conn, text)
	l.must(err)
	s := shown{Conn: conn, in: bufio.NewReader(conn)}
	answer, err := http.ReadResponse(s.in, &http.Request{Method: http.MethodConnect})
	l.must(err)
	s.status = answer.StatusCode
	if s.status != http.StatusOK {
		body, err := io.ReadAll(s.in)
		l.must(err)
		s.text = string(body)
	}
	return s
}

func connectWith(header ...string) string {
	return "CONNECT web.example.org:1 HTTP/1.1\r\nHost: web.example.org:1\r\n" + strings.Join(header, "") + "\r\n"
}

func bearer(token string) string { return "Authorization: Bearer " + token + "\r\n" }

// TestTokenBeforeTheFirstByte: who shows a good one is carried, with its name in the record; and who has an SVID as before.
func TestTokenBeforeTheFirstByte(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	l, byToken := tokenLab(t, i)
	c := l.show(byToken, connectWith(bearer(i.token(webID.String(), "web", time.Minute))))
	if c.status != http.StatusOK {
		t.Fatalf("%d %s", c.status, c.text)
	}
	_, err := io.WriteString(c, "bytes\n")
	l.must(err)
	if line, err := c.in.ReadString('\n'); err != nil || line != "bytes\n" {
		t.Errorf("service answers %q, %v", line, err)
	}
	l.must(c.CloseWrite())
	if rest, err := io.ReadAll(c.in); err != nil || len(rest) > 0 {
		t.Errorf("%q, %v", rest, err)
	}
	for event, reason := range map[flow.Event]flow.Reason{flow.EventOpen: flow.ReasonIdentity, flow.EventClose: flow.ReasonClosed} {
		r := l.find(event, reason)
		if r.Identity != webID.String() || r.Proof != policy.ProofJWT || event == flow.EventClose && (r.BytesToServer != 6 || r.BytesToClient != 6) {
			t.Errorf("record %+v", r)
		}
	}
	other := l.dial(webID)
	_, err = io.WriteString(other, "as before\n")
	l.must(err)
	if line, err := bufio.NewReader(other).ReadString('\n'); err != nil || line != "as before\n" {
		t.Errorf("client with an SVID: %q, %v", line, err)
	}
}

// TestTokensThatAreTurnedAway: each with its status, its reason and a next step, and nothing of it reaches the service.
func TestTokensThatAreTurnedAway(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	l, byToken := tokenLab(t, i)
	good := bearer(i.token(webID.String(), "web", time.Minute))
	for name, c := range map[string]struct {
		text   string
		status int
		reason flow.Reason
	}{
		"no token":              {connectWith(), 401, flow.ReasonLoginNeeded},
		"another scheme":        {connectWith("Authorization: Basic YTpi\r\n"), 401, flow.ReasonLoginNeeded},
		"for another":           {connectWith(bearer(i.token(webID.String(), "other", time.Minute))), 401, flow.ReasonTokenRefused},
		"expired":               {connectWith(bearer(i.token(webID.String(), "web", -time.Hour))), 401, flow.ReasonTokenRefused},
		"somebody who may not":  {connectWith(bearer(i.token(mallory.String(), "web", time.Minute))), 403, flow.ReasonNotAuthorised},
		"two tokens":            {connectWith(good, good), 400, flow.ReasonBadRequest},
		"another method":        {strings.Replace(connectWith(good), "CONNECT web.example.org:1", "GET /", 1), 400, flow.ReasonBadRequest},
		"bytes before the word": {connectWith(good) + "early", 400, flow.ReasonBadRequest},
		"a body":                {connectWith(good, "Content-Length: 3\r\n"), 400, flow.ReasonBadRequest},
		"too large":             {connectWith(good, "X: "+strings.Repeat("x", maxConnectHeader)+"\r\n"), 400, flow.ReasonBadRequest},
	} {
		got := l.show(byToken, c.text)
		if got.status != c.status || !strings.HasPrefix(got.text, c.reason.String()+": ") || !strings.Contains(got.text, "\nhint: ") {
			t.Errorf("%s: %d %s", name, got.status, got.text)
		}
		l.find(flow.EventDeny, c.reason)
	}
	if r := l.find(flow.EventDeny, flow.ReasonNotAuthorised); r.Identity != mallory.String() || r.Proof != policy.ProofJWT {
		t.Errorf("record %+v", r)
	}
	for _, r := range l.records.all() {
		if r.Event == flow.EventOpen {
			t.Errorf("was let in: %+v", r)
		}
	}
}

// TestNoTokenWithoutItsProtocol: a client that does not offer it needs an SVID, also where a token would do.
func TestNoTokenWithoutItsProtocol(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	l, byToken := tokenLab(t, i)
	c, err := tls.Dial("tcp", l.addr, l.tlsAs(nobody))
	if err == nil {
		l.must(c.SetDeadline(time.Now().Add(patience)))
		_, err = c.Read(make([]byte, 1))
	}
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" {
		t.Errorf("client without anything sees %v, want an alert", err)
	}
	l.find(flow.EventDeny, flow.ReasonHandshakeFailed)
	l.write("", onlyWeb)
	if c, err := tls.Dial("tcp", l.addr, byToken); err == nil {
		c.Close()
		t.Error("a service without tokens shows its web certificate")
	}
}

// TestLiveTokens: the end of a token, of the trust in it, of the rule and of tokens as such cuts what it let in.
func TestLiveTokens(t *testing.T) {
	t.Parallel()
	deny := "\n---\napiVersion: sallyport.dev/v1alpha1\nkind: DenyList\nmetadata: {name: stop}\nspec: {reason: left, identities: [\"" + webID.String() + "\"]}"
	for name, c := range map[string]struct {
		end    func(*webLab, issuer)
		reason flow.Reason
	}{
		"expiry": {func(l *webLab, _ issuer) { l.ahead.Store(int64(2 * time.Hour)) }, flow.ReasonSessionEnded},
		"trust": {func(l *webLab, i issuer) {
			i.bundle.RemoveJWTAuthority("one")
			l.write("", `[{identities: ["spiffe://example.org/app/web", "spiffe://example.org/a"]}]`+withTokens)
		}, flow.ReasonSessionEnded},
		"rule":      {func(l *webLab, _ issuer) { l.write("", `[{identities: ["spiffe://example.org/a"]}]`+withTokens) }, flow.ReasonPolicyChanged},
		"no tokens": {func(l *webLab, _ issuer) { l.write("", onlyWeb) }, flow.ReasonPolicyChanged},
		"deny list": {func(l *webLab, _ issuer) { l.write("", onlyWeb+withTokens+deny) }, flow.ReasonPolicyChanged},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			i := newIssuer(t)
			l, byToken := tokenLab(t, i)
			conn := l.show(byToken, connectWith(bearer(i.token(webID.String(), "web", time.Hour))))
			l.find(flow.EventOpen, flow.ReasonIdentity)
			c.end(l, i)
			if _, err := conn.in.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) {
				t.Errorf("client sees %v, want a cut", err)
			}
			l.find(flow.EventClose, c.reason)
		})
	}
}

// TestServiceThatDoesNotAnswerATokensClient: it is told, for it has been let in by the proxy.
func TestServiceThatDoesNotAnswerATokensClient(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	l, byToken := tokenLab(t, i)
	l.must(l.backend.Close())
	if c := l.show(byToken, connectWith(bearer(i.token(webID.String(), "web", time.Hour)))); c.status != http.StatusBadGateway {
		t.Errorf("%d %s", c.status, c.text)
	}
	l.find(flow.EventDeny, flow.ReasonUpstreamFailed)
}

// TestRefusedTokensAreRemembered: who shows a token that proves nobody comes behind who is not known, as with a bad certificate.
func TestRefusedTokensAreRemembered(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	l, byToken := tokenLab(t, i)
	l.show(byToken, connectWith(bearer(i.token(webID.String(), "other", time.Minute))))
	l.find(flow.EventDeny, flow.ReasonTokenRefused)
	here := netip.MustParsePrefix("127.0.0.1/32")
	if s := l.proxy.turns.standing(here); s != refused {
		t.Errorf("after a bad token: standing %d", s)
	}
	l.show(byToken, connectWith(bearer(i.token(webID.String(), "web", time.Minute))))
	if s := l.proxy.turns.standing(here); s != welcome {
		t.Errorf("after a good one: standing %d", s)
	}
}

// TestConnectionsWhoseKeysAreNotKnownNow: that nobody can tell whether a token still counts cuts no connection, for a while. It is
// cut when it is known to count no more, without anything else that would have it asked for; and when the while is over.
func TestConnectionsWhoseKeysAreNotKnownNow(t *testing.T) {
	t.Parallel()
	unknown := fmt.Errorf("%w: the cable is out", token.ErrNoKeys)
	const access, spec = `[{subjects: ["corp/*"]}]`, "\n  tokens: {providers: [corp], certificate: web}"
	for name, end := range map[string]func(*webLab, *doubting){
		"refused later":  func(_ *webLab, d *doubting) { why := error(token.ErrSignature); d.why.Store(&why) },
		"never answered": func(l *webLab, _ *doubting) { l.ahead.Store(int64(2 * keysPatience)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := &doubting{}
			l, byToken := newTokenLab(t, access+spec, func(c *Config) { c.Tokens = d.verifier(t, c) })
			conn := l.show(byToken, connectWith(bearer(tokenOf(l, newIssuer(t), "ann"))))
			l.find(flow.EventOpen, flow.ReasonIdentity)
			s := l.proxy.room.snapshot()[0]
			d.why.Store(&unknown)
			l.write("", again+spec)
			l.eventually("the doubt", func() bool { return !s.isSettled() || s.wasCut() != nil })
			if end := s.wasCut(); end != nil {
				t.Fatalf("is cut, though nothing is known against it: %v", end)
			}
			d.why.Store(nil)
			l.eventually("the end of the doubt", s.isSettled)
			d.why.Store(&unknown)
			l.write("", access+spec)
			l.eventually("the doubt", func() bool { return !s.isSettled() })
			end(l, d)
			if _, err := conn.in.ReadByte(); err == nil {
				t.Error("the connection goes on")
			}
			l.find(flow.EventClose, flow.ReasonSessionEnded)
		})
	}
}
