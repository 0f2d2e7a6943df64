package e2e_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestRollback: an operator goes to another version and back, with the real commands. Live connections of both kinds go on,
// nobody without an identity is answered, each version's programs run when they should, and the log has the rollback. A
// layout that this version does not know is refused, and enforcement stays as it was.
func TestRollback(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{plain: true})
	first := w.tags(t)
	survivors := []*survivor{w.newSurvivor(t, "host-echo", lab.IPv4), w.newSurvivor(t, "pod-echo", lab.IPv6)}
	check := func(when string, want []string, same bool) {
		t.Helper()
		for _, s := range survivors {
			s.check(t, when)
		}
		for _, f := range lab.Families() {
			stranger := w.ways("host-echo", f)[1] // the other pod: it has no path
			if o := stranger.plain(within(t, patience)); o.who != cut {
				t.Errorf("%s: plain client without a path answered by %s", when, o)
			}
		}
		if got := w.tags(t); slices.Equal(got, want) != same {
			t.Errorf("%s: programs %q, those of the first version %q, want the same: %v", when, got, want, same)
		}
	}
	program := filepath.Base(w.agent.name)
	w.refusesRollback(t, program, "running")
	w.agent.stop(t)
	w.refusesRollback(t, program, "no previous programs are kept")
	w.agent.name = filepath.Join(buildOther(t, filepath.Join(built.dir, "other")), program)
	w.agent.start(t)
	check("upgraded", first, false)
	w.agent.kill(t)
	out, err := w.run(t, program, "rollback", "--config", w.files.agent)
	if err != nil || !strings.Contains(out, "hooks have the programs of the version before") {
		t.Errorf("rollback: %v: %s", err, out)
	}
	check("rolled back", first, true)
	w.refusesLayout(t, program)
	check("another layout was refused", first, true)
	w.agent.name = filepath.Join(w.bin, program)
	w.agent.start(t)
	if !strings.Contains(w.agent.proc.Output(), "adopted=true") {
		t.Error("the first version did not adopt what the rollback left")
	}
	check("the first version is back", first, true)
	if s := w.status(t); !s.Ready || len(s.Problems) > 0 {
		t.Errorf("status: %+v", s)
	}
	waitUntil(t, "the record of the rollback", func() bool { return w.rollbacks(t) > 0 })
	if n := w.rollbacks(t); n != 1 {
		t.Errorf("%d rollbacks on record: those that were refused are none", n)
	}
}

// rollbacks is how many the collector's log has.
func (w *world) rollbacks(t *testing.T) (n int) {
	t.Helper()
	for _, e := range w.grantEvents(t) {
		if e.Event.Step == "ROLLED_BACK" {
			n++
		}
	}
	return n
}

// tags lists "device program tag" of the node's hooks.
func (w *world) tags(t *testing.T) (all []string) {
	t.Helper()
	for _, p := range programsIn(t, w.Node) {
		all = append(all, p.device+" "+p.name+" "+p.tag)
	}
	return slices.Sorted(slices.Values(all))
}

func (w *world) refusesRollback(t *testing.T, program, why string) {
	t.Helper()
	out, err := w.run(t, program, "rollback", "--config", w.files.agent)
	if err == nil || !strings.Contains(err.Error(), why) || !strings.Contains(err.Error(), "hint: ") {
		t.Errorf("rollback: %v: %s; want a refusal that says %q", err, out, why)
	}
}

// refusesLayout starts an agent where another layout is pinned, too.
func (w *world) refusesLayout(t *testing.T, program string) {
	t.Helper()
	unknown := filepath.Join(w.bpffs, "sallyport", "v1")
	must(t, os.Mkdir(unknown, 0o700))
	out, err := w.run(t, program, "run", "--config", w.files.agent)
	if err == nil || !strings.Contains(err.Error(), unknown) || !strings.Contains(err.Error(), "hint: ") {
		t.Errorf("start beside another layout: %v: %s", err, out)
	}
	must(t, os.Remove(unknown))
}
