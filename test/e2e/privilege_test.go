package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/features"

	"github.com/sallyport-dev/sallyport/pkg/privilege"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// dutyTime bounds each thing that a process has to do. Without a capability nothing may happen at all.
var dutyTime = bound(6 * time.Second)

// confined is the command line of a program that has root's uid and no more than these capabilities, as a unit
// with CapabilityBoundingSet= and NoNewPrivileges= has it.
func confined(set []privilege.Capability, program string, args ...string) (name string, all []string) {
	bounding := "-all"
	for _, c := range set {
		bounding += ",+" + strings.ToLower(strings.TrimPrefix(c.Name, "CAP_"))
	}
	return "setpriv", append([]string{"--bounding-set", bounding, "--inh-caps", "-all", "--no-new-privs", program}, args...)
}

// confine has each of the three run with a set of its own, in programs of the given folder.
func (w *world) confine(bin string, agent, guard, launcher []privilege.Capability) {
	for d, set := range map[*daemon][]privilege.Capability{w.agent: agent, w.guard: guard, w.proxy: launcher} {
		d.name, d.args = confined(set, filepath.Join(bin, filepath.Base(d.name)), d.args...)
	}
}

func without(set []privilege.Capability, name string) []privilege.Capability {
	return slices.DeleteFunc(slices.Clone(set), func(c privilege.Capability) bool { return c.Name == name })
}

// TestPrivilegesSuffice: with exactly the sets that the processes ask for, everything works.
func TestPrivilegesSuffice(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{plain: true})
	w.confine(w.bin, privilege.Agent().Capabilities, privilege.Guard().Capabilities, privilege.Launcher().Capabilities)
	if err := w.duties(t); err != nil {
		t.Fatal(err)
	}
	w.agent.stop(t)
	name, args := confined(privilege.Agent().Capabilities, filepath.Join(w.bin, "sallyport-agent"), "uninstall", "--config", w.files.agent)
	if out, err := w.Node.Run(within(t, patience), name, args...); err != nil {
		t.Errorf("uninstall: %v\n%s", err, out)
	}
	w.nothingLeft(t)
}

// TestPrivilegesAreAskedFor: a process that lacks one does not start, and says which, and what to do.
func TestPrivilegesAreAskedFor(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{plain: true})
	for _, p := range []struct {
		set     privilege.Set
		program string
		args    []string
	}{
		{privilege.Agent(), "sallyport-agent", []string{"run", "--config", w.files.agent}},
		{privilege.Agent(), "sallyport-agent", []string{"uninstall", "--config", w.files.agent}},
		{privilege.Guard(), "sallyport-agent", []string{"guard", "--config", w.files.agent}},
		{privilege.Launcher(), "sallyport-proxy", []string{"--config", w.files.proxy}},
	} {
		for _, gone := range p.set.Capabilities {
			name, args := confined(without(p.set.Capabilities, gone.Name), filepath.Join(w.bin, p.program), p.args...)
			out, err := w.Node.Run(within(t, patience), name, args...)
			if err == nil || !strings.Contains(out, "the "+p.set.Process+" has no "+gone.Name) || !strings.Contains(out, "hint: ") {
				t.Errorf("%s %s without %s: %v\n%s", p.program, p.args[0], gone.Name, err, out)
			}
		}
	}
	if left, err := os.ReadDir(w.bpffs); err != nil || exists(w.files.state) || exists(w.files.run) || slices.ContainsFunc(left, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "sallyport") }) {
		t.Errorf("a refused start left something: %v %v", left, err)
	}
}

// TestPrivilegesAreNeeded: with the question left out, and without one capability, something does not work. What could
// be left out without harm would be one too many.
func TestPrivilegesAreNeeded(t *testing.T) {
	leak.Check(t)
	bin := buildChanged(t, filepath.Join(built.dir, "unasked"), "pkg/privilege/privilege.go", func(text string) string {
		return strings.Replace(text, "if len(missing) == 0 {", "if true {", 1)
	})
	agent, guard, launcher := privilege.Agent().Capabilities, privilege.Guard().Capabilities, privilege.Launcher().Capabilities
	for _, p := range []privilege.Set{privilege.Agent(), privilege.Guard(), privilege.Launcher()} {
		for _, gone := range p.Capabilities {
			t.Run(p.Process+"/"+gone.Name, func(t *testing.T) {
				w := newWorld(t, options{plain: true})
				sets := map[string][]privilege.Capability{"agent": agent, "guard": guard, "launcher of the proxy": launcher}
				sets[p.Process] = without(p.Capabilities, gone.Name)
				w.confine(bin, sets["agent"], sets["guard"], sets["launcher of the proxy"])
				err := w.duties(t)
				t.Logf("%.200v", err)
				if needed := gone.Name != "CAP_BPF" || bpfIsKept(t); needed != (err != nil) {
					t.Errorf("needed %v, without it: %v", needed, err)
				}
				_, _ = w.Node.Run(within(t, patience), filepath.Join(w.bin, "sallyport"), "uninstall", "--yes", "--config", w.files.agent)
			})
		}
	}
}

// bpfIsKept says whether the kernel keeps every use of bpf() from those without CAP_BPF, rather than only the loading
// of programs and maps.
func bpfIsKept(t *testing.T) bool {
	t.Helper()
	version, err := features.LinuxVersionCode()
	must(t, err)
	return version < 5<<16|19<<8
}

// duties has the processes started and asks for everything that they are there for. It returns the first that
// is not done.
func (w *world) duties(t *testing.T) error {
	t.Helper()
	if err := errors.Join(w.collector.launch(), w.collector.wait()); err != nil {
		return err
	}
	// A pod's namespace is found by its processes; this one has more privileges than the agent.
	if _, err := w.Pod.Start(exec.Command("sleep", "600")); err != nil {
		return err
	}
	for _, d := range []*daemon{w.agent, w.guard, w.proxy} {
		if err := d.launch(); err != nil {
			return err
		}
		if err := d.waitFor(dutyTime); err != nil {
			return err
		}
	}
	for _, duty := range []struct {
		name string
		do   func() error
	}{
		{"steer", w.dutySteer}, {"open and end a path", w.dutyPath}, {"reload", w.dutyReload}, {"hook a new device", w.dutyDevice},
		{"put pins back", w.dutyPins}, {"restart", w.dutyRestart}, {"steer after all that", w.dutySteer},
	} {
		if err := duty.do(); err != nil {
			return fmt.Errorf("%s: %w", duty.name, err)
		}
	}
	return nil
}

// soon asks until it gets no error.
func soon(f func() error) error {
	for end := time.Now().Add(dutyTime); ; time.Sleep(20 * time.Millisecond) { // between two looks at the condition
		if err := f(); err == nil || time.Now().After(end) {
			return err
		}
	}
}

func (w *world) dutySteer() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*dutyTime)
	defer cancel()
	for _, target := range w.chaosTargets() {
		if o := target.plain(ctx); o.who != cut {
			return fmt.Errorf("%s without an identity: %s", target.to, o)
		}
		if o := target.identified(ctx, w, web); o.who != proxied {
			return fmt.Errorf("%s with one: %s", target.to, o)
		}
	}
	if s := w.try("flows", "-o", "json"); s.err != nil || !strings.Contains(s.stdout, web.String()) {
		return fmt.Errorf("no record of %s: %s", web, s)
	}
	return nil
}

func (w *world) dutyPath() error {
	for _, service := range services() {
		way := w.ways(service, lab.IPv4)[0]
		file := filepath.Join(w.Dir, service+time.Now().Format("150405.000000")+".grant")
		s := w.try("grant", "issue", "--service", service, "--client", way.from.String(), "--for", "1m", "--node", nodeName, "--reason", "test",
			"--key", w.key, "--policy", w.files.resources, "--out", file, "--yes")
		if s.err != nil {
			return fmt.Errorf("issue: %s", s)
		}
		if s = w.try("grant", "activate", file, "--key", w.key, "--yes", "-o", "json"); s.err != nil {
			return fmt.Errorf("activate: %s", s)
		}
		var g activated
		if err := json.Unmarshal([]byte(s.stdout), &g); err != nil {
			return err
		}
		if err := w.dutyEnd(way, g); err != nil {
			return fmt.Errorf("%s: %w", way.to, err)
		}
	}
	return nil
}

// dutyEnd revokes, and a connection that says nothing ends as well.
func (w *world) dutyEnd(way way, g activated) error {
	ctx, cancel := context.WithTimeout(context.Background(), dutyTime)
	defer cancel()
	conn, err := way.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if o := (live{conn, unmapped(conn.LocalAddr())}).ask(); o.who != direct {
		return fmt.Errorf("under a path: %s", o)
	}
	if s := w.try("grant", "revoke", g.ID, "--why", "test"); s.err != nil {
		return fmt.Errorf("revoke: %s", s)
	}
	if err := conn.SetReadDeadline(time.Now().Add(dutyTime)); err != nil {
		return err
	}
	if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
		return fmt.Errorf("idle connection after the end: %v, want a reset", err)
	}
	if o := way.plain(ctx); o.who != cut {
		return fmt.Errorf("after the end: %s", o)
	}
	return nil
}

// look is `sallyport status`, as far as it can be had.
func (w *world) look() (s status, err error) {
	said := w.try("status", "-o", "json")
	if said.err != nil {
		return s, fmt.Errorf("status: %s", said)
	}
	return s, json.Unmarshal([]byte(said.stdout), &s)
}

func (w *world) dutyReload() error {
	before, err := w.look()
	if err != nil {
		return err
	}
	const more = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: more}
spec: {target: Host, ports: [8099], access: [{identities: ["spiffe://example.org/app/web"]}]}
`
	if err := os.WriteFile(filepath.Join(w.files.resources, "20-more.yaml"), []byte(more), 0o600); err != nil {
		return err
	}
	return soon(func() error {
		if now, err := w.look(); err != nil || now.Services != before.Services+1 {
			return fmt.Errorf("services: %d, were %d (%w)", now.Services, before.Services, err)
		}
		return nil
	})
}

func (w *world) dutyDevice() error {
	pod, err := w.StartPod(0, nil)
	if err != nil {
		return err
	}
	return errors.Join(soon(func() error {
		now, err := w.look()
		for _, h := range now.Hooks {
			if h.Device == lab.StartedDevice(0) {
				return nil
			}
		}
		return fmt.Errorf("hooks: %v (%w)", now.Hooks, err)
	}), pod.End())
}

func (w *world) dutyPins() error {
	pins, err := w.lastingPins()
	if err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(w.bpffs, "sallyport")); err != nil {
		return err
	}
	return soon(func() error {
		for _, p := range pins {
			// What was of the pod that is gone need not come back.
			if _, err := os.Lstat(p); err != nil && strings.Contains(p, "lo_in") {
				return err
			}
		}
		return nil
	})
}

func (w *world) dutyRestart() error {
	for _, d := range []*daemon{w.agent, w.guard, w.proxy} {
		if err := d.proc.Stop(startTime); err != nil {
			return fmt.Errorf("stop: %w\n%s", err, d.proc.Output())
		}
		if err := d.launch(); err != nil {
			return err
		}
		if err := d.waitFor(dutyTime); err != nil {
			return err
		}
	}
	// The guard let go when it stopped, and holds again now: the pins alone were left in between.
	if !strings.Contains(w.guard.proc.Output(), "links held") {
		return fmt.Errorf("guard: %s", w.guard.proc.Output())
	}
	return nil
}
