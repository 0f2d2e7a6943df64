package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// TestBreakGlass: from the request to the review, with a restart between any two steps. There is no collector, no identity
// provider and no network: only the node, and files.
func TestBreakGlass(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	restart := func() {
		l.kill()
		l = b.begin()
		must(t, l.adopt(t.Context()))
	}
	defer func() { l.kill() }()
	for people, is := range map[string]error{
		"alice bob": policy.ErrUnapproved, "alice mallory erin": policy.ErrUnapproved, "mallory bob carol": policy.ErrRefused,
	} {
		if _, err := l.Activate(t.Context(), b.asked(c, people, breakGlass), "uid:0"); !errors.Is(err, is) {
			t.Errorf("asked for and approved by %s: %v", people, err)
		}
	}
	if _, err := l.Activate(t.Context(), b.asked(c, "alice bob carol", func(p *grant.Payload) { p.Kind, p.Duration = grant.BreakGlass, 31*time.Minute }), "uid:0"); err == nil {
		t.Error("longer than the policy's cap")
	}
	envelope := b.asked(c, "alice bob carol", func(p *grant.Payload) { p.Kind, p.Duration = grant.BreakGlass, 30*time.Minute })
	row, err := l.Activate(t.Context(), envelope, "uid:0")
	must(t, err)
	if !slices.Equal(b.alarms, []alarmName{alarmBreakGlass}) {
		t.Errorf("alarms at the activation: %v", b.alarms)
	}
	// The alarm stands while it is live, and after it, over restarts.
	for _, state := range []string{"live", "live, restarted", "over", "over, restarted"} {
		switch state {
		case "live, restarted", "over, restarted":
			restart()
		case "over":
			_, err := l.Revoke(t.Context(), row.ID, "mended", "uid:0")
			must(t, err)
		}
		live, over := l.reviews.counts()
		problems := strings.Join(l.problems.lines(), "\n")
		if live+over != 1 || (live == 1) != strings.HasPrefix(state, "live") || !contains(problems, "break_glass "+row.ID, "alice, bob, carol", "postgres", "sallyport grant review "+row.ID) {
			t.Errorf("%s: %d live, %d over, problems %s", state, live, over, problems)
		}
		before := len(b.alarms)
		b.clock.boot += reviewAgain
		b.clock.wall += reviewAgain
		b.truth += reviewAgain
		l.reviews.remind()
		l.reviews.remind()
		if len(b.alarms) != before+1 {
			t.Errorf("%s: reminded %d times", state, len(b.alarms)-before)
		}
	}
	if _, err := l.Activate(t.Context(), envelope, "uid:0"); !errors.Is(err, store.ErrReplayed) {
		t.Errorf("the same again: %v", err)
	}
	// Nobody who had a part in it breaks the glass again.
	for people, open := range map[string]bool{"alice bob dave": true, "dave bob carol": true} {
		_, err := l.Activate(t.Context(), b.asked(c, people, breakGlass), "uid:0")
		if errors.Is(err, ErrReviewOpen) != open || !contains(toStatus(err).Error(), row.ID, "hint: ") {
			t.Errorf("%s break the glass: %v", people, err)
		}
	}
	// That is not in the way of ordinary grants.
	daily, err := l.Activate(t.Context(), b.asked(c, "alice bob", nil), "uid:0")
	must(t, err)
	_, err = l.Revoke(t.Context(), daily.ID, "", "uid:0")
	must(t, err)

	_, err = l.State(t.Context(), c.says(t, "erin", grant.StepReviewed, envelope), nil, "uid:0")
	must(t, err)
	for range 2 {
		if live, over := l.reviews.counts(); live+over != 0 || len(l.problems.lines()) != 0 {
			t.Errorf("reviewed: %d live, %d over, problems %v", live, over, l.problems.lines())
		}
		restart()
	}
	again, err := l.Activate(t.Context(), b.asked(c, "alice bob carol", breakGlass), "uid:0")
	must(t, err)
	if _, open := l.states(); open[again.ID] != 1 {
		t.Errorf("open: %v", open)
	}
	for _, e := range l.storedEvents() {
		if e.Grant == row.ID && e.Kind != string(grant.BreakGlass) {
			t.Errorf("event %s does not say what it is about", e.Step)
		}
	}
}
