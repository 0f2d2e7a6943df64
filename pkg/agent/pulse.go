package agent

import (
	"errors"
	"slices"
	"sync"
	"time"
)

// errStalled says that a loop does not move. The service manager, which is told nothing then, starts the agent anew.
var errStalled = errors.New("does not move")

// stallAfter is how long a loop may take for one turn. Those that beat wait for no disk and for nobody's answer, but one turn may have
// many devices to hook.
const stallAfter = 30 * time.Second

// pulse is what loops show by that they move, for the watchdog of the service manager.
type pulse struct {
	mu    sync.Mutex
	beats map[string]time.Duration // guarded by mu; boot time of the last turn of each loop
}

func newPulse() *pulse { return &pulse{beats: make(map[string]time.Duration)} }

func (p *pulse) beat(loop string, now time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.beats[loop] = now
}

// stalled are the loops that have begun and do not move. Boot time goes on in a suspended machine: what was suspended has until the next look.
func (p *pulse) stalled(now time.Duration) (loops []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for loop, last := range p.beats {
		if now-last > stallAfter {
			loops = append(loops, loop)
		}
	}
	slices.Sort(loops)
	return loops
}
