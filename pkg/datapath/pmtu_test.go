package datapath_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	hostBulkPort = 8180
	podBulkPort  = 8181
	hostBulkID   = 11
	podBulkID    = 12
	narrow       = 1300 // MTU of the link in the middle
)

// serveBulk has services that send back what they get.
func (n *node) serveBulk(t *testing.T) {
	t.Helper()
	services := n.d.Services()
	for _, s := range services[:2] {
		s.Name += "-bulk"
		s.ID, s.Ports = hostBulkID, []uint16{hostBulkPort}
		if s.Target == datapath.TargetPod {
			s.ID, s.Ports = podBulkID, []uint16{podBulkPort}
		}
		services = append(services, s)
	}
	_, err := n.d.SetServices(services)
	must(t, err)
	echo := func(c net.Conn) { _, _ = io.Copy(c, c) }
	for _, f := range lab.Families() {
		_, err := n.Node.Serve(netip.AddrPortFrom(unspecified(f), hostBulkPort), echo)
		must(t, err)
		_, err = n.Pod.Serve(netip.AddrPortFrom(unspecified(f), podBulkPort), echo)
		must(t, err)
	}
}

// carry sends a megabyte there and back and compares.
func carry(t *testing.T, n *node, c cell) {
	t.Helper()
	conn, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, 0), c.target())
	if err != nil {
		t.Fatalf("%v; counters:%s", err, n.counters(t))
	}
	defer conn.Close()
	must(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	data := make([]byte, 1<<20)
	rnd := rand.NewChaCha8([32]byte{1})
	_, _ = rnd.Read(data)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, bytes.NewReader(data))
		sent <- err
	}()
	back := sha256.New()
	got, err := io.CopyN(back, conn, int64(len(data)))
	if err != nil {
		conn.Close() // and with it the sender
	}
	serr := <-sent
	if want := sha256.Sum256(data); err != nil || serr != nil || !bytes.Equal(back.Sum(nil), want[:]) {
		t.Fatalf("got %d bytes back (%v, %v); counters:%s", got, err, serr, n.counters(t))
	}
}

// bulkWays are the ways of one client, through the proxy and around it.
func (n *node) bulkWays(t *testing.T, client *lab.Namespace, from func(lab.Family) netip.Addr) {
	for _, f := range lab.Families() {
		for _, c := range []cell{
			{"host", client, from(f), n.Node.Addr(f), hostBulkPort, hostBulkID},
			{"pod", client, from(f), n.Pod.Addr(f), podBulkPort, podBulkID},
		} {
			t.Run(c.name+"/"+f.String()+"/proxied", func(t *testing.T) { carry(t, n, c) })
			t.Run(c.name+"/"+f.String()+"/bypassed", func(t *testing.T) {
				slot := c.path(n, t, time.Minute)
				carry(t, n, c)
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
			})
		}
	}
}

// join connects two namespaces by a link of its own.
func join(t *testing.T, a, b *lab.Namespace, subnet byte, mtu int) {
	t.Helper()
	name, peer := fmt.Sprintf("to%d", subnet), fmt.Sprintf("from%d", subnet)
	must(t, a.Do(func() error {
		fd, err := unix.Open(b.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return a.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu}, PeerName: peer, PeerNamespace: netlink.NsFd(fd)})
	}))
	for i, end := range []struct {
		ns   *lab.Namespace
		name string
	}{{a, name}, {b, peer}} {
		dev, err := end.ns.Netlink.LinkByName(end.name)
		must(t, err)
		for _, f := range lab.Families() {
			must(t, end.ns.Netlink.AddrAdd(dev, &netlink.Addr{IPNet: linkNet(f, subnet, byte(1+i)), Flags: unix.IFA_F_NODAD}))
		}
		must(t, end.ns.Netlink.LinkSetUp(dev))
	}
}

func linkNet(f lab.Family, subnet, host byte) *net.IPNet {
	if f == lab.IPv4 {
		return &net.IPNet{IP: net.IP{10, 9, subnet, host}, Mask: net.CIDRMask(24, 32)}
	}
	ip := make(net.IP, 16)
	ip[0], ip[3], ip[15] = 0xfd, 0x90+subnet, host
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(64, 128)}
}

// via adds a route to everything of the family, or to a network.
func via(t *testing.T, n *lab.Namespace, to *net.IPNet, gw net.IP) {
	t.Helper()
	r := &netlink.Route{Dst: to, Gw: gw}
	if to == nil {
		must(t, n.Netlink.RouteReplace(r))
		return
	}
	must(t, n.Netlink.RouteAdd(r))
}

// behindRouters puts the fourth pod behind the third and the second, with a narrow link between these two, and gives
// its address: client ─1500─ router ─1300─ router ─1500─ node.
func (n *node) behindRouters(t *testing.T) (*lab.Namespace, func(lab.Family) netip.Addr) {
	t.Helper()
	near, far, client := n.Pods[1], n.Pods[2], n.Pods[3]
	join(t, near, far, 1, narrow)
	join(t, far, client, 2, 1500)
	for _, r := range []*lab.Namespace{near, far} {
		for _, s := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			must(t, r.Sysctl(s, "1"))
		}
	}
	addr := func(f lab.Family) netip.Addr {
		a, _ := netip.AddrFromSlice(linkNet(f, 2, 2).IP)
		return a
	}
	for _, f := range lab.Families() {
		network := func(subnet byte) *net.IPNet {
			k := linkNet(f, subnet, 1)
			return &net.IPNet{IP: k.IP.Mask(k.Mask), Mask: k.Mask}
		}
		for _, ns := range []*lab.Namespace{far, client} { // their links to the node are not in use
			dev, err := ns.Netlink.LinkByName("eth0")
			must(t, err)
			must(t, ns.Netlink.LinkSetDown(dev))
		}
		via(t, client, nil, linkNet(f, 2, 1).IP)
		via(t, far, nil, linkNet(f, 1, 1).IP)
		via(t, near, network(2), linkNet(f, 1, 2).IP)
		for _, subnet := range []byte{1, 2} {
			via(t, n.Node, network(subnet), near.Addr(f).AsSlice())
		}
	}
	return client, addr
}

// TestPathMTU: a narrow link in the middle of the way, which only ICMP tells of.
func TestPathMTU(t *testing.T) {
	n := newNodeOn(t, lab.Options{Pods: 4})
	n.copyProxy(t)
	n.serveBulk(t)
	client, from := n.behindRouters(t)
	n.bulkWays(t, client, from)
	c, err := n.d.Counters()
	must(t, err)
	for _, r := range []flow.Reason{flow.ReasonICMPLeg, flow.ReasonICMPLive} {
		if c[r].Packets == 0 {
			t.Errorf("no %s: the way was not narrow; counters:%s", r, n.counters(t))
		}
	}
	if c[flow.ReasonICMPStray].Packets > 0 {
		t.Errorf("counters:%s", n.counters(t))
	}
}

// TestNarrowDevices: the node's own devices carry less than those at the other end of the link, who learn of it by the
// segment size alone. What is proxied is cut to it.
func TestNarrowDevices(t *testing.T) {
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	n.serveBulk(t)
	for _, ns := range []*lab.Namespace{n.Client, n.Pod} { // a veth lets packets pass that are yet to be cut up
		dev, err := ns.Netlink.LinkByName("eth0")
		must(t, err)
		must(t, ns.Netlink.LinkSetGSOMaxSegs(dev, 1))
	}
	for _, name := range []string{lab.Uplink, lab.PodDevice(0)} {
		dev, err := n.Node.Netlink.LinkByName(name)
		must(t, err)
		must(t, n.Node.Netlink.LinkSetMTU(dev, narrow))
	}
	for _, f := range lab.Families() {
		for _, c := range []cell{
			{"host", n.Client, n.Client.Addr(f), n.Node.Addr(f), hostBulkPort, hostBulkID},
			{"pod", n.Pods[1], n.Pods[1].Addr(f), n.Pod.Addr(f), podBulkPort, podBulkID},
		} {
			t.Run(c.name+"/"+f.String(), func(t *testing.T) { carry(t, n, c) })
		}
	}
}
