package datapath

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// ErrOwned says that somebody else's program has the place in a device's chain that ours must have.
var ErrOwned = errors.New("another owner is there first")

// place is one direction of one device of the current network namespace.
type place struct {
	ifindex int
	device  string
	attach  ebpf.AttachType // names the direction for clsact too
}

func (p place) String() string {
	if p.attach == ebpf.AttachTCXEgress {
		return p.device + " egress"
	}
	return p.device + " ingress"
}

// hold keeps one program at one place: a tcx link or a filter of clsact. Both outlive the agent: the
// link by its pin and by the guard, the filter by itself. Methods are called in the namespace of the
// place.
type hold interface {
	// there says whether it still is at its place.
	there() bool
	// first says whether nothing runs before it there.
	first() (bool, error)
	// lead gives what takes its place before all others. It is off the device then, and closed.
	lead(prog *ebpf.Program, pin string) (hold, error)
	// update exchanges the program in one step, unless it is the same.
	update(*ebpf.Program) error
	// is says whether it is what was found in the chain.
	is(found) bool
	// drop takes it off the device, whoever else holds it. It is content if it is gone.
	drop() error
	// close frees what this process has of it; the program stays where it is.
	close() error
}

// found is a program of ours in a device's chain: by its link, or by its filter's handle.
type found struct {
	name    string
	program ebpf.ProgramID
	link    link.ID // 0: none
	filter  uint32  // 0: none
	place   place
}

func (f found) drop() error {
	if f.filter != 0 {
		return (&filter{place: f.place, handle: f.filter}).drop()
	}
	return dropLink(f.link)
}

// findOurs lists the programs of ours at a place, whoever put them there, first to run first.
func findOurs(p place) ([]found, error) {
	var all []found
	for _, find := range []func(place) ([]found, error){tcxChain, clsactChain} {
		chain, err := find(p)
		if err != nil {
			return nil, fmt.Errorf("query %s: %w", p, err)
		}
		all = append(all, chain...)
	}
	return slices.DeleteFunc(all, func(f found) bool { return !slices.Contains(programNames(), f.name) }), nil
}

// clearBut takes our programs off a place, but for one. Two datapaths in one chain would drop each
// other's packets.
func clearBut(p place, keep hold) (dropped []found, err error) {
	ours, err := findOurs(p)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, f := range ours {
		if keep != nil && keep.is(f) {
			continue
		}
		if err := f.drop(); err != nil {
			errs = append(errs, fmt.Errorf("take %s off %s: %w", f.name, p, err))
			continue
		}
		dropped = append(dropped, f)
	}
	return dropped, errors.Join(errs...)
}

// eachPlace goes over the places of the current network namespace. An error of f does not end it.
func eachPlace(f func(place) error) error {
	devices, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, dev := range devices {
		for _, attach := range directions() {
			errs = append(errs, f(place{dev.Index, dev.Name, attach}))
		}
	}
	return errors.Join(errs...)
}

// sameProgram says whether the loaded program has the code and the maps of ours.
func sameProgram(id ebpf.ProgramID, ours *ebpf.Program) (bool, error) {
	want, err := ours.Info()
	if err != nil {
		return false, fmt.Errorf("read program: %w", err)
	}
	old, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open program: %w", err)
	}
	defer old.Close()
	have, err := old.Info()
	if err != nil {
		return false, fmt.Errorf("read program: %w", err)
	}
	haveMaps, _ := have.MapIDs()
	wantMaps, _ := want.MapIDs()
	slices.Sort(haveMaps)
	slices.Sort(wantMaps)
	return have.Tag == want.Tag && slices.Equal(haveMaps, wantMaps), nil
}
