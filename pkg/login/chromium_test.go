package login_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"

	"github.com/sallyport-dev/sallyport/test/oidc"
)

// TestChromiumLogsInAndOut has a real browser go through a real provider's pages, over TLS, and come back.
func TestChromiumLogsInAndOut(t *testing.T) {
	t.Parallel()
	server := httptest.NewUnstartedServer(nil)
	server.EnableHTTP2 = true
	where := "https://" + server.Listener.Addr().(*net.TCPAddr).String()
	p := oidc.Start(t, oidc.Options{Accounts: accounts, Clients: []oidc.Client{{ID: "app", GrantTypes: []string{"authorization_code"},
		ResponseTypes: []string{"code"}, RedirectURIs: []string{where + "/.sallyport/callback"}, TokenAuthMethod: "none"}}})
	s := newSite(t, p)
	server.Config.Handler = s.at("app")
	server.StartTLS()
	t.Cleanup(server.Close)
	c := newChromium(t)

	c.do(chromedp.Navigate(where + "/reports?year=2026"))
	c.do(chromedp.SendKeys(chromedp.CSS("input[name=login]"), "ann"), chromedp.SendKeys(chromedp.CSS("input[name=password]"), "any"))
	c.follow(chromedp.Click(chromedp.CSS("button[type=submit]")))
	c.follow(chromedp.Click(chromedp.CSS("button[type=submit]"))) // that the service may know who it is
	c.has("body", "hello corp/ann of 2 groups, by oidc")
	c.at(where + "/reports?year=2026")
	c.follow(chromedp.Reload())
	c.has("body", "hello corp/ann")

	cookies := c.cookies(where)
	for _, k := range cookies {
		if !k.HTTPOnly || !k.Secure || k.SameSite != network.CookieSameSiteLax || !strings.HasPrefix(k.Name, "__Host-sallyport-") {
			t.Errorf("the browser keeps %+v", k)
		}
	}
	if len(cookies) != 2 {
		t.Errorf("the browser keeps %d cookies", len(cookies))
	}

	c.do(chromedp.Navigate(where + "/.sallyport/logout"))
	c.has("p", "You are logged in as corp/ann.")
	c.follow(chromedp.Click(chromedp.CSS("button")))
	c.has("h1", "Do you want to sign-out from")
	c.follow(chromedp.Click(chromedp.CSS("button[name=logout]")))
	if left := c.cookies(where); len(left) > 0 {
		t.Errorf("after the logout the browser keeps %v", left)
	}
	thief := server.Client()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, where+"/reports", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range cookies {
		request.AddCookie(&http.Cookie{Name: k.Name, Value: k.Value})
	}
	answer, err := thief.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusUnauthorized {
		t.Errorf("a copy of the cookies after the logout: %s", answer.Status)
	}
	c.do(chromedp.Navigate(where + "/reports"))
	if asks := evaluate[bool](c, `document.querySelector("input[name=login]") !== null`); !asks {
		t.Error("after the logout nobody asks who it is")
	}
}

// chromium is a real browser that takes the certificates of tests.
type chromium struct {
	t   testing.TB
	ctx context.Context
}

func newChromium(t testing.TB) *chromium {
	t.Helper()
	ctx, late := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(late)
	ctx, end := chromedp.NewContext(ctx, chromedp.WithAllocatorOptions(
		chromedp.NoSandbox, // it runs as root here, where Chromium has none
		chromedp.Flag("ignore-certificate-errors", true),
		chromedp.Flag("disable-dev-shm-usage", true)))
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Errorf("end browser: %v", err)
		}
		end()
	})
	return &chromium{t, ctx}
}

func (c *chromium) do(steps ...chromedp.Action[chromedp.Void]) {
	c.t.Helper()
	if err := chromedp.Do(c.ctx, steps...); err != nil {
		c.t.Fatal(err)
	}
}

// follow does something that leads to another page, and waits until that is there.
func (c *chromium) follow(step chromedp.Action[chromedp.Void]) {
	c.t.Helper()
	if _, err := chromedp.Run(c.ctx, chromedp.WaitEvent(page.LoadEventFired, nil, step)); err != nil {
		c.t.Fatal(err)
	}
}

func (c *chromium) has(selector, want string) {
	c.t.Helper()
	text, err := chromedp.Run(c.ctx, chromedp.Text(chromedp.CSS(selector)))
	if err != nil || !strings.Contains(text, want) {
		c.t.Fatalf("%s says %q, want %q (%v)", selector, text, want, err)
	}
}

func (c *chromium) at(want string) {
	c.t.Helper()
	if got := evaluate[string](c, "location.href"); got != want {
		c.t.Errorf("the browser is at %s, want %s", got, want)
	}
}

func (c *chromium) cookies(where string) []*network.Cookie {
	c.t.Helper()
	got, err := chromedp.Call(c.ctx, network.GetCookies, network.GetCookiesParams{URLs: []string{where + "/"}})
	if err != nil {
		c.t.Fatal(err)
	}
	return slices.DeleteFunc(got.Cookies, func(k *network.Cookie) bool { return !strings.HasPrefix(k.Name, "__Host-") }) // the provider has the same host
}

func evaluate[T any](c *chromium, expression string) T {
	c.t.Helper()
	got, err := chromedp.Run(c.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		c.t.Fatal(err)
	}
	return got
}
