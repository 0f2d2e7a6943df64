package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// errNotHere says that a pod's address does not lead to a pod device of this node.
var errNotHere = errors.New("is not on this node")

// locator finds the host-side device of a pod.
type locator struct {
	classify classifier
	ports    bridgePorts
}

// place is where a pod is: the ifindex of the host-side device that its service is behind, and of others of the same pod.
type place struct {
	device  int
	besides []int
}

// find gives the place of a Pod service.
func (l locator) find(s policy.ProtectedService) (place, error) {
	device, err := l.device(s)
	if err != nil {
		return place{}, err
	}
	besides, err := sameNamespace(device)
	return place{device, besides}, err
}

// sameNamespace lists the other devices whose far ends are in the network namespace that this one's is in, in order. A pod
// with several of them has its ports behind each.
func sameNamespace(ifindex int) ([]int, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	i := slices.IndexFunc(all, func(l netlink.Link) bool { return l.Attrs().Index == ifindex })
	if i < 0 || all[i].Attrs().NetNsID < 0 {
		return nil, nil
	}
	var same []int
	for _, l := range all {
		if a := l.Attrs(); a.NetNsID == all[i].Attrs().NetNsID && a.Index != ifindex {
			same = append(same, a.Index)
		}
	}
	slices.Sort(same)
	return same, nil
}

// device gives the ifindex of the device behind which a Pod service is: the one that it names, or the one that the route
// to its addresses takes. All addresses must lead there.
func (l locator) device(s policy.ProtectedService) (int, error) {
	if s.Spec.Device != "" {
		dev, err := netlink.LinkByName(s.Spec.Device)
		if err != nil {
			return 0, fmt.Errorf("find device %s: %w", s.Spec.Device, err)
		}
		return dev.Attrs().Index, nil
	}
	found := 0
	for _, a := range s.Spec.Addresses {
		ifindex, err := l.behind(a)
		if err != nil {
			return 0, err
		}
		if found != 0 && ifindex != found {
			return 0, fmt.Errorf("find device of %v: they are behind different devices", s.Spec.Addresses)
		}
		found = ifindex
	}
	return found, nil
}

func (l locator) behind(a netip.Addr) (int, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil {
		return 0, fmt.Errorf("find route to %s: %w", a, err)
	}
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST || r.LinkIndex == 0 {
			continue
		}
		dev, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			return 0, fmt.Errorf("find device of %s: %w", a, err)
		}
		if dev.Type() == "bridge" {
			return l.ports.find(r.LinkIndex, a)
		}
		role, _ := l.classify.role(toLink(dev))
		if role != datapath.RolePod {
			return 0, fmt.Errorf("%s %w: its route leaves by %s, which is no pod device (devices.pods)", a, errNotHere, dev.Attrs().Name)
		}
		return r.LinkIndex, nil
	}
	return 0, fmt.Errorf("%s %w: no route leads to it", a, errNotHere)
}

// isPod tells whether a device is of a pod.
func (l locator) isPod(ifindex int) bool {
	dev, err := netlink.LinkByIndex(ifindex)
	return err == nil && matches(l.classify.pods, dev.Attrs().Name)
}

// isShared tells whether a device is a port of a bridge that has others than pods behind it.
func (l locator) isShared(ifindex int) (bool, error) {
	all, err := listLinks()
	if err != nil {
		return false, err
	}
	i := slices.IndexFunc(all, func(dev link) bool { return dev.ifindex == ifindex })
	if i < 0 || all[i].master == nil {
		return false, nil
	}
	return !l.classify.onlyPods(*all[i].master, all), nil
}

// nodeAddresses lists the addresses that are the node's own.
func nodeAddresses() ([]netip.Addr, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of the node: %w", err)
	}
	var own []netip.Addr
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			own = append(own, ip.Unmap())
		}
	}
	return own, nil
}

// nodeGateways lists the addresses that the node's routes lead by. What comes from one may come from anybody behind it.
func nodeGateways() ([]netip.Addr, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes of the node: %w", err)
	}
	var all []netip.Addr
	add := func(ip net.IP) {
		if a, ok := netip.AddrFromSlice(ip); ok {
			all = append(all, a.Unmap())
		}
	}
	for _, r := range routes {
		add(r.Gw)
		if via, ok := r.Via.(*netlink.Via); ok {
			add(via.Addr)
		}
		for _, hop := range r.MultiPath {
			add(hop.Gw)
		}
	}
	return all, nil
}

// surroundingsAge is how old what is known of the node's network may be: many workloads may ask in that time.
const surroundingsAge = time.Second

// surroundings are the node's own addresses and its gateways, read at most once in surroundingsAge. Safe for concurrent use.
type surroundings struct {
	clock clock

	mu              sync.Mutex
	read            time.Duration // guarded by mu, as what follows; CLOCK_BOOTTIME, 0: never
	addresses, hops []netip.Addr
}

// look returns what it knows; nobody changes it.
func (s *surroundings) look() (own, gateways []netip.Addr, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock.boot()
	if s.read != 0 && now-s.read < surroundingsAge {
		return s.addresses, s.hops, nil
	}
	if s.addresses, err = nodeAddresses(); err == nil {
		s.hops, err = nodeGateways()
	}
	if err != nil {
		s.read = 0
		return nil, nil, err
	}
	s.read = now
	return s.addresses, s.hops, nil
}

// own lists the addresses that are the node's own, and those of the candidates that the node's routing takes for its own without a
// device that bears them.
func (s *surroundings) own(candidates []netip.Addr) ([]netip.Addr, error) {
	own, _, err := s.look()
	if err != nil {
		return nil, err
	}
	own = slices.Clone(own)
	for _, c := range candidates {
		routes, err := netlink.RouteGet(c.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			own = append(own, c)
		}
	}
	return own, nil
}

// podDevice is the device of the pod that has an address, among those that are hooked; 0: none.
func podDevice(a netip.Addr, devices []datapath.Device) int {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 || routes[0].Type == unix.RTN_LOCAL {
		return 0
	}
	device, role := routes[0].LinkIndex, roleOf(routes[0].LinkIndex, devices)
	if role == datapath.RoleBridge {
		device = bridgePort(device, a)
		role = roleOf(device, devices)
	}
	if role != datapath.RolePod && role != datapath.RolePodPort {
		return 0
	}
	return device
}

func roleOf(ifindex int, devices []datapath.Device) datapath.Role {
	i := slices.IndexFunc(devices, func(d datapath.Device) bool { return d.Ifindex == ifindex && d.Role != datapath.RolePx1 })
	if i < 0 {
		return ""
	}
	return devices[i].Role
}
