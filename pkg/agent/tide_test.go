package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const tideGrant = "01TIDE"

// shore is a node with hooks, on which agents that only compare come and go.
type shore struct {
	*testbed
	d     *datapath.Datapath
	store *store.Store
	sink  *sink
	tides *tides
	slot  uint32

	ended  map[uint32]bool
	seen   uint64 // entries of the store that were read
	alarms []string
	lost   uint64 // as an agent counted when it came
	told   datapath.Carried
	losses *ringLosses
	gaps   []string // that were counted, with the kernel's numbers
}

func newShore(t *testing.T, change func(*datapath.Config)) *shore {
	t.Helper()
	s := &shore{testbed: newTestbed(t, 16), ended: map[uint32]bool{}}
	if change != nil {
		change(&s.config)
	}
	s.load()
	s.start()
	must(t, s.lab.Node.Do(func() error {
		if err := s.d.AttachPx(); err != nil {
			return err
		}
		for name, role := range map[string]datapath.Role{lab.Uplink: datapath.RoleUplink, "lo": datapath.RoleLo} {
			dev, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			if err := s.d.Attach(dev.Index, role); err != nil {
				return err
			}
		}
		return nil
	}))
	_, err := s.d.SetServices([]datapath.Service{{ID: 1, Name: "postgres", Target: datapath.TargetHost, Ports: []uint16{5432}}})
	must(t, err)
	_, err = s.lab.Node.WhoAnswers(s.service())
	must(t, err)
	t.Cleanup(func() {
		must(t, s.store.Close())
		must(t, s.d.Close())
	})
	return s
}

func (s *shore) service() netip.AddrPort { return netip.AddrPortFrom(s.lab.Node.Addr(lab.IPv4), 5432) }

func (s *shore) load() {
	s.t.Helper()
	must(s.t, s.lab.Node.Do(func() (err error) { s.d, err = datapath.Open(s.config); return err }))
}

// start begins an agent's life: only what outlives it is as it was.
func (s *shore) start() {
	s.t.Helper()
	var err error
	s.store, err = store.Open(filepath.Join(s.lab.Dir, "state", "node.db"))
	must(s.t, err)
	taken, err := unkept(s.t.Context(), s.d, s.store)
	must(s.t, err)
	streamer, err := audit.New(audit.Config{Store: s.store, Node: testNode, Logger: slog.New(slog.DiscardHandler), Taken: cpuRanges(taken), Kept: s.d.Kept})
	must(s.t, err)
	s.d.SetKept(taken)
	must(s.t, s.d.Renew(time.Minute))
	s.tides = (&tides{datapath: s.d, store: s.store, clock: s.clock.clock(), recorded: func() {}, every: time.Minute, patience: tidePatience,
		alarm:   func(name alarmName, text string) { s.alarms = append(s.alarms, fmt.Sprint(name, ": ", text)) },
		lost:    func(_, _ string, n uint64) { s.lost += n },
		ended:   func() map[uint32]bool { return map[uint32]bool{s.slot: s.ended[s.slot]} },
		service: func(uint32) string { return "postgres" }}).begin()
	s.sink = &sink{audit: streamer, recent: newRecent(64), counts: newFlowCounter(), ports: newPortUse(), tides: s.tides}
	ledger, err := openLossLedger(filepath.Join(s.lab.Dir, "losses.json"), s.store.BootID())
	must(s.t, err)
	s.losses = &ringLosses{datapath: s.d, ledger: ledger, allow: s.tides.allow, lost: func(stage, cause string, n uint64, ranges ...*api.CPURange) {
		s.gaps = append(s.gaps, fmt.Sprint(stage, " ", cause, " ", n, " ", ranges))
	}}
	must(s.t, s.tides.takeOver())
}

// restart ends it as SIGKILL does, and begins another one. To load the programs takes longest: only reload does.
func (s *shore) restart() {
	s.t.Helper()
	must(s.t, s.store.Close())
	s.start()
}

func (s *shore) reload() {
	s.t.Helper()
	must(s.t, s.d.Close())
	s.load()
	s.restart()
}

func (s *shore) open() {
	s.t.Helper()
	var err error
	s.slot, err = s.d.OpenPath(datapath.Path{Grant: tideGrant, Client: s.lab.Client.Addr(lab.IPv4), ServiceID: 1, Service: "postgres",
		Ports: []uint16{5432}, Deadline: datapath.BootTime() + time.Minute})
	must(s.t, err)
	s.ended[s.slot] = false
}

func (s *shore) end() {
	s.t.Helper()
	must(s.t, s.d.EndPath(s.slot, datapath.PathRevoked))
	s.ended[s.slot] = true
}

// connect makes a bypassed connection that has carried something.
func (s *shore) connect() net.Conn {
	s.t.Helper()
	c, err := s.lab.Client.Dial(s.t.Context(), netip.AddrPort{}, s.service())
	must(s.t, err)
	if seen, err := lab.Ask(c); err != nil || seen.String() != c.LocalAddr().String() {
		s.t.Fatalf("%s answers (%v), want the service itself", seen, err)
	}
	return c
}

// sweep takes the flows that are over until so many are left, and tells of each that is not withheld.
func (s *shore) sweep(left int, withhold func(flow.Record) bool) (final []flow.Record) {
	s.t.Helper()
	s.eventually(fmt.Sprint(left, " flows are left"), func() bool {
		closed, err := s.d.Sweep()
		must(s.t, err)
		for _, rec := range closed {
			if !datapath.IsFinal(rec) {
				continue
			}
			final = append(final, rec)
			if withhold == nil || !withhold(rec) {
				s.told.Add(datapath.FinalOf(rec))
				s.sink.take(sourceKernel, rec)
			}
		}
		live, err := s.d.LiveFlows()
		must(s.t, err)
		return len(live) == left
	})
	return final
}

// minute lets one go by, and gives the tides that are written at its end.
func (s *shore) minute() []*api.Tide {
	s.t.Helper()
	s.clock.boot += time.Minute
	return s.look()
}

// look gives the tides that a look writes, as soon as a difference has stood.
func (s *shore) look() []*api.Tide {
	s.t.Helper()
	must(s.t, s.tides.Look(s.t.Context()))
	s.clock.boot += tidePatience
	s.catchUp()
	return s.now()
}

// catchUp has the rings read beyond what happened until now.
func (s *shore) catchUp() {
	s.t.Helper()
	mark, err := s.d.Mark()
	must(s.t, err)
	s.drain(func() bool { return s.d.Passed(mark) })
}

// now gives the tides that one look writes.
func (s *shore) now() (tides []*api.Tide) {
	s.t.Helper()
	must(s.t, s.tides.Look(s.t.Context()))
	for _, e := range s.entries() {
		if tide := e.GetTide(); tide != nil {
			tides = append(tides, tide)
		}
	}
	return tides
}

// expect wants one tide with one path, and holds it against what the test knows.
func (s *shore) expect(what string, tides []*api.Tide, cause string, ended bool, live uint64) *api.PathTide {
	s.t.Helper()
	if len(tides) != 1 || len(tides[0].GetPaths()) != 1 {
		s.t.Fatalf("%s: tides are %v, want one with one path", what, tides)
	}
	p := tides[0].GetPaths()[0]
	if p.GetGrant() != tideGrant || p.GetService() != "postgres" || p.GetClient() != s.lab.Client.Addr(lab.IPv4).String() ||
		p.GetCause() != cause || p.GetEnded() != ended || p.GetLive().GetFlows() != live || !proto.Equal(p.GetRecorded(), volume(s.told)) {
		s.t.Fatalf("%s: %v\nwant cause %q, ended %v, %d live flows, recorded %v", what, p, cause, ended, live, volume(s.told))
	}
	kernel, err := s.d.Path(s.slot)
	must(s.t, err)
	if !proto.Equal(p.GetKernel(), volume(kernel.Carried())) {
		s.t.Fatalf("%s: kernel is %v, want %v", what, p.GetKernel(), kernel)
	}
	return p
}

// differs wants the kernel to have counted exactly what these records say more than is recorded or live.
func (s *shore) differs(what string, p *api.PathTide, missing ...flow.Record) {
	s.t.Helper()
	var sum datapath.Carried
	for _, v := range []*api.Volume{p.GetRecorded(), p.GetLive()} {
		sum.Add(datapath.Carried{Flows: v.GetFlows(), BytesToServer: v.GetBytesToServer(), BytesToClient: v.GetBytesToClient(),
			PacketsToServer: v.GetPacketsToServer(), PacketsToClient: v.GetPacketsToClient()})
	}
	for _, rec := range missing {
		sum.Add(datapath.FinalOf(rec))
	}
	if !proto.Equal(p.GetKernel(), volume(sum)) || sum.BytesToServer == 0 || sum.BytesToClient == 0 {
		s.t.Errorf("%s: %v: kernel is not recorded, live and missing together: %v", what, p, volume(sum))
	}
}

// TestTidesAgree: kernel = recorded + live to the byte, in the midst and at the end, also over agents that are killed.
func TestTidesAgree(t *testing.T) {
	s := newShore(t, nil)
	s.open()
	first, second := s.connect(), s.connect()
	s.differs("two live", s.expect("two live", s.minute(), "", false, 2))
	must(t, first.Close())
	s.sweep(1, nil)
	s.differs("one live", s.expect("one live", s.minute(), "", false, 1))
	if tides := s.minute(); len(tides) != 1 || len(tides[0].GetPaths()) != 0 || len(tides[0].GetServices()) != 0 {
		t.Errorf("nothing moved, and tides are %v", tides)
	}
	s.reload()
	third := s.connect()
	delivered := s.behind()
	if tides := s.minute(); len(tides) != 0 {
		t.Errorf("the collector is behind, and tides are %v", tides)
	}
	delivered()
	p := s.minute()
	s.differs("after a kill", s.expect("after a kill", p, "", false, 2))
	if services := p[0].GetServices(); len(services) == 0 || services[0].GetBy() != byPath || services[0].GetKernel().GetFlows() != 3 {
		t.Errorf("services are %v, want 3 flows by path", services)
	}
	must(t, second.Close())
	s.sweep(1, nil)
	s.restart()
	s.end()
	s.sweep(0, nil)
	s.differs("at the end", s.expect("at the end", s.look(), "", true, 0))
	for range 2 {
		if again := append(s.look(), s.minute()...); len(again) > 1 || len(again) == 1 && len(again[0].GetPaths()) > 0 {
			t.Errorf("told again: %v", again)
		}
		s.restart()
	}
	if len(s.alarms) > 0 || s.lost > 0 {
		t.Errorf("alarms %v, %d lost, want none", s.alarms, s.lost)
	}
	_ = third.Close()
}

// TestWithheldRecordIsAnAlarm: with exactly its bytes, at the second tide, once; and at the end of the path at once. A kill
// does not make a loss of it.
func TestWithheldRecordIsAnAlarm(t *testing.T) {
	s := newShore(t, nil)
	s.open()
	kept, withheld := s.connect(), s.connect()
	name := withheld.LocalAddr().String()
	must(t, withheld.Close())
	gone := s.sweep(1, func(rec flow.Record) bool { return rec.Client.String() == name })
	if len(gone) != 1 {
		t.Fatalf("%d final records, want 1", len(gone))
	}
	s.differs("first", s.expect("first", s.minute(), audit.TideUnexplained, false, 1), gone...)
	if len(s.alarms) != 0 {
		t.Fatalf("alarms at the first tide: %v", s.alarms)
	}
	s.sweep(1, nil)
	s.restart() // it was swept since: whoever has not told of it will not
	s.differs("second", s.expect("second", s.minute(), audit.TideUnexplained, false, 1), gone...)
	want := fmt.Sprintf("%s: path of %s to postgres in slot %d, grant %s: the kernel counted %+d flows, %+d bytes and %+d packets to the server, %+d bytes and %+d packets to the client more than",
		alarmUnreconciled, s.lab.Client.Addr(lab.IPv4), s.slot, tideGrant, 1, gone[0].BytesToServer, gone[0].PacketsToServer, gone[0].BytesToClient, gone[0].PacketsToClient)
	s.minute()
	if len(s.alarms) != 1 || !strings.HasPrefix(s.alarms[0], want) {
		t.Fatalf("alarms are %q, want one with %q", s.alarms, want)
	}
	if now := s.tides.unreconciled(); now[audit.TideUnexplained] != gone[0].BytesToServer+gone[0].BytesToClient || now[audit.TideCountedLoss] != 0 {
		t.Errorf("metric shows %v", now)
	}
	must(t, kept.Close())
	s.end()
	s.sweep(0, nil)
	s.alarms = nil
	s.restart() // that has not alarmed yet
	s.differs("end", s.expect("end", s.look(), audit.TideUnexplained, true, 0), gone...)
	if len(s.alarms) != 1 || !strings.HasPrefix(s.alarms[0], want) {
		t.Fatalf("alarms at the end are %q, want one with %q", s.alarms, want)
	}
}

// TestKilledSweepIsACountedLoss: what was taken from the kernel, and went with an agent that was killed, is counted to the unit, and no
// alarm; what is withheld after that is one.
func TestKilledSweepIsACountedLoss(t *testing.T) {
	s := newShore(t, nil)
	s.open()
	first, second, third := s.connect(), s.connect(), s.connect()
	must(t, first.Close())
	s.sweep(2, nil)
	must(t, second.Close())
	gone := s.sweep(1, func(flow.Record) bool { return true }) // killed with the record in hand
	for range 2 {
		s.restart()
		if s.lost != 1 {
			t.Fatalf("%d records are counted as lost, want 1", s.lost)
		}
	}
	for range 3 {
		s.differs("after the kill", s.expect("after the kill", s.minute(), audit.TideCountedLoss, false, 1), gone...)
		if _, err := lab.Ask(third); err != nil { // something moves
			t.Fatal(err)
		}
		s.restart()
	}
	if len(s.alarms) != 0 || s.lost != 1 {
		t.Errorf("alarms %v, %d lost: want none, and 1", s.alarms, s.lost)
	}
	must(t, third.Close())
	s.end()
	withheld := s.sweep(0, func(flow.Record) bool { return true })
	s.differs("withheld", s.expect("withheld", s.look(), audit.TideUnexplained, true, 0), append(gone, withheld...)...)
	if len(s.alarms) != 1 || !strings.Contains(s.alarms[0], fmt.Sprintf("%+d bytes", withheld[0].BytesToServer)) {
		t.Errorf("alarms are %v, want one with the bytes of %v", s.alarms, withheld)
	}
}

// TestEndedBeforeTakeOver: flows that the agent itself has ended since it came, of services that are not enforced any more, did not go with
// the one before.
func TestEndedBeforeTakeOver(t *testing.T) {
	s := newShore(t, nil)
	s.open()
	c := s.connect()
	_, err := s.d.SetServices([]datapath.Service{{ID: 1, Name: "postgres", Target: datapath.TargetHost, Ports: []uint16{5432}, Mode: datapath.Observe}})
	must(t, err)
	s.restart()
	if allowed, err := s.d.Allowed(); s.lost != 0 || allowed != 0 || err != nil {
		t.Errorf("%d records are counted as lost, %d excuse something (%v)", s.lost, allowed, err)
	}
	if gone := s.sweep(0, nil); len(gone) != 1 || gone[0].Reason != flow.ReasonPolicyChanged {
		t.Errorf("final records are %v", gone)
	}
	s.end()
	s.expect("at the end", s.look(), "", true, 0)
	s.restart()
	if s.lost != 0 {
		t.Errorf("%d records are counted as lost after that", s.lost)
	}
	must(t, c.Close())
}

// TestDoubts: a difference has to stand by itself, and until the rings were read beyond it, whatever else differs meanwhile; and a path
// that has left its slot is compared although the next one has left it, too.
func TestDoubts(t *testing.T) {
	s := newShore(t, nil)
	other, err := s.d.OpenPath(datapath.Path{Grant: "01OTHER", Client: netip.MustParseAddr("192.0.2.7"), ServiceID: 1, Service: "postgres",
		Ports: []uint16{5432}, Deadline: datapath.BootTime() + time.Hour})
	must(t, err)
	s.tides.note(flow.Record{Event: flow.EventClose, Verdict: flow.VerdictBypassed, Slot: other, Grant: "01OTHER", BytesToServer: 7})
	s.open()
	c := s.connect()
	s.clock.boot += time.Minute
	if tides := s.now(); len(tides) != 0 { // the other path differs from now on
		t.Errorf("tides are %v, want none yet", tides)
	}
	s.clock.boot += tidePatience - time.Second
	must(t, c.Close())
	s.end()
	gone := s.sweep(0, func(flow.Record) bool { return true }) // these take a moment
	if tides := s.now(); len(tides) != 0 {
		t.Errorf("tides are %v, want none yet", tides)
	}
	s.clock.boot += time.Second
	if tides := s.now(); len(s.alarms) != 0 || len(tides) != 1 || len(tides[0].Paths) != 0 {
		t.Errorf("tides are %v and alarms %q, want one tide of no path: the rings were not read since", tides, s.alarms)
	}
	s.catchUp()
	if tides := s.now(); len(s.alarms) != 0 || len(tides) != 0 {
		t.Errorf("tides are %v and alarms %q, want none: the path's own difference is a second old", tides, s.alarms)
	}
	for _, rec := range gone {
		s.told.Add(datapath.FinalOf(rec))
		s.sink.take(sourceKernel, rec)
	}
	s.expect("its records came", s.now(), "", true, 0)

	s.leave()
	s.alarms = nil
	for _, withhold := range []bool{true, false} {
		s.open()
		c := s.connect()
		must(t, c.Close())
		s.end()
		s.sweep(0, func(flow.Record) bool { return withhold })
		s.leave()
	}
	if tides, left := s.look(), len(s.tides.parted); len(s.alarms) != 1 || len(tides) != 2 || left != 0 {
		t.Errorf("tides are %v, alarms %q, and %d paths are not told of; want two paths, and an alarm of the first", tides, s.alarms, left)
	}
}

// leave has the path leave its slot to the next one.
func (s *shore) leave() {
	s.t.Helper()
	leaving, err := s.d.Path(s.slot)
	must(s.t, err)
	s.tides.part(leaving)
	must(s.t, s.d.FreePath(s.slot))
}

// TestRingOverflow: a full ring takes no final counters, for a flow stays in the kernel until it was taken. So what it lost excuses nothing.
func TestRingOverflow(t *testing.T) {
	s := newShore(t, func(c *datapath.Config) { c.RingBytes = 4096 })
	for _, c := range []struct {
		cause    string
		withhold int
	}{{"", 0}, {audit.TideUnexplained, 1}} {
		s.told = datapath.Carried{}
		s.open()
		s.overflow()
		var gone []flow.Record
		s.sweep(0, func(rec flow.Record) bool {
			if len(gone) == c.withhold {
				return false
			}
			gone = append(gone, rec)
			return true
		})
		what := fmt.Sprintf("cause %q", c.cause)
		s.differs(what, s.expect(what, s.look(), c.cause, true, 0), gone...)
		if len(s.alarms) != c.withhold {
			t.Errorf("%s: alarms %v", what, s.alarms)
		}
		s.leave()
	}
}

// overflow ends a path with so many connections that the ring does not take what is told of it, and counts the losses.
func (s *shore) overflow() {
	s.t.Helper()
	before, err := s.d.Losses()
	must(s.t, err)
	var conns []net.Conn
	for range 10 {
		conns = append(conns, s.connect())
	}
	s.end()
	for _, c := range conns {
		_, err := c.Write([]byte("x\n"))
		must(s.t, err)
		must(s.t, c.Close())
	}
	s.eventually("records of the ends are lost", func() bool {
		after, err := s.d.Losses()
		must(s.t, err)
		return after.MustDeliver > before.MustDeliver
	})
	s.gaps = nil
	s.drain(func() bool { must(s.t, s.losses.settle()); return len(s.gaps) > 0 })
}

// drain has an agent read the rings until something is so.
func (s *shore) drain(until func() bool) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	done := make(chan error, 1)
	go func() { done <- (&kernelEvents{datapath: s.d, sink: s.sink}).Run(ctx) }()
	s.eventually("the rings are read", until)
	cancel()
	must(s.t, <-done)
}

// TestKilledBetweenRingAndCommit: what an agent had read from the rings and not made durable is counted, with the numbers that the
// kernel gave it; what is durable is not.
func TestKilledBetweenRingAndCommit(t *testing.T) {
	s := newShore(t, nil)
	s.open()
	s.take(2)
	s.save()
	queued := s.take(3)
	s.restart()
	if losses := s.lossRecords(); len(losses) != 1 || losses[0].GetCause() != audit.CauseAgentRestart || losses[0].GetCount() != 3 || !slices.Equal(numbersIn(losses[0]), queued) {
		t.Fatalf("losses are %v, want one of %v", losses, queued)
	}
	inHand := s.readOnly(2)
	s.restart()
	if losses := s.lossRecords(); len(losses) != 0 {
		t.Errorf("told again: %v", losses)
	}
	s.save()
	st, err := s.store.Flow(t.Context())
	must(t, err)
	var entry api.Entry
	if len(st.Spool) != 1 || proto.Unmarshal(st.Spool[0].Data, &entry) != nil || entry.GetLoss().GetCount() != 2 || !slices.Equal(numbersIn(entry.GetLoss()), inHand) {
		t.Errorf("flow records are %v, want a loss of %v", st.Spool, inHand)
	}
	s.drain(func() bool { must(t, s.losses.settle()); return s.losses.looked })
	if len(s.gaps) != 0 {
		t.Errorf("gaps are %v, want none", s.gaps)
	}
}

// take makes connections, and has an agent take in the records of their opening. It gives their numbers.
func (s *shore) take(n int) []string {
	s.t.Helper()
	s.connections(n)
	before := len(s.opens())
	s.drain(func() bool { return len(s.opens()) == before+n })
	return slices.Sorted(slices.Values(s.opens()[before:]))
}

// opens are the numbers of openings that the agent has seen.
func (s *shore) opens() (numbers []string) {
	for _, rec := range s.sink.recent.last(0) {
		numbers = append(numbers, fmt.Sprint(rec.CPU, "/", rec.Seq))
	}
	return numbers
}

func (s *shore) connections(n int) {
	s.t.Helper()
	for range n {
		c := s.connect()
		s.t.Cleanup(func() { c.Close() })
	}
}

// readOnly has an agent read the records of so many openings, and do nothing with them.
func (s *shore) readOnly(n int) (numbers []string) {
	s.t.Helper()
	s.connections(n)
	ctx, cancel := context.WithCancel(s.t.Context())
	var mu sync.Mutex
	must(s.t, s.d.ReadEvents(ctx, func(rec flow.Record) {
		mu.Lock()
		defer mu.Unlock()
		if numbers = append(numbers, fmt.Sprint(rec.CPU, "/", rec.Seq)); len(numbers) == n {
			cancel()
		}
	}))
	slices.Sort(numbers)
	return numbers
}

// save has the streamer make durable what it has, as an orderly stop does, and begins another life.
func (s *shore) save() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	cancel()
	must(s.t, s.sink.audit.Run(ctx))
	s.restart()
}

// entries are those of the store that were not read before.
func (s *shore) entries() (entries []*api.Entry) {
	s.t.Helper()
	all, err := s.store.Entries(s.t.Context(), s.seen, 1000)
	must(s.t, err)
	for _, e := range all {
		s.seen = e.Seq
		var entry api.Entry
		must(s.t, proto.Unmarshal(e.Data, &entry))
		entries = append(entries, &entry)
	}
	return entries
}

// behind has more wait for the collector than a regular tide adds to. What it returns has the collector take it.
func (s *shore) behind() (delivered func()) {
	s.t.Helper()
	entry, err := audit.GrantEntry(&api.GrantEvent{Grant: tideGrant, Step: stepWarned})
	must(s.t, err)
	must(s.t, s.store.Keep(s.t.Context(), nil, slices.Repeat([][]byte{entry}, tideBehind+1)...))
	return func() {
		last, _, err := s.store.Seqs(s.t.Context())
		must(s.t, err)
		must(s.t, s.store.Ack(s.t.Context(), last))
	}
}

func (s *shore) lossRecords() (losses []*api.LossRecord) {
	for _, e := range s.entries() {
		if l := e.GetLoss(); l != nil {
			losses = append(losses, l)
		}
	}
	return losses
}

func numbersIn(l *api.LossRecord) (numbers []string) {
	for _, r := range l.GetRanges() {
		for n := r.GetFirst(); n <= r.GetLast(); n++ {
			numbers = append(numbers, fmt.Sprint(r.GetCpu(), "/", n))
		}
	}
	slices.Sort(numbers)
	return numbers
}
