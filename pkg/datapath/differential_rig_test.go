package datapath_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
	"github.com/sallyport-dev/sallyport/test/reference"
	"github.com/sallyport-dev/sallyport/test/shape"
)

// place is one program on one device.
type place struct {
	name   string
	hook   reference.Hook
	device int
	pass   int32 // the verdict that lets the packet go on, but for tc's
	plain  *runner
	tagged *runner // puts a VLAN tag beside the packet; nil where no tags are
}

func (p place) ingress() bool { return p.hook == reference.DeviceIn || p.hook == reference.LoopbackIn }

// vlanType is 802.1Q's EtherType in network order, on a little-endian machine.
const vlanType = 0x0081

// differential runs generated packets through the programs and the reference.
type differential struct {
	*rig
	world   *reference.World
	gen     *shape.Generator
	places  []place
	granted map[netip.Addr]bool // clients with a live path to the first services, by TCP
	firsts  map[datagramID]bool // fragmented datagrams whose first fragment was free, and passed
}

// datagramID is what the fragments of one packet have in common.
type datagramID struct {
	src, dst netip.Addr
	id       uint32
}

// newDifferential has services that are not enforced beside the others: the reference calls free what goes to them.
func newDifferential(t testing.TB, seed uint64) *differential {
	d := newPlainDifferential(t, seed)
	d.watch(t)
	return d
}

// watch adds services that are not enforced: at ports of everybody, and at ports that others are enforced at.
func (d *differential) watch(t testing.TB) {
	pod := datapath.Service{Target: datapath.TargetPod, Ifindex: d.device(t, lab.PodDevice(0)), Addresses: []netip.Addr{d.Pod.Addr(lab.IPv4), d.Pod.Addr(lab.IPv6)}}
	host := datapath.Service{Target: datapath.TargetHost}
	services := d.d.Services()
	add := func(s datapath.Service, name string, m datapath.Mode, p datapath.Protocol, ports ...uint16) {
		s.ID, s.Name, s.Mode, s.Protocol, s.Ports = uint32(100+len(services)), name, m, p, ports
		if p == datapath.UDP {
			s.Idle = udpIdle * time.Second
		} else {
			s.DenyUDP = m == datapath.Shadow
		}
		services = append(services, s)
	}
	add(host, "shadowed", datapath.Shadow, datapath.TCP, podPort, clientPort)
	add(host, "observed", datapath.Observe, datapath.TCP, podWebPort, 9999)
	add(host, "shadowed-udp", datapath.Shadow, datapath.UDP, hostPort, 9999)
	add(pod, "shadowed-pod", datapath.Shadow, datapath.TCP, hostPort, 9999)
	add(pod, "observed-pod-udp", datapath.Observe, datapath.UDP, hostUDPPort, 9999)
	_, err := d.d.SetServices(services)
	check(t, err)
}

func newPlainDifferential(t testing.TB, seed uint64) *differential {
	r := newRig(t, 65536, 65536)
	r.settle(t)
	d := &differential{rig: r, world: r.world(t), granted: map[netip.Addr]bool{}, firsts: map[datagramID]bool{}}
	d.askRemote(t)
	d.places = d.everyPlace(t)
	var ends [][2]shape.Ends
	for _, at := range d.places {
		ends = append(ends, [2]shape.Ends{d.ends(t, at, lab.IPv4), d.ends(t, at, lab.IPv6)})
	}
	d.gen = shape.NewGenerator(seed, ends)
	r.reset(t)
	d.route(t)
	d.grant(t)
	for _, device := range d.world.Workloads {
		check(t, d.m.SpDevices.Put(uint32(device), &bpf.Device{Facts: podFact}))
	}
	return d
}

// askRemote adds a service on another node, which the node and its second pod may ask.
func (d *differential) askRemote(t testing.TB) {
	addresses := []netip.Addr{remoteAddr(lab.IPv4), remoteAddr(lab.IPv6)}
	_, err := d.d.SetServices(append(d.d.Services(), datapath.Service{ID: remoteID, Name: "remote", Target: datapath.TargetRemote,
		Addresses: addresses, Ports: []uint16{remotePort}}))
	check(t, err)
	d.world.Remote = []reference.Service{{Protocol: packet.TCP, Port: remotePort, Addresses: addresses}}
	d.world.Workloads = []int{d.device(t, lab.PodDevice(1))}
}

// settle waits until the kernel has looked for others with the addresses of the node's links: then it routes them.
func (r *rig) settle(t testing.TB) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		addrs, err := r.Node.Netlink.AddrList(nil, netlink.FAMILY_V6)
		check(t, err)
		if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 }) {
			return
		}
		if time.Now().After(end) {
			t.Fatal("addresses of links are still tentative")
		}
	}
}

// everyPlace lists every program that meets packets for a service, on the devices where it matters.
func (d *differential) everyPlace(t testing.TB) []place {
	uplink, pod0, pod1 := d.device(t, lab.Uplink), d.device(t, lab.PodDevice(0)), d.device(t, lab.PodDevice(1))
	all := []place{
		{name: "sp_dev_in", hook: reference.DeviceIn, device: uplink},
		{name: "sp_dev_in", hook: reference.DeviceIn, device: pod1},
		{name: "sp_bridge_in", hook: reference.DeviceIn, device: uplink},
		{name: "sp_dev_out", hook: reference.DeviceOut, device: uplink},
		{name: "sp_dev_out", hook: reference.DeviceOut, device: pod0},
		{name: "sp_port_out", hook: reference.DeviceOut, device: pod0},
		{name: "sp_pod_out", hook: reference.PodOut, device: pod0},
		{name: "sp_pod_out", hook: reference.PodOut, device: pod1},
		{name: "sp_pod_port_out", hook: reference.PodOut, device: pod0},
		{name: "sp_lo_in", hook: reference.LoopbackIn, device: 1},
		{name: "sp_l3_in", hook: reference.L3In, device: uplink},
		{name: "sp_l3_out", hook: reference.L3Out, device: pod0},
		{name: "sp_cg_in", hook: reference.SocketIn, device: uplink, pass: cgPass},
	}
	if !socketRuns(t) {
		all = slices.DeleteFunc(all, func(p place) bool { return p.hook == reference.SocketIn })
	}
	for i := range all {
		all[i].load(t, d.d.Profile(), d.program(all[i].name))
	}
	return all
}

// load makes the place's runners.
func (p *place) load(t testing.TB, profile datapath.Profile, program *ebpf.Program) {
	p.plain = newRunner(t, program)
	switch p.hook {
	case reference.DeviceOut, reference.PodOut:
		p.tagged = newRunner(t, tagging(t, program, attachType(profile, ebpf.AttachTCXEgress)))
	case reference.DeviceIn, reference.LoopbackIn:
		p.tagged = newRunner(t, tagging(t, program, attachType(profile, ebpf.AttachTCXIngress)))
	}
}

// attachType is what programs of a direction are loaded for: filters of clsact for none.
func attachType(p datapath.Profile, tcx ebpf.AttachType) ebpf.AttachType {
	if p == datapath.ProfileClsact {
		return ebpf.AttachNone
	}
	return tcx
}

// at is the first place of that program.
func (d *differential) at(program string) int {
	return slices.IndexFunc(d.places, func(p place) bool { return p.name == program })
}

// world is what the rig protects, told to the reference.
func (r *rig) world(t testing.TB) *reference.World {
	pod := r.device(t, lab.PodDevice(0))
	addresses := []netip.Addr{r.Pod.Addr(lab.IPv4), r.Pod.Addr(lab.IPv6)}
	w := &reference.World{}
	for port, protocols := range map[uint16][]uint8{hostPort: {packet.TCP}, hostUDPPort: {packet.TCP, packet.UDP}, hostWebPort: {packet.TCP, packet.UDP}} {
		for _, p := range protocols {
			w.Services = append(w.Services, reference.Service{Protocol: p, Port: port})
		}
	}
	for port, protocols := range map[uint16][]uint8{podPort: {packet.TCP}, podUDPPort: {packet.UDP}, podWebPort: {packet.TCP, packet.UDP}} {
		for _, p := range protocols {
			w.Services = append(w.Services, reference.Service{Protocol: p, Port: port, Device: pod, Addresses: addresses})
		}
	}
	links, err := r.Node.Netlink.LinkList()
	check(t, err)
	for _, l := range links {
		addrs, err := r.Node.Netlink.AddrList(l, netlink.FAMILY_ALL)
		check(t, err)
		for _, a := range addrs {
			own, _ := netip.AddrFromSlice(a.IP)
			w.Local = append(w.Local, own.Unmap())
			if b, ok := netip.AddrFromSlice(a.Broadcast); ok {
				w.Shared = append(w.Shared, b.Unmap())
			}
			if anycast := netip.PrefixFrom(own, 64).Masked().Addr(); own.Is6() && !own.Is4In6() && !own.IsLoopback() {
				w.Shared = append(w.Shared, anycast)
			}
		}
	}
	return w
}

// ends are the addresses that packets at a place are made between: mostly those that matter there, of
// everybody else in the lab, and of nobody.
func (d *differential) ends(t testing.TB, at place, f lab.Family) shape.Ends {
	e := shape.Ends{Ports: []uint16{hostPort, podPort, 9999, clientPort, 0}, Wanted: []uint16{hostPort, hostUDPPort, hostWebPort}}
	e.Dst = []netip.Addr{d.Node.Addr(f), d.Node.Addr(f), d.Node.Other(f), f.Loopback()}
	if at.hook == reference.PodOut || at.device == d.device(t, lab.PodDevice(0)) {
		e.Wanted = []uint16{podPort, podUDPPort, podWebPort}
		e.Dst = slices.Repeat([]netip.Addr{d.Pod.Addr(f), d.Pod.Other(f)}, 4)
	}
	e.Dst = append(e.Dst, d.Pods[1].Addr(f), d.Client.Addr(f), d.Pod.Addr(f))
	if at.hook != reference.PodOut && at.hook != reference.SocketIn {
		e.Wanted, e.Ports = append(e.Wanted, remotePort), append(e.Ports, remotePort)
		e.Dst = append(e.Dst, slices.Repeat([]netip.Addr{remoteAddr(f)}, 4)...)
	}
	for _, a := range slices.Concat(d.world.Local, d.world.Shared) {
		if a.Is4() == (f == lab.IPv4) {
			e.Dst = append(e.Dst, a)
		}
	}
	e.Src = []netip.Addr{d.Client.Addr(f), d.Client.Addr(f), d.Client.Other(f), d.Pods[1].Addr(f), d.Node.Addr(f), d.Pod.Addr(f), f.Loopback(), remoteAddr(f)}
	for _, s := range strangers(f) {
		e.Dst, e.Src = append(e.Dst, s), append(e.Src, s)
	}
	mac, err := d.Node.MAC(lab.Uplink)
	check(t, err)
	e.SrcMAC, e.DstMAC = [6]byte{2, 0, 0, 0, 0, 1}, mac
	return e
}

// strangers are addresses of nobody in the lab, some of which no router passes on.
func strangers(f lab.Family) []netip.Addr {
	names := []string{"10.1.0.77", "127.0.0.5", "203.0.113.5", "224.0.0.9", "0.0.0.0", "255.255.255.255", "8.0.0.9"}
	if f == lab.IPv6 {
		names = []string{"fd00:1::77", "fe80::77", "2001:db8::5", "ff02::9", "::", "ff02::1", "2001:db8:86dd::9"}
	}
	var all []netip.Addr
	for _, n := range names {
		all = append(all, netip.MustParseAddr(n))
	}
	return all
}

// route sends what is nobody's by the client, so that no address is in doubt for want of a route.
func (d *differential) route(t testing.TB) {
	for _, f := range lab.Families() {
		gw := d.Client.Addr(f)
		check(t, d.Node.Netlink.RouteAdd(&netlink.Route{LinkIndex: d.device(t, lab.Uplink), Gw: gw.AsSlice()}))
	}
}

// grant gives the client's second addresses a live path to each service.
func (d *differential) grant(t testing.TB) {
	slot := uint32(0)
	for _, f := range lab.Families() {
		client := d.Client.Other(f)
		d.granted[client] = true
		for id, port := range map[uint32]uint16{hostID: hostPort, podID: podPort} {
			check(t, d.m.SpPaths.Put(slot, &bpf.Path{Epoch: 1, ServiceId: id, Client: datapath.ToAddr(client), DeadlineNs: later()}))
			check(t, d.m.SpPathState.Put(slot, &bpf.PathStatus{State: bpf.SallyportSpState(datapath.PathActive)}))
			key := bpf.PathKey{Client: datapath.ToAddr(client), ServiceId: id, Port: port}
			check(t, d.m.SpPathIndex.Put(&key, &bpf.PathRef{Slot: slot, Epoch: 1}))
			slot++
		}
	}
}
