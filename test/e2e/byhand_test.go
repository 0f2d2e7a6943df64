package e2e_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// endAllByHand is the line of ARCHITECTURE.md with which a person ends every path.
func endAllByHand(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../ARCHITECTURE.md")
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if strings.HasSuffix(line, "| bpftool batch file -\n") {
			return line
		}
	}
	t.Fatal("ARCHITECTURE.md has no such line")
	return ""
}

// TestEndAllByHand: with the agent dead, the documented line alone ends every path, and the agent that comes back records it.
func TestEndAllByHand(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{})
	for _, d := range []*daemon{w.collector, w.agent, w.guard, w.proxy} {
		d.start(t)
	}
	var conns []live
	var ways []way
	for _, service := range []string{"pod-echo", "host-echo"} {
		for _, f := range lab.Families() {
			way := w.ways(service, f)[0]
			w.open(t, wanted{service, way.from, "10m"})
			ways, conns = append(ways, way), append(conns, way.dialDirect(t))
		}
	}
	w.agent.kill(t)
	for _, c := range conns {
		if o := c.ask(); o.who != direct {
			t.Fatalf("before: %s", o)
		}
	}
	// The line names the usual place of the pins, which is that of this world for it alone.
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", `mount --bind "$0" /sys/fs/bpf && exec sh -c "$1"`, w.bpffs, endAllByHand(t))
	if s := capture(cmd); s.err != nil {
		t.Fatalf("by hand: %s", s)
	}
	for i, c := range conns {
		c.wantCut(t)
		if o := ways[i].plain(within(t, patience)); o.who == direct {
			t.Errorf("%s: a new connection: %s", ways[i].service, o)
		}
	}
	w.agent.start(t)
	waitUntil(t, "the ends of the grants", func() bool { return !strings.Contains(w.cli(t, "grants", "-o", "json"), `"active"`) })
	if out := w.cli(t, "grants", "-o", "json"); strings.Count(out, `"revoked"`) != len(ways) {
		t.Errorf("the grants ended as %s", out)
	}
	for _, d := range []*daemon{w.proxy, w.agent, w.guard, w.collector} {
		d.stop(t)
	}
}
