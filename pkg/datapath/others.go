package datapath

import (
	"errors"
	"fmt"
	"net"
	"os"
	"reflect"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/sallyport-dev/sallyport/bpf"
)

// programNames are the names of our programs in the kernel.
func programNames() []string {
	var names []string
	for _, f := range reflect.VisibleFields(reflect.TypeFor[bpf.SallyportPrograms]()) {
		names = append(names, f.Tag.Get("ebpf"))
	}
	return names
}

// DetachAll detaches every program of Sallyport from the current network namespace and its devices, and
// the backstop from a control group (empty: from none), whoever holds its link, and says how many: the
// guard holds links whose pins somebody removed.
func DetachAll(cgroup string) (n int, err error) {
	devices, err := net.Interfaces()
	if err != nil {
		return 0, fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, dev := range devices {
		for _, attach := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			ids, err := detachBut(dev.Index, attach, 0)
			if err != nil {
				errs = append(errs, fmt.Errorf("detach from %s: %w", dev.Name, err))
			}
			n += len(ids)
		}
	}
	errs = append(errs, backstopAt(cgroup, func(l link.Link, name string) error {
		if err := l.Detach(); err != nil {
			return fmt.Errorf("detach %s: %w", name, err)
		}
		n++
		return nil
	}))
	return n, errors.Join(errs...)
}

// detachBut detaches our programs from one place of a device, but for one link. Two datapaths in one
// chain would drop each other's packets.
func detachBut(ifindex int, attach ebpf.AttachType, keep link.ID) (detached []link.ID, err error) {
	found, err := attachedTo(ifindex, attach)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, a := range found {
		if a.link == keep {
			continue
		}
		if err := detachLink(a.link); err != nil {
			errs = append(errs, fmt.Errorf("detach link %d of %s: %w", a.link, a.name, err))
			continue
		}
		detached = append(detached, a.link)
	}
	return detached, errors.Join(errs...)
}

// detachLink is content with a link that is gone.
func detachLink(id link.ID) error {
	l, err := link.NewFromID(id)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer closeLink(l)
	return l.Detach()
}
