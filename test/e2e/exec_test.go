package e2e_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

var nightly = spiffeid.RequireFromPath(domain, "/backup/nightly") // may ask for paths

// automationConfig has the agent take requests; automationPolicy lets nightly ask.
const automationConfig = "  automation: {listen: [\"[::]:9470\"]}\n"

func automationPolicy(services string) string {
	return strings.NewReplacer("bindings: [address]", "bindings: [address, workload]", "requesters: [alice]", `requesters: ["spiffe://example.org/backup/*"]`,
		"nodeAddresses: true", "nodeAddresses: false").Replace(bypassPolicy("automation", services))
}

// execIn starts `sallyport exec` as nightly in a namespace.
func (w *world) execIn(t *testing.T, ns *lab.Namespace, id spiffeid.ID, flags []string, command ...string) *lab.Process {
	t.Helper()
	args := append([]string{"exec", "--workload-api", "unix://" + w.socket(id), "--reason", "nightly backup"}, flags...)
	p, err := ns.Start(exec.Command(filepath.Join(w.bin, "sallyport"), append(append(args, "--"), command...)...))
	must(t, err)
	return p
}

// exitCode gives the exit code of a process that ends, or minus the signal.
func exitCode(t *testing.T, p *lab.Process) int {
	t.Helper()
	err := p.Wait(within(t, patience))
	exit, ok := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil:
		return 0
	case !ok:
		t.Fatalf("%v\n%s", err, p.Output())
	}
	status, _ := exit.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return -int(status.Signal())
	}
	return status.ExitStatus()
}

// openPaths counts the paths that are open on the node.
func (w *world) openPaths(t *testing.T) int {
	t.Helper()
	return strings.Count(w.cli(t, "paths", "-o", "json"), `"active"`)
}

// TestExecPostgres: an unchanged pg_dump reads a protected database from a workload that has no more than an identity, and
// nobody does before, after or beside it.
func TestExecPostgres(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{resource: postgresResources(t) + automationPolicy("pg-host, pg-pod"), config: automationConfig, identities: []spiffeid.ID{nightly}})
	bin := postgresBin(t)
	for _, where := range []*lab.Namespace{w.Node, w.Pod} {
		w.startPostgres(t, where, "-h", "*", "-F")
		local := filepath.Join(w.Dir, "pg-"+where.Name)
		_, err := where.Run(within(t, patience), filepath.Join(bin, "psql"), "-X", "-h", local, "-U", "postgres", "-c",
			"CREATE TABLE books AS SELECT n, 'title ' || n || ' of "+where.Name+"' AS title FROM generate_series(1, 20000) n")
		must(t, err)
	}
	for _, d := range []*daemon{w.collector, w.agent, w.guard} {
		d.start(t)
	}
	for _, c := range []struct {
		name, service string
		ns, at        *lab.Namespace
		agent         func(lab.Family) netip.Addr
		binding       string
	}{
		{"from elsewhere", "pg-host", w.Client, w.Node, w.Node.Addr, "address"},
		{"from a pod", "pg-host", w.Pods[1], w.Node, w.Node.Addr, "address"},
		{"on the node", "pg-host", w.Node, w.Node, w.Node.Addr, "workload"},
		{"from elsewhere to a pod", "pg-pod", w.Client, w.Pod, w.Node.Addr, "address"},
		{"from a pod to a pod", "pg-pod", w.Pods[1], w.Pod, w.Node.Addr, "address"},
		{"on the node to a pod", "pg-pod", w.Node, w.Pod, w.Node.Other, "workload"}, // asked from the address that it sends to the pod from
	} {
		for _, f := range lab.Families() {
			t.Run(fmt.Sprintf("%s/%s", c.name, f), func(t *testing.T) {
				at := c.at.Addr(f).String()
				dump := []string{filepath.Join(bin, "pg_dump"), "-w", "-d", fmt.Sprintf("host=%s port=%d user=postgres dbname=postgres connect_timeout=3", at, postgresPort)}
				alone := func(when string) {
					t.Helper()
					if out, err := c.ns.Run(within(t, patience), dump[0], dump[1:]...); err == nil {
						t.Errorf("%s: pg_dump without a path got %d bytes", when, len(out))
					}
				}
				alone("before")
				p := w.execIn(t, c.ns, nightly, []string{"--agent", c.agent(f).String(), "--service", c.service, "--for", "5m", "--binding", c.binding}, dump...)
				if code := exitCode(t, p); code != 0 || !strings.Contains(p.Output(), "20000\ttitle 20000 of "+c.at.Name) || !strings.Contains(p.Output(), "note: path to "+c.service+" on node-1") {
					t.Errorf("pg_dump ended with %d:\n%.2000s", code, p.Output())
				}
				if n := w.openPaths(t); n != 0 {
					t.Errorf("%d paths are left", n)
				}
				alone("after")
			})
		}
	}
	w.agent.stop(t)
}

// TestExecByEitherFamily: by a name with addresses of both families a command is run when what it connects to has its path, and else
// it is said which has none, and why.
func TestExecByEitherFamily(t *testing.T) {
	leak.Check(t)
	onlyV4 := strings.NewReplacer(`sources: ["10.0.0.0/8", "fd00::/16", "127.0.0.0/8", "::1"]`, `sources: ["10.0.0.0/8"]`).Replace(automationPolicy("host-echo"))
	w := newWorld(t, options{resource: onlyV4, config: automationConfig, identities: []spiffeid.ID{nightly}})
	for _, d := range []*daemon{w.collector, w.agent, w.guard} {
		d.start(t)
	}
	v4, v6 := w.Node.Addr(lab.IPv4).String(), w.Node.Addr(lab.IPv6).String()
	hosts := filepath.Join(w.Dir, "hosts")
	write(t, hosts, fmt.Sprintf("%s both\n%s both\n%s far\n2001:db8:ffff::1 far\n2001:db8:ffff::1 gone\n", v4, v6, v4))
	for _, c := range []struct {
		name  string
		flags []string
		code  int
		says  []string
	}{
		{"the other family is refused", []string{"--agent", "both"}, 0, []string{"for 10.1.0.2 until", "note: no path by both at [" + v6 + "]:9470: ", "does not list fd00"}},
		{"the one family", []string{"--agent", "both", "-4"}, 0, []string{"for 10.1.0.2 until"}},
		{"the family that is refused", []string{"--agent", "both", "--ipv6"}, 3, []string{"sallyport: both at [" + v6 + "]:9470: ", "does not list fd00", "hint: "}},
		{"no way to an address", []string{"--agent", "far"}, 0, []string{"for 10.1.0.2 until", "note: no path by far at [2001:db8:ffff::1]:9470: "}},
		{"no way to any", []string{"--agent", "gone"}, 4, []string{"sallyport: gone at [2001:db8:ffff::1]:9470: ", "hint: check --agent: nobody is there"}},
		{"two names", []string{"--agent", "both", "--agent", "gone"}, 4, []string{"for 10.1.0.2 until", "sallyport: gone at "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := append([]string{"--mount", "--propagation", "private", "sh", "-c", `mount --bind "$0" /etc/hosts && exec "$@"`, hosts,
				filepath.Join(w.bin, "sallyport"), "exec", "--workload-api", "unix://" + w.socket(nightly), "--reason", "test", "--service", "host-echo", "--for", "1m"}, c.flags...)
			p, err := w.Client.Start(exec.Command("unshare", append(args, "--", "echo", "it runs")...))
			must(t, err)
			code := exitCode(t, p)
			if code != c.code || strings.Contains(p.Output(), "it runs") != (code == 0) {
				t.Errorf("ended with %d, want %d:\n%s", code, c.code, p.Output())
			}
			for _, words := range c.says {
				if !strings.Contains(p.Output(), words) {
					t.Errorf("does not say %q:\n%s", words, p.Output())
				}
			}
			if n := w.openPaths(t); n != 0 {
				t.Errorf("%d paths are left", n)
			}
		})
	}
}

// TestExec: the command's exit code and signals are its own, and nothing is left of a path when exec dies, whichever way.
func TestExec(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{resource: automationPolicy("host-echo"), config: automationConfig, identities: []spiffeid.ID{nightly}})
	for _, d := range []*daemon{w.collector, w.agent, w.guard} {
		d.start(t)
	}
	flags := []string{"--agent", w.Node.Addr(lab.IPv4).String(), "--service", "host-echo", "--for", "5m"}
	run := func(id spiffeid.ID, command ...string) *lab.Process {
		return w.execIn(t, w.Client, id, flags, command...)
	}
	orphan, foreign := filepath.Join(w.Dir, "orphan"), filepath.Join(w.Dir, "foreign") // found, and not to be started
	must(t, os.WriteFile(orphan, []byte("#!/no/such/interpreter\n"), 0o755))
	must(t, os.WriteFile(foreign, []byte("\x7fELF of nobody"), 0o755))
	for _, c := range []struct {
		name    string
		id      spiffeid.ID
		command []string
		code    int
		says    string
	}{
		{"success", nightly, []string{"true"}, 0, "note: path to host-echo on node-1 for 10.1.0.2 until"},
		{"its own code", nightly, []string{"sh", "-c", "exit 7"}, 7, ""},
		{"ended by a signal", nightly, []string{"sh", "-c", "kill -KILL $$"}, 128 + 9, ""},
		{"not there", nightly, []string{"no-such-program"}, 127, "hint: nothing was asked for"},
		{"without its interpreter", nightly, []string{orphan}, 127, "hint: its paths were given back"},
		{"for another machine", nightly, []string{foreign}, 126, "hint: its paths were given back"},
		{"not allowed", mallory, []string{"true"}, 3, "spiffe://example.org/app/mallory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := run(c.id, c.command...)
			if code := exitCode(t, p); code != c.code || !strings.Contains(p.Output(), c.says) {
				t.Errorf("ended with %d, want %d:\n%s", code, c.code, p.Output())
			}
			if n := w.openPaths(t); n != 0 {
				t.Errorf("%d paths are left", n)
			}
		})
	}
	t.Run("no agent there", func(t *testing.T) {
		p := w.execIn(t, w.Client, nightly, []string{"--agent", "10.1.0.1:9", "--service", "host-echo"}, "true")
		if code := exitCode(t, p); code != 4 || !strings.Contains(p.Output(), "hint: look at spec.automation") {
			t.Errorf("ended with %d:\n%s", code, p.Output())
		}
	})
	waits := []string{"sh", "-c", "trap 'exit 9' TERM; echo ready $$; while :; do sleep 0.1; done"}
	begin := func() (p *lab.Process, child int) {
		t.Helper()
		p = run(nightly, waits...)
		waitUntil(t, "the command", func() bool {
			_, after, ok := strings.Cut(p.Output(), "ready ")
			pid, _, whole := strings.Cut(after, "\n")
			child, _ = strconv.Atoi(pid)
			return ok && whole
		})
		if n := w.openPaths(t); n != 1 {
			t.Fatalf("%d paths are open:\n%s", n, p.Output())
		}
		return p, child
	}
	gone := func(when string) {
		t.Helper()
		waitUntil(t, "the end of the path: "+when, func() bool { return w.openPaths(t) == 0 })
	}
	t.Run("signal", func(t *testing.T) {
		p, _ := begin()
		must(t, p.Signal(syscall.SIGTERM))
		if code := exitCode(t, p); code != 9 {
			t.Errorf("ended with %d:\n%s", code, p.Output())
		}
		gone("signal")
	})
	t.Run("killed", func(t *testing.T) {
		p, child := begin()
		must(t, p.Kill())
		gone("killed")
		waitUntil(t, "the end of the command", func() bool { return errors.Is(syscall.Kill(child, 0), syscall.ESRCH) })
	})
	t.Run("frozen", func(t *testing.T) {
		p, _ := begin()
		since := time.Now()
		must(t, p.Signal(syscall.SIGSTOP))
		gone("frozen")
		if d := time.Since(since); d > 18*time.Second {
			t.Errorf("after %s", d)
		}
		must(t, p.Signal(syscall.SIGCONT))
		waitUntil(t, "the note", func() bool { return strings.Contains(p.Output(), "path on node-1 ended") })
		must(t, p.Signal(syscall.SIGTERM))
		exitCode(t, p)
	})
	t.Run("the agent restarts", func(t *testing.T) {
		p, _ := begin()
		w.agent.kill(t)
		w.agent.start(t)
		for until := time.Now().Add(17 * time.Second); time.Now().Before(until); time.Sleep(500 * time.Millisecond) {
			if n := w.openPaths(t); n != 1 {
				t.Fatalf("%d paths are open:\n%s", n, p.Output())
			}
		}
		must(t, p.Signal(syscall.SIGTERM))
		if code := exitCode(t, p); code != 9 || strings.Contains(p.Output(), "ended:") {
			t.Errorf("ended with %d:\n%s", code, p.Output())
		}
		gone("given back")
	})
}
