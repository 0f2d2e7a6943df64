package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
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

// stuckLog takes nothing until it is let go.
type stuckLog struct {
	slog.Handler
	let chan struct{}
}

func (stuckLog) Enabled(context.Context, slog.Level) bool { return true }

func (s stuckLog) Handle(context.Context, slog.Record) error {
	<-s.let
	return nil
}

// TestAStuckLogKeepsNobodyElseWaiting: who reads or reports what is wrong does not wait for who writes to a log that takes
// nothing.
func TestAStuckLogKeepsNobodyElseWaiting(t *testing.T) {
	let := make(chan struct{})
	p := newProblems(slog.New(stuckLog{slog.DiscardHandler, let}))
	var logging sync.WaitGroup
	defer logging.Wait()
	defer close(let)
	logging.Go(func() { p.report(problemPins, "", errors.New("gone")) })
	read := make(chan struct{})
	go func() {
		defer close(read)
		for len(p.lines()) == 0 {
			runtime.Gosched()
		}
		p.report(problemLease, "", nil)
	}()
	select {
	case <-read:
	case <-time.After(10 * time.Second):
		t.Error("they wait for the log")
	}
}

// TestActivationIsWellAgain: what kept a refusal from being recorded is over once a grant is.
func TestActivationIsWellAgain(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	l.problems.report(problemGrants, "activation", errors.New("disk is full"))
	_, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	if left := l.problems.lines(); len(left) > 0 {
		t.Errorf("problems after a grant that was recorded: %q", left)
	}
}

// TestProblemsTellTheNextStep: what an operator wrote wrongly stands with how to write it.
func TestProblemsTellTheNextStep(t *testing.T) {
	p := newProblems(slog.New(slog.DiscardHandler))
	_, err := policy.Parse("a.yaml", []byte("apiVersion: sallyport.dev/v1alpha1\nkind: ProtectedService\nmetadata: {name: web}\nspec: {target: Host, ports: [0]}\n"))
	p.report(problemResources, "", fmt.Errorf("load: %w", err))
	want := "resources: a.yaml:4: spec.ports[0]: 0 is not a port (write a port from 1 to 65535)"
	if got := p.lines(); len(got) != 1 || got[0] != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestProblemsAreObeyedByNoTerminal: what an API server says is shown, and nothing more.
func TestProblemsAreObeyedByNoTerminal(t *testing.T) {
	p := newProblems(slog.New(slog.DiscardHandler))
	p.report(problemCluster, "", errors.Join(errors.New("watch: \x1b]0;root\x07\x1b[2Jall is well\r"), errors.New("and more")))
	if told := strings.Join(p.lines(), "\n"); strings.ContainsAny(told, "\x1b\x07\r") || len(p.lines()) != 2 || !contains(told, "and more", "all is well") {
		t.Errorf("%q", told)
	}
}
