package login_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/oidc"
)

// refused holds that an answer lets nobody in.
func refused(t *testing.T, b *browser, a answer, status int) {
	t.Helper()
	if a.status != status {
		t.Errorf("answered %d, want %d: %s", a.status, status, a.body)
	}
	if _, in := b.cookies()["__Host-sallyport-session-app"]; in {
		t.Error("the browser was given a session")
	}
	if a := b.get("/", "Accept", "*/*"); a.status != http.StatusUnauthorized {
		t.Errorf("afterwards the browser is let in: %d %s", a.status, a.body)
	}
}

// change gives the address with one parameter changed; an empty value takes it out.
func change(t *testing.T, address, name, value string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	q.Set(name, value)
	if value == "" {
		q.Del(name)
	}
	u.RawQuery = q.Encode()
	return u.String()
}

// testStateOfAnother: somebody logs in and has a victim's browser finish, so that the victim works in the attacker's account.
func testStateOfAnother(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	attacker, victim := newBrowser(t, s, p), newBrowser(t, s, p)
	link := attacker.person("mallory", attacker.get("/").to(t))
	refused(t, victim, victim.ask(http.MethodGet, link, nil), http.StatusBadRequest)
	victim.get("/").to(t) // now it has begun a login of its own
	refused(t, victim, victim.ask(http.MethodGet, link, nil), http.StatusBadRequest)
	if a := attacker.ask(http.MethodGet, link, nil); a.to(t) != home+"/" {
		t.Errorf("the same link in its own browser: %d", a.status)
	}
}

func testAlteredState(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	link := b.person("ann", b.get("/").to(t))
	u, err := url.Parse(link)
	if err != nil {
		t.Fatal(err)
	}
	state := u.Query().Get("state")
	for name, bad := range map[string]string{
		"none": "", "cut": state[:len(state)-1], "longer": state + "A", "flipped": flip(state, len(state)/2),
		"of another service": otherState(t, s, p), "huge": strings.Repeat("A", 100_000), "no base64": "ü" + state[2:],
	} {
		a := b.ask(http.MethodGet, change(t, link, "state", bad), nil)
		if a.status != http.StatusBadRequest {
			t.Errorf("state %s: %d", name, a.status)
		}
	}
	refused(t, b, b.ask(http.MethodGet, link+"&state="+url.QueryEscape(state), nil), http.StatusBadRequest)
}

// otherState is a state of a login to another service by the same proxy.
func otherState(t *testing.T, s *site, p *oidc.Provider) string {
	t.Helper()
	b := newBrowser(t, s, p)
	b.site = s.at("other")
	u, err := url.Parse(b.get("/").to(t))
	if err != nil {
		t.Fatal(err)
	}
	return u.Query().Get("state")
}

func flip(text string, at int) string {
	c := byte('A')
	if text[at] == c {
		c = 'B'
	}
	return text[:at] + string(c) + text[at+1:]
}

// testCodeOfAnother: a code that was given for one login is brought to another, whose state is right. PKCE and the nonce are
// of the other; the provider refuses the code.
func testCodeOfAnother(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	attacker, victim := newBrowser(t, s, p), newBrowser(t, s, p)
	stolen, err := url.Parse(victim.person("ann", victim.get("/").to(t)))
	if err != nil {
		t.Fatal(err)
	}
	own := attacker.person("mallory", attacker.get("/").to(t))
	refused(t, attacker, attacker.ask(http.MethodGet, change(t, own, "code", stolen.Query().Get("code")), nil), http.StatusForbidden)
}

// testCodeAgain: the address of a callback is in histories and logs.
func testCodeAgain(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	link := b.person("ann", b.get("/").to(t))
	before := b.cookies()
	b.ask(http.MethodGet, link, nil).to(t)
	thief := newBrowser(t, s, p)
	for name, value := range before {
		thief.set(name, value)
	}
	refused(t, thief, thief.ask(http.MethodGet, link, nil), http.StatusForbidden)
}

// testAnswerOfAnother: the provider says who it is in its answer; another name, or none, is a mix-up.
func testAnswerOfAnother(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	link := b.person("ann", b.get("/").to(t))
	for _, iss := range []string{"", "https://evil.example.org", p.Issuer + "/"} {
		refused(t, b, b.ask(http.MethodGet, change(t, link, "iss", iss), nil), http.StatusForbidden)
	}
	refused(t, b, b.ask(http.MethodGet, change(t, change(t, link, "code", ""), "error", "access_denied"), nil), http.StatusForbidden)
	refused(t, b, b.ask(http.MethodGet, change(t, link, "code", ""), nil), http.StatusForbidden)
}

func testLateAnswer(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	link := b.person("ann", b.get("/").to(t))
	s.later(11 * time.Minute)
	refused(t, b, b.ask(http.MethodGet, link, nil), http.StatusBadRequest)
}

func testAlteredCookie(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	b.logIn("ann", "/").to(t)
	const name = "__Host-sallyport-session-app"
	good := b.cookies()[name]
	for what, bad := range map[string]string{
		"first": flip(good, 0), "middle": flip(good, len(good)/2), "last": flip(good, len(good)-1), "cut": good[:len(good)-4],
		"empty": "", "longer": good + "AAAA", "of another key": otherKey(t, p), "state": otherState(t, s, p),
	} {
		b.set(name, bad)
		if a := b.get("/", "Accept", "*/*"); a.status != http.StatusUnauthorized {
			t.Errorf("cookie %s: %d %s", what, a.status, a.body)
		}
	}
	b.set(name, good)
	if a := b.get("/"); a.status != http.StatusOK {
		t.Errorf("the cookie as it was: %d", a.status)
	}
	if a := b.get("/", "Accept", "*/*", "Cookie", name+"="+good+"; "+name+"="+good); a.status != http.StatusUnauthorized {
		t.Errorf("the cookie twice: %d", a.status)
	}
}

// otherKey is a session that another proxy sealed, with a key of its own.
func otherKey(t *testing.T, p *oidc.Provider) string {
	t.Helper()
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	b.logIn("ann", "/").to(t)
	return b.cookies()["__Host-sallyport-session-app"]
}

// testCookieElsewhere: a session of one service, or of one name, is none of another.
func testCookieElsewhere(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	b.logIn("ann", "/").to(t)
	cookie := b.cookies()["__Host-sallyport-session-app"]
	other := newBrowser(t, s, p)
	other.site = s.at("other")
	other.set("__Host-sallyport-session-other", cookie)
	if a := other.get("/", "Accept", "*/*"); a.status != http.StatusUnauthorized {
		t.Errorf("at another service: %d %s", a.status, a.body)
	}
	host := newBrowser(t, s, p)
	host.set("__Host-sallyport-session-app", cookie)
	host.site = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Host = "second.example.org"
		s.at("app").ServeHTTP(w, r)
	})
	if a := host.get("/", "Accept", "*/*"); a.status != http.StatusUnauthorized {
		t.Errorf("under another name: %d %s", a.status, a.body)
	}
}

// testFixation: what a browser had before the login is worth nothing after it.
func testFixation(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	attacker := newBrowser(t, s, p)
	attacker.logIn("mallory", "/").to(t)
	planted := attacker.cookies()["__Host-sallyport-session-app"]
	attacker.ask(http.MethodPost, home+"/.sallyport/logout", url.Values{}, "Sec-Fetch-Site", "same-origin")

	victim := newBrowser(t, s, p)
	victim.set("__Host-sallyport-session-app", planted)
	victim.set("__Host-sallyport-browser-app", "chosen")
	victim.logIn("ann", "/").to(t)
	cookies := victim.cookies()
	if cookies["__Host-sallyport-session-app"] == planted || cookies["__Host-sallyport-browser-app"] == "chosen" {
		t.Error("the browser goes on with a planted cookie")
	}
	if a := victim.get("/"); !strings.Contains(a.body, "hello corp/ann") {
		t.Errorf("the victim is %s", a.body)
	}
	attacker.set("__Host-sallyport-session-app", planted)
	if a := attacker.get("/", "Accept", "*/*"); a.status != http.StatusUnauthorized {
		t.Errorf("the planted cookie counts: %d %s", a.status, a.body)
	}
}

// testCopiedCookie: a copy of the cookie ends with the logout, also one that was renewed.
func testCopiedCookie(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	b.logIn("ann", "/").to(t)
	thief := newBrowser(t, s, p)
	for name, value := range b.cookies() {
		thief.set(name, value)
	}
	s.later(30 * time.Minute)
	if a := thief.get("/"); a.status != http.StatusOK {
		t.Fatalf("the copy before the logout: %d", a.status)
	}
	open := s.session
	if !s.handler.Lives(s.service("app"), open, time.Now().Add(2*time.Hour)) {
		t.Error("what a session has open ends by silence")
	}
	b.ask(http.MethodPost, home+"/.sallyport/logout", url.Values{}, "Sec-Fetch-Site", "same-origin")
	if a := thief.get("/", "Accept", "*/*"); a.status != http.StatusUnauthorized {
		t.Errorf("the copy after the logout: %d %s", a.status, a.body)
	}
	if s.handler.Lives(s.service("app"), open, time.Now()) {
		t.Error("what the copy has open goes on after the logout")
	}
}

func testOpenRedirect(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	for _, to := range []string{"https://evil.example.org/", "//evil.example.org", `/\evil.example.org`, `\/evil`, "/\t/evil.example.org", "javascript:alert(1)",
		"evil", "", "/.sallyport/logout", "/.sallyport", "https:/evil", "/x\r\nSet-Cookie: a=b", "///evil.example.org", "/%2e%2e/ü", "/" + strings.Repeat("a", 2000)} {
		link := b.person("ann", b.get("/.sallyport/login?to="+url.QueryEscape(to)).to(t))
		a := b.ask(http.MethodGet, link, nil)
		if got := a.header.Get("Location"); got != "/" {
			t.Errorf("to=%q leads to %q", to, got)
		}
	}
	link := b.person("ann", b.get("/.sallyport/login?to="+url.QueryEscape("/a/b?c=d")).to(t))
	if got := b.ask(http.MethodGet, link, nil).header.Get("Location"); got != "/a/b?c=d" {
		t.Errorf("an address of the service leads to %q", got)
	}
}

func testLogoutByAnother(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	b.logIn("ann", "/").to(t)
	for _, header := range [][]string{
		{"Sec-Fetch-Site", "cross-site"}, {"Sec-Fetch-Site", "same-site"},
		{"Origin", "https://evil.example.org"}, {"Origin", "null"}, {"Sec-Fetch-Site", "cross-site", "Origin", home},
	} {
		if a := b.ask(http.MethodPost, home+"/.sallyport/logout", url.Values{}, header...); a.status != http.StatusForbidden {
			t.Errorf("%v: %d", header, a.status)
		}
	}
	if a := b.get("/.sallyport/logout"); a.status != http.StatusOK || b.get("/").status != http.StatusOK {
		t.Errorf("an address alone logs out: %d", a.status)
	}
}

// testPageInjection: what comes with a request, or from the provider, is text on our pages, and pages run nothing.
func testPageInjection(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	link := b.person("ann", b.get("/").to(t))
	a := b.ask(http.MethodGet, change(t, change(t, link, "code", ""), "error", "<script>alert(1)</script>"), nil)
	if strings.Contains(a.body, "<script") || !strings.Contains(a.header.Get("Content-Security-Policy"), "default-src 'none'") || a.header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("the page is %v %s", a.header, a.body)
	}
	marked := newBrowser(t, s, p)
	marked.logIn("<b>bob</b>", "/").to(t)
	if a := marked.get("/.sallyport/logout"); !strings.Contains(a.body, "corp/&lt;b&gt;bob&lt;/b&gt;") {
		t.Errorf("the page is %s", a.body)
	}
}

// testFlood: codes that are not the provider's cost it a bounded number of connections at a time, and give nobody a session.
func testFlood(t *testing.T, p *oidc.Provider) {
	const many, most = 40, 16
	s := newSite(t, p)
	var browsers []*browser
	var answers []string
	for range many {
		b := newBrowser(t, s, p)
		u, err := url.Parse(b.get("/").to(t))
		if err != nil {
			t.Fatal(err)
		}
		browsers = append(browsers, b)
		answers = append(answers, home+"/.sallyport/callback?"+url.Values{"code": {"made up"}, "iss": {p.Issuer}, "state": {u.Query().Get("state")}}.Encode())
	}
	hold := make(chan struct{})
	s.mu.Lock()
	s.hold, s.dialed = hold, 0
	s.mu.Unlock()
	status := make(chan int, many)
	for i, b := range browsers {
		go func() { status <- b.ask(http.MethodGet, answers[i], nil).status }()
	}
	for range many - most {
		if got := <-status; got != http.StatusServiceUnavailable {
			t.Errorf("beyond the bound: %d", got)
		}
	}
	close(hold)
	for range most {
		if got := <-status; got != http.StatusForbidden {
			t.Errorf("a made-up code: %d", got)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dialed != most {
		t.Errorf("the provider was asked %d times", s.dialed)
	}
	for _, b := range browsers {
		if _, in := b.cookies()["__Host-sallyport-session-app"]; in {
			t.Error("a made-up code gives a session")
		}
	}
}
