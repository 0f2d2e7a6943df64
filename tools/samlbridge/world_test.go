package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"html"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/crewjam/saml"
	"github.com/crewjam/saml/samlidp"
	"golang.org/x/oauth2"
)

// back is where the client of tests is.
const back = "https://app.example.org/.sallyport/callback"

// world is a real SAML identity provider and the bridge to it, both over TLS.
type world struct {
	t      *testing.T
	idp    *httptest.Server
	bridge *httptest.Server
	way    *http.Transport // to both

	mu     sync.Mutex
	change func(*saml.Assertion) // guarded by mu: what the identity provider says otherwise
	logged bytes.Buffer          // guarded by mu
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, idp: httptest.NewTLSServer(nil), bridge: httptest.NewTLSServer(nil)}
	t.Cleanup(w.idp.Close)
	t.Cleanup(w.bridge.Close)
	pool := x509.NewCertPool()
	pool.AddCert(w.idp.Certificate())
	pool.AddCert(w.bridge.Certificate())
	w.way = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(w.way.CloseIdleConnections)

	server := w.identityProvider()
	w.idp.Config.Handler = server
	file := filepath.Join(t.TempDir(), "idp.xml")
	_, body := w.browser().get(w.idp.URL + "/metadata")
	if err := os.WriteFile(file, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	idp, err := readMetadata(file)
	if err != nil {
		t.Fatal(err)
	}
	b, err := newBridge(config{issuer: w.bridge.URL, idp: idp, groups: "eduPersonAffiliation",
		clients: clients{"app": {back}, "other": {"https://other.example.org/"}}, log: slog.New(slog.NewTextHandler(w, nil))})
	if err != nil {
		t.Fatal(err)
	}
	w.bridge.Config.Handler = b
	_, body = w.browser().get(w.bridge.URL + "/saml/metadata")
	w.put("/services/bridge", body)
	for _, user := range []string{"ann", "mallory"} {
		text, _ := json.Marshal(map[string]any{"name": user, "password": "word", "email": user + "@example.org", "groups": []string{"ops", "staff"}})
		w.put("/users/"+user, string(text))
	}
	return w
}

// of gives the world to a part of a test, as it was made.
func (w *world) of(t *testing.T) {
	w.t = t
	w.says(nil)
}

// Write takes the bridge's log.
func (w *world) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.logged.Write(line)
}

func (w *world) log() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.logged.String()
}

func (w *world) identityProvider() *samlidp.Server {
	w.t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		w.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "identity provider"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		w.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		w.t.Fatal(err)
	}
	where, err := url.Parse(w.idp.URL)
	if err != nil {
		w.t.Fatal(err)
	}
	server, err := samlidp.New(samlidp.Options{URL: *where, Key: key, Certificate: cert, Store: &samlidp.MemoryStore{}, Logger: log.New(io.Discard, "", 0)})
	if err != nil {
		w.t.Fatal(err)
	}
	server.IDP.AssertionMaker = w
	return server
}

// MakeAssertion says what identity providers say, with names that last, and what the test has changed.
func (w *world) MakeAssertion(req *saml.IdpAuthnRequest, session *saml.Session) error {
	if err := (saml.DefaultAssertionMaker{}).MakeAssertion(req, session); err != nil {
		return err
	}
	req.Assertion.Subject.NameID.Format = string(saml.PersistentNameIDFormat)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.change != nil {
		w.change(req.Assertion)
	}
	return nil
}

func (w *world) says(change func(*saml.Assertion)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.change = change
}

func (w *world) put(path, body string) {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), http.MethodPut, w.idp.URL+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	answer, err := w.idp.Client().Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusNoContent {
		w.t.Fatalf("identity provider takes %s: %s", path, answer.Status)
	}
}

// browser keeps cookies and goes where it is told to, but no further.
type browser struct {
	w      *world
	client *http.Client
}

func (w *world) browser() *browser {
	w.t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return &browser{w, &http.Client{Jar: jar, Timeout: time.Minute, Transport: w.way,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
}

func (b *browser) get(where string) (*http.Response, string) {
	b.w.t.Helper()
	answer, err := b.client.Get(where)
	return b.read(answer, err)
}

func (b *browser) post(where string, form url.Values) (*http.Response, string) {
	b.w.t.Helper()
	answer, err := b.client.PostForm(where, form)
	return b.read(answer, err)
}

func (b *browser) read(answer *http.Response, err error) (*http.Response, string) {
	b.w.t.Helper()
	if err != nil {
		b.w.t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		b.w.t.Fatal(err)
	}
	return answer, string(body)
}

// begin is the address that a client sends a browser to, with its verifier.
func (w *world) begin() (where, verifier string) {
	verifier = oauth2.GenerateVerifier()
	c := oauth2.Config{ClientID: "app", RedirectURL: back, Scopes: []string{"openid"}, Endpoint: oauth2.Endpoint{AuthURL: w.bridge.URL + "/authorize"}}
	return c.AuthCodeURL("state", oauth2.S256ChallengeOption(verifier), oauth2.SetAuthURLParam("nonce", "nonce")), verifier
}

var inputs = regexp.MustCompile(`name="(SAMLRequest|SAMLResponse|RelayState)" value="([^"]*)"`)

// form reads the hidden fields of a page.
func form(page string) url.Values {
	values := url.Values{}
	for _, m := range inputs.FindAllStringSubmatch(page, -1) {
		values.Set(m[1], html.UnescapeString(m[2]))
	}
	return values
}

// assertion goes to the identity provider, logs in there, and gives the form that the browser would bring to the bridge.
func (b *browser) assertion(user, where string) url.Values {
	b.w.t.Helper()
	answer, body := b.get(where)
	if answer.StatusCode != http.StatusSeeOther {
		b.w.t.Fatalf("bridge answers %s %s", answer.Status, body)
	}
	_, body = b.get(answer.Header.Get("Location"))
	values := form(body)
	if !values.Has("SAMLResponse") { // it does not know this browser yet
		values.Set("user", user)
		values.Set("password", "word")
		_, body = b.post(b.w.idp.URL+"/sso", values)
		values = form(body)
	}
	if values.Get("SAMLResponse") == "" {
		b.w.t.Fatalf("identity provider gives no response: %s", body)
	}
	return values
}

// bring posts the form to the bridge and gives the code that the browser is sent on with; empty: it is refused.
func (b *browser) bring(values url.Values) (code string) {
	b.w.t.Helper()
	answer, body := b.post(b.w.bridge.URL+"/saml/acs", values)
	if answer.StatusCode != http.StatusSeeOther {
		if answer.StatusCode < 400 || answer.StatusCode >= 500 || strings.Contains(body, "example.org") {
			b.w.t.Errorf("bridge answers %s %s", answer.Status, body)
		}
		return ""
	}
	to, err := url.Parse(answer.Header.Get("Location"))
	if err != nil || !strings.HasPrefix(to.String(), back+"?") || to.Query().Get("state") != "state" || to.Query().Get("iss") != b.w.bridge.URL {
		b.w.t.Fatalf("bridge sends to %s", to)
	}
	return to.Query().Get("code")
}

// redeem gives the claims of the ID token for a code, without a look at its signature: pkg/token does that elsewhere.
func (w *world) redeem(code, verifier string) (map[string]any, error) {
	w.t.Helper()
	ctx := context.WithValue(w.t.Context(), oauth2.HTTPClient, w.browser().client)
	c := oauth2.Config{ClientID: "app", RedirectURL: back, Endpoint: oauth2.Endpoint{TokenURL: w.bridge.URL + "/token", AuthStyle: oauth2.AuthStyleInParams}}
	tokens, err := c.Exchange(ctx, code, oauth2.VerifierOption(verifier))
	if err != nil {
		return nil, err
	}
	id, _ := tokens.Extra("id_token").(string)
	parts := strings.Split(id, ".")
	if len(parts) != 3 {
		w.t.Fatalf("ID token is %q", id)
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		w.t.Fatal(err)
	}
	var claims map[string]any
	if err := json.Unmarshal(text, &claims); err != nil {
		w.t.Fatal(err)
	}
	return claims, nil
}

func (w *world) authority() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.bridge.Certificate().Raw}))
}
