package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// jobs let the nightly backup ask for every binding.
const jobs = `---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: jobs}
spec:
  services: [postgres]
  bindings: [address, tuple, workload]
  sources: ["10.0.0.0/8"]
  maxDuration: 15m
  requesters: ["spiffe://example.org/backup/*"]
`

// TestPeopleComeFirstWhateverWorkloadsHold: no path that a workload holds keeps people out, by an ordinary grant or by
// breaking the glass, also where the agent was restarted in between; what would be the same path gives way, and the rest stays.
func TestPeopleComeFirstWhateverWorkloadsHold(t *testing.T) {
	b, c := crewed(t)
	b.config.MaxPaths = 64
	b.use(c.resources("15m") + jobs)
	for _, binding := range []string{policy.BindingAddress, policy.BindingTuple, policy.BindingWorkload} {
		for _, kind := range []grant.Kind{"", grant.BreakGlass} {
			for _, restarted := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s %s, restarted: %v", binding, kind, restarted), func(t *testing.T) {
					b.comesFirst(t, c, binding, kind, restarted)
				})
				// The next case begins without a memory.
				must(t, os.RemoveAll(filepath.Join(b.lab.Dir, "state")))
				must(t, os.Remove(b.owner.Witness))
			}
		}
	}
}

func (b *testbed) comesFirst(t *testing.T, c crew, binding string, kind grant.Kind, restarted bool) {
	l := b.begin()
	defer func() {
		must(t, l.endAll(t.Context(), stepRevoked, "next", "test"))
		l.kill()
	}()
	h, err := l.ActivateFor(t.Context(), wanted{b.ofJob(binding), "svid:1"})
	must(t, err)
	id, ended := h.row.ID, h.holding.ended
	if restarted {
		l.kill()
		l = b.begin()
		must(t, l.adopt(t.Context()))
		ended = l.active[id].holding.ended
	}
	row, err := l.Activate(t.Context(), b.asked(c, "alice bob carol", func(p *grant.Payload) { p.Kind = kind }), "uid:0")
	must(t, err)
	_, open := l.states()
	gaveWay := binding == policy.BindingAddress
	if open[row.ID] != 1 || (open[id] == 0) != gaveWay {
		t.Errorf("open: %v", open)
	}
	select {
	case <-ended:
		if !gaveWay {
			t.Error("a path in nobody's way has ended")
		}
	default:
		if gaveWay {
			t.Error("the holder was not told")
		}
	}
}

// ofJob is what the nightly backup asks for, from the address that people ask for, too.
func (b *testbed) ofJob(binding string) grant.Payload {
	return b.signer.payload(b.t, func(p *grant.Payload) {
		p.Requester, p.Binding, p.Addresses = backup.String(), binding, []netip.Addr{clientA}
		p.NotAfter = p.NotBefore.Add(30 * time.Minute)
		switch binding {
		case policy.BindingTuple:
			p.ClientPort, p.Ports, p.Budget.Connections = 40321, []uint16{5432}, 1
		case policy.BindingWorkload:
			p.Cgroup = 1
		}
	})
}

// TestRefusedGrantsCutNothing: a grant that was used, denied or withdrawn before ends no workload's path, and one that is recorded when
// the agent is killed does not either, until it has its own.
func TestRefusedGrantsCutNothing(t *testing.T) {
	b, c := crewed(t)
	b.config.MaxPaths = 64
	b.use(c.resources("15m") + jobs)
	l := b.begin()
	defer func() { l.kill() }()
	people := func() []byte { return b.asked(c, "alice bob carol", nil) }
	used, denied, withdrawn := people(), people(), people()
	row, err := l.Activate(t.Context(), used, "uid:0")
	must(t, err)
	_, err = l.Revoke(t.Context(), row.ID, "", "uid:0")
	must(t, err)
	_, err = l.State(t.Context(), b.says(c, "bob", grant.StepDenied, denied), denied, "uid:0")
	must(t, err)
	_, err = l.State(t.Context(), b.says(c, "alice", grant.StepWithdrawn, withdrawn), withdrawn, "uid:0")
	must(t, err)
	job, err := l.ActivateFor(t.Context(), wanted{b.ofJob(policy.BindingAddress), "svid:1"})
	must(t, err)
	for _, refused := range []struct {
		name     string
		envelope []byte
		is       error
	}{{"used", used, store.ErrReplayed}, {"denied", denied, store.ErrFinal}, {"withdrawn", withdrawn, store.ErrFinal}} {
		if _, err := l.Activate(t.Context(), refused.envelope, "uid:0"); !errors.Is(err, refused.is) {
			t.Errorf("%s: %v", refused.name, err)
		}
		if _, open := l.states(); open[job.row.ID] != 1 {
			t.Errorf("%s: cut the job's path: %v", refused.name, open)
		}
	}
	a := l.activation(people())
	must(t, l.authorise(t.Context(), a))
	must(t, l.record(t.Context(), a))
	l.kill()
	l = b.begin()
	must(t, l.adopt(t.Context()))
	if states, open := l.states(); open[job.row.ID] != 1 || states[a.held.row.ID] != stateEnded {
		t.Errorf("killed before anything gave way: %v, open %v", states, open)
	}
	a = l.activation(people())
	for _, step := range l.activationSteps()[:3] {
		must(t, step.do(t.Context(), a))
	}
	l.kill()
	l = b.begin()
	must(t, l.adopt(t.Context()))
	if states, open := l.states(); len(open) != 0 || states[job.row.ID] != store.StateRevoked || states[a.held.row.ID] != stateEnded {
		t.Errorf("killed when the job had given way: %v, open %v", states, open)
	}
}

// TestTakeUpSaysWhetherThePathIsOpen: nobody is told that a path is over which is held still, and so open.
func TestTakeUpSaysWhetherThePathIsOpen(t *testing.T) {
	b, c := crewed(t)
	b.use(c.resources("15m") + jobs)
	l := b.begin()
	defer func() { l.kill() }()
	h, err := l.ActivateFor(t.Context(), wanted{b.ofJob(policy.BindingAddress), "svid:1"})
	must(t, err)
	id, who := h.row.ID, h.payload.Requester
	takeUp := func(who string, is error, code codes.Code) {
		t.Helper()
		if _, err := l.TakeUp(id, who, clientA); !errors.Is(err, is) || status.Code(toStatus(err)) != code {
			t.Errorf("%v, want %v", err, is)
		}
	}
	takeUp(who, ErrHeld, codes.Unavailable)
	takeUp(intruder.String(), ErrNoGrant, codes.NotFound)
	l = l.again()
	takeUp(who, nil, codes.OK)
	takeUp(who, ErrHeld, codes.Unavailable)
	must(t, l.LetGo(t.Context(), l.active[id], whyHolderGone))
	takeUp(who, ErrNoGrant, codes.NotFound)
}
