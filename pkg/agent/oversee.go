package agent

import (
	"context"
	"errors"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// oversee looks at what every active grant has carried, and does what follows from it. paths are the kernel's, as of now
// (CLOCK_BOOTTIME). g.mu is held.
func (g *grants) oversee(ctx context.Context, paths []datapath.PathStatus, now time.Duration) error {
	carried := byGrant(paths)
	g.ports.keep(g.active)
	var errs []error
	for id, h := range g.active {
		if h.over != nil {
			continue
		}
		g.lookAt(h, carried[id], now)
		if e, idle := g.endIdle(h, now); idle {
			errs = append(errs, g.endIn(ctx, h, e, carried[id]))
			continue
		}
		if over, err := g.heedActive(ctx, h, carried[id], now); over || err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, g.warn(ctx, h, carried[id], now))
	}
	return errors.Join(errs...)
}

func byGrant(paths []datapath.PathStatus) map[string][]datapath.PathStatus {
	out := make(map[string][]datapath.PathStatus)
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
