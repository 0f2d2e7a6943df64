package agent

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// newTestCanaries are of a service at one port of loopback.
func newTestCanaries(at netip.AddrPort, steered func(client, server netip.AddrPort) (bool, error)) *canaries {
	service := datapath.Service{Name: "postgres", Target: datapath.TargetHost, Mode: datapath.Enforce, Ports: []uint16{at.Port()}}
	current := &enforced{services: []datapath.Service{service}}
	return &canaries{enforced: func() *enforced { return current }, steered: steered, problems: newProblems(slog.New(slog.DiscardHandler)), clock: bootClock(),
		paths: func() ([]datapath.PathStatus, error) { return nil, nil }, alarm: func(alarmName, string) {},
		seen: map[canaryTarget]canaryResult{}, flows: map[canaryFlow]time.Duration{}}
}

// TestCanaryJudges: that a connection comes about says nothing. It has to be steered and then reset without a byte; and where it was
// not steered, the service hears no byte of the canary.
func TestCanaryJudges(t *testing.T) {
	reset := func(c net.Conn) {
		_, _ = io.ReadFull(c, make([]byte, 1))
		_ = c.(*net.TCPConn).SetLinger(0)
	}
	greet := func(c net.Conn) { _, _ = c.Write([]byte("SSH-2.0-x\r\n")) }
	silent := func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }
	for _, c := range []struct {
		name    string
		steered bool
		serve   func(net.Conn) // nil: nobody listens
		want    string
	}{
		{"steered and reset", true, reset, canaryClosed},
		{"steered and answered", true, greet, canaryOpen},
		{"steered and neither", true, silent, canaryUnknown},
		{"steered, nobody there", true, nil, canaryClosed},
		{"not steered, accepted", false, greet, canaryOpen},
		{"not steered, nobody there", false, nil, canaryOpen},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			must(t, err)
			defer ln.Close()
			if c.serve == nil {
				must(t, ln.Close())
			} else {
				go serveOne(ln, c.serve)
			}
			at := netip.MustParseAddrPort(ln.Addr().String())
			all := newTestCanaries(at, func(client, server netip.AddrPort) (bool, error) { return c.steered, nil })
			if r := all.try(t.Context(), canaryTarget{"postgres", at}, nil); r.state != c.want {
				t.Errorf("%s (%s), want %s", r.state, r.why, c.want)
			}
		})
	}
	t.Run("not steered, hears nothing", func(t *testing.T) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		defer ln.Close()
		heard := make(chan int, 1)
		go serveOne(ln, func(c net.Conn) {
			all, _ := io.ReadAll(c)
			heard <- len(all)
		})
		at := netip.MustParseAddrPort(ln.Addr().String())
		newTestCanaries(at, func(client, server netip.AddrPort) (bool, error) { return false, nil }).try(t.Context(), canaryTarget{"postgres", at}, nil)
		if n := <-heard; n != 0 {
			t.Errorf("the service heard %d bytes", n)
		}
	})
}

func serveOne(ln net.Listener, serve func(net.Conn)) {
	c, err := ln.Accept()
	if err != nil {
		return
	}
	defer c.Close()
	serve(c)
}

// TestCanaryAsksTheKernel: without a hook at loopback the canary sees the port open, and with it closed, whoever listens there.
func TestCanaryAsksTheKernel(t *testing.T) {
	b := newTestbed(t, 4)
	l := b.begin()
	defer l.datapath.Close()
	defer l.store.Close()
	service, err := b.lab.Node.Serve(netip.MustParseAddrPort("127.0.0.1:5432"), func(c net.Conn) {})
	must(t, err)
	all := newTestCanaries(service.Addr, l.datapath.Steered)
	try := func() (r canaryResult) {
		must(t, b.lab.Node.Do(func() error {
			r = all.try(t.Context(), canaryTarget{"postgres", service.Addr}, nil)
			return nil
		}))
		return r
	}
	if r := try(); r.state != canaryOpen {
		t.Errorf("without a hook: %+v", r)
	}
	lo, err := b.lab.Node.Ifindex("lo")
	must(t, err)
	must(t, b.lab.Node.Do(func() error {
		return errors.Join(l.datapath.AttachPx(), l.datapath.Attach(lo, datapath.RoleLo))
	}))
	before := len(service.Peers())
	if r := try(); r.state != canaryClosed || !strings.Contains(r.why, "no proxy answered") {
		t.Errorf("with a hook: %+v", r)
	}
	if n := len(service.Peers()) - before; n != 0 {
		t.Errorf("the service saw %d connections", n)
	}
}

// TestCanaryTakesNobodysPath: where a grant serves the address that it would come from, it is not sent, and nothing is proven.
func TestCanaryTakesNobodysPath(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	all := newTestCanaries(netip.MustParseAddrPort(ln.Addr().String()), func(client, server netip.AddrPort) (bool, error) { return false, nil })
	path := datapath.PathStatus{State: datapath.PathActive, Path: datapath.Path{Client: netip.MustParseAddr("127.83.80.1"), Service: "postgres"}}
	all.paths = func() ([]datapath.PathStatus, error) { return []datapath.PathStatus{path}, nil }
	accepted := make(chan bool, 1)
	go func() {
		_, err := ln.Accept()
		accepted <- err == nil
	}()
	must(t, all.round(t.Context()))
	must(t, ln.Close())
	if <-accepted {
		t.Error("the canary came")
	}
	if c := all.coverage()["postgres"]; c.state != canaryUnknown || !strings.Contains(c.why, errServed.Error()) {
		t.Errorf("have %+v", c)
	}
	for _, some := range []datapath.Path{{ClientPort: 40000}, {Cgroup: 7}} { // it is no canary's socket that these serve
		some.Client, some.Service = path.Client, path.Service
		all.paths = func() ([]datapath.PathStatus, error) {
			return []datapath.PathStatus{{State: datapath.PathActive, Path: some}}, nil
		}
		if open, err := all.served(); err != nil || len(open) != 0 {
			t.Errorf("%+v is taken for a path of every socket: %v, %v", some, open, err)
		}
	}
	all.paths = func() ([]datapath.PathStatus, error) { return []datapath.PathStatus{path}, nil }
	path.State = datapath.PathExpired
	must(t, all.round(t.Context()))
	if c := all.coverage()["postgres"]; c.state != canaryOpen { // nobody steers here, and nobody listens any more
		t.Errorf("after the path: %+v", c)
	}
}

// TestCanaryTells: an open port is an alarm, a problem, and what keeps the node from being ready, until a later round sees it closed; the
// latest proof keeps its age.
func TestCanaryTells(t *testing.T) {
	at := netip.MustParseAddrPort("127.0.0.1:5432")
	all := newTestCanaries(at, nil)
	var alarms []alarmName
	all.alarm = func(name alarmName, _ string) { alarms = append(alarms, name) }
	target := canaryTarget{"postgres", at}
	if c := all.coverage()["postgres"]; c.state != canaryUnknown || c.closed != 0 {
		t.Errorf("before the first round: %+v", c)
	}
	all.tell(map[canaryTarget]canaryResult{target: {state: canaryClosed}})
	proven := all.coverage()["postgres"].closed
	if len(alarms) != 0 || all.open() != nil || proven == 0 {
		t.Errorf("closed: alarms %v, open %v, proven at %v", alarms, all.open(), proven)
	}
	all.tell(map[canaryTarget]canaryResult{target: {state: canaryOpen, why: "no hook"}})
	c := all.coverage()["postgres"]
	if len(alarms) != 1 || alarms[0] != alarmCanary || all.open() == nil || c.state != canaryOpen || c.closed != proven {
		t.Errorf("open: alarms %v, open %v, %+v", alarms, all.open(), c)
	}
	if lines := all.problems.lines(); len(lines) != 1 || !strings.Contains(lines[0], "no hook") {
		t.Errorf("problems %q", lines)
	}
	all.tell(map[canaryTarget]canaryResult{target: {state: canaryClosed}})
	if lines := all.problems.lines(); len(lines) != 0 || all.open() != nil {
		t.Errorf("closed again: problems %q, open %v", lines, all.open())
	}
}

// TestCanaryLooksAgain: a port that was open for a moment is no alarm, for who may have opened it; one that is enforced no more is not told
// of; and readiness is asked about when the first port opens and when the last one is closed, and not otherwise.
func TestCanaryLooksAgain(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, ln.Close())
	at := netip.MustParseAddrPort(ln.Addr().String())
	asked, steeredFrom := 0, 0 // steered from this question on
	all := newTestCanaries(at, nil)
	all.steered = func(client, server netip.AddrPort) (bool, error) { asked++; return asked >= steeredFrom, nil }
	told := 0
	all.changed = func() { told++ }
	round := func(from int, state string, changes int) {
		t.Helper()
		asked, steeredFrom, told = 0, from, 0
		must(t, all.round(t.Context()))
		if c := all.coverage()["postgres"]; c.state != state || told != changes {
			t.Errorf("%+v, want it %s; readiness was asked about %d times, want %d", c, state, told, changes)
		}
	}
	round(2, canaryClosed, 0)
	round(3, canaryOpen, 1)
	round(3, canaryOpen, 0)
	round(1, canaryClosed, 1)
	all.steered = func(client, server netip.AddrPort) (bool, error) {
		all.enforced = func() *enforced { return &enforced{} }
		return false, nil
	}
	must(t, all.round(t.Context()))
	for target, r := range all.latest() {
		t.Errorf("%v is told of as %s, and enforced no more", target, r.state)
	}
}

// TestCoverageIsTheWorst: a service is as closed as its worst port, and as long ago proven as the one whose proof is the oldest.
func TestCoverageIsTheWorst(t *testing.T) {
	first, second := netip.MustParseAddrPort("127.0.0.1:5432"), netip.MustParseAddrPort("127.0.0.1:5433")
	all := newTestCanaries(first, nil)
	clock, now := all.clock, 10*time.Second
	all.clock.boot = func() time.Duration { return now }
	tell := func(a, b string) {
		all.tell(map[canaryTarget]canaryResult{{"postgres", first}: {state: a, why: a}, {"postgres", second}: {state: b, why: b}})
	}
	tell(canaryClosed, canaryClosed)
	now *= 2
	for _, worse := range []string{canaryUnknown, canaryOpen} {
		for _, both := range [][2]string{{canaryClosed, worse}, {worse, canaryClosed}} {
			all.seen[canaryTarget{"postgres", first}] = canaryResult{closed: 10 * time.Second}
			all.seen[canaryTarget{"postgres", second}] = canaryResult{closed: 10 * time.Second}
			tell(both[0], both[1])
			if c := all.coverage()["postgres"]; c.state != worse || c.why != worse || c.closed != 10*time.Second {
				t.Errorf("%v: %+v", both, c)
			}
		}
	}
	set, err := policy.Parse("a.yaml", []byte(hostService))
	must(t, err)
	l := &lately{}
	l.moved(all.enforced().services, time.Unix(100, 0))
	o := &operators{canaries: all, lately: l, clock: clock, enforced: func() *enforced { return &enforced{set: set} }}
	reply, err := o.Coverage(t.Context(), nil)
	must(t, err)
	if len(reply.GetServices()) != 1 {
		t.Fatalf("%v", reply)
	}
	got := reply.GetServices()[0]
	if got.GetService() != "postgres" || got.GetMode() != "Enforce" || got.GetCanary() != canaryOpen || got.GetSince().GetSeconds() != 100 ||
		got.GetClosed().AsTime().Sub(clock.wallAt(10*time.Second)).Abs() > time.Second || got.GetProxied() != nil {
		t.Errorf("%v", got)
	}
}

const hostService = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, ports: [5432, 5433]}
`

// TestCanaryMarksItsOwn: a denial counts as the canary's only if its tuple is, it is alone in its record, and not long after.
func TestCanaryMarksItsOwn(t *testing.T) {
	from, to := netip.MustParseAddrPort("127.83.80.1:40000"), netip.MustParseAddrPort("127.0.0.1:5432")
	all := newTestCanaries(to, nil)
	now := time.Duration(0)
	all.clock.boot = func() time.Duration { return now }
	all.expect(from, to)
	own := flow.Record{Client: from, Server: to, Reason: flow.ReasonNoTLS, Count: 1, Detail: "first byte"}
	joined, other, elsewhere := own, own, own
	joined.Count = 2
	other.Client = netip.MustParseAddrPort("127.83.80.1:40001")
	elsewhere.Reason = flow.ReasonHandshakeFailed
	for _, rec := range []flow.Record{joined, other, elsewhere} {
		if _, ours := all.mark(rec); ours {
			t.Errorf("%+v is taken for a canary's", rec)
		}
	}
	if rec, ours := all.mark(own); !ours || rec.Detail != "canary: first byte" {
		t.Errorf("own record: %v %+v", ours, rec)
	}
	now = 2 * canaryLinger
	if _, ours := all.mark(own); ours {
		t.Error("a record that comes much later is taken for a canary's")
	}
}

func TestCanaryTargets(t *testing.T) {
	pod := datapath.Service{Name: "pod", Target: datapath.TargetPod, Ifindex: 3, Addresses: []netip.Addr{clientA, clientB}, Ports: []uint16{80}}
	got := canaryTargets([]datapath.Service{
		{Name: "host", Target: datapath.TargetHost, Ports: []uint16{1, 2}}, pod,
		{Name: "far", Target: datapath.TargetRemote, Addresses: []netip.Addr{clientA}, Ports: []uint16{3}},
		{Name: "datagrams", Target: datapath.TargetHost, Protocol: datapath.UDP, Ports: []uint16{4}},
	})
	var texts []string
	for _, target := range got {
		texts = append(texts, target.service+" "+target.at.String())
	}
	if have, want := strings.Join(texts, ", "), "host 127.0.0.1:1, host 127.0.0.1:2, pod "+clientA.String()+":80, pod ["+clientB.String()+"]:80"; have != want {
		t.Errorf("have %s, want %s", have, want)
	}
}

// TestLately: a mode holds since it changed, what was last made of clients is kept apart, and only services in force are.
func TestLately(t *testing.T) {
	l := &lately{}
	service := datapath.Service{Name: "pg", Mode: datapath.Observe}
	first, second, third := time.Unix(100, 0), time.Unix(200, 0), time.Unix(300, 0)
	l.moved([]datapath.Service{service}, first)
	for _, rec := range []flow.Record{
		{Service: "pg", Verdict: flow.VerdictDenied, Time: third},
		{Service: "pg", Verdict: flow.VerdictDenied, Time: second},
		{Service: "pg", Verdict: flow.VerdictProxied, Time: second},
		{Service: "pg", Verdict: flow.VerdictBypassed, Time: first},
		{Service: "pg", Verdict: flow.VerdictProxied, Time: third, Event: flow.EventWatched},
		{Service: "nobody's", Verdict: flow.VerdictProxied, Time: third},
	} {
		l.note(rec)
	}
	if got, want := l.get("pg"), (lastSeen{mode: datapath.Observe, since: first, proxied: second, bypassed: first, denied: third}); got != want {
		t.Errorf("have %+v, want %+v", got, want)
	}
	if len(l.all) != 1 {
		t.Errorf("what the proxy names is kept, whether it is in force or not: %v", l.all)
	}
	l.moved([]datapath.Service{service}, second)
	if got := l.get("pg").since; got != first {
		t.Errorf("the same mode holds since %v, want %v", got, first)
	}
	service.Mode = datapath.Enforce
	l.moved([]datapath.Service{service}, second)
	if got := l.get("pg"); got.since != second || got.denied != third {
		t.Errorf("enforced: %+v", got)
	}
	if l.moved(nil, third); len(l.all) != 0 {
		t.Errorf("kept: %v", l.all)
	}
}

// BenchmarkCanary is what one canary costs beside the proxy's refusal: socket, connection, question to the kernel, byte, reset.
func BenchmarkCanary(b *testing.B) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.ReadFull(c, make([]byte, 1))
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	}()
	at := netip.MustParseAddrPort(ln.Addr().String())
	all := newTestCanaries(at, func(client, server netip.AddrPort) (bool, error) { return true, nil })
	for b.Loop() {
		if r := all.try(b.Context(), canaryTarget{"postgres", at}, nil); r.state != canaryClosed {
			b.Fatal(r)
		}
	}
}
