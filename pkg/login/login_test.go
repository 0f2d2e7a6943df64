package login_test

import (
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/oidc"
)

// TestLogin goes through logins at a real provider, step by step.
func TestLogin(t *testing.T) {
	t.Parallel()
	p := oidc.Start(t, oidc.Options{Clients: clients, Accounts: accounts})
	for name, run := range map[string]func(*testing.T, *oidc.Provider){
		"in and out":                     testInAndOut,
		"a client with a secret":         testSecret,
		"programs are refused":           testPrograms,
		"several tabs":                   testTabs,
		"a session ends":                 testEnds,
		"use goes on":                    testRenewal,
		"policy ends sessions":           testPolicyEnds,
		"many groups":                    testManyGroups,
		"provider away":                  testAway,
		"attack: state of another":       testStateOfAnother,
		"attack: altered state":          testAlteredState,
		"attack: code of another":        testCodeOfAnother,
		"attack: code again":             testCodeAgain,
		"attack: answer of another":      testAnswerOfAnother,
		"attack: late answer":            testLateAnswer,
		"attack: altered cookie":         testAlteredCookie,
		"attack: cookie elsewhere":       testCookieElsewhere,
		"attack: fixation":               testFixation,
		"attack: copied cookie":          testCopiedCookie,
		"attack: open redirect":          testOpenRedirect,
		"attack: logout by another site": testLogoutByAnother,
		"attack: page injection":         testPageInjection,
		"attack: flood of callbacks":     testFlood,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run(t, p)
		})
	}
}

func testInAndOut(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	back := b.logIn("ann", "/reports?year=2026&q=a%2Fb")
	if to := back.to(t); to != home+"/reports?year=2026&q=a%2Fb" {
		t.Errorf("after the login the browser is sent to %s", to)
	}
	if in := b.get("/reports"); in.status != http.StatusOK || !strings.Contains(in.body, "hello corp/ann of 2 groups, by oidc") {
		t.Errorf("logged in: %d %s", in.status, in.body)
	}
	for _, c := range back.header["Set-Cookie"] {
		for _, want := range []string{"__Host-sallyport-", "; Path=/", "; HttpOnly", "; Secure", "; SameSite=Lax"} {
			if !strings.Contains(c, want) || strings.Contains(c, "Domain") {
				t.Errorf("cookie %q lacks %s", c, want)
			}
		}
	}
	s.mu.Lock()
	if got := s.seen.Get("Cookie"); got != "" {
		t.Errorf("the service saw the cookies %s", got)
	}
	s.mu.Unlock()
	if page := b.get("/.sallyport/logout"); page.status != http.StatusOK || !strings.Contains(page.body, "logged in as corp/ann") {
		t.Errorf("logout page: %d %s", page.status, page.body)
	}
	out := b.ask(http.MethodPost, home+"/.sallyport/logout", url.Values{}, "Sec-Fetch-Site", "same-origin", "Origin", home)
	if to := out.to(t); to != p.Issuer+"/session/end?client_id=app" {
		t.Errorf("after the logout the browser is sent to %s", to)
	}
	if left := b.cookies(); len(left) > 0 {
		t.Errorf("after the logout the browser has %v", left)
	}
	if a := b.get("/reports", "Accept", "application/json"); a.status != http.StatusUnauthorized {
		t.Errorf("after the logout: %d %s", a.status, a.body)
	}
}

func testSecret(t *testing.T, p *oidc.Provider) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newSite(t, p, "clientID: guarded", "secret: "+file)
	b := newBrowser(t, s, p)
	if a := b.logIn("ann", "/"); a.status != http.StatusBadGateway || len(b.cookies()) != 1 || !strings.Contains(a.body, "refuses this service, not you") {
		t.Errorf("with a wrong secret: %d %s %v", a.status, a.body, b.cookies())
	}
	for _, spoil := range []func() error{func() error { return os.WriteFile(file, nil, 0o600) }, func() error { return os.Remove(file) }} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if a := b.logIn("ann", "/"); a.status != http.StatusInternalServerError || !strings.Contains(a.body, "not set up rightly here") {
			t.Errorf("without a secret: %d %s", a.status, a.body)
		}
	}
	if err := os.WriteFile(file, []byte("word\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if to := b.logIn("ann", "/x").to(t); to != home+"/x" || b.get("/x").status != http.StatusOK {
		t.Errorf("with the secret: sent to %s", to)
	}
}

// testPrograms: a redirect to a page of a provider is nothing that a program, a picture or a script's request can use.
func testPrograms(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	for name, c := range map[string]struct {
		method string
		header []string
		status int
	}{
		"a page":              {http.MethodGet, []string{"Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, http.StatusSeeOther},
		"a page, old browser": {http.MethodGet, []string{"Accept", "text/html,*/*;q=0.8"}, http.StatusSeeOther},
		"curl":                {http.MethodGet, []string{"Accept", "*/*"}, http.StatusUnauthorized},
		"a script":            {http.MethodGet, []string{"Sec-Fetch-Mode", "cors"}, http.StatusUnauthorized},
		"an old script":       {http.MethodGet, []string{"X-Requested-With", "XMLHttpRequest"}, http.StatusUnauthorized},
		"a picture":           {http.MethodGet, []string{"Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "image"}, http.StatusUnauthorized},
		"a frame":             {http.MethodGet, []string{"Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"}, http.StatusUnauthorized},
		"a form":              {http.MethodPost, []string{"Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, http.StatusUnauthorized},
	} {
		if a := b.ask(c.method, home+"/", nil, c.header...); a.status != c.status {
			t.Errorf("%s: %d, want %d", name, a.status, c.status)
		}
	}
	for path, status := range map[string]int{"/.sallyport/": 404, "/.sallyport/other": 404, "/.sallyport/callback": 400} {
		if a := b.get(path); a.status != status {
			t.Errorf("%s: %d, want %d", path, a.status, status)
		}
	}
	if a := b.ask(http.MethodPost, home+"/.sallyport/login", url.Values{}); a.status != http.StatusMethodNotAllowed {
		t.Errorf("POST to login: %d", a.status)
	}
}

// testTabs: two tabs begin before either ends, and each comes back to its own page.
func testTabs(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	one, two := b.get("/one").to(t), b.get("/two").to(t)
	answerTwo := b.person("ann", two)
	answerOne := b.person("ann", one)
	for _, c := range []struct{ answer, page string }{{answerTwo, "/two"}, {answerOne, "/one"}} {
		if to := b.ask(http.MethodGet, c.answer, nil).to(t); to != home+c.page {
			t.Errorf("the tab of %s is sent to %s", c.page, to)
		}
	}
	if a := b.get("/one"); a.status != http.StatusOK {
		t.Errorf("after both: %d", a.status)
	}
}

// testEnds: by the session's length, whatever is done, and by silence.
func testEnds(t *testing.T, p *oidc.Provider) {
	for _, c := range []struct {
		name  string
		lines []string
		steps []time.Duration
		last  int
	}{
		{"idle", []string{"session: 8h", "idle: 1h"}, []time.Duration{59 * time.Minute, 118 * time.Minute, 179 * time.Minute}, http.StatusUnauthorized},
		{"used", []string{"session: 2h", "idle: 1h"}, []time.Duration{50 * time.Minute, 100 * time.Minute, 119 * time.Minute}, http.StatusOK},
		{"over", []string{"session: 2h", "idle: 1h"}, []time.Duration{50 * time.Minute, 100 * time.Minute, 121 * time.Minute}, http.StatusUnauthorized},
		{"clock back", nil, []time.Duration{-2 * time.Minute}, http.StatusUnauthorized},
		{"clock a little back", nil, []time.Duration{-20 * time.Second}, http.StatusOK},
	} {
		s := newSite(t, p, c.lines...)
		b := newBrowser(t, s, p)
		b.logIn("ann", "/").to(t)
		for i, d := range c.steps {
			s.later(d)
			want := http.StatusOK
			if i == len(c.steps)-1 {
				want = c.last
			}
			if a := b.get("/", "Accept", "*/*"); a.status != want {
				t.Errorf("%s: after %s: %d, want %d", c.name, d, a.status, want)
			}
		}
	}
}

// testRenewal: the cookie changes when it is used after a while, not with each request, and the old one is silent all the while.
func testRenewal(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	b.logIn("ann", "/").to(t)
	first := b.cookies()["__Host-sallyport-session-app"]
	if a := b.get("/"); len(a.header["Set-Cookie"]) > 0 {
		t.Errorf("a request at once renews the cookie: %v", a.header["Set-Cookie"])
	}
	s.later(30 * time.Minute)
	b.get("/")
	if b.cookies()["__Host-sallyport-session-app"] == first {
		t.Error("the cookie is not renewed after half of its time")
	}
	s.later(70 * time.Minute)
	if a := b.get("/", "Accept", "*/*"); a.status != http.StatusOK {
		t.Errorf("a used session ends: %d", a.status)
	}
	b.set("__Host-sallyport-session-app", first)
	if a := b.get("/", "Accept", "*/*"); a.status != http.StatusUnauthorized {
		t.Errorf("the first cookie counts beyond its silence: %d", a.status)
	}
}

// testPolicyEnds: a change of what the policy says of the provider counts for sessions that run.
func testPolicyEnds(t *testing.T, p *oidc.Provider) {
	for _, lines := range [][]string{{"clientID: guarded"}, {"issuer: https://other.example.org"}, {"session: 11m", "idle: 11m"}, {"idle: 5m"}} {
		s := newSite(t, p)
		b := newBrowser(t, s, p)
		b.logIn("ann", "/").to(t)
		s.later(6 * time.Minute)
		if a := b.get("/", "Accept", "*/*"); a.status != http.StatusOK {
			t.Fatalf("before %s: %d", lines, a.status)
		}
		live := s.session
		s.later(12 * time.Minute)
		s.change(p, lines...)
		if a := b.get("/", "Accept", "*/*"); a.status != http.StatusUnauthorized {
			t.Errorf("after the change to %s: %d", lines, a.status)
		}
		if idle := lines[0] == "idle: 5m"; s.handler.Lives(s.service("app"), live, time.Now().Add(12*time.Minute)) != idle {
			t.Errorf("after the change to %s, what the session has open goes on: %v", lines, !idle)
		}
	}
}

func testManyGroups(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	b := newBrowser(t, s, p)
	b.logIn("many", "/").to(t)
	if a := b.get("/"); !strings.Contains(a.body, "hello corp/many of 250 groups") || len(b.cookies()) < 3 {
		t.Errorf("with many groups: %d %s", a.status, a.body)
	}
	other := newBrowser(t, s, p)
	if a := other.logIn("over", "/"); a.status != http.StatusForbidden || !strings.Contains(a.body, "fewer groups") {
		t.Errorf("with too many groups: %d %s", a.status, a.body)
	}
	// A smaller session in the same browser leaves no part of the larger one.
	fresh := newBrowser(t, s, p)
	for name, value := range b.cookies() {
		fresh.set(name, value)
	}
	s.later(9 * time.Hour)
	fresh.logIn("ann", "/").to(t)
	if a := fresh.get("/"); !strings.Contains(a.body, "hello corp/ann") {
		t.Errorf("after a larger session: %d %s %v", a.status, a.body, fresh.cookies())
	}
}

// testAway: without the provider nobody new comes in, and is told so; whoever is in goes on; and it is asked again soon.
func testAway(t *testing.T, p *oidc.Provider) {
	s := newSite(t, p)
	s.away(true)
	b := newBrowser(t, s, p)
	for range 3 {
		if a := b.get("/"); a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, "corp does not answer") {
			t.Errorf("without a provider: %d %s", a.status, a.body)
		}
	}
	if s.dialed != 1 {
		t.Errorf("the provider was dialed %d times in a moment", s.dialed)
	}
	s.away(false)
	s.later(6 * time.Second)
	b.logIn("ann", "/").to(t)
	s.away(true)
	s.later(45 * time.Minute)
	if a := b.get("/"); a.status != http.StatusOK {
		t.Errorf("logged in, with the provider away: %d", a.status)
	}
	s.away(false)
	late := newBrowser(t, s, p)
	link := late.person("ann", late.get("/").to(t))
	s.away(true)
	if a := late.ask(http.MethodGet, link, nil); a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, "corp does not answer") {
		t.Errorf("with the provider away at the callback: %d %s", a.status, a.body)
	}
	stranger := newBrowser(t, s, p)
	s.later(2 * time.Hour) // what it said of itself is old, and it does not answer: it may do so to the browser
	stranger.get("/").to(t)
	out := b.ask(http.MethodPost, home+"/.sallyport/logout", url.Values{}, "Sec-Fetch-Site", "same-origin")
	if len(b.cookies()) > 0 || out.status >= 400 {
		t.Errorf("logout with the provider away: %d %v", out.status, b.cookies())
	}
}
