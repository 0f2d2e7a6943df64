package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// tideEvery is how often what moves is compared and told of.
	tideEvery = time.Minute
	// tidePatience is how long a difference has to stand at least: final records may be on their way, and losses are counted a moment later.
	tidePatience = 5 * time.Second
	// tideRetry is how soon a tide is tried again that the disk did not take.
	tideRetry = 10 * time.Second
	// tideBehind is how many critical records may wait for the collector before a regular tide tells of differences alone: counters only
	// rise, so that a later one tells what this one would have, and the store's room is for what cannot be told later.
	tideBehind = 256
	// tidePaths bounds one entry: thousands of paths may end at once.
	tidePaths = 256
)

// tides compares what the kernel counted of each path with what records say of it, and puts the comparison among the
// critical records, to be sealed with them: at each path's end, and once a minute while a path is open or something moved.
//
// Each flow of a path is in exactly one place. It is in the kernel's table of flows; or its final record has a number in the
// log, and was added to the tally of its path; or that record is on its way, from a ring or from a sweep; or it went with an
// agent that was killed then, and is counted as lost. So
//
//	kernel = recorded + live + counted losses
//
// but for what is on its way. The tally outlives an agent as the kernel's counters do (datapath.Tally), and is changed after the record has
// its number: a kill in between counts a loss too many, never one too few. What a record's number became later, delivered or counted
// as lost, the sequence itself tells. A ring that is full costs no final record: the flow stays in the table until a sweep takes it.
//
// Sweeps take flows from the table, so a look is made by who sweeps.
type tides struct {
	datapath *datapath.Datapath
	store    *store.Store
	clock    clock
	alarm    func(alarmName, string)
	lost     func(stage, cause string, n uint64)
	recorded func()                 // there is something new for the sender of records
	ended    func() map[uint32]bool // slots of paths whose grants have ended
	service  func(serviceID uint32) string
	every    time.Duration
	patience time.Duration

	// Owned by the sweeper.
	next    time.Duration // CLOCK_BOOTTIME of the next regular tide
	waiting time.Duration // CLOCK_BOOTTIME since which it waits for differences that may yet be explained; 0: it does not
	doubts  map[datapath.Use]doubt
	told    map[datapath.Use]datapath.Carried
	alarmed map[datapath.Use]apart
	passed  map[passage]datapath.Carried // by services, at the last tide

	mu      sync.Mutex
	settled map[uint32]bool          // guarded by mu; slots whose path has ended and was told of
	parted  map[datapath.Use]*parted // guarded by mu
	wrong   error                    // guarded by mu; of the latest record that could not be noted
	bytes   map[string]uint64        // guarded by mu; what differs, by cause
}

// doubt is a difference that may yet be explained: by a record that is in a ring, or by a loss that is about to be counted.
type doubt struct {
	since time.Duration // CLOCK_BOOTTIME
	mark  datapath.Mark // of then: records up to it are to be read first
}

// parted is a path that has left its slot before it was compared.
type parted struct {
	path  datapath.PathStatus
	tally datapath.Tally
}

// passage is what let something through to a service.
type passage struct {
	service uint32
	by      string
}

func (t *tides) begin() *tides {
	t.next = t.clock.boot() + t.every
	t.told, t.settled = make(map[datapath.Use]datapath.Carried), make(map[uint32]bool)
	t.alarmed, t.passed = make(map[datapath.Use]apart), make(map[passage]datapath.Carried)
	t.doubts, t.parted = make(map[datapath.Use]doubt), make(map[datapath.Use]*parted)
	t.bytes = map[string]uint64{audit.TideCountedLoss: 0, audit.TideMoving: 0, audit.TideUnexplained: 0}
	return t
}

// takeOver counts what went with the agent before: flows that it had taken from the kernel, and not told of.
func (t *tides) takeOver() error {
	n, err := t.datapath.Untold()
	if n == 0 || err != nil {
		return err
	}
	t.lost(audit.StageAgentMemory, audit.CauseAgentRestart, n)
	return t.datapath.Allow(n, true)
}

// note adds a final record, which has its number by now. Safe for concurrent use.
func (t *tides) note(rec flow.Record) {
	if t == nil || !datapath.IsFinal(rec) {
		return
	}
	known, err := t.datapath.Told(rec)
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.leaver(rec); p != nil && !known {
		p.tally.Recorded.Add(datapath.FinalOf(rec))
	}
	if err != nil {
		t.wrong = err
	}
}

// leaver is the path that a record is of, if it has left its slot: the last that did, where the record does not know its grant any more.
// t.mu is held.
func (t *tides) leaver(rec flow.Record) (last *parted) {
	for use, p := range t.parted {
		if use.Slot == rec.Slot && (rec.Grant == "" || rec.Grant == p.path.Grant) && (last == nil || use.Epoch > last.path.Epoch) {
			last = p
		}
	}
	return last
}

// allow notes that records went with an agent before: the final ones of flows may be among them.
func (t *tides) allow(n uint64) {
	if t == nil {
		return
	}
	if err := t.datapath.Allow(n, false); err != nil {
		t.mu.Lock()
		t.wrong = err
		t.mu.Unlock()
	}
}

// part is for a path that is about to leave its slot to another one.
func (t *tides) part(p datapath.PathStatus) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tally, err := t.datapath.TakeTally(p.Slot)
	delete(t.settled, p.Slot)
	if err != nil {
		t.wrong = err
	} else if !tally.Settled {
		t.parted[datapath.Use{Slot: p.Slot, Epoch: p.Epoch}] = &parted{p, tally}
	}
}

// Look compares when it is time, and writes down what it found.
func (t *tides) Look(ctx context.Context) error {
	if t == nil {
		return nil
	}
	now := t.clock.boot()
	regular := now >= t.next
	if !regular && !t.due() {
		clear(t.doubts) // what differed is not looked at from one moment to the next
		return t.failed()
	}
	found, err := t.read()
	if err == nil {
		err = t.weigh(found, now)
	}
	if err == nil && regular && t.waits(found, now) {
		return t.failed()
	}
	if err == nil {
		err = t.tell(ctx, found, regular)
	}
	if err != nil {
		t.next = now + tideRetry
		return errors.Join(t.failed(), fmt.Errorf("compare the kernel's counters with the records: %w", err))
	}
	if regular {
		t.next = now + t.every
	}
	return t.failed()
}

// due tells whether a path has ended that was not told of.
func (t *tides) due() bool {
	ended := t.ended()
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(t.settled, func(slot uint32, _ bool) bool { return !ended[slot] })
	maps.DeleteFunc(ended, func(slot uint32, _ bool) bool { return t.settled[slot] })
	return len(t.parted) > 0 || len(ended) > 0
}

func (t *tides) failed() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.wrong
	t.wrong = nil
	return err
}

// weigh marks what is in doubt: each difference by itself has to stand for a while, at every look, and until the rings were read beyond it.
func (t *tides) weigh(found []*reckoning, now time.Duration) error {
	mark, err := t.datapath.Mark()
	if err != nil {
		return err
	}
	next := make(map[datapath.Use]doubt)
	for _, r := range found {
		if r.apart == (apart{}) {
			continue
		}
		d, known := t.doubts[r.use()]
		if !known {
			d = doubt{now, mark}
		}
		next[r.use()] = d
		r.doubtful = now-d.since < t.patience || !t.datapath.Passed(d.mark)
	}
	t.doubts = next
	return nil
}

// waits tells whether a regular tide is put off for what is in doubt: that is told of with it if it can be, and else by a later one.
func (t *tides) waits(found []*reckoning, now time.Duration) bool {
	if t.waiting == 0 {
		t.waiting = now
	}
	if slices.ContainsFunc(found, func(r *reckoning) bool { return r.doubtful }) && now-t.waiting < t.patience {
		return true
	}
	t.waiting = 0
	return false
}

// read looks at every path that was not told of since its end.
func (t *tides) read() ([]*reckoning, error) {
	paths, err := t.datapath.Paths()
	if err != nil {
		return nil, err
	}
	first, err := t.tallies(paths)
	if err != nil {
		return nil, err
	}
	before, err := t.datapath.LiveCarried()
	if err != nil {
		return nil, err
	}
	if paths, err = t.datapath.Paths(); err != nil {
		return nil, err
	}
	after, err := t.datapath.LiveCarried()
	if err != nil {
		return nil, err
	}
	last, err := t.tallies(paths)
	if err != nil {
		return nil, err
	}
	var found []*reckoning
	for _, p := range paths {
		use := datapath.Use{Slot: p.Slot, Epoch: p.Epoch}
		if t.settle(p.Slot, last[use].Settled) {
			continue
		}
		found = append(found, reckon(p, look{first[use], before[use]}, look{last[use], after[use]}))
	}
	return append(found, t.readParted(after)...), nil
}

// settle notes whether the path in a slot has ended and was told of.
func (t *tides) settle(slot uint32, is bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if is {
		t.settled[slot] = true
	} else {
		delete(t.settled, slot)
	}
	return is
}

func (t *tides) tallies(paths []datapath.PathStatus) (map[datapath.Use]datapath.Tally, error) {
	all := make(map[datapath.Use]datapath.Tally, len(paths))
	for _, p := range paths {
		tally, err := t.datapath.Tally(p.Slot)
		if err != nil {
			return nil, err
		}
		all[datapath.Use{Slot: p.Slot, Epoch: p.Epoch}] = tally
	}
	return all, nil
}

func (t *tides) readParted(live map[datapath.Use]datapath.Carried) (found []*reckoning) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.parted {
		l := look{p.tally, live[datapath.Use{Slot: p.path.Slot, Epoch: p.path.Epoch}]}
		r := reckon(p.path, l, l)
		r.parted = true
		found = append(found, r)
	}
	return found
}

// tell writes down what was found: paths that are over, and at a regular tide those that differ and, unless many records wait for the
// collector, all that moved.
func (t *tides) tell(ctx context.Context, found []*reckoning, regular bool) error {
	allowed, err := t.datapath.Allowed()
	if err != nil {
		return err
	}
	last, acked, err := t.store.Seqs(ctx)
	if err != nil {
		return err
	}
	all := regular && last-acked <= tideBehind
	var listed []*reckoning
	doubtful := false
	for _, r := range found {
		if r.doubtful {
			doubtful = true
			continue
		}
		if told, known := t.told[r.use()]; r.over || regular && r.apart != (apart{}) || all && (!known || told != r.path.Carried()) {
			allowed -= r.judge(allowed)
			listed = append(listed, r)
		}
	}
	var services []*api.ServiceTide
	if all {
		if services, err = t.services(); err != nil {
			return err
		}
	}
	if regular && !doubtful {
		allowed = 0 // what was lost so far is in no path
	}
	if err := t.write(ctx, listed, services, all && len(found) > 0); err != nil {
		return err
	}
	t.count(found)
	return errors.Join(t.conclude(listed), t.datapath.SetAllowed(allowed))
}

// write appends the entries; a tide that has nothing to tell of is one while paths are open.
func (t *tides) write(ctx context.Context, listed []*reckoning, services []*api.ServiceTide, open bool) error {
	wall, boot := t.clock.read()
	tide := func() *api.Tide {
		return &api.Tide{Time: timestamppb.New(wall), Boot: durationpb.New(boot), BootId: t.store.BootID()}
	}
	var all []*api.Tide
	for some := range slices.Chunk(listed, tidePaths) {
		one := tide()
		for _, r := range some {
			one.Paths = append(one.Paths, r.tide())
		}
		all = append(all, one)
	}
	if len(all) == 0 && (open || len(services) > 0) {
		all = append(all, tide())
	}
	if len(all) == 0 {
		return nil
	}
	all[0].Services = services
	return t.keep(ctx, all)
}

func (t *tides) keep(ctx context.Context, all []*api.Tide) error {
	entries := make([][]byte, len(all))
	for i, one := range all {
		var err error
		if entries[i], err = audit.TideEntry(one); err != nil {
			return err
		}
	}
	if err := t.store.Keep(ctx, nil, entries...); err != nil {
		return err
	}
	t.recorded()
	return nil
}

// conclude keeps what was told, and raises the alarm for what stands unexplained at a second tide of the same path, or at its end.
func (t *tides) conclude(listed []*reckoning) error {
	var errs []error
	for _, r := range listed {
		suspected := r.tally.Suspect
		r.tally.Suspect, r.tally.Settled = r.cause == audit.TideUnexplained, r.over
		if r.tally.Suspect && (suspected || r.over) && t.alarmed[r.use()] != r.apart {
			t.alarmed[r.use()] = r.apart
			t.alarm(alarmUnreconciled, r.String())
		}
		t.told[r.use()] = r.path.Carried()
		if r.over {
			delete(t.told, r.use())
			delete(t.alarmed, r.use())
		}
		if r.parted {
			t.concludeParted(r)
			continue
		}
		errs = append(errs, t.datapath.SettleTally(r.path.Slot, r.path.Epoch, r.tally, r.inherited))
		t.settle(r.path.Slot, r.over)
	}
	return errors.Join(errs...)
}

// concludeParted forgets a path that has left its slot and is told of, once its flows are over.
func (t *tides) concludeParted(r *reckoning) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.over {
		delete(t.parted, r.use())
	} else if p := t.parted[r.use()]; p != nil {
		p.tally.Excused, p.tally.Suspect, p.tally.Inherited = r.tally.Excused, r.tally.Suspect, r.tally.Inherited
		p.tally.Recorded.Add(r.inherited)
	}
}

// count is what the metric shows.
func (t *tides) count(found []*reckoning) {
	differ := map[string]uint64{audit.TideCountedLoss: 0, audit.TideMoving: 0, audit.TideUnexplained: 0}
	for _, r := range found {
		differ[audit.TideCountedLoss] += r.tally.Excused.BytesToServer + r.tally.Excused.BytesToClient
		if differ[audit.TideMoving] += r.moving; r.doubtful {
			differ[audit.TideMoving] += r.apart.bytes()
		} else {
			differ[audit.TideUnexplained] += r.apart.bytes()
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bytes = differ
}

// unreconciled is how many bytes differ, by cause, as of the last look.
func (t *tides) unreconciled() map[string]uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.bytes)
}

// What let traffic through to a service.
const (
	byProxy = "proxy"
	byPath  = "path"
	byNone  = "none" // the service is not enforced
)

// services are the kernel's counters of those that moved since the tide before.
func (t *tides) services() ([]*api.ServiceTide, error) {
	now, err := t.passages()
	if err != nil {
		return nil, err
	}
	var out []*api.ServiceTide
	for p, c := range now {
		if c != t.passed[p] {
			out = append(out, &api.ServiceTide{Service: t.service(p.service), By: p.by, Kernel: volume(c)})
		}
	}
	slices.SortFunc(out, func(a, b *api.ServiceTide) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.By, b.By))
	})
	t.passed = now
	return out, nil
}

// passages are what went towards services: by hooks that let it through, in payload, and where nothing holds it up, as on the wire.
func (t *tides) passages() (map[passage]datapath.Carried, error) {
	through, err := t.datapath.Traffic()
	if err != nil {
		return nil, err
	}
	watched, err := t.datapath.Watched()
	if err != nil {
		return nil, err
	}
	all := make(map[passage]datapath.Carried)
	for id, s := range through {
		all[passage{id, byProxy}] = passedBy(s.HookLeg)
		all[passage{id, byPath}] = passedBy(s.HookPath)
	}
	for id, s := range watched {
		all[passage{id, byNone}] = datapath.Carried{Flows: s.Seen.Opens, BytesToServer: s.Seen.Bytes, PacketsToServer: s.Seen.Packets}
	}
	return all, nil
}

func passedBy(v datapath.Volume) datapath.Carried {
	return datapath.Carried{Flows: v.Opens, BytesToServer: v.Bytes, PacketsToServer: v.Packets}
}
