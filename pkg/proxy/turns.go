package proxy

import (
	"context"
	"net/netip"
	"os"
	"sync"
	"time"
)

// turns bound how many handshakes compute at a time, and say whose is next. A handshake costs much more than what asks for it: without
// an order, who comes in earnest waits behind all who do not. Who waits for the network has no turn.
type turns struct {
	mu      sync.Mutex
	free    int                          // guarded by mu
	given   uint                         // guarded by mu; ever
	waiting [standings][]*waiter         // guarded by mu; in the order that they came
	known   [2]map[netip.Prefix]standing // guarded by mu; of this time and of the one before, by neighbourhood
	since   time.Time                    // guarded by mu; the time began
}

// standing is what the last handshake from a neighbourhood came to.
type standing int

const (
	welcome   standing = iota // it was let in
	unknown                   // there was none, or it is long ago
	refused                   // it was not let in
	standings = iota
)

// Every so many turns the first one goes to somebody who is unknown, or who was refused: nobody waits for ever.
const (
	turnsOfUnknown = 4
	turnsOfRefused = 16
)

// Bounds of what is remembered of neighbourhoods.
const (
	rememberFor  = time.Minute
	rememberMost = 1 << 15
)

type waiter struct {
	ready chan struct{} // closed by whoever gives the turn
	gone  bool          // guarded by mu of turns; it waits no more
}

func newTurns(n int) *turns {
	return &turns{free: n, known: [2]map[netip.Prefix]standing{{}, {}}}
}

// take waits for a turn until a time, or until ctx ends.
func (t *turns) take(ctx context.Context, who netip.Prefix, until time.Time) error {
	w := t.queue(who)
	if w == nil {
		return nil
	}
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	err := os.ErrDeadlineExceeded
	select {
	case <-w.ready:
		return nil
	case <-timer.C:
	case <-ctx.Done():
		err = ctx.Err()
	}
	return t.leave(w, err)
}

// queue gives nil when there is a turn at once.
func (t *turns) queue(who netip.Prefix) *waiter {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.free > 0 {
		t.free--
		return nil
	}
	w := &waiter{ready: make(chan struct{})}
	s := t.standing(who)
	t.waiting[s] = append(t.waiting[s], w)
	return w
}

// leave gives err, but for a turn that came at the last moment.
func (t *turns) leave(w *waiter, err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-w.ready:
		return nil
	default:
		w.gone = true
		return err
	}
}

// give gives a turn back.
func (t *turns) give() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.given++
	if w := t.next(); w != nil {
		close(w.ready)
		return
	}
	t.free++
}

// next takes out whose turn it is; nil: nobody waits. mu is held.
func (t *turns) next() *waiter {
	order := [standings]standing{welcome, unknown, refused}
	switch {
	case t.given%turnsOfRefused == 0:
		order = [standings]standing{refused, unknown, welcome}
	case t.given%turnsOfUnknown == 0:
		order = [standings]standing{unknown, welcome, refused}
	}
	for _, s := range order {
		for len(t.waiting[s]) > 0 {
			w := t.waiting[s][0]
			t.waiting[s][0] = nil
			t.waiting[s] = t.waiting[s][1:]
			if !w.gone {
				return w
			}
		}
	}
	return nil
}

// remember says what a handshake came to.
func (t *turns) remember(who netip.Prefix, as standing, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.since) > rememberFor || len(t.known[0]) >= rememberMost {
		t.known, t.since = [2]map[netip.Prefix]standing{{}, t.known[0]}, now
	}
	t.known[0][who] = as
}

// standingOf a neighbourhood, as of now.
func (t *turns) standingOf(who netip.Prefix) standing {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.standing(who)
}

// standing of a neighbourhood. mu is held.
func (t *turns) standing(who netip.Prefix) standing {
	for _, time := range t.known {
		if s, ok := time[who]; ok {
			return s
		}
	}
	return unknown
}

// turn is that of a session, while it has one.
type turn struct {
	s    *session
	held bool
}

// take waits no longer than a handshake may take.
func (t *turn) take() error {
	err := t.s.p.turns.take(t.s.ctx, t.s.neighbourhood(), t.s.accepted.Add(t.s.p.cfg.HandshakeTimeout))
	t.held = err == nil
	return err
}

func (t *turn) give() {
	if t.held {
		t.held = false
		t.s.p.turns.give()
	}
}
