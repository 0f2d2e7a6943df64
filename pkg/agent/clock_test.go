package agent

import (
	"testing"
	"testing/quick"
	"time"
)

// testClock is a clock that a test moves.
type testClock struct {
	now     time.Time
	uptime  time.Duration
	between time.Duration // passes between the two readings
}

func (c *testClock) clock() clock {
	return clock{
		wall: func() time.Time { return c.now },
		boot: func() time.Duration {
			b := c.uptime
			c.advance(c.between)
			return b
		},
	}
}

func (c *testClock) advance(d time.Duration) { c.now, c.uptime = c.now.Add(d), c.uptime+d }

// TestReadingNeverLengthens is invariant 10: a deadline converted by one reading of both clocks, as activation does, is
// never later than the wall-clock one, whatever time passes between the two.
func TestReadingNeverLengthens(t *testing.T) {
	start := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	property := func(left, uptime, pause uint32) bool {
		tc := &testClock{now: start, uptime: time.Duration(uptime), between: time.Duration(pause)}
		deadline := start.Add(time.Duration(left))
		wall, boot := tc.clock().read()
		return !start.Add(boot + deadline.Sub(wall) - time.Duration(uptime)).After(deadline)
	}
	if err := quick.Check(property, nil); err != nil {
		t.Error(err)
	}
}

func TestJumped(t *testing.T) {
	origin := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name    string
		moved   time.Duration
		elapsed time.Duration
		want    bool
	}{
		{"still", 0, time.Second, false},
		{"slewed a little", 4 * time.Second, time.Second, false},
		{"stepped forward", 6 * time.Second, time.Second, true},
		{"stepped back", -6 * time.Second, time.Second, true},
		{"slewed over a day", 40 * time.Second, 24 * time.Hour, false},
		{"stepped in a day", 50 * time.Second, 24 * time.Hour, true},
		{"negative elapsed gives no allowance", 6 * time.Second, -24 * time.Hour, true},
	} {
		if got := jumped(origin, origin.Add(c.moved), c.elapsed); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestWallAt(t *testing.T) {
	tc := &testClock{now: time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC), uptime: time.Hour}
	if got, want := tc.clock().wallAt(time.Hour+time.Minute), tc.now.Add(time.Minute); !got.Equal(want) {
		t.Errorf("%v, want %v", got, want)
	}
}
