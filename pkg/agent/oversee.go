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
	carried := make(map[string][]datapath.PathStatus)
	for _, p := range paths {
		carried[p.Grant] = append(carried[p.Grant], p)
	}
	var errs []error
	for id, h := range g.active {
		if h.over != nil {
			continue
		}
		h.use.look(carried[id], now)
		if e, idle := g.endIdle(h, now); idle {
			errs = append(errs, g.endIn(ctx, h, e, carried[id]))
			continue
		}
		errs = append(errs, g.warn(ctx, h, carried[id], now))
	}
	return errors.Join(errs...)
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
