package px

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	table       = 100   // routes everything to local sockets
	steeredMark = 1     // set by the program on px's lo
	lo6MTU      = 32768 // above it ::1 segments would not fit through the veth
)

// want is one property of px: whether it holds, and how to bring it about.
type want struct {
	what string
	ok   func() (bool, error)
	fix  func() error
}

// apply brings about, in order, what does not hold.
func apply(wants []want) error {
	for _, w := range wants {
		ok, err := w.ok()
		if err == nil && !ok {
			err = w.fix()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", w.what, err)
		}
	}
	return nil
}

// check tells everything that does not hold.
func check(wants []want) error {
	var errs []error
	for _, w := range wants {
		ok, err := w.ok()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", w.what, err))
		} else if !ok {
			errs = append(errs, fmt.Errorf("%s: not so", w.what))
		}
	}
	return errors.Join(errs...)
}

// hostRecipe is all that the host namespace gets.
func hostRecipe(h *netlink.Handle) ([]want, error) {
	wants := []want{sysctl("ipv6/conf/"+HostDevice+"/disable_ipv6", "1")}
	if !hasIPv6() {
		wants = nil
	}
	return append(wants, linkWants(h, HostDevice)...), nil
}

// innerRecipe is what px is made of. The order matters: sysctls before a device comes up; lo's
// addresses go before the routes, since removing the last IPv4 address flushes table 100.
func innerRecipe(h *netlink.Handle) ([]want, error) {
	families := []int{netlink.FAMILY_V4}
	if hasIPv6() {
		families = append(families, netlink.FAMILY_V6)
	}
	wants := sysctls(len(families) == 2)
	wants = append(wants, up(h, "lo"))
	wants = append(wants, linkWants(h, InnerDevice)...)
	wants = append(wants, noAddresses(h))
	lo, err := h.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find lo: %w", err)
	}
	px1, err := h.LinkByName(InnerDevice)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", InnerDevice, err)
	}
	for _, family := range families {
		wants = append(wants, routeWants(h, family, lo.Attrs().Index, px1.Attrs().Index)...)
		wants = append(wants, ruleWants(h, family)...)
	}
	return wants, nil
}

// sysctls of px. IPv4 ones are named in full: a new namespace may inherit the host's.
func sysctls(ipv6 bool) []want {
	wants := []want{
		sysctl("ipv4/ip_forward", "0"),
		sysctl("ipv4/tcp_fastopen", "0"), // data before the identity is proven
		sysctl("ipv4/ip_local_port_range", "10240 32767"),
		sysctl("ipv4/tcp_tw_reuse", "1"), // many connections from one client's address to one service
	}
	for _, dev := range []string{"all", "default", "lo", InnerDevice} {
		wants = append(wants, device4(dev)...)
		if ipv6 {
			wants = append(wants, device6(dev)...)
		}
	}
	return wants
}

func device4(dev string) []want {
	localnet := "0"
	if dev == InnerDevice {
		localnet = "1" // 127/8 comes in by px1
	}
	dir := "ipv4/conf/" + dev + "/"
	return []want{
		sysctl(dir+"rp_filter", "0"),
		sysctl(dir+"route_localnet", localnet),
		sysctl(dir+"forwarding", "0"),
		sysctl(dir+"accept_redirects", "0"),
		sysctl(dir+"send_redirects", "0"),
		sysctl(dir+"accept_source_route", "0"),
	}
}

func device6(dev string) []want {
	dir := "ipv6/conf/" + dev + "/"
	return []want{
		sysctl(dir+"disable_ipv6", "0"),
		sysctl(dir+"addr_gen_mode", "1"), // no link-local address: px1 has none of its own
		sysctl(dir+"forwarding", "0"),
		sysctl(dir+"accept_ra", "0"),
		sysctl(dir+"autoconf", "0"),
		sysctl(dir+"accept_dad", "0"),
		sysctl(dir+"dad_transmits", "0"),
		sysctl(dir+"router_solicitations", "0"),
		sysctl(dir+"accept_redirects", "0"),
		sysctl(dir+"accept_source_route", "0"),
	}
}

func hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

// sysctl is of the network namespace of the thread that looks at it.
func sysctl(key, value string) want {
	path := filepath.Join("/proc/sys/net", key)
	return want{
		what: "sysctl net/" + key + " = " + value,
		ok: func() (bool, error) {
			have, err := os.ReadFile(path)
			return slices.Equal(strings.Fields(string(have)), strings.Fields(value)), err
		},
		fix: func() error { return os.WriteFile(path, []byte(value), 0) },
	}
}

func up(h *netlink.Handle, name string) want {
	return linkWant(h, name, "up",
		func(a *netlink.LinkAttrs) bool { return a.Flags&net.FlagUp != 0 }, h.LinkSetUp)
}

func linkWants(h *netlink.Handle, name string) []want {
	return []want{
		linkWant(h, name, fmt.Sprintf("mtu %d", mtu),
			func(a *netlink.LinkAttrs) bool { return a.MTU == mtu },
			func(l netlink.Link) error { return h.LinkSetMTU(l, mtu) }),
		linkWant(h, name, "noarp",
			func(a *netlink.LinkAttrs) bool { return a.RawFlags&unix.IFF_NOARP != 0 }, h.LinkSetARPOff),
		up(h, name),
	}
}

func linkWant(h *netlink.Handle, name, what string, has func(*netlink.LinkAttrs) bool, set func(netlink.Link) error) want {
	return want{
		what: "device " + name + " " + what,
		ok: func() (bool, error) {
			link, err := h.LinkByName(name)
			return err == nil && has(link.Attrs()), err
		},
		fix: func() error {
			link, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			return set(link)
		},
	}
}

// listTries is how often a list is asked for that changes while it is read, as in a namespace that the kernel still
// sets up.
const listTries = 10

// whole asks again for a list that was interrupted.
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range listTries {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// noAddresses: 127.0.0.1 and ::1 must leave by px1 like any other address.
func noAddresses(h *netlink.Handle) want {
	list := func() ([]netlink.Addr, error) {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return nil, err
		}
		return whole(func() ([]netlink.Addr, error) { return h.AddrList(lo, netlink.FAMILY_ALL) })
	}
	return want{
		what: "no address on lo",
		ok:   func() (bool, error) { addrs, err := list(); return len(addrs) == 0, err },
		fix: func() error {
			lo, err := h.LinkByName("lo")
			if err != nil {
				return err
			}
			addrs, err := list()
			for i := range addrs {
				err = errors.Join(err, h.AddrDel(lo, &addrs[i]))
			}
			return err
		},
	}
}

func routeWants(h *netlink.Handle, family, lo, px1 int) []want {
	if family == netlink.FAMILY_V4 {
		return []want{
			route(h, family, localRoute("0.0.0.0/0", lo)),
			route(h, family, deviceRoute("0.0.0.0/0", px1, 0)),
		}
	}
	return []want{
		route(h, family, localRoute("::/0", lo)),
		// link-local destinations are looked up on the device they came in by
		route(h, family, localRoute("fe80::/10", px1)),
		route(h, family, deviceRoute("::/0", px1, 0)),
		// ::1 must leave by lo or the strict look-up of its RST fails; the program on lo sends it on
		route(h, family, deviceRoute("::1/128", lo, lo6MTU)),
	}
}

func localRoute(dst string, dev int) netlink.Route {
	return netlink.Route{
		Dst: prefix(dst), LinkIndex: dev, Table: table,
		Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
	}
}

func deviceRoute(dst string, dev, mtu int) netlink.Route {
	return netlink.Route{
		Dst: prefix(dst), LinkIndex: dev, Table: unix.RT_TABLE_MAIN,
		Type: unix.RTN_UNICAST, Scope: unix.RT_SCOPE_LINK, MTU: mtu,
	}
}

func prefix(s string) *net.IPNet {
	p := netip.MustParsePrefix(s)
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func route(h *netlink.Handle, family int, r netlink.Route) want {
	if family == netlink.FAMILY_V6 {
		r.Scope = unix.RT_SCOPE_UNIVERSE // IPv6 has no other
	}
	same := func(have netlink.Route) bool {
		return have.Dst != nil && have.Dst.String() == r.Dst.String() && have.Type == r.Type &&
			have.LinkIndex == r.LinkIndex && have.MTU == r.MTU
	}
	return want{
		what: fmt.Sprintf("route %s dev %d table %d", r.Dst, r.LinkIndex, r.Table),
		ok: func() (bool, error) {
			filter := netlink.Route{Table: r.Table}
			routes, err := whole(func() ([]netlink.Route, error) {
				return h.RouteListFiltered(family, &filter, netlink.RT_FILTER_TABLE)
			})
			return slices.ContainsFunc(routes, same), err
		},
		fix: func() error { return h.RouteReplace(&r) },
	}
}

func ruleWants(h *netlink.Handle, family int) []want {
	steered, marked := netlink.NewRule(), netlink.NewRule()
	steered.IifName, steered.Priority = InnerDevice, 100
	marked.Mark, marked.Priority = steeredMark, 101
	return []want{rule(h, family, *steered), rule(h, family, *marked)}
}

func rule(h *netlink.Handle, family int, r netlink.Rule) want {
	r.Family, r.Table = family, table
	same := func(have netlink.Rule) bool {
		return have.Priority == r.Priority && have.Table == r.Table &&
			have.IifName == r.IifName && have.Mark == r.Mark
	}
	return want{
		what: fmt.Sprintf("rule %d of family %d", r.Priority, family),
		ok: func() (bool, error) {
			rules, err := whole(func() ([]netlink.Rule, error) { return h.RuleList(family) })
			return slices.ContainsFunc(rules, same), err
		},
		fix: func() error { return h.RuleAdd(&r) },
	}
}
