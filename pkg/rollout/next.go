package rollout

import (
	"fmt"
	"math"
	"strings"
)

// View is how a roll-out stands on one node, as somebody sees it who looks at all of them.
type View struct {
	Node  string
	Plan  string
	Phase Phase
	Wave  int
	Waves int
	Baked bool
	Why   string // of its phase
	// Over are services that go over to Enforce there with the wave after this one, and at which Enforce would spend the budget; with why.
	Over []string
	// Err says why nobody knows.
	Err error
}

// Next is the wave that may begin on all nodes, from 1 on, or 0 where all have begun. against is what stands against it, all at once: a
// wave begins when every node is seen, runs, and has held the wave before. foreseen is what stands against it that a person may decide to
// put up with: the budget holds all the same.
func Next(views []View) (wave int, against, foreseen []string) {
	most, least := 0, math.MaxInt
	for _, v := range views {
		if v.Err != nil {
			against = append(against, fmt.Sprintf("%s: it is not known how it stands there: %v", v.Node, v.Err))
			continue
		}
		most, least = max(most, v.Wave), min(least, v.Wave)
		against = append(against, v.against(views)...)
		for _, why := range v.Over {
			foreseen = append(foreseen, v.Node+": "+why)
		}
	}
	if len(views) == 0 {
		return 0, []string{"no node is seen"}, nil
	}
	wave = most
	if least == most {
		wave = most + 1 // else those that missed it are to have it first
	}
	if wave > wavesOf(views) {
		return 0, against, nil
	}
	return wave, against, foreseen
}

func wavesOf(views []View) (waves int) {
	for _, v := range views {
		waves = max(waves, v.Waves)
	}
	return waves
}

func (v View) against(all []View) (against []string) {
	if v.Phase == Halted || v.Phase == FellBack {
		against = append(against, fmt.Sprintf("%s: %s: %s", v.Node, v.Phase, v.Why))
	}
	if !v.Baked {
		against = append(against, fmt.Sprintf("%s: wave %d has not held for long enough", v.Node, v.Wave))
	}
	for _, other := range all {
		if other.Err == nil && other.Plan != v.Plan {
			return append(against, fmt.Sprintf("%s: it has another plan than %s", v.Node, other.Node))
		}
	}
	return against
}

// Broken tells on which nodes it does not run, in words; empty: it runs on all that are seen.
func Broken(views []View) string {
	var broken []string
	for _, v := range views {
		if v.Err == nil && (v.Phase == Halted || v.Phase == FellBack) {
			broken = append(broken, fmt.Sprintf("%s: %s: %s", v.Node, v.Phase, v.Why))
		}
	}
	return strings.Join(broken, "; ")
}

// Finished tells whether it is done on every node.
func Finished(views []View) bool {
	for _, v := range views {
		if v.Err != nil || v.Phase != Done {
			return false
		}
	}
	return len(views) > 0
}
