package e2e_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestGuardIsSeen: status says that no guard lives, and takes it back when one does.
func TestGuardIsSeen(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{plain: true})
	w.agent.start(t)
	w.guard.start(t)
	missing := func() bool {
		return slices.ContainsFunc(w.status(t).Problems, func(p string) bool { return strings.HasPrefix(p, "guard: no guard runs") })
	}
	w.guard.kill(t)
	waitUntil(t, "the problem", missing)
	w.guard.start(t)
	waitUntil(t, "its end", func() bool { return !missing() })
}
