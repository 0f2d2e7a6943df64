package collector

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// steadyLook is how often the clocks are held against each other.
	steadyLook = time.Minute
	// steadyFor is how long the wall clock must have kept to boot time before a day is dropped by it, and how far apart drops are.
	steadyFor = time.Hour
	// steadyWithin is how far the two may move apart in that time: more than slewing does.
	steadyWithin = time.Minute
)

// steadiness tells whether the wall clock runs as time does. Safe for concurrent use.
type steadiness struct {
	wall func() time.Time
	boot func() time.Duration

	mu     sync.Mutex
	origin time.Time     // wall time at boot, as the clocks stood at since; guarded by mu
	since  time.Duration // boot time since which it has been so; guarded by mu
	spent  time.Duration // boot time of the last drop; guarded by mu
}

// look reads the clocks and tells whether they have kept together for long enough.
func (s *steadiness) look() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	boot := s.boot()
	origin := s.wall().Round(0).Add(-boot)
	if origin.Sub(s.origin).Abs() > steadyWithin {
		s.origin, s.since = origin, boot
	}
	return boot-s.since >= steadyFor
}

// spend tells whether the last drop is long enough ago, and notes this one.
func (s *steadiness) spend() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	boot := s.boot()
	if s.spent != 0 && boot-s.spent < steadyFor {
		return false
	}
	s.spent = boot
	return true
}

// bootTime is CLOCK_BOOTTIME: it cannot be set, and runs on while the machine is suspended.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // which no kernel does; nothing is dropped then
	}
	return time.Duration(ts.Nano())
}

// retention says which day goes, whatever days are kept in.
type retention struct {
	retain time.Duration // 0: for ever
	now    func() time.Time
	steady steadiness
}

func newRetention(cfg Config) *retention {
	r := &retention{retain: cfg.Retain, now: cfg.Now, steady: steadiness{wall: cfg.Now, boot: cfg.Boot}}
	r.steady.look()
	return r
}

// due tells whether the first of days, oldest first, is to go now. A wall clock that was set forward makes every day old at once. So a day must be
// old against the newest day too, the clock must have run steadily for a while, and days go one by one: people have time to see it.
func (r *retention) due(days []string) bool {
	return len(days) > 1 && r.retain > 0 && r.steady.look() && days[0] < r.oldest(days[len(days)-1]) && r.steady.spend()
}

// oldest is the first day to keep, by the wall clock and by the newest day.
func (r *retention) oldest(newest string) string {
	last, _ := time.Parse(dayLayout, newest) // it was made of a time, or has been parsed
	if now := r.now().UTC(); now.Before(last) {
		last = now
	}
	return last.Add(-r.retain).Format(dayLayout)
}
