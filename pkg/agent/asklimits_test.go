package agent

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestAskLimits: an identity that asks too often, or holds too much, is refused, and takes nothing from others; the table
// has a bound, and forgets those of whom nothing is to be remembered.
func TestAskLimits(t *testing.T) {
	l := newAskLimits(policy.AutomationConfig{RequestsPerMinute: 60, PathsPerIdentity: 3})
	at := time.Hour
	many := func(id spiffeid.ID, n int) (taken int) {
		for range n {
			if err := l.take(id, at); err == nil {
				taken++
			} else if !errors.Is(err, ErrTooMany) {
				t.Fatal(err)
			}
		}
		return taken
	}
	if n := many(backup, 10); n != 3 {
		t.Errorf("holds %d paths, want 3", n)
	}
	l.give(backup)
	if n := many(backup, 5); n != 1 {
		t.Errorf("gave one back and got %d", n)
	}
	for range 3 {
		l.give(backup)
	}
	if n := many(backup, 30); n != 3 { // 15 of the 20 at a time are gone
		t.Errorf("got %d", n)
	}
	for range 3 {
		l.give(backup)
	}
	if n := many(backup, 1); n != 0 {
		t.Error("asked more than 20 times at once")
	}
	if n := many(intruder, 1); n != 1 {
		t.Error("another identity is refused for it")
	}
	at += time.Second
	if n := many(backup, 2); n != 1 {
		t.Errorf("a second later: %d, want 1", n)
	}

	for i := range maxAskers {
		id := spiffeid.RequireFromPath(testDomain, fmt.Sprintf("/n/%d", i))
		if l.take(id, at) == nil {
			l.give(id)
		}
	}
	if late := spiffeid.RequireFromPath(testDomain, "/late"); many(late, 1) != 0 {
		t.Error("more identities than the table has room for")
	} else if at += time.Minute; many(late, 1) != 1 || len(l.askers) > 10 {
		t.Errorf("%d are remembered after a minute", len(l.askers))
	}
}

// TestTakingUpLimits: all paths of an identity can be taken up again at once, and no rate of new ones is used up by it; nor does it
// have more streams than it can need.
func TestTakingUpLimits(t *testing.T) {
	const paths = 30 // more than an identity may ask for at a time
	l := newAskLimits(policy.AutomationConfig{RequestsPerMinute: 60, PathsPerIdentity: paths})
	at := time.Hour
	for range paths {
		must(t, l.hear(backup, at))
		must(t, l.takeUp(backup, at))
	}
	for range paths {
		l.give(backup)
	}
	must(t, l.take(backup, at))
	l.give(backup)
	for range paths {
		must(t, l.takeUp(backup, at))
		l.give(backup)
	}
	if err := l.takeUp(backup, at); !errors.Is(err, ErrTooMany) {
		t.Errorf("asked for all again, and once more: %v", err)
	}
	at += time.Second
	must(t, l.takeUp(backup, at))
	l.give(backup)
	for range 2 * paths {
		must(t, l.hear(backup, at))
	}
	if err := l.hear(backup, at); !errors.Is(err, ErrTooMany) {
		t.Errorf("one stream too many: %v", err)
	}
	must(t, l.hear(intruder, at))
}

// TestConnectionLimits: an identity has so many connections and no more, takes none of others', and is remembered while it has one.
func TestConnectionLimits(t *testing.T) {
	l := newAskLimits(policy.AutomationConfig{RequestsPerMinute: 60, PathsPerIdentity: 3})
	at := time.Hour
	for range 6 {
		must(t, l.connect(backup, at))
	}
	if err := l.connect(backup, at); !errors.Is(err, ErrTooMany) {
		t.Errorf("a seventh connection: %v", err)
	}
	must(t, l.connect(intruder, at))
	l.disconnect(backup)
	must(t, l.connect(backup, at))
	for i := range maxAskers {
		if id := spiffeid.RequireFromPath(testDomain, fmt.Sprintf("/n/%d", i)); l.connect(id, at) == nil {
			l.disconnect(id)
		}
	}
	if l.askers[backup] == nil || l.connect(backup, at) == nil {
		t.Error("its connections were forgotten")
	}
	for range 6 {
		l.disconnect(backup)
	}
}
