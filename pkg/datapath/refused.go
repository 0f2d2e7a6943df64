package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
)

// Refusal is what the backstop refused of one device.
type Refusal struct {
	// Netns is the inode of the device's network namespace, as lsns shows it; Host says that it is the
	// host's. Ifindex and Device mean something only within it; Device is known for the host's alone.
	Netns          uint32
	Host           bool
	Ifindex        int
	Device         string
	Packets, Bytes uint64        // IP bytes
	Last           time.Duration // boot time
}

// String names the device, for people.
func (r Refusal) String() string {
	if r.Host {
		return r.Device
	}
	return fmt.Sprintf("device %d of net:[%d]", r.Ifindex, r.Netns)
}

// Refused tells what the backstop refused so far, by device. It is called in the host's namespace.
func (d *Datapath) Refused() ([]Refusal, error) {
	var c bpf.Config
	if err := d.objs.SpConfig.Lookup(uint32(0), &c); err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	keys, values, err := entries[bpf.BackstopKey, bpf.Backstop](d.objs.SpBackstop)
	if err != nil {
		return nil, err
	}
	out := make([]Refusal, 0, len(keys))
	for i, k := range keys {
		r := Refusal{Netns: k.Netns, Host: k.Netns == c.HostNetnsInode, Ifindex: int(k.Ifindex),
			Packets: values[i].Packets, Bytes: values[i].Bytes, Last: time.Duration(values[i].LastNs)}
		if r.Host {
			r.Device = deviceName(k.Ifindex)
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b Refusal) int {
		return cmp.Or(cmp.Compare(a.Netns, b.Netns), cmp.Compare(a.Ifindex, b.Ifindex))
	})
	return out, nil
}

// Volume is what goes towards a service, in measures that neither segmentation nor merging on the way
// raises, so that two places can be compared.
type Volume struct {
	Opens   uint64 // SYNs
	Packets uint64 // others without payload; datagrams
	Bytes   uint64 // payload, not of datagrams
}

func (v *Volume) add(o bpf.Volume) {
	v.Opens += o.Opens
	v.Packets += o.Packets
	v.Bytes += o.Bytes
}

// Traffic is what went towards one service, counted at the hooks that let it through and at the sockets
// that got it.
type Traffic struct {
	HookLeg, HookPath     Volume
	SocketLeg, SocketPath Volume
	SocketLoopback        Volume // from the pod itself
}

// Traffic gives the volumes of every service by its id. Whatever a socket side tells of is in the hook side,
// if it went by a hook at all: sockets are read first.
func (d *Datapath) Traffic() (map[uint32]Traffic, error) {
	out := map[uint32]Traffic{}
	err := d.eachTraffic(func(id uint32, c bpf.Traffic) {
		t := out[id]
		t.SocketLeg.add(c.SocketLeg)
		t.SocketPath.add(c.SocketPath)
		t.SocketLoopback.add(c.SocketLoopback)
		out[id] = t
	})
	if err != nil {
		return nil, err
	}
	err = d.eachTraffic(func(id uint32, c bpf.Traffic) {
		t, known := out[id]
		if !known {
			return // new since the first look
		}
		t.HookLeg.add(c.HookLeg)
		t.HookPath.add(c.HookPath)
		out[id] = t
	})
	return out, err
}

func (d *Datapath) eachTraffic(f func(id uint32, ofOneCPU bpf.Traffic)) error {
	return eachRow(d.objs.SpTraffic, func(id uint32, perCPU []bpf.Traffic) {
		for _, c := range perCPU {
			f(id, c)
		}
	})
}

// addTraffic makes the rows of services that have none.
func (d *Datapath) addTraffic(services []Service) error {
	return addRows[bpf.Traffic](d.objs.SpTraffic, services)
}

// dropTraffic removes the rows of services that are no more.
func (d *Datapath) dropTraffic(services []Service) error {
	return dropRows[bpf.Traffic](d.objs.SpTraffic, services)
}

// addRows makes a row for each service that has none, in a map by service and CPU.
func addRows[V any](m *ebpf.Map, services []Service) error {
	zero := make([]V, ebpf.MustPossibleCPU())
	for _, s := range services {
		if err := addRow(m, s.ID, zero); err != nil {
			return fmt.Errorf("add row for the traffic of %s: %w", s.Name, err)
		}
	}
	return nil
}

// rowPatience is how long the kernel may take to have memory for another row: it keeps some ready on each
// CPU, and fetches more when they are used up.
const rowPatience = 5 * time.Second

func addRow(m *ebpf.Map, id uint32, zero any) error {
	for end := time.Now().Add(rowPatience); ; time.Sleep(time.Millisecond) {
		err := m.Update(id, zero, ebpf.UpdateNoExist)
		if errors.Is(err, unix.ENOMEM) && time.Now().Before(end) {
			continue
		}
		if errors.Is(err, ebpf.ErrKeyExist) {
			return nil
		}
		return err
	}
}

// dropRows removes the rows of services that are not among these.
func dropRows[V any](m *ebpf.Map, services []Service) error {
	var stale []uint32
	err := eachRow(m, func(id uint32, _ []V) {
		if !slices.ContainsFunc(services, func(s Service) bool { return s.ID == id }) {
			stale = append(stale, id)
		}
	})
	if err != nil {
		return err
	}
	for _, id := range stale {
		if err := m.Delete(id); err != nil && !isMissing(err) {
			return fmt.Errorf("drop row for traffic: %w", err)
		}
	}
	return nil
}

func eachRow[V any](m *ebpf.Map, f func(id uint32, perCPU []V)) error {
	var id uint32
	var perCPU []V
	it := m.Iterate()
	for it.Next(&id, &perCPU) {
		f(id, perCPU)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read traffic: %w", err)
	}
	return nil
}
