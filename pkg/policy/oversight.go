package policy

import (
	"fmt"
	"time"
)

// minIdle is the shortest idle time: agents look once a second.
const minIdle = 5 * time.Second

// CheckIdleTimeout tells what is wrong with an idle time, of a policy or a grant. 0 is none.
func CheckIdleTimeout(v time.Duration) error {
	const hint = "write a duration such as 10m, or leave it out"
	switch {
	case v == 0:
		return nil
	case v < minIdle:
		return faultf(hint, "%s is less than %s", Duration{v}, Duration{minIdle})
	case v > MaxGrantDuration:
		return faultf(hint, "%s is over the cap of %s", Duration{v}, Duration{MaxGrantDuration})
	}
	return nil
}

func (p *BypassPolicy) validateOversight(d *document) {
	d.report("spec.idleTimeout", CheckIdleTimeout(p.Spec.IdleTimeout.Duration))
	p.validateSignals(d)
	for i, w := range p.Spec.WarnBefore {
		if w.Duration <= 0 || w.Duration > MaxGrantDuration {
			d.report(fmt.Sprintf("spec.warnBefore[%d]", i), faultf("write a duration such as 5m", "%s is not between 0 and %s", w, Duration{MaxGrantDuration}))
		}
	}
}

// Warnings are the times before a grant's end at which its end is warned of.
func (p BypassPolicy) Warnings() []time.Duration {
	if len(p.Spec.WarnBefore) == 0 {
		return []time.Duration{5 * time.Minute, time.Minute}
	}
	var out []time.Duration
	for _, w := range p.Spec.WarnBefore {
		out = append(out, w.Duration)
	}
	return out
}

// Idle is how long the paths of a grant under the policy may carry nothing, if the grant asks for a time of its own or
// for 0: the shorter one counts. 0: as long as they like.
func (p BypassPolicy) Idle(asked time.Duration) time.Duration {
	most := p.Spec.IdleTimeout.Duration
	if asked == 0 || most != 0 && most < asked {
		return most
	}
	return asked
}

// BypassPolicy finds a bypass policy by its name.
func (s *Set) BypassPolicy(name string) (BypassPolicy, error) {
	if s != nil {
		for _, p := range s.policies {
			if p.Name == name {
				return p, nil
			}
		}
	}
	return BypassPolicy{}, fmt.Errorf("no BypassPolicy is named %q", name)
}

// oversight compares how two policies have active grants looked after. Warnings keep nobody out.
func (c *comparison) oversight(old BypassPolicySpec, next *BypassPolicySpec) {
	settle(c, "spec.idleTimeout", old.IdleTimeout, &next.IdleTimeout, raised(uint64(old.IdleTimeout.Duration), uint64(next.IdleTimeout.Duration)))
	became(c, Neither, "spec.warnBefore", old.WarnBefore, &next.WarnBefore)
	shrinks(c, "spec.signals", old.Signals, &next.Signals, func(a, b SignalRule) bool { return same(a, b) })
}
