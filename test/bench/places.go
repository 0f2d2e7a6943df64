package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// replies adds what the service sends, where it comes from its pod.
func (rig *packetRig) replies(bypassed, steered netip.AddrPort) error {
	in, err := rig.hooked(rig.dev, ebpf.AttachTCXIngress)
	if err != nil {
		return err
	}
	service := rig.target(rig.family)
	rig.cell("bypassed, from the service", in, rig.dev, service, bypassed, packet.ACK, actNext)
	rig.cell("denied, from the service without state", in, rig.dev, service, steered, packet.ACK, actRedirect)
	return nil
}

// closer is a clean-up.
type closer func() error

func (c closer) Close() error { return c() }

// atSocket adds the backstop, attached to a control group of its own: nobody is in it.
func (rig *packetRig) atSocket(bypassed netip.AddrPort) error {
	root, err := datapath.FindCgroup()
	if err != nil {
		return err
	}
	group, err := os.MkdirTemp(root, "sallyport-bench-")
	if err != nil {
		return fmt.Errorf("make control group: %w", err)
	}
	rig.last = append(rig.last, closer(func() error { return os.Remove(group) }))
	if _, err := rig.d.AttachBackstop(group); err != nil {
		return err
	}
	dir, err := os.Open(group)
	if err != nil {
		return fmt.Errorf("open control group: %w", err)
	}
	defer dir.Close()
	hook, err := rig.hooked(int(dir.Fd()), ebpf.AttachCGroupInetIngress)
	if err != nil {
		return err
	}
	empty, err := emptyProgram(ebpf.CGroupSKB, ebpf.AttachCGroupInetIngress, socketPass)
	if empty, err = hold(rig, empty, err); err != nil {
		return err
	}
	dev, err := rig.Pod.Ifindex("eth0")
	if err != nil {
		return err
	}
	target := rig.target(rig.family)
	other := netip.AddrPortFrom(target.Addr(), 9999)
	rig.cellIn(rig.Pod, "backstop: empty program at sockets", empty, dev, bypassed, other, packet.ACK, socketPass)
	rig.cellIn(rig.Pod, "backstop: unprotected", hook, dev, bypassed, other, packet.ACK, socketPass)
	rig.cellIn(rig.Pod, "backstop: bypassed", hook, dev, bypassed, target, packet.ACK, socketPass)
	return nil
}

// atFilter adds the filter of an uplink. In a test run there is no device.
func (rig *packetRig) atFilter(uplink int) error {
	if _, err := rig.d.SetXDP(uplink, datapath.XDPNative); err != nil {
		return err
	}
	dev, err := netlink.LinkByIndex(uplink)
	if err != nil {
		return fmt.Errorf("find uplink: %w", err)
	}
	xdp := dev.Attrs().Xdp
	if xdp == nil || !xdp.Attached {
		return errors.New("no filter on the uplink")
	}
	hook, err := ebpf.NewProgramFromID(ebpf.ProgramID(xdp.ProgId))
	if hook, err = hold(rig, hook, err); err != nil {
		return err
	}
	empty, err := emptyProgram(ebpf.XDP, ebpf.AttachXDP, xdpPass)
	if empty, err = hold(rig, empty, err); err != nil {
		return err
	}
	if err := rig.dispatch(empty); err != nil {
		return err
	}
	client := netip.AddrPortFrom(rig.Client.Addr(rig.family), clientPort)
	target := rig.target(rig.family)
	for _, c := range []struct {
		name  string
		prog  *ebpf.Program
		to    netip.AddrPort
		flags uint8
	}{
		{"filter: empty XDP program", empty, netip.AddrPortFrom(target.Addr(), 9999), packet.ACK},
		{"filter: unprotected", hook, netip.AddrPortFrom(target.Addr(), 9999), packet.ACK},
		{"filter: protected", hook, target, packet.ACK},
	} {
		rig.cell(c.name, c.prog, 0, client, c.to, c.flags, xdpPass)
		rig.cells[len(rig.cells)-1].probe.ctx = nil
	}
	return nil
}

// dispatch attaches an XDP program to the client's device: one that is attached nowhere costs each test run a
// change of the kernel's dispatcher, which takes milliseconds.
func (rig *packetRig) dispatch(p *ebpf.Program) error {
	dev, err := rig.Client.Ifindex("eth0")
	if err != nil {
		return err
	}
	return rig.Client.Do(func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: p, Interface: dev, Flags: link.XDPDriverMode})
		_, err = hold(rig, l, err)
		return err
	})
}

// cellIn adds a packet on a device of another namespace than the node's.
func (rig *packetRig) cellIn(ns *lab.Namespace, name string, prog *ebpf.Program, dev int, from, to netip.AddrPort, flags uint8, verdict int32) {
	rig.cell(name, prog, dev, from, to, flags, verdict)
	rig.cells[len(rig.cells)-1].ns = ns
}
