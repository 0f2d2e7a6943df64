package agent

import (
	"context"
	"errors"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/signal"
)

// oversee looks at what every active grant has carried, and does what follows from it. paths are the kernel's, as of now
// (CLOCK_BOOTTIME). g.mu is held.
func (g *grants) oversee(ctx context.Context, paths []datapath.PathStatus, now time.Duration) error {
	carried := byGrant(paths)
	g.ports.keep(g.active)
	policies := g.overseers()
	var errs []error
	for id, h := range g.active {
		if h.over != nil || len(carried[id]) == 0 { // opened since the paths were read
			continue
		}
		g.lookAt(h, carried[id], now)
		errs = append(errs, g.overseeOne(ctx, h, policies(h), carried[id], now))
	}
	return errors.Join(errs...)
}

// overseen is what a policy says of active grants, read once for all of them.
type overseen struct {
	policy.BypassPolicy
	warnings []time.Duration
	said     []signal.Signal // that it hears, in a fixed order
}

// overseers gives the policy of each grant, which it reads once. g.mu is held for as long as it is used.
func (g *grants) overseers() func(*held) *overseen {
	said, policies := g.said(), make(map[string]*overseen)
	return func(h *held) *overseen {
		if policies[h.policy] == nil {
			policies[h.policy] = newOverseen(g.policyOf(h), said)
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

func (g *grants) overseeOne(ctx context.Context, h *held, p *overseen, paths []datapath.PathStatus, now time.Duration) error {
	if e, idle := h.endIdle(p.Idle(h.payload.IdleTimeout), now); idle {
		return g.endIn(ctx, h, e, paths)
	}
	if over, err := g.heedActive(ctx, h, p, paths, now); over || err != nil {
		return err
	}
	return g.warn(ctx, h, p.warnings, paths, now)
}

func byGrant(paths []datapath.PathStatus) map[string][]datapath.PathStatus {
	out := make(map[string][]datapath.PathStatus, len(paths))
	for _, p := range paths {
		out[p.Grant] = append(out[p.Grant], p)
	}
	return out
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
