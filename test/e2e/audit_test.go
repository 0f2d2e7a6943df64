package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestRecords: every flow of each kind is at the collector with who, by what, why and how much; what the records of
// bypassed flows add up to is what the kernel counted for their path, to the byte.
func TestRecords(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{})
	for _, service := range services() {
		for _, f := range lab.Families() {
			t.Run(fmt.Sprintf("%s/%s", service, f), func(t *testing.T) { w.recordsOf(t, w.ways(service, f)[0]) })
		}
	}
}

// sizes are what connection number i carries each way: more than one packet, and not all the same.
func sizes(i int) (up, down int) { return 1000 * (i + 1), 30_000 * i }

const flowsEach = 5

func (w *world) recordsOf(t *testing.T, way way) {
	log := w.follow(t)
	service := w.sink(t, way)
	way.to = service.Addr
	var asked []netip.AddrPort
	for i := range flowsEach {
		asked = append(asked, w.exchange(t, way, i, true))
	}
	for i, client := range asked {
		w.checkProxied(t, log, way, i, client)
	}
	g := w.open(t, wanted{way.service, way.from, "5m"})
	asked = nil
	for i := range flowsEach {
		asked = append(asked, w.exchange(t, way, i, false))
	}
	var sum path
	for _, client := range asked {
		opened := log.find(t, "opening", of(client, "OPEN", "BYPASSED", "PATH_OPEN"))
		closed := log.find(t, "closing", of(client, "CLOSE", "BYPASSED", "CLOSED"))
		for _, r := range []record{opened, closed} {
			if r.Grant != g.ID || r.Service != way.service || r.Server != way.to.String() || r.Identity != "" || r.FlowID != opened.FlowID {
				t.Errorf("record %v", r)
			}
		}
		sum.Flows++
		sum.BytesToServer += closed.BytesToServer
		sum.BytesToClient += closed.BytesToClient
		sum.PacketsToServer += closed.PacketsToServer
		sum.PacketsToClient += closed.PacketsToClient
	}
	w.matches(t, g, sum)
	w.revoke(t, g)
}

// matches compares sums of records with the counters of the grant's path in the kernel.
func (w *world) matches(t *testing.T, g activated, sum path) {
	t.Helper()
	paths := w.paths(t)
	i := slices.IndexFunc(paths, func(p path) bool { return p.Grant == g.ID })
	if i < 0 {
		t.Fatalf("no path of %s among %+v", g.ID, paths)
	}
	p := paths[i]
	sum.Slot, sum.State, sum.Grant, sum.Client = p.Slot, p.State, p.Grant, p.Client
	if p != sum || p.BytesToClient == 0 {
		t.Errorf("kernel %+v, records add up to %+v", p, sum)
	}
}

// checkProxied: the proxy's records have the identity, and the bytes of the service's side.
func (w *world) checkProxied(t *testing.T, log *followed, way way, i int, client netip.AddrPort) {
	t.Helper()
	opened := log.find(t, "opening", of(client, "OPEN", "PROXIED", "IDENTITY"))
	closed := log.find(t, "closing", of(client, "CLOSE", "PROXIED", "CLOSED"))
	up, down := sizes(i)
	if closed.BytesToServer != uint64(up) || closed.BytesToClient != uint64(down) {
		t.Errorf("record has %d and %d bytes, want %d and %d", closed.BytesToServer, closed.BytesToClient, up, down)
	}
	for _, r := range []record{opened, closed} {
		if r.Identity != web.String() || r.Service != way.service || r.Grant != "" || r.FlowID != opened.FlowID {
			t.Errorf("record %v", r)
		}
	}
}

// sink replaces the echo of a way: it takes what comes to its end, and answers as sizes say.
func (w *world) sink(t *testing.T, way way) *lab.Service {
	t.Helper()
	s, err := w.home(way).Serve(netip.AddrPortFrom(way.to.Addr(), sinkPort), func(c net.Conn) {
		n, err := io.Copy(io.Discard, c)
		if err != nil {
			return
		}
		_, down := sizes(int(n)/1000 - 1)
		_, _ = c.Write(make([]byte, down)) // a cut is seen by the client
	})
	must(t, err)
	return s
}

// halfCloser is a connection of which one half can end.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// exchange makes connection number i and gives the client's end of it.
func (w *world) exchange(t *testing.T, way way, i int, secured bool) netip.AddrPort {
	t.Helper()
	conn, err := way.dial(within(t, patience))
	must(t, err)
	defer conn.Close()
	own := unmapped(conn.LocalAddr())
	c := conn.(halfCloser)
	if secured {
		c, err = w.secure(within(t, patience), conn, web)
		must(t, err)
	}
	up, down := sizes(i)
	_, err = c.Write(make([]byte, up))
	must(t, errors.Join(err, c.CloseWrite()))
	n, err := io.Copy(io.Discard, c)
	if err != nil || n != int64(down) {
		t.Fatalf("got %d bytes, %v; want %d", n, err, down)
	}
	return own
}

// TestCollectorKilled: the collector may die at any time; when it is back it has every record once.
func TestCollectorKilled(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{})
	ctx, stop := context.WithCancel(t.Context())
	var all traffic
	var wg sync.WaitGroup
	for _, f := range lab.Families() {
		bypassed, identified := w.ways("host-echo", f)[0], w.ways("pod-echo", f)[0]
		w.open(t, wanted{bypassed.service, bypassed.from, "5m"})
		wg.Go(func() { all.repeat(ctx, &all.bypassed, func() outcome { return bypassed.plain(t.Context()) }) })
		wg.Go(func() {
			all.repeat(ctx, &all.proxied, func() outcome { return identified.identified(t.Context(), w, web) })
		})
	}
	for range 3 {
		all.grow(t, 40)
		w.collector.kill(t)
		all.grow(t, 40) // into the agent's buffer
		w.collector.start(t)
	}
	all.grow(t, 40)
	stop()
	wg.Wait()
	for _, o := range all.wrong {
		t.Errorf("answered by %s; reasons of first packets: %v", o, w.counters(t).since(nil))
	}
	w.completeLog(t, &all)
}

// traffic are the clients' ends of connections, by how they went.
type traffic struct {
	mu                sync.Mutex
	bypassed, proxied []netip.AddrPort // guarded by mu
	wrong             []outcome        // guarded by mu
}

// repeat makes one connection after the other, until ctx ends between two.
func (a *traffic) repeat(ctx context.Context, into *[]netip.AddrPort, one func() outcome) {
	want := map[bool]answerer{true: direct, false: proxied}[into == &a.bypassed]
	for ctx.Err() == nil {
		o := one()
		a.mu.Lock()
		if o.own.IsValid() {
			*into = append(*into, o.own)
		}
		if o.who != want {
			a.wrong = append(a.wrong, o)
		}
		a.mu.Unlock()
	}
}

func (a *traffic) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.bypassed) + len(a.proxied)
}

// grow waits until there are n more connections.
func (a *traffic) grow(t *testing.T, n int) {
	t.Helper()
	want := a.count() + n
	waitUntil(t, "traffic", func() bool { return a.count() >= want })
}

// completeLog waits for the last records, and looks for gaps and doubles.
func (w *world) completeLog(t *testing.T, all *traffic) {
	t.Helper()
	wanted := 2 * (len(all.bypassed) + len(all.proxied)) // OPEN and CLOSE
	var log []stored
	waitUntil(t, fmt.Sprintf("%d records", wanted), func() bool {
		log = slices.DeleteFunc(w.log(t), func(s stored) bool { return s.Flow.Verdict == "DENIED" })
		return len(log) >= wanted
	})
	seen, made := map[string]int{}, map[string]int{}
	for _, s := range log {
		seen[s.Flow.Client+" "+s.Flow.Verdict+" "+s.Flow.Event]++
	}
	for verdict, clients := range map[string][]netip.AddrPort{"BYPASSED": all.bypassed, "PROXIED": all.proxied} {
		for _, c := range clients { // a port may come again
			made[c.String()+" "+verdict+" OPEN"]++
			made[c.String()+" "+verdict+" CLOSE"]++
		}
	}
	for key, n := range made {
		if seen[key] != n {
			t.Errorf("%d records %s, want %d", seen[key], key, n)
		}
	}
	w.noGaps(t)
	if s := w.status(t); s.LostFlow != 0 {
		t.Errorf("%d records lost", s.LostFlow)
	}
}

// noGaps: the numbers of each class begin at 1 and are all there once.
func (w *world) noGaps(t *testing.T) {
	t.Helper()
	numbers := map[string][]uint64{}
	for _, s := range w.log(t) {
		numbers[s.Class] = append(numbers[s.Class], s.Seq)
	}
	for _, e := range w.grantEvents(t) {
		numbers["CLASS_CRITICAL"] = append(numbers["CLASS_CRITICAL"], e.Seq)
	}
	if len(numbers) != 2 {
		t.Errorf("classes %v", len(numbers))
	}
	for class, all := range numbers {
		slices.Sort(all)
		for i, n := range all {
			if n != uint64(i+1) {
				t.Errorf("%s: record %d has the number %d", class, i+1, n)
				break
			}
		}
	}
}

// TestDenied: what was refused is on record with the reason, the identity that was proven, and how often.
func TestDenied(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{})
	log := w.follow(t)
	way := w.ways("host-echo", lab.IPv4)[0]
	if o := way.identified(within(t, patience), w, mallory); o.who != denied {
		t.Fatalf("answered by %s", o)
	}
	r := log.find(t, "the refused identity", func(r record) bool { return r.Reason == "NOT_AUTHORISED" })
	if r.Event != "DENY" || r.Verdict != "DENIED" || r.Identity != mallory.String() || r.Service != way.service || r.Count != 1 {
		t.Errorf("record %v", r)
	}
	const times = 10
	for range times {
		if o := way.plain(within(t, patience)); o.who != cut {
			t.Fatalf("answered by %s", o)
		}
	}
	waitUntil(t, "all denials", func() bool { return log.denials(t, way.from, way.to, "NO_TLS") >= times })
	if got := log.denials(t, way.from, way.to, "NO_TLS"); got != times {
		t.Errorf("%d denials on record, want %d", got, times)
	}
	w.proxy.kill(t)
	if o := way.plain(within(t, silence)); o.who != nobody {
		t.Fatalf("answered by %s", o)
	}
	log.find(t, "the missing proxy", func(r record) bool {
		return r.Reason == "NO_LISTENER" && r.Event == "DENY" && r.Server == way.to.String()
	})
}
