package px

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// mtu is the largest a veth takes: with 1500, what is queued when a path ends is larger than the
// veth and is dropped before px, so its RST never comes.
const mtu = 65535

// Fixed addresses, set as if by the administrator, keep udev from giving px0 another one.
func hostMAC() net.HardwareAddr  { return net.HardwareAddr{0x02, 's', 'p', 'x', 0, 0} }
func innerMAC() net.HardwareAddr { return net.HardwareAddr{0x02, 's', 'p', 'x', 0, 1} }

// connect sees to it that px0 and px1 are the two ends of one veth pair of ours, and says whether
// it had to make them.
func (n *Namespace) connect() (made bool, err error) {
	px0, err := n.findPx0()
	if err != nil {
		return false, err
	}
	px1, err := n.findPx1()
	if err != nil {
		return false, err
	}
	if arePeers(px0, px1) {
		n.px0.Store(int64(px0.Attrs().Index))
		return false, nil
	}
	if err := n.removeEnds(px0, px1); err != nil {
		return false, err
	}
	return true, n.addLink()
}

func arePeers(a, b netlink.Link) bool {
	return a != nil && b != nil && a.Type() == "veth" && b.Type() == "veth" &&
		a.Attrs().ParentIndex == b.Attrs().Index && b.Attrs().ParentIndex == a.Attrs().Index
}

// findPx0 gives nil if there is no px0, and ErrForeign if there is one that is not ours.
func (n *Namespace) findPx0() (netlink.Link, error) {
	link, err := n.find(int(n.host.Fd()), HostDevice)
	if link != nil && (link.Type() != "veth" || link.Attrs().Alias != alias) {
		return nil, fmt.Errorf("device %s: %w", HostDevice, ErrForeign)
	}
	return link, err
}

func (n *Namespace) findPx1() (netlink.Link, error) {
	return n.find(int(n.px.Fd()), InnerDevice)
}

func (n *Namespace) find(ns int, name string) (link netlink.Link, err error) {
	err = withNetlink(ns, func(h *netlink.Handle) error {
		link, err = h.LinkByName(name)
		return err
	})
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	return link, nil
}

// removeEnds clears the way for a new pair. An end whose other end is elsewhere takes it along.
func (n *Namespace) removeEnds(px0, px1 netlink.Link) error {
	if px0 != nil {
		if err := n.del(int(n.host.Fd()), px0); err != nil {
			return err
		}
	}
	if px1 != nil {
		return n.del(int(n.px.Fd()), px1)
	}
	return nil
}

func (n *Namespace) del(ns int, link netlink.Link) error {
	err := withNetlink(ns, func(h *netlink.Handle) error { return h.LinkDel(link) })
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete %s: %w", link.Attrs().Name, err)
	}
	return nil
}

func (n *Namespace) removeLink() error {
	px0, err := n.findPx0()
	if err != nil || px0 == nil {
		return err
	}
	return n.removeEnds(px0, nil)
}

// addLink makes the pair with both ends down: IPv6 must be off on px0 before it comes up.
func (n *Namespace) addLink() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = HostDevice, mtu, hostMAC()
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: InnerDevice, PeerMTU: mtu,
		PeerHardwareAddr: innerMAC(), PeerNamespace: netlink.NsFd(int(n.px.Fd())),
	}
	return withNetlink(int(n.host.Fd()), func(h *netlink.Handle) error {
		if err := h.LinkAdd(veth); err != nil {
			return fmt.Errorf("add %s: %w", HostDevice, err)
		}
		link, err := h.LinkByName(HostDevice)
		if err == nil {
			err = h.LinkSetAlias(link, alias)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("mark %s: %w", HostDevice, err), h.LinkDel(veth))
		}
		n.px0.Store(int64(link.Attrs().Index))
		return nil
	})
}

func withNetlink(ns int, f func(*netlink.Handle) error) error {
	h, err := netlink.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink socket: %w", err)
	}
	defer h.Close()
	return f(h)
}
