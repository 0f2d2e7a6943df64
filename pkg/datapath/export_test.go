package datapath

import (
	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
)

// Programs and Maps give the tests of the programs what only this package holds.
func (d *Datapath) Programs() *bpf.SallyportPrograms { return &d.objs.SallyportPrograms }

// Maps are the tables, for tests that write what no agent would.
func (d *Datapath) Maps() *bpf.SallyportMaps { return &d.objs.SallyportMaps }

// Change makes another version of the programs.
func (c *Config) Change(f func(*ebpf.CollectionSpec)) { c.change = f }

// OneBuffer makes the XDP programs those of kernels before 5.18.
func (c *Config) OneBuffer() { c.oneBuffer = true }

// LinkIDs lists the holds of this handle by their key: the id of a link, the handle of a filter.
func (d *Datapath) LinkIDs() (map[string]uint32, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ids := map[string]uint32{}
	for key, a := range d.devices {
		switch h := a.hold.(type) {
		case tcxLink:
			info, err := h.Info()
			if err != nil {
				return nil, err
			}
			ids[key] = uint32(info.ID)
		case *filter:
			ids[key] = h.handle
		}
	}
	for _, x := range d.xdp {
		if x.link != nil {
			info, err := x.link.Info()
			if err != nil {
				return nil, err
			}
			ids[xdpKey(x.outcome.Ifindex)] = uint32(info.ID)
		}
	}
	for key, l := range d.backstop {
		info, err := l.Info()
		if err != nil {
			return nil, err
		}
		ids[key] = uint32(info.ID)
	}
	return ids, nil
}

// Occupy holds the datapath's lock, as who waits for a device does, until release.
func (d *Datapath) Occupy() (release func()) {
	d.mu.Lock()
	return d.mu.Unlock
}

// DetachBackstop takes a part of the backstop off its place, as others could.
func DetachBackstop(d *Datapath, program string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.backstop[program].Detach()
}

// OwnNetns is the cookie of the current namespace.
func OwnNetns() (uint64, error) {
	n, err := ownNetns()
	return n.cookie, err
}

// NetnsInode is the inode of the current namespace.
func NetnsInode() (uint32, error) {
	n, err := ownNetns()
	return n.inode, err
}

// What the tests of the programs need of the conversions.
var (
	ToAddr      = toAddr
	FromAddr    = fromAddr
	ToLabel     = toLabel
	FromLabel   = fromLabel
	DecodeEvent = decodeEvent
	FromEvent   = fromEvent
	Schema      = schema

	ProgramNames = programNames
)

// RunningTags are the tags of our programs on the devices of the current network namespace.
func RunningTags() (tags []string, err error) {
	err = eachPlace(func(p place) error {
		ours, err := findOurs(p)
		for _, f := range ours {
			prog, err := ebpf.NewProgramFromID(f.program)
			if err != nil {
				return err
			}
			info, err := prog.Info()
			if err != nil {
				return err
			}
			tags = append(tags, info.Tag)
			if err := prog.Close(); err != nil {
				return err
			}
		}
		return err
	})
	return tags, err
}

// TakeNumber is take, of a map of numbers.
func TakeNumber(m *ebpf.Map, key uint32, same func(*uint64) bool) (uint64, bool, error) {
	return take(m, &key, same)
}

// Numbers is entries, of a map of numbers.
func Numbers(m *ebpf.Map) (keys []uint32, values []uint64, err error) {
	return entries[uint32, uint64](m)
}
