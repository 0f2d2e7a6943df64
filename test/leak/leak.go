// Package leak finds what a test left behind in the kernel and on the machine: BPF links (tcx links
// too), programs, maps, pins, mounts, control groups, network devices, namespaces and processes.
package leak

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
)

// grace is how long the kernel may take to free what nobody holds any more.
const grace = 10 * time.Second

// marker is the environment variable by which processes that a test started are known.
const marker = "SALLYPORT_TEST"

// Check fails the test when it ends and something of Sallyport's is there that was not there before.
// Call it first, so that its check runs after every other clean-up.
//
// Objects of the kernel do not say who made them. Test processes that call Check therefore take
// turns, by a lock below the temporary directory, and a test that calls it cannot be parallel.
// What other, live processes hold, have mounted or have pinned in a lab or a demo of theirs is left
// out, so that an agent that runs on the machine for another reason does not fail the test.
func Check(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		return // nothing can be made without root, and nothing can be seen
	}
	release, err := lock(os.TempDir())
	if err != nil {
		t.Fatalf("leak: %v", err)
	}
	token := ulid.Make().String()
	t.Setenv(marker, token)
	before, err := take(token)
	if err != nil {
		release()
		t.Fatalf("leak: %v", err)
	}
	t.Cleanup(func() {
		defer release()
		left, err := wait(token, before, grace)
		if err != nil {
			t.Errorf("leak: %v", err)
		}
		for _, l := range left {
			t.Errorf("leak: %s", l)
		}
	})
}

// object names one thing that can be left behind: its kind and what is unique in that kind.
type object struct{ kind, id string }

// snapshot maps what is there to a line about it.
type snapshot map[object]string

// wait looks until nothing new is left or the time is over, and returns what is. The test is over: what one look found and another did
// not is gone, and what comes later is of others.
func wait(token string, before snapshot, limit time.Duration) ([]string, error) {
	var left snapshot
	for deadline := time.Now().Add(limit); ; {
		now, err := take(token)
		if err != nil {
			return nil, err
		}
		if left == nil {
			left = now.since(before)
		}
		maps.DeleteFunc(left, func(o object, _ string) bool { _, still := now[o]; return !still })
		if len(left) == 0 || time.Now().After(deadline) {
			return left.lines(), nil
		}
		time.Sleep(50 * time.Millisecond) // between two looks at the condition
	}
}

// since is what is in s and not in before.
func (s snapshot) since(before snapshot) snapshot {
	left := maps.Clone(s)
	maps.DeleteFunc(left, func(o object, _ string) bool { _, was := before[o]; return was })
	return left
}

// lines describe what is there, in a stable order.
func (s snapshot) lines() []string {
	var out []string
	for o, line := range s {
		out = append(out, strings.TrimSpace(fmt.Sprintf("%s %s: %s", o.kind, o.id, line)))
	}
	slices.Sort(out)
	return out
}

// take looks at everything, once the machine's processes are known.
func take(token string) (snapshot, error) {
	v, err := newView(token)
	if err != nil {
		return nil, err
	}
	all := snapshot{}
	var errs []error
	for _, look := range []func() (snapshot, error){
		v.programs, v.bpfMaps, v.links, v.mounts, v.controlGroups, v.devices, v.namespaces, v.processes,
	} {
		s, err := look()
		errs = append(errs, err)
		maps.Copy(all, s)
	}
	maps.DeleteFunc(all, func(o object, _ string) bool { return v.foreign[o] && !v.mine[o] })
	return all, errors.Join(errs...)
}
