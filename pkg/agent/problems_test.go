package agent

import (
	"errors"
	"log/slog"
	"slices"
	"testing"
)

// TestProblemLines: whoever reads status sees each cause on a line of its own.
func TestProblemLines(t *testing.T) {
	p := newProblems(slog.New(slog.DiscardHandler))
	p.report(problemResources, "", errors.Join(errors.New("a.yaml:1: one"), errors.New("a.yaml:2: two")))
	p.report(problemService, "redis", errors.New("no route"))
	want := []string{"resources: a.yaml:1: one", "resources: a.yaml:2: two", "service redis: no route"}
	if got := p.lines(); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
