// Package chromium runs a real browser for tests.
package chromium

import (
	"context"
	"testing"
	"time"

	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
)

// Browser is one window of it.
type Browser struct {
	testing.TB
	// Window is what chromedp's functions take.
	Window context.Context
}

// Start opens one, which is closed with the test.
func Start(t testing.TB, more ...chromedp.ExecAllocatorOption) *Browser {
	t.Helper()
	ctx, late := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(late)
	options := append([]chromedp.ExecAllocatorOption{
		chromedp.NoSandbox, // it runs as root here, where Chromium has none
		chromedp.Flag("disable-dev-shm-usage", true),
	}, more...)
	ctx, end := chromedp.NewContext(ctx, chromedp.WithAllocatorOptions(options...))
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Errorf("end browser: %v", err)
		}
		end()
	})
	return &Browser{t, ctx}
}

// AnyCertificate has it take the certificates of tests.
func AnyCertificate(a *chromedp.ExecAllocator) { chromedp.Flag("ignore-certificate-errors", true)(a) }

// Do takes these steps.
func (b *Browser) Do(steps ...chromedp.Action[chromedp.Void]) {
	b.Helper()
	if err := chromedp.Do(b.Window, steps...); err != nil {
		b.Fatal(err)
	}
}

// Follow does something that leads to another page, and waits until that is there.
func (b *Browser) Follow(step chromedp.Action[chromedp.Void]) {
	b.Helper()
	if _, err := chromedp.Run(b.Window, chromedp.WaitEvent(page.LoadEventFired, nil, step)); err != nil {
		b.Fatal(err)
	}
}

// Text is what an element shows.
func (b *Browser) Text(selector string) string {
	b.Helper()
	text, err := chromedp.Run(b.Window, chromedp.Text(chromedp.CSS(selector)))
	if err != nil {
		b.Fatal(err)
	}
	return text
}

// Cookies are those that it would send there.
func (b *Browser) Cookies(where string) []*network.Cookie {
	b.Helper()
	got, err := chromedp.Call(b.Window, network.GetCookies, network.GetCookiesParams{URLs: []string{where + "/"}})
	if err != nil {
		b.Fatal(err)
	}
	return got.Cookies
}

// Evaluate gives the value of an expression on the page.
func Evaluate[T any](b *Browser, expression string) T {
	b.Helper()
	got, err := chromedp.Run(b.Window, chromedp.Evaluate[T](expression))
	if err != nil {
		b.Fatal(err)
	}
	return got
}
