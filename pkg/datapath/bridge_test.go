package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// guest is a pod behind a bridge of the node.
type guest struct {
	bridge string
	pod    int
	host   byte // last byte of its addresses
	subnet byte
}

var (
	server   = guest{"cni0", 0, 2, 50}
	sibling  = guest{"cni0", 1, 3, 50}
	stranger = guest{"cni1", 2, 2, 51}
)

func (g guest) addr(f lab.Family) netip.Addr { return bridgeAddr(f, g.subnet, g.host) }

func bridgeAddr(f lab.Family, subnet, host byte) netip.Addr {
	if f == lab.IPv4 {
		return netip.AddrFrom4([4]byte{10, subnet, 0, host})
	}
	return netip.AddrFrom16([16]byte{0: 0xfd, 3: subnet, 15: host})
}

func bridgeNet(f lab.Family, a netip.Addr) *netlink.Addr {
	bits := map[lab.Family]int{lab.IPv4: 24, lab.IPv6: 64}[f]
	return &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}, Flags: unix.IFA_F_NODAD}
}

// newBridged is a node whose pods are behind bridges, as some CNIs have it, and which drops what
// conntrack does not understand. With filtered, bridged packets pass the filters of the node too.
func newBridged(t *testing.T, profile datapath.Profile, filtered bool) *node {
	t.Helper()
	n := newNodeOn(t, lab.Options{Pods: 3}, func(c *datapath.Config) { c.Profile = profile })
	if filtered {
		for _, key := range []string{"bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"} {
			must(t, n.Node.Sysctl(key, "1"))
		}
	}
	n.rules(t, `table inet strict {
	chain prerouting { type filter hook prerouting priority 0; ct state invalid counter drop; }
	chain input { type filter hook input priority 0; ct state invalid counter drop; }
	chain forward { type filter hook forward priority 0; ct state invalid counter drop; }
	chain output { type filter hook output priority 0; ct state invalid counter drop; }
}`)
	for _, g := range []guest{server, sibling, stranger} {
		n.enslave(t, g)
	}
	for name, role := range map[string]datapath.Role{"cni0": datapath.RoleBridge, "cni1": datapath.RoleBridge,
		lab.PodDevice(0): datapath.RolePodPort, lab.PodDevice(1): datapath.RolePodPort, lab.PodDevice(2): datapath.RolePodPort} {
		ifindex, err := n.Node.Ifindex(name)
		must(t, err)
		must(t, n.Node.Do(func() error { return n.d.Attach(ifindex, role) }))
	}
	port, err := n.Node.Ifindex(lab.PodDevice(server.pod))
	must(t, err)
	_, err = n.d.SetServices([]datapath.Service{
		{ID: hostID, Name: "host-echo", Target: datapath.TargetHost, Ports: []uint16{hostPort}},
		{ID: podID, Name: "pod-echo", Target: datapath.TargetPod, Ports: []uint16{podPort}, Ifindex: port,
			Addresses: []netip.Addr{server.addr(lab.IPv4), server.addr(lab.IPv6)}},
	})
	must(t, err)
	return n
}

func (n *node) rules(t *testing.T, ruleset string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(ruleset)
	p, err := n.Node.Start(cmd)
	must(t, err)
	if err := p.Wait(within(t)); err != nil {
		t.Fatalf("load rules: %v\n%s", err, p.Output())
	}
}

// enslave moves a pod's device into a bridge, which is made if it is not there, and gives the pod
// addresses there.
func (n *node) enslave(t *testing.T, g guest) {
	t.Helper()
	h := n.Node.Netlink
	br, err := h.LinkByName(g.bridge)
	if err != nil {
		must(t, h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: g.bridge}}))
		br, err = h.LinkByName(g.bridge)
		must(t, err)
		must(t, h.LinkSetUp(br))
		for _, f := range lab.Families() {
			must(t, h.AddrAdd(br, bridgeNet(f, bridgeAddr(f, g.subnet, 1))))
		}
	}
	port, err := h.LinkByName(lab.PodDevice(g.pod))
	must(t, err)
	flush(t, h, port)
	must(t, h.LinkSetMaster(port, br))
	pod := n.Pods[g.pod].Netlink
	dev, err := pod.LinkByName("eth0")
	must(t, err)
	flush(t, pod, dev)
	for _, f := range lab.Families() {
		must(t, pod.AddrAdd(dev, bridgeNet(f, g.addr(f))))
		must(t, pod.RouteReplace(&netlink.Route{LinkIndex: dev.Attrs().Index, Gw: bridgeAddr(f, g.subnet, 1).AsSlice()}))
		waitUntil(t, "addresses to be local", func() bool {
			r, err := pod.RouteGet(g.addr(f).AsSlice())
			return err == nil && len(r) == 1 && r[0].Type == unix.RTN_LOCAL
		})
	}
}

func flush(t *testing.T, h *netlink.Handle, dev netlink.Link) {
	t.Helper()
	addrs, err := h.AddrList(dev, netlink.FAMILY_ALL)
	must(t, err)
	for _, a := range addrs {
		if a.IP.IsLinkLocalUnicast() {
			continue
		}
		if err := h.AddrDel(dev, &a); !errors.Is(err, unix.EADDRNOTAVAIL) { // a secondary address goes with the first
			must(t, err)
		}
	}
}

// bridgedCells are the ways to the services of a bridged node.
func (n *node) bridgedCells() []cell {
	var out []cell
	for _, f := range lab.Families() {
		from := func(g guest) (*lab.Namespace, netip.Addr) { return n.Pods[g.pod], g.addr(f) }
		add := func(name string, ns *lab.Namespace, client netip.Addr, to netip.Addr, port uint16, id uint32) {
			out = append(out, cell{name + "/" + f.String(), ns, client, to, port, id})
		}
		same, sameAddr := from(sibling)
		other, otherAddr := from(stranger)
		add("pod/same-bridge", same, sameAddr, server.addr(f), podPort, podID)
		add("pod/other-bridge", other, otherAddr, server.addr(f), podPort, podID)
		add("pod/remote", n.Client, n.Client.Addr(f), server.addr(f), podPort, podID)
		add("pod/node", n.Node, bridgeAddr(f, server.subnet, 1), server.addr(f), podPort, podID)
		add("host/bridged", same, sameAddr, bridgeAddr(f, server.subnet, 1), hostPort, hostID)
		add("host/bridged-other-address", same, sameAddr, n.Node.Addr(f), hostPort, hostID)
		add("host/remote", n.Client, n.Client.Addr(f), n.Node.Addr(f), hostPort, hostID)
		add("host/loopback", n.Node, f.Loopback(), f.Loopback(), hostPort, hostID)
	}
	return out
}

// TestBridge asks every service in every way: each flow meets one hook in each direction, and
// conntrack sees whole connections.
func TestBridge(t *testing.T) { eachProfile(t, testBridge) }

func testBridge(t *testing.T, profile datapath.Profile) {
	for _, filtered := range []bool{false, true} {
		t.Run(fmt.Sprintf("filtered=%v", filtered), func(t *testing.T) {
			t.Parallel()
			n := newBridged(t, profile, filtered)
			n.copyProxy(t)
			for _, c := range n.bridgedCells() {
				t.Run(c.name, func(t *testing.T) { n.wholeStory(t, c) })
			}
		})
	}
}

// wholeStory asks without a path, under one, and after its end, and looks what becomes of a live
// connection.
func (n *node) wholeStory(t *testing.T, c cell) {
	t.Helper()
	expect := func(want string) {
		t.Helper()
		if got, err := c.ask(within(t)); got != want {
			t.Fatalf("answered by %s (%v), want %s; counters:%s", got, err, want, n.counters(t))
		}
	}
	expect("proxy")
	slot := c.path(n, t, time.Minute)
	expect("service")
	conn := c.dialDirect(t)
	before, err := n.d.Paths()
	must(t, err)
	must(t, n.d.EndPath(slot, datapath.PathRevoked))
	if p := before[len(before)-1]; p.Flows != 2 || p.PacketsToServer > 12 {
		t.Errorf("path counted %d flows and %d packets: met two hooks", p.Flows, p.PacketsToServer)
	}
	wantReset(t, conn)
	expect("proxy")
}

// TestBridgeWithoutProxy: no way around a dead proxy, whatever side of the bridge one comes from.
func TestBridgeWithoutProxy(t *testing.T) { eachProfile(t, testBridgeWithoutProxy) }

func testBridgeWithoutProxy(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newBridged(t, profile, false)
	for _, c := range n.bridgedCells() {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if got, _ := c.ask(ctx); got != "nobody" {
			t.Errorf("%s: answered by %s", c.name, got)
		}
		cancel()
	}
}
