package e2e_test

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestDrill: somebody opens a path for the sake of seeing it close, stops the agent, and has it in writing that the kernel closed the
// path. Whoever has the Keyring can verify that.
func TestDrill(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{plain: true})
	for _, d := range []*daemon{w.collector, w.agent, w.proxy} {
		d.start(t)
	}
	file := w.issue(t, wanted{"host-echo", netip.MustParseAddr("127.83.80.2"), "10s"})
	record := filepath.Join(w.Dir, "drill")
	run, err := w.Node.Start(exec.Command(filepath.Join(w.bin, "sallyport"), "--run-dir", w.files.run, "drill", "run", file, "--key", w.key, "--out", record, "--yes"))
	must(t, err)
	waitUntil(t, "the drill to ask for the agent's end", func() bool { return hasEnded(run) || strings.Contains(run.Output(), "stop the agent") })
	if hasEnded(run) {
		t.Fatalf("the drill ended:\n%s", run.Output())
	}
	w.agent.stop(t)
	waitUntil(t, "the drill to ask for the agent", func() bool { return hasEnded(run) || strings.Contains(run.Output(), "start the agent") })
	w.agent.start(t)
	if err := run.Wait(within(t, patience)); err != nil {
		t.Fatalf("%v\n%s", err, run.Output())
	}
	type drill struct {
		By, Service, Before, Live, New string
		Closed                         bool
	}
	got := read[drill](t, w, "drill", "verify", record, "--policy", w.files.resources)
	if want := (drill{"alice", "host-echo", "reset", "reset", "reset", true}); got != want {
		t.Errorf("have %+v, want %+v", got, want)
	}
	w.breakOffDrill(t)
}

// breakOffDrill has systemd take the agent's end for done that is none: the drill proves nothing, and leaves no node without an agent behind.
func (w *world) breakOffDrill(t *testing.T) {
	t.Helper()
	bin := t.TempDir()
	must(t, os.WriteFile(filepath.Join(bin, "systemctl"), []byte("#!/bin/sh\necho \"$@\" >> "+bin+"/asked\n"), 0o755))
	file := w.issue(t, wanted{"host-echo", netip.MustParseAddr("127.83.80.2"), "2s"})
	cmd := exec.Command(filepath.Join(w.bin, "sallyport"), "--run-dir", w.files.run, "drill", "run", file, "--key", w.key, "--stop-agent", "--yes")
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	run, err := w.Node.Start(cmd)
	must(t, err)
	if err := run.Wait(within(t, patience)); err == nil || !strings.Contains(run.Output(), "the agent still answered") {
		t.Errorf("%v\n%s", err, run.Output())
	}
	asked, err := os.ReadFile(filepath.Join(bin, "asked"))
	if err != nil || string(asked) != "stop sallyport-agent\nstart sallyport-agent\n" {
		t.Errorf("asked of systemd: %q, %v", asked, err)
	}
}

func hasEnded(p *lab.Process) bool {
	select {
	case <-p.Exited():
		return true
	default:
		return false
	}
}
