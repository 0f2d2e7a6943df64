package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
)

// journal notes what happens to parts.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(line string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
}

func (j *journal) part(name string, startErr, runErr error) part {
	return part{
		name:  name,
		start: func(context.Context) error { j.add("start " + name); return startErr },
		run: func(ctx context.Context) error {
			if runErr != nil {
				return runErr
			}
			<-ctx.Done()
			j.add("ended " + name)
			return nil
		},
		stop: func() error { j.add("stop " + name); return nil },
	}
}

func TestPartsStopInReverse(t *testing.T) {
	var j journal
	ctx, cancel := context.WithCancel(t.Context())
	parts := []part{j.part("a", nil, nil), j.part("b", nil, nil), {name: "c", start: func(context.Context) error { cancel(); return nil }}}
	if err := runParts(ctx, parts, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	want := []string{"start a", "start b", "ended b", "stop b", "ended a", "stop a"}
	if !slices.Equal(j.lines, want) {
		t.Errorf("%v, want %v", j.lines, want)
	}
}

func TestPartThatCannotStart(t *testing.T) {
	var j journal
	broken := errors.New("broken")
	err := runParts(t.Context(), []part{j.part("a", nil, nil), j.part("b", broken, nil), j.part("c", nil, nil)}, slog.New(slog.DiscardHandler))
	if !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	want := []string{"start a", "start b", "ended a", "stop a"}
	if !slices.Equal(j.lines, want) {
		t.Errorf("%v, want %v", j.lines, want)
	}
}

func TestPartThatFailsStopsTheRest(t *testing.T) {
	var j journal
	broken := errors.New("broken")
	err := runParts(t.Context(), []part{j.part("a", nil, nil), j.part("b", nil, broken)}, slog.New(slog.DiscardHandler))
	if !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	if want := []string{"start a", "start b", "stop b", "ended a", "stop a"}; !slices.Equal(j.lines, want) {
		t.Errorf("%v, want %v", j.lines, want)
	}
}
