package e2e_test

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestNothingElseIsChanged: whatever Sallyport does to a node, its sysctls, rules, routes, firewall and devices are as
// before, but px0 and what is px0's own. The same holds for client and pod, and after uninstall px0 is gone, too.
func TestNothingElseIsChanged(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{})
	_, err := w.Node.Run(within(t, patience), "nft", "add table inet owner; add chain inet owner in { type filter hook input priority 0 ; }; add rule inet owner in tcp dport 9 drop")
	must(t, err)
	places := []*lab.Namespace{w.Node, w.Client, w.Pod}
	before := map[string]settings{}
	for _, n := range places {
		before[n.Name] = settingsOf(t, n)
	}
	same := func(when string, ours func(string) bool) {
		t.Helper()
		for _, n := range places {
			for _, line := range settingsOf(t, n).differences(before[n.Name]) {
				if !ours(line) {
					t.Errorf("%s, %s: %s", when, n.Name, line)
				}
			}
		}
	}
	ofPx0 := func(line string) bool { return strings.Contains(line, "px0") }
	for _, d := range []*daemon{w.collector, w.agent, w.guard, w.proxy} {
		d.start(t)
	}
	same("started", ofPx0)
	way := w.ways("host-echo", lab.IPv4)[0]
	w.open(t, wanted{way.service, way.from, "1m"})
	if o := way.plain(within(t, patience)); o.who != direct {
		t.Errorf("answered by %s", o)
	}
	same("with a path", ofPx0)
	w.agent.stop(t)
	same("stopped", ofPx0)
	w.uninstall(t)
	same("uninstalled", func(string) bool { return false })
}

// settings are what is set in a namespace: a line for each, with its value.
type settings map[string]string

func settingsOf(t *testing.T, n *lab.Namespace) settings {
	t.Helper()
	s := settings{}
	must(t, n.Do(s.addSysctls))
	names := map[int]string{}
	links, err := n.Netlink.LinkList()
	must(t, err)
	for _, l := range links {
		a := l.Attrs()
		names[a.Index] = a.Name
		s["device "+a.Name] = fmt.Sprintf("mtu %d flags %v alias %q master %d txqlen %d gso %d/%d gro %d", a.MTU, a.Flags, a.Alias, a.MasterIndex, a.TxQLen, a.GSOMaxSize, a.GSOMaxSegs, a.GROMaxSize)
		qdiscs, err := n.Netlink.QdiscList(l)
		must(t, err)
		for _, q := range qdiscs {
			s["qdisc of "+a.Name+" "+q.Type()] = fmt.Sprint(q.Attrs().Parent)
		}
	}
	routes, err := n.Netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, netlink.RT_FILTER_TABLE)
	must(t, err)
	for _, r := range routes {
		s[fmt.Sprintf("route table %d type %d %v via %v dev %s from %v", r.Table, r.Type, r.Dst, r.Gw, names[r.LinkIndex], r.Src)] =
			fmt.Sprintf("priority %d protocol %d scope %d mtu %d", r.Priority, r.Protocol, r.Scope, r.MTU)
	}
	rules, err := n.Netlink.RuleList(netlink.FAMILY_ALL)
	must(t, err)
	for _, r := range rules {
		s[fmt.Sprintf("rule family %d %v", r.Family, r)] = "there"
	}
	s["firewall"], err = n.Run(within(t, patience), "nft", "list", "ruleset")
	must(t, err)
	return s
}

// moving are sysctls that count or hold keys, and are set by nobody.
var moving = []string{"nf_conntrack_count", "ipv4/tcp_fastopen_key", "stable_secret"}

// addSysctls reads every sysctl of the calling thread's network namespace that can be read.
func (s settings) addSysctls() error {
	const root = "/proc/sys/net"
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // of a device that went
		}
		if err != nil || d.IsDir() {
			return err
		}
		if slices.ContainsFunc(moving, func(m string) bool { return strings.HasSuffix(path, m) }) {
			return nil
		}
		if value, err := os.ReadFile(path); err == nil {
			s["sysctl "+strings.TrimPrefix(path, root+"/")] = strings.TrimSpace(string(value))
		}
		return nil
	})
}

func (s settings) differences(before settings) (lines []string) {
	for k, v := range s {
		if was, ok := before[k]; !ok {
			lines = append(lines, fmt.Sprintf("new: %s: %s", k, v))
		} else if was != v {
			lines = append(lines, fmt.Sprintf("changed: %s: %s, was %s", k, v, was))
		}
	}
	for _, k := range slices.Sorted(maps.Keys(before)) {
		if _, ok := s[k]; !ok {
			lines = append(lines, "gone: "+k)
		}
	}
	return lines
}
