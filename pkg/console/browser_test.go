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
	"unicode"
	"unicode/utf8"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
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

// fits holds that the page can be read without moving sideways.
func (b *browser) fits(name string, width, height int64) {
	b.t.Helper()
	b.do(chromedp.EmulateViewport(width, height))
	if wide := evaluate[int64](b, `document.documentElement.scrollWidth`); wide > width {
		b.t.Errorf("%s is %d wide on a screen of %d", name, wide, width)
	}
}

// shoot takes a picture of the whole page.
func (b *browser) shoot(name string, width, height int64) {
	b.t.Helper()
	b.fits(name, width, height)
	dir := os.Getenv("SALLYPORT_SCREENSHOTS")
	if dir == "" {
		dir = b.t.TempDir()
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), must(chromedp.Run(b.ctx, chromedp.FullScreenshot(100)))(b.t), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// TestConsoleInABrowser clicks through the console: a flow is found by its filter, its grant opened, and its proof seen verified. Every page
// can be read on a phone and a desktop, light and dark. SALLYPORT_SCREENSHOTS names a directory that keeps the pictures.
func TestConsoleInABrowser(t *testing.T) {
	t.Parallel()
	n := newNight(t)
	b := newBrowser(t, n.serve().URL)

	b.open("/flows")
	b.do(chromedp.Click(chromedp.CSS("summary")), chromedp.SetValue(chromedp.CSS("select[name=verdict]"), "BYPASSED"),
		chromedp.SendKeys(chromedp.CSS("input[name=service]"), "postgres"))
	b.follow(chromedp.Click(chromedp.CSS("form button")))
	b.has("caption", "Records, newest first: 3")
	b.has("tbody", "1.3 GiB out")
	b.follow(chromedp.Click(chromedp.CSS("tbody tr a.id")))
	b.has("h1", n.backup.ID)
	b.has("#proof", "Proof verified")
	b.do(chromedp.Click(chromedp.CSS("#proof summary")))
	b.has("#proof", "2 of 2")
	for _, part := range []string{"alice", "nightly backup", "OPS-4711", n.backup.key.Public().ID(), "reconciled", "ACTIVATED", "sealed in batch", "until"} {
		b.has("main", part)
	}

	for _, c := range []struct{ name, path, has string }{
		{"live", "/", "orders-db"}, {"flows", "/flows", "NO_TLS"}, {"reviews", "/reviews", "bob"}, {"nodes", "/nodes", "1 of 2"}, {"losses", "/losses", "1 204"},
		{"grant", "/grant?id=" + url.QueryEscape(n.backup.ID), "OPS-4711"}, {"break-glass", "/grant?id=" + url.QueryEscape(n.broke.ID), "nobody has reviewed"},
	} {
		b.scheme("light")
		b.open(c.path)
		b.has("main", c.has)
		b.contrast(c.name)
		b.shoot(c.name+"-desktop", 1440, 900)
		b.shoot(c.name+"-phone", 390, 844)
		b.fits(c.name, 320, 640)
		b.scheme("dark")
		b.contrast(c.name + " in the dark")
	}
	n.tamper(`UPDATE grant_events SET data = CAST(replace(data, '80%', '10%') AS BLOB)`)
	b.scheme("light")
	b.open("/grant?id=" + url.QueryEscape(n.backup.ID))
	b.has("#proof", "Proof failed: the records are disproved")
	b.contrast("disproved")
	b.shoot("disproved-desktop", 1440, 900)
}

// TestConsoleByKeyboard goes from the live paths to a grant and revokes it, with keys alone and what has the focus in sight.
func TestConsoleByKeyboard(t *testing.T) {
	t.Parallel()
	n := newNight(t)
	b := newBrowser(t, n.serve().URL)
	b.do(chromedp.EmulateViewport(1440, 900))
	b.open("/?refresh=off")
	if first := b.tab(); first != "A.skip" {
		t.Errorf("the first stop is %s", first)
	}
	href := func() string { return evaluate[string](b, `document.activeElement.getAttribute("href") || ""`) }
	for range 40 {
		if b.tab(); strings.HasSuffix(href(), n.backup.ID) {
			break
		}
	}
	b.follow(chromedp.KeyEvent(kb.Enter))
	b.has("h1", n.backup.ID)
	for range 40 {
		if b.tab(); evaluate[string](b, `document.activeElement.name || ""`) == "why" {
			break
		}
	}
	b.do(chromedp.KeyEvent("the night is over"))
	b.follow(chromedp.KeyEvent(kb.Enter))
	b.has("main", "done")
	b.has("main", "revoked")
	n.one.delivered()
	b.open("/grant?id=" + n.backup.ID)
	b.has("main", "REVOKED")
	b.has("main", "the night is over")
	b.has("#proof", "Proof verified")
	b.open("/")
	if live := must(chromedp.Run(b.ctx, chromedp.Text(chromedp.CSS("main"))))(t); strings.Contains(live, n.backup.ID) {
		t.Errorf("it is live still: %s", live)
	}
}

// tab goes one stop on, and holds that one sees where one is.
func (b *browser) tab() string {
	b.t.Helper()
	b.do(chromedp.KeyEvent(kb.Tab))
	at := evaluate[struct {
		What, Outline string
		Width         float64
	}](b, `(e => { const s = getComputedStyle(e), r = e.getBoundingClientRect();
		return {What: e.tagName + (e.className ? "." + e.className : ""), Outline: s.outlineStyle, Width: r.width} })(document.activeElement)`)
	if at.Outline == "none" || at.Width == 0 {
		b.t.Errorf("nobody sees that %s has the focus: %+v", at.What, at)
	}
	return at.What
}

// TestConsoleWithoutScripts: nothing that one does in the console needs one.
func TestConsoleWithoutScripts(t *testing.T) {
	t.Parallel()
	n := newNight(t)
	b := newBrowser(t, n.serve().URL)
	must(chromedp.Call(b.ctx, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true}))(t)
	b.open("/?refresh=off")
	b.has("main", "min")
	b.follow(chromedp.Click(chromedp.CSS(`nav a[href="/reviews"]`)))
	b.follow(chromedp.Click(chromedp.CSS("tbody a.id")))
	b.has("h1", n.broke.ID)
	b.allow("status of 400") // the file is no statement
	b.do(chromedp.SendKeys(chromedp.CSS("textarea"), "{}"))
	b.follow(chromedp.Click(chromedp.CSS("form[action='/statement'] button")))
	b.has("h1", "That is no statement")
	b.allow("status of 409") // the node is away
	b.open("/grant?id=" + n.broke.ID)
	signed := n.broke.statement(t, grant.StepReviewed, "dave", "looked at it", time.Now())
	file := filepath.Join(t.TempDir(), "review")
	if err := os.WriteFile(file, signed, 0o600); err != nil {
		t.Fatal(err)
	}
	b.do(chromedp.SetUploadFiles(chromedp.CSS("input[type=file]"), []string{file}))
	b.follow(chromedp.Click(chromedp.CSS("form[action='/statement'] button")))
	b.has("main", "refused")
	b.has("main", "not connected")
}

// TestHostileRecords: whatever a record says is text.
func TestHostileRecords(t *testing.T) {
	t.Parallel()
	w, now := newWorld(t), time.Now()
	one := w.node("node-1")
	const script = `<script>window.owned=1</script>"'><img src=//evil.example/x onerror=window.owned=1><style>*{display:none}</style>`
	evil := script + "\u202e\x1b[2J\x00\u2028\r" + strings.Repeat("W", 10<<10)
	short := script + "\u202e\x1b[2J"
	asked := newGrant(t, now, func(p *grant.Payload) { p.Reason, p.Ticket = script, script })
	a := asked.activated(now.Add(-time.Minute), now.Add(time.Hour))
	a.Requester, a.Actor, a.Service, a.Why, a.Clients, a.Signals, a.Signers, a.Kind = evil, evil, evil, evil, []string{evil, evil}, []string{evil}, []string{evil}, "breakGlass"
	one.event(a)
	one.event(&api.GrantEvent{Grant: short, Step: "ACTIVATED", Time: a.Time, Deadline: a.Deadline, Service: evil, Envelope: []byte(evil)})
	one.event(&api.GrantEvent{Grant: asked.ID, Step: evil, Time: a.Time, Envelope: []byte("{}")})
	for _, g := range []string{asked.ID, short, evil} {
		one.entry(&api.Entry{Record: &api.Entry_Flow{Flow: &api.FlowRecord{Event: evil, Time: timestamppb.New(now), FlowId: evil, Verdict: evil, Reason: evil, Protocol: evil, Client: evil,
			Server: evil, Service: evil, Device: evil, Identity: evil, Grant: g, Detail: evil, BytesToServer: 1 << 63, Count: 1 << 63}}})
	}
	one.entry(&api.Entry{Record: &api.Entry_Flow{Flow: &api.FlowRecord{Event: "WATCHED", Time: timestamppb.New(now), Service: evil, Verdict: evil}}})
	one.entry(&api.Entry{Record: &api.Entry_Loss{Loss: &api.LossRecord{Stage: evil, Cause: evil, Count: 1, Ranges: []*api.CPURange{{Cpu: -1, First: 1, Last: 2}}}}})
	one.entry(tide(now, &api.PathTide{Grant: asked.ID, Service: evil, Client: evil, Cause: evil, Kernel: &api.Volume{Flows: 1}}))
	one.delivered()
	s := w.serve()
	b := newBrowser(t, s.URL)
	for _, path := range []string{"/", "/flows", "/flows?service=" + url.QueryEscape(short), "/flows?last=all&node=" + url.QueryEscape(short), "/reviews", "/nodes", "/losses", "/losses?node=" + url.QueryEscape(short),
		"/grant?id=" + asked.ID, "/grant?id=" + url.QueryEscape(short)} {
		b.do(chromedp.EmulateViewport(390, 844))
		b.open(path)
		if owned := evaluate[string](b, `String(window.owned) + document.querySelectorAll("script").length + document.querySelectorAll("img,style,[onerror],[style]").length`); owned != "undefined10" {
			t.Errorf("%s has more than ours: %s", path, owned)
		}
		if wide := evaluate[int64](b, `document.documentElement.scrollWidth`); wide > 390 {
			t.Errorf("%s is %d wide", path, wide)
		}
		if body := get(t, s.URL+path); strings.IndexFunc(body, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) >= 0 || !utf8.ValidString(body) {
			t.Errorf("%s has characters that cannot be seen", path)
		}
	}
	b.open("/")
	b.has("main", `<script>window.owned=1</script>`)
	b.has("main", `\u202e\x1b[2J`)
}

// scheme is what the reader's system prefers.
func (b *browser) scheme(s string) {
	b.t.Helper()
	must(chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: s}}}))(b.t)
}

// contrast holds every text on the page to WCAG's 4.5 to 1 against what is behind it.
func (b *browser) contrast(name string) {
	b.t.Helper()
	faint := evaluate[[]string](b, `(() => {
		const read = (c) => c.match(/[\d.]+/g).map(Number);
		const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
		const behind = (e) => { for (; e; e = e.parentElement) { const c = read(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
		const faint = [];
		for (const e of document.querySelectorAll("body *")) {
			if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
			const [a, b] = [light(read(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
			const ratio = (a + 0.05) / (b + 0.05);
			if (ratio < 4.5) faint.push(e.tagName + "." + e.className + " " + ratio.toFixed(2));
		}
		return faint;
	})()`)
	if len(faint) > 0 {
		b.t.Errorf("%s is hard to read: %q", name, faint)
	}
}
