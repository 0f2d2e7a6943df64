package lab

import (
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestSettingsShowEachChange(t *testing.T) {
	l := New(t, Options{})
	n := l.Node
	before := must[Settings](t)(n.Settings(testContext(t)))
	if again := must[Settings](t)(n.Settings(testContext(t))); len(before.Differences(again)) > 0 {
		t.Fatalf("two looks differ: %v", before.Differences(again))
	}
	up := must[int](t)(n.Ifindex(Uplink))
	rule := netlink.NewRule()
	rule.Mark, rule.Table, rule.Priority = 7, 100, 500
	_, dst, err := net.ParseCIDR("192.0.2.0/24")
	if err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func() error{
		"sysctl net/ipv4/conf/up0/rp_filter": func() error { return n.Sysctl("ipv4/conf/up0/rp_filter", "2") },
		"rule of family 2":                   func() error { return n.Netlink.RuleAdd(rule) },
		"route of family 2 by /up0/":         func() error { return n.Netlink.RouteAdd(&netlink.Route{LinkIndex: up, Dst: dst}) },
		"netfilter":                          func() error { _, err := n.Run(testContext(t), "nft", "add", "table", "ip", "t"); return err },
		"sysctl net/ipv4/conf/extra/": func() error {
			return n.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "extra"}, PeerName: "extra1"})
		},
	} {
		old := must[Settings](t)(n.Settings(testContext(t)))
		if err := change(); err != nil {
			t.Fatalf("%s: %v", want, err)
		}
		found := old.Differences(must[Settings](t)(n.Settings(testContext(t))))
		if !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, want) }) {
			t.Errorf("change of %s shows as %v", want, found)
		}
		if rest := old.Differences(must[Settings](t)(n.Settings(testContext(t))), "/up0/", "/extra/", "/extra1/", "rule of", "netfilter"); len(rest) > 0 {
			t.Errorf("change of %s shows in others: %v", want, rest)
		}
	}
}
