package agent

import (
	"errors"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"
)

// clientOf is who a grant lets in to what: those with this in common may be in each other's way.
type clientOf struct {
	service string
	client  netip.Addr
}

func (h *held) clients() (all []clientOf) {
	for _, a := range h.payload.Addresses {
		all = append(all, clientOf{h.payload.Service, a})
	}
	return all
}

// take makes a grant active. g.mu is held.
func (g *grants) take(h *held) {
	g.active[h.row.ID] = h
	g.probing.take(h)
	for _, c := range h.clients() {
		if !slices.Contains(g.serving[c], h) {
			g.serving[c] = append(g.serving[c], h)
		}
	}
}

// drop makes it active no more. g.mu is held.
func (g *grants) drop(h *held) {
	delete(g.active, h.row.ID)
	g.probing.drop(h)
	for _, c := range h.clients() {
		others := slices.DeleteFunc(g.serving[c], func(o *held) bool { return o == h })
		if g.serving[c] = others; len(others) == 0 {
			delete(g.serving, c)
		}
	}
}

// holds tells whether a grant is active still. g.mu is held.
func (g *grants) holds(h *held) bool { return g.active[h.row.ID] == h }

// every gives the grants that are active now. Those who look at all of them do it in turns, and ask holds.
func (g *grants) every() []*held {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Values(g.active))
}

const (
	// turn is how long one who has thousands to look at holds a lock at a time: others wait for that and for one look.
	turn = 200 * time.Microsecond
	// mostErrors bounds what one who looks at thousands has to say of what went wrong with each.
	mostErrors = 16
)

// inTurns visits all with the lock held, and lets others have it in between.
func inTurns[T any](lock sync.Locker, all []T, visit func(T) error) error {
	var errs []error
	for i := 0; i < len(all); {
		lock.Lock()
		for began := time.Now(); i < len(all) && time.Since(began) < turn; i++ {
			if err := visit(all[i]); err != nil && len(errs) < mostErrors {
				errs = append(errs, err)
			}
		}
		lock.Unlock()
		runtime.Gosched() // who waits is only woken by Unlock, and would find the lock taken again
	}
	return errors.Join(errs...)
}
