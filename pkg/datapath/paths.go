package datapath

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
)

// Errors of OpenPath. Nothing was changed when one is returned.
var (
	ErrPathsFull  = errors.New("no free path slot")
	ErrPathExists = errors.New("a live path already serves this client, service and port")
	ErrDeadline   = errors.New("deadline is not in the future or beyond the node's maximum")
)

func isMissing(err error) bool { return errors.Is(err, ebpf.ErrKeyNotExist) }

// OpenPath takes a free slot and makes the path live. The state turns ACTIVE last: until then the
// programs do not admit it.
func (d *Datapath) OpenPath(p Path) (uint32, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shut {
		return 0, fmt.Errorf("open path: %w", ErrShut)
	}
	if left := p.Deadline - BootTime(); left <= 0 || left > d.cfg.MaxTTL {
		return 0, fmt.Errorf("open path: %w", ErrDeadline)
	}
	if err := d.checkIndex(p); err != nil {
		return 0, err
	}
	if len(d.free) == 0 {
		return 0, fmt.Errorf("open path: %w", ErrPathsFull)
	}
	slot := d.free[len(d.free)-1]
	if err := d.writePath(slot, p); err != nil {
		_ = d.setState(slot, PathFree)
		return 0, fmt.Errorf("open path: %w", err)
	}
	d.free = d.free[:len(d.free)-1]
	d.live[slot] = p
	return slot, nil
}

func pathKeys(p Path) []bpf.PathKey {
	var keys []bpf.PathKey
	for _, port := range p.Ports {
		keys = append(keys, bpf.PathKey{Client: toAddr(p.Client), ServiceId: p.ServiceID, Port: port})
	}
	return keys
}

// checkIndex keeps two live paths from sharing a SYN: a path is never shared between grants.
func (d *Datapath) checkIndex(p Path) error {
	for _, k := range pathKeys(p) {
		var ref bpf.PathRef
		err := d.objs.SpPathIndex.Lookup(&k, &ref)
		if isMissing(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read path index: %w", err)
		}
		s, err := d.readPath(ref.Slot)
		if err != nil {
			return err
		}
		if s.State == PathActive && s.Deadline > BootTime() {
			return fmt.Errorf("open path: %w: grant %s, slot %d", ErrPathExists, s.Grant, ref.Slot)
		}
	}
	return nil
}

func (d *Datapath) writePath(slot uint32, p Path) error {
	var old bpf.Path
	if err := d.objs.SpPaths.Lookup(slot, &old); err != nil {
		return fmt.Errorf("read slot: %w", err)
	}
	if err := d.setState(slot, PathPending); err != nil {
		return err
	}
	v := bpf.Path{
		Epoch: old.Epoch + 1, ServiceId: p.ServiceID, Client: toAddr(p.Client), DeadlineNs: uint64(p.Deadline),
		Grant: toLabel(p.Grant), Service: toLabel(p.Service),
		BytesLimit: p.Budget.Bytes, PacketsLimit: p.Budget.Packets, ConnectionsLimit: p.Budget.Connections,
		RateLimit: p.Budget.ConnectionsPerSecond, Ingress: bpf.SallyportSpIngress(p.Ingress),
	}
	if err := d.objs.SpPaths.Put(slot, &v); err != nil {
		return fmt.Errorf("write slot: %w", err)
	}
	for _, k := range pathKeys(p) {
		if err := d.objs.SpPathIndex.Put(&k, &bpf.PathRef{Slot: slot, Epoch: v.Epoch}); err != nil {
			return fmt.Errorf("write path index: %w", err)
		}
	}
	return d.setState(slot, PathActive)
}

func (d *Datapath) setState(slot uint32, s PathState) error {
	if err := d.objs.SpPathState.Put(slot, &bpf.PathStatus{State: bpf.SallyportSpState(s)}); err != nil {
		return fmt.Errorf("write path state: %w", err)
	}
	return nil
}

// EndPath ends a path and every flow of it with one store. It is closed when EndPath returns.
func (d *Datapath) EndPath(slot uint32, s PathState) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.endPath(slot, s)
}

func (d *Datapath) endPath(slot uint32, s PathState) error {
	if err := d.setState(slot, s); err != nil {
		return err
	}
	p, ok := d.live[slot]
	if !ok {
		return nil
	}
	for _, k := range pathKeys(p) {
		if err := d.dropIndex(k, slot); err != nil {
			return err
		}
	}
	return nil
}

// endPathsBehind revokes the open paths to services behind a device. d.mu is held.
func (d *Datapath) endPathsBehind(ifindex int) error {
	for slot, p := range d.live {
		behind := slices.ContainsFunc(d.services, func(s Service) bool {
			return s.ID == p.ServiceID && s.Target == TargetPod && s.Ifindex == ifindex
		})
		if !behind {
			continue
		}
		s, err := d.readPath(slot)
		if err == nil && (s.State == PathActive || s.State == PathPending) {
			err = d.endPath(slot, PathRevoked)
		}
		if err != nil {
			return fmt.Errorf("end path in slot %d: %w", slot, err)
		}
	}
	return nil
}

func (d *Datapath) dropIndex(k bpf.PathKey, slot uint32) error {
	var ref bpf.PathRef
	err := d.objs.SpPathIndex.Lookup(&k, &ref)
	if isMissing(err) || err == nil && ref.Slot != slot {
		return nil
	}
	if err == nil {
		err = d.objs.SpPathIndex.Delete(&k)
	}
	if err != nil && !isMissing(err) {
		return fmt.Errorf("drop path index: %w", err)
	}
	return nil
}

// FreePath gives an ended slot back. Call it when Sweep has returned the records of its flows.
func (d *Datapath) FreePath(slot uint32) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.live[slot]; !ok {
		return nil
	}
	if err := d.setState(slot, PathFree); err != nil {
		return err
	}
	delete(d.live, slot)
	d.free = append(d.free, slot)
	return nil
}

// FreePaths is how many slots are free.
func (d *Datapath) FreePaths() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.free)
}

// Paths lists every slot that is not free, by its number, as the kernel has it. A path past its deadline is EXPIRED,
// whatever its state says.
func (d *Datapath) Paths() ([]PathStatus, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.live) == 0 {
		return nil, nil
	}
	out := make([]PathStatus, 0, len(d.live))
	last := slices.Max(slices.Collect(maps.Keys(d.live)))
	err := d.eachSlot(last, func(slot uint32, state PathState, v *bpf.Path) {
		p, ok := d.live[slot]
		if !ok {
			return
		}
		s := fromPath(slot, state, v)
		s.Ports = p.Ports
		if s.State == PathActive && s.Deadline <= BootTime() {
			s.State = PathExpired
		}
		out = append(out, s)
	})
	return out, err
}

// slotBatch is how many slots a call reads: the agent reads them all each second, and there may be thousands.
const slotBatch = 1024

// eachSlot reads the slots from the first on, up to a last one.
func (d *Datapath) eachSlot(last uint32, f func(slot uint32, state PathState, v *bpf.Path)) error {
	keys, states, paths := make([]uint32, slotBatch), make([]bpf.PathStatus, slotBatch), make([]bpf.Path, slotBatch)
	var atState, atPath ebpf.MapBatchCursor
	for slot := uint32(0); slot <= last; {
		n, err := d.objs.SpPathState.BatchLookup(&atState, keys, states, nil)
		if err != nil && !isMissing(err) {
			return fmt.Errorf("read path states from %d: %w", slot, err)
		}
		m, err := d.objs.SpPaths.BatchLookup(&atPath, keys, paths, nil)
		if err != nil && !isMissing(err) {
			return fmt.Errorf("read paths from %d: %w", slot, err)
		}
		if n != m || n == 0 {
			return fmt.Errorf("read paths from %d: %d states and %d paths", slot, n, m)
		}
		for i := 0; i < n && slot <= last; i++ {
			f(slot, PathState(states[i].State), &paths[i])
			slot++
		}
	}
	return nil
}

func (d *Datapath) readPath(slot uint32) (PathStatus, error) {
	var v bpf.Path
	var state bpf.PathStatus
	if err := d.objs.SpPaths.Lookup(slot, &v); err != nil {
		return PathStatus{}, fmt.Errorf("read path %d: %w", slot, err)
	}
	if err := d.objs.SpPathState.Lookup(slot, &state); err != nil {
		return PathStatus{}, fmt.Errorf("read path state %d: %w", slot, err)
	}
	s := fromPath(slot, PathState(state.State), &v)
	s.Ports = d.live[slot].Ports
	return s, nil
}

// restorePaths reads which slots are in use, and by what.
func (d *Datapath) restorePaths() error {
	ports, err := d.indexedPorts()
	if err != nil {
		return err
	}
	var state bpf.PathStatus
	for slot := d.objs.SpPathState.MaxEntries(); slot > 0; {
		slot--
		if err := d.objs.SpPathState.Lookup(slot, &state); err != nil {
			return fmt.Errorf("read path state %d: %w", slot, err)
		}
		if PathState(state.State) == PathFree {
			d.free = append(d.free, slot)
			continue
		}
		d.live[slot] = Path{Ports: ports[slot]}
		s, err := d.readPath(slot)
		if err != nil {
			return err
		}
		d.live[slot] = s.Path
	}
	return nil
}

func (d *Datapath) indexedPorts() (map[uint32][]uint16, error) {
	ports := map[uint32][]uint16{}
	var k bpf.PathKey
	var ref bpf.PathRef
	it := d.objs.SpPathIndex.Iterate()
	for it.Next(&k, &ref) {
		ports[ref.Slot] = append(ports[ref.Slot], k.Port)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read path index: %w", err)
	}
	return ports, nil
}
