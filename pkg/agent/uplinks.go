package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// uplinks keeps a filter in front of each uplink, as far as its device allows one.
type uplinks struct {
	datapath *datapath.Datapath
	classify classifier
	spec     policy.XDPConfig
	problems *problems
	roles    map[int]datapath.Role // by ifindex, as of the last look; used by sync alone
}

// errNoFilter says that what configuration asks of the filter is done nowhere.
var errNoFilter = errors.New("denySources and SYN limits are in force on no uplink: none has a filter, see status")

// sync makes the filters follow the devices. Only uplinks have one: a device that is none any more loses it.
func (u *uplinks) sync(links []link) {
	roles := make(map[int]datapath.Role, len(links))
	names := make(map[string]bool, len(links))
	filtered := false
	for _, l := range links {
		names[l.name] = true
		role, _ := u.classify.role(l)
		roles[l.ifindex] = role
		if role == datapath.RoleUplink {
			filtered = u.set(l) || filtered
		} else if before, ok := u.roles[l.ifindex]; !ok || before != role {
			u.problems.report(problemXDP, l.name, u.datapath.DropXDP(l.ifindex))
		}
	}
	u.roles = roles
	u.problems.keep(problemXDP, func(name string) bool { return name == "" || names[name] })
	var err error
	if !filtered && u.wanted() {
		err = errNoFilter
	}
	u.problems.report(problemXDP, "", err)
}

// set says whether the device has a filter now. A mode that was asked for by name and is not to be had is a problem.
func (u *uplinks) set(l link) bool {
	wish := datapath.XDPMode(u.spec.Mode)
	got, err := u.datapath.SetXDP(l.ifindex, wish)
	if err == nil && got.Mode != wish && wish != datapath.XDPAuto {
		err = fmt.Errorf("no %s XDP: %s", wish, got.Why)
	}
	u.problems.report(problemXDP, l.name, err)
	return got.Mode == datapath.XDPNative || got.Mode == datapath.XDPGeneric
}

// wanted says whether configuration asks for more than the filter's own rules.
func (u *uplinks) wanted() bool {
	return len(u.spec.DenySources) > 0 || u.spec.SYNsPerSource.Rate > 0 || u.spec.SYNsPerService.Rate > 0
}

func (u *uplinks) limit() error {
	return u.datapath.LimitSYNs(datapath.SYNLimit(u.spec.SYNsPerSource), datapath.SYNLimit(u.spec.SYNsPerService))
}

// sources keeps the filters' table of sources: what is ours, and so cannot come from outside, and what is denied.
type sources struct {
	datapath *datapath.Datapath
	classify classifier
	services func() []datapath.Service
	denied   []netip.Prefix
	problems *problems
}

// Run follows the node's addresses and routes until ctx ends. As with devices, a message only says that something changed.
func (s *sources) Run(ctx context.Context) error {
	resync := time.NewTicker(resyncEvery)
	defer resync.Stop()
	for {
		changed, stop, err := subscribeAddresses()
		s.problems.report(problemSources, "", err)
		if err == nil {
			s.follow(ctx, changed, resync.C)
			stop()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-resync.C:
		}
	}
}

// follow works through one subscription, until it breaks or ctx ends.
func (s *sources) follow(ctx context.Context, changed <-chan netlink.AddrUpdate, resync <-chan time.Time) {
	for {
		s.problems.report(problemSources, "", s.sync())
		select {
		case <-ctx.Done():
			return
		case _, ok := <-changed:
			if !ok {
				return
			}
			drain(changed)
		case <-resync:
		}
	}
}

// sync writes the table once.
func (s *sources) sync() error {
	own, err := ownSources(s.classify, s.services())
	if err != nil {
		return err
	}
	facts, err := deviceFacts(s.classify)
	if err != nil {
		return err
	}
	return errors.Join(s.datapath.SetSources(own, s.denied), s.datapath.SetDevices(facts))
}

// deviceFacts says which devices are uplinks, which lead to pods, and which of these the routes know the addresses behind.
// Behind a port of a bridge they do not.
func deviceFacts(c classifier) (map[int]datapath.DeviceFacts, error) {
	all, err := listLinks()
	if err != nil {
		return nil, err
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return factsOf(c, all, routes), nil
}

func factsOf(c classifier, all []link, routes []netlink.Route) map[int]datapath.DeviceFacts {
	facts := make(map[int]datapath.DeviceFacts)
	for _, l := range all {
		switch role, _ := c.role(l); role {
		case datapath.RoleUplink:
			facts[l.ifindex] = datapath.DeviceFacts{Uplink: true}
		case datapath.RolePod, datapath.RolePodPort:
			facts[l.ifindex] = datapath.DeviceFacts{Pod: true}
		case datapath.RoleBridge:
			if c.onlyPods(l, all) {
				facts[l.ifindex] = datapath.DeviceFacts{Pods: true}
			}
		}
	}
	for _, r := range routes {
		network, ok := endsAt(r)
		f := facts[r.LinkIndex]
		if !ok || !f.Pod {
			continue
		}
		f.BoundIPv4 = f.BoundIPv4 || network.Addr().Is4()
		f.BoundIPv6 = f.BoundIPv6 || network.Addr().Is6()
		facts[r.LinkIndex] = f
	}
	return facts
}

// onlyPods says whether there are pods behind a bridge, and nothing else.
func (c classifier) onlyPods(bridge link, all []link) bool {
	pods := false
	for _, l := range all {
		if l.master == nil || l.master.ifindex != bridge.ifindex {
			continue
		}
		if role, _ := c.role(l); role != datapath.RolePodPort {
			return false
		}
		pods = true
	}
	return pods
}

func subscribeAddresses() (changed <-chan netlink.AddrUpdate, stop func(), err error) {
	ch := make(chan netlink.AddrUpdate, 64)
	done := make(chan struct{})
	if err := netlink.AddrSubscribe(ch, done); err != nil {
		close(done)
		return nil, nil, fmt.Errorf("watch addresses: %w", err)
	}
	return ch, func() {
		close(done)
		for range ch { // let the sender see that we left
		}
	}, nil
}

// ownSources are the addresses of the node, the networks behind its pods' devices, and the pods that protected services are
// in. Link-local networks are everywhere and nobody's.
func ownSources(c classifier, services []datapath.Service) ([]netip.Prefix, error) {
	addresses, err := nodeAddresses()
	if err != nil {
		return nil, err
	}
	for _, s := range inForce(services) {
		addresses = append(addresses, locatedAddresses(s)...)
	}
	own, err := podNetworks(c)
	for _, a := range addresses {
		own = append(own, netip.PrefixFrom(a, a.BitLen()))
	}
	return own, err
}

// locatedAddresses are those of a service's pods whose devices are known: the others may be on another node.
func locatedAddresses(s datapath.Service) (all []netip.Addr) {
	for _, p := range s.Places() {
		if s.Target == datapath.TargetPod && p.Ifindex != 0 {
			all = append(all, p.Addresses...)
		}
	}
	return all
}

// podNetworks are the destinations of routes that end at a pod's device, or at a bridge of such.
func podNetworks(c classifier) ([]netip.Prefix, error) {
	all, err := listLinks()
	if err != nil {
		return nil, err
	}
	var pods []int
	for _, l := range all {
		role, _ := c.role(l)
		if role != datapath.RolePod && role != datapath.RolePodPort {
			continue
		}
		pods = append(pods, l.ifindex)
		if l.master != nil {
			pods = append(pods, l.master.ifindex)
		}
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var own []netip.Prefix
	for _, r := range routes {
		if network, ok := endsAt(r); ok && slices.Contains(pods, r.LinkIndex) {
			own = append(own, network)
		}
	}
	return own, nil
}

// endsAt gives the network of a route without a next hop.
func endsAt(r netlink.Route) (netip.Prefix, bool) {
	if r.Gw != nil || r.Via != nil || len(r.MultiPath) > 0 || r.LinkIndex == 0 || r.Type != unix.RTN_UNICAST || r.Dst == nil {
		return netip.Prefix{}, false
	}
	network, ok := fromIPNet(r.Dst)
	a := network.Addr()
	return network, ok && network.Bits() > 0 && !a.IsLinkLocalUnicast() && !a.IsMulticast()
}

func fromIPNet(n *net.IPNet) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(n.IP)
	bits, size := n.Mask.Size()
	if a = a.Unmap(); !ok || size != a.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, bits), true
}
