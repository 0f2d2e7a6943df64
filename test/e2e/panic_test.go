package e2e_test

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestPanic: one command cuts every live connection around the proxy, idle ones within a second; nothing is activated
// until it is lifted, not even by the next agent.
func TestPanic(t *testing.T) {
	leak.Check(t)
	w := strictWorld(t, options{plain: true})
	var ways []way
	var conns []live
	for _, service := range services() {
		for _, f := range lab.Families() {
			way := w.ways(service, f)[0]
			w.open(t, wanted{service, way.from, "5m"})
			ways, conns = append(ways, way), append(conns, way.dialDirect(t))
		}
	}
	out := read[struct{ Ended int }](t, w, "panic", "--why", "a key leaked")
	began := time.Now()
	if out.Ended != len(ways) {
		t.Errorf("ended %d paths of %d", out.Ended, len(ways))
	}
	conns[0].wantCut(t)
	for i, l := range conns[1:] {
		must(t, l.SetReadDeadline(time.Now().Add(4*time.Second)))
		if _, err := l.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: idle connection: %v, want a reset", ways[i+1].name, err)
		}
	}
	t.Logf("%d connections, of which %d idle, were cut within %v", len(conns), len(conns)-1, time.Since(began))
	for _, way := range ways {
		if o := way.plain(within(t, patience)); o.who == direct {
			t.Errorf("new connection to %s: %s", way.service, o)
		}
	}
	file := w.issue(t, wanted{ways[0].service, ways[0].from, "5m"})
	for _, when := range []string{"at once", "after a restart"} {
		if s := w.try("grant", "activate", file, "--key", w.key, "--yes"); s.err == nil || !strings.Contains(s.stderr, "a key leaked") || !strings.Contains(s.stderr, "sallyport panic --lift") {
			t.Errorf("activation %s: %s", when, s)
		}
		if s := read[struct{ Panic string }](t, w, "status"); !strings.Contains(s.Panic, "by uid:0: a key leaked") {
			t.Errorf("status %s: %q", when, s.Panic)
		}
		w.agent.kill(t)
		w.agent.start(t)
	}
	w.cli(t, "panic", "--lift", "--why", "rotated")
	w.open(t, wanted{ways[0].service, ways[0].from, "5m"})
	ways[0].dialDirect(t)
	waitUntil(t, "the records of it", func() bool {
		var steps []string
		for _, e := range w.grantEvents(t) {
			steps = append(steps, e.Event.Step)
		}
		all := strings.Join(steps, " ")
		return strings.Contains(all, "PANIC REVOKED REVOKED REVOKED REVOKED") && strings.Contains(all, "LIFTED ACTIVATED")
	})
}
