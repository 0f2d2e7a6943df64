package datapath

import (
	"errors"
	"fmt"
	"os"
	"reflect"

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
// the backstop from a control group (empty: from none), whoever holds it, and says how many: the guard
// holds links whose pins somebody removed, and filters have no pins.
func DetachAll(cgroup string) (n int, err error) {
	errs := []error{eachPlace(func(p place) error {
		dropped, err := clearBut(p, nil)
		n += len(dropped)
		return err
	})}
	filtered, err := xdpDevices()
	errs = append(errs, err)
	for dev, there := range filtered {
		if err := detachXDP(dev.Attrs().Index, there.program); err != nil {
			errs = append(errs, fmt.Errorf("detach XDP from %s: %w", dev.Attrs().Name, err))
			continue
		}
		n++
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

// DetachPx does the same in the px namespace, if it is there: what runs in it keeps its devices.
func DetachPx(netnsFile string) (n int, err error) {
	if _, err := os.Stat(netnsFile); errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	err = inNetns(netnsFile, func() error {
		n, err = DetachAll("")
		return err
	})
	return n, err
}
