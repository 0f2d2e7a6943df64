package agent

import (
	"context"
	"sync"
)

// leavers are grants whose holders have let go. Thousands may at a time, when a network breaks: one of them ends all those that
// wait by then, so that whoever activates waits for a turn of one, and not behind each of them.
type leavers struct {
	turn sync.Mutex // held by the one that ends
	mu   sync.Mutex
	wait []*leaver // guarded by mu
}

type leaver struct {
	doomed
	done bool  // guarded by leavers.turn
	err  error // guarded by leavers.turn
}

// LetGo ends a grant that was held. It is over already where something else ended it. On an error the paths may be open, and a
// tick tries again.
func (g *grants) LetGo(ctx context.Context, h *held, why string) error {
	l := &leaver{doomed: doomed{h, ending{grant: h.row.ID}.revoked(h.payload.Requester, why)}}
	g.leavers.mu.Lock()
	g.leavers.wait = append(g.leavers.wait, l)
	g.leavers.mu.Unlock()

	g.leavers.turn.Lock()
	defer g.leavers.turn.Unlock()
	if !l.done {
		g.endLeavers(ctx)
	}
	return l.err
}

// endLeavers ends those that wait. leavers.turn is held.
func (g *grants) endLeavers(ctx context.Context) {
	g.leavers.mu.Lock()
	waiting := g.leavers.wait
	g.leavers.wait = nil
	g.leavers.mu.Unlock()
	all := make([]doomed, len(waiting))
	for i, l := range waiting {
		all[i] = l.doomed
	}
	_ = inTurns(&g.mu, all, func(d doomed) error {
		if d.holding != nil {
			d.holding.let = d.why
		}
		return nil
	})
	err := g.endMany(ctx, all)
	for _, l := range waiting {
		l.done, l.err = true, err
	}
}
