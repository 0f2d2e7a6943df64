package lab

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Uplink is the name of the node's device towards the client.
const Uplink = "up0"

// PodDevice is the name of the node's device towards the pod with that index.
func PodDevice(index int) string {
	if index == 0 {
		return "vethpod"
	}
	return fmt.Sprintf("vethpod%d", index+1)
}

// Family is an IP family.
type Family int

// The two families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families lists both.
func Families() []Family { return []Family{IPv4, IPv6} }

// String is "IPv4" or "IPv6".
func (f Family) String() string { return fmt.Sprintf("IPv%d", int(f)) }

// Loopback is the family's loopback address.
func (f Family) Loopback() netip.Addr {
	if f == IPv4 {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

// side is one end of a link.
type side struct {
	ns     *Namespace
	device string
	host   byte // last byte of the side's first address
	second bool // has a second address, host+1, which is used only when asked for
}

// link is a veth pair in a subnet of its own.
type link struct {
	subnet  byte // 10.subnet.0.0/24 and fd00:subnet::/64
	mtu     int
	ifindex int // of the node's device; 0: the kernel's choice
	node    side
	leaf    side // has its default routes by the node
	routed  bool // but the leaf has some already
	whenUp  func()
}

// besideSubnets is how far the subnets of a lab are from those of the one that it is beside.
const besideSubnets = 20

func (l *Lab) build(o Options) error {
	wire, err := l.wire(o)
	if err != nil {
		return err
	}
	if l.Node, err = l.newNamespace("node"); err != nil {
		return err
	}
	if err := l.Node.makeRouter(); err != nil {
		return err
	}
	wire.node = side{l.Node, Uplink, 1, false}
	links := []link{wire}
	for i := range o.Pods {
		pod, err := l.newNamespace(fmt.Sprintf("pod%d", i))
		if err != nil {
			return err
		}
		l.Pods = append(l.Pods, pod)
		links = append(links, link{subnet: wire.subnet + byte(1+i), mtu: 1500, node: side{l.Node, PodDevice(i), 1, false}, leaf: side{pod, "eth0", 2, true}})
	}
	l.Pod = l.Pods[0]
	l.links = links
	for _, k := range links {
		k.node.note(k.subnet)
		k.leaf.note(k.subnet)
	}
	if o.Unplugged {
		return nil
	}
	return l.Plug()
}

// wire is the link between the client, which is new or that of the lab beside, and a node that is not there yet.
func (l *Lab) wire(o Options) (k link, err error) {
	if o.Beside != nil {
		l.Client, l.beside = o.Beside.Client, o.Beside
		return link{subnet: 1 + besideSubnets, mtu: o.UplinkMTU, leaf: side{l.Client, "eth1", 2, true}, routed: true}, nil
	}
	l.Client, err = l.newNamespace("client")
	return link{subnet: 1, mtu: o.UplinkMTU, leaf: side{l.Client, "eth0", 2, true}}, err
}

// Plug makes the devices of a lab that was built with Options.Unplugged.
func (l *Lab) Plug() error {
	for _, k := range l.links {
		if err := k.connect(); err != nil {
			return fmt.Errorf("connect %s to %s: %w", k.leaf.ns.Name, k.node.ns.Name, err)
		}
	}
	l.links = nil
	if l.beside == nil {
		return nil
	}
	return l.join()
}

// join has the client forward between the two nodes, for them and for the pods of both.
func (l *Lab) join() error {
	if err := l.Client.makeRouter(); err != nil {
		return err
	}
	for _, f := range Families() {
		for _, n := range []struct {
			ns     *Namespace
			subnet byte
		}{{l.beside.Node, 1}, {l.Node, 1 + besideSubnets}} {
			r := &netlink.Route{Gw: address(f, n.subnet, 2).AsSlice()}
			if err := n.ns.Netlink.RouteAdd(r); err != nil {
				return fmt.Errorf("add default route of a node by the client: %w", err)
			}
		}
		for i := range l.Pods { // the other node's are where the client's default route goes
			subnet := byte(2 + besideSubnets + i)
			r := &netlink.Route{Dst: ipNet(f, subnet, 0), Gw: address(f, 1+besideSubnets, 1).AsSlice()}
			if err := l.Client.Netlink.RouteAdd(r); err != nil {
				return fmt.Errorf("add route to %s: %w", l.Pods[i].Name, err)
			}
		}
	}
	return nil
}

// makeRouter turns forwarding and strict reverse path filtering on, before devices appear.
func (n *Namespace) makeRouter() error {
	for _, s := range []string{
		"ipv4/ip_forward", "ipv6/conf/all/forwarding",
		"ipv4/conf/all/rp_filter", "ipv4/conf/default/rp_filter", "ipv4/conf/lo/rp_filter",
	} {
		if err := n.Sysctl(s, "1"); err != nil {
			return err
		}
	}
	return nil
}

func (k link) connect() error {
	veth := &netlink.Veth{
		LinkAttrs:        netlink.LinkAttrs{Name: k.node.device, MTU: k.mtu, Index: k.ifindex, HardwareAddr: k.node.ether(k.subnet)},
		PeerName:         k.leaf.device,
		PeerNamespace:    netlink.NsFd(int(k.leaf.ns.handle)),
		PeerHardwareAddr: k.leaf.ether(k.subnet),
	}
	if err := k.node.ns.Netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	for _, s := range []side{k.node, k.leaf} { // both up first, so that addresses find a carrier
		if err := s.up(); err != nil {
			return err
		}
	}
	if k.whenUp != nil {
		k.whenUp()
	}
	for _, s := range []side{k.node, k.leaf} {
		for _, f := range Families() {
			if err := s.address(f, k.subnet); err != nil {
				return err
			}
		}
		if err := s.settle(k.subnet); err != nil {
			return err
		}
	}
	if k.routed {
		return nil
	}
	return k.routes()
}

func (s side) up() error {
	dev, err := s.ns.Netlink.LinkByName(s.device)
	if err != nil {
		return fmt.Errorf("find %s: %w", s.device, err)
	}
	if err := s.ns.Netlink.LinkSetUp(dev); err != nil {
		return fmt.Errorf("set %s up: %w", s.device, err)
	}
	return nil
}

// ether is the same in every lab, and so is the address of the link: what is drawn from a seed can be drawn again.
func (s side) ether(subnet byte) net.HardwareAddr {
	return net.HardwareAddr{2, 0, 0, 0, subnet, s.host}
}

// own lists the side's addresses in one family.
func (s side) own(f Family, subnet byte) []netip.Addr {
	all := []netip.Addr{address(f, subnet, s.host)}
	if s.second {
		all = append(all, address(f, subnet, s.host+1))
	}
	return all
}

// note has the namespace know its addresses, which the device may get later.
func (s side) note(subnet byte) {
	for _, f := range Families() {
		s.ns.addrs[f] = append(s.ns.addrs[f], s.own(f, subnet)...)
	}
}

// address gives the side its addresses in one family.
func (s side) address(f Family, subnet byte) error {
	dev, err := s.ns.Netlink.LinkByName(s.device)
	if err != nil {
		return fmt.Errorf("find %s: %w", s.device, err)
	}
	for i := range s.own(f, subnet) {
		a := &netlink.Addr{IPNet: ipNet(f, subnet, s.host+byte(i)), Flags: unix.IFA_F_NODAD}
		if i > 0 { // deprecated from the start: the kernel takes it as a source only when it was asked to
			a.ValidLft = int((24 * time.Hour).Seconds())
		}
		if err := s.ns.Netlink.AddrAdd(dev, a); err != nil {
			return fmt.Errorf("add %s to %s: %w", a.IPNet, s.device, err)
		}
	}
	return nil
}

// settleTime bounds the wait for the kernel to take a new address into its routes.
const settleTime = 10 * time.Second

// settle waits until the namespace takes every address of the side for its own. Linux enters the local
// route of an IPv6 address from a work queue, also without duplicate address detection; until then
// the namespace asks its neighbours for its own address.
func (s side) settle(subnet byte) error {
	for _, f := range Families() {
		for _, a := range s.own(f, subnet) {
			if err := s.ns.awaitLocal(a); err != nil {
				return err
			}
		}
	}
	return nil
}

func (n *Namespace) awaitLocal(a netip.Addr) error {
	for end := time.Now().Add(settleTime); ; time.Sleep(time.Millisecond) {
		routes, err := n.Netlink.RouteGet(a.AsSlice())
		if err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s is not local to %s after %v: %v, %w", a, n.Name, settleTime, routes, err)
		}
	}
}

// routes sends everything of the leaf by the node.
func (k link) routes() error {
	dev, err := k.leaf.ns.Netlink.LinkByName(k.leaf.device)
	if err != nil {
		return fmt.Errorf("find %s: %w", k.leaf.device, err)
	}
	for _, f := range Families() {
		via := address(f, k.subnet, k.node.host)
		r := &netlink.Route{LinkIndex: dev.Attrs().Index, Gw: via.AsSlice()}
		if err := k.leaf.ns.Netlink.RouteAdd(r); err != nil {
			return fmt.Errorf("add default route by %s: %w", via, err)
		}
	}
	return nil
}

func address(f Family, subnet, host byte) netip.Addr {
	if f == IPv4 {
		return netip.AddrFrom4([4]byte{10, subnet, 0, host})
	}
	return netip.AddrFrom16([16]byte{0: 0xfd, 3: subnet, 15: host})
}

func ipNet(f Family, subnet, host byte) *net.IPNet {
	bits := 64
	if f == IPv4 {
		bits = 24
	}
	a := address(f, subnet, host)
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}
}
