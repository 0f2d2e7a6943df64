package proxy

import (
	"testing"
	"time"
)

// TestSpread: time limits of clients that came together are some way apart, none longer than was configured, and none much shorter.
func TestSpread(t *testing.T) {
	const limit = 4 * time.Second
	low, high := limit, time.Duration(0)
	for range 1000 {
		d := spread(limit)
		low, high = min(low, d), max(high, d)
	}
	if low < limit*3/4 || high > limit || high-low < limit/5 {
		t.Errorf("limits of %s are between %s and %s", limit, low, high)
	}
	if d := spread(time.Nanosecond); d != time.Nanosecond {
		t.Errorf("a limit of 1ns is %s", d)
	}
}
