package agent

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestGuardMark: a guard is seen while it lives, also when its mark is made anew.
func TestGuardMark(t *testing.T) {
	path := filepath.Join(t.TempDir(), "guard.lock")
	m := &guardMark{path: path}
	must(t, m.take())
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the guard made the file: %v", err)
	}
	if err := guarded(path); !errors.Is(err, errNoGuard) {
		t.Fatalf("no guard has run: %v", err)
	}
	other := &guardMark{path: path}
	for _, g := range []*guardMark{m, other} {
		must(t, g.take())
	}
	must(t, guarded(path))
	m.release()
	must(t, guarded(path)) // two run while one takes the place of the other
	must(t, os.Remove(path))
	if err := guarded(path); !errors.Is(err, errNoGuard) {
		t.Fatalf("the mark is a new one: %v", err)
	}
	must(t, other.take())
	must(t, guarded(path))
	other.release()
	if err := guarded(path); !errors.Is(err, errNoGuard) {
		t.Fatalf("no guard lives: %v", err)
	}
}

// TestGuardWatch: a guard that is away for a moment is no problem, one that stays away is.
func TestGuardWatch(t *testing.T) {
	var now time.Duration
	m := &guardMark{path: filepath.Join(t.TempDir(), "guard.lock")}
	w := &guardWatch{path: m.path, problems: newProblems(slog.New(slog.DiscardHandler)), boot: func() time.Duration { return now }}
	for _, c := range []struct {
		at      time.Duration
		held    bool
		problem bool
	}{
		{0, false, false}, {guardGrace - 1, false, false}, {guardGrace, false, true}, {guardGrace + time.Second, true, false},
		{2*guardGrace - 1, false, false}, {2*guardGrace + time.Second, false, true},
	} {
		now = c.at
		if c.held {
			must(t, m.take())
		} else {
			m.release()
		}
		w.look()
		if got := strings.Join(w.problems.lines(), "\n"); c.problem != strings.Contains(got, "guard: no guard runs") {
			t.Errorf("at %v: problems %q", c.at, got)
		}
	}
}
