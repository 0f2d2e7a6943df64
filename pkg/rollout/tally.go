package rollout

import (
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// slices of a window: what is older than the window by less than one of them may still count.
const slots = 16

// fewest connections of which a share says something.
const fewest = 20

// Tally counts what was served and what was refused within a window. The zero value has none. Its clock only has to go forward.
type Tally struct {
	all [slots]struct {
		of              int64 // number of the slot since the clock's zero
		served, refused uint64
	}
}

// Add counts connections at a time.
func (t *Tally) Add(b policy.ErrorBudget, at time.Duration, served, refused uint64) {
	of := slotOf(b, at)
	s := &t.all[of%slots]
	if s.of != of {
		s.of, s.served, s.refused = of, 0, 0
	}
	s.served += served
	s.refused += refused
}

// Within sums up the window that ends at a time.
func (t *Tally) Within(b policy.ErrorBudget, at time.Duration) (served, refused uint64) {
	last := slotOf(b, at)
	for _, s := range t.all {
		if s.of > last-slots && s.of <= last {
			served, refused = served+s.served, refused+s.refused
		}
	}
	return served, refused
}

func slotOf(b policy.ErrorBudget, at time.Duration) int64 {
	return int64(at / max(b.Window.Duration/slots, 1))
}

// Spent tells in words how the budget is spent by so many; empty: it is not.
func Spent(b policy.ErrorBudget, served, refused uint64) string {
	all := served + refused
	switch {
	case (b.Refusals > 0 || b.Percent == 0) && refused > uint64(b.Refusals):
	case b.Percent > 0 && all >= fewest && refused*100 > all*uint64(b.Percent):
	default:
		return ""
	}
	return fmt.Sprintf("%d of %d connections were refused, and the budget is %s", refused, all, b)
}
