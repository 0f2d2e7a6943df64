package agent

import (
	"context"
	"errors"
	"time"
)

// pxWatch looks whether px is as it was made. What is wrong there closes traffic and opens nothing, so it is told of and
// left to people: to make px anew takes a start of the agent. Hooks that were taken off its devices are put back.
type pxWatch struct {
	check    func() error
	attach   func() error
	problems *problems
}

// Run looks every resyncEvery until ctx ends.
func (w *pxWatch) Run(ctx context.Context) error {
	look := time.NewTicker(resyncEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			w.problems.report(problemPx, "", errors.Join(w.check(), w.attach()))
		}
	}
}
