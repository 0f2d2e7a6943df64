package login_test

import (
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"

	"github.com/sallyport-dev/sallyport/test/chromium"
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
	c := window{chromium.Start(t, chromium.AnyCertificate)}

	c.Do(chromedp.Navigate(where + "/reports?year=2026"))
	c.Do(chromedp.SendKeys(chromedp.CSS("input[name=login]"), "ann"), chromedp.SendKeys(chromedp.CSS("input[name=password]"), "any"))
	c.Follow(chromedp.Click(chromedp.CSS("button[type=submit]")))
	c.Follow(chromedp.Click(chromedp.CSS("button[type=submit]"))) // that the service may know who it is
	c.has("body", "hello corp/ann of 2 groups, by oidc")
	c.at(where + "/reports?year=2026")
	c.Follow(chromedp.Reload())
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

	c.Do(chromedp.Navigate(where + "/.sallyport/logout"))
	c.has("p", "You are logged in as corp/ann.")
	c.Follow(chromedp.Click(chromedp.CSS("button")))
	c.has("h1", "Do you want to sign-out from")
	c.Follow(chromedp.Click(chromedp.CSS("button[name=logout]")))
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
	c.Do(chromedp.Navigate(where + "/reports"))
	if asks := chromium.Evaluate[bool](c.Browser, `document.querySelector("input[name=login]") !== null`); !asks {
		t.Error("after the logout nobody asks who it is")
	}
}

// window is one of a real browser that takes the certificates of tests.
type window struct{ *chromium.Browser }

func (c window) has(selector, want string) {
	c.Helper()
	if text := c.Text(selector); !strings.Contains(text, want) {
		c.Fatalf("%s says %q, want %q", selector, text, want)
	}
}

func (c window) at(want string) {
	c.Helper()
	if got := chromium.Evaluate[string](c.Browser, "location.href"); got != want {
		c.Errorf("the browser is at %s, want %s", got, want)
	}
}

// cookies are ours: the provider has the same host.
func (c window) cookies(where string) []*network.Cookie {
	c.Helper()
	return slices.DeleteFunc(c.Cookies(where), func(k *network.Cookie) bool { return !strings.HasPrefix(k.Name, "__Host-") })
}
