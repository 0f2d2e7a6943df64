package store

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

const day = 24 * time.Hour

// ended is a grant of people that is over.
func ended(t *testing.T, s *Store, id string, change func(*GrantRow)) GrantRow {
	t.Helper()
	row := testGrant(id)
	row.Kind, row.Activated, row.NotAfter, row.Keep = "", noon, noon.Add(day), noon.Add(31*day)
	if change != nil {
		change(&row)
	}
	if err := errors.Join(s.Activate(t.Context(), row, []byte("activated"), Note{"use/" + id, []byte("used")}),
		s.EndGrant(t.Context(), id, StateRevoked, "", []byte("ended"))); err != nil {
		t.Fatal(err)
	}
	return row
}

func prune(t *testing.T, s *Store, at time.Time) (left []string) {
	t.Helper()
	if err := s.See(t.Context(), at); err != nil {
		t.Fatal(err)
	}
	must(s.Prune(t.Context(), 100, "use/"))(t)
	for _, g := range must(s.Grants(t.Context()))(t) {
		left = append(left, g.ID)
	}
	return left
}

// A grant that was forgotten is not activated again: not now, not with a clock that is set back, not when somebody vouches
// for that clock, and not after a restart.
func TestForgottenIsNotForgiven(t *testing.T) {
	path := testPath(t)
	s, ctx := openTest(t, path), t.Context()
	row := ended(t, s, "g1", nil)
	if left := prune(t, s, row.Keep.Add(-time.Second)); len(left) != 1 {
		t.Fatalf("forgotten too early: %v", left)
	}
	if left := prune(t, s, row.Keep); len(left) != 0 {
		t.Fatalf("still there: %v", left)
	}
	if notes := must(s.Notes(ctx, "use/"))(t); len(notes) != 0 {
		t.Errorf("notes are left: %v", notes)
	}
	again := func(when string, now time.Time, want error) {
		t.Helper()
		r := row
		r.Activated = now
		if err := s.Activate(ctx, r, []byte("again")); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", when, err, want)
		}
	}
	again("now", row.Keep, ErrForgotten)
	again("with the clock set back", noon, ErrForgotten)
	if err := s.Vouch(ctx, Owner{Node: "a"}, noon, noon, []byte("vouched")); err != nil {
		t.Fatal(err)
	}
	again("with the clock set back, and vouched for", noon, ErrForgotten)
	s.Close()
	s = openTest(t, path)
	again("after a restart", noon, ErrForgotten)
	other := testGrant("g2")
	other.Activated, other.NotAfter = noon, row.NotAfter.Add(1)
	if err := s.Activate(ctx, other, []byte("another")); err != nil {
		t.Errorf("a grant that ends after all that was forgotten: %v", err)
	}
}

// What stays, and for how long.
func TestPrune(t *testing.T) {
	path := testPath(t)
	s, ctx := openTest(t, path), t.Context()
	ended(t, s, "kept for long", func(r *GrantRow) { r.Keep = noon.Add(50 * day) })
	ended(t, s, "behind it", nil)
	ended(t, s, "workload's", func(r *GrantRow) { r.NotAfter, r.Keep = time.Time{}, noon.Add(time.Hour) })
	ended(t, s, "break-glass", func(r *GrantRow) { r.Kind = "breakGlass" })
	ended(t, s, "for good", func(r *GrantRow) { r.NotAfter, r.Keep = time.Time{}, time.Time{} })
	active := testGrant("active")
	active.NotAfter, active.Activated, active.Keep = time.Time{}, noon, noon.Add(time.Hour)
	if err := s.Activate(ctx, active, []byte("activated")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		at   time.Duration
		want int
	}{{time.Hour - 1, 6}, {time.Hour, 5}, {31 * day, 5}, {50 * day, 3}} {
		if left := prune(t, s, noon.Add(c.at)); len(left) != c.want {
			t.Errorf("after %s there are %v", c.at, left)
		}
		s.Close()
		s = openTest(t, path) // and the chains are whole
	}
	if err := s.State(ctx, testStatement("break-glass", StepReviewed), []byte("reviewed")); err != nil {
		t.Fatal(err)
	}
	if left := prune(t, s, noon.Add(50*day)); len(left) != 2 {
		t.Errorf("after the review there are %v", left)
	}
	if n, err := s.Prune(ctx, 100); n != 0 || err != nil {
		t.Errorf("once more: %d, %v", n, err)
	}
}

// A store that may have forgotten forgets nothing more.
func TestPruneInDoubt(t *testing.T) {
	s, ctx := openTest(t, testPath(t)), t.Context()
	ended(t, s, "g", nil)
	if err := errors.Join(s.Claim(ctx, Owner{Node: "a"}), s.Claim(ctx, Owner{Node: "b"})); err != nil || s.Memory().Doubt == "" {
		t.Fatal(err)
	}
	if left := prune(t, s, noon.Add(99*day)); len(left) != 1 {
		t.Errorf("there are %v", left)
	}
}

// grantsEnv asks for another number of grants than the common run has.
const grantsEnv = "SALLYPORT_GRANTS"

// Workloads that come and go for ever do not fill the store.
func TestManyShortGrants(t *testing.T) {
	n := 2000
	if text := os.Getenv(grantsEnv); text != "" {
		n = must(strconv.Atoi(text))(t)
	}
	path := mountTmpfs(t, "8m") + "/node.db"
	s, err := openSized(path, pages{most: 400, kept: 80})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, now, event := t.Context(), noon, make([]byte, 300)
	for i := range n {
		row := testGrant(fmt.Sprintf("%026d", i))
		row.Kind, row.NotAfter, row.Activated, row.Keep = "", time.Time{}, now, now.Add(time.Hour)
		end := End{ID: row.ID, State: StateRevoked, Event: event, Note: Note{"use/" + row.ID, event}}
		if err := errors.Join(s.Activate(ctx, row, event), s.EndGrants(ctx, []End{end})); err != nil {
			t.Fatalf("grant %d: %v", i, err)
		}
		if now = now.Add(20 * time.Second); i%100 == 99 {
			last, _, err := s.Seqs(ctx)
			if err = errors.Join(err, s.Ack(ctx, last)); err != nil {
				t.Fatal(err)
			}
			prune(t, s, now)
		}
	}
	s.Close()
	s = openTest(t, path)
	if left := must(s.Grants(ctx))(t); len(left) > 300 {
		t.Errorf("%d grants are left", len(left))
	}
	t.Logf("%d grants; the file has %d KiB", n, must(os.Stat(path))(t).Size()>>10)
}
