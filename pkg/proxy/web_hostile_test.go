package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/oidc"
)

// TestUpgradeWithABody: whatever still came of the body would be in the tunnel, and nobody could say where it ends. The service
// here answers at once, as many do, and reads on later.
func TestUpgradeWithABody(t *testing.T) {
	t.Parallel()
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
			_, _ = http.ReadRequest(bufio.NewReader(c))
			fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
			_, _ = io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, listener: listener})
	for _, body := range []string{"Content-Length: 8388608", "Transfer-Encoding: chunked"} {
		c := l.dial(webID, alpnHTTP1)
		_, err = fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n%s\r\n\r\n", body)
		l.must(err)
		go func() {
			_, _ = c.Write([]byte("400000\r\n" + strings.Repeat("x", 4<<20) + "\r\n400000\r\n" + strings.Repeat("x", 4<<20) + "\r\n0\r\n\r\n"))
		}()
		answer, err := http.ReadResponse(bufio.NewReader(c), nil)
		l.must(err)
		if answer.StatusCode != 400 {
			t.Errorf("%s: %s", body, answer.Status)
			_, _ = io.Copy(io.Discard, io.LimitReader(c, 1)) // until the service has it all
		}
	}
}

// TestRefusalIsNotInAnotherAnswer: requests that were sent in one go. The guard reads the third while the second is answered, and
// must not have its say in the midst of that.
func TestRefusalIsNotInAnotherAnswer(t *testing.T) {
	t.Parallel()
	service := newHeld()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/held" {
			service.ServeHTTP(w, r)
		}
	})})
	c := l.dial(webID, alpnHTTP1)
	_, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /held HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
	l.must(err)
	text, _ := io.ReadAll(c)
	if strings.Contains(string(text), "HTTP/1.1 400") || !strings.HasPrefix(string(text), "HTTP/1.1 200") {
		t.Errorf("the client reads %q", text)
	}
	l.find(flow.EventDeny, flow.ReasonBadRequest)
}

// TestUpstreamOfThePolicyInForce: a connection that began before may not go on to a service in the old way.
func TestUpstreamOfThePolicyInForce(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo)})
	c := l.client(webID, alpnHTTP2)
	if status, _ := l.get(c, "/"); status != 200 {
		t.Fatalf("before: %d", status)
	}
	l.write("{upstream: {tls: {serverName: web.example.org}}}", onlyWeb)
	l.find(flow.EventClose, flow.ReasonPolicyChanged)
	if status, text := l.get(c, "/"); status != 502 {
		t.Errorf("the service is reached without TLS: %d %s", status, text)
	}
}

// TestUnreadableRequestsAreNobodys: whom an earlier request on the connection proved has nothing to do with one that cannot be read.
func TestUnreadableRequestsAreNobodys(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	l := newWebLab(t, webConfig{http: byToken, access: onlyWeb, handler: http.HandlerFunc(echo), change: i.verify})
	c := l.dial(nobody, alpnHTTP1)
	_, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %s\r\n\r\n", i.token(webID.String(), "web", time.Minute))
	l.must(err)
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	l.must(err)
	if _, err := io.Copy(io.Discard, answer.Body); err != nil || answer.StatusCode != 200 {
		t.Fatalf("answer %s %v", answer.Status, err)
	}
	_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
	l.must(err)
	if r := l.find(flow.EventDeny, flow.ReasonBadRequest); r.Identity != "" || r.Proof != "" {
		t.Errorf("record %+v", r)
	}
	certified := l.dial(webID, alpnHTTP1)
	_, err = io.WriteString(certified, "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
	l.must(err)
	l.findOf(webID.String(), flow.ReasonBadRequest)
}

// findOf waits for a denial of an identity.
func (l *webLab) findOf(identity string, reason flow.Reason) {
	l.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		for _, r := range l.records.all() {
			if r.Event == flow.EventDeny && r.Reason == reason && r.Identity == identity {
				return
			}
		}
	}
	l.Fatalf("no denial of %s for %s", identity, reason)
}

// TestLookAlikesOfRules: a header that a rule asks for may not come a second time in a spelling that many servers take for the same.
func TestLookAlikesOfRules(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", handler: http.HandlerFunc(echo),
		access: `[{identities: ["spiffe://example.org/app/web"], routes: [{headers: {x-tenant: ours}}]}]`})
	for _, protocol := range []string{alpnHTTP1, alpnHTTP2} {
		c := l.client(webID, protocol)
		if status, _ := l.get(c, "/", "X-Tenant", "ours"); status != 200 {
			t.Errorf("%s: as the rule has it: %d", protocol, status)
		}
		if status, text := l.get(c, "/", "X-Tenant", "ours", "X_Tenant", "theirs"); status != 400 {
			t.Errorf("%s: with another: %d %s", protocol, status, text)
		}
	}
}

// TestProvidersTokens: bearer tokens of a real provider are whom they name, with their groups, and only where they are meant for.
func TestProvidersTokens(t *testing.T) {
	t.Parallel()
	const audience = "https://web.example.org"
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo), change: func(c *Config) { logsIn(t, c) }})
	p := oidc.Start(t, oidc.Options{TTL: time.Hour, Accounts: map[string]map[string]any{"robot": {"groups": []string{"ops", "a,b"}}}})
	people := fmt.Sprintf(`
---
apiVersion: sallyport.dev/v1alpha1
kind: IdentityProvider
metadata: {name: people}
spec: {issuer: %q, audiences: [%q], endpoints: [%q], ca: %q}`, p.Issuer, audience, p.Endpoint, p.CA)
	l.write("{authenticate: [oidc], providers: [people]}", `[{groups: [people/ops], routes: [{methods: [GET]}]}]`+people)
	good, other := p.Token("robot", "secret", audience), p.Token("robot", "secret", "https://other.example.org")
	for _, protocol := range []string{alpnHTTP1, alpnHTTP2} {
		c := l.client(nobody, protocol)
		status, text := l.get(c, "/", "Authorization", "Bearer "+good)
		if status != 200 || !lines(text)["X-Sallyport-Identity: people/robot"] || !lines(text)["X-Sallyport-Proof: oidc"] ||
			!lines(text)["X-Sallyport-Groups: ops,a%2Cb"] || strings.Contains(text, "Authorization") {
			t.Errorf("%s: %d %s", protocol, status, text)
		}
		if status, text = l.get(c, "/", "Authorization", "Bearer "+other); status != 401 || !strings.Contains(text, "TOKEN_REFUSED") {
			t.Errorf("%s: a token for another service: %d %s", protocol, status, text)
		}
		if status, text = l.get(c, "/", "Authorization", "Bearer "+good[:len(good)-8]+"AAAAAAAA"); status != 401 || !strings.Contains(text, "TOKEN_REFUSED") {
			t.Errorf("%s: a token that nobody signed: %d %s", protocol, status, text)
		}
		if status, text = l.get(c, "/"); status != 401 || !strings.Contains(text, "LOGIN_NEEDED") {
			t.Errorf("%s: no token, behind a good one: %d %s", protocol, status, text)
		}
	}
	if r := l.find(flow.EventRequest, flow.ReasonIdentity); r.Identity != "people/robot" || r.Proof != "oidc" {
		t.Errorf("record %+v", r)
	}
}

// TestAnswersOfTheLibrary: what net/http refuses by itself is in a record too, once, and what it serves is not.
func TestAnswersOfTheLibrary(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo)})
	good := "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx"
	awaited := "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\nx"
	for bad, status := range map[string]string{
		"GET / HTTP/1.1\r\nHost: a\r\nExpect: a miracle\r\n\r\n": "417",
		"GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n":                   "400",
		"GET / HTTP/1.1\r\nHost: a b\r\n\r\n":                    "400",
	} {
		for _, before := range []string{"", good + awaited} {
			count := len(l.records.all())
			c := l.dial(webID, alpnHTTP1)
			_, err := io.WriteString(c, before+bad)
			l.must(err)
			text, _ := io.ReadAll(c)
			if !strings.Contains(string(text), "HTTP/1.1 "+status) || strings.Count(string(text), "HTTP/1.1 200") != strings.Count(before, "POST") {
				t.Errorf("%q behind %q is answered %q", bad, before, text)
			}
			l.eventually("its record", func() bool {
				l.proxy.denials.flush()
				return l.refusals(count, "net/http answers HTTP/1.1 "+status) == 1
			})
			if n := l.refusals(count, "net/http"); n != 1 {
				t.Errorf("%q behind %q has %d records", bad, before, n)
			}
		}
	}
}

// refusals counts bad requests that are recorded with these words, from a record on.
func (l *webLab) refusals(from int, words string) (n int) {
	for _, r := range l.records.all()[from:] {
		if r.Event == flow.EventDeny && r.Reason == flow.ReasonBadRequest && strings.Contains(r.Detail, words) {
			n += int(r.Count)
		}
	}
	return n
}
