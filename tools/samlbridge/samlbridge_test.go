package main

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/crewjam/saml"

	"github.com/sallyport-dev/sallyport/pkg/login"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// TestBridge has one world for all that needs one: to make it, and to log in there, is most of the work.
func TestBridge(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, part := range map[string]func(*testing.T, *world){
		"login": tellsOfAnn, "through the proxy's login": loginThroughTheBridge, "attacks on the code": attacksOnTheCode, "attacks on the login": attacksOnTheLogin,
		"assertions that do not count": assertionsThatDoNotCount, "wrapping": signatureWrapping, "signatures": signatures,
	} {
		t.Run(name, func(t *testing.T) {
			w.of(t)
			part(t, w)
		})
	}
}

// tellsOfAnn has one identity provider tell of ann in every way.
func tellsOfAnn(t *testing.T, w *world) {
	b := w.browser()
	where, verifier := w.begin()
	values := b.assertion("ann", where)
	code := b.bring(values)
	claims, err := w.redeem(code, verifier)
	if err != nil {
		t.Fatal(err)
	}
	if claims["sub"] != "ann@example.org" || claims["aud"] != "app" || claims["nonce"] != "nonce" || fmt.Sprint(claims["groups"]) != "[ops staff]" || claims["iss"] != w.bridge.URL {
		t.Errorf("ID token says %v", claims)
	}
	if life := claims["exp"].(float64) - claims["iat"].(float64); life != 300 {
		t.Errorf("ID token counts for %v s", life)
	}
	if _, there := claims["session_expiry"]; there {
		t.Error("the session ends though the identity provider says nothing of it")
	}
	if _, err := w.redeem(code, verifier); err == nil || !strings.Contains(err.Error(), "invalid_grant") {
		t.Errorf("the code again: %v", err)
	}
	if b.bring(values) != "" {
		t.Error("the same form is taken again")
	}

	end := time.Now().Add(time.Hour)
	w.says(func(a *saml.Assertion) { a.AuthnStatements[0].SessionNotOnOrAfter = &end })
	where, verifier = w.begin()
	if claims, err := w.redeem(b.bring(b.assertion("ann", where)), verifier); err != nil || claims["session_expiry"] != float64(end.Unix()) {
		t.Errorf("with an end of the session: %v %v", claims["session_expiry"], err)
	}
}

// attacksOnTheCode are those on the bridge as an OpenID provider.
func attacksOnTheCode(t *testing.T, w *world) {
	b := w.browser()
	where, _ := w.begin()
	for name, value := range map[string]string{"client_id": "nobody", "redirect_uri": "https://evil.example.org/", "response_type": "token", "code_challenge_method": "plain",
		"code_challenge": "", "scope": "email"} {
		u, err := url.Parse(where)
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		q.Set(name, value)
		u.RawQuery = q.Encode()
		if answer, _ := b.get(u.String()); answer.StatusCode != http.StatusBadRequest || answer.Header.Get("Location") != "" {
			t.Errorf("%s=%s: %s", name, value, answer.Status)
		}
	}
	for name, spoil := range map[string]func(url.Values){
		"another verifier": func(v url.Values) { v.Set("code_verifier", strings.Repeat("a", 43)) },
		"no verifier":      func(v url.Values) { v.Del("code_verifier") },
		"another client":   func(v url.Values) { v.Set("client_id", "other") },
		"another address":  func(v url.Values) { v.Set("redirect_uri", "https://other.example.org/") },
		"no code":          func(v url.Values) { v.Del("code") },
		"another grant":    func(v url.Values) { v.Set("grant_type", "client_credentials") },
	} {
		where, verifier := w.begin()
		good := url.Values{"grant_type": {"authorization_code"}, "code": {b.bring(b.assertion("ann", where))}, "client_id": {"app"}, "redirect_uri": {back}, "code_verifier": {verifier}}
		spoil(good)
		if answer, body := b.post(w.bridge.URL+"/token", good); answer.StatusCode != http.StatusBadRequest || strings.Contains(body, "id_token") {
			t.Errorf("%s: %s %s", name, answer.Status, body)
		}
	}
}

// attacksOnTheLogin are those with answers of the identity provider as it gave them, brought where they do not belong.
func attacksOnTheLogin(t *testing.T, w *world) {
	attacker, victim := w.browser(), w.browser()
	where, _ := w.begin()
	stolen := attacker.assertion("mallory", where)
	if w.browser().bring(stolen) != "" {
		t.Error("a browser that begins nothing finishes a login")
	}
	stolen = attacker.assertion("mallory", where)
	victim.assertion("ann", where) // has a login of its own under way, and its cookie
	if victim.bring(stolen) != "" {
		t.Error("another browser finishes a login")
	}
	if attacker.bring(stolen) != "" {
		t.Error("a login goes on after another browser tried to finish it")
	}
	first, second := attacker.assertion("mallory", where), attacker.assertion("mallory", where)
	mixed := url.Values{"RelayState": first["RelayState"], "SAMLResponse": second["SAMLResponse"]}
	if attacker.bring(mixed) != "" {
		t.Error("an answer to another request is taken")
	}
	for _, relay := range []string{"", "made up"} {
		if attacker.bring(url.Values{"RelayState": {relay}, "SAMLResponse": first["SAMLResponse"]}) != "" {
			t.Errorf("an answer to no request is taken (RelayState %q)", relay)
		}
	}
	var kept string
	w.says(func(a *saml.Assertion) {
		if kept == "" {
			kept = a.ID
		}
		a.ID = kept
	})
	if attacker.bring(attacker.assertion("mallory", where)) == "" {
		t.Fatal("the assertion is refused")
	}
	if attacker.bring(attacker.assertion("mallory", where)) != "" {
		t.Error("an assertion of the same ID is taken again")
	}
}

// assertionsThatDoNotCount are all signed by the identity provider.
func assertionsThatDoNotCount(t *testing.T, w *world) {
	b := w.browser()
	hour := time.Hour
	confirmation := func(a *saml.Assertion) *saml.SubjectConfirmationData {
		return a.Subject.SubjectConfirmations[0].SubjectConfirmationData
	}
	for name, change := range map[string]func(*saml.Assertion){
		"audience": func(a *saml.Assertion) {
			a.Conditions.AudienceRestrictions[0].Audience.Value = "https://other.example.org"
		},
		"no audience": func(a *saml.Assertion) { a.Conditions.AudienceRestrictions = nil },
		"second audience": func(a *saml.Assertion) {
			a.Conditions.AudienceRestrictions = append(a.Conditions.AudienceRestrictions, saml.AudienceRestriction{Audience: saml.Audience{Value: "x"}})
		},
		"recipient":       func(a *saml.Assertion) { confirmation(a).Recipient = "https://other.example.org/saml/acs" },
		"no confirmation": func(a *saml.Assertion) { a.Subject.SubjectConfirmations = nil },
		"holder of key": func(a *saml.Assertion) {
			a.Subject.SubjectConfirmations[0].Method = "urn:oasis:names:tc:SAML:2.0:cm:holder-of-key"
		},
		"another request":  func(a *saml.Assertion) { confirmation(a).InResponseTo = "id-of-another" },
		"unasked":          func(a *saml.Assertion) { confirmation(a).InResponseTo = "" },
		"expired":          func(a *saml.Assertion) { a.Conditions.NotOnOrAfter = time.Now().Add(-hour) },
		"not yet":          func(a *saml.Assertion) { a.Conditions.NotBefore = time.Now().Add(hour) },
		"for ever":         func(a *saml.Assertion) { a.Conditions.NotOnOrAfter = time.Now().Add(48 * hour) },
		"late":             func(a *saml.Assertion) { confirmation(a).NotOnOrAfter = time.Now().Add(-hour) },
		"issued long ago":  func(a *saml.Assertion) { a.IssueInstant = time.Now().Add(-hour) },
		"issuer":           func(a *saml.Assertion) { a.Issuer.Value = "https://other.example.org/metadata" },
		"session over":     func(a *saml.Assertion) { end := time.Now().Add(-hour); a.AuthnStatements[0].SessionNotOnOrAfter = &end },
		"nobody":           func(a *saml.Assertion) { a.Subject.NameID = nil },
		"nobody for long":  func(a *saml.Assertion) { a.Subject.NameID.Format = transient },
		"nobody by a name": func(a *saml.Assertion) { a.Subject.NameID.Value = "" },
	} {
		w.says(change)
		where, _ := w.begin()
		if b.bring(b.assertion("ann", where)) != "" {
			t.Errorf("%s: it is taken", name)
		}
	}
	w.says(nil)
	where, _ := w.begin()
	if b.bring(b.assertion("ann", where)) == "" {
		t.Errorf("an assertion as it should be is refused: %s", w.log())
	}
}

// loginThroughTheBridge: to the proxy's login it is one more provider.
func loginThroughTheBridge(t *testing.T, w *world) {
	endpoint := w.bridge.Listener.Addr().String()
	set, err := policy.Parse("policy.yaml", fmt.Appendf(nil, `apiVersion: sallyport.dev/v1alpha1
kind: IdentityProvider
metadata: {name: saml}
spec:
  issuer: %s
  audiences: [app]
  algorithms: [ES256]
  subjectClaim: sub
  groupsClaim: groups
  endpoints: [%q]
  ca: %q
  skew: 30s
  keep: 24h
  login: {clientID: app, session: 8h, idle: 1h}
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: app}
spec:
  target: Host
  ports: [443]
  http: {authenticate: [oidc], providers: [saml], login: saml, certificate: web}
  access: [{groups: [saml/ops]}]
`, w.bridge.URL, endpoint, w.authority()))
	if err != nil {
		t.Fatal(err)
	}
	inForce := func() *policy.Set { return set }
	tokens, err := token.New(token.Config{Policy: inForce, Dial: new(net.Dialer).DialContext})
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		_ = tokens.Run(t.Context())
	}()
	t.Cleanup(func() { <-stopped })
	h := login.New(login.Config{Policy: inForce, Tokens: tokens, Dial: new(net.Dialer).DialContext, Keys: login.NewKeys(), Log: slog.New(slog.DiscardHandler)})
	service, _ := set.Service("app")

	b := w.browser()
	ask := func(where string, cookies []*http.Cookie) *http.Response {
		r := httptest.NewRequest(http.MethodGet, where, nil)
		r.Header.Set("Accept", "text/html")
		for _, c := range cookies {
			r.AddCookie(c)
		}
		answer := httptest.NewRecorder()
		if !h.Serve(service, answer, r, time.Now()) && !h.Redirect(service, answer, r, time.Now()) {
			t.Fatalf("%s: nobody answers", where)
		}
		return answer.Result()
	}
	begun := ask("https://app.example.org/reports", nil)
	form := b.assertion("ann", begun.Header.Get("Location"))
	answer, _ := b.post(w.bridge.URL+"/saml/acs", form)
	in := ask(answer.Header.Get("Location"), begun.Cookies())
	if in.StatusCode != http.StatusSeeOther || in.Header.Get("Location") != "/reports" {
		t.Fatalf("the login answers %s", in.Status)
	}
	r := httptest.NewRequest(http.MethodGet, "https://app.example.org/reports", nil)
	for _, c := range in.Cookies() {
		r.AddCookie(c)
	}
	session, ok := h.Session(service, httptest.NewRecorder(), r, time.Now())
	if !ok || session.Caller.String() != "saml/ann@example.org" || fmt.Sprint(session.Caller.Groups) != "[ops staff]" {
		t.Errorf("logged in: %v %+v", ok, session.Caller)
	}
}

func TestConfigurationIsChecked(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good := filepath.Join(dir, "idp.xml")
	odd := filepath.Join(dir, "odd.xml")
	text := `<?xml version="1.0"?><EntityDescriptor xmlns="urn:oasis:names:tc:SAML:2.0:metadata" entityID="https://idp.example.org"><IDPSSODescriptor/></EntityDescriptor>`
	for file, content := range map[string]string{good: text, odd: strings.Replace(text, "<Entity", "<!DOCTYPE x><Entity", 1)} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for want, args := range map[string][]string{
		"name that with -idp":       nil,
		"document types":            {"-idp", odd},
		"is no https address":       {"-idp", good, "-issuer", "http://bridge.example.org"},
		"there is no client":        {"-idp", good, "-issuer", "https://bridge.example.org"},
		"is no client; write it":    {"-client", "app"},
		"without a slash":           {"-idp", good, "-issuer", "https://bridge.example.org/"},
		"no such file or directory": {"-idp", good, "-issuer", "https://bridge.example.org", "-client", "app=" + back, "-listen", "127.0.0.1:0", "-cert", dir + "/none", "-key", dir + "/none"},
	} {
		if err := run(t.Context(), args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}

func TestShelfGivesOnce(t *testing.T) {
	t.Parallel()
	var s shelf[int]
	now := time.Now()
	key := s.put(7, now, now.Add(time.Minute))
	if v, ok := s.take(key, now); !ok || v != 7 {
		t.Errorf("take gives %d, %v", v, ok)
	}
	if _, ok := s.take(key, now); ok {
		t.Error("it is given twice")
	}
	late := s.put(8, now, now.Add(time.Minute))
	if _, ok := s.take(late, now.Add(time.Minute)); ok {
		t.Error("it is given after its time")
	}
	for range maxShelf {
		s.put(1, now, now.Add(time.Minute))
	}
	if s.put(2, now, now.Add(time.Hour)) != "" {
		t.Error("there is room without end")
	}
	if s.put(3, now.Add(time.Minute), now.Add(time.Hour)) == "" {
		t.Error("what ran out takes room")
	}
}
