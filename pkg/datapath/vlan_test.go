package datapath_test

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// vlan gives the namespace a VLAN device on another, with addresses in a subnet of its own.
func vlan(t *testing.T, n *lab.Namespace, parent string, host byte) int {
	t.Helper()
	on, err := n.Netlink.LinkByName(parent)
	must(t, err)
	err = n.Netlink.LinkAdd(&netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: "vlan5", ParentIndex: on.Attrs().Index}, VlanId: 5})
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("this kernel has no 8021q")
	}
	must(t, err)
	dev, err := n.Netlink.LinkByName("vlan5")
	must(t, err)
	for _, f := range lab.Families() {
		must(t, n.Netlink.AddrAdd(dev, &netlink.Addr{IPNet: linkNet(f, 5, host), Flags: unix.IFA_F_NODAD}))
	}
	must(t, n.Netlink.LinkSetUp(dev))
	return dev.Attrs().Index
}

// TestWhoAnswersInAVLAN: a tagged packet meets the hooks of the VLAN device, not those of its parent.
func TestWhoAnswersInAVLAN(t *testing.T) {
	n := newNode(t, datapath.ProfileAuto)
	dev := vlan(t, n.Node, lab.Uplink, 1)
	vlan(t, n.Client, "eth0", 2)
	n.copyProxy(t)
	must(t, n.Node.Do(func() error {
		if _, err := net.InterfaceByIndex(dev); err != nil {
			return err
		}
		return n.d.Attach(dev, datapath.RoleUplink)
	}))
	for _, f := range lab.Families() {
		at := func(host byte) netip.Addr {
			a, _ := netip.AddrFromSlice(linkNet(f, 5, host).IP)
			return a
		}
		c := cell{"host", n.Client, at(2), at(1), hostPort, hostID}
		t.Run(f.String(), func(t *testing.T) {
			expect := func(want string) {
				t.Helper()
				if got, err := c.ask(within(t)); got != want {
					t.Fatalf("answered by %s (%v), want %s; counters:%s", got, err, want, n.counters(t))
				}
			}
			expect("proxy")
			slot := c.path(n, t, time.Minute)
			expect("service")
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			expect("proxy")
		})
	}
}
