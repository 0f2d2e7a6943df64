package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

const teamRules = `[{identities: ["spiffe://example.org/app/web"], routes: [{methods: [GET], paths: ["/public/*"]},
    {methods: [POST], paths: [/team], headers: {x-team: blue}}, {methods: [POST], paths: [/team], headers: {cookie: a=1}}]}]`

// trial is a request of a client, as it is on the wire.
type trial struct {
	who                  string // of callers
	method, target, host string
	header               [][2]string
}

func (c trial) String() string {
	return fmt.Sprintf("%s as %s: %s %s %v", c.host, c.who, c.method, c.target, c.header)
}

// court has a service that remembers what it got.
type court struct {
	*webLab
	judge  *Judge
	tokens map[string]string // of callers that have one
	mu     sync.Mutex
	got    http.Header // guarded by mu; of the last request
	sent   string      // guarded by mu; host and target of it
}

func newCourt(t *testing.T, spec, access string) *court {
	t.Helper()
	c := &court{tokens: map[string]string{}}
	signer := newIssuer(t)
	c.webLab = newWebLab(t, webConfig{http: spec, access: access, change: signer.verify,
		handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.got, c.sent = r.Header.Clone(), r.Host+r.RequestURI
		})})
	c.tokens["token"] = signer.token(webID.String(), "web", time.Hour)
	c.tokens["token of mallory"] = signer.token(mallory.String(), "web", time.Hour)
	c.tokens["token for others"] = signer.token(webID.String(), "mail", time.Hour)
	c.judge = c.newJudge(nil)
	return c
}

func (c *court) newJudge(live func(context.Context, string, netip.AddrPort, uint16) (string, error)) *Judge {
	c.Helper()
	cfg := c.proxy.cfg
	j, err := NewJudge(JudgeConfig{Trust: cfg.Identity, Policy: cfg.Policy, Report: c.records.add, Tokens: cfg.Tokens, Live: live})
	c.must(err)
	return j
}

// identity is that of a client with a certificate.
func (trial) identity(who string) spiffeid.ID {
	return map[string]spiffeid.ID{"web": webID, "mallory": mallory}[who]
}

func (c *court) fields(t trial) [][2]string {
	if token := c.tokens[t.who]; token != "" {
		return append(slices.Clone(t.header), [2]string{"Authorization", "Bearer " + token})
	}
	return t.header
}

// carried asks the proxy. status 0: the client was not let in at all.
func (c *court) carried(t trial) (status int, reason string, got http.Header) {
	c.Helper()
	c.mu.Lock()
	c.got = nil
	c.mu.Unlock()
	conn, err := tls.Dial("tcp", c.addr, c.tlsAs(t.identity(t.who), alpnHTTP1))
	if err != nil {
		return 0, "", nil
	}
	defer conn.Close()
	c.must(conn.SetDeadline(time.Now().Add(patience)))
	text := t.method + " " + t.target + " HTTP/1.1\r\nHost: " + t.host + "\r\n"
	for _, f := range c.fields(t) {
		text += f[0] + ": " + f[1] + "\r\n"
	}
	_, _ = io.WriteString(conn, text+"\r\n") // who is not let in shows when reading
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, "", nil
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	c.must(err)
	reason, _, _ = strings.Cut(string(body), ":")
	c.mu.Lock()
	defer c.mu.Unlock()
	return answer.StatusCode, reason, c.got
}

// question is what another proxy would ask of the same request.
func (c *court) question(t trial) Question {
	c.Helper()
	q := Question{Asker: "a test", Client: netip.MustParseAddrPort("127.0.0.1:40000"), Server: c.service,
		Request: &http.Request{Method: t.method, RequestURI: t.target, Host: t.host, Header: http.Header{}}}
	for _, f := range c.fields(t) {
		q.Request.Header.Add(f[0], f[1])
	}
	if id := t.identity(t.who); !id.IsZero() {
		q.Certificate = c.leaf(id)
	}
	return q
}

func (c *court) leaf(id spiffeid.ID) *x509.Certificate {
	c.Helper()
	svid, err := c.authority.Issue(id)
	c.must(err)
	return svid.Certificates[0]
}

// trials vary everything beside one request that is in order, and then at random.
func trials() []trial {
	whos := []string{"web", "mallory", "token", "token of mallory", "token for others", "nobody"}
	methods := []string{"GET", "POST", "TRACE", "get"}
	targets := []string{"/public/a", "/public/a?b=/../c", "/public/", "/public", "/admin", "/public/../admin", "/public/%2e%2e/admin", "//public/a",
		"/public/a%2fb", "/public/%61", "/public/a;b", "/public/a#b", "/public/\u00e4", "/team", "http://web.example.org/public/a", "*", "/public/%zz"}
	hosts := []string{"web.example.org", "web.example.org:8443", "WEB.example.org", "mail.example.org", "web.example.org:0", "web.example.org.", "[::1]", "a b"}
	headers := [][][2]string{nil, {{"X-Sallyport-Identity", "spiffe://example.org/admin"}, {"X-Forwarded-For", "10.9.9.9"}, {"X-Real-IP", "10.9.9.9"}, {"X-Fine", "kept"}},
		{{"X_Forwarded_For", "10.9.9.9"}}, {{"X-Team", "blue"}}, {{"X-Team", "blue"}, {"X-Team", "blue"}}, {{"X-Team", "blue"}, {"X_Team", "red"}},
		{{"X-Team", "blue"}, {"Connection", "X-Team"}}, {{"Authorization", "Basic x"}}, {{"Cookie", "a=1; b=2"}}, {{"Cookie", "__Host-sallyport-session-web=x; a=1"}}, {{"Cookie", "__host-sallyport-login=x"}}, {{"X-Envoy-Original-Path", "/admin"}},
		{{"X-Sallyport-Via", strings.Repeat("a/b, ", maxPassages) + "c/d"}}, {{"Connection", "X-Sallyport-Identity"}}}
	right := trial{"web", "GET", "/public/a", "web.example.org", nil}
	all := []trial{right}
	add := func(change func(*trial)) {
		one := right
		change(&one)
		all = append(all, one)
	}
	for _, v := range whos {
		add(func(c *trial) { c.who = v })
	}
	for _, v := range methods {
		add(func(c *trial) { c.method = v })
	}
	for _, v := range targets {
		add(func(c *trial) { c.target = v })
	}
	for _, v := range hosts {
		add(func(c *trial) { c.host = v })
	}
	for _, v := range headers {
		add(func(c *trial) { c.header = v })
		add(func(c *trial) { c.header, c.method, c.target = v, "POST", "/team" })
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 150 {
		all = append(all, trial{whos[r.IntN(len(whos))], methods[r.IntN(2)], targets[r.IntN(len(targets))], hosts[r.IntN(3)], headers[r.IntN(len(headers))]})
	}
	return all
}

// TestJudgeSaysWhatTheProxyDoes: the same request is refused for the same reason, or lets the service see the same header. Only
// what the proxy spells anew before it sends it on is refused: another one would not.
func TestJudgeSaysWhatTheProxyDoes(t *testing.T) {
	t.Parallel()
	c := newCourt(t, "{authenticate: [spiffe, jwt], audiences: [web], hosts: [web.example.org]}", teamRules)
	allowed, refused, spelt := 0, 0, 0
	for _, one := range trials() {
		status, reason, got := c.carried(one)
		q := c.question(one)
		came := q.Request.Header.Clone()
		a := c.judge.Judge(t.Context(), q)
		switch {
		case status == http.StatusOK && a.Allowed:
			allowed++
			if c.sent != one.host+one.target {
				t.Errorf("%s: the proxy sends on %s, and another one what came", one, c.sent)
			}
			c.sameHeader(one, got, came, a)
		case a.Reason == flow.ReasonBadRequest && strings.Contains(a.Why, "in its one spelling"):
			spelt++ // whatever the proxy says of it once it has the other spelling
		case status == http.StatusOK || a.Allowed:
			t.Errorf("%s: the proxy answers %d, the judge %+v", one, status, a)
		case status != 0 && !malformedForHTTP(one) && (status != a.Status || reason != a.Reason.String()):
			t.Errorf("%s: the proxy answers %d %s, the judge %d %s: %s", one, status, reason, a.Status, a.Reason, a.Why)
		default:
			refused++
		}
	}
	t.Logf("%d allowed, %d refused, %d refused for their spelling alone", allowed, refused, spelt)
	if allowed < 20 || refused < 20 || spelt < 2 {
		t.Error("the trials do not try much")
	}
}

// malformedForHTTP: net/http has answered before the proxy, in its own words.
func malformedForHTTP(c trial) bool { return c.host == "a b" || c.target == "/public/%zz" }

// sameHeader compares what the service got of the proxy with what the judge would have had it get.
func (c *court) sameHeader(one trial, got, came http.Header, a Answer) {
	c.Helper()
	want := came.Clone()
	for _, name := range a.Remove {
		want.Del(name)
	}
	for name, values := range a.Set {
		want[name] = values
	}
	if strings.Contains(came.Get("Connection"), "X-Team") { // the other proxy's own affair
		want.Del("X-Team")
	}
	for _, h := range []http.Header{want, got} {
		for _, name := range []string{"Connection", "X-Sallyport-Via", "Accept-Encoding", "User-Agent", "Content-Length"} {
			h.Del(name)
		}
	}
	if !equalHeaders(want, got) {
		c.Errorf("%s:\nthe service got   %v\nthe judge gives it %v", one, got, want)
	}
	if a.Identity != got.Get("X-Sallyport-Identity") {
		c.Errorf("%s: identity %q", one, a.Identity)
	}
}

func equalHeaders(a, b http.Header) bool {
	if len(a) != len(b) {
		return false
	}
	for name, values := range a {
		if strings.Join(values, ",") != strings.Join(b[name], ",") {
			return false
		}
	}
	return true
}

// TestJudgeOfCertificates: what the other proxy says of a client counts as far as it is proven.
func TestJudgeOfCertificates(t *testing.T) {
	t.Parallel()
	c := newCourt(t, "{}", onlyWeb)
	stranger, err := devauthority.New(domain, devauthority.Options{})
	c.must(err)
	forged, err := stranger.Issue(webID)
	c.must(err)
	partner := spiffeid.RequireFromString("spiffe://partner.example/app/web")
	for name, test := range map[string]struct {
		cert   *x509.Certificate
		said   spiffeid.ID
		ahead  time.Duration
		reason flow.Reason
	}{
		"certificate":                 {cert: c.leaf(webID), reason: flow.ReasonIdentity},
		"and the same said":           {cert: c.leaf(webID), said: webID, reason: flow.ReasonIdentity},
		"another said":                {cert: c.leaf(mallory), said: webID, reason: flow.ReasonHandshakeFailed},
		"another proven":              {cert: c.leaf(webID), said: mallory, reason: flow.ReasonHandshakeFailed},
		"of a stranger's authority":   {cert: forged.Certificates[0], reason: flow.ReasonHandshakeFailed},
		"expired":                     {cert: c.leaf(webID), ahead: identityTTL + time.Hour, reason: flow.ReasonHandshakeFailed},
		"said and believed":           {said: webID, reason: flow.ReasonIdentity},
		"said, of a domain not known": {said: partner, reason: flow.ReasonHandshakeFailed},
		"not allowed":                 {cert: c.leaf(mallory), reason: flow.ReasonNotAuthorised},
		"nothing":                     {reason: flow.ReasonLoginNeeded},
	} {
		j := c.newJudge(nil)
		j.now = func() time.Time { return time.Now().Add(test.ahead) }
		q := c.question(trial{"", "GET", "/", "web.example.org", nil})
		q.Certificate, q.Principal = test.cert, test.said
		if a := j.Judge(t.Context(), q); a.Reason != test.reason || a.Allowed != (test.reason == flow.ReasonIdentity) {
			t.Errorf("%s: %+v, want %s", name, a, test.reason)
		}
	}
}

// TestJudgeOfConnections: bytes are judged by the certificate alone, and only where nobody judges requests.
func TestJudgeOfConnections(t *testing.T) {
	t.Parallel()
	c := newCourt(t, "", onlyWeb)
	ask := func(change func(*Question)) Answer {
		q := c.question(trial{who: "web"})
		q.Request = nil
		if change != nil {
			change(&q)
		}
		return c.judge.Judge(t.Context(), q)
	}
	if a := ask(nil); !a.Allowed || a.Service != "web" || a.Identity != webID.String() {
		t.Errorf("by certificate: %+v", a)
	}
	if r := c.find(flow.EventOpen, flow.ReasonIdentity); r.Service != "web" || r.Identity != webID.String() || !strings.Contains(r.Detail, "asked by a test") {
		t.Errorf("record %+v", r)
	}
	for name, test := range map[string]struct {
		change func(*Question)
		reason flow.Reason
	}{
		"of nobody":       {func(q *Question) { q.Certificate = nil }, flow.ReasonHandshakeFailed},
		"of mallory":      {func(q *Question) { q.Certificate = c.leaf(mallory) }, flow.ReasonNotAuthorised},
		"elsewhere":       {func(q *Question) { q.Elsewhere = true }, flow.ReasonUnknownService},
		"of no service":   {func(q *Question) { q.Server = netip.MustParseAddrPort("10.0.0.1:1") }, flow.ReasonUnknownService},
		"of no such name": {func(q *Question) { q.Service = "mail" }, flow.ReasonUnknownService},
		"in disorder":     {func(q *Question) { q.Wrong = errors.New("broken") }, flow.ReasonBadRequest},
	} {
		if a := ask(test.change); a.Allowed || a.Reason != test.reason {
			t.Errorf("connection %s: %+v, want %s", name, a, test.reason)
		}
	}
	if a := ask(func(q *Question) { q.Elsewhere, q.Service = true, "web" }); !a.Allowed {
		t.Errorf("by name, from elsewhere: %+v", a)
	}
	c.write("{}", onlyWeb)
	if a := ask(nil); a.Allowed || a.Reason != flow.ReasonNotAuthorised || !strings.Contains(a.Why, "one by one") {
		t.Errorf("as HTTP: %+v", a)
	}
}

// TestJudgeWithoutPolicy refuses everything, in words.
func TestJudgeWithoutPolicy(t *testing.T) {
	t.Parallel()
	c := newCourt(t, "{}", onlyWeb)
	quiet := slog.New(slog.DiscardHandler)
	j, err := NewJudge(JudgeConfig{Trust: c.proxy.cfg.Identity, Policy: NewPolicyFile(t.TempDir()+"/none.yaml", quiet), Report: c.records.add})
	c.must(err)
	a := j.Judge(t.Context(), c.question(trial{"web", "GET", "/", "web.example.org", nil}))
	if a.Allowed || a.Status != http.StatusForbidden || !strings.Contains(a.Text, "no policy was read yet") {
		t.Errorf("%+v", a)
	}
	if _, err := NewJudge(JudgeConfig{}); err == nil {
		t.Error("a judge of nothing")
	}
}

// TestJudgeBounds: what one caller may ask of a service counts for what another proxy carries, too.
func TestJudgeBounds(t *testing.T) {
	t.Parallel()
	c := newCourt(t, "{limits: {requestsPerMinute: 6, bodyBytes: 10B, headerBytes: 4KiB}}", onlyWeb)
	ask := func(change func(*http.Request)) Answer {
		q := c.question(trial{"web", "GET", "/", "web.example.org", nil})
		change(q.Request)
		return c.judge.Judge(t.Context(), q)
	}
	if a := ask(func(r *http.Request) { r.ContentLength = 11 }); a.Status != http.StatusRequestEntityTooLarge || a.Reason != flow.ReasonRequestLimit {
		t.Errorf("large body: %+v", a)
	}
	if a := ask(func(r *http.Request) { r.Header.Set("X-Large", strings.Repeat("x", 4096)) }); a.Status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("large header: %+v", a)
	}
	if a := ask(func(r *http.Request) { r.Header.Set("Upgrade", "h2c") }); a.Reason != flow.ReasonBadRequest {
		t.Errorf("another protocol: %+v", a)
	}
	for i := range 3 {
		if a := ask(func(*http.Request) {}); a.Allowed != (i < 2) || !a.Allowed && (a.Status != http.StatusTooManyRequests || a.Header.Get("Retry-After") == "") {
			t.Errorf("request %d: %+v", i, a)
		}
	}
}

// TestJudgeByGrant: who could go around the proxy may come by another one, as nobody, request by request, as long as that is so.
func TestJudgeByGrant(t *testing.T) {
	t.Parallel()
	c := newCourt(t, "{}", onlyWeb)
	var asked []string
	live, liveErr := "G1", error(nil)
	j := c.newJudge(func(_ context.Context, service string, client netip.AddrPort, port uint16) (string, error) {
		asked = append(asked, fmt.Sprintf("%s %s %d", service, client, port))
		return live, liveErr
	})
	q := func(who, target string, header ...[2]string) Question {
		return c.question(trial{who, "GET", target, "web.example.org", header})
	}
	want := fmt.Sprintf("web 127.0.0.1:40000 %d", c.service.Port())
	for _, who := range []string{"nobody", "mallory"} {
		a := j.Judge(t.Context(), q(who, "/", [2]string{"X-Sallyport-Identity", "forged"}))
		if !a.Allowed || a.Grant != "G1" || a.Reason != flow.ReasonPathLive || a.Identity != "" || a.Set.Get("X-Sallyport-Identity") != "" ||
			!slices.Equal(a.Remove, []string{"X-Sallyport-Identity"}) || a.Set.Get("X-Forwarded-For") != "127.0.0.1" {
			t.Errorf("%s: %+v", who, a)
		}
	}
	if r := c.find(flow.EventRequest, flow.ReasonPathLive); r.Request.Rule != "grant G1" || r.Identity != "" || r.Service != "web" {
		t.Errorf("record %+v of %+v", r, r.Request)
	}
	if !slices.Equal(asked, []string{want, want}) {
		t.Errorf("asked %q", asked)
	}
	asked = nil
	if a := j.Judge(t.Context(), q("web", "/")); !a.Allowed || a.Grant != "" || a.Identity != webID.String() {
		t.Errorf("whom a rule lets in: %+v", a)
	}
	if a := j.Judge(t.Context(), q("nobody", "/../a")); a.Allowed || a.Reason != flow.ReasonBadRequest {
		t.Errorf("a path trick: %+v", a)
	}
	bytes := q("nobody", "/")
	bytes.Request = nil
	if a := j.Judge(t.Context(), bytes); a.Allowed {
		t.Errorf("a connection that nobody could cut: %+v", a)
	}
	if len(asked) > 0 {
		t.Errorf("asked %q in vain", asked)
	}
	live, liveErr = "", nil
	if a := j.Judge(t.Context(), q("nobody", "/")); a.Allowed || a.Reason != flow.ReasonLoginNeeded {
		t.Errorf("after the end: %+v", a)
	}
	live, liveErr = "G1", errors.New("agent is away")
	if a := j.Judge(t.Context(), q("mallory", "/")); a.Allowed || a.Reason != flow.ReasonNotAuthorised {
		t.Errorf("without the agent: %+v", a)
	}
	if !slices.ContainsFunc(c.records.all(), func(r flow.Record) bool {
		return r.Event == flow.EventDeny && r.Identity == mallory.String() && strings.Contains(r.Detail, "agent is away")
	}) {
		t.Errorf("records %+v", c.records.all())
	}
}
