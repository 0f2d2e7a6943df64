// Package rollout decides how far a roll-out has come on a node, when it falls back, and whether its next wave may begin. It is pure.
package rollout

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Phase says how a roll-out stands on a node.
type Phase string

// Phases of a roll-out.
const (
	Running  Phase = "Running"
	Halted   Phase = "Halted"   // somebody stopped it: no wave begins
	FellBack Phase = "FellBack" // a budget was spent here: no wave begins, and what broke is shadowed
	Done     Phase = "Done"     // the last wave has held: nothing falls back any more
)

// What callers may match.
var (
	// ErrHalted says that the roll-out is not running on this node.
	ErrHalted = errors.New("roll-out is halted")
	// ErrNotHalted says that there is nothing to go on after.
	ErrNotHalted = errors.New("roll-out is not halted")
	// ErrNoWave says that there is no such wave, or that it has begun.
	ErrNoWave = errors.New("no such wave to begin")
	// ErrOtherPlan says that something was signed for another plan than the one in force.
	ErrOtherPlan = errors.New("another plan")
	// ErrStale says that a signature is older than what it would undo, or from a clock that is ahead.
	ErrStale = errors.New("signed at another time")
)

// State is what a node remembers of a roll-out. The zero value is one of which no wave has begun. It is copied, never changed.
type State struct {
	Plan  string `json:"plan"`  // for which waves began
	Wave  int    `json:"wave"`  // how many have begun
	Phase Phase  `json:"phase"` // empty: Running
	// Modes are what services have reached here.
	Modes map[string]policy.Mode `json:"modes,omitempty"`
	// Since is when the last wave began here, or went on.
	Since time.Time `json:"since,omitzero"`
	// Changed is when somebody or something changed the state last, why, and who it was.
	Changed time.Time `json:"changed,omitzero"`
	Why     string    `json:"why,omitempty"`
	By      string    `json:"by,omitempty"`
	// Told are clients of which Shadow had told, before the service was enforced, that Enforce would refuse them.
	Told map[string][]netip.Addr `json:"told,omitempty"`
}

// Word is somebody's, with its time and reason.
type Word struct {
	By, Why string
	At      time.Time // by the clock of whoever says it
}

// skew is how far the clock of whoever signs may be ahead of the node's.
const skew = 5 * time.Minute

// Stands is the phase in words; that of the zero state is Running.
func (s State) Stands() Phase {
	if s.Phase == "" {
		return Running
	}
	return s.Phase
}

// Enforced lists the services that the roll-out enforces here, sorted.
func (s State) Enforced() (names []string) {
	for name, mode := range s.Modes {
		if mode == policy.ModeEnforce {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Follow makes the state fit a Rollout that may have changed: services that it does not have any more are forgotten. Under another plan
// the waves begin anew, with what services have reached: a change of the plan enforces nothing by itself.
func Follow(r policy.Rollout, s State) State {
	s = s.copied()
	for name := range s.Modes {
		if !slices.Contains(r.Spec.Services, name) {
			delete(s.Modes, name)
			delete(s.Told, name)
		}
	}
	if s.Plan != r.Plan() {
		s.Plan, s.Wave = r.Plan(), 0
		if s.Phase == Done {
			s.Phase = Running
		}
	}
	return s
}

// Advance begins a wave, and every wave before it that this node has missed. told are the clients of which Shadow has told.
func Advance(r policy.Rollout, node string, s State, wave int, told map[string][]netip.Addr, w Word, now time.Time) (State, error) {
	s = Follow(r, s)
	switch {
	case s.Stands() == Halted || s.Stands() == FellBack:
		return s, fmt.Errorf("%w on %s: %s", ErrHalted, node, s.Why)
	case wave <= s.Wave || wave > len(r.Spec.Waves):
		return s, fmt.Errorf("%w: %d of %d, and %d have begun on %s", ErrNoWave, wave, len(r.Spec.Waves), s.Wave, node)
	case w.At.Sub(now) > skew:
		return s, fmt.Errorf("%w: at %s, and the clock of %s says %s", ErrStale, stamp(w.At), node, stamp(now))
	}
	s.Wave, s.Phase = wave, Running
	return s.reach(r, node, told, w, now), nil
}

// Halt lets no wave begin. What is enforced stays, and still falls back.
func Halt(s State, w Word, now time.Time) (State, error) {
	if s.Stands() != Running {
		return s, fmt.Errorf("%w, but %s: %s", ErrNotHalted, s.Stands(), s.Why)
	}
	s = s.copied()
	s.Phase = Halted
	return s.changed(w, now), nil
}

// Resume goes on after a halt: services are in the mode of the waves that have begun again. It has to be signed after the halt.
func Resume(r policy.Rollout, node string, s State, told map[string][]netip.Addr, w Word, now time.Time) (State, error) {
	s = Follow(r, s)
	switch {
	case s.Stands() != Halted && s.Stands() != FellBack:
		return s, fmt.Errorf("%w on %s", ErrNotHalted, node)
	case !w.At.After(s.Changed) || w.At.Sub(now) > skew:
		return s, fmt.Errorf("%w: at %s; it was halted at %s, and the clock of %s says %s", ErrStale, stamp(w.At), stamp(s.Changed), node, stamp(now))
	}
	s.Phase = Running
	return s.reach(r, node, told, w, now), nil
}

// reach has the services in the strictest mode of the waves that have begun and have the node, and in none below what they reached before.
func (s State) reach(r policy.Rollout, node string, told map[string][]netip.Addr, w Word, now time.Time) State {
	mode := policy.ModeObserve
	for _, wave := range r.Spec.Waves[:s.Wave] {
		if wave.Has(node) {
			mode = mode.Stricter(wave.Mode)
		}
	}
	for _, name := range r.Spec.Services {
		before, known := s.Modes[name]
		if !known {
			before = policy.ModeObserve
		}
		if mode == policy.ModeEnforce && before != mode {
			s.Told[name] = told[name]
		}
		if next := before.Stricter(mode); next != policy.ModeObserve {
			s.Modes[name] = next
		}
	}
	s.Since = now
	return s.changed(w, now)
}

// FallBack shadows a service that the roll-out enforces. changed is false where there is nothing to fall back from.
func FallBack(s State, service string, w Word, now time.Time) (next State, changed bool) {
	if s.Stands() == Done || s.Modes[service] != policy.ModeEnforce {
		return s, false
	}
	s = s.copied()
	s.Modes[service] = policy.ModeShadow
	delete(s.Told, service)
	s.Phase = FellBack
	return s.changed(w, now), true
}

// Settle ends a roll-out whose last wave has held. changed is false for every other one.
func Settle(r policy.Rollout, s State, now time.Time) (next State, changed bool) {
	if s.Stands() != Running || s.Wave != len(r.Spec.Waves) || s.Plan != r.Plan() || !s.Baked(r, now) {
		return s, false
	}
	s = s.copied()
	s.Phase, s.Told = Done, nil
	return s.changed(Word{By: "agent", Why: "the last wave has held"}, now), true
}

// Baked tells whether the wave that began last has held for as long as it has to.
func (s State) Baked(r policy.Rollout, now time.Time) bool {
	return s.Wave == 0 || s.Wave <= len(r.Spec.Waves) && now.Sub(s.Since) >= r.Spec.Waves[s.Wave-1].Bake.Duration
}

func (s State) changed(w Word, now time.Time) State {
	s.Changed, s.By, s.Why = now, w.By, w.Why
	return s
}

// copied shares nothing with the original that is written to.
func (s State) copied() State {
	modes, told := map[string]policy.Mode{}, map[string][]netip.Addr{}
	for name, mode := range s.Modes {
		modes[name] = mode
	}
	for name, clients := range s.Told {
		told[name] = clients
	}
	s.Modes, s.Told = modes, told
	return s
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
