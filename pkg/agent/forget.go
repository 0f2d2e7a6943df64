package agent

import (
	"context"
	"time"
)

// How long the node remembers a grant. A person's could be handed in again until its notAfter, and people ask about it later; a
// workload's is known by nobody but its holder, and there are many.
const (
	keepPeoples   = 30 * 24 * time.Hour // from its notAfter on
	keepWorkloads = time.Hour           // from its deadline on
)

// forgetEvery is how often grants are forgotten, and forgetBatch how many in one durable transaction: others want to write in
// between.
const (
	forgetEvery = time.Minute
	forgetBatch = 32
)

// Forget lets go of grants that are over and were kept long enough, with what was noted about them, when it is time.
func (g *grants) Forget(ctx context.Context) error {
	now := g.clock.boot()
	if now-g.forgot < forgetEvery {
		return nil
	}
	for {
		n, err := g.store.Prune(ctx, forgetBatch, noteOfUse, noteOfLimits)
		if err != nil || n < forgetBatch {
			g.forgot = now
			return err
		}
	}
}
