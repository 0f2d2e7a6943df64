package datapath

import (
	"errors"
	"fmt"
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
	d.opening.Lock()
	defer d.opening.Unlock()
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

// pathKeys are those that name the path in the index.
func pathKeys(p Path) []bpf.PathKey {
	var keys []bpf.PathKey
	for _, port := range p.Ports {
		keys = append(keys, bpf.PathKey{Client: toAddr(p.Client), ServiceId: p.ServiceID, Port: port, ClientPort: p.ClientPort, Cgroup: p.Cgroup})
	}
	return keys
}

// checkIndex keeps two live paths from sharing a SYN: a path is never shared between grants. One that comes after another takes its place.
func (d *Datapath) checkIndex(p Path) error {
	for _, k := range pathKeys(p) {
		var ref bpf.PathRef
		err := d.objs.SpPathIndex.Lookup(&k, &ref)
		if isMissing(err) || err == nil && ref.Slot == noSlot {
			continue
		}
		if err != nil {
			return fmt.Errorf("read path index: %w", err)
		}
		s, err := d.readPath(ref.Slot)
		if err != nil {
			return err
		}
		if s.State == PathActive && s.Deadline > BootTime() && (p.After == "" || s.Grant != p.After) {
			return fmt.Errorf("open path: %w: grant %s, slot %d", ErrPathExists, s.Grant, ref.Slot)
		}
	}
	return nil
}

// writePath opens a path in a free slot. Whoever looks after a kill sees a slot that is free, or one that says whose it is: the index
// names none that is free.
func (d *Datapath) writePath(slot uint32, p Path) error {
	var old bpf.Path
	if err := d.objs.SpPaths.Lookup(slot, &old); err != nil {
		return fmt.Errorf("read slot: %w", err)
	}
	v := bpf.Path{
		Epoch: old.Epoch + 1, ServiceId: p.ServiceID, Client: toAddr(p.Client), DeadlineNs: uint64(p.Deadline),
		Grant: toLabel(p.Grant), Service: toLabel(p.Service),
		BytesLimit: p.Budget.Bytes, PacketsLimit: p.Budget.Packets, ConnectionsLimit: p.Budget.Connections,
		RateLimit: p.Budget.ConnectionsPerSecond, Ingress: bpf.SallyportSpIngress(p.Ingress),
		ClientPort: uint32(p.ClientPort), Cgroup: p.Cgroup,
	}
	if err := d.tallies.begin(slot, v.Epoch, fromLabel(v.Grant)); err != nil {
		return err
	}
	if err := d.objs.SpPaths.Put(slot, &v); err != nil {
		return fmt.Errorf("write slot: %w", err)
	}
	if err := d.setState(slot, PathPending); err != nil { // from here on the slot is seen to be in use, and by whom
		return err
	}
	for _, k := range pathKeys(p) {
		if err := d.enterIndex(k, bpf.PathRef{Slot: slot, Epoch: v.Epoch}); err != nil {
			return err
		}
	}
	return d.setState(slot, PathActive)
}

// enterIndex puts a path into the index. One that is bound to sockets counts at the entry of its address, which is what
// the programs look for first.
func (d *Datapath) enterIndex(k bpf.PathKey, at bpf.PathRef) error {
	fresh := false
	err := d.changeIndex(k, func(ref *bpf.PathRef) {
		fresh = ref.Slot == noSlot
		ref.Slot, ref.Epoch = at.Slot, at.Epoch
	})
	if err != nil || !fresh || !isBound(k) {
		return err
	}
	return d.changeIndex(addressKey(k), func(ref *bpf.PathRef) { ref.Bound++ })
}

// dropIndex takes a path out of the index, if it is still there.
func (d *Datapath) dropIndex(k bpf.PathKey, slot uint32) error {
	had := false
	err := d.changeIndex(k, func(ref *bpf.PathRef) {
		if had = ref.Slot == slot; had {
			ref.Slot = noSlot
		}
	})
	if err != nil || !had || !isBound(k) {
		return err
	}
	return d.changeIndex(addressKey(k), func(ref *bpf.PathRef) { ref.Bound = max(ref.Bound, 1) - 1 })
}

func isBound(k bpf.PathKey) bool { return k.ClientPort != 0 || k.Cgroup != 0 }

// addressKey is the key of everything that has the same address.
func addressKey(k bpf.PathKey) bpf.PathKey {
	k.ClientPort, k.Cgroup = 0, 0
	return k
}

// noSlot is SP_NO_SLOT: the entry of an address of which only some sockets have paths.
const noSlot = ^uint32(0)

// changeIndex changes an entry in one step. One that names nothing any more goes.
func (d *Datapath) changeIndex(k bpf.PathKey, change func(*bpf.PathRef)) error {
	ref := bpf.PathRef{Slot: noSlot}
	err := d.objs.SpPathIndex.Lookup(&k, &ref)
	if err != nil && !isMissing(err) {
		return fmt.Errorf("read path index: %w", err)
	}
	if change(&ref); ref.Slot != noSlot || ref.Bound != 0 {
		err = d.objs.SpPathIndex.Put(&k, &ref)
	} else if err == nil {
		err = d.objs.SpPathIndex.Delete(&k)
	}
	if err != nil && !isMissing(err) {
		return fmt.Errorf("write path index: %w", err)
	}
	return nil
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

// endPathsBehind revokes the open paths to services behind a device alone. d.mu is held.
func (d *Datapath) endPathsBehind(ifindex int) error {
	for slot, p := range d.live {
		behind := slices.ContainsFunc(d.services, func(s Service) bool {
			return s.ID == p.ServiceID && s.Target == TargetPod && isBehind(s.Places(), ifindex)
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

// isBehind says whether a service is in that pod alone.
func isBehind(pods []Place, ifindex int) bool { return len(pods) == 1 && pods[0].Ifindex == ifindex }

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
//
// Those that are opened or given back meanwhile may be missing, or be a mixture of before and after: nobody who opens a path
// waits for whoever looks at thousands. Path is sure of one.
func (d *Datapath) Paths() ([]PathStatus, error) {
	n, last := d.inUse()
	if n == 0 {
		return nil, nil
	}
	out := make([]PathStatus, 0, n)
	err := d.eachSlot(last, func(slot uint32, state PathState, v *bpf.Path) {
		if state != PathFree {
			out = append(out, fromPath(slot, state, v).expired())
		}
	})
	return d.known(out), err
}

// inUse is how many slots have a path, and the last of them.
func (d *Datapath) inUse() (n int, last uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for slot := range d.live {
		last = max(last, slot)
	}
	return len(d.live), last
}

// known are those of the paths that are there still, with their ports, which the kernel does not have by slot.
func (d *Datapath) known(paths []PathStatus) []PathStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	left := paths[:0]
	for _, s := range paths {
		if p, there := d.live[s.Slot]; there {
			s.Ports = p.Ports
			left = append(left, s)
		}
	}
	return left
}

// Path is one slot, as Paths tells it. One that is free has no grant.
func (d *Datapath) Path(slot uint32) (PathStatus, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.live[slot]; !ok {
		return PathStatus{Slot: slot, State: PathFree}, nil
	}
	s, err := d.readPath(slot)
	return s.expired(), err
}

// NextSlots are those that the next paths will get, if nothing else opens one before, and there are so many.
func (d *Datapath) NextSlots(n int) (slots []uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := len(d.free) - 1; i >= 0 && len(slots) < n; i-- {
		slots = append(slots, d.free[i])
	}
	return slots
}

// expired makes a path past its deadline EXPIRED.
func (s PathStatus) expired() PathStatus {
	if s.State == PathActive && s.Deadline <= BootTime() {
		s.State = PathExpired
	}
	return s
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
	index, err := d.readIndex()
	if err != nil {
		return err
	}
	ports := map[uint32][]uint16{}
	for k, ref := range index {
		ports[ref.Slot] = append(ports[ref.Slot], k.Port)
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
		if err := d.tallies.adopt(slot, s.Epoch, s.Grant); err != nil {
			return err
		}
	}
	return d.recountBound(index)
}

func (d *Datapath) readIndex() (map[bpf.PathKey]bpf.PathRef, error) {
	index := map[bpf.PathKey]bpf.PathRef{}
	var k bpf.PathKey
	var ref bpf.PathRef
	it := d.objs.SpPathIndex.Iterate()
	for it.Next(&k, &ref) {
		index[k] = ref
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read path index: %w", err)
	}
	return index, nil
}

// recountBound corrects what a kill between two writes left of the counts of bound paths.
func (d *Datapath) recountBound(index map[bpf.PathKey]bpf.PathRef) error {
	bound := map[bpf.PathKey]uint32{}
	for k := range index {
		if isBound(k) {
			bound[addressKey(k)]++
		} else {
			bound[k] += 0
		}
	}
	for k, n := range bound {
		if index[k].Bound == n {
			continue
		}
		if err := d.changeIndex(k, func(ref *bpf.PathRef) { ref.Bound = n }); err != nil {
			return err
		}
	}
	return nil
}
