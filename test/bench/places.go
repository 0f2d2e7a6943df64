package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
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

const (
	datagramPort = 8082
	datagramID   = 60000
)

// datagrams adds a UDP service beside the other one, with a path and a flow. A datagram that is denied towards it
// becomes the ICMP error that says so, and is no datagram in the next turn of a run: the one that the service sends
// without a flow stands for it.
func (rig *packetRig) datagrams(client netip.Addr) error {
	service := netip.AddrPortFrom(rig.Pod.Addr(rig.family), datagramPort)
	_, err := rig.d.SetServices(append(rig.d.Services(), datapath.Service{ID: datagramID, Name: "datagrams", Target: datapath.TargetPod,
		Protocol: datapath.UDP, Ports: []uint16{datagramPort}, Ifindex: rig.dev, Addresses: []netip.Addr{service.Addr()}, Idle: time.Hour}))
	if err != nil {
		return err
	}
	_, err = rig.d.OpenPath(datapath.Path{Grant: "01BENCHUDP", Client: client, ServiceID: datagramID, Service: "datagrams",
		Ports: []uint16{datagramPort}, Deadline: datapath.BootTime() + 50*time.Minute})
	if err != nil {
		return err
	}
	in, err := rig.hooked(rig.dev, ebpf.AttachTCXIngress)
	if err != nil {
		return err
	}
	from := netip.AddrPortFrom(client, clientPort)
	stranger := netip.AddrPortFrom(rig.Client.Other(rig.family), clientPort)
	rig.add("UDP, bypassed", rig.Node, datagramAt(rig.hook, rig.dev, from, service), actNext)
	rig.add("UDP, bypassed, from the service", rig.Node, datagramAt(in, rig.dev, service, from), actNext)
	rig.add("UDP, denied, from the service without state", rig.Node, datagramAt(in, rig.dev, service, stranger), actDrop)
	return nil
}

func datagramAt(prog *ebpf.Program, dev int, from, to netip.AddrPort) probe {
	return frameAt(prog, dev, packet.Packet{Src: from, Dst: to, Protocol: packet.UDP, Payload: []byte("a question")})
}

// atSocket adds the backstop, at the control group of the lab.
func (rig *packetRig) atSocket(bypassed netip.AddrPort) error {
	dir, err := os.Open(rig.Cgroup())
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
	rig.add("backstop: empty program at sockets", rig.Pod, tcpAt(empty, dev, bypassed, other, packet.ACK), socketPass)
	rig.add("backstop: unprotected, at a socket without a port", rig.Pod, tcpAt(hook, dev, bypassed, other, packet.ACK), socketPass)
	rig.add("backstop: bypassed", rig.Pod, tcpAt(hook, dev, bypassed, target, packet.ACK), socketPass)
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
		name string
		prog *ebpf.Program
		to   netip.AddrPort
	}{
		{"filter: empty XDP program", empty, netip.AddrPortFrom(target.Addr(), 9999)},
		{"filter: unprotected", hook, netip.AddrPortFrom(target.Addr(), 9999)},
		{"filter: protected", hook, target},
	} {
		probe := tcpAt(c.prog, 0, client, c.to, packet.ACK)
		probe.ctx = nil
		rig.add(c.name, rig.Node, probe, xdpPass)
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
