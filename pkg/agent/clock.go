package agent

import (
	"time"
)

// clock reads the node's two clocks. Wall time is for people and for not-after; CLOCK_BOOTTIME decides.
type clock struct {
	wall func() time.Time
	boot func() time.Duration
}

// read gives both clocks. Boot time is read first: a holder that is descheduled in between gets a deadline that is
// too early, never one that is too late.
func (c clock) read() (wall time.Time, boot time.Duration) {
	boot = c.boot()
	return c.wall().Round(0), boot
}

// origin is the wall-clock time at which boot time was zero, as the clocks stand now.
func (c clock) origin() time.Time {
	wall, boot := c.read()
	return wall.Add(-boot)
}

// wallAt tells a boot time as wall-clock time, for people.
func (c clock) wallAt(boot time.Duration) time.Time { return c.origin().Add(boot) }

// jumpLimit is how far wall minus boot time may move between two looks before every path ends.
const jumpLimit = 5 * time.Second

// slewLimit is the fastest that the kernel slews the wall clock: 500 parts per million.
const slewLimit = 500e-6

// jumped tells whether wall minus boot time moved further than slewing explains in the given time. A step of the wall
// clock and a restored snapshot both show so.
func jumped(before, now time.Time, elapsed time.Duration) bool {
	allowed := jumpLimit + time.Duration(float64(max(elapsed, 0))*slewLimit)
	return now.Sub(before).Abs() > allowed
}
