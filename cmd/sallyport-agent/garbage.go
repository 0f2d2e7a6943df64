package main

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// What the heap may grow by between collections, in percent of what is live. The agent is on every node, and its memory is what
// others there cannot have: while there is little, it is collected soon. Thousands of workloads that hold paths have hundreds of
// MiB of connections, and whoever asks for a path waits for the CPU while these are looked through.
const (
	percentOfLittle = 40
	percentOfMuch   = 100
	muchHeap        = 64 << 20 // bytes
)

// collectAnew is how often it is decided.
const collectAnew = 5 * time.Second

// collect keeps the percentage until ctx ends.
func collect(ctx context.Context) {
	tick := time.NewTicker(collectAnew)
	defer tick.Stop()
	for {
		debug.SetGCPercent(garbagePercent(liveHeap()))
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func garbagePercent(live uint64) int {
	if live < muchHeap {
		return percentOfLittle
	}
	return percentOfMuch
}

// liveHeap is how many bytes the last collection left.
func liveHeap() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return s[0].Value.Uint64()
}
