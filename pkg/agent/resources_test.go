package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"golang.org/x/sys/unix"
)

// directory is a resources directory, with what came of it.
type directory struct {
	*resources
	t       *testing.T
	dir     string
	applied [][]datapath.Service
	changes int
	ifindex int
	refuse  error // of the kernel
	// unchanged is why a change could not be carried through.
	unchanged error
}

func newDirectory(t *testing.T, table ...datapath.Service) *directory {
	t.Helper()
	root := t.TempDir()
	d := &directory{t: t, dir: filepath.Join(root, "resources.d"), ifindex: 7}
	d.resources = &resources{
		from: files(d.dir), verified: filepath.Join(root, "verified.yaml"), proxy: filepath.Join(root, "policy.yaml"),
		ids: newServiceIDs(table), problems: newProblems(slog.New(slog.DiscardHandler)), kick: make(chan struct{}, 1),
		apply: func(s []datapath.Service) (uint32, error) {
			if d.refuse == nil {
				d.applied = append(d.applied, s)
			}
			return uint32(len(d.applied)), d.refuse
		},
		locate: func(policy.ProtectedService) (place, error) {
			if d.ifindex == 0 {
				return place{}, errNotHere
			}
			return place{device: d.ifindex}, nil
		},
		changed: func(*enforced) error { d.changes++; return d.unchanged },
	}
	must(t, os.Mkdir(d.dir, 0o755))
	return d
}

// restart is another agent on the same files.
func (d *directory) restart() *directory {
	d.t.Helper()
	next := newDirectory(d.t, d.applied[len(d.applied)-1]...)
	next.dir, next.from, next.verified, next.proxy = d.dir, d.from, d.verified, d.proxy
	return next
}

func (d *directory) write(name, yaml string) {
	d.t.Helper()
	must(d.t, os.WriteFile(filepath.Join(d.dir, name), []byte(yaml), 0o644))
}

const podAndHost = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: web}
spec: {target: Pod, ports: [80], addresses: ["10.2.0.2"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: db}
spec: {target: Host, ports: [5432]}
`

func TestResourcesArePutToWork(t *testing.T) {
	d := newDirectory(t, datapath.Service{Name: "web", ID: 41})
	d.write("a.yaml", podAndHost)
	must(t, d.load())
	want := []datapath.Service{
		{ID: 42, Name: "db", Target: datapath.TargetHost, Protocol: datapath.TCP, DenyUDP: true, Ports: []uint16{5432}},
		{ID: 41, Name: "web", Target: datapath.TargetPod, Protocol: datapath.TCP, DenyUDP: true, Ports: []uint16{80},
			Addresses: d.current().set.Services()[1].Spec.Addresses, Ifindex: 7},
	}
	if !reflect.DeepEqual(d.applied, [][]datapath.Service{want}) || d.changes != 1 {
		t.Errorf("applied %+v, %d changes", d.applied, d.changes)
	}
	for _, file := range []string{d.verified, d.proxy} {
		data, err := os.ReadFile(file)
		must(t, err)
		if set, err := policy.Parse(file, data); err != nil || set.Digest() != d.current().set.Digest() {
			t.Errorf("%s: %v", file, err)
		}
	}
	d.reload()
	if len(d.applied) != 1 || d.changes != 1 {
		t.Errorf("nothing changed, but: %d tables, %d changes", len(d.applied), d.changes)
	}
	d.ifindex = 9 // the pod's device is another one
	d.reload()
	if len(d.applied) != 2 || d.applied[1][1].Ifindex != 9 || d.changes != 2 {
		t.Errorf("device moved: %+v, %d changes", d.applied, d.changes)
	}
	d.write("b.yaml", "apiVersion: sallyport.dev/v1alpha1\nkind: Keyring\nmetadata: {name: k}\nspec:\n  version: 1\n  people: [{name: a, keys: [{publicKey: \""+newSigner(t).key.Public().String()+"\"}]}]\n")
	d.reload()
	if len(d.applied) != 2 || d.changes != 3 || len(d.current().set.Keyrings()) != 1 {
		t.Errorf("only policy changed: %d tables, %d changes", len(d.applied), d.changes)
	}
}

// TestRowsOfAProtocol: what a service says of UDP is in the kernel's table.
func TestRowsOfAProtocol(t *testing.T) {
	const service = "apiVersion: sallyport.dev/v1alpha1\nkind: ProtectedService\nmetadata: {name: a}\nspec: {target: Host, ports: [53]%s}\n"
	for says, want := range map[string]datapath.Service{
		"":                            {Protocol: datapath.TCP, DenyUDP: true},
		", udp: Deny":                 {Protocol: datapath.TCP, DenyUDP: true},
		", udp: Allow":                {Protocol: datapath.TCP},
		", protocol: UDP":             {Protocol: datapath.UDP, Idle: policy.DefaultIdle},
		", protocol: UDP, idle: 1m5s": {Protocol: datapath.UDP, Idle: 65 * time.Second},
	} {
		d := newDirectory(t)
		d.write("a.yaml", fmt.Sprintf(service, says))
		must(t, d.load())
		got := d.applied[0][0]
		want.ID, want.Name, want.Target, want.Ports = got.ID, "a", datapath.TargetHost, []uint16{53}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, want %+v", says, got, want)
		}
		d.write("a.yaml", fmt.Sprintf(service, ", udp: Allow"))
		d.reload()
		if changed := len(d.applied) == 2; changed != (says != ", udp: Allow") {
			t.Errorf("%q to udp: Allow: table written again: %v", says, changed)
		}
	}
}

func TestBadResourcesChangeNothing(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(d *directory)
		says  []string
	}{
		{"bad file", func(d *directory) { d.write("a.yaml", strings.Replace(podAndHost, "[80]", "[0]", 1)) }, []string{"a.yaml:4", "ports"}},
		{"no YAML", func(d *directory) { d.write("b.yaml", "{") }, []string{"b.yaml"}},
		{"vanished directory", func(d *directory) { must(d.t, os.RemoveAll(d.dir)) }, []string{"resources.d"}},
		{"empty directory", func(d *directory) { must(d.t, os.Remove(filepath.Join(d.dir, "a.yaml"))) }, []string{"resources.d"}},
		{"somebody's file", func(d *directory) { must(d.t, os.Chown(filepath.Join(d.dir, "a.yaml"), 1000, 0)) }, []string{"a.yaml", "uid 1000"}},
		{"refused by the kernel", func(d *directory) {
			d.refuse = errors.New("map is full")
			d.write("a.yaml", strings.Replace(podAndHost, "[80]", "[81]", 1))
		}, []string{"map is full"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDirectory(t)
			d.write("a.yaml", podAndHost)
			must(t, d.load())
			digest := d.current().set.Digest()
			c.spoil(d)
			d.reload()
			if problems := strings.Join(d.problems.lines(), "\n"); !contains(problems, c.says...) {
				t.Errorf("problems: %q", problems)
			}
			if len(d.applied) != 1 || d.changes != 1 || d.current().set.Digest() != digest {
				t.Errorf("something changed: %d tables, %d changes", len(d.applied), d.changes)
			}
			if d.refuse != nil {
				return
			}
			next := d.restart()
			must(t, next.load())
			if next.current().set.Digest() != digest || len(next.problems.lines()) == 0 {
				t.Errorf("after a restart: digest %s, problems %v", next.current().set.Digest(), next.problems.lines())
			}
		})
	}
}

func TestFirstStartNeedsGoodResources(t *testing.T) {
	d := newDirectory(t)
	if err := d.load(); err == nil || d.current() != nil || len(d.applied) != 0 {
		t.Errorf("%v", err)
	}
	d.write("a.yaml", podAndHost)
	must(t, os.WriteFile(d.verified, []byte("nonsense"), 0o600))
	must(t, os.Chmod(filepath.Join(d.dir, "a.yaml"), 0o666))
	if err := d.load(); err == nil || !contains(err.Error(), "0666", "verified.yaml") {
		t.Errorf("%v", err)
	}
}

func TestPodThatIsNotThereYet(t *testing.T) {
	d := newDirectory(t)
	d.ifindex = 0
	d.write("a.yaml", podAndHost)
	must(t, d.load())
	if len(d.applied) != 1 || d.applied[0][1].Ifindex != 0 || !contains(strings.Join(d.problems.lines(), "\n"), "web", errNotHere.Error()) {
		t.Errorf("applied %+v, problems %v", d.applied, d.problems.lines())
	}
	d.ifindex = 3
	d.reload()
	if len(d.applied) != 2 || len(d.problems.lines()) != 0 {
		t.Errorf("applied %+v, problems %v", d.applied, d.problems.lines())
	}
}

// TestHungDiskKeepsNothingOpen: while the disk of the state directory hangs, what tightens is in force, with the proxy, and the grants
// that it refuses are looked at.
func TestHungDiskKeepsNothingOpen(t *testing.T) {
	for _, signed := range []bool{false, true} {
		o := newOffice(t)
		d := newDirectory(t)
		if signed {
			d = o.node(t)
		} else {
			d.write("a.yaml", podAndHost)
			must(t, d.load())
		}
		digest := d.current().set.Digest()
		changed := make(chan string, 1)
		d.changed = func(e *enforced) error {
			proxys, err := os.ReadFile(d.proxy)
			if set, parsed := policy.Parse(d.proxy, proxys); err != nil || parsed != nil || set.Digest() != e.set.Digest() {
				t.Errorf("what the proxy has: %v, %v", err, parsed)
			}
			changed <- e.set.Digest()
			return nil
		}
		must(t, os.Remove(d.verified))
		must(t, unix.Mkfifo(d.verified, 0o600)) // whoever reads it waits
		d.write("deny.yaml", "apiVersion: sallyport.dev/v1alpha1\nkind: DenyList\nmetadata: {name: out}\nspec: {reason: left, people: [mallory]}\n")
		done := make(chan struct{})
		go func() { d.reload(); close(done) }()
		select {
		case now := <-changed:
			if now == digest || d.current().set.Digest() != now {
				t.Error("the old set is in force")
			}
		case <-time.After(10 * time.Second):
			t.Error("nobody was told of it")
		}
		back, err := os.OpenFile(d.verified, os.O_WRONLY, 0) // waits until somebody reads
		must(t, err)
		must(t, back.Close())
		<-done
		if lines := d.problems.lines(); len(lines) > 0 || d.restart().mustLast().Digest() != d.current().set.Digest() {
			t.Errorf("when the disk is back: %v", lines)
		}
	}
}

func (d *directory) mustLast() *policy.Set {
	d.t.Helper()
	set, err := d.last()
	must(d.t, err)
	return set
}

// TestUnfinishedChangeIsTriedAgain: what could not be ended when the resources changed is ended with a later look, which finds no change.
func TestUnfinishedChangeIsTriedAgain(t *testing.T) {
	d := newDirectory(t)
	d.write("a.yaml", podAndHost)
	d.unchanged = errors.New("cannot be ended")
	must(t, d.load())
	d.reload()
	d.unchanged = nil
	d.reload()
	d.reload()
	if d.changes != 3 {
		t.Errorf("told %d times, want 3", d.changes)
	}
}

// TestOlderKeyring: without signatures a keyring of a lower version changes nothing, also over a restart; the same version and a
// higher one are taken.
func TestOlderKeyring(t *testing.T) {
	d := newDirectory(t)
	keyring := func(version int, people ...string) {
		t.Helper()
		yaml := fmt.Sprintf("apiVersion: sallyport.dev/v1alpha1\nkind: Keyring\nmetadata: {name: people}\nspec:\n  version: %d\n  people:\n", version)
		for _, name := range people {
			yaml += fmt.Sprintf("  - {name: %s, keys: [{publicKey: %q}]}\n", name, newSigner(t).key.Public())
		}
		d.write("keyring.yaml", yaml)
	}
	check := func(d *directory, people int, refused bool) {
		t.Helper()
		if n := len(d.current().set.Keyrings()[0].Spec.People); n != people {
			t.Errorf("%d people are in force, want %d", n, people)
		}
		told := strings.Join(d.problems.lines(), "\n")
		if contains(told, "version 1, and version 2 is in force") != refused {
			t.Errorf("problems: %q", told)
		}
	}
	d.write("services.yaml", podAndHost)
	keyring(2, "alice")
	must(t, d.load())
	keyring(1, "alice", "mallory")
	d.reload()
	check(d, 1, true)
	next := d.restart()
	must(t, next.load())
	check(next, 1, true)
	keyring(2, "alice", "bob")
	d.reload()
	check(d, 2, false)
	keyring(3, "alice", "bob", "carol")
	d.reload()
	check(d, 3, false)
}
