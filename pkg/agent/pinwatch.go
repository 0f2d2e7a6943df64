package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// pinWatch puts pins back that somebody removed. Enforcement goes on without them, but an agent that starts without them
// adopts nothing, and live paths end.
type pinWatch struct {
	repin    func() (int, error)
	problems *problems
	alarm    func(alarmName, string)
	gone     bool // owned by Run; the bpffs, at the last look
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
			w.look()
		}
	}
}

// look tells of a bpffs that is gone once: what the agent and the guard hold by descriptors stays, and is pinned again when
// there is a bpffs again.
func (w *pinWatch) look() {
	n, err := w.repin()
	gone := errors.Is(err, datapath.ErrBPFFS)
	switch {
	case gone && !w.gone:
		w.alarm(alarmBPFFSLost, "the bpffs is gone: hooks are held by the agent and the guard alone until it is mounted again")
	case n > 0 && w.gone:
		w.alarm(alarmBPFFSLost, fmt.Sprintf("the bpffs is there again: %d pins made", n))
	case n > 0:
		w.alarm(alarmPinsLost, fmt.Sprintf("%d pins were removed, and are there again", n))
	}
	w.gone = gone
	w.problems.report(problemPins, "", err)
}
