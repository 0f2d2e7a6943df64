package rollout

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

var (
	start    = time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)
	stranger = netip.MustParseAddr("10.1.0.9")
	told     = map[string][]netip.Addr{"postgres": {stranger}}
)

// plan has two services and three waves; node-1 is in the last two of them.
func plan() policy.Rollout {
	hour := policy.Duration{Duration: time.Hour}
	return policy.Rollout{Metadata: policy.Metadata{Name: "databases"}, Spec: policy.RolloutSpec{
		Services: []string{"postgres", "redis"}, Operators: []string{"alice"},
		Waves: []policy.Wave{{Name: "other", Nodes: []string{"node-2"}, Mode: policy.ModeEnforce, Bake: hour},
			{Name: "seen", Nodes: []string{"node-*"}, Mode: policy.ModeShadow, Bake: hour}, {Name: "all", Percent: 100, Mode: policy.ModeEnforce, Bake: hour}},
		Budget: policy.ErrorBudget{Refusals: 2, Window: policy.Duration{Duration: time.Minute}},
	}}
}

func said(at time.Time) Word { return Word{By: "alice", Why: "it is time", At: at} }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestLife is one roll-out on one node: a wave that it is not in, one that shadows, one that enforces; what breaks falls back alone, and goes
// on by a later word; when the last wave has held, nothing falls back any more.
func TestLife(t *testing.T) {
	r, now := plan(), start
	s, err := Advance(r, "node-1", State{}, 1, told, said(now), now)
	must(t, err)
	if s.Wave != 1 || len(s.Modes) != 0 {
		t.Fatalf("in a wave of others: %+v", s)
	}
	s, err = Advance(r, "node-1", s, 2, told, said(now), now)
	must(t, err)
	if s.Modes["postgres"] != policy.ModeShadow || s.Told["postgres"] != nil {
		t.Fatalf("shadowed: %+v", s)
	}
	s, err = Advance(r, "node-1", s, 3, told, said(now), now)
	must(t, err)
	if !slices.Equal(s.Enforced(), []string{"postgres", "redis"}) || !slices.Equal(s.Told["postgres"], []netip.Addr{stranger}) {
		t.Fatalf("enforced: %+v", s)
	}
	broken, changed := FallBack(s, "postgres", Word{By: "agent", Why: "broken"}, now)
	if !changed || broken.Modes["postgres"] != policy.ModeShadow || broken.Modes["redis"] != policy.ModeEnforce || broken.Stands() != FellBack {
		t.Fatalf("fell back: %+v", broken)
	}
	if _, again := FallBack(broken, "postgres", Word{}, now); again {
		t.Error("falls back from Shadow")
	}
	if _, done := Settle(r, broken, now.Add(2*time.Hour)); done {
		t.Error("what fell back is done")
	}
	if _, err := Resume(r, "node-1", broken, told, said(now), now.Add(time.Minute)); !errors.Is(err, ErrStale) {
		t.Errorf("goes on by a word of before: %v", err)
	}
	now = now.Add(time.Minute)
	s, err = Resume(r, "node-1", broken, told, said(now), now)
	must(t, err)
	if !slices.Equal(s.Enforced(), []string{"postgres", "redis"}) || s.Baked(r, now) {
		t.Fatalf("went on: %+v", s)
	}
	if _, done := Settle(r, s, now.Add(time.Hour-1)); done {
		t.Error("done before the wave has held")
	}
	s, done := Settle(r, s, now.Add(time.Hour))
	if _, changed := FallBack(s, "postgres", Word{}, now); !done || changed || s.Stands() != Done {
		t.Errorf("done: %v; falls back: %v; %+v", done, changed, s)
	}
}

// TestOtherPlans: under another plan nothing is enforced that was not, and nothing opened that was enforced.
func TestOtherPlans(t *testing.T) {
	s, err := Advance(plan(), "node-1", State{}, 3, nil, said(start), start)
	must(t, err)
	s, _ = Settle(plan(), s, start.Add(time.Hour))
	next := plan()
	next.Spec.Services = []string{"postgres", "mysql"}
	f := Follow(next, s)
	if want := map[string]policy.Mode{"postgres": policy.ModeEnforce}; f.Wave != 0 || f.Stands() != Running || !reflect.DeepEqual(f.Modes, want) {
		t.Errorf("follows to %+v", f)
	}
	next.Spec.Services, next.Spec.Budget.Refusals = plan().Spec.Services, 7
	if f := Follow(next, s); f.Stands() != Done || f.Wave != 3 {
		t.Errorf("another budget begins the plan anew: %+v", f)
	}
}

// TestRefusedWords: waves do not begin twice, beyond the last, while halted, or by a clock that is ahead.
func TestRefusedWords(t *testing.T) {
	r := plan()
	s, err := Advance(r, "node-1", State{}, 2, nil, said(start), start)
	must(t, err)
	halted, err := Halt(s, Word{By: "uid:0"}, start)
	must(t, err)
	for _, c := range []struct {
		name string
		do   func() error
		want error
	}{
		{"again", func() error { _, err := Advance(r, "node-1", s, 2, nil, said(start), start); return err }, ErrNoWave},
		{"beyond", func() error { _, err := Advance(r, "node-1", s, 4, nil, said(start), start); return err }, ErrNoWave},
		{"ahead", func() error { _, err := Advance(r, "node-1", s, 3, nil, said(start.Add(time.Hour)), start); return err }, ErrStale},
		{"while halted", func() error { _, err := Advance(r, "node-1", halted, 3, nil, said(start), start); return err }, ErrHalted},
		{"halted twice", func() error { _, err := Halt(halted, Word{}, start); return err }, ErrNotHalted},
		{"resumed while it runs", func() error { _, err := Resume(r, "node-1", s, nil, said(start.Add(1)), start); return err }, ErrNotHalted},
		{"resumed by a clock ahead", func() error {
			_, err := Resume(r, "node-1", halted, nil, said(start.Add(time.Hour)), start)
			return err
		}, ErrStale},
	} {
		if err := c.do(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// model is what may be, told apart from how State does it.
type model struct {
	wave   int
	halted bool
	broken map[string]bool
	done   bool
}

// TestRandomLives: in random sequences a service is never enforced before its wave, never back without a cause, never below Shadow once it
// was shadowed, and every state comes back from where it is kept.
func TestRandomLives(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		r, s, m, now := plan(), State{}, model{broken: map[string]bool{}}, start
		var trail []string
		for range 60 {
			now = now.Add(time.Duration(rnd.IntN(50)) * time.Minute)
			before := s
			what := randomStep(rnd, r, &s, &m, now)
			trail = append(trail, what)
			s = killed(t, s)
			if why := wrong(r, before, s, m, what); why != "" {
				t.Fatalf("seed %d: %s after %s: %+v", seed, why, strings.Join(trail, ", "), s)
			}
		}
	}
}

func randomStep(rnd *rand.Rand, r policy.Rollout, s *State, m *model, now time.Time) string {
	service := r.Spec.Services[rnd.IntN(2)]
	switch rnd.IntN(5) {
	case 0:
		wave := 1 + rnd.IntN(4)
		next, err := Advance(r, "node-1", *s, wave, told, said(now), now)
		if err == nil {
			*s, m.wave = next, wave
		}
		return fmt.Sprintf("advance %d (%v)", wave, err == nil)
	case 1:
		next, err := Halt(*s, said(now), now)
		if err == nil {
			*s, m.halted = next, true
		}
		return fmt.Sprintf("halt (%v)", err == nil)
	case 2:
		at := now.Add(time.Duration(rnd.IntN(20)-10) * time.Minute)
		next, err := Resume(r, "node-1", *s, told, said(at), now)
		if err == nil {
			*s, m.halted, m.broken = next, false, map[string]bool{}
		}
		return fmt.Sprintf("resume (%v)", err == nil)
	case 3:
		next, changed := FallBack(*s, service, said(now), now)
		if changed {
			*s, m.halted, m.broken[service] = next, true, true
		}
		return fmt.Sprintf("%s breaks (%v)", service, changed)
	}
	next, done := Settle(r, *s, now)
	if done {
		*s, m.done = next, true
	}
	return fmt.Sprintf("settle (%v)", done)
}

func wrong(r policy.Rollout, before, s State, m model, what string) string {
	for _, service := range r.Spec.Services {
		want := map[int]policy.Mode{0: "", 1: "", 2: policy.ModeShadow, 3: policy.ModeEnforce}[m.wave]
		if m.broken[service] {
			want = policy.ModeShadow
		}
		if s.Modes[service] != want {
			return fmt.Sprintf("%s is %q, want %q", service, s.Modes[service], want)
		}
		lower := before.Modes[service] != "" && s.Modes[service] != before.Modes[service].Stricter(s.Modes[service])
		if lower && what != service+" breaks (true)" {
			return service + " went back without a cause"
		}
	}
	if stands := s.Stands() == Halted || s.Stands() == FellBack; stands != m.halted {
		return fmt.Sprintf("it stands still: %v, want %v", stands, m.halted)
	}
	if (s.Stands() == Done) != m.done {
		return fmt.Sprintf("it is %s, and done: %v", s.Stands(), m.done)
	}
	return ""
}

// killed is what is left of a state after it was kept and read again.
func killed(t *testing.T, s State) (again State) {
	t.Helper()
	data, err := json.Marshal(s)
	must(t, err)
	must(t, json.Unmarshal(data, &again))
	return again
}

// TestTally: what is older than the window does not count, and each limit by itself spends a budget.
func TestTally(t *testing.T) {
	b := policy.ErrorBudget{Refusals: 2, Percent: 10, Window: policy.Duration{Duration: 16 * time.Second}}
	var tally Tally
	tally.Add(b, 100*time.Second, 5, 1)
	tally.Add(b, 110*time.Second, 5, 2)
	for at, want := range map[time.Duration][2]uint64{110 * time.Second: {10, 3}, 115 * time.Second: {10, 3}, 116 * time.Second: {5, 2}, 126 * time.Second: {0, 0}, 1e6 * time.Second: {0, 0}} {
		copied := tally
		if served, refused := copied.Within(b, at); served != want[0] || refused != want[1] {
			t.Errorf("at %s: %d and %d, want %v", at, served, refused, want)
		}
	}
	for _, c := range []struct {
		refusals        uint32
		percent         uint8
		served, refused uint64
		spent           bool
	}{
		{0, 0, 100, 0, false}, {0, 0, 100, 1, true}, {2, 0, 0, 2, false}, {2, 0, 0, 3, true},
		{0, 10, 18, 1, false}, {0, 10, 17, 3, true}, {0, 10, 16, 3, false}, {0, 10, 90, 10, false}, {0, 10, 89, 11, true}, {2, 10, 97, 3, true}, {200, 10, 89, 11, true},
	} {
		if why := Spent(policy.ErrorBudget{Refusals: c.refusals, Percent: c.percent}, c.served, c.refused); (why != "") != c.spent {
			t.Errorf("%+v: %q", c, why)
		}
	}
}

// TestNext: a wave begins when every node is seen, runs, has the same plan and has held; who missed one gets it before others go on.
func TestNext(t *testing.T) {
	good := func(node string, wave int) View {
		return View{Node: node, Plan: "p", Phase: Running, Wave: wave, Waves: 3, Baked: true}
	}
	with := func(v View, change func(*View)) View { change(&v); return v }
	for _, c := range []struct {
		name  string
		views []View
		wave  int
		stops bool
	}{
		{"none", nil, 0, true},
		{"first", []View{good("a", 0), good("b", 0)}, 1, false},
		{"second", []View{good("a", 1), good("b", 1)}, 2, false},
		{"one missed it", []View{good("a", 2), good("b", 1)}, 2, false},
		{"all have begun", []View{good("a", 3), good("b", 3)}, 0, false},
		{"not seen", []View{good("a", 1), {Node: "b", Err: errors.New("away")}}, 2, true},
		{"halted", []View{good("a", 1), with(good("b", 1), func(v *View) { v.Phase = Halted })}, 2, true},
		{"fell back", []View{with(good("a", 1), func(v *View) { v.Phase = FellBack }), good("b", 1)}, 2, true},
		{"not held", []View{good("a", 1), with(good("b", 1), func(v *View) { v.Baked = false })}, 2, true},
		{"another plan", []View{good("a", 1), with(good("b", 1), func(v *View) { v.Plan = "q" })}, 2, true},
	} {
		if wave, against, foreseen := Next(c.views); wave != c.wave || (len(against) > 0) != c.stops || len(foreseen) != 0 {
			t.Errorf("%s: wave %d against %q, %q", c.name, wave, against, foreseen)
		}
	}
	over := with(good("a", 1), func(v *View) { v.Over = []string{"too much"} })
	if _, against, foreseen := Next([]View{over}); len(against) != 0 || !slices.Equal(foreseen, []string{"a: too much"}) {
		t.Errorf("foreseen: %q, %q", against, foreseen)
	}
	fell := with(good("a", 3), func(v *View) { v.Phase = FellBack })
	if Broken([]View{good("b", 3)}) != "" || Broken([]View{good("b", 3), fell}) == "" || Finished([]View{good("a", 3)}) || Finished(nil) ||
		!Finished([]View{with(good("a", 3), func(v *View) { v.Phase = Done })}) {
		t.Error("broken or finished is not what it is")
	}
}
