package agent

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
)

func testChallenges() (*challenges, *testClock) {
	tc := &testClock{now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC), uptime: time.Hour}
	return &challenges{node: "node-1", boot: "boot", clock: tc.clock()}, tc
}

// TestChallenges: each is answered once, in its time, on its node and in its boot.
func TestChallenges(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*challenges, *testClock, *grant.Challenge)
		says   string // empty: it can be answered
	}{
		{"at once", func(*challenges, *testClock, *grant.Challenge) {}, ""},
		{"just in time", func(_ *challenges, tc *testClock, _ *grant.Challenge) { tc.advance(challengeLife - 1) }, ""},
		{"though the wall clock was set", func(_ *challenges, tc *testClock, _ *grant.Challenge) { tc.now = tc.now.Add(time.Hour) }, ""},
		{"too late", func(_ *challenges, tc *testClock, _ *grant.Challenge) { tc.advance(challengeLife) }, "is over"},
		{"too late, the wall clock set back", func(_ *challenges, tc *testClock, _ *grant.Challenge) { tc.uptime += challengeLife }, "is over"},
		{"another node's", func(_ *challenges, _ *testClock, c *grant.Challenge) { c.Node = "node-2" }, "node-2"},
		{"of another boot", func(_ *challenges, _ *testClock, c *grant.Challenge) { c.Boot = "before" }, "rebooted"},
		{"with a later end", func(_ *challenges, _ *testClock, c *grant.Challenge) { c.Expires = c.Expires.Add(1) }, "answered before"},
		{"a guess", func(_ *challenges, _ *testClock, c *grant.Challenge) { c.Nonce = c.Nonce[1:] + "0" }, "answered before"},
		{"among as many as there may be", func(cs *challenges, _ *testClock, _ *grant.Challenge) { mintMany(cs, maxChallenges-1) }, ""},
		{"before more than there may be", func(cs *challenges, _ *testClock, _ *grant.Challenge) { mintMany(cs, maxChallenges) }, "answered before"},
	} {
		cs, tc := testChallenges()
		made := cs.mint()
		c.change(cs, tc, &made)
		for range 2 { // a look uses nothing up
			if err := cs.check(made); (err == nil) != (c.says == "") || err != nil && (!errors.Is(err, grant.ErrChallenge) || !contains(err.Error(), c.says)) {
				t.Errorf("%s: %v, want %q", c.name, err, c.says)
			}
		}
		if err := cs.use(made); (err == nil) != (c.says == "") {
			t.Errorf("%s: used: %v", c.name, err)
		}
		if err := cs.use(made); !errors.Is(err, grant.ErrChallenge) {
			t.Errorf("%s: used twice: %v", c.name, err)
		}
		if len(cs.waiting) > maxChallenges {
			t.Errorf("%s: %d wait", c.name, len(cs.waiting))
		}
	}
}

func mintMany(cs *challenges, n int) {
	for range n {
		cs.mint()
	}
}

func TestChallengeIsUsedOnceAtATime(t *testing.T) {
	cs, _ := testChallenges()
	made := cs.mint()
	var used atomic.Int32
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if cs.use(made) == nil {
				used.Add(1)
			}
		})
	}
	wg.Wait()
	if used.Load() != 1 {
		t.Errorf("used %d times", used.Load())
	}
}
