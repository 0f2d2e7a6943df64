package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"testing"
)

// TestGarbagePercent holds the runtime's metric by its name: without it, everything would be little.
func TestGarbagePercent(t *testing.T) {
	before := debug.SetGCPercent(100)
	defer debug.SetGCPercent(before)
	over, cancel := context.WithCancel(context.Background())
	cancel()
	collect(over)
	if got := debug.SetGCPercent(100); got != percentOfLittle {
		t.Errorf("%d percent with little, want %d", got, percentOfLittle)
	}
	much := make([][]byte, 0, muchHeap>>20)
	for range cap(much) + 1 {
		much = append(much, make([]byte, 1<<20))
	}
	runtime.GC()
	collect(over)
	if got := debug.SetGCPercent(100); got != percentOfMuch {
		t.Errorf("%d percent with %d bytes, want %d", got, liveHeap(), percentOfMuch)
	}
	runtime.KeepAlive(much)
}
