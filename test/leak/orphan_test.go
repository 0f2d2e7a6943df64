package leak

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestLabTakesItsFiltersAlong although a connection that nobody holds keeps the namespace: what was sent on it is not acknowledged.
func TestLabTakesItsFiltersAlong(t *testing.T) {
	needRoot(t)
	before := begin(t)
	l := lab.New(t, lab.Options{})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p := program(t, "sp_leak")
	lo, err := l.Node.Netlink.LinkByName("lo")
	must(err)
	attrs := netlink.QdiscAttrs{LinkIndex: lo.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}
	must(l.Node.Netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: attrs}))
	must(l.Node.Netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: lo.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          p.FD(), Name: "sp_leak", DirectAction: true,
	}))
	must(p.Close())
	must(leaveUnanswered(t, l))
	must(l.Close())
	left, err := wait(token, before, grace)
	if err != nil || len(left) > 0 {
		t.Errorf("after the lab is gone: %v (%v)", left, err)
	}
}

// leaveUnanswered has the node close a connection whose peer went silent.
func leaveUnanswered(t *testing.T, l *lab.Lab) error {
	ln, err := l.Client.Listen(netip.AddrPortFrom(l.Client.Addr(lab.IPv4), 7000))
	if err != nil {
		return err
	}
	defer ln.Close()
	c, err := l.Node.Dial(t.Context(), netip.AddrPort{}, ln.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		return err
	}
	up, err := l.Node.Netlink.LinkByName(lab.Uplink)
	if err != nil {
		return err
	}
	if err := l.Node.Netlink.LinkSetDown(up); err != nil {
		return err
	}
	if _, err := c.Write([]byte("is anybody there?")); err != nil {
		return err
	}
	return c.Close()
}
