package console_test

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// browser is a real Chromium that notes what it complains about and whom it asks.
type browser struct {
	t    testing.TB
	ctx  context.Context
	base string

	mu     sync.Mutex
	asked  int      // requests that it made
	wrong  []string // what its console says, exceptions, and addresses outside
	allows []string // parts of complaints that belong to the test
}

func newBrowser(t testing.TB, base string) *browser {
	t.Helper()
	ctx, late := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(late)
	ctx, end := chromedp.NewContext(ctx, chromedp.WithAllocatorOptions(
		chromedp.NoSandbox, // it runs as root here, where Chromium has none
		chromedp.Flag("disable-dev-shm-usage", true)))
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Errorf("end browser: %v", err)
		}
		end()
	})
	b := &browser{t: t, ctx: ctx, base: base}
	if err := chromedp.Listen(ctx, b.note); err != nil {
		t.Fatal(err)
	}
	for _, enable := range []cdp.Command[cdp.Empty, cdp.Empty]{log.Enable, runtime.Enable} {
		must(chromedp.Call(ctx, enable, cdp.Empty{}))(t)
	}
	must(chromedp.Call(ctx, network.Enable, network.EnableParams{}))(t)
	t.Cleanup(b.judge)
	return b
}

func (b *browser) judge() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, w := range b.wrong {
		b.t.Errorf("the browser complains: %s", w)
	}
	if b.asked == 0 {
		b.t.Error("the browser told of no request: nobody listened")
	}
}

func (b *browser) note(event any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var wrong string
	switch e := event.(type) {
	case *log.EventEntryAdded: // violations of the page's policy are among them
		wrong = e.Entry.Text + " " + e.Entry.URL
	case *runtime.EventConsoleAPICalled:
		wrong = "it was called: console." + string(e.Type)
	case *runtime.EventExceptionThrown:
		wrong = e.ExceptionDetails.Text
	case *network.EventRequestWillBeSent:
		b.asked++
		if !strings.HasPrefix(e.Request.URL, b.base+"/") && !strings.HasPrefix(e.Request.URL, "data:") { // pictures of its own that a browser draws
			wrong = "it asked " + e.Request.URL
		}
	}
	for _, part := range b.allows {
		if strings.Contains(wrong, part) {
			return
		}
	}
	if wrong != "" {
		b.wrong = append(b.wrong, wrong)
	}
}

func (b *browser) allow(part string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.allows = append(b.allows, part)
}

func (b *browser) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, steps...); err != nil {
		b.t.Fatal(err)
	}
}

func (b *browser) open(path string) {
	b.t.Helper()
	b.do(chromedp.Navigate(b.base + path))
}

// follow does something that leads to another page, and waits until that is there.
func (b *browser) follow(step chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	must(chromedp.Run(b.ctx, chromedp.WaitEvent(page.LoadEventFired, nil, step)))(b.t)
}

// has holds that a person sees a text in an element.
func (b *browser) has(selector, want string) {
	b.t.Helper()
	if text := must(chromedp.Run(b.ctx, chromedp.Text(chromedp.CSS(selector))))(b.t); !strings.Contains(text, want) {
		b.t.Errorf("%s says %q, want %q", selector, text, want)
	}
}

func evaluate[T any](b *browser, expression string) T {
	b.t.Helper()
	return must(chromedp.Run(b.ctx, chromedp.Evaluate[T](expression)))(b.t)
}

// shoot takes a picture of the whole page, and holds that it can be read without moving sideways.
func (b *browser) shoot(name string, width, height int64) {
	b.t.Helper()
	b.do(chromedp.EmulateViewport(width, height))
	picture := must(chromedp.Run(b.ctx, chromedp.FullScreenshot(100)))(b.t)
	if wide := evaluate[int64](b, `document.documentElement.scrollWidth`); wide > width {
		b.t.Errorf("%s is %d wide on a screen of %d", name, wide, width)
	}
	dir := os.Getenv("SALLYPORT_SCREENSHOTS")
	if dir == "" {
		dir = b.t.TempDir()
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), picture, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// TestConsoleInABrowser clicks through the console: a flow is found by its filter, its grant opened, and its proof seen verified.
func TestConsoleInABrowser(t *testing.T) {
	t.Parallel()
	n := newNight(t)
	b := newBrowser(t, n.serve().URL)

	b.open("/flows")
	b.do(chromedp.Click(chromedp.CSS("summary")), chromedp.SetValue(chromedp.CSS("select[name=verdict]"), "BYPASSED"),
		chromedp.SendKeys(chromedp.CSS("input[name=service]"), "postgres"))
	b.follow(chromedp.Click(chromedp.CSS("form button")))
	b.has("caption", "3 records")
	b.has("tbody", "1.3 GiB out")
	b.follow(chromedp.Click(chromedp.CSS("tbody tr a.id")))
	b.has("h1", n.backup.ID)
	b.has("#proof", "Proof verified")
	b.has("#proof", "2 of 2")
	for _, part := range []string{"alice", "nightly backup", "OPS-4711", n.backup.key.Public().ID(), "reconciled", "ACTIVATED", "sealed in batch", "until"} {
		b.has("main", part)
	}

	for _, c := range []struct{ name, path, has string }{
		{"live", "/", "orders-db"}, {"flows", "/flows", "NO_TLS"}, {"reviews", "/reviews", "bob"}, {"nodes", "/nodes", "1 of 2 nodes"}, {"losses", "/losses", "1 204"},
		{"grant", "/grant?id=" + url.QueryEscape(n.broke.ID), "break-glass"},
	} {
		b.open(c.path)
		b.has("main", c.has)
		b.shoot(c.name+"-desktop", 1440, 900)
		b.shoot(c.name+"-phone", 390, 844)
		b.shoot(c.name+"-small", 320, 640)
	}
}
