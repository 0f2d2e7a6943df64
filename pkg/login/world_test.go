package login_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/login"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
	"github.com/sallyport-dev/sallyport/test/oidc"
)

// home is where the service is, for browsers.
const home = "https://app.example.org"

// clients of the provider that tests share: public and with a secret.
var clients = []oidc.Client{
	{ID: "app", GrantTypes: []string{"authorization_code"}, ResponseTypes: []string{"code"}, RedirectURIs: []string{home + "/.sallyport/callback"}, TokenAuthMethod: "none"},
	{ID: "guarded", Secret: "word", GrantTypes: []string{"authorization_code"}, ResponseTypes: []string{"code"}, RedirectURIs: []string{home + "/.sallyport/callback"}, TokenAuthMethod: "client_secret_basic"},
}

var accounts = map[string]map[string]any{
	"ann":  {"groups": []string{"ops", "staff"}, "email": "ann@example.org"},
	"many": {"groups": manyGroups(250)},
	"over": {"groups": manyGroups(290)},
}

func manyGroups(n int) []string {
	var groups []string
	for i := range n {
		groups = append(groups, fmt.Sprintf("9f1c2a70-0000-4000-8000-%012d", i))
	}
	return groups
}

// site stands where the proxy does: it lets in who is logged in, and shows what of the request the service would see.
type site struct {
	t       testing.TB
	handler *login.Handler

	mu      sync.Mutex
	now     time.Time     // guarded by mu; zero: as it is
	set     *policy.Set   // guarded by mu
	down    bool          // guarded by mu: nobody is reached
	dialed  int           // guarded by mu
	hold    chan struct{} // guarded by mu: nobody is reached before it is closed; nil: at once
	seen    http.Header   // guarded by mu: what came through last
	session login.Session // guarded by mu: of that
}

// newSite has a handler of its own for the provider. Lines of the provider's spec or login can be given; later ones count.
func newSite(t testing.TB, p *oidc.Provider, lines ...string) *site {
	t.Helper()
	s := &site{t: t}
	s.change(p, lines...)
	tokens, err := token.New(token.Config{Policy: s.policy, Dial: new(net.Dialer).DialContext})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tokens.Run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		<-done
	})
	s.handler = login.New(login.Config{Policy: s.policy, Tokens: tokens, Dial: s.dial, Keys: login.NewKeys(), Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	return s
}

// change puts another policy into force.
func (s *site) change(p *oidc.Provider, lines ...string) {
	s.t.Helper()
	values := map[string]string{"issuer": p.Issuer, "clientID": "app", "session": "8h", "idle": "1h", "secret": ""}
	for _, l := range lines {
		name, value, _ := strings.Cut(l, ": ")
		values[name] = value
	}
	if values["secret"] != "" {
		values["secret"] = "clientSecretFile: " + values["secret"]
	}
	text := fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: IdentityProvider
metadata: {name: corp}
spec:
  issuer: %s
  audiences: [https://api.example.org]
  algorithms: [ES256]
  subjectClaim: sub
  groupsClaim: groups
  endpoints: [%q]
  ca: %q
  skew: 30s
  keep: 24h
  login:
    clientID: %s
    %s
    scopes: [profile]
    session: %s
    idle: %s
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: app}
spec:
  target: Host
  ports: [443]
  http: {authenticate: [oidc], providers: [corp], login: corp, certificate: web, hosts: [app.example.org]}
  access: [{groups: [corp/ops]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: other}
spec:
  target: Host
  ports: [444]
  http: {authenticate: [oidc], providers: [corp], login: corp, certificate: web, hosts: [app.example.org]}
  access: [{groups: [corp/ops]}]
`, values["issuer"], p.Endpoint, p.CA, values["clientID"], values["secret"], values["session"], values["idle"])
	set, err := policy.Parse("policy.yaml", []byte(text))
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.set = set
}

func (s *site) policy() *policy.Set {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.set
}

func (s *site) service(name string) policy.ProtectedService {
	svc, ok := s.policy().Service(name)
	if !ok {
		s.t.Fatalf("no service %s", name)
	}
	return svc
}

func (s *site) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	s.mu.Lock()
	s.dialed++
	down, hold := s.down, s.hold
	s.mu.Unlock()
	if hold != nil {
		<-hold
	}
	if down {
		return nil, &net.OpError{Op: "dial", Net: network, Err: io.ErrUnexpectedEOF}
	}
	return new(net.Dialer).DialContext(ctx, network, addr)
}

func (s *site) later(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = time.Now().Add(d)
}

func (s *site) away(is bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = is
}

// at is the service's handler under a name. The real one is the proxy's.
func (s *site) at(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		now := s.now
		s.mu.Unlock()
		if now.IsZero() {
			now = time.Now()
		}
		svc := s.service(name)
		if s.handler.Serve(svc, w, r, now) {
			return
		}
		if session, ok := s.handler.Session(svc, w, r, now); ok {
			login.Strip(r.Header)
			s.mu.Lock()
			s.seen, s.session = r.Header, session
			s.mu.Unlock()
			fmt.Fprintf(w, "<title>in</title>hello %s of %d groups, by %s", session.Caller, len(session.Caller.Groups), session.Caller.Proof)
			return
		}
		if !s.handler.Redirect(svc, w, r, now) {
			http.Error(w, "who are you?", http.StatusUnauthorized)
		}
	})
}

// browser is a person with cookies, one step at a time. What is below home goes to the site, all else to the provider.
type browser struct {
	t        testing.TB
	site     http.Handler
	provider *http.Client
	jar      http.CookieJar
}

func newBrowser(t testing.TB, s *site, p *oidc.Provider) *browser {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	client := *p.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &browser{t: t, site: s.at("app"), provider: &client, jar: jar}
}

// answer is what a browser got for one request.
type answer struct {
	status int
	header http.Header
	body   string
	from   *url.URL
}

// to is where the answer sends the browser.
func (a answer) to(t testing.TB) string {
	t.Helper()
	if a.status != http.StatusSeeOther && a.status != http.StatusFound {
		t.Fatalf("%s answers %d and sends nowhere: %s", a.from.Path, a.status, a.body)
	}
	u, err := a.from.Parse(a.header.Get("Location"))
	if err != nil {
		t.Fatal(err)
	}
	return u.String()
}

func (b *browser) ask(method, where string, form url.Values, header ...string) answer {
	b.t.Helper()
	r := httptest.NewRequest(method, where, strings.NewReader(form.Encode()))
	for _, c := range b.jar.Cookies(r.URL) {
		r.AddCookie(c)
	}
	if form != nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	r.Header.Set("Accept", "text/html")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	var response *http.Response
	if strings.HasPrefix(where, home+"/") {
		recorder := httptest.NewRecorder()
		b.site.ServeHTTP(recorder, r)
		response = recorder.Result()
	} else {
		var err error
		r.RequestURI = ""
		if response, err = b.provider.Do(r); err != nil {
			b.t.Fatal(err)
		}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	b.jar.SetCookies(r.URL, response.Cookies())
	return answer{response.StatusCode, response.Header, string(body), r.URL}
}

func (b *browser) get(path string, header ...string) answer {
	b.t.Helper()
	return b.ask(http.MethodGet, home+path, nil, header...)
}

var (
	formAction = regexp.MustCompile(`<form[^>]* action="([^"]+)"`)
	formPrompt = regexp.MustCompile(`name="prompt" value="([a-z]+)"`)
)

// person goes on at the provider as somebody, until it sends the browser back, and gives that address without going there.
func (b *browser) person(name, where string) string {
	b.t.Helper()
	for range 20 {
		a := b.ask(http.MethodGet, where, nil)
		if prompt := formPrompt.FindStringSubmatch(a.body); a.status == http.StatusOK && prompt != nil {
			u, err := a.from.Parse(formAction.FindStringSubmatch(a.body)[1])
			if err != nil {
				b.t.Fatal(err)
			}
			a = b.ask(http.MethodPost, u.String(), url.Values{"prompt": {prompt[1]}, "login": {name}, "password": {"any"}})
		}
		if where = a.to(b.t); strings.HasPrefix(where, home+"/") {
			return where
		}
	}
	b.t.Fatal("the provider sends nobody back")
	return ""
}

// logIn goes to a page, to the provider, and back, and gives the answer of the callback.
func (b *browser) logIn(name, path string) answer {
	b.t.Helper()
	return b.ask(http.MethodGet, b.person(name, b.get(path).to(b.t)), nil)
}

// cookies are those of the service that the browser has, by their names.
func (b *browser) cookies() map[string]string {
	u, _ := url.Parse(home + "/")
	found := map[string]string{}
	for _, c := range b.jar.Cookies(u) {
		found[c.Name] = c.Value
	}
	return found
}

func (b *browser) set(name, value string) {
	u, _ := url.Parse(home + "/")
	b.jar.SetCookies(u, []*http.Cookie{{Name: name, Value: value, Path: "/", Secure: true}})
}
