package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// Carried is what went over a path, or over flows of it, both ways. Bytes are those of IP packets, headers included.
type Carried struct {
	Flows                            uint64
	BytesToServer, BytesToClient     uint64
	PacketsToServer, PacketsToClient uint64
}

// Add adds what others carried.
func (c *Carried) Add(o Carried) {
	c.Flows += o.Flows
	c.BytesToServer, c.BytesToClient = c.BytesToServer+o.BytesToServer, c.BytesToClient+o.BytesToClient
	c.PacketsToServer, c.PacketsToClient = c.PacketsToServer+o.PacketsToServer, c.PacketsToClient+o.PacketsToClient
}

// Carried is what the kernel counted of the path.
func (s PathStatus) Carried() Carried {
	return Carried{s.Flows, s.BytesToServer, s.BytesToClient, s.PacketsToServer, s.PacketsToClient}
}

// Tally is what is known of the records of one path. It lives as long as the kernel's counters do, and longer than an agent.
type Tally struct {
	Recorded Carried // by records with their final counters
	Excused  Carried // of records that were counted as lost
	// Inherited says that the path is of a version that kept no tally: what was recorded before is unknown.
	Inherited bool
	// Suspect says that the comparison before could not explain a difference, Settled that the path has ended and was compared.
	Suspect, Settled bool
}

// tally is its form in the map.
type tally struct {
	Epoch, Flags      uint32
	Recorded, Excused Carried
}

const (
	tallyInherited = 1 << iota
	tallySuspect
	tallySettled
)

// recordedMap is the pin of the tallies. No program knows the map: it is where what an agent knows outlives it, and not the
// counters.
const recordedMap = "sp_recorded"

// tallies are kept by slot; the one behind the last slot is of the node. Safe for concurrent use; nobody waits for a device here.
type tallies struct {
	m     *ebpf.Map
	slots uint32

	mu     sync.Mutex
	grants map[uint32]string // guarded by mu; of the paths in the slots, as the kernel has it
}

// openTallies adopts the pinned ones, or makes them.
func (d *Datapath) openTallies() error {
	slots := d.objs.SpPaths.MaxEntries()
	m, err := openArray(d.cfg.Dir, recordedMap, tally{}, slots+1, 0)
	if err != nil {
		return err
	}
	d.tallies.m, d.tallies.slots, d.tallies.grants = m, slots, map[uint32]string{}
	return nil
}

// openArray opens the pinned array, or makes and pins it: an array that no program knows.
func openArray(dir, name string, value any, entries, flags uint32) (*ebpf.Map, error) {
	spec := &ebpf.MapSpec{Name: name, Type: ebpf.Array, KeySize: 4, ValueSize: uint32(binary.Size(value)), MaxEntries: entries, Flags: flags, Pinning: ebpf.PinByName}
	m, err := ebpf.NewMapWithOptions(spec, ebpf.MapOptions{PinPath: mapsDir(dir)})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return nil, fmt.Errorf("%w: %s: uninstall with the version that made it", ErrLayout, err)
	}
	if err != nil {
		return nil, fmt.Errorf("make map %s: %w", name, err)
	}
	return m, nil
}

func (t *tallies) read(at uint32) (v tally, err error) {
	if err = t.m.Lookup(at, &v); err != nil {
		err = fmt.Errorf("read tally %d: %w", at, err)
	}
	return v, err
}

// change rewrites one in one step.
func (t *tallies) change(at uint32, change func(*tally)) error {
	v, err := t.read(at)
	if err != nil {
		return err
	}
	change(&v)
	if err := t.m.Put(at, &v); err != nil {
		return fmt.Errorf("write tally %d: %w", at, err)
	}
	return nil
}

// begin is for a path that takes the slot.
func (t *tallies) begin(slot, epoch uint32, grant string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.grants[slot] = grant
	return t.change(slot, func(v *tally) { *v = tally{Epoch: epoch} })
}

// adopt is for a path that an earlier agent opened.
func (t *tallies) adopt(slot, epoch uint32, grant string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.grants[slot] = grant
	v, err := t.read(slot)
	if err != nil || v.Epoch == epoch {
		return err
	}
	return t.change(slot, func(v *tally) { *v = tally{Epoch: epoch, Flags: tallyInherited} })
}

// Told notes that a record with final counters has its number in the log: call it after that. It is not known whose the record
// is when its path has left the slot.
func (d *Datapath) Told(rec flow.Record) (known bool, err error) {
	t := &d.tallies
	t.mu.Lock()
	defer t.mu.Unlock()
	if grant, there := t.grants[rec.Slot]; there && grant == rec.Grant {
		known = true
		err = t.change(rec.Slot, func(v *tally) { v.Recorded.Add(FinalOf(rec)) })
	}
	if rec.CPU < 0 { // it came from Sweep
		err = errors.Join(err, t.change(t.slots, func(v *tally) { v.Recorded.Flows = max(v.Recorded.Flows, 1) - 1 }))
	}
	return known, err
}

// IsFinal says whether a record is the last of a bypassed flow: each has one of these, with its final counters.
func IsFinal(rec flow.Record) bool {
	return rec.Event == flow.EventClose && rec.Verdict == flow.VerdictBypassed
}

// FinalOf is what a final record tells.
func FinalOf(rec flow.Record) Carried {
	return Carried{1, rec.BytesToServer, rec.BytesToClient, rec.PacketsToServer, rec.PacketsToClient}
}

// taking notes that flows are about to be taken from the kernel. Until Told was called for each, they are nowhere else.
func (d *Datapath) taking(n int) error {
	d.tallies.mu.Lock()
	defer d.tallies.mu.Unlock()
	return d.tallies.change(d.tallies.slots, func(v *tally) { v.Recorded.Flows += uint64(n) })
}

// notTaken takes back what taking noted of a flow that was gone, or told of by the kernel.
func (d *Datapath) notTaken(n int) error {
	d.tallies.mu.Lock()
	defer d.tallies.mu.Unlock()
	return d.tallies.change(d.tallies.slots, func(v *tally) { v.Recorded.Flows -= min(uint64(n), v.Recorded.Flows) })
}

// handedOver notes that nobody has records of an earlier sweep in hand: who was not told of by now is not going to be.
func (d *Datapath) handedOver() error {
	waiting, done := d.lockTallies()
	defer done()
	if v, err := d.tallies.read(d.tallies.slots); err != nil || v.Recorded.Flows == waiting {
		return err
	}
	return d.tallies.change(d.tallies.slots, func(v *tally) { v.Recorded.Flows = waiting })
}

// lockTallies keeps flows from being taken, and gives how many were that wait for the next sweep.
func (d *Datapath) lockTallies() (waiting uint64, done func()) {
	d.mu.Lock()
	d.tallies.mu.Lock()
	return uint64(len(d.ended)), func() {
		d.tallies.mu.Unlock()
		d.mu.Unlock()
	}
}

// Untold is how many flows were taken from the kernel and never told of, but for those that wait here for the next sweep. At the start
// of an agent these went with the one before.
func (d *Datapath) Untold() (uint64, error) {
	waiting, done := d.lockTallies()
	defer done()
	v, err := d.tallies.read(d.tallies.slots)
	return v.Recorded.Flows - min(waiting, v.Recorded.Flows), err
}

// Allowed is how many final records were counted as lost, and are not excused of any path yet.
func (d *Datapath) Allowed() (uint64, error) {
	v, err := d.tallies.read(d.tallies.slots)
	return v.Excused.Flows, err
}

// Allow notes that n records are counted as lost; those that were untold are among them if it is said so.
func (d *Datapath) Allow(n uint64, untold bool) error {
	waiting, done := d.lockTallies()
	defer done()
	return d.tallies.change(d.tallies.slots, func(v *tally) {
		v.Excused.Flows += n
		if untold {
			v.Recorded.Flows = waiting
		}
	})
}

// SetAllowed is for what was excused, or cannot be any more.
func (d *Datapath) SetAllowed(n uint64) error {
	d.tallies.mu.Lock()
	defer d.tallies.mu.Unlock()
	return d.tallies.change(d.tallies.slots, func(v *tally) { v.Excused.Flows = n })
}

// Tally is that of the path that has the slot.
func (d *Datapath) Tally(slot uint32) (Tally, error) {
	v, err := d.tallies.read(slot)
	return Tally{Recorded: v.Recorded, Excused: v.Excused, Inherited: v.Flags&tallyInherited != 0, Suspect: v.Flags&tallySuspect != 0,
		Settled: v.Flags&tallySettled != 0}, err
}

// TakeTally gives the tally of a path that is about to leave its slot: from now on Told does not know whose its records are.
func (d *Datapath) TakeTally(slot uint32) (Tally, error) {
	d.tallies.mu.Lock()
	defer d.tallies.mu.Unlock()
	delete(d.tallies.grants, slot)
	return d.Tally(slot)
}

// SettleTally keeps what a comparison found of the path that has the slot, unless another one has it by now: all but what was recorded,
// to which it adds what was inherited.
func (d *Datapath) SettleTally(slot, epoch uint32, now Tally, inherited Carried) error {
	d.tallies.mu.Lock()
	defer d.tallies.mu.Unlock()
	return d.tallies.change(slot, func(v *tally) {
		if v.Epoch != epoch {
			return
		}
		v.Recorded.Add(inherited)
		v.Excused, v.Flags = now.Excused, now.flags()
	})
}

func (t Tally) flags() (f uint32) {
	for flag, set := range map[uint32]bool{tallyInherited: t.Inherited, tallySuspect: t.Suspect, tallySettled: t.Settled} {
		if set {
			f |= flag
		}
	}
	return f
}

// Use is one use of a slot: a path.
type Use struct{ Slot, Epoch uint32 }

// flowBatch is how many flows a call reads. The kernel gives whole buckets of its table.
const flowBatch = 4096

// LiveCarried adds up the flows that are in the kernel, by their paths.
func (d *Datapath) LiveCarried() (map[Use]Carried, error) {
	keys, flows := make([]bpf.FlowKey, flowBatch), make([]bpf.Flow, flowBatch)
	live := map[Use]Carried{}
	var at ebpf.MapBatchCursor
	for {
		n, err := d.objs.SpFlows.BatchLookup(&at, keys, flows, nil)
		if err != nil && !isMissing(err) {
			return nil, fmt.Errorf("read live flows: %w", err)
		}
		for i := range n {
			f := &flows[i]
			sum := live[Use{f.Slot, f.Epoch}]
			sum.Add(Carried{1, f.BytesToServer, f.BytesToClient, f.PacketsToServer, f.PacketsToClient})
			live[Use{f.Slot, f.Epoch}] = sum
		}
		if err != nil {
			return live, nil
		}
	}
}
