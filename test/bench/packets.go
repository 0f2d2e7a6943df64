package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// groupPackets are the nanoseconds of one packet in a program, with those of the test run itself, which
// are in every figure alike.
const groupPackets = "nanoseconds a packet"

const (
	clientPort = 40000
	// The last two bytes of an address, behind an Ethernet header.
	source4, source6           = 14 + 14, 14 + 22
	destination4, destination6 = 14 + 18, 14 + 38
)

// cell is one packet at one program, and the verdict that shows that it is the case it claims to be.
type cell struct {
	name    string
	probe   probe
	verdict int32
	ns      *lab.Namespace // of the device
}

// packetRig is a node whose programs are run by hand, in one family.
type packetRig struct {
	*node
	family  lab.Family
	dev     int           // the pod's
	hook    *ebpf.Program // towards the pod
	closers []io.Closer
	cells   []cell
}

func measurePackets(ctx context.Context, p plan, r *results) error {
	for _, f := range lab.Families() {
		if err := packetsOf(ctx, p, r, f); err != nil {
			return fmt.Errorf("%v: %w", f, err)
		}
	}
	return nil
}

// packetsOf has one rig for each number of paths and of services, all there at once, so that their cells
// can take turns.
func packetsOf(ctx context.Context, p plan, r *results, f lab.Family) (err error) {
	var cells []cell
	for _, rig := range packetRigs(p) {
		made, rerr := newPacketRig(ctx, f, rig)
		if rerr != nil {
			return rerr
		}
		defer func() { err = errors.Join(err, made.close()) }()
		cells = append(cells, made.cells...)
	}
	return runCells(p, r, cells)
}

// rigPlan is a datapath and what it is filled with.
type rigPlan struct {
	cf   datapath.Config
	fill func(*packetRig) error
}

func packetRigs(p plan) []rigPlan {
	many := datapath.Config{MaxPaths: 65536, MaxFlows: 131072, RingBytes: 32 << 20} // each flow has room for its record
	var all []rigPlan
	for _, n := range pick(p, []int{1, 1000, 65536}, []int{1}) {
		all = append(all, rigPlan{many, func(rig *packetRig) error { return rig.paths(n) }})
	}
	for _, n := range pick(p, []int{1, 100, 10000}, []int{100}) {
		all = append(all, rigPlan{datapath.Config{}, func(rig *packetRig) error { return rig.services(n) }})
	}
	return all
}

// newPacketRig leaves nothing behind when it fails.
func newPacketRig(ctx context.Context, f lab.Family, p rigPlan) (*packetRig, error) {
	n, err := newNode(ctx, "packets", 1, p.cf)
	if err != nil {
		return nil, err
	}
	rig := &packetRig{node: n, family: f}
	err = n.Node.Do(func() error {
		if rig.dev, err = n.Node.Ifindex(lab.PodDevice(0)); err != nil {
			return err
		}
		if rig.hook, err = rig.hooked(rig.dev, ebpf.AttachTCXEgress); err != nil {
			return err
		}
		return p.fill(rig)
	})
	if err != nil {
		return nil, errors.Join(err, rig.close())
	}
	return rig, nil
}

func (rig *packetRig) close() error {
	var errs []error
	for _, c := range rig.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(append(errs, rig.node.close())...)
}

// hold closes with the rig what it is given.
func hold[T io.Closer](rig *packetRig, c T, err error) (T, error) {
	if err == nil {
		rig.closers = append(rig.closers, c)
	}
	return c, err
}

// hooked is the program that a device's packets meet.
func (rig *packetRig) hooked(dev int, attach ebpf.AttachType) (*ebpf.Program, error) {
	p, err := attached(dev, attach)
	return hold(rig, p, err)
}

// turning is a driver of the program towards the pod's device.
func (rig *packetRig) turning(target *ebpf.Program, offset int16, n int) (*ebpf.Program, error) {
	d, err := turns(target, ebpf.AttachTCXEgress, offset, int32(n))
	d, err = hold(rig, d, err)
	return d.Program, err
}

// lookingUp is a program that looks into a hash like that of the flows, and no more.
func (rig *packetRig) lookingUp(n int) (*ebpf.Program, error) {
	found, err := filepath.Glob(filepath.Join(rig.cf.Dir, "v*", "maps", "sp_flows"))
	if err != nil || len(found) != 1 {
		return nil, fmt.Errorf("find table of flows: %v, %w", found, err)
	}
	flows, err := ebpf.LoadPinnedMap(found[0], nil)
	if err != nil {
		return nil, fmt.Errorf("open table of flows: %w", err)
	}
	defer flows.Close()
	d, err := lookUp(flows, ebpf.AttachTCXEgress, n)
	d, err = hold(rig, d, err)
	return d.Program, err
}

// runCells takes the cells in turns, so that what disturbs the machine disturbs them alike.
func runCells(p plan, r *results, cells []cell) error {
	for _, c := range cells {
		if err := c.ns.Do(c.check); err != nil {
			return err
		}
	}
	for range max(3, 3*p.rounds) {
		for _, c := range cells {
			var cost float64
			err := c.ns.Do(func() (err error) {
				cost, err = c.probe.cost(pick(p, 15, 5), 4000)
				return err
			})
			if err != nil {
				return fmt.Errorf("measure %s: %w", c.name, err)
			}
			r.add(groupPackets, c.name, "ns", cost)
		}
	}
	return nil
}

func (c cell) check() error {
	verdict, err := c.probe.send()
	if err == nil && verdict != c.verdict {
		err = fmt.Errorf("verdict %d, want %d", verdict, c.verdict)
	}
	if err != nil {
		return fmt.Errorf("try %s: %w", c.name, err)
	}
	return nil
}

// cell adds a TCP packet that a program sees on a device of the node.
func (rig *packetRig) cell(name string, prog *ebpf.Program, dev int, from, to netip.AddrPort, flags uint8, verdict int32) {
	rig.add(name, rig.Node, tcpAt(prog, dev, from, to, flags), verdict)
}

func (rig *packetRig) add(name string, ns *lab.Namespace, p probe, verdict int32) {
	rig.cells = append(rig.cells, cell{fmt.Sprintf("%s/%v", name, rig.family), p, verdict, ns})
}

func tcpAt(prog *ebpf.Program, dev int, from, to netip.AddrPort, flags uint8) probe {
	return frameAt(prog, dev, packet.Packet{Src: from, Dst: to, Flags: flags, Seq: 1000, Ack: 2000, Window: 65535})
}

// frameAt makes a packet as the device sees it.
func frameAt(prog *ebpf.Program, dev int, p packet.Packet) probe {
	p.SrcMAC, p.DstMAC = [6]byte{2, 0, 0, 0, 0, 1}, [6]byte{2, 0, 0, 0, 0, 2}
	return probe{prog: prog, ctx: &skBuff{Ifindex: uint32(dev)}, frame: p.Bytes()}
}

// many is a range of addresses; numbered gives one of them.
func many(f lab.Family) netip.Addr {
	if f == lab.IPv4 {
		return netip.MustParseAddr("10.200.0.0")
	}
	return netip.MustParseAddr("fd00:200::")
}

// numbered is the address with its last two bytes replaced.
func numbered(a netip.Addr, n int) netip.Addr {
	b := a.AsSlice()
	b[len(b)-2], b[len(b)-1] = byte(n>>8), byte(n)
	out, _ := netip.AddrFromSlice(b)
	return out
}

// at gives the offset for the rig's family.
func (rig *packetRig) at(four, six int16) int16 {
	if rig.family == lab.IPv4 {
		return four
	}
	return six
}

// paths makes so many paths, each with one live flow. What is random is the flow; an empty program gets the
// same packets.
func (rig *packetRig) paths(n int) error {
	if err := rig.protect(); err != nil {
		return err
	}
	for i := range n {
		if err := rig.bypass(i); err != nil {
			return err
		}
	}
	empty, err := emptyProgram(ebpf.SchedCLS, ebpf.AttachTCXEgress, actNext)
	if empty, err = hold(rig, empty, err); err != nil {
		return err
	}
	if n == 1 {
		if err := rig.single(empty); err != nil {
			return err
		}
	}
	from, offset := netip.AddrPortFrom(many(rig.family), clientPort), rig.at(source4, source6)
	one, err := rig.lookingUp(n)
	if err != nil {
		return err
	}
	rig.cell("one look-up, "+counted(n, "flow")+" at random", one, rig.dev, from, rig.target(rig.family), packet.ACK, actNext)
	for _, c := range []struct {
		name   string
		target *ebpf.Program
	}{{"empty program", empty}, {"bypassed", rig.hook}} {
		prog, err := rig.turning(c.target, offset, n)
		if err != nil {
			return err
		}
		rig.cell(c.name+", "+counted(n, "path")+" at random", prog, rig.dev, from, rig.target(rig.family), packet.ACK, actNext)
	}
	return nil
}

// bypass opens path number i and a flow of it, by the SYN that does it on a node.
func (rig *packetRig) bypass(i int) error {
	client := numbered(many(rig.family), i)
	if _, err := rig.openPath(client, 50*time.Minute); err != nil {
		return err
	}
	verdict, err := tcpAt(rig.hook, rig.dev, netip.AddrPortFrom(client, clientPort), rig.target(rig.family), packet.SYN).send()
	if err == nil && verdict != actNext {
		err = fmt.Errorf("open flow %d: verdict %d, want %d", i, verdict, actNext)
	}
	return err
}

// single adds packets each of another kind, and the empty program that they are compared with.
func (rig *packetRig) single(empty *ebpf.Program) error {
	uplink, err := rig.Node.Ifindex(lab.Uplink)
	if err != nil {
		return err
	}
	in, err := rig.hooked(uplink, ebpf.AttachTCXIngress)
	if err != nil {
		return err
	}
	target := rig.target(rig.family)
	other := netip.AddrPortFrom(target.Addr(), 9999)
	bypassed := netip.AddrPortFrom(many(rig.family), clientPort)
	steered := netip.AddrPortFrom(rig.Client.Addr(rig.family), clientPort)
	stranger := netip.AddrPortFrom(rig.Client.Other(rig.family), clientPort)
	rig.cell("empty program", empty, rig.dev, steered, other, packet.ACK, actNext)
	rig.cell("unprotected, out to a pod", rig.hook, rig.dev, steered, other, packet.ACK, actNext)
	rig.cell("unprotected, in from the uplink", in, uplink, steered, other, packet.ACK, actNext)
	rig.cell("bypassed", rig.hook, rig.dev, bypassed, target, packet.ACK, actNext)
	rig.cell("bypassed, in from the uplink on its way to the pod", in, uplink, bypassed, target, packet.ACK, actNext)
	rig.cell("steered, SYN", rig.hook, rig.dev, steered, target, packet.SYN, actRedirect)
	rig.cell("steered", rig.hook, rig.dev, steered, target, packet.ACK, actRedirect)
	rig.cell("denied, no state", rig.hook, rig.dev, stranger, target, packet.ACK, actRedirect)
	return errors.Join(rig.replies(bypassed, steered), rig.datagrams(bypassed.Addr()), rig.atSocket(bypassed), rig.atFilter(uplink))
}

// services protects so many, and steers a flow to each. What is random is the service.
func (rig *packetRig) services(n int) error {
	from := netip.AddrPortFrom(rig.Client.Addr(rig.family), clientPort)
	var all []datapath.Service
	for i := range n {
		all = append(all, datapath.Service{ID: uint32(i + 1), Name: fmt.Sprintf("service-%d", i), Target: datapath.TargetPod,
			Ports: []uint16{servicePort}, Ifindex: rig.dev, Addresses: []netip.Addr{numbered(many(rig.family), i)}})
	}
	if _, err := rig.d.SetServices(all); err != nil {
		return err
	}
	for _, s := range all {
		verdict, err := tcpAt(rig.hook, rig.dev, from, netip.AddrPortFrom(s.Addresses[0], servicePort), packet.SYN).send()
		if err == nil && verdict != actRedirect {
			err = fmt.Errorf("steer to %s: verdict %d, want %d", s.Name, verdict, actRedirect)
		}
		if err != nil {
			return err
		}
	}
	prog, err := rig.turning(rig.hook, rig.at(destination4, destination6), n)
	if err != nil {
		return err
	}
	to := netip.AddrPortFrom(many(rig.family), servicePort)
	rig.cell("steered, "+counted(n, "service")+" at random", prog, rig.dev, from, to, packet.ACK, actRedirect)
	return nil
}
