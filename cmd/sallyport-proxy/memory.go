package main

import (
	"errors"
	"log/slog"
	"math"
	"os"
	"runtime/debug"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// What the runtime may have, bytes: what is meant for a place, which is what slow clients come to by make bench-slow, and for all else.
const (
	memoryBeside = 64 << 20
	memoryOfEach = 128 << 10
)

// groupShare is the part of the control group's memory that the runtime may have: the rest is the program's own text and the kernel's,
// which counts what waits in sockets.
const groupShare = 0.85

// limitMemory has the runtime collect garbage ever more often, rather than have more memory than its places are meant to need, or than its
// control groups let it have: there it would be killed with all connections. GOMEMLIMIT in the environment is heeded.
func limitMemory(places int, log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	limit, given := memoryOf(places), memoryGiven(log)
	if given < limit {
		log.Warn("memory does not last for all places: with many connections the proxy is slow", "places", places, "needed", limit, "given", given)
	}
	debug.SetMemoryLimit(min(limit, given))
}

// memoryOf is what so many places are meant to need at most, bytes.
func memoryOf(places int) int64 { return memoryBeside + int64(places)*memoryOfEach }

// memoryGiven is what the runtime may have of the limit of our control groups, bytes, or math.MaxInt64.
func memoryGiven(log *slog.Logger) int64 {
	limit, err := memlimit.ApplyRatio(memlimit.FromCgroup, groupShare)()
	if err != nil {
		if !errors.Is(err, memlimit.ErrNoLimit) {
			log.Warn("the control group's limit of memory is not known", "error", err)
		}
		return math.MaxInt64
	}
	return int64(min(limit, math.MaxInt64))
}
