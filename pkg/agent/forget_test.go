package agent

import (
	"errors"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// TestForget: a person's grant is known for a month after it could have been handed in, and is not activated after that
// either, not even by a clock that is set back and vouched for; a workload's is known for an hour.
func TestForget(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	defer func() { l.kill() }()
	used := b.asked(c, "alice bob", nil)
	_, err := l.Activate(t.Context(), used, "uid:0")
	must(t, err)
	id, err := grant.Peek(used)
	must(t, err)
	_, err = l.Revoke(t.Context(), id.ID, "", "uid:0")
	must(t, err)
	known := func(after time.Duration) int {
		t.Helper()
		b.clock.wall, b.clock.boot = after, b.clock.boot+forgetEvery
		l.remember(t.Context(), l.grants.clock.wall(), time.Hour)
		must(t, l.Forget(t.Context()))
		rows, err := l.all(t.Context())
		must(t, err)
		notes, err := l.store.Notes(t.Context(), noteOfUse)
		must(t, err)
		if len(notes) != len(rows) {
			t.Errorf("%d grants, and notes about %d", len(rows), len(notes))
		}
		return len(rows)
	}
	if n := known(keepPeoples); n != 1 {
		t.Fatalf("%d are known", n)
	}
	if n := known(keepPeoples + 2*time.Hour); n != 0 {
		t.Fatalf("%d are known a month after", n)
	}
	b.clock.wall = 0
	if _, err := l.Activate(t.Context(), used, "uid:0"); !errors.Is(err, store.ErrClockBehind) {
		t.Errorf("with the clock set back: %v", err)
	}
	must(t, l.Vouch(t.Context(), c.vouches(t, "erin", l.challenges.mint(), time.Now()), "uid:0"))
	if _, err := l.Activate(t.Context(), used, "uid:0"); !errors.Is(err, store.ErrForgotten) || !contains(toStatus(err).Error(), "hint: ") {
		t.Errorf("with the clock set back and vouched for: %v", err)
	}
}
