package datapath

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// How long entries stay after their last packet. Legs are in legs.go.
const (
	closedFlowLinger = time.Second // late packets of a closed flow still count for it
	denyLinger       = 2 * time.Second
)

// walkBatch is how many entries a walk over a map asks for at a time.
const walkBatch = 512

// entries reads a whole hash map, in batches (Linux 5.6).
func entries[K, V any](m *ebpf.Map) (keys []K, values []V, err error) {
	var at ebpf.MapBatchCursor
	for room := walkBatch; ; {
		k, v := make([]K, room), make([]V, room)
		n, err := m.BatchLookup(&at, k, v, nil)
		keys, values = append(keys, k[:n]...), append(values, v[:n]...)
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist): // that was the last batch
			return keys, values, nil
		case errors.Is(err, unix.ENOSPC): // one bucket has more
			room *= 2
		case err != nil:
			return nil, nil, fmt.Errorf("walk map: %w", err)
		}
	}
}

// take takes an entry out of a hash map if it is still the one that was judged, and returns its last value. Between the look at a
// map and this its key may have become that of a new connection: clients come again by the same port. Such an entry stays. One that
// comes just between the two calls here is put back, and packets of that moment have found none.
func take[K, V any](m *ebpf.Map, key *K, same func(*V) bool) (last V, taken bool, err error) {
	if err := m.Lookup(key, &last); err != nil || !same(&last) {
		return last, false, unlessMissing(err)
	}
	if err := m.LookupAndDelete(key, &last); err != nil || same(&last) {
		return last, err == nil, unlessMissing(err)
	}
	if err := m.Update(key, &last, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return last, false, fmt.Errorf("put back: %w", err)
	}
	return last, false, nil
}

func unlessMissing(err error) error {
	if isMissing(err) {
		return nil
	}
	return err
}

// LiveFlows tells of every bypassed flow in the kernel, with its counters so far.
func (d *Datapath) LiveFlows() ([]flow.Record, error) {
	keys, flows, err := entries[bpf.FlowKey, bpf.Flow](d.objs.SpFlows)
	if err != nil {
		return nil, err
	}
	var out []flow.Record
	for i := range keys {
		path, _, err := d.pathOf(&flows[i])
		if err != nil {
			return nil, err
		}
		out = append(out, fromFlow(&keys[i], &flows[i], &path, flow.EventUpdate, flow.ReasonPathLive))
	}
	return out, nil
}

// Sweep removes what is over: bypassed flows that closed or whose path ended, legs of closed or dead
// connections, and denials not yet told. It returns the final records of the flows, of which Told is to be called. The kernel never
// relies on it. Connections whose path ended are cut first, also where nobody says a word; their flows are taken by a
// later sweep. One at a time.
func (d *Datapath) Sweep() ([]flow.Record, error) {
	if err := d.handedOver(); err != nil {
		return nil, err
	}
	full, err := d.fullPaths() // before the flows: what is full takes no more of them
	if err != nil {
		return nil, err
	}
	out, err := d.sweepFlows(full)
	denied, derr := sweepDenies(d.objs.SpDenies, d.fromDeny)
	seen, serr := sweepDenies(d.objs.SpSightings, d.fromSighting)
	return slices.Concat(d.takeEnded(), out, denied, seen), errors.Join(err, derr, serr, d.sweepLegs(), d.endFull(full))
}

// fullPaths are the slots of live paths that took all connections of their budget.
func (d *Datapath) fullPaths() (map[uint32]bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	full := map[uint32]bool{}
	for slot, p := range d.live {
		if p.Budget.Connections == 0 {
			continue
		}
		s, err := d.readPath(slot)
		if err != nil {
			return nil, err
		}
		if s.State == PathActive && s.Flows >= s.Budget.Connections {
			full[slot] = true
		}
	}
	return full, nil
}

// endFull ends the full paths that are left: those without a flow.
func (d *Datapath) endFull(full map[uint32]bool) error {
	var errs []error
	for slot := range full {
		errs = append(errs, d.EndPath(slot, PathSpent))
	}
	return errors.Join(errs...)
}

// over is what a sweep found to be over.
type over struct {
	keys    []bpf.FlowKey
	flows   []bpf.Flow
	reasons []flow.Reason
	paths   []bpf.Path
}

func (o *over) add(k bpf.FlowKey, f bpf.Flow, r flow.Reason, p bpf.Path) {
	o.keys, o.flows = append(o.keys, k), append(o.flows, f)
	o.reasons, o.paths = append(o.reasons, r), append(o.paths, p)
}

func (d *Datapath) sweepFlows(full map[uint32]bool) ([]flow.Record, error) {
	cut, reset, done, err := d.overFlows(full)
	if err != nil {
		return nil, err
	}
	done.addGone(reset)
	if err = destroySockets(cut.keys, cut.flows); errors.Is(err, ErrNoDestroy) {
		err = nil // CanDestroy tells of it
	}
	out, takeErr := d.takeFlows(done)
	return out, errors.Join(err, takeErr)
}

// takeFlows takes flows from the kernel. Before it does it notes how many: whoever is killed with their records has not told of these.
func (d *Datapath) takeFlows(done over) (out []flow.Record, err error) {
	if len(done.keys) == 0 {
		return nil, nil
	}
	if err := d.taking(len(done.keys)); err != nil {
		return nil, err
	}
	defer func() {
		if rest := len(done.keys) - len(out); rest > 0 {
			err = errors.Join(err, d.notTaken(rest))
		}
	}()
	for i := range done.keys {
		last, taken, err := take(d.objs.SpFlows, &done.keys[i], func(f *bpf.Flow) bool { return f.OpenedNs == done.flows[i].OpenedNs })
		if err != nil {
			return out, fmt.Errorf("take flow: %w", err)
		}
		if !taken {
			continue // a SYN replaced it; the kernel told of it
		}
		out = append(out, fromFlow(&done.keys[i], &last, &done.paths[i], flow.EventClose, done.reasons[i]))
	}
	return out, nil
}

// overFlows sorts the flows that are over into those to cut, because their path ended, those that only a RST says are over, and
// those that are done with. Paths that have one are taken out of `full`.
func (d *Datapath) overFlows(full map[uint32]bool) (cut, reset, done over, err error) {
	keys, flows, err := entries[bpf.FlowKey, bpf.Flow](d.objs.SpFlows)
	if err != nil {
		return cut, reset, done, err
	}
	seen := cuts{}
	for i := range keys {
		delete(full, flows[i].Slot)
		path, reason, err := d.pathOf(&flows[i])
		if err != nil {
			return cut, reset, done, err
		}
		switch reason = endOf(&flows[i], reason); {
		case reason == flow.ReasonNone:
		case reason == flow.ReasonClosed && !finished(&flows[i]):
			reset.add(keys[i], flows[i], reason, path)
		case d.cuts.done(seen, keys[i], &flows[i], reason):
			done.add(keys[i], flows[i], reason, path)
		case seen[keys[i]].fresh:
			cut.add(keys[i], flows[i], reason, path)
		}
	}
	d.cuts = seen
	return cut, reset, done, nil
}

// addGone adds the flows whose service has no such connection any more. A RST that it did not take was not its
// client's: to forge one takes the tuple alone, and its sequence number is judged by the socket.
func (o *over) addGone(reset over) {
	standing := standingSockets(reset.keys, reset.flows)
	for i := range reset.keys {
		if !standing[i] {
			o.add(reset.keys[i], reset.flows[i], reset.reasons[i], reset.paths[i])
		}
	}
}

// finished tells whether both parties of a flow closed it.
func finished(f *bpf.Flow) bool {
	const fins = uint32(bpf.SallyportSpFlagsSP_FIN_CLIENT | bpf.SallyportSpFlagsSP_FIN_SERVER)
	return f.Flags&fins == fins
}

// endOf says why a flow is over, or NONE.
func endOf(f *bpf.Flow, path flow.Reason) flow.Reason {
	closed := f.Flags&uint32(bpf.SallyportSpFlagsSP_RST) != 0 || finished(f)
	switch {
	case f.Ended != 0:
		return flow.Reason(f.Ended)
	case path != flow.ReasonPathLive:
		return path
	case closed && BootTime()-time.Duration(f.LastNs) > closedFlowLinger:
		return flow.ReasonClosed
	case f.UdpIdleS != 0 && BootTime()-time.Duration(f.LastNs) > time.Duration(f.UdpIdleS)*time.Second:
		return flow.ReasonUDPIdle
	}
	return flow.ReasonNone
}

// pathOf reads a flow's path, and why it no longer serves the flow (or PATH_LIVE).
func (d *Datapath) pathOf(f *bpf.Flow) (bpf.Path, flow.Reason, error) {
	var p bpf.Path
	var s bpf.PathStatus
	if err := d.objs.SpPaths.Lookup(f.Slot, &p); err != nil {
		return p, 0, fmt.Errorf("read path %d: %w", f.Slot, err)
	}
	if err := d.objs.SpPathState.Lookup(f.Slot, &s); err != nil {
		return p, 0, fmt.Errorf("read path state %d: %w", f.Slot, err)
	}
	return p, pathReason(p, PathState(s.State), f.Epoch), nil
}

// pathReason is sp_path_check in Go, for records and explanations.
func pathReason(p bpf.Path, s PathState, epoch uint32) flow.Reason {
	switch {
	case p.Epoch != epoch:
		return flow.ReasonPathStale
	case s == PathRevoked:
		return flow.ReasonPathRevoked
	case s == PathSpent:
		return flow.ReasonPathSpent
	case s == PathExpired, s == PathActive && time.Duration(p.DeadlineNs) <= BootTime():
		return flow.ReasonPathExpired
	case s == PathActive:
		return flow.ReasonPathLive
	}
	return flow.ReasonPathStale
}

// sweepDenies tells of denials, or of what was seen, that followed a record within a second and then stopped.
func sweepDenies(m *ebpf.Map, tell func(*bpf.DenyKey, uint64) flow.Record) ([]flow.Record, error) {
	keys, denies, err := entries[bpf.DenyKey, bpf.Deny](m)
	if err != nil {
		return nil, err
	}
	var out []flow.Record
	for i := range keys {
		if BootTime()-time.Duration(denies[i].ReportedNs) < denyLinger {
			continue
		}
		var last bpf.Deny
		if err := m.LookupAndDelete(&keys[i], &last); isMissing(err) {
			continue
		} else if err != nil {
			return out, fmt.Errorf("take denial: %w", err)
		}
		if last.Pending > 0 {
			out = append(out, tell(&keys[i], last.Pending))
		}
	}
	return out, nil
}
