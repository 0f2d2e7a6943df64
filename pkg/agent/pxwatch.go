package agent

import (
	"context"
	"errors"
	"fmt"
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
			w.problems.report(problemPx, "", w.look())
		}
	}
}

func (w *pxWatch) look() error {
	if err := errors.Join(w.check(), w.attach()); err != nil {
		return fmt.Errorf("what is steered is closed: restart the agent, which makes px anew\n%w", err)
	}
	return nil
}
