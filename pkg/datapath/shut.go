package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
)

// ErrShut says that no path is opened: Shut was called, and Reopen was not.
var ErrShut = errors.New("paths are shut")

// Shut ends every open path, whoever opened it, and has OpenPath refuse until Reopen. When it returns without error no path
// is open, and its flows have ended. The states of all of them go into the kernel in one call; a path that cannot be ended
// with the others is tried by itself, and the error tells of each that is still open. It waits for nobody but an OpenPath
// that has begun.
func (d *Datapath) Shut() (ended int, err error) {
	d.opening.Lock()
	defer d.opening.Unlock()
	d.shut = true
	slots, err := d.openSlots()
	if err != nil || len(slots) == 0 {
		return 0, err
	}
	revoked := make([]bpf.PathStatus, len(slots))
	for i := range revoked {
		revoked[i].State = bpf.SallyportSpState(PathRevoked)
	}
	if _, err := d.objs.SpPathState.BatchUpdate(slots, revoked, nil); err == nil {
		return len(slots), nil
	}
	for _, slot := range slots {
		if failed := d.setState(slot, PathRevoked); failed != nil {
			err = errors.Join(err, fmt.Errorf("end path in slot %d: %w", slot, failed))
			continue
		}
		ended++
	}
	return ended, err
}

// Reopen lets OpenPath open paths again. Nothing that Shut ended comes back.
func (d *Datapath) Reopen() {
	d.opening.Lock()
	defer d.opening.Unlock()
	d.shut = false
}

// openSlots are the slots that admit packets, or are about to, as the kernel has them.
func (d *Datapath) openSlots() (open []uint32, err error) {
	keys, states := make([]uint32, slotBatch), make([]bpf.PathStatus, slotBatch)
	var at ebpf.MapBatchCursor
	for {
		n, err := d.objs.SpPathState.BatchLookup(&at, keys, states, nil)
		if err != nil && !isMissing(err) {
			return nil, fmt.Errorf("read path states: %w", err)
		}
		for i, s := range states[:n] {
			if state := PathState(s.State); state == PathActive || state == PathPending {
				open = append(open, keys[i])
			}
		}
		if isMissing(err) {
			return open, nil
		}
	}
}
