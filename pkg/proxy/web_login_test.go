package proxy

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/login"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
	"github.com/sallyport-dev/sallyport/test/chromium"
	"github.com/sallyport-dev/sallyport/test/oidc"
)

// logsIn has the proxy verify tokens and log browsers in.
func logsIn(t *testing.T, c *Config) {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	v, err := token.New(token.Config{Policy: c.Policy.Set, Dial: new(net.Dialer).DialContext, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	c.Tokens = v
	c.Login = login.New(login.Config{Policy: c.Policy.Set, Tokens: v, Dial: new(net.Dialer).DialContext, Keys: login.NewKeys(), Log: quiet})
}

const (
	byBrowser = "{authenticate: [oidc], providers: [people], login: people, certificate: web}"
	people    = `
---
apiVersion: sallyport.dev/v1alpha1
kind: IdentityProvider
metadata: {name: people}
spec: {issuer: %q, audiences: [web], endpoints: [%q], ca: %q, login: {clientID: app, scopes: [profile]}}`
)

// TestChromiumThroughTheProxy: a person with a browser logs in at a real provider, is who that says, and is nobody after the logout.
func TestChromiumThroughTheProxy(t *testing.T) {
	t.Parallel()
	open := func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hints" {
			rw.Header().Set("Set-Cookie", "__Host-sallyport-session-web=of the service; Path=/; Secure")
			rw.WriteHeader(http.StatusEarlyHints)
			rw.Header().Del("Set-Cookie")
		}
		if r.URL.Path != "/open" {
			http.SetCookie(rw, &http.Cookie{Name: "__Host-sallyport-session-web", Value: "of the service", Path: "/", Secure: true})
			echo(rw, r)
			return
		}
		rw.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(rw).Flush()
		<-r.Context().Done()
	}
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(open), change: func(c *Config) {
		dir := t.TempDir()
		f := policy.WebCertificate{Name: "web", CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
		writeCertificate(t, f, "web.example.org", 1)
		c.Certificates = NewCertificates([]policy.WebCertificate{f}, c.Logger)
		logsIn(t, c)
	}})
	where := "https://" + l.addr
	p := oidc.Start(t, oidc.Options{Accounts: map[string]map[string]any{"ann": {"groups": []string{"ops"}}}, Clients: []oidc.Client{{ID: "app",
		GrantTypes: []string{"authorization_code"}, ResponseTypes: []string{"code"}, RedirectURIs: []string{where + "/.sallyport/callback"}, TokenAuthMethod: "none"}}})
	l.write(byBrowser, `[{groups: [people/ops], routes: [{paths: [/, /open, /hints]}]}]`+fmt.Sprintf(people, p.Issuer, p.Endpoint, p.CA))

	b := chromium.Start(t, chromium.AnyCertificate)
	b.Do(chromedp.Navigate(where + "/"))
	b.Do(chromedp.SendKeys(chromedp.CSS("input[name=login]"), "ann"), chromedp.SendKeys(chromedp.CSS("input[name=password]"), "any"))
	b.Follow(chromedp.Click(chromedp.CSS("button[type=submit]")))
	b.Follow(chromedp.Click(chromedp.CSS("button[type=submit]")))
	text := b.Text("body")
	if !strings.Contains(text, "X-Sallyport-Identity: people/ann") || !strings.Contains(text, "X-Sallyport-Proof: oidc") || strings.Contains(text, "__Host-sallyport") {
		t.Errorf("the service sees %s", text)
	}
	b.Follow(chromedp.Reload())
	if text := b.Text("body"); !strings.Contains(text, "X-Sallyport-Identity: people/ann") {
		t.Errorf("after a reload, the service sees %s", text)
	}
	if r := l.find(flow.EventRequest, flow.ReasonIdentity); r.Identity != "people/ann" || r.Proof != "oidc" {
		t.Errorf("record %+v", r)
	}
	l.find(flow.EventDeny, flow.ReasonLoginNeeded)

	c := l.client(nobody, alpnHTTP1)
	c.Timeout = time.Minute // that it hangs
	c.Transport.(*http.Transport).TLSClientConfig.InsecureSkipVerify = true
	c.Transport.(*http.Transport).TLSClientConfig.VerifyPeerCertificate = nil
	var kept []*network.Cookie
	ask := func(path string, change ...func(*http.Request)) *http.Response {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, where+path, nil)
		l.must(err)
		for _, k := range kept {
			r.AddCookie(&http.Cookie{Name: k.Name, Value: k.Value})
		}
		for _, f := range change {
			f(r)
		}
		answer, err := c.Do(r)
		l.must(err)
		return answer
	}
	kept = b.Cookies(where) // as a thief would
	if answer := ask("/secret"); answer.StatusCode != http.StatusForbidden {
		t.Errorf("what is not allowed: %s", answer.Status)
	}
	l.renewedBehindHints(ask)
	stream := ask("/open")
	if stream.StatusCode != http.StatusOK {
		t.Fatalf("with the browser's cookies: %s", stream.Status)
	}
	b.Do(chromedp.Navigate(where + "/.sallyport/logout"))
	b.Follow(chromedp.Click(chromedp.CSS("button")))
	if _, err := io.ReadAll(stream.Body); err == nil {
		t.Error("what the session has open ends as if nothing was")
	}
	l.find(flow.EventRequest, flow.ReasonSessionEnded)
	if answer := ask("/"); answer.StatusCode != http.StatusUnauthorized {
		t.Errorf("with the browser's cookies after the logout: %s", answer.Status)
	}
}

// renewedBehindHints: a cookie that is renewed comes with the answer, whatever the service says ahead of that, and nothing of the kind
// with what is ahead.
func (l *webLab) renewedBehindHints(ask func(string, ...func(*http.Request)) *http.Response) {
	l.Helper()
	l.ahead.Store(int64(30 * time.Minute))
	defer l.ahead.Store(0)
	hints := make(chan textproto.MIMEHeader, 10)
	answer := ask("/hints", func(r *http.Request) {
		*r = *r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
			hints <- h
			return nil
		}}))
	})
	set := answer.Header["Set-Cookie"]
	if len(set) != 1 || !strings.HasPrefix(set[0], "__Host-sallyport-session-web=") || strings.Contains(set[0], "of the service") {
		l.Errorf("behind hints, the session's cookie is renewed as %q", set)
	}
	if h := <-hints; len(h["Set-Cookie"]) > 0 {
		l.Errorf("hints set %q", h["Set-Cookie"])
	}
}
