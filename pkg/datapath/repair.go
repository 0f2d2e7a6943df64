package datapath

import (
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
)

// RepairKind is what was wrong with a hook.
type RepairKind string

// Kinds of repairs.
const (
	RepairLost   RepairKind = "lost"   // it was taken off its device
	RepairBehind RepairKind = "behind" // another program was put before it
)

// Repair tells of a hook that somebody moved and that is in its place again.
type Repair struct {
	Kind    RepairKind
	Program string
	Place   string // device and direction
}

// String is one line for people.
func (r Repair) String() string {
	if r.Kind == RepairBehind {
		return fmt.Sprintf("another program was put before %s on %s: ours is first again", r.Program, r.Place)
	}
	return fmt.Sprintf("%s was taken off %s, and is there again", r.Program, r.Place)
}

func (d *Datapath) repaired(r Repair) {
	if d.cfg.Repaired != nil {
		d.cfg.Repaired(r)
	}
}

// lead brings a hook before what somebody put before it. The second one is there before the first one
// goes, so there is no gap. d.mu is held.
func (d *Datapath) lead(a attachment, p place, key string) error {
	first, err := a.hold.first()
	if first || err != nil {
		return err
	}
	copied, err := d.another(a.name)
	if err != nil {
		return err
	}
	defer copied.Close()
	a.hold, err = a.hold.lead(copied, filepath.Join(linksDir(d.cfg.Dir), key))
	d.devices[key] = a
	if err == nil {
		err = a.hold.update(a.prog)
	}
	if err != nil {
		return fmt.Errorf("come first on %s: %w", p, err)
	}
	d.repaired(Repair{RepairBehind, a.name, p.String()})
	return nil
}

// another loads a program a second time, onto the same maps: the kernel takes one only once into a chain.
func (d *Datapath) another(name string) (*ebpf.Program, error) {
	spec, err := bpf.LoadSallyport()
	if err != nil {
		return nil, fmt.Errorf("read programs: %w", err)
	}
	d.profile.prepare(spec)
	for other := range spec.Programs {
		if other != name {
			delete(spec.Programs, other)
		}
	}
	ours := d.objs.maps()
	for name, m := range spec.Maps {
		m.Contents = nil
		if now, ok := ours[name]; ok {
			m.MaxEntries = now.MaxEntries()
		} else if !unpinned(name) {
			delete(spec.Maps, name)
		}
	}
	spec.Variables = nil
	all, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: ours})
	if err != nil {
		return nil, fmt.Errorf("load %s again: %w", name, err)
	}
	defer all.Close()
	return all.DetachProgram(name), nil
}
