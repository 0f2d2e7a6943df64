package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// errNotRecorded says that a path is closed, but that the record of it is still to be written.
var errNotRecorded = errors.New("the path is closed, its record is not written yet")

// Revoke ends an active grant. When it returns without error its paths are closed, and that is durable. The error wraps
// ErrNoGrant if there is nothing to end.
func (g *grants) Revoke(ctx context.Context, id, why, actor string) (store.GrantRow, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	h, ok := g.active[id]
	if !ok {
		return store.GrantRow{}, fmt.Errorf("revoke %q: %w", id, ErrNoGrant)
	}
	err := g.end(ctx, h, ending{grant: id}.revoked(actor, why))
	row := h.row
	var encoded error
	row.Payload, encoded = json.Marshal(h.payload)
	return row, errors.Join(err, encoded)
}

// endAll ends every active grant: nothing that was granted before counts from now on.
func (g *grants) endAll(ctx context.Context, step, why, actor string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for id, h := range g.active {
		e := ending{grant: id}.revoked(actor, why)
		e.step = step
		errs = append(errs, g.end(ctx, h, e))
	}
	return errors.Join(errs...)
}

// recheck ends the grants that the resources now in force would refuse.
func (g *grants) recheck(ctx context.Context, e *enforced) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	envelopes, err := g.envelopes(ctx) // what cannot be read again is refused
	errs := []error{err}
	for id, h := range g.active {
		if why := g.outdated(h, envelopes[id], e); why != "" {
			errs = append(errs, g.end(ctx, h, ending{grant: id}.revoked("agent", why)))
		}
	}
	return errors.Join(errs...)
}

// envelopes are the active grants as they were handed in, by their ids.
func (g *grants) envelopes(ctx context.Context) (map[string][]byte, error) {
	rows, err := g.store.ActiveGrants(ctx)
	if err != nil {
		return nil, fmt.Errorf("read grants: %w", err)
	}
	all := make(map[string][]byte, len(rows))
	for _, row := range rows {
		all[row.ID] = row.Envelope
	}
	return all, nil
}

// outdated tells why a grant may not go on under the resources: they refuse it, or its service is another instance now.
func (g *grants) outdated(h *held, envelope []byte, e *enforced) string {
	service, ok := e.service(h.payload.Service)
	if !ok || !sameInstance(service, h.service) {
		return fmt.Sprintf("service %s is not what it was", h.payload.Service)
	}
	v, err := h.verify(envelope, e.set.Keyrings(), h.row)
	var may policy.Allowance
	if err == nil {
		may, err = g.allowed(v, e, g.clock.wall())
		h.policy = may.Policy
	}
	if err == nil && !may.Until.IsZero() && may.Until.Before(h.row.Deadline) {
		err = fmt.Errorf("policy %q ends it sooner, at %s", may.Policy, may.Until.Format(time.RFC3339))
	}
	if err != nil {
		return "resources changed: " + oneLine(err.Error())
	}
	return ""
}

// sameInstance tells whether a path to one row is a path to the other: a new port does not matter, for a path names its own, nor
// does another mode.
func sameInstance(a, b datapath.Service) bool {
	a.Ports, b.Ports = nil, nil
	a.Mode, b.Mode = datapath.Enforce, datapath.Enforce
	return sameService(a, b)
}

// end closes a grant's paths and then records it: in the reverse order of activation. g.mu is held.
func (g *grants) end(ctx context.Context, h *held, e ending) error {
	paths, err := g.pathsOf(h)
	if err != nil {
		return fmt.Errorf("read paths: %w", err)
	}
	return g.endIn(ctx, h, e, paths)
}

// pathsOf reads the paths of a grant: in the slots that it has, as far as these are known.
func (g *grants) pathsOf(h *held) (paths []datapath.PathStatus, err error) {
	if len(h.row.Slots) < len(h.payload.Addresses) || len(h.row.Slots) == 0 {
		return g.datapath.Paths() // activation was cut off
	}
	for _, slot := range h.row.Slots {
		p, err := g.datapath.Path(slot)
		if err != nil {
			return nil, err
		}
		paths = append(paths, p)
	}
	return paths, nil
}

// endIn is end with the paths at hand. A grant whose record could not be written stays, closed, until a tick records it.
func (g *grants) endIn(ctx context.Context, h *held, e ending, paths []datapath.PathStatus) error {
	var ended []datapath.PathStatus // with their last counters
	for _, p := range paths {
		if p.Grant != h.row.ID || p.State == datapath.PathFree {
			continue
		}
		state := p.State // what ended already keeps its cause
		if isOpen(p) {
			state = e.path
		}
		if err := g.datapath.EndPath(p.Slot, state); err != nil {
			return fmt.Errorf("end path in slot %d: %w", p.Slot, err)
		}
		last, err := g.datapath.Path(p.Slot)
		if err != nil {
			return err
		}
		ended = append(ended, last)
	}
	g.lookAt(h, ended, g.clock.boot())
	h.endBy(e)
	return g.recordEnd(ctx, h)
}

// endBy notes that a grant is over in the kernel, and lets its holder know. The first cause stands.
func (h *held) endBy(e ending) {
	if h.over != nil {
		return
	}
	h.over = &e
	if h.holding != nil {
		close(h.holding.ended)
	}
}

// recordEnd makes the end durable and lets go of the grant. The first cause stands.
func (g *grants) recordEnd(ctx context.Context, h *held) error {
	return g.recordEnds(ctx, []*held{h})
}

// recordEnds is recordEnd for several grants in one durable transaction.
func (g *grants) recordEnds(ctx context.Context, batch []*held) error {
	ends := make([]store.End, len(batch))
	for i, h := range batch {
		event, err := g.endEvent(h, *h.over)
		if err != nil {
			return err
		}
		note, err := h.use.note(h.row.ID)
		if err != nil {
			return err
		}
		ends[i] = store.End{ID: h.row.ID, State: h.over.state, Why: h.over.why, Event: event, Note: note}
	}
	if err := g.store.EndGrants(ctx, ends); err != nil {
		return fmt.Errorf("%w: %w", errNotRecorded, err)
	}
	for _, h := range batch {
		g.letGo(h)
	}
	return nil
}

// letGo forgets an active grant whose end is recorded.
func (g *grants) letGo(h *held) {
	h.row.State, h.row.EndedWhy = h.over.state, h.over.why
	delete(g.active, h.row.ID)
	g.reviews.note(h.row, h.payload, false)
	g.events.count(h.over.step)
	g.log.Info("grant ended", "grant", h.row.ID, "state", h.over.state, "why", h.over.why, "actor", h.over.actor)
	g.kick()
}
