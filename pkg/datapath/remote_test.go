package datapath_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// newRemoteNode is a node whose workloads ask for a service on another one: the lab's client.
func newRemoteNode(t *testing.T, profile datapath.Profile, o lab.Options) *node {
	t.Helper()
	n := newNodeOn(t, o, func(c *datapath.Config) { c.Profile = profile })
	n.serveRemote(t)
	n.knowDevices(t, lab.PodDevice(0), lab.PodDevice(1))
	n.askRemote(t)
	n.copyProxy(t)
	return n
}

// serveRemote has the other node say whom it saw.
func (n *node) serveRemote(t *testing.T) {
	t.Helper()
	for _, f := range lab.Families() {
		_, err := n.Client.WhoAnswers(netip.AddrPortFrom(unspecified(f), remotePort))
		must(t, err)
	}
}

// askRemote writes the service into the tables, at addresses besides the client's.
func (n *node) askRemote(t *testing.T, besides ...netip.Addr) {
	t.Helper()
	s := datapath.Service{ID: remoteID, Name: "remote", Target: datapath.TargetRemote, Ports: []uint16{remotePort, remoteBulkPort},
		Addresses: append([]netip.Addr{n.Client.Addr(lab.IPv4), n.Client.Addr(lab.IPv6)}, besides...)}
	_, err := n.d.SetServices(append(n.localServices(), s))
	must(t, err)
}

func (n *node) localServices() []datapath.Service {
	return slices.DeleteFunc(n.d.Services(), func(s datapath.Service) bool { return s.Target == datapath.TargetRemote })
}

// knowDevices says which devices lead to pods, and holds those to their addresses.
func (n *node) knowDevices(t *testing.T, pods ...string) {
	t.Helper()
	facts := map[int]datapath.DeviceFacts{n.ifindex(t, lab.Uplink): {Uplink: true}}
	for _, name := range pods {
		facts[n.ifindex(t, name)] = datapath.DeviceFacts{Pod: true, BoundIPv4: true, BoundIPv6: true}
	}
	must(t, n.d.SetDevices(facts))
}

const remoteBulkPort = 5433

// remoteCells are those who ask for the service on the other node.
func (n *node) remoteAskers() (out []cell) {
	for _, f := range lab.Families() {
		out = append(out, cell{"node/" + f.String(), n.Node, n.Node.Addr(f), n.Client.Addr(f), remotePort, remoteID},
			cell{"pod/" + f.String(), n.Pods[1], n.Pods[1].Addr(f), n.Client.Addr(f), remotePort, remoteID})
	}
	return out
}

// untouchedBy holds that the programs took nothing to the proxy, and reset nothing.
func (n *node) untouchedBy(t *testing.T, f func()) {
	t.Helper()
	toPx := func() uint64 {
		return n.count(t, flow.ReasonPxAccept) + n.count(t, flow.ReasonPxUp) + n.count(t, flow.ReasonStray)
	}
	before := toPx()
	f()
	if after := toPx(); after != before {
		t.Errorf("%d packets went to the proxy or from it; counters:%s", after-before, n.counters(t))
	}
}

// TestRemote: connections of the node's own clients and of its pods go by the proxy, with their addresses; one that was there before
// the service is reset; when it is no more, new ones go their way; a datapath that is opened again knows it.
func TestRemote(t *testing.T) { eachProfile(t, testRemote) }

func testRemote(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newRemoteNode(t, profile, lab.Options{Pods: 2})
	for _, c := range n.remoteAskers() {
		t.Run(c.name, func(t *testing.T) {
			n.wantSays(t, c, "proxy")
			must(t, n.setServices(n.localServices()))
			n.wantSays(t, c, "service")
			conn, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, 0), c.target())
			must(t, err)
			defer conn.Close()
			_, err = lab.Ask(conn)
			must(t, err)
			n.askRemote(t)
			if err := n.untilReset(t, conn); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
				t.Errorf("a connection from before ended with %v; counters:%s", err, n.counters(t))
			}
			n.wantSays(t, c, "proxy")
		})
	}
	traffic, err := n.d.Traffic()
	must(t, err)
	if _, ok := traffic[remoteID]; ok {
		t.Error("volumes are compared that no socket here tells of")
	}
	before := n.d.Services()
	must(t, n.d.Close())
	n.open(t)
	if after := n.d.Services(); !sameServices(before, after) {
		t.Errorf("services are %+v after a restart, %+v before", after, before)
	}
	must(t, n.attachAll(n.d))
	for _, c := range n.remoteAskers() {
		n.wantSays(t, c, "proxy")
	}
}

func (n *node) setServices(all []datapath.Service) error {
	_, err := n.d.SetServices(all)
	return err
}

// sameServices compares what the table keeps, whatever its order.
func sameServices(a, b []datapath.Service) bool {
	text := func(all []datapath.Service) (out []string) {
		for _, s := range all {
			slices.Sort(s.Ports)
			slices.SortFunc(s.Addresses, netip.Addr.Compare)
			out = append(out, fmt.Sprint(s.ID, s.Name, s.Target, s.Addresses, s.Ports))
		}
		slices.Sort(out)
		return out
	}
	return slices.Equal(text(a), text(b))
}

// untilReset writes until the connection is over.
func (n *node) untilReset(t *testing.T, conn net.Conn) error {
	t.Helper()
	must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	for {
		if _, err := conn.Write([]byte("more\n")); err != nil {
			return err
		}
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			return err
		}
	}
}

// TestRemoteBehindNAT: a pod's address is translated on its way out, and conntrack drops what it does not understand: each
// connection is seen once on each way.
func TestRemoteBehindNAT(t *testing.T) {
	t.Parallel()
	n := newRemoteNode(t, datapath.ProfileAuto, lab.Options{Pods: 2})
	n.rules(t, `table inet nat {
	chain prerouting { type filter hook prerouting priority 0; ct state invalid counter drop; }
	chain forward { type filter hook forward priority 0; ct state invalid counter drop; }
	chain output { type filter hook output priority 0; ct state invalid counter drop; }
	chain input { type filter hook input priority 0; ct state invalid counter drop; }
	chain postrouting { type nat hook postrouting priority 100; oifname "`+lab.Uplink+`" masquerade; }
}`)
	for _, f := range lab.Families() {
		for name, client := range map[string]*lab.Namespace{"pod": n.Pods[1], "node": n.Node} {
			t.Run(name+"/"+f.String(), func(t *testing.T) {
				before := n.count(t, flow.ReasonPxUp)
				_, seen, err := client.Ask(within(t), netip.AddrPortFrom(client.Addr(f), 0), netip.AddrPortFrom(n.Client.Addr(f), remotePort))
				if err != nil || seen.Addr() != n.Node.Addr(f) || n.count(t, flow.ReasonPxUp) == before {
					t.Errorf("seen as %v (%v); counters:%s", seen, err, n.counters(t))
				}
			})
		}
	}
}

// TestRemoteOfOthers: who is no workload of this node goes his way, whatever the node does with his address.
func TestRemoteOfOthers(t *testing.T) {
	t.Parallel()
	n := newRemoteNode(t, datapath.ProfileAuto, lab.Options{Pods: 2})
	n.knowDevices(t, lab.PodDevice(0)) // the second pod is a machine of somebody
	ask := func(t *testing.T, f lab.Family, as netip.Addr) {
		t.Helper()
		n.untouchedBy(t, func() {
			_, seen, err := n.Pods[1].Ask(within(t), netip.AddrPortFrom(n.Pods[1].Addr(f), 0), netip.AddrPortFrom(n.Client.Addr(f), remotePort))
			if err != nil || seen.Addr() != as {
				t.Errorf("%v: seen as %v (%v), want %v; counters:%s", f, seen, err, as, n.counters(t))
			}
		})
	}
	for _, f := range lab.Families() {
		ask(t, f, n.Pods[1].Addr(f))
	}
	n.rules(t, `table inet nat {
	chain postrouting { type nat hook postrouting priority 100; oifname "`+lab.Uplink+`" masquerade; }
}`)
	for _, f := range lab.Families() {
		ask(t, f, n.Node.Addr(f))
	}
}

// TestRemoteBehindBridge: the bridge sees what pods behind it send by the node, if it has nothing but pods.
func TestRemoteBehindBridge(t *testing.T) { eachProfile(t, testRemoteBehindBridge) }

func testRemoteBehindBridge(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newBridged(t, profile, false)
	n.serveRemote(t)
	n.askRemote(t)
	n.copyProxy(t)
	pods := func(bridge bool) {
		facts := map[int]datapath.DeviceFacts{n.ifindex(t, lab.Uplink): {Uplink: true}, n.ifindex(t, lab.PodDevice(stranger.pod)): {Pod: true}}
		if bridge {
			facts[n.ifindex(t, stranger.bridge)] = datapath.DeviceFacts{Pods: true}
		}
		must(t, n.d.SetDevices(facts))
	}
	for _, f := range lab.Families() {
		c := cell{"pod", n.Pods[stranger.pod], stranger.addr(f), n.Client.Addr(f), remotePort, remoteID}
		pods(true)
		n.wantSays(t, c, "proxy")
		pods(false)
		n.wantSays(t, c, "service")
	}
}

// TestRemoteByTwoUplinks: the node asks by one device and is answered by another.
func TestRemoteByTwoUplinks(t *testing.T) {
	t.Parallel()
	n := newRemoteNode(t, datapath.ProfileAuto, lab.Options{Pods: 2})
	join(t, n.Node, n.Client, 7, 1500)
	second := n.ifindex(t, "to7")
	must(t, n.Node.Do(func() error { return n.d.Attach(second, datapath.RoleUplink) }))
	must(t, n.Client.Sysctl("ipv4/conf/all/arp_announce", "2")) // or the node would not answer whom it has elsewhere
	for _, f := range lab.Families() {
		a := n.Node.Addr(f)
		via(t, n.Client, &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, linkNet(f, 7, 1).IP)
		n.wantSays(t, cell{"node", n.Node, a, n.Client.Addr(f), remotePort, remoteID}, "proxy")
	}
	if dev, err := n.Node.Netlink.LinkByName("to7"); err != nil || dev.Attrs().Statistics.RxBytes < 500 {
		t.Errorf("the answers did not come by the second uplink (%v)", err)
	}
}

// TestRemoteByMacvlan: devices may be stacked, and what leaves by one then leaves by the other; a namespace on such a device is none
// that we know, and goes its way.
func TestRemoteByMacvlan(t *testing.T) {
	t.Parallel()
	n := newRemoteNode(t, datapath.ProfileAuto, lab.Options{Pods: 2})
	mac := func(ns *lab.Namespace, name string, host byte) {
		up, err := n.Node.Netlink.LinkByName(lab.Uplink)
		must(t, err)
		err = n.Node.Netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: name, ParentIndex: up.Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE})
		if errors.Is(err, unix.EOPNOTSUPP) {
			t.Skip("this kernel has no macvlan")
		}
		must(t, err)
		dev, err := n.Node.Netlink.LinkByName(name)
		must(t, err)
		if ns != n.Node {
			fd, err := unix.Open(ns.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			must(t, err)
			defer unix.Close(fd)
			must(t, n.Node.Netlink.LinkSetNsFd(dev, fd))
		}
		for _, f := range lab.Families() {
			must(t, ns.Netlink.AddrAdd(dev, &netlink.Addr{IPNet: linkNet(f, 8, host), Flags: unix.IFA_F_NODAD}))
		}
		must(t, ns.Netlink.LinkSetUp(dev))
		if ns == n.Node {
			must(t, n.Node.Do(func() error { return n.d.Attach(dev.Attrs().Index, datapath.RoleUplink) }))
		}
	}
	eth0, err := n.Client.Netlink.LinkByName("eth0")
	must(t, err)
	var far []netip.Addr
	for _, f := range lab.Families() {
		must(t, n.Client.Netlink.AddrAdd(eth0, &netlink.Addr{IPNet: linkNet(f, 8, 9), Flags: unix.IFA_F_NODAD}))
		far = append(far, linkAddr(f, 8, 9))
	}
	n.askRemote(t, far...)
	mac(n.Node, "stacked", 1)
	mac(n.Pods[1], "apart", 2)
	n.untouchedBy(t, func() {
		for i, f := range lab.Families() {
			n.wantSays(t, cell{"apart", n.Pods[1], linkAddr(f, 8, 2), far[i], remotePort, remoteID}, "service")
		}
	})
	for i, f := range lab.Families() {
		n.wantSays(t, cell{"node", n.Node, linkAddr(f, 8, 1), far[i], remotePort, remoteID}, "proxy")
	}
}

func linkAddr(f lab.Family, subnet, host byte) netip.Addr {
	a, _ := netip.AddrFromSlice(linkNet(f, subnet, host).IP)
	return a
}

// TestRemoteBulk: a megabyte each way, where a link on the way takes smaller packets than the first: the proxy is told, whoever
// it speaks for.
func TestRemoteBulk(t *testing.T) {
	t.Parallel()
	n := newNodeOn(t, lab.Options{Pods: 4})
	far, addr := n.behindRouters(t)
	n.knowDevices(t, lab.PodDevice(0))
	must(t, n.Node.Do(func() error { return n.d.Attach(n.ifindex(t, lab.PodDevice(1)), datapath.RoleUplink) }))
	n.askRemote(t, addr(lab.IPv4), addr(lab.IPv6))
	n.copyProxy(t)
	for _, f := range lab.Families() {
		_, err := far.Serve(netip.AddrPortFrom(unspecified(f), remoteBulkPort), func(c net.Conn) { _, _ = io.Copy(c, c) })
		must(t, err)
	}
	for _, f := range lab.Families() {
		ways := []cell{{name: "node", client: n.Node, from: nodeBefore(n, f)}, {name: "pod", client: n.Pods[0], from: n.Pods[0].Addr(f)}}
		if f == lab.IPv6 {
			slices.Reverse(ways)
		}
		before := n.count(t, flow.ReasonICMPLeg)
		for i, c := range ways {
			c.to, c.port = addr(f), remoteBulkPort
			t.Run(c.name+"/"+f.String(), func(t *testing.T) { carry(t, n, c) })
			if i == 0 && n.count(t, flow.ReasonICMPLeg) == before { // the proxy knows from then on
				t.Errorf("no error about a packet of the proxy reached it; counters:%s", n.counters(t))
			}
		}
	}
}

// nodeBefore is the node's address on the link of the second pod.
func nodeBefore(n *node, f lab.Family) netip.Addr {
	b := n.Pods[1].Addr(f).AsSlice()
	b[len(b)-1] = 1
	a, _ := netip.AddrFromSlice(b)
	return a
}

// TestRemoteComesHere: an address that a remote service has by policy moves to this node, which protects the port at every address of
// its own. Nobody has told the datapath of the address yet: the port is closed there too.
func TestRemoteComesHere(t *testing.T) { eachProfile(t, testRemoteComesHere) }

func testRemoteComesHere(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNodeOn(t, lab.Options{Pods: 2}, func(c *datapath.Config) { c.Profile = profile })
	n.knowDevices(t, lab.PodDevice(0), lab.PodDevice(1))
	n.copyProxy(t)
	here := datapath.Service{ID: remoteID + 1, Name: "here", Target: datapath.TargetHost, Ports: []uint16{remotePort}}
	there := datapath.Service{ID: remoteID, Name: "there", Target: datapath.TargetRemote, Ports: here.Ports}
	uplink, err := n.Node.Netlink.LinkByName(lab.Uplink)
	must(t, err)
	for _, f := range lab.Families() {
		there.Addresses = append(there.Addresses, remoteAddr(f))
		_, err := n.Node.WhoAnswers(netip.AddrPortFrom(unspecified(f), remotePort))
		must(t, err)
	}
	must(t, n.setServices(append(n.localServices(), here, there)))
	for _, f := range lab.Families() {
		a := remoteAddr(f)
		ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		must(t, n.Node.Netlink.AddrAdd(uplink, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}))
		for name, client := range map[string]*lab.Namespace{"client": n.Client, "node": n.Node, "pod": n.Pods[1]} {
			n.wantSays(t, cell{name + "/" + f.String(), client, client.Addr(f), a, remotePort, here.ID}, "proxy")
		}
	}
	if n := n.count(t, flow.ReasonBackstop); n != 0 {
		t.Errorf("%d packets came around the hooks", n)
	}
}
