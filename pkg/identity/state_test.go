package identity

import (
	"errors"
	"testing"
	"time"
)

func TestStates(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	confirm := Confirm{Answers: 2, Window: 10 * time.Second}
	type step func(evidence, time.Time) evidence
	issued := func(e evidence, now time.Time) evidence { return e.updated(now, start.Add(time.Hour)) }
	long := func(e evidence, now time.Time) evidence { return e.updated(now, start.Add(10*24*time.Hour)) }
	gone := func(e evidence, _ time.Time) evidence { return e.unreachable() }
	denied := func(e evidence, now time.Time) evidence { return e.denied(now, confirm) }
	missing := func(e evidence, now time.Time) evidence { return e.missing(now, confirm) }
	type at struct {
		after time.Duration // since the step before
		do    step          // nil: only time passes
		want  State
	}
	const s, m = time.Second, time.Minute
	cases := map[string][]at{
		"never reached":                {{0, gone, Unreachable}, {2 * time.Hour, gone, Unreachable}},
		"never issued":                 {{0, denied, Unissued}, {m, denied, Unissued}, {s, gone, Unissued}},
		"issued late":                  {{0, denied, Unissued}, {m, denied, Unissued}, {s, issued, Fresh}},
		"source gone, then back":       {{0, issued, Fresh}, {s, gone, StaleValid}, {m, gone, StaleValid}, {s, issued, Fresh}},
		"source gone until expiry":     {{0, issued, Fresh}, {s, gone, StaleValid}, {time.Hour, nil, Expired}, {s, gone, Expired}, {s, issued, Expired}},
		"expired while connected":      {{0, issued, Fresh}, {time.Hour, nil, Expired}},
		"not renewed":                  {{0, issued, Fresh}, {44 * m, nil, Fresh}, {m, nil, StaleValid}, {14 * m, nil, StaleValid}, {m, nil, Expired}},
		"told late in its time":        {{40 * m, issued, Fresh}, {14 * m, nil, Fresh}, {m, nil, StaleValid}},
		"renewed a day before its end": {{0, long, Fresh}, {9 * 24 * time.Hour, nil, Fresh}, {12 * time.Hour, nil, StaleValid}},
		"one denial proves nothing":    {{0, issued, Fresh}, {s, denied, StaleValid}, {m, nil, StaleValid}},
		"two quick denials neither":    {{0, issued, Fresh}, {s, denied, StaleValid}, {s, denied, StaleValid}, {s, issued, Fresh}},
		"confirmed":                    {{0, issued, Fresh}, {s, denied, StaleValid}, {10 * s, denied, Withdrawn}},
		"unreachable does not confirm": {{0, issued, Fresh}, {s, denied, StaleValid}, {m, gone, StaleValid}, {m, gone, StaleValid}},
		"unreachable does not clear":   {{0, issued, Fresh}, {s, denied, StaleValid}, {s, gone, StaleValid}, {10 * s, denied, Withdrawn}},
		"withdrawn stays":              {{0, issued, Fresh}, {s, denied, StaleValid}, {10 * s, denied, Withdrawn}, {s, gone, Withdrawn}, {2 * time.Hour, nil, Withdrawn}},
		"withdrawn, then restored":     {{0, issued, Fresh}, {s, denied, StaleValid}, {10 * s, denied, Withdrawn}, {s, issued, Fresh}},
		"an identity clears denials":   {{0, issued, Fresh}, {s, denied, StaleValid}, {s, issued, Fresh}, {m, denied, StaleValid}},
		"left out of the set":          {{0, issued, Fresh}, {s, missing, StaleValid}, {9 * s, nil, StaleValid}, {s, nil, Withdrawn}},
		"left out, then unreachable":   {{0, issued, Fresh}, {s, missing, StaleValid}, {s, gone, StaleValid}, {m, nil, StaleValid}, {s, missing, Withdrawn}},
		"never in the set":             {{0, missing, Unissued}, {m, nil, Unissued}},
		"denied after expiry":          {{0, issued, Fresh}, {2 * time.Hour, denied, Expired}, {m, denied, Withdrawn}},
	}
	for name, steps := range cases {
		t.Run(name, func(t *testing.T) {
			var e evidence
			now := start
			for i, step := range steps {
				now = now.Add(step.after)
				if step.do != nil {
					e = step.do(e, now)
				}
				if got := e.state(now, confirm); got != step.want {
					t.Fatalf("step %d: %s, want %s", i+1, got, step.want)
				}
			}
		})
	}
}

func TestEachStateHasItsError(t *testing.T) {
	want := map[State]error{
		Fresh: nil, StaleValid: nil, Unreachable: ErrUnreachable,
		Unissued: ErrUnissued, Expired: ErrExpired, Withdrawn: ErrWithdrawn,
	}
	for state, err := range want {
		if got := state.err(); !errors.Is(got, err) {
			t.Errorf("%s: %v", state, got)
		}
		if state.Usable() != (err == nil) {
			t.Errorf("%s: usable %v", state, state.Usable())
		}
	}
}
