package main

import (
	"context"
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

	"github.com/sallyport-dev/sallyport/test/lab"
)

// peer is a world whose node steers by the rules of another system, to the same copy proxy. What is a
// rule's meaning is the same in all: a protected service goes to the proxy, packets of the proxy's own
// connections to the proxy, and an exception (a client, the service and its port) goes straight on.
type peer struct {
	*world
	peerKind
}

// peerKind is a system of rules and how they are written.
type peerKind struct {
	kind    string
	command []string // reads the rules from a file
	rules   func(r ruleSet) string
}

// ruleSet is what the rules say.
type ruleSet struct {
	services   []netip.Addr // protected, all at servicePort
	exceptions []netip.Addr // clients that go straight on to service
	service    netip.Addr
}

func peerKinds() []peerKind {
	return []peerKind{
		{"iptables", []string{"iptables-legacy-restore"}, iptablesRules},
		{"nft rules", []string{"nft", "-f"}, nftRules},
		{"nft sets", []string{"nft", "-f"}, nftSets},
	}
}

// newPeer has the proxy running and no rules. It leaves nothing behind when it fails.
func newPeer(ctx context.Context, k peerKind) (*peer, error) {
	w, err := newWorld(k.kind, 1)
	if err != nil {
		return nil, err
	}
	p := &peer{w, k}
	if err := errors.Join(p.route(), p.start(ctx, p.Node, "proxy", fmt.Sprint(listenPort))); err != nil {
		return nil, joinClose(err, w.Close)
	}
	return p, nil
}

// way is the one client's.
func (p *peer) way() way { return way{p.kind, p.world, p.Client.Addr(lab.IPv4)} }

// route is what TPROXY needs beside its rules: marked packets are for this machine.
func (p *peer) route() error {
	lo, err := p.Node.Netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	rule := netlink.NewRule()
	rule.Family, rule.Mark, rule.Table, rule.Priority = netlink.FAMILY_V4, 1, 100, 100
	if err := p.Node.Netlink.RuleAdd(rule); err != nil {
		return fmt.Errorf("add rule: %w", err)
	}
	_, all, err := net.ParseCIDR("0.0.0.0/0")
	if err != nil {
		return err
	}
	route := &netlink.Route{Dst: all, LinkIndex: lo.Attrs().Index, Table: 100, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST}
	if err := p.Node.Netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("add route: %w", err)
	}
	return nil
}

// steer protects so many services, the measured one in the middle, without exceptions.
func (p *peer) steer(ctx context.Context, services int) error {
	return p.apply(ctx, ruleSet{services: among(p.Pod.Addr(lab.IPv4), services)})
}

// except protects the measured service alone, with so many exceptions, the client in the middle.
func (p *peer) except(ctx context.Context, exceptions int) error {
	own := p.Pod.Addr(lab.IPv4)
	return p.apply(ctx, ruleSet{services: []netip.Addr{own}, service: own, exceptions: among(p.Client.Addr(lab.IPv4), exceptions)})
}

// apply replaces the rules in one step.
func (p *peer) apply(ctx context.Context, r ruleSet) error {
	file := filepath.Join(p.Dir, "rules")
	if err := os.WriteFile(file, []byte(p.rules(r)), 0o600); err != nil {
		return fmt.Errorf("write rules: %w", err)
	}
	_, err := p.Node.Run(ctx, p.command[0], slices.Concat(p.command[1:], []string{file})...)
	return err
}

// iptablesRules are a list, searched in order: exceptions, the proxy's own connections, services.
func iptablesRules(r ruleSet) string {
	var b strings.Builder
	b.WriteString("*mangle\n:DIVERT - [0:0]\n-A DIVERT -j MARK --set-mark 1\n-A DIVERT -j ACCEPT\n")
	for _, a := range r.exceptions {
		fmt.Fprintf(&b, "-A PREROUTING -s %s -d %s -p tcp --dport %d -j ACCEPT\n", a, r.service, servicePort)
	}
	b.WriteString("-A PREROUTING -p tcp -m socket --transparent -j DIVERT\n")
	for _, a := range r.services {
		fmt.Fprintf(&b, "-A PREROUTING -d %s -p tcp --dport %d -j TPROXY --on-port %d --tproxy-mark 1\n", a, servicePort, listenPort)
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// nftChain has the rules between those that come first and last.
func nftChain(sets string, exceptions, services []string) string {
	return fmt.Sprintf(`table ip bench
delete table ip bench
table ip bench {
%schain pre {
type filter hook prerouting priority mangle; policy accept;
%smeta l4proto tcp socket transparent 1 meta mark set 1 accept
%s}
}
`, sets, strings.Join(exceptions, ""), strings.Join(services, ""))
}

// nftRules are the same list in nftables.
func nftRules(r ruleSet) string {
	var exceptions, services []string
	for _, a := range r.exceptions {
		exceptions = append(exceptions, fmt.Sprintf("ip saddr %s ip daddr %s tcp dport %d accept\n", a, r.service, servicePort))
	}
	for _, a := range r.services {
		services = append(services, fmt.Sprintf("ip daddr %s tcp dport %d meta mark set 1 tproxy to :%d accept\n", a, servicePort, listenPort))
	}
	return nftChain("", exceptions, services)
}

// nftSets are one rule with a set for each list: the best that nftables can do.
func nftSets(r ruleSet) string {
	var sets strings.Builder
	exceptions := []string{}
	if len(r.exceptions) > 0 {
		fmt.Fprintf(&sets, "set exceptions { type ipv4_addr . ipv4_addr . inet_service; elements = { %s } }\n",
			elements(r.exceptions, fmt.Sprintf("%%s . %s . %d", r.service, servicePort)))
		exceptions = append(exceptions, "ip saddr . ip daddr . tcp dport @exceptions accept\n")
	}
	fmt.Fprintf(&sets, "set services { type ipv4_addr . inet_service; elements = { %s } }\n",
		elements(r.services, fmt.Sprintf("%%s . %d", servicePort)))
	return nftChain(sets.String(), exceptions,
		[]string{fmt.Sprintf("ip daddr . tcp dport @services meta mark set 1 tproxy to :%d accept\n", listenPort)})
}

func elements(addresses []netip.Addr, format string) string {
	var all []string
	for _, a := range addresses {
		all = append(all, fmt.Sprintf(format, a))
	}
	return strings.Join(all, ", ")
}
