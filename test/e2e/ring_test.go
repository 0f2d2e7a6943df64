package e2e_test

import (
	"context"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// fillers connect at once, so that the ring is full before the lease of a stopped agent ends.
const fillers = 16

// TestStoppedReader: an agent that is stopped reads no ring. Connections go on under a live path for as long as there is room for their
// records, and then reach the proxy: nothing bypasses without its record. When the agent goes on, each of them is at the collector once,
// and the next connection bypasses again.
func TestStoppedReader(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{lease: "60s"})
	way := w.ways("host-echo", lab.IPv4)[0]
	w.open(t, wanted{way.service, way.from, "9m"})
	before := w.counters(t)

	must(t, w.agent.proc.Signal(syscall.SIGSTOP))
	bypassed := w.fillRing(t, way)
	if o := way.identified(within(t, patience), w, web); o.who != proxied {
		t.Errorf("ring full, with an identity: answered by %s", o)
	}
	if reasons := w.counters(t); reasons["RING_FULL"] == before["RING_FULL"] || reasons["LEASE_LAPSED"] != before["LEASE_LAPSED"] {
		t.Errorf("reasons of first packets: %v, want RING_FULL", reasons.since(before))
	}

	must(t, w.agent.proc.Signal(syscall.SIGCONT))
	waitUntil(t, "the bypass to resume", func() bool {
		o := way.plain(within(t, patience))
		if o.who == direct {
			bypassed = append(bypassed, o.own)
		}
		return o.who == direct
	})
	w.settled(t)
	w.hasOpens(t, bypassed)
}

// fillRing connects until a connection reaches the proxy, and gives those that bypassed it.
func (w *world) fillRing(t *testing.T, way way) (bypassed []netip.AddrPort) {
	t.Helper()
	var mu sync.Mutex
	began := time.Now()
	all, ctx := errgroup.WithContext(within(t, bound(50*time.Second)))
	full, stop := context.WithCancel(ctx)
	for range fillers {
		all.Go(func() error {
			for full.Err() == nil {
				o := way.plain(ctx)
				switch o.who {
				case direct:
					mu.Lock()
					bypassed = append(bypassed, o.own)
					mu.Unlock()
				case cut:
					stop()
				default:
					t.Errorf("while the ring fills: answered by %s", o)
					stop()
				}
			}
			return ctx.Err()
		})
	}
	if err := all.Wait(); err != nil {
		t.Fatalf("the ring is not full after %d connections in %v: %v", len(bypassed), time.Since(began), err)
	}
	stop()
	t.Logf("%d connections until the ring was full, %.0f per second", len(bypassed), float64(len(bypassed))/time.Since(began).Seconds())
	return bypassed
}

// hasOpens: each client has one opening under a path at the collector. A port may come again.
func (w *world) hasOpens(t *testing.T, clients []netip.AddrPort) {
	t.Helper()
	want, have := map[string]int{}, map[string]int{}
	for _, c := range clients {
		want[c.String()]++
	}
	for _, s := range w.flows(t, &api.FlowQuery{Verdict: "BYPASSED", Event: "OPEN"}) {
		have[s.Flow.Client]++
	}
	missing := 0
	for c, n := range want {
		if have[c] != n {
			missing++
		}
	}
	if missing > 0 || len(want) == 0 {
		t.Errorf("of %d clients that bypassed the proxy, %d do not have their opening on record as often as they connected", len(want), missing)
	}
	for class, n := range w.lostRecords(t) {
		t.Errorf("%d records are counted as lost by %s", n, class)
	}
}
