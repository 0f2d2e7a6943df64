package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/px"
)

// pxWatch looks whether px is as it was made, and mends it: what is wrong there closes traffic and opens nothing. A proxy
// that runs goes on. Hooks that were taken off its devices are put back.
type pxWatch struct {
	px       *px.Namespace
	moving   *sync.Mutex // held while px0 is made anew
	move     func(px0 int) error
	attach   func() error
	problems *problems
	alarm    func(alarmName, string)
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
	if wrong := w.px.Check(); wrong != nil {
		if err := w.repair(wrong); err != nil {
			return fmt.Errorf("what is steered is closed, and px could not be mended\n%w", err)
		}
	}
	return w.attach()
}

func (w *pxWatch) repair(wrong error) error {
	w.moving.Lock()
	defer w.moving.Unlock()
	missing, err := w.px.Repair()
	if missing && err == nil {
		err = w.move(w.px.Px0())
	}
	now := "is as it was again"
	if err != nil {
		now = "could not be mended"
	}
	w.alarm(alarmPxLost, fmt.Sprintf("px was changed and %s: %s", now, oneLine(wrong.Error())))
	return err
}
