package datapath_test

import (
	"errors"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// attachAll hooks the node's devices with a handle.
func (n *node) attachAll(d *datapath.Datapath) error {
	return n.Node.Do(func() error {
		if err := d.AttachPx(); err != nil {
			return err
		}
		for name, role := range map[string]datapath.Role{lab.Uplink: datapath.RoleUplink, lab.PodDevice(0): datapath.RolePod,
			lab.PodDevice(1): datapath.RolePod, "lo": datapath.RoleLo} {
			dev, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			if err := d.Attach(dev.Index, role); err != nil {
				return err
			}
		}
		_, err := d.AttachBackstop(n.Cgroup())
		return err
	})
}

// The main thread cannot end with its goroutine: one that px or the datapath left in another
// namespace would hold it for good. Kept for the main goroutine it is never theirs.
func init() { runtime.LockOSThread() }

// newLeakFree makes a node that must leave nothing behind.
func newLeakFree(t *testing.T, profile datapath.Profile) *node {
	t.Helper()
	leak.Check(t)
	n := newNode(t, profile)
	t.Cleanup(func() { _ = n.px.Close() }) // its descriptors hold namespaces
	return n
}

// mapIDs reads the ids of all pinned maps.
func (n *node) mapIDs(t *testing.T) map[string]ebpf.MapID {
	t.Helper()
	pins, err := os.ReadDir(filepath.Join(n.cf.Dir, "v4/maps"))
	must(t, err)
	ids := map[string]ebpf.MapID{}
	for _, p := range pins {
		m, err := ebpf.LoadPinnedMap(n.pin(p.Name()), nil)
		must(t, err)
		info, err := m.Info()
		must(t, err)
		ids[p.Name()], _ = info.ID()
		must(t, m.Close())
	}
	return ids
}

// config reads what the programs read.
func (n *node) config(t *testing.T) bpf.Config {
	t.Helper()
	var c bpf.Config
	must(t, n.d.Maps().SpConfig.Lookup(uint32(0), &c))
	return c
}

// TestSecondOpenAdopts: the same links and maps, the same secrets, services and paths; a live
// connection notices nothing.
func TestSecondOpenAdopts(t *testing.T) { eachProfile(t, testSecondOpenAdopts) }

func testSecondOpenAdopts(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	if n.d.Adopted() {
		t.Error("the first Open adopted")
	}
	c := n.cells()[0]
	slot := c.path(n, t, time.Minute)
	conn := c.dialDirect(t)
	links, err := n.d.LinkIDs()
	must(t, err)
	maps0, cfg, generation := n.mapIDs(t), n.config(t), n.d.Generation()
	must(t, n.d.Close())

	n.open(t)
	if !n.d.Adopted() {
		t.Error("the second Open did not adopt")
	}
	must(t, n.attachAll(n.d))
	again, err := n.d.LinkIDs()
	must(t, err)
	if !maps.Equal(links, again) {
		t.Errorf("links are %v, were %v", again, links)
	}
	if now := n.mapIDs(t); !maps.Equal(maps0, now) {
		t.Errorf("maps are %v, were %v", now, maps0)
	}
	if now := n.config(t); now != cfg {
		t.Errorf("configuration is %+v, was %+v", now, cfg)
	}
	if now := n.d.Generation(); now != generation {
		t.Errorf("generation is %d, was %d", now, generation)
	}
	if s := n.d.Services(); len(s) != 2 {
		t.Errorf("services are %+v, want two", s)
	}
	paths, err := n.d.Paths()
	must(t, err)
	if len(paths) != 1 || paths[0].Slot != slot || paths[0].Client != c.from || len(paths[0].Ports) != 1 {
		t.Errorf("paths are %+v, want the one in slot %d", paths, slot)
	}
	if _, err := lab.Ask(conn); err != nil {
		t.Errorf("the live connection: %v", err)
	}
	_, err = n.d.OpenPath(paths[0].Path)
	if !errors.Is(err, datapath.ErrPathExists) {
		t.Errorf("second path for the same client: %v, want %v", err, datapath.ErrPathExists)
	}
}

// TestUninstallLeavesNothing: no link, program, map or pin, though handles were open.
func TestUninstallLeavesNothing(t *testing.T) { eachProfile(t, testUninstallLeavesNothing) }

func testUninstallLeavesNothing(t *testing.T, profile datapath.Profile) {
	n := newLeakFree(t, profile)
	links, err := n.d.LinkIDs()
	must(t, err)
	report := n.uninstall(t)
	if report.Links != len(links) || report.Maps == 0 {
		t.Errorf("report is %+v, want %d links and some maps", report, len(links))
	}
	if _, err := os.Stat(n.cf.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pin directory: %v, want it gone", err)
	}
	n.noHooks(t)
	for _, c := range n.cells() {
		if got, err := c.ask(within(t)); got != "service" {
			t.Errorf("%s: answered by %s (%v), want the service: nothing is steered any more", c.name, got, err)
		}
	}
	if again := n.uninstall(t); again != (datapath.Report{}) {
		t.Errorf("second uninstall: %+v", again)
	}
	n.open(t) // and from the beginning
	if n.d.Adopted() {
		t.Error("adopted what was uninstalled")
	}
}

// noHooks looks at the devices of the node and of px for tcx programs and for our filters.
func (n *node) noHooks(t *testing.T) {
	t.Helper()
	var links []ebpf.AttachType
	if hasTCX(t) {
		links = []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress}
	}
	look := func() error {
		devices, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, dev := range devices {
			for _, at := range links {
				q, err := link.QueryPrograms(link.QueryOptions{Target: dev.Index, Attach: at})
				if err != nil {
					return err
				}
				if len(q.Programs) > 0 {
					t.Errorf("%d programs are left on %s %v", len(q.Programs), dev.Name, at)
				}
			}
			for _, side := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
				names, err := filters(&netlink.Handle{}, &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: dev.Index}}, side)
				if err != nil {
					return err
				}
				if slices.ContainsFunc(names, func(name string) bool { return strings.HasPrefix(name, "sp_") }) {
					t.Errorf("filters %v are left on %s", names, dev.Name)
				}
			}
		}
		return nil
	}
	must(t, n.Node.Do(look))
	must(t, n.px.Do(look))
}

// TestUninstallWithoutDevices: links of devices that are gone are no obstacle.
func TestUninstallWithoutDevices(t *testing.T) { eachProfile(t, testUninstallWithoutDevices) }

func testUninstallWithoutDevices(t *testing.T, profile datapath.Profile) {
	n := newLeakFree(t, profile)
	dev, err := n.Node.Netlink.LinkByName(lab.PodDevice(1))
	must(t, err)
	must(t, n.Node.Netlink.LinkDel(dev))
	n.uninstall(t)
	n.noHooks(t)
}

// TestUnknownLayouts: what this version cannot read stays as it is.
func TestUnknownLayouts(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	must(t, n.d.Close())
	refuse := func(name, says string, prepare, restore func()) {
		t.Run(name, func(t *testing.T) {
			prepare()
			defer restore()
			before := n.mapIDs(t)
			err := n.Node.Do(func() error {
				d, err := datapath.Open(n.cf)
				if err == nil {
					err = errors.Join(errors.New("opened"), d.Close())
				}
				return err
			})
			if !errors.Is(err, datapath.ErrLayout) || !strings.Contains(err.Error(), "uninstall") || !strings.Contains(err.Error(), says) {
				t.Errorf("error is %v, want %v with what to do", err, datapath.ErrLayout)
			}
			if after := n.mapIDs(t); !maps.Equal(before, after) {
				t.Errorf("maps are %v, were %v", after, before)
			}
		})
	}
	newer := filepath.Join(n.cf.Dir, "v9")
	refuse("newer directory", "v", func() { must(t, os.Mkdir(newer, 0o700)) }, func() { must(t, os.Remove(newer)) })
	refuse("other schema", "schema", func() { n.changeConfig(t, func(c *bpf.Config) { c.Schema = 7 }) },
		func() { n.changeConfig(t, func(c *bpf.Config) { c.Schema = 4 }) })
	refuse("moved field", "map sp_legs: sp_leg.opened_ns has moved", func() { n.replaceTypes(t, "sp_legs", "opened_ns", "last_ns") }, func() {})
	refuse("incompatible map", "map sp_legs: key and value have 40 and 56 bytes", func() { n.replaceMap(t, "sp_legs") }, func() {})
	must(t, os.Remove(n.pin("sp_legs")))
	n.open(t)
}

func (n *node) changeConfig(t *testing.T, f func(*bpf.Config)) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(n.pin("sp_config"), nil)
	must(t, err)
	defer m.Close()
	var c bpf.Config
	must(t, m.Lookup(uint32(0), &c))
	f(&c)
	must(t, m.Put(uint32(0), &c))
}

// replaceMap pins a map with other values in place of one.
func (n *node) replaceMap(t *testing.T, name string) {
	t.Helper()
	must(t, os.Remove(n.pin(name)))
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: name, Type: ebpf.Hash, KeySize: 40, ValueSize: 56, MaxEntries: 16})
	must(t, err)
	defer m.Close()
	must(t, m.Pin(n.pin(name)))
}

// replaceTypes pins a map whose values are of the same size, with two fields in each other's place.
func (n *node) replaceTypes(t *testing.T, name, a, b string) {
	t.Helper()
	spec, err := bpf.LoadSallyport()
	must(t, err)
	m := spec.Maps[name].Copy()
	value := *m.Value.(*btf.Struct)
	value.Members = slices.Clone(value.Members)
	for i, f := range value.Members {
		switch f.Name {
		case a:
			value.Members[i].Name = b
		case b:
			value.Members[i].Name = a
		}
	}
	m.Value = &value
	m.MaxEntries = 16
	made, err := ebpf.NewMap(m)
	must(t, err)
	defer made.Close()
	must(t, os.Remove(n.pin(name)))
	must(t, made.Pin(n.pin(name)))
}

// TestNoBPFFS: pins need a bpffs, and one that outlives this mount namespace.
func TestNoBPFFS(t *testing.T) {
	t.Parallel()
	_, err := datapath.Open(datapath.Config{Dir: filepath.Join(t.TempDir(), "sallyport")})
	if !errors.Is(err, datapath.ErrBPFFS) || !strings.Contains(err.Error(), "mount -t bpf") {
		t.Errorf("error is %v, want %v with what to do", err, datapath.ErrBPFFS)
	}
}

// privateMount is the environment variable that makes TestPrivateBPFFS its own child.
const privateMount = "SALLYPORT_TEST_PRIVATE_BPFFS"

// TestPrivateBPFFS runs itself in a mount namespace of its own, in which it mounts a bpffs.
func TestPrivateBPFFS(t *testing.T) {
	if dir := os.Getenv(privateMount); dir != "" {
		out, err := exec.Command("mount", "-t", "bpf", "bpf", dir).CombinedOutput()
		if err != nil {
			t.Fatalf("mount: %v: %s", err, out)
		}
		_, err = datapath.Open(datapath.Config{Dir: filepath.Join(dir, "sallyport")})
		if !errors.Is(err, datapath.ErrBPFFS) || !strings.Contains(err.Error(), "private") {
			t.Errorf("error is %v, want %v", err, datapath.ErrBPFFS)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 2 { // the kernel's own two files
			t.Errorf("left in the private bpffs: %v (%v)", left, err)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: mount namespaces (CAP_SYS_ADMIN)")
	}
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", os.Args[0], "-test.run", "^TestPrivateBPFFS$", "-test.v")
	cmd.Env = append(os.Environ(), privateMount+"="+t.TempDir())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in a private mount namespace: %v\n%s", err, out)
	}
}
