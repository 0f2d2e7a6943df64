package proxy

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"
)

// turns bound how many handshakes compute at a time, and say whose is next. A handshake costs much more than what asks for it: without
// an order, who comes in earnest waits behind all who do not. Who waits for the network has no turn.
type turns struct {
	mu       sync.Mutex
	free     int                      // guarded by mu
	given    uint                     // guarded by mu; ever
	waiting  [standings]line          // guarded by mu
	known    [2]map[netip.Prefix]last // guarded by mu; of this time and of the one before, by neighbourhood
	since    time.Time                // guarded by mu; the time began
	refusals int                      // guarded by mu; of those known of this time
}

// standing is what the last handshake from a neighbourhood came to.
type standing int

const (
	welcome   standing = iota // it was let in
	unknown                   // there was none, or it is long ago
	refused                   // it was not let in
	standings = iota
)

// last is what the last handshake from a neighbourhood came to, and whom it let in.
type last struct {
	as     standing
	caller string
}

// Every so many turns the first one goes to somebody who is unknown, or who was refused: nobody waits for ever.
const (
	turnsOfUnknown = 4
	turnsOfRefused = 16
)

// Bounds of what is remembered of neighbourhoods.
const (
	rememberFor  = time.Minute
	rememberMost = 1 << 15
	refusedMost  = rememberMost / 2 // to be refused costs little: those who were do not push out who was let in
)

// errNoTurn is not the client's fault.
var errNoTurn = fmt.Errorf("too many handshakes at a time: %w", os.ErrDeadlineExceeded)

type waiter struct {
	ready chan struct{} // closed by whoever gives the turn
	gone  bool          // guarded by mu of turns; it waits no more
}

func newTurns(n int) *turns {
	t := &turns{free: n, known: [2]map[netip.Prefix]last{{}, {}}}
	for i := range t.waiting {
		t.waiting[i].of = map[string][]*waiter{}
	}
	return t
}

// take waits for a turn until a time, or until ctx ends.
func (t *turns) take(ctx context.Context, who netip.Prefix, until time.Time) error {
	w := t.queue(who)
	if w == nil {
		return nil
	}
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	err := errNoTurn
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
	l := t.last(who)
	whose := l.caller
	if whose == "" {
		whose = who.String()
	}
	t.waiting[l.as].push(whose, w)
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
		for w := t.waiting[s].pop(); w != nil; w = t.waiting[s].pop() {
			if !w.gone {
				return w
			}
		}
	}
	return nil
}

// line is who waits with the same standing. Callers take turns, and neighbourhoods that are no caller's: a thousand handshakes of one
// hold up one of another no longer than one would.
type line struct {
	order []string // whose turn it is next
	of    map[string][]*waiter
}

func (l *line) push(whose string, w *waiter) {
	if len(l.of[whose]) == 0 {
		l.order = append(l.order, whose)
	}
	l.of[whose] = append(l.of[whose], w)
}

// pop gives nil when nobody is left.
func (l *line) pop() *waiter {
	if len(l.order) == 0 {
		return nil
	}
	whose := l.order[0]
	l.order = l.order[1:]
	w := l.of[whose][0]
	if rest := l.of[whose][1:]; len(rest) > 0 {
		l.of[whose], l.order = rest, append(l.order, whose)
	} else {
		delete(l.of, whose)
	}
	return w
}

// remember says what a handshake came to; caller is whom it let in, if it did.
func (t *turns) remember(who netip.Prefix, as standing, caller string, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.since) > rememberFor || len(t.known[0]) >= rememberMost {
		t.known, t.since, t.refusals = [2]map[netip.Prefix]last{{}, t.known[0]}, now, 0
	}
	if as == refused && t.refusals >= refusedMost && t.last(who).as != welcome {
		return
	}
	if t.known[0][who].as == refused {
		t.refusals--
	}
	if as == refused {
		t.refusals++
	}
	t.known[0][who] = last{as, caller}
}

// standing of a neighbourhood, as of now.
func (t *turns) standing(who netip.Prefix) standing {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last(who).as
}

// last of a neighbourhood. mu is held.
func (t *turns) last(who netip.Prefix) last {
	for _, known := range t.known {
		if l, ok := known[who]; ok {
			return l
		}
	}
	return last{as: unknown}
}

// turn is that of a session, while it has one.
type turn struct {
	s    *session
	held bool
}

// take waits no longer than a handshake may take.
func (t *turn) take() error {
	err := t.s.p.turns.take(t.s.ctx, t.s.neighbourhood(), t.s.proveBy)
	t.held = err == nil
	return err
}

func (t *turn) give() {
	if t.held {
		t.held = false
		t.s.p.turns.give()
	}
}
