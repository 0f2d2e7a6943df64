package agent

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
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
