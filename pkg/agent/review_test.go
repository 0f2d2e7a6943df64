package agent

import (
	"errors"
	"fmt"
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

	_, err = l.State(t.Context(), b.says(c, "erin", grant.StepReviewed, envelope), nil, "uid:0")
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

// TestReviewsOfOneself: whoever has a signature on a grant had a part in it, whatever the key was worth then or is worth now.
func TestReviewsOfOneself(t *testing.T) {
	b, c := crewed(t)
	ended, unknown := newSigner(t).key, newSigner(t).key
	keys := func(who string, more grant.PrivateKey, says string) {
		yaml := c.resources("15m")
		was := fmt.Sprintf("{publicKey: %q", c[who].Public().String())
		b.use(strings.Replace(yaml, was, fmt.Sprintf("{publicKey: %q%s}, %s", more.Public().String(), says, was), 1))
	}
	keys("bob", ended, ", notAfter: 2020-01-01T00:00:00Z")
	l := b.begin()
	envelope := b.asked(c, "alice carol dave", breakGlass)
	for _, key := range []grant.PrivateKey{ended, unknown} {
		var err error
		envelope, err = grant.Approve(t.Context(), envelope, key)
		must(t, err)
	}
	row, err := l.Activate(t.Context(), envelope, "uid:0")
	must(t, err)
	_, err = l.Revoke(t.Context(), row.ID, "mended", "uid:0")
	must(t, err)
	refused := func(who, why string) {
		t.Helper()
		if _, err := l.State(t.Context(), b.says(c, who, grant.StepReviewed, envelope), nil, "uid:0"); !errors.Is(err, ErrNotYours) {
			t.Errorf("reviewed by %s, who %s: %v", who, why, err)
		}
	}
	refused("alice", "asked for it")
	refused("bob", "signed with a key that had ended")
	l.kill()
	b.use(c.resources("15m")) // which knows bob's old key no more
	l = b.begin()
	refused("bob", "signed with a key that is not known any more")
	l.kill()
	keys("erin", unknown, "")
	l = b.begin()
	defer func() { l.kill() }()
	refused("erin", "signed with a key that nobody knew then")
	b.use(c.resources("15m"))
	l.kill()
	l = b.begin()
	_, err = l.State(t.Context(), b.says(c, "erin", grant.StepReviewed, envelope), nil, "uid:0")
	must(t, err) // nothing says that the key is hers
}

// TestReviewsKeptReady: a review counts if it was signed after the end, by the clock of the node, also over a restart. One that
// was signed before is no look at what was done.
func TestReviewsKeptReady(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	defer func() { l.kill() }()
	say := func(at time.Time, envelope []byte) error {
		_, err := l.State(t.Context(), c.says(t, "erin", grant.StepReviewed, envelope, at), nil, "uid:0")
		return err
	}
	step := func(d time.Duration) time.Time {
		b.clock.wall, b.clock.boot, b.truth = b.clock.wall+d, b.clock.boot+d, b.truth+d
		return time.Now().Add(b.truth)
	}
	for _, over := range []string{"revoked", "expired", "reboot"} {
		envelope := b.asked(c, "alice carol dave", breakGlass)
		before := time.Now().Add(b.truth)
		step(time.Second)
		row, err := l.Activate(t.Context(), envelope, "uid:0")
		must(t, err)
		during := step(10 * time.Second)
		if err := say(during, envelope); !errors.Is(err, ErrNotEnded) {
			t.Errorf("%s: reviewed while it was active: %v", over, err)
		}
		step(10 * time.Second)
		switch over {
		case "revoked":
			_, err = l.Revoke(t.Context(), row.ID, "mended", "uid:0")
		case "expired":
			step(2 * time.Minute) // nobody looks for a minute
			_, err = l.tick(t.Context())
		case "reboot":
			l.kill()
			b.bootID = "another"
			l = b.begin()
			err = l.adopt(t.Context())
		}
		must(t, err)
		end := time.Now().Add(b.truth)
		if over == "expired" {
			end = row.Deadline
		}
		step(10 * time.Second)
		l.kill()
		l = b.begin()
		must(t, l.adopt(t.Context()))
		for name, at := range map[string]time.Time{"before it began": before, "while it was active": during, "just before its end": end.Add(-3 * time.Second)} {
			if err := say(at, envelope); !errors.Is(err, ErrNotEnded) || !contains(toStatus(err).Error(), "hint: ") {
				t.Errorf("%s: reviewed %s: %v", over, name, err)
			}
		}
		if err := say(step(0).Add(vouchSkew+time.Second), envelope); !errors.Is(err, ErrClockWrong) {
			t.Errorf("%s: reviewed in the time to come: %v", over, err)
		}
		if err := say(end.Add(time.Second), envelope); err != nil {
			t.Errorf("%s: reviewed after its end: %v", over, err)
		}
	}
}
