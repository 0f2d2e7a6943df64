package agent

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"golang.org/x/sys/unix"
)

// onOwnDisk puts the node's state on a small file system of its own.
func (in *installed) onOwnDisk() {
	in.t.Helper()
	dir := in.cfg.Spec.StateDir
	must(in.t, os.MkdirAll(dir, 0o700))
	must(in.t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m,mode=0700"))
	in.t.Cleanup(func() { must(in.t, unix.Unmount(dir, unix.MNT_DETACH)) })
}

func (in *installed) fillDisk() {
	in.t.Helper()
	f, err := os.Create(filepath.Join(in.cfg.Spec.StateDir, "filler"))
	must(in.t, err)
	defer f.Close()
	for page := make([]byte, 4096); err == nil; {
		_, err = f.Write(page)
	}
	if !errors.Is(err, unix.ENOSPC) {
		in.t.Fatal(err)
	}
}

func (in *installed) remountDisk(flags uintptr) {
	in.t.Helper()
	must(in.t, unix.Mount("", in.cfg.Spec.StateDir, "", unix.MS_REMOUNT|flags, ""))
}

// TestStartOnADiskThatTakesNothing: the node is enforced, what the resources refuse is closed, what they allow goes on, nothing
// is added, and the records follow when the disk is back.
func TestStartOnADiskThatTakesNothing(t *testing.T) {
	for _, c := range []struct {
		name      string
		end, mend func(*installed)
	}{
		{"full", (*installed).fillDisk, func(in *installed) { must(in.t, os.Remove(filepath.Join(in.cfg.Spec.StateDir, "filler"))) }},
		{"read-only", func(in *installed) { in.remountDisk(unix.MS_RDONLY) }, func(in *installed) { in.remountDisk(0) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := install(t)
			in.onOwnDisk()
			process := in.ready("run")
			short, err := in.activate(t.Context(), in.agent(), in.signer.envelope(t, nil))
			must(t, err)
			long, err := in.activate(t.Context(), in.agent(), in.signer.envelope(t, func(p *grant.Payload) {
				p.Duration, p.Addresses = 10*time.Minute, []netip.Addr{clientB}
			}))
			must(t, err)
			must(t, process.Kill())
			in.resources(in.signer.resources("5m"))
			c.end(in)

			process = in.ready("run")
			if states, open := in.grantsAndPaths(); states[short.Grant.Id] != stateActive || open[short.Grant.Id] != 1 || open[long.Grant.Id] != 0 {
				t.Errorf("grants %v, open paths %v", states, open)
			}
			if s := in.status(); s.Services != 1 || !contains(strings.Join(s.Problems, "\n"), "store", "its record is not written yet") {
				t.Errorf("status: %v", s)
			}
			third := in.signer.envelope(t, func(p *grant.Payload) { p.Addresses = []netip.Addr{clientB} })
			if _, err := in.activate(t.Context(), in.agent(), third); err == nil {
				t.Error("a grant was activated that could not be recorded")
			}
			c.mend(in)
			in.eventually("the end is recorded, and all is well", func() bool {
				states, _ := in.grantsAndPaths()
				return states[long.Grant.Id] == stateEnded && !slices.ContainsFunc(in.status().Problems, func(p string) bool {
					return !strings.HasPrefix(p, "guard") // none runs
				})
			})
			if _, err := in.activate(t.Context(), in.agent(), third); err != nil {
				t.Errorf("activation when the disk is back: %v", err)
			}
			must(t, process.Stop(10*time.Second))
			in.uninstall()
		})
	}
}

// grantsAndPaths asks the agent for the states of all grants, and how many open paths each has.
func (in *installed) grantsAndPaths() (states map[string]string, open map[string]int) {
	in.t.Helper()
	agent := in.agent()
	grants, err := agent.Grants(in.t.Context(), &api.GrantsRequest{})
	must(in.t, err)
	paths, err := agent.Paths(in.t.Context(), &api.PathsRequest{})
	must(in.t, err)
	states, open = make(map[string]string), make(map[string]int)
	for _, g := range grants.Grants {
		states[g.Id] = g.State
	}
	for _, p := range paths.Paths {
		if p.State == stateActive {
			open[p.Grant]++
		}
	}
	return states, open
}
