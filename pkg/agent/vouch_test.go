package agent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// vouches is somebody's word for the node, in answer to a challenge.
func (c crew) vouches(t *testing.T, who string, challenge grant.Challenge, at time.Time) []byte {
	t.Helper()
	id, err := grant.NewID(at)
	must(t, err)
	signed, err := grant.SignStatement(t.Context(), grant.Statement{ID: id, Step: grant.StepVouched, By: who, At: at, Why: "the battery was replaced", Challenge: challenge}, c[who])
	must(t, err)
	return signed
}

// TestClockBehind: a clock that went back activates nothing, over restarts, until somebody vouches for it who may.
func TestClockBehind(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	now := b.clock.clock()
	l.remember(t.Context(), l.grants.clock.wall(), 0)
	if !l.store.Memory().Latest.IsZero() {
		t.Error("a time is remembered that nobody knows to be steady")
	}
	l.remember(t.Context(), l.grants.clock.wall(), rememberEvery)
	if got := l.store.Memory().Latest; now.wall().Sub(got) > time.Minute {
		t.Errorf("remembers %s", got)
	}
	b.clock.wall, b.truth = -2*time.Minute, -2*time.Minute
	l.remember(t.Context(), l.grants.clock.wall(), time.Hour)
	for range 2 {
		envelope := b.asked(c, "alice bob", nil)
		if _, err := l.Activate(t.Context(), envelope, "uid:0"); !errors.Is(err, store.ErrClockBehind) || !contains(toStatus(err).Error(), "hint: ", "grant vouch") {
			t.Errorf("activated: %v", err)
		}
		l.kill()
		l = b.begin()
		must(t, l.adopt(t.Context()))
		l.remember(t.Context(), l.grants.clock.wall(), 0)
		if got := strings.Join(l.problems.lines(), "\n"); !contains(got, "memory: no grant is activated", "clock is behind", "sallyport grant vouch") {
			t.Errorf("problems: %s", got)
		}
	}
	defer func() { l.kill() }()
	good := l.challenges.mint()
	for _, x := range []struct {
		name      string
		statement []byte
		is        error
	}{
		{"whose key may not", c.vouches(t, "bob", good, now.wall()), ErrNotYours},
		{"whose clock says something else", c.vouches(t, "erin", good, now.wall().Add(vouchSkew+time.Second)), ErrClockWrong},
		{"who answers nothing", c.vouches(t, "erin", grant.NewChallenge(testNode, l.grants.bootID, time.Now()), now.wall()), grant.ErrChallenge},
		{"who says something else", b.says(c, "erin", grant.StepReviewed, b.asked(c, "alice bob", nil)), ErrOtherGrant},
	} {
		if err := l.Vouch(t.Context(), x.statement, "uid:0"); !errors.Is(err, x.is) || !contains(toStatus(err).Error(), "hint: ") {
			t.Errorf("somebody vouches %s: %v, want %v", x.name, err, x.is)
		}
	}
	word := c.vouches(t, "erin", good, now.wall())
	must(t, l.Vouch(t.Context(), word, "uid:0"))
	if err := l.Vouch(t.Context(), word, "uid:0"); !errors.Is(err, grant.ErrChallenge) {
		t.Errorf("vouched twice with one word: %v", err)
	}
	l.remember(t.Context(), l.grants.clock.wall(), time.Hour)
	if got := l.problems.lines(); len(got) != 0 {
		t.Errorf("problems: %v", got)
	}
	_, err := l.Activate(t.Context(), b.asked(c, "alice bob", nil), "uid:0")
	must(t, err)
	if steps := l.steps(); !slices.Equal(steps, []string{stepRefused, stepRefused, stepVouched, stepActivated}) {
		t.Errorf("events %v", steps)
	}
}

// TestRestoredState: a state directory from before revives nothing and lets nothing in again, neither before somebody
// vouches for it nor after.
func TestRestoredState(t *testing.T) {
	b, c := crewed(t)
	dir := filepath.Join(b.lab.Dir, "state")
	l := b.begin()
	early, err := l.Activate(t.Context(), b.asked(c, "alice bob", func(p *grant.Payload) { p.Addresses = p.Addresses[:1] }), "uid:0")
	must(t, err)
	l.kill()
	must(t, os.CopyFS(dir+".before", os.DirFS(dir)))
	l = b.begin()
	must(t, l.adopt(t.Context()))
	_, err = l.Revoke(t.Context(), early.ID, "", "uid:0")
	must(t, err)
	used := b.asked(c, "alice bob", nil)
	late, err := l.Activate(t.Context(), used, "uid:0")
	must(t, err)
	l.kill()
	must(t, errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(dir+".before")), os.Chmod(dir, 0o700)))

	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	if states, open := l.states(); len(open) != 0 || states[early.ID] == store.StateActive {
		t.Errorf("revived: %v, open %v", states, open)
	}
	if _, err := l.Activate(t.Context(), used, "uid:0"); !errors.Is(err, store.ErrDoubt) {
		t.Errorf("used again: %v", err)
	}
	must(t, l.Vouch(t.Context(), c.vouches(t, "erin", l.challenges.mint(), time.Now()), "uid:0"))
	if _, err := l.Activate(t.Context(), used, "uid:0"); !errors.Is(err, ErrForgotten) || !contains(toStatus(err).Error(), "--not-before") {
		t.Errorf("grant %s used again: %v", late.ID, err)
	}
	fresh := b.asked(c, "alice bob", func(p *grant.Payload) { p.NotBefore = time.Now() })
	later := b.asked(c, "alice bob", func(p *grant.Payload) { p.ID, p.NotBefore = early.ID, time.Now() })
	if _, err := l.Activate(t.Context(), later, "uid:0"); !errors.Is(err, ErrForgotten) {
		t.Errorf("made before, to begin now: %v", err)
	}
	if _, err := l.Activate(t.Context(), fresh, "uid:0"); err != nil {
		t.Errorf("a grant of afterwards: %v", err)
	}
}
