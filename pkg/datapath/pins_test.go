package datapath_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// unpinned is a node whose pins are all removed, while a guard holds the links.
func unpinned(t *testing.T, profile datapath.Profile) (*node, *guard) {
	t.Helper()
	n := newLeakFree(t, profile)
	n.standIn(t)
	links, err := n.d.LinkIDs()
	must(t, err)
	g := n.guard(t)
	held := len(links)
	if profile == datapath.ProfileClsact { // filters need nobody, unlike the backstop
		held = len(n.d.Backstop())
	}
	g.wait(t, held)
	must(t, os.RemoveAll(n.cf.Dir))
	return n, g
}

// TestRepin: the same maps and links are found where they were, so that the next Open adopts them.
func TestRepin(t *testing.T) {
	n := newLeakFree(t, datapath.ProfileAuto)
	before := n.mapIDs(t)
	links, err := n.d.LinkIDs()
	must(t, err)
	pinned, err := os.ReadDir(filepath.Join(n.cf.Dir, "v4", "links")) // filters of clsact are no links
	must(t, err)
	must(t, os.RemoveAll(n.cf.Dir))
	again, err := n.d.Repin()
	if want := len(before) + len(pinned) + len(datapath.ProgramNames()); err != nil || again != want {
		t.Errorf("%d pins made (%v), want %d", again, err, want)
	}
	if now := n.mapIDs(t); !maps.Equal(before, now) {
		t.Errorf("pinned maps are %v, were %v", now, before)
	}
	if again, err := n.d.Repin(); again != 0 || err != nil {
		t.Errorf("%d pins made (%v), want none: all are there", again, err)
	}
	must(t, n.d.Close())
	n.open(t)
	must(t, n.attachAll(n.d))
	if now, err := n.d.LinkIDs(); err != nil || !n.d.Adopted() || !maps.Equal(links, now) {
		t.Errorf("adopted %v, links are %v (%v), were %v", n.d.Adopted(), now, err, links)
	}
}

// TestRepinWithoutBPFFS: what cannot be pinned is told, and nothing is made in what lies below the mount.
func TestRepinWithoutBPFFS(t *testing.T) {
	n := newLeakFree(t, datapath.ProfileAuto)
	must(t, unix.Unmount(filepath.Dir(n.cf.Dir), unix.MNT_DETACH))
	if _, err := n.d.Repin(); !errors.Is(err, datapath.ErrBPFFS) {
		t.Errorf("%v, want %v", err, datapath.ErrBPFFS)
	}
	if _, err := os.Stat(n.cf.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pin directory: %v, want none", err)
	}
}

// TestStartWithoutPins: a datapath that finds none takes the place of the one that the guard still
// holds. Both in one chain would drop each other's packets.
func TestStartWithoutPins(t *testing.T) { eachProfile(t, testStartWithoutPins) }

func testStartWithoutPins(t *testing.T, profile datapath.Profile) {
	n, g := unpinned(t, profile)
	must(t, n.d.Close())
	n.open(t)
	if n.d.Adopted() {
		t.Error("adopted without pins")
	}
	n.program(t)
	must(t, n.attachAll(n.d))
	n.everySays(t, "proxy", "new datapath")
	var hooks []string
	must(t, n.Node.Do(func() (err error) {
		hooks, err = datapath.Attached(n.Cgroup())
		return err
	}))
	slices.Sort(hooks)
	if once := slices.Compact(slices.Clone(hooks)); len(once) == 0 || len(once) != len(hooks) {
		t.Errorf("hooks are %v, want each once", hooks)
	}
	g.end(t)
	n.everySays(t, "proxy", "without the guard")
}

// TestDetachAll: an uninstall without pins takes the hooks from the guard.
func TestDetachAll(t *testing.T) { eachProfile(t, testDetachAll) }

func testDetachAll(t *testing.T, profile datapath.Profile) {
	n, _ := unpinned(t, profile)
	must(t, n.d.Close())
	var had, left []string
	detached := 0
	must(t, n.Node.Do(func() (err error) {
		if had, err = datapath.Attached(n.Cgroup()); err != nil {
			return err
		}
		if detached, err = datapath.DetachAll(n.Cgroup()); err != nil {
			return err
		}
		left, err = datapath.Attached(n.Cgroup())
		return err
	}))
	if len(had) == 0 || detached != len(had) || len(left) > 0 {
		t.Errorf("detached %d of %v, left %v", detached, had, left)
	}
	n.everySays(t, "service", "detached")
}

// TestProgramNames: the names by which programs are found on devices are those of the object.
func TestProgramNames(t *testing.T) {
	spec, err := bpf.LoadSallyport()
	must(t, err)
	want := slices.Sorted(maps.Keys(spec.Programs))
	want = slices.DeleteFunc(want, func(name string) bool { return !strings.HasPrefix(name, "sp_") })
	if got := slices.Sorted(slices.Values(datapath.ProgramNames())); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
