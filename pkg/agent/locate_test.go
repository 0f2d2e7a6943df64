package agent

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestPlaceOfPod: a pod with two devices is behind both, and no other pod is.
func TestPlaceOfPod(t *testing.T) {
	l := lab.New(t, lab.Options{Pods: 2})
	ns, err := netns.GetFromPath(l.Pod.Path())
	must(t, err)
	defer ns.Close()
	must(t, l.Node.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vethsecond"}, PeerName: "net1", PeerNamespace: netlink.NsFd(int(ns))}))
	second, err := l.Node.Ifindex("vethsecond")
	must(t, err)
	first, err := l.Node.Ifindex(lab.PodDevice(0))
	must(t, err)
	var s policy.ProtectedService
	s.Spec.Addresses = append(s.Spec.Addresses, l.Pod.Addr(lab.IPv4), l.Pod.Addr(lab.IPv6))
	must(t, l.Node.Do(func() error {
		got, err := locator{classify: classifier{pods: []string{"vethpod*"}, px0: func() int { return 0 }}, ports: bridgePorts{}}.find(s)
		if got.device != first || !slices.Equal(got.besides, []int{second}) {
			t.Errorf("the pod is behind %d and %v, want %d and %d", got.device, got.besides, first, second)
		}
		return err
	}))
}

// TestDeviceOfPod: the device of the pod that has an address, behind a bridge too; nothing else is taken for one.
func TestDeviceOfPod(t *testing.T) {
	l := lab.New(t, lab.Options{Pods: 1})
	bridge, port := bridgedPod(t, l)
	direct, err := l.Node.Ifindex(lab.PodDevice(0))
	must(t, err)
	uplink, err := l.Node.Ifindex(lab.Uplink)
	must(t, err)
	devices := []datapath.Device{{Ifindex: bridge.Attrs().Index, Role: datapath.RoleBridge}, {Ifindex: port.Attrs().Index, Role: datapath.RolePodPort},
		{Ifindex: direct, Role: datapath.RolePod}, {Ifindex: uplink, Role: datapath.RoleUplink}}
	on := func(a netip.Addr) (device int) {
		must(t, l.Node.Do(func() error { device = podDevice(a, devices); return nil }))
		return device
	}
	for _, f := range lab.Families() {
		here, there := netip.MustParseAddr("10.50.0.1"), netip.MustParseAddr("10.50.0.2")
		if f == lab.IPv6 {
			here, there = netip.MustParseAddr("fd00:50::1"), netip.MustParseAddr("fd00:50::2")
		}
		meets(t, l, here) // as it does before it asks
		if got := on(there); got != port.Attrs().Index {
			t.Errorf("%v: the pod behind the bridge has the device %d, want %d", f, got, port.Attrs().Index)
		}
		for what, want := range map[netip.Addr]int{l.Pod.Addr(f): direct, l.Client.Addr(f): 0, l.Node.Addr(f): 0, here: 0} {
			if got := on(what); got != want {
				t.Errorf("%v: %s has the device %d, want %d", f, what, got, want)
			}
		}
	}
}

// bridgedPod puts a bridge with networks of its own in front of the lab's pod.
func bridgedPod(t *testing.T, l *lab.Lab) (bridge, port netlink.Link) {
	t.Helper()
	ns, err := netns.GetFromPath(l.Pod.Path())
	must(t, err)
	defer ns.Close()
	must(t, l.Node.Netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
	bridge, err = l.Node.Netlink.LinkByName("br0")
	must(t, err)
	must(t, l.Node.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vethport", MasterIndex: bridge.Attrs().Index}, PeerName: "net1", PeerNamespace: netlink.NsFd(int(ns))}))
	port, err = l.Node.Netlink.LinkByName("vethport")
	must(t, err)
	inside, err := l.Pod.Netlink.LinkByName("net1")
	must(t, err)
	must(t, l.Node.Netlink.LinkSetUp(port))
	address := func(h *netlink.Handle, to netlink.Link, text string) {
		a, err := netlink.ParseAddr(text)
		must(t, err)
		a.Flags = unix.IFA_F_NODAD
		must(t, h.AddrAdd(to, a))
		must(t, h.LinkSetUp(to))
	}
	for _, host := range []string{"10.50.0.%/24", "fd00:50::%/64"} {
		address(l.Node.Netlink, bridge, strings.Replace(host, "%", "1", 1))
		address(l.Pod.Netlink, inside, strings.Replace(host, "%", "2", 1))
	}
	return bridge, port
}

// meets has the pod connect to an address of the node, which makes the kernel know where the pod is.
func meets(t *testing.T, l *lab.Lab, here netip.Addr) {
	t.Helper()
	var served net.Listener
	must(t, l.Node.Do(func() (err error) { served, err = net.Listen("tcp", netip.AddrPortFrom(here, 0).String()); return err }))
	c, err := l.Pod.Dial(t.Context(), netip.AddrPort{}, served.Addr().(*net.TCPAddr).AddrPort())
	must(t, err)
	must(t, errors.Join(c.Close(), served.Close()))
}

// TestIsHere: the node's addresses and its pods' are, behind a bridge too. Where a bridge leads elsewhere as well, what a pod says of an
// address proves nothing.
func TestIsHere(t *testing.T) {
	l := lab.New(t, lab.Options{Pods: 1})
	bridge, _ := bridgedPod(t, l)
	isHere := (&node{around: &surroundings{clock: bootClock()}}).isHere(locator{classify: classifier{pods: []string{"vethport"}, px0: func() int { return 0 }}, ports: bridgePorts{}})
	holds := func(when, address string, want bool) {
		t.Helper()
		must(t, l.Node.Do(func() error {
			here, err := isHere(netip.MustParseAddr(address))
			if here != want {
				t.Errorf("%s: %s is here: %v", when, address, here)
			}
			return err
		}))
	}
	for _, network := range []string{"10.50.0.", "fd00:50::"} {
		meets(t, l, netip.MustParseAddr(network+"1"))
		holds("pods alone", network+"1", true)
		holds("pods alone", network+"2", true)
		holds("pods alone", network+"3", false)
	}
	must(t, l.Node.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wan0", MasterIndex: bridge.Attrs().Index}, PeerName: "wan1"}))
	for _, network := range []string{"10.50.0.", "fd00:50::"} {
		meets(t, l, netip.MustParseAddr(network+"1"))
		holds("with an uplink", network+"1", true)
		holds("with an uplink", network+"2", false)
	}
}

// TestSurroundings: the node's addresses and gateways are read anew when they are a second old, and not before.
func TestSurroundings(t *testing.T) {
	l := lab.New(t, lab.Options{})
	now := time.Hour
	s := &surroundings{clock: clock{boot: func() time.Duration { return now }}}
	own, hop, far := l.Node.Addr(lab.IPv4), l.Client.Addr(lab.IPv4), netip.MustParseAddr("10.77.0.1")
	holds := func(wantGateway bool) {
		t.Helper()
		must(t, l.Node.Do(func() error {
			addresses, gateways, err := s.look()
			if !slices.Contains(addresses, own) || slices.Contains(addresses, hop) || slices.Contains(gateways, hop) != wantGateway {
				t.Errorf("own %v, gateways %v; want %s among the first, %s among the second: %t", addresses, gateways, own, hop, wantGateway)
			}
			return err
		}))
	}
	holds(false)
	must(t, l.Node.Netlink.RouteAdd(&netlink.Route{Dst: netlink.NewIPNet(far.AsSlice()), Gw: hop.AsSlice()}))
	now += surroundingsAge - 1
	holds(false)
	now++
	holds(true)
	must(t, l.Node.Do(func() error {
		all, err := s.own([]netip.Addr{netip.MustParseAddr("127.9.9.9"), hop})
		if !slices.Contains(all, netip.MustParseAddr("127.9.9.9")) || slices.Contains(all, hop) {
			t.Errorf("%v should have what routing takes for the node's own, and not %s", all, hop)
		}
		return err
	}))
}
