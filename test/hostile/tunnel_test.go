package hostile

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
	"github.com/sallyport-dev/sallyport/test/packet"
)

const (
	tunnelDevice = "inner0"
	vni          = 5
)

// tunnel is a device of the node at which the packets of another one appear.
type tunnel struct {
	name     string
	families []lab.Family // of what is inside
	ethernet bool         // what is inside has an Ethernet header
	link     func(w *world, parent int) netlink.Link
	wrap     func(inner, outer packet.Packet) packet.Packet
}

func tunnels() []tunnel {
	attrs := netlink.LinkAttrs{Name: tunnelDevice}
	ip := func(a netip.Addr) net.IP { return a.AsSlice() }
	v4 := lab.IPv4
	tagged := func(ids ...uint16) func(inner, _ packet.Packet) packet.Packet {
		return func(inner, _ packet.Packet) packet.Packet { inner.VLANs = ids; return inner }
	}
	return []tunnel{
		{"VXLAN", lab.Families(), true, func(w *world, _ int) netlink.Link {
			return &netlink.Vxlan{LinkAttrs: attrs, VxlanId: vni, Port: packet.VXLANPort, SrcAddr: ip(w.Node.Addr(v4)), Learning: true}
		}, func(i, o packet.Packet) packet.Packet { return i.InVXLAN(o, vni) }},
		{"Geneve", lab.Families(), true, func(w *world, _ int) netlink.Link {
			return &netlink.Geneve{LinkAttrs: attrs, ID: vni, Dport: packet.GenevePort, Remote: ip(w.Client.Addr(v4))}
		}, func(i, o packet.Packet) packet.Packet { return i.InGeneve(o, vni) }},
		{"IPIP", []lab.Family{v4}, false, func(w *world, _ int) netlink.Link {
			return &netlink.Iptun{LinkAttrs: attrs, Local: ip(w.Node.Addr(v4)), Remote: ip(w.Client.Addr(v4))}
		}, packet.Packet.InIP},
		{"6in4", []lab.Family{lab.IPv6}, false, func(w *world, _ int) netlink.Link {
			return &netlink.Sittun{LinkAttrs: attrs, Local: ip(w.Node.Addr(v4)), Remote: ip(w.Client.Addr(v4))}
		}, packet.Packet.InIP},
		{"GRE", lab.Families(), false, func(w *world, _ int) netlink.Link {
			return &netlink.Gretun{LinkAttrs: attrs, Local: ip(w.Node.Addr(v4)), Remote: ip(w.Client.Addr(v4))}
		}, packet.Packet.InGRE},
		{"VLAN", lab.Families(), true, func(_ *world, parent int) netlink.Link {
			return &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: tunnelDevice, ParentIndex: parent}, VlanId: 5}
		}, tagged(5)},
	}
}

// innerAddr are the addresses inside: 1 is the node's.
func innerAddr(f lab.Family, host byte) netip.Addr {
	if f == lab.IPv4 {
		return netip.AddrFrom4([4]byte{10, 9, 0, host})
	}
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 9, 15: host})
}

// open makes the device on the node, or says that the kernel has none such.
func (k tunnel) open(t *testing.T, w *world) {
	t.Helper()
	parent, err := w.Node.Ifindex(lab.Uplink)
	check(t, err)
	link := k.link(w, parent)
	err = w.Node.Netlink.LinkAdd(link)
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("this kernel has no %s devices; make test-kernels boots some that have", k.name)
	}
	check(t, err)
	t.Cleanup(func() { check(t, w.Node.Netlink.LinkDel(link)) })
	for _, f := range lab.Families() {
		a := innerAddr(f, 1)
		check(t, w.Node.Netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen()-8, a.BitLen())}, Flags: unix.IFA_F_NODAD}))
	}
	check(t, w.Node.Netlink.LinkSetUp(link))
	if w.d != nil {
		w.hook(t, tunnelDevice, datapath.RoleUplink)
	}
}

// frames are a SYN to the service inside, and the marker.
func (k tunnel) frames(t *testing.T, w *world, f lab.Family) (attack, marker []byte) {
	t.Helper()
	outer := packet.Packet{SrcMAC: mac(t, w.Client, "eth0"), DstMAC: mac(t, w.Node, lab.Uplink),
		Src: netip.AddrPortFrom(w.Client.Addr(lab.IPv4), clientPort), Dst: netip.AddrPortFrom(w.Node.Addr(lab.IPv4), port)}
	inner := packet.Packet{SrcMAC: outer.SrcMAC, DstMAC: outer.DstMAC, Src: netip.AddrPortFrom(innerAddr(f, 2), clientPort),
		Dst: netip.AddrPortFrom(innerAddr(f, 1), port), Flags: packet.SYN, Window: 65535}
	if k.ethernet {
		inner.DstMAC = mac(t, w.Node, tunnelDevice)
	}
	mark := inner
	mark.Protocol, mark.Dst = packet.UDP, netip.AddrPortFrom(inner.Dst.Addr(), markerPort)
	return k.wrap(inner, outer).Bytes(), k.wrap(mark, outer).Bytes()
}

// TestTunnels: what was inside meets enforcement on the device where it appears.
func TestTunnels(t *testing.T) {
	leak.Check(t)
	control, enforced := newWorld(t, false), newWorld(t, true)
	for _, k := range tunnels() {
		t.Run(k.name, func(t *testing.T) {
			k.open(t, control)
			k.open(t, enforced)
			for _, f := range k.families {
				for w, want := range map[*world]int{control: 1, enforced: 0} {
					syn, marker := k.frames(t, w, f)
					check(t, w.Client.Do(func() error {
						return (way{from: w.Client, device: "eth0"}).send([][]byte{syn, marker})
					}))
					if n := w.judges[w.Node].since(t)["arrived"]; n != want {
						t.Errorf("%v: %d arrived, want %d", f, n, want)
					}
				}
			}
		})
	}
}
