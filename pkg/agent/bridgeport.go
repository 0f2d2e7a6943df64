package agent

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// errSilent says that nobody answers for an address behind a bridge yet.
var errSilent = errors.New("does not answer on its bridge yet")

// bridgePorts finds the port of a bridge behind which an address is. The tables that say so forget what is silent, so the
// last answer stands until there is another one or the port is gone. Not safe for concurrent use.
type bridgePorts map[netip.Addr]int

// find asks the kernel's neighbours for the link-layer address, and the bridge for its port.
func (b bridgePorts) find(bridge int, a netip.Addr) (port int, err error) {
	mac, err := neighbour(bridge, a)
	if err == nil && mac != nil {
		port, err = portOf(bridge, mac)
	}
	if err != nil {
		return 0, err
	}
	if port == 0 {
		port = b[a]
	}
	if dev, err := netlink.LinkByIndex(port); port == 0 || err != nil || dev.Attrs().MasterIndex != bridge {
		delete(b, a)
		return 0, errors.Join(fmt.Errorf("%s %w", a, errSilent), ask(bridge, a))
	}
	b[a] = port
	return port, nil
}

// bridgePort is the port of a bridge behind which an address is that has just spoken; 0: the kernel does not know.
func bridgePort(bridge int, a netip.Addr) int {
	mac, err := neighbour(bridge, a)
	if err != nil || mac == nil {
		return 0
	}
	port, err := portOf(bridge, mac)
	if err != nil {
		return 0
	}
	return port
}

// neighbour is the link-layer address that the kernel knows for an address; nil if it knows none.
func neighbour(ifindex int, a netip.Addr) (net.HardwareAddr, error) {
	all, err := netlink.NeighList(ifindex, family(a))
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	for _, n := range all {
		ip, _ := netip.AddrFromSlice(n.IP)
		if ip.Unmap() == a && n.State&(unix.NUD_FAILED|unix.NUD_INCOMPLETE) == 0 && len(n.HardwareAddr) > 0 {
			return n.HardwareAddr, nil
		}
	}
	return nil, nil
}

// portOf is the port by which the bridge sends to a link-layer address; 0 if it does not know.
func portOf(bridge int, mac net.HardwareAddr) (int, error) {
	all, err := netlink.NeighList(0, unix.AF_BRIDGE)
	if err != nil {
		return 0, fmt.Errorf("list addresses of the bridge: %w", err)
	}
	for _, n := range all {
		if n.MasterIndex == bridge && n.LinkIndex != bridge && bytes.Equal(n.HardwareAddr, mac) {
			return n.LinkIndex, nil
		}
	}
	return 0, nil
}

// ask makes the kernel look for the neighbour, as the first packet to it would.
func ask(ifindex int, a netip.Addr) error {
	err := netlink.NeighSet(&netlink.Neigh{LinkIndex: ifindex, Family: family(a), State: unix.NUD_NONE, Flags: unix.NTF_USE, IP: a.AsSlice()})
	if err != nil {
		return fmt.Errorf("ask for %s: %w", a, err)
	}
	return nil
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
