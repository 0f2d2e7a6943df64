package agent

import (
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// use is what the paths of an active grant have carried, as far as this agent has seen it: it looks once a second.
type use struct {
	looked  bool
	packets uint64        // at the last look
	moved   time.Duration // CLOCK_BOOTTIME of the last look that found more of them, or of the first look
}

// look compares the paths of a grant with the last look at them. now is CLOCK_BOOTTIME.
func (u *use) look(paths []datapath.PathStatus, now time.Duration) {
	var packets uint64
	for _, p := range paths {
		packets += p.PacketsToServer + p.PacketsToClient
	}
	if !u.looked || packets != u.packets {
		u.moved = now
	}
	u.looked, u.packets = true, packets
}
