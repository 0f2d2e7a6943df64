package main

import (
	"log/slog"
	"runtime/debug"
	"testing"
)

// TestLimitMemory: the runtime may have what the places are meant to need and what the control groups give, or what the environment says.
func TestLimitMemory(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	t.Cleanup(func() { debug.SetMemoryLimit(before) })
	for places, want := range map[int]int64{0: 64 << 20, 10000: 1314 << 20} {
		t.Setenv("GOMEMLIMIT", "")
		limitMemory(places, slog.New(slog.DiscardHandler))
		if got := debug.SetMemoryLimit(-1); got != min(want, memoryGiven(slog.Default())) {
			t.Errorf("with %d places the runtime may have %d bytes, want %d", places, got, want)
		}
		t.Setenv("GOMEMLIMIT", "1GiB")
		debug.SetMemoryLimit(1 << 30)
		limitMemory(places, slog.New(slog.DiscardHandler))
		if got := debug.SetMemoryLimit(-1); got != 1<<30 {
			t.Errorf("what the environment says became %d", got)
		}
	}
}
