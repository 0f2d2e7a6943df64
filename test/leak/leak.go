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
// Objects of the kernel do not say who made them. What other, live processes hold, have pinned or have mounted in a lab or a demo of
// theirs is left out, and so is what shares a map with that: tests of other processes go on beside, and an agent that runs on the machine
// for another reason does not fail the test. What is left over nevertheless is looked at again when no other test process has a test that
// calls Check: if it is there then, it is of the test or of one that ran beside it. A test that calls Check cannot be parallel.
func Check(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		return // nothing can be made without root, and nothing can be seen
	}
	release, err := share(os.TempDir())
	if err != nil {
		t.Fatalf("leak: %v", err)
	}
	token := ulid.Make().String()
	t.Setenv(marker, token)
	before, _, err := look(token)
	if err != nil {
		release()
		t.Fatalf("leak: %v", err)
	}
	t.Cleanup(func() {
		defer release()
		left, err := wait(token, before, grace)
		if len(left) > 0 {
			if lockErr := alone(func() { left, err = wait(token, before, grace) }); lockErr != nil {
				t.Errorf("leak: %v", lockErr)
			}
		}
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

// wait looks until nothing new of the test is left or the time is over, and returns what is. The test is over: what one look found and
// another did not is gone, and what comes later is of others. What is of others in one look alone may be the test's: another process that
// looks at the machine holds each object for a moment.
func wait(token string, before snapshot, limit time.Duration) ([]string, error) {
	var left snapshot
	var were map[object]bool // of others at the look before
	for deadline := time.Now().Add(limit); ; {
		now, others, err := look(token)
		if err != nil {
			return nil, err
		}
		if left == nil {
			left = now.since(before)
		}
		maps.DeleteFunc(left, func(o object, _ string) bool {
			_, still := now[o]
			return !still || others[o] && were[o]
		})
		if were = others; len(left) == 0 || time.Now().After(deadline) {
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

// look finds everything, and what of it is of other processes.
func look(token string) (all snapshot, others map[object]bool, err error) {
	v, err := newView(token)
	if err != nil {
		return nil, nil, err
	}
	all = snapshot{}
	var errs []error
	for _, list := range []func() (snapshot, error){
		v.programs, v.bpfMaps, v.links, v.mounts, v.controlGroups, v.devices, v.namespaces, v.processes,
	} {
		s, err := list()
		errs = append(errs, err)
		maps.Copy(all, s)
	}
	return all, v.others(), errors.Join(errs...)
}
