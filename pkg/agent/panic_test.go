package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// TestPanic: every path ends, whoever opened it, and none is opened until the panic is lifted, over restarts too.
func TestPanic(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, two), "uid:0")
	must(t, err)
	_, err = l.datapath.OpenPath(datapath.Path{Grant: "forged", Client: netip.MustParseAddr("10.1.0.9"), ServiceID: 1,
		Ports: []uint16{5432}, Deadline: datapath.BootTime() + time.Minute})
	must(t, err)

	holding := newHolding(grant.Payload{}) // as if a workload held it
	l.active[row.ID].holding = holding
	ended, err := l.Panic(t.Context(), "leaked key", "uid:7")
	must(t, err)
	select {
	case <-holding.ended:
	default:
		t.Error("the holder was not told")
	}
	if states, open := l.states(); ended != 3 || len(open) != 0 || states[row.ID] != store.StateRevoked {
		t.Errorf("ended %d paths; %v, open %v", ended, states, open)
	}
	if got, want := l.steps(), []string{stepActivated, stepPanic, stepRevoked}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if e := l.storedEvents()[1]; e.Actor != "uid:7" || e.Why != "leaked key" {
		t.Errorf("event of the panic: %v", e)
	}
	l.closed("after a panic")
	l.kill()

	l = b.begin()
	must(t, l.adopt(t.Context()))
	l.closed("after a restart")
	must(t, l.Lift(t.Context(), "keys are new", "uid:0"))
	if l.standing() != "" {
		t.Errorf("stands after it was lifted: %s", l.standing())
	}
	if err := l.Lift(t.Context(), "again", "uid:0"); !errors.Is(err, ErrNoPanic) {
		t.Errorf("lifted twice: %v", err)
	}
	if _, open := l.states(); len(open) != 0 {
		t.Errorf("the lift revived %v", open)
	}
	l.kill()

	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	_, err = l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
}

// closed holds that a panic stands and nothing is opened, by an activation or otherwise.
func (l *life) closed(when string) {
	l.t.Helper()
	if !contains(l.standing(), "by uid:7", "leaked key") {
		l.t.Errorf("%s: panic is %q", when, l.standing())
	}
	if _, err := l.Activate(l.t.Context(), l.signer.envelope(l.t, nil), "uid:0"); !errors.Is(err, ErrPanic) {
		l.t.Errorf("%s: activation: %v", when, err)
	}
	if _, err := l.datapath.OpenPath(datapath.Path{Grant: "late", Client: clientA, ServiceID: 1, Ports: []uint16{5432},
		Deadline: datapath.BootTime() + time.Minute}); !errors.Is(err, datapath.ErrShut) {
		l.t.Errorf("%s: open path: %v", when, err)
	}
	if _, open := l.states(); len(open) != 0 {
		l.t.Errorf("%s: open %v", when, open)
	}
}

// TestPanicWithoutRecord: paths close and stay closed though nothing can be recorded, and the record follows.
func TestPanicWithoutRecord(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, two), "uid:0")
	must(t, err)
	gone, leave := context.WithCancel(t.Context())
	leave() // what is to be recorded fails
	_, err = l.Panic(gone, "leaked key", "uid:7")
	if !errors.Is(err, errNotRecorded) {
		t.Errorf("a panic that could not be recorded: %v", err)
	}
	l.closed("unrecorded")
	_, err = l.tick(t.Context())
	must(t, err)
	if states, _ := l.states(); states[row.ID] != store.StateRevoked || !slices.Contains(l.steps(), stepPanic) {
		t.Errorf("not recorded later: %v, %v", states, l.steps())
	}
	l.kill()
}

// TestPanicOutlivesAStuckDisk: a panic whose disk does not answer closes all paths, and stands also in the agent that comes
// after a kill; that one ends every grant with its reason, and has it on record.
func TestPanicOutlivesAStuckDisk(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, two), "uid:0")
	must(t, err)
	stuck := l.grants
	stuck.mu.Lock() // as who writes to that disk, which never answers
	go func() { _, _ = stuck.Panic(t.Context(), "leaked key", "uid:7") }()
	b.eventually("the mark", func() bool {
		p, err := b.panicMark().read()
		return err == nil && p != nil && p.By == "uid:7"
	})
	if _, open := l.states(); len(open) != 0 {
		t.Errorf("open while the disk is stuck: %v", open)
	}
	l.kill()

	l = b.begin()
	defer func() { l.kill() }()
	must(t, l.adopt(t.Context()))
	l.closed("after the kill")
	rows, err := l.all(t.Context())
	must(t, err)
	if rows[0].ID != row.ID || rows[0].State != store.StateRevoked || !contains(rows[0].EndedWhy, "panic: leaked key") {
		t.Errorf("%+v", rows[0])
	}
	if got, want := l.steps(), []string{stepActivated, stepPanic, stepRevoked}; !slices.Equal(got[:min(len(got), 3)], want) {
		t.Errorf("%v, want %v", got, want)
	}
	if p, err := b.panicMark().read(); p != nil || err != nil {
		t.Errorf("the mark stays when the store has the panic: %v, %v", p, err)
	}
	must(t, l.Lift(t.Context(), "keys are new", "uid:0"))
	l.kill()
	l = b.begin()
	must(t, l.adopt(t.Context()))
	if l.standing() != "" {
		t.Errorf("stands after it was lifted: %s", l.standing())
	}
}

// TestLiftThatFailsLiftsNothing: a panic that is not on record yet, and whose lift the disk does not take either, stands also in the
// next agent; and once it is lifted both are on record.
func TestLiftThatFailsLiftsNothing(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	gone, leave := context.WithCancel(t.Context())
	leave() // nothing can be recorded
	if _, err := l.Panic(gone, "leaked key", "uid:7"); !errors.Is(err, errNotRecorded) {
		t.Errorf("a panic that could not be recorded: %v", err)
	}
	if err := l.Lift(gone, "keys are new", "uid:0"); err == nil {
		t.Error("lifted without a record")
	}
	l.closed("after a lift that failed")
	l.kill()

	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	l.closed("in the next agent")
	must(t, l.Lift(t.Context(), "keys are new", "uid:0"))
	if got := slices.DeleteFunc(l.steps(), func(s string) bool { return s == stepRefused }); !slices.Equal(got, []string{stepPanic, stepLifted}) {
		t.Errorf("on record: %v", got)
	}
	if p, err := b.panicMark().read(); p != nil || err != nil || l.standing() != "" {
		t.Errorf("lifted, and the mark says %v, %v; stands %q", p, err, l.standing())
	}
}

// TestHalfWrittenMarkIsAPanic: what a kill left of the mark is taken for one.
func TestHalfWrittenMarkIsAPanic(t *testing.T) {
	m := panicMark(filepath.Join(t.TempDir(), "panic"))
	if p, err := m.read(); p != nil || err != nil {
		t.Errorf("without a mark: %v, %v", p, err)
	}
	must(t, os.WriteFile(string(m), nil, 0o600))
	if p, err := m.read(); err != nil || !contains(p.String(), "unknown", "cannot be read") {
		t.Errorf("an empty one: %v, %v", p, err)
	}
	must(t, m.remove())
	must(t, m.remove())
}

// TestPanicIsLiftedByRoot: an operator may call it, and root alone gives back what it took away.
func TestPanicIsLiftedByRoot(t *testing.T) {
	o := &operators{}
	_, err := o.LiftPanic(t.Context(), nil) // by nobody whom the kernel vouches for
	if !contains(fmt.Sprint(err), "PermissionDenied", "only root", "hint: ") {
		t.Errorf("%v", err)
	}
}

// TestPanicWithThousandsOfPaths measures it: all of them are closed by the one call at its beginning.
func TestPanicWithThousandsOfPaths(t *testing.T) {
	const each, many = 16, 256
	b := newTestbed(t, each*many)
	l := b.begin()
	defer l.kill()
	for i := range many {
		_, err := l.Activate(t.Context(), b.signer.envelope(t, func(p *grant.Payload) {
			p.Addresses = nil
			for n := range each {
				p.Addresses = append(p.Addresses, netip.AddrFrom4([4]byte{10, 1, byte(i), byte(n + 1)}))
			}
		}), "uid:0")
		must(t, err)
	}
	began := time.Now()
	ended, err := l.shut(&panicNote{By: "uid:7", Why: "leaked key"})
	must(t, err)
	closed := time.Since(began)
	if _, open := l.states(); ended != each*many || len(open) != 0 {
		t.Errorf("ended %d paths of %d, open %d", ended, each*many, len(open))
	}
	began = time.Now()
	_, err = l.Panic(t.Context(), "leaked key", "uid:7")
	must(t, err)
	t.Logf("%d paths of %d grants: closed in %v, recorded in %v", each*many, many, closed, time.Since(began))
	if states, _ := l.states(); len(l.active) != 0 || slices.Contains(slices.Collect(maps.Values(states)), store.StateActive) {
		t.Errorf("%d grants are left", len(l.active))
	}
}

// TestEndOfAllIsItsCausers: a sweep that comes between the closing of every path and the records of it does not take it for somebody
// who wrote the kernel's map; one that did so afterwards is told of.
func TestEndOfAllIsItsCausers(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	panicked := &panicNote{By: "uid:7", Why: "leaked key"}
	jumped := ending{}.revoked("agent", "the clock moved")
	for i, c := range []struct {
		name       string
		end        func(*held)
		actor, why string
	}{
		{"a panic", func(*held) {
			_, err := l.shut(panicked)
			must(t, err)
		}, "uid:7", "panic: leaked key"},
		{"a panic that is lifted at once", func(*held) {
			_, err := l.shut(panicked)
			must(t, err)
			l.mu.Lock()
			l.doomedByPanic()
			l.mu.Unlock()
			must(t, l.Lift(t.Context(), "keys are new", "uid:0"))
		}, "uid:7", "panic: leaked key"},
		{"a jump of the clock", func(*held) { must(t, l.closeAll(jumped)) }, "agent", "the clock moved"},
		{"a jump of the clock, and others come", func(*held) {
			must(t, l.closeAll(jumped))
			l.doomAll(jumped)
		}, "agent", "the clock moved"},
		{"somebody, after all that", func(h *held) {
			must(t, l.datapath.EndPath(h.row.Slots[0], datapath.PathRevoked))
		}, actorKernel, "was set to revoked"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.datapath.Reopen()
			row, err := l.Activate(t.Context(), b.signer.envelope(t, clientNumber(i)), "uid:0")
			must(t, err)
			c.end(l.active[row.ID])
			_, err = l.tick(t.Context())
			must(t, err)
			events := l.storedEvents()
			last := events[len(events)-1]
			if last.GetGrant() != row.ID || last.GetActor() != c.actor || !contains(last.GetWhy(), c.why) {
				t.Errorf("recorded as of %s: %v", c.actor, last)
			}
			if l.standing() != "" {
				must(t, l.Lift(t.Context(), "next", "uid:0"))
			}
			l.doomAll(jumped) // nothing is left: the next case begins anew
		})
	}
}
