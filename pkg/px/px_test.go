package px

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// node is a network namespace that stands for a node's own.
type node struct {
	t    *testing.T
	ns   *os.File
	path string
}

func newNode(t *testing.T) node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
	ns, err := unshared()
	if err != nil {
		t.Fatal(err)
	}
	n := node{t: t, ns: ns, path: filepath.Join(t.TempDir(), "run", "px")}
	t.Cleanup(func() {
		n.in(func() error { return Remove(Config{Path: n.path}) })
		ns.Close()
	})
	return n
}

func (n node) in(f func() error) {
	n.t.Helper()
	if err := within(n.ns, f); err != nil {
		n.t.Fatal(err)
	}
}

func (n node) create() *Namespace {
	n.t.Helper()
	var px *Namespace
	n.in(func() (err error) { px, err = Create(Config{Path: n.path}); return err })
	n.t.Cleanup(func() { px.Close() })
	return px
}

// snapshot is everything of the node that px must leave alone: sysctls, rules, routes, devices,
// without what belongs to px0 itself.
func (n node) snapshot() map[string]string {
	n.t.Helper()
	seen := map[string]string{}
	n.in(func() error {
		if err := snapshotSysctls(seen); err != nil {
			return err
		}
		return withHandleT(func(h *netlink.Handle) error { return snapshotNetlink(h, seen) })
	})
	return seen
}

func snapshotSysctls(seen map[string]string) error {
	return filepath.WalkDir("/proc/sys/net", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.Contains(path, "/"+HostDevice+"/") {
			return err
		}
		if data, err := os.ReadFile(path); err == nil {
			seen[path] = string(data)
		}
		return nil
	})
}

func snapshotNetlink(h *netlink.Handle, seen map[string]string) error {
	links, err := h.LinkList()
	if err != nil {
		return err
	}
	px0 := -1
	for _, l := range links {
		if l.Attrs().Name == HostDevice {
			px0 = l.Attrs().Index
			continue
		}
		seen["link "+l.Attrs().Name] = l.Attrs().Flags.String()
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := h.RuleList(family)
		if err != nil {
			return err
		}
		for _, r := range rules {
			seen[fmt.Sprint("rule ", family, r)] = ""
		}
		routes, err := h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.LinkIndex != px0 {
				seen[fmt.Sprint("route ", family, r)] = ""
			}
		}
	}
	return nil
}

func withHandleT(f func(*netlink.Handle) error) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	return f(h)
}

func differences(before, after map[string]string) (diff []string) {
	for k, v := range after {
		if old, there := before[k]; !there || old != v {
			diff = append(diff, fmt.Sprintf("%s: %q -> %q", k, old, v))
		}
	}
	for k := range before {
		if _, there := after[k]; !there {
			diff = append(diff, k+" is gone")
		}
	}
	return diff
}

func sameInode(t *testing.T, a, b *os.File) bool {
	t.Helper()
	sa, err := a.Stat()
	if err != nil {
		t.Fatal(err)
	}
	sb, err := b.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return os.SameFile(sa, sb)
}

func TestCreateTouchesNothingElseOfTheNode(t *testing.T) {
	n := newNode(t)
	before := n.snapshot()
	px := n.create()
	if diff := differences(before, n.snapshot()); len(diff) > 0 {
		t.Errorf("node changed:\n%s", strings.Join(diff, "\n"))
	}
	if err := px.Remove(); err != nil {
		t.Fatal(err)
	}
	if diff := differences(before, n.snapshot()); len(diff) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(diff, "\n"))
	}
	if _, err := os.Stat(n.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace file still there: %v", err)
	}
	n.in(func() error {
		if _, err := net.InterfaceByName(HostDevice); err == nil {
			t.Error("px0 still there")
		}
		return nil
	})
}

// TestRecipe spells out the proven set-up independently of recipe.go.
func TestRecipe(t *testing.T) {
	n := newNode(t)
	px := n.create()
	if err := px.Check(); err != nil {
		t.Fatal(err)
	}
	inner := map[string]string{
		"ipv4/conf/all/rp_filter": "0", "ipv4/conf/px1/rp_filter": "0", "ipv4/conf/px1/route_localnet": "1",
		"ipv4/ip_forward": "0", "ipv6/conf/all/forwarding": "0", "ipv4/tcp_fastopen": "0",
		"ipv4/ip_local_port_range": "10240\t32767", "ipv6/conf/px1/accept_ra": "0", "ipv6/conf/px1/accept_dad": "0",
	}
	err := px.Do(func() error {
		for key, want := range inner {
			if have, err := os.ReadFile("/proc/sys/net/" + key); err != nil || strings.TrimSpace(string(have)) != want {
				t.Errorf("%s = %q (%v), want %q", key, have, err, want)
			}
		}
		for _, name := range []string{"lo", InnerDevice} {
			dev, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			if addrs, err := dev.Addrs(); err != nil || len(addrs) > 0 {
				t.Errorf("%s has addresses %v (%v)", name, addrs, err)
			}
		}
		return checkDevice(InnerDevice)
	})
	if err != nil {
		t.Fatal(err)
	}
	n.in(func() error {
		dev, err := net.InterfaceByName(HostDevice)
		if err != nil {
			return err
		}
		if dev.Index != px.Px0() {
			t.Errorf("px0 has index %d, want %d", px.Px0(), dev.Index)
		}
		if have, err := os.ReadFile("/proc/sys/net/ipv6/conf/px0/disable_ipv6"); err != nil || string(have) != "1\n" {
			t.Errorf("px0 disable_ipv6 = %q (%v)", have, err)
		}
		return checkDevice(HostDevice)
	})
}

func checkDevice(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a := link.Attrs()
	if a.MTU != 65535 || a.RawFlags&unix.IFF_NOARP == 0 || a.RawFlags&unix.IFF_UP == 0 {
		return fmt.Errorf("%s: mtu %d flags %x", name, a.MTU, a.RawFlags)
	}
	return nil
}

func TestRoutesAndRules(t *testing.T) {
	px := newNode(t).create()
	cases := []struct {
		to, iif string
		mark    uint32
		local   bool
		out     string
	}{
		{to: "10.1.2.3", iif: InnerDevice, local: true, out: "lo"},
		{to: "127.0.0.1", iif: InnerDevice, local: true, out: "lo"},
		{to: "fd00::1", iif: InnerDevice, local: true, out: "lo"},
		{to: "fe80::1", iif: InnerDevice, local: true, out: "lo"},
		{to: "10.1.2.3", out: InnerDevice},
		{to: "127.0.0.1", out: InnerDevice},
		{to: "fd00::1", out: InnerDevice},
		{to: "::1", out: "lo"},
		{to: "10.1.2.3", mark: 1, local: true, out: "lo"},
		{to: "::1", mark: 1, local: true, out: "lo"},
	}
	err := px.Do(func() error {
		for _, c := range cases {
			opts := &netlink.RouteGetOptions{IifIndex: 0, Iif: c.iif, Mark: c.mark}
			if c.iif != "" {
				opts.SrcAddr = net.ParseIP("192.0.2.9")
				if strings.Contains(c.to, ":") {
					opts.SrcAddr = net.ParseIP("fd00:9::9")
				}
			}
			routes, err := netlink.RouteGetWithOptions(net.ParseIP(c.to), opts)
			if err != nil {
				t.Errorf("%+v: %v", c, err)
				continue
			}
			dev, err := net.InterfaceByIndex(routes[0].LinkIndex)
			if err != nil {
				return err
			}
			if local := routes[0].Type == unix.RTN_LOCAL; local != c.local || dev.Name != c.out {
				t.Errorf("%+v: got local %v by %s", c, local, dev.Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestCreateAdopts(t *testing.T) {
	n := newNode(t)
	first := n.create()
	second := n.create()
	if first.Px0() != second.Px0() || !sameInode(t, first.px, second.px) {
		t.Error("second create made another px")
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if c := strings.Count(string(mounts), n.path); c != 1 {
		t.Errorf("%d mounts, want 1", c)
	}
	n.in(func() error {
		opened, err := Open(n.path)
		if err != nil {
			return err
		}
		defer opened.Close()
		if opened.Px0() != first.Px0() {
			t.Error("opened another px")
		}
		return nil
	})
}

func TestCreateRepairs(t *testing.T) {
	inside := func(f func() error) func(node, *Namespace) error {
		return func(_ node, px *Namespace) error { return px.Do(f) }
	}
	outside := func(f func() error) func(node, *Namespace) error {
		return func(n node, _ *Namespace) error { return within(n.ns, f) }
	}
	link := func(name string, f func(netlink.Link) error) func() error {
		return func() error {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			return f(l)
		}
	}
	damages := map[string]func(node, *Namespace) error{
		"px0 deleted": outside(link(HostDevice, netlink.LinkDel)),
		"px1 deleted": inside(link(InnerDevice, netlink.LinkDel)),
		"px0 down":    outside(link(HostDevice, netlink.LinkSetDown)),
		"px1 down":    inside(link(InnerDevice, netlink.LinkSetDown)),
		"lo up again": inside(link("lo", func(l netlink.Link) error {
			return errors.Join(netlink.LinkSetDown(l), netlink.LinkSetUp(l))
		})),
		"px0 mtu": outside(link(HostDevice, func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1500) })),
		"px1 arp": inside(link(InnerDevice, netlink.LinkSetARPOn)),
		"sysctl":  inside(func() error { return os.WriteFile("/proc/sys/net/ipv4/conf/px1/rp_filter", []byte("1"), 0) }),
		"rules": inside(func() error {
			r := netlink.NewRule()
			r.Priority, r.Table, r.Mark = 101, 100, 1
			return netlink.RuleDel(r)
		}),
		"routes": inside(func() error {
			routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: 100}, netlink.RT_FILTER_TABLE)
			for i := range routes {
				err = errors.Join(err, netlink.RouteDel(&routes[i]))
			}
			return err
		}),
	}
	n := newNode(t)
	px := n.create()
	before := n.snapshot()
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			if err := damage(n, px); err != nil {
				t.Fatal(err)
			}
			if px.Check() == nil {
				t.Error("check does not see it")
			}
			again := n.create()
			if err := again.Check(); err != nil {
				t.Error(err)
			}
			if !sameInode(t, px.px, again.px) {
				t.Error("made another namespace")
			}
		})
	}
	if diff := differences(before, n.snapshot()); len(diff) > 0 {
		t.Errorf("node changed:\n%s", strings.Join(diff, "\n"))
	}
}

func TestCreateRefusesForeign(t *testing.T) {
	t.Run("device", func(t *testing.T) {
		n := newNode(t)
		n.in(func() error {
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: HostDevice}, PeerName: "other"})
		})
		n.refuses(ErrForeign)
		n.in(func() error {
			if err := Remove(Config{Path: n.path}); !errors.Is(err, ErrForeign) {
				t.Errorf("remove: %v", err)
			}
			link, err := netlink.LinkByName(HostDevice)
			if err != nil {
				return err
			}
			return netlink.LinkDel(link)
		})
	})
	t.Run("file", func(t *testing.T) {
		n := newNode(t)
		if err := os.MkdirAll(filepath.Dir(n.path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(n.path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		n.refuses(ErrForeign)
		if data, err := os.ReadFile(n.path); err != nil || string(data) != "precious" {
			t.Errorf("file is %q (%v)", data, err)
		}
		if err := os.Remove(n.path); err != nil {
			t.Fatal(err)
		}
	})
}

func (n node) refuses(want error) {
	n.t.Helper()
	n.in(func() error {
		if _, err := Create(Config{Path: n.path}); !errors.Is(err, want) {
			n.t.Errorf("create: %v, want %v", err, want)
		}
		return nil
	})
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	n := newNode(t)
	before := n.snapshot()
	folder := t.TempDir()
	if err := unix.Mount("tmpfs", folder, "tmpfs", unix.MS_RDONLY, ""); err != nil { // pinning is the last step
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(folder, 0) })
	n.path = filepath.Join(folder, "px")
	n.in(func() error {
		if _, err := Create(Config{Path: n.path}); !errors.Is(err, unix.EROFS) {
			t.Errorf("create: %v, want EROFS", err)
		}
		return nil
	})
	if diff := differences(before, n.snapshot()); len(diff) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(diff, "\n"))
	}
}

func TestOpenWhenNotThere(t *testing.T) {
	n := newNode(t)
	n.in(func() error {
		if _, err := Open(n.path); !errors.Is(err, ErrNotThere) {
			t.Errorf("open: %v", err)
		}
		return Remove(Config{Path: n.path})
	})
}
