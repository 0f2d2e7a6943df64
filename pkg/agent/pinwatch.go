package agent

import (
	"context"
	"fmt"
	"time"
)

// pinWatch puts pins back that somebody removed. Enforcement goes on without them, but an agent that starts without them
// adopts nothing, and live paths end.
type pinWatch struct {
	repin    func() (int, error)
	problems *problems
	alarm    func(alarmName, string)
}

// Run looks every resyncEvery until ctx ends.
func (w *pinWatch) Run(ctx context.Context) error {
	look := time.NewTicker(resyncEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			n, err := w.repin()
			if n > 0 {
				w.alarm(alarmPinsLost, fmt.Sprintf("%d pins were removed, and are there again", n))
			}
			w.problems.report(problemPins, "", err)
		}
	}
}
