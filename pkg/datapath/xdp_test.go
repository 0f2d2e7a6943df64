package datapath_test

import (
	"context"
	"fmt"
	"io"

	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// filter asks for a filter on a device of the node.
func (n *node) filter(t *testing.T, device string, wish datapath.XDPMode) datapath.XDPOutcome {
	t.Helper()
	ifindex, err := n.Node.Ifindex(device)
	must(t, err)
	var o datapath.XDPOutcome
	must(t, n.Node.Do(func() (err error) {
		o, err = n.d.SetXDP(ifindex, wish)
		return err
	}))
	return o
}

func (n *node) filtered(t *testing.T, device string, wish, mode datapath.XDPMode, cause datapath.XDPCause) datapath.XDPOutcome {
	t.Helper()
	o := n.filter(t, device, wish)
	if o.Mode != mode || o.Cause != cause || o.Why == "" || o.Device != device {
		t.Fatalf("%s on %s became %+v, want %s by %s", wish, device, o, mode, cause)
	}
	want := map[datapath.XDPMode]int{datapath.XDPNative: 1, datapath.XDPGeneric: 1}[mode]
	program := map[datapath.XDPMode]string{datapath.XDPNative: "sp_xdp_up", datapath.XDPGeneric: "sp_xdp_generic"}[mode]
	must(t, n.Node.Do(func() error {
		attached, err := datapath.Attached("")
		if err == nil && (count(attached, device+"/"+program) != want || n.ours(attached, device) != want) {
			err = fmt.Errorf("%s is %s, and attached are %v", device, mode, attached)
		}
		return err
	}))
	return o
}

// ours counts our filters on a device.
func (n *node) ours(attached []string, device string) int {
	return count(attached, device+"/sp_xdp_up") + count(attached, device+"/sp_xdp_generic")
}

// xdpProgram is the id of the XDP program that a device of the node has.
func (n *node) xdpProgram(t *testing.T, device string) uint32 {
	t.Helper()
	dev, err := n.Node.Netlink.LinkByName(device)
	must(t, err)
	if x := dev.Attrs().Xdp; x != nil && x.Attached {
		return x.ProgId
	}
	return 0
}

// TestFilterModes: what becomes of each wish, on each kind of device.
func TestFilterModes(t *testing.T) {
	n := newLeakFree(t, datapath.ProfileAuto)
	add := func(l netlink.Link) {
		must(t, n.Node.Netlink.LinkAdd(l))
	}
	add(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br9"}})
	add(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "port9"}, PeerName: "peer9"})
	must(t, n.Node.Do(func() error { // made by an ioctl of the caller's
		return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun9"}, Mode: netlink.TUNTAP_MODE_TUN})
	}))
	bridge, err := n.Node.Netlink.LinkByName("br9")
	must(t, err)
	port, err := n.Node.Netlink.LinkByName("port9")
	must(t, err)
	must(t, n.Node.Netlink.LinkSetMaster(port, bridge))

	n.filtered(t, lab.Uplink, datapath.XDPAuto, datapath.XDPOff, datapath.XDPKind)
	n.filtered(t, lab.Uplink, datapath.XDPNative, datapath.XDPNative, datapath.XDPAsked)
	n.filtered(t, lab.Uplink, datapath.XDPNative, datapath.XDPNative, datapath.XDPAsked)
	n.filtered(t, lab.Uplink, datapath.XDPGeneric, datapath.XDPGeneric, datapath.XDPAsked)
	n.filtered(t, lab.Uplink, datapath.XDPAuto, datapath.XDPOff, datapath.XDPKind)
	n.filtered(t, lab.Uplink, datapath.XDPGeneric, datapath.XDPGeneric, datapath.XDPAsked)
	n.filtered(t, lab.Uplink, datapath.XDPOff, datapath.XDPOff, datapath.XDPAsked)
	n.filtered(t, "br9", datapath.XDPAuto, datapath.XDPOff, datapath.XDPKind)
	n.filtered(t, "br9", datapath.XDPNative, datapath.XDPOff, datapath.XDPNoDriver)
	n.filtered(t, "br9", datapath.XDPGeneric, datapath.XDPGeneric, datapath.XDPAsked)
	for _, wish := range []datapath.XDPMode{datapath.XDPAuto, datapath.XDPNative, datapath.XDPGeneric} {
		n.filtered(t, "port9", wish, datapath.XDPOff, datapath.XDPKind)
		n.filtered(t, "tun9", wish, datapath.XDPOff, datapath.XDPKind)
		n.filtered(t, "lo", wish, datapath.XDPOff, datapath.XDPKind)
	}
	if len(n.d.XDP()) != 5 {
		t.Errorf("outcomes of %d devices, want 5: %+v", len(n.d.XDP()), n.d.XDP())
	}
}

// TestFilterOneBufferMTU: on a kernel that has frames in one buffer only, an uplink with larger ones has no native filter,
// and a sentence says why. Generic mode takes it.
func TestFilterOneBufferMTU(t *testing.T) {
	n := newNodeOn(t, lab.Options{UplinkMTU: 9000, Pods: 2}, (*datapath.Config).OneBuffer)
	o := n.filtered(t, lab.Uplink, datapath.XDPNative, datapath.XDPOff, datapath.XDPTooLarge)
	if want := "MTU 9000 is beyond a page: that needs kernel 5.18"; o.Why != want {
		t.Errorf("why %q, want %q", o.Why, want)
	}
	n.filtered(t, lab.Uplink, datapath.XDPGeneric, datapath.XDPGeneric, datapath.XDPAsked)
	dev, err := n.Node.Netlink.LinkByName(lab.Uplink)
	must(t, err)
	must(t, n.Node.Netlink.LinkSetMTU(dev, 1500))
	peer, err := n.Client.Netlink.LinkByName("eth0")
	must(t, err)
	must(t, n.Client.Netlink.LinkSetMTU(peer, 1500))
	n.filtered(t, lab.Uplink, datapath.XDPNative, datapath.XDPNative, datapath.XDPAsked)
}

// TestFilterLeavesOthers: a program of somebody else stays, and when it goes the wish is granted.
func TestFilterLeavesOthers(t *testing.T) {
	n := newLeakFree(t, datapath.ProfileAuto)
	other, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "other", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, int32(xdpPass)), asm.Return()}})
	must(t, err)
	defer other.Close()
	ifindex, err := n.Node.Ifindex(lab.Uplink)
	must(t, err)
	var l link.Link
	must(t, n.Node.Do(func() (err error) {
		l, err = link.AttachXDP(link.XDPOptions{Program: other, Interface: ifindex, Flags: link.XDPDriverMode})
		return err
	}))
	theirs := n.xdpProgram(t, lab.Uplink)
	for _, wish := range []datapath.XDPMode{datapath.XDPNative, datapath.XDPGeneric} {
		n.filtered(t, lab.Uplink, wish, datapath.XDPOff, datapath.XDPOccupied)
	}
	n.filtered(t, lab.Uplink, datapath.XDPOff, datapath.XDPOff, datapath.XDPAsked)
	must(t, n.Node.Do(func() error { _, err := datapath.DetachAll(""); return err }))
	if n.xdpProgram(t, lab.Uplink) != theirs {
		t.Fatal("the program of somebody else is gone")
	}
	must(t, l.Close())
	n.filtered(t, lab.Uplink, datapath.XDPNative, datapath.XDPNative, datapath.XDPAsked)
}

// TestFilterLives: the filter outlives the agent and its pin by the guard, is adopted, and goes with Uninstall.
func TestFilterLives(t *testing.T) {
	n := newLeakFree(t, datapath.ProfileAuto)
	n.filtered(t, lab.Uplink, datapath.XDPNative, datapath.XDPNative, datapath.XDPAsked)
	links, err := n.d.LinkIDs()
	must(t, err)
	pinned, err := os.ReadDir(filepath.Join(n.cf.Dir, "v4", "links")) // filters of clsact are no links
	must(t, err)
	g := n.guard(t)
	g.wait(t, len(pinned))
	first := n.xdpProgram(t, lab.Uplink)
	must(t, n.d.Close())
	if n.xdpProgram(t, lab.Uplink) != first {
		t.Fatal("the filter went with the agent")
	}
	n.open(t)
	n.filtered(t, lab.Uplink, datapath.XDPNative, datapath.XDPNative, datapath.XDPAsked)
	again, err := n.d.LinkIDs()
	must(t, err)
	for key, id := range again {
		if id != links[key] {
			t.Errorf("%s is another link after the restart", key)
		}
	}
	if len(again) != 1 {
		t.Errorf("links %v, want one: nothing else was attached again", again)
	}
	must(t, n.d.Close())
	must(t, os.Remove(filepath.Join(n.cf.Dir, "v4", "links", fmt.Sprintf("sp_xdp-%d", n.ifindex(t, lab.Uplink)))))
	if n.xdpProgram(t, lab.Uplink) == 0 {
		t.Fatal("the filter went with its pin; the guard should hold it")
	}
	n.open(t)
	n.filtered(t, lab.Uplink, datapath.XDPNative, datapath.XDPNative, datapath.XDPAsked)
	n.uninstall(t)
	if id := n.xdpProgram(t, lab.Uplink); id != 0 {
		t.Errorf("program %d is there after Uninstall", id)
	}
	g.wait(t, 0)
}

func count(all []string, one string) (n int) {
	for _, s := range all {
		if s == one {
			n++
		}
	}
	return n
}

func (n *node) ifindex(t *testing.T, device string) int {
	t.Helper()
	i, err := n.Node.Ifindex(device)
	must(t, err)
	return i
}

// filterWays are the modes that serve traffic, and the largest MTU.
func filterWays() map[datapath.XDPMode]int {
	return map[datapath.XDPMode]int{datapath.XDPNative: 9000, datapath.XDPGeneric: 9000}
}

// TestFilteredTraffic: with a filter on the uplink every service is reached as without, proxied and bypassed, also with
// jumbo frames; and what the filter is for is dropped. Without it everything is as closed as before.
func TestFilteredTraffic(t *testing.T) {
	for mode, mtu := range filterWays() {
		t.Run(string(mode), func(t *testing.T) {
			n := newNodeOn(t, lab.Options{Pods: 2, UplinkMTU: mtu})
			n.copyProxy(t)
			n.filtered(t, lab.Uplink, mode, mode, datapath.XDPAsked)
			must(t, n.d.SetSources([]netip.Prefix{host(n.Node.Addr(lab.IPv4)), host(n.Node.Addr(lab.IPv6)),
				host(n.Pod.Addr(lab.IPv4)), host(n.Pod.Addr(lab.IPv6))}, nil))
			for _, c := range n.cells() {
				t.Run(c.name, func(t *testing.T) { n.proxiedThenDirect(t, c) })
			}
			n.injectOwn(t)
			n.filtered(t, lab.Uplink, datapath.XDPOff, datapath.XDPOff, datapath.XDPAsked)
			n.everySays(t, "proxy", "filter gone")
		})
	}
}

func (n *node) proxiedThenDirect(t *testing.T, c cell) {
	for _, want := range []string{"proxy", "service"} {
		if want == "service" {
			slot := c.path(n, t, time.Minute)
			defer func() { must(t, n.d.EndPath(slot, datapath.PathRevoked)) }()
		}
		if got, err := c.ask(within(t)); got != want {
			t.Fatalf("answered by %s (%v), want %s; counters:%s", got, err, want, n.counters(t))
		}
		n.bulk(t, c)
	}
}

// bulk echoes lines as long as several frames.
func (n *node) bulk(t *testing.T, c cell) {
	t.Helper()
	conn, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, 0), c.target())
	must(t, err)
	defer conn.Close()
	for range 5 {
		_, err := io.WriteString(conn, string(make([]byte, 40000))+"\n")
		must(t, err)
		_, err = lab.Ask(conn)
		must(t, err)
	}
}

// injectOwn sends SYNs from outside that bear the node's own address.
func (n *node) injectOwn(t *testing.T) {
	t.Helper()
	for _, f := range lab.Families() {
		p := tcp(netip.AddrPortFrom(n.Pod.Addr(f), clientPort), netip.AddrPortFrom(n.Node.Addr(f), hostPort), syn)
		var err error
		p.SrcMAC, err = n.Client.MAC("eth0")
		must(t, err)
		p.DstMAC, err = n.Node.MAC(lab.Uplink)
		must(t, err)
		must(t, n.Client.Inject("eth0", p.Bytes()))
	}
	waitUntil(t, "the filter to drop two packets", func() bool {
		c, err := n.d.Counters()
		must(t, err)
		return c[flow.ReasonXDPOwnSource].Packets == 2
	})
}

// TestFlood: one source sends SYNs as fast as it can. Its bucket holds, and another client is served meanwhile.
func TestFlood(t *testing.T) {
	for mode := range filterWays() {
		t.Run(string(mode), func(t *testing.T) {
			n := newNode(t, datapath.ProfileAuto)
			n.copyProxy(t)
			n.filtered(t, lab.Uplink, mode, mode, datapath.XDPAsked)
			must(t, n.d.LimitSYNs(datapath.SYNLimit{Rate: 50, Burst: 20}, datapath.SYNLimit{}))
			for _, f := range lab.Families() {
				n.flood(t, f, 300)
				own, seen, err := n.Client.Ask(within(t), netip.AddrPortFrom(n.Client.Addr(f), 0), netip.AddrPortFrom(n.Node.Addr(f), hostPort))
				if err != nil || own == seen {
					t.Errorf("%v: client %v is seen as %v while another floods: %v", f, own, seen, err)
				}
			}
		})
	}
}

// TestSecondPassIsNotCounted: a proxied connection is one SYN to its client's bucket, although generic XDP sees the proxy's
// own, which px0 puts back on the uplink with the client's address.
func TestSecondPassIsNotCounted(t *testing.T) {
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	n.filtered(t, lab.Uplink, datapath.XDPGeneric, datapath.XDPGeneric, datapath.XDPAsked)
	const burst = 6
	must(t, n.d.LimitSYNs(datapath.SYNLimit{Rate: 1, Burst: burst}, datapath.SYNLimit{}))
	for _, f := range lab.Families() {
		from, to := netip.AddrPortFrom(n.Client.Addr(f), 0), netip.AddrPortFrom(n.Node.Addr(f), hostPort)
		for range burst {
			if own, seen, err := n.Client.Ask(within(t), from, to); err != nil || own == seen {
				t.Fatalf("%v: client %v is seen as %v: %v", f, own, seen, err)
			}
		}
	}
	c, err := n.d.Counters()
	must(t, err)
	if dropped := c[flow.ReasonXDPSYNSource].Packets; dropped != 0 {
		t.Errorf("%d SYNs dropped of %d in a burst of as many", dropped, burst)
	}
}

// flood sends SYNs of an address that nobody has, and sees that the bucket held.
func (n *node) flood(t *testing.T, f lab.Family, syns int) {
	t.Helper()
	before, err := n.d.Counters()
	must(t, err)
	started := datapath.BootTime()
	for i := range syns {
		p := tcp(netip.AddrPortFrom(flooder(f), uint16(20000+i)), netip.AddrPortFrom(n.Node.Addr(f), hostPort), syn)
		p.SrcMAC, err = n.Client.MAC("eth0")
		must(t, err)
		p.DstMAC, err = n.Node.MAC(lab.Uplink)
		must(t, err)
		must(t, n.Client.Inject("eth0", p.Bytes()))
	}
	reached := func() (dropped, passed uint64) {
		now, err := n.d.Counters()
		must(t, err)
		return now[flow.ReasonXDPSYNSource].Packets - before[flow.ReasonXDPSYNSource].Packets,
			now[flow.ReasonNoPath].Packets - before[flow.ReasonNoPath].Packets
	}
	waitUntil(t, "every SYN to be dropped or steered", func() bool {
		dropped, passed := reached()
		return dropped+passed == uint64(syns)
	})
	most := 20 + uint64((datapath.BootTime()-started).Seconds()*50) + 1
	if _, passed := reached(); passed > most || passed < 20 {
		t.Errorf("%v: %d SYNs passed, want 20 to %d", f, passed, most)
	}
}

func flooder(f lab.Family) netip.Addr {
	if f == lab.IPv4 {
		return netip.MustParseAddr("10.1.0.99")
	}
	return netip.MustParseAddr("fd00:1:0:9::99") // a /64 of its own
}

// TestGenericNeedsLinearPackets is why generic mode has a program of its own: one that is aware of several buffers has the
// kernel copy the packet, and what is copied comes to tc without its Ethernet header (seen on 6.18). Such a packet must
// not reach the service either.
func TestGenericNeedsLinearPackets(t *testing.T) {
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	var l link.Link
	must(t, n.Node.Do(func() (err error) {
		l, err = link.AttachXDP(link.XDPOptions{Program: n.d.Programs().SpXdpUp, Interface: n.ifindex(t, lab.Uplink), Flags: link.XDPGenericMode})
		return err
	}))
	defer l.Close()
	for _, c := range n.cells() {
		if c.client != n.Client {
			continue
		}
		if got, err := c.ask(brief(t)); got == "service" {
			t.Errorf("%s: reached the service around the proxy (%v); counters:%s", c.name, err, n.counters(t))
		}
	}
}

func brief(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}
