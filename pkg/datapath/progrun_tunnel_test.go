package datapath_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const tunnel = "tun0"

// openTun makes a device without Ethernet headers; what is written to the file comes in by it.
func openTun(t *testing.T, n *lab.Namespace, cidrs ...string) *os.File {
	t.Helper()
	var far *os.File
	check(t, n.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq(tunnel)
		if err == nil {
			req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		far = os.NewFile(uintptr(fd), tunnel)
		return nil
	}))
	t.Cleanup(func() { check(t, far.Close()) })
	dev, err := n.Netlink.LinkByName(tunnel)
	check(t, err)
	check(t, n.Netlink.LinkSetUp(dev))
	for _, cidr := range cidrs {
		p := netip.MustParsePrefix(cidr)
		ip := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
		check(t, n.Netlink.AddrAdd(dev, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}))
	}
	return far
}

// joined carries packets from one end of a tunnel to the other until they are closed.
func joined(a, b *os.File) {
	carry := func(from, to *os.File) {
		packet := make([]byte, 1<<16)
		for {
			n, err := from.Read(packet)
			if err != nil {
				return
			}
			_, _ = to.Write(packet[:n]) // a lost packet is sent again
		}
	}
	go carry(a, b)
	go carry(b, a)
}

// TestWhoAnswersThroughATunnel: packets that begin with the IP header are steered, served, bypassed
// and cut like any others.
func TestWhoAnswersThroughATunnel(t *testing.T) { eachProfile(t, testWhoAnswersThroughATunnel) }

func testWhoAnswersThroughATunnel(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	joined(openTun(t, n.Node, "10.8.0.1/24", "fd00:8::1/64"), openTun(t, n.Client, "10.8.0.2/24", "fd00:8::2/64"))
	dev, err := n.Node.Ifindex(tunnel)
	must(t, err)
	must(t, n.Node.Do(func() error { return n.d.Attach(dev, datapath.RoleUplink) }))
	n.route(t)
	for _, f := range lab.Families() {
		client := map[lab.Family]netip.Addr{lab.IPv4: netip.MustParseAddr("10.8.0.2"), lab.IPv6: netip.MustParseAddr("fd00:8::2")}[f]
		for _, c := range []cell{
			{"host", n.Client, client, tunnelAddr(f), hostPort, hostID},
			{"pod", n.Client, client, n.Pod.Addr(f), podPort, podID},
		} {
			t.Run(c.name+"/"+f.String(), func(t *testing.T) {
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
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
				wantReset(t, conn)
				expect("proxy")
			})
		}
	}
	count, err := n.d.Counters()
	must(t, err)
	if count[flow.ReasonMalformed].Packets != 0 {
		t.Errorf("%d packets could not be read", count[flow.ReasonMalformed].Packets)
	}
}

func tunnelAddr(f lab.Family) netip.Addr {
	if f == lab.IPv4 {
		return netip.MustParseAddr("10.8.0.1")
	}
	return netip.MustParseAddr("fd00:8::1")
}

// route sends the client's packets for the pod by the tunnel.
func (n *node) route(t *testing.T) {
	t.Helper()
	dev, err := n.Client.Ifindex(tunnel)
	must(t, err)
	for _, f := range lab.Families() {
		a := n.Pod.Addr(f)
		to := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		must(t, n.Client.Netlink.RouteAdd(&netlink.Route{LinkIndex: dev, Dst: to, Gw: tunnelAddr(f).AsSlice()}))
	}
}

// TestUnknownLinkType: a device with another header is refused, not misread.
func TestUnknownLinkType(t *testing.T) {
	r := newRig(t, 64, 64)
	check(t, r.Node.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { check(t, unix.Close(fd)) })
		req, err := unix.NewIfreq("ib0")
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return err
		}
		if err := unix.IoctlSetInt(fd, unix.TUNSETLINK, unix.ARPHRD_INFINIBAND); err != nil {
			return err
		}
		dev, err := net.InterfaceByName("ib0")
		if err != nil {
			return err
		}
		if err := r.d.Attach(dev.Index, datapath.RoleUplink); !errors.Is(err, datapath.ErrLinkType) {
			t.Errorf("attach: %v, want %v", err, datapath.ErrLinkType)
		}
		return nil
	}))
}
