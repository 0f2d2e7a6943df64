package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/signal"
)

// oversee looks at what every active grant has carried, and does what follows from it. carried are the kernel's paths, as of
// now (CLOCK_BOOTTIME), by their grants. It tells when the next grant ends, or a second.
func (g *grants) oversee(ctx context.Context, all []*held, carried map[string][]datapath.PathStatus, now time.Duration) (next time.Duration, err error) {
	g.ports.keep(g.every)
	policies := g.overseers()
	var over []doomed
	var due []dueWarning
	next = time.Second
	err = inTurns(&g.mu, all, func(h *held) error {
		paths := carried[h.row.ID]
		if !g.holds(h) || h.over != nil || len(paths) == 0 { // opened since the paths were read
			return nil
		}
		next = min(next, max(h.ends()-now, time.Millisecond))
		g.lookAt(h, paths, now)
		p := policies(h)
		e, ends := h.endIdle(p.Idle(h.payload.IdleTimeout), now)
		if !ends {
			var err error
			if e, ends, err = g.heedActive(ctx, h, p, paths, now); err != nil {
				return err
			}
		}
		if ends {
			over = append(over, doomed{h, e})
			return nil
		}
		if !h.isProbe() { // another one follows before it ends
			due = append(due, h.due(p.warnings, paths, now)...)
		}
		return nil
	})
	return next, errors.Join(err, g.endMany(ctx, over), g.warn(ctx, due))
}

// overseen is what a policy says of active grants, read once for all of them.
type overseen struct {
	policy.BypassPolicy
	warnings []time.Duration
	said     []signal.Signal // that it hears, in a fixed order
}

// overseers gives the policy of each grant, which it reads once. g.mu is held when it does.
func (g *grants) overseers() func(*held) *overseen {
	said, policies := sync.OnceValue(g.said), make(map[string]*overseen)
	return func(h *held) *overseen {
		if policies[h.policy] == nil {
			policies[h.policy] = newOverseen(g.policyOf(h), said())
		}
		return policies[h.policy]
	}
}

func newOverseen(p policy.BypassPolicy, said []signal.Signal) *overseen {
	o := &overseen{BypassPolicy: p, warnings: p.Warnings()}
	for _, s := range said {
		if p.Hears(s.Source, s.UID) {
			o.said = append(o.said, s)
		}
	}
	return o
}

// policyOf is the policy that allows an active grant, as it is in force now. Without one there is the zero policy, which
// asks for nothing.
func (g *grants) policyOf(h *held) policy.BypassPolicy {
	e := g.enforced()
	if e == nil {
		return policy.BypassPolicy{}
	}
	p, err := e.set.BypassPolicy(h.policy)
	if err != nil {
		return policy.BypassPolicy{} // the next recheck ends the grant
	}
	return p
}
