package agent

import (
	"context"
	"sync"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// Guard holds the descriptors of the agent's links until ctx ends, so that enforcement outlives the agent, its pins and
// bpffs. It is a process of its own and does nothing else.
func Guard(ctx context.Context, o Options) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	log, notify := o.logger(), notifier{socket: o.NotifySocket}
	tell := notify.ready
	held := func(int) { // after each look: a guard that looks no more is started anew
		if err := tell(); err != nil {
			log.Warn("tell service manager", "error", err)
		}
		tell = notify.alive
	}
	ctx, cancel := context.WithCancel(ctx)
	var seen sync.WaitGroup
	seen.Go(func() { (&guardMark{path: cfg.GuardFile()}).Run(ctx, log) })
	defer seen.Wait()
	defer cancel()
	return datapath.HoldLinks(ctx, cfg.PinDir(), log, held)
}
