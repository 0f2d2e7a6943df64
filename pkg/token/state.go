package token

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// State is how it stands with the keys of one provider.
type State struct {
	Provider string
	Fetched  time.Time // zero: never
	Keys     int
	Problem  string // with what to do; empty: none
}

// States lists the providers of policy whose keys are fetched, by name.
func (v *Verifier) States() (all []State) {
	set := v.cfg.Policy()
	v.mu.Lock()
	defer v.mu.Unlock()
	for name, k := range v.sets {
		if p, ok := set.Provider(name); ok {
			all = append(all, k.state(v.cfg.Clock(), p.Spec.Keep.Duration))
		}
	}
	slices.SortFunc(all, func(a, b State) int { return cmp.Compare(a.Provider, b.Provider) })
	return all
}

func (k *keySet) state(now time.Time, keep time.Duration) State {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := State{Provider: k.from.name, Fetched: k.fetched, Keys: len(k.keys)}
	if k.err == nil {
		return s
	}
	const next = "see that this node reaches the provider's endpoints, and that the IdentityProvider lists them"
	end := k.fetched.Add(keep)
	switch {
	case k.fetched.IsZero():
		s.Problem = fmt.Sprintf("its tokens are refused, for its keys were never fetched: %s; %s", k.err, next)
	case now.After(end):
		s.Problem = fmt.Sprintf("its tokens are refused since %s, for its keys are too old: %s; %s", end.UTC().Format(time.RFC3339), k.err, next)
	default:
		s.Problem = fmt.Sprintf("its keys cannot be fetched, and those that it had count until %s: %s; %s", end.UTC().Format(time.RFC3339), k.err, next)
	}
	return s
}
