package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
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

// endBatch is how many records of ends, warnings or uses go into one durable transaction: others want to write in between.
const endBatch = 16

// doomed is an active grant with the end that it comes to.
type doomed struct {
	*held
	ending
}

// endMany ends grants: first each in the kernel, then it records the ends, several in one durable transaction. Whoever
// activates waits for a turn of it at most. Those that are over already are recorded with the rest. An error of store.Unwritable
// says that all are closed.
func (g *grants) endMany(ctx context.Context, all []doomed) error {
	over := make([]*held, len(all))
	for i, d := range all {
		over[i] = d.held
	}
	allPaths := sync.OnceValues(g.allPaths)
	closed := inTurns(&g.mu, all, func(d doomed) error {
		if !g.holds(d.held) || d.over != nil {
			return nil
		}
		paths, err := g.pathsOf(d.held, allPaths)
		if err != nil {
			return err
		}
		return g.closePaths(d.held, d.ending, paths)
	})
	recorded := g.recordOver(ctx, over)
	if closed != nil {
		return closed // the next tick tells of the rest
	}
	return recorded
}

// recordOver records the ends of those that are over in the kernel, and only there.
func (g *grants) recordOver(ctx context.Context, all []*held) error {
	var over []*held
	_ = inTurns(&g.mu, all, func(h *held) error {
		if g.holds(h) && h.over != nil {
			over = append(over, h)
		}
		return nil
	})
	for batch := range slices.Chunk(over, endBatch) {
		if err := g.recordSome(ctx, batch); err != nil {
			return err // the next tick goes on
		}
	}
	return nil
}

func (g *grants) recordSome(ctx context.Context, batch []*held) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.recordEnds(ctx, slices.DeleteFunc(batch, func(h *held) bool { return !g.holds(h) }))
}

// endAll ends every active grant: nothing that was granted before counts from now on. The kernel holds none when others may
// activate again; an activation that is under way is refused.
func (g *grants) endAll(ctx context.Context, step, why, actor string) error {
	if err := g.closeAll(); err != nil {
		return err
	}
	var over []doomed
	g.mu.Lock()
	for id, h := range g.active {
		e := ending{grant: id}.revoked(actor, why)
		e.step = step
		over = append(over, doomed{h, e})
	}
	if g.panicked.Load() == nil { // one that comes now shuts again, once it has the lock
		g.datapath.Reopen()
	}
	g.mu.Unlock()
	return g.endMany(ctx, over)
}

// closeAll is what endAll does in the kernel. It waits for nobody, and nothing opens until endAll has gone on.
func (g *grants) closeAll() error {
	_, err := g.datapath.Shut()
	return err
}

// recheck ends the grants that the resources now in force would refuse. What is activated meanwhile was held against them.
func (g *grants) recheck(ctx context.Context, e *enforced) error {
	var over []doomed
	for _, h := range g.every() {
		under, why := g.outdated(h, g.envelope(ctx, h), e)
		if why != "" {
			over = append(over, doomed{h, ending{grant: h.row.ID}.revoked("agent", why)})
			continue
		}
		g.mu.Lock()
		h.policy = under
		g.mu.Unlock()
	}
	return g.endMany(ctx, over)
}

// envelope is a grant of people as it was handed in. One that cannot be read again is refused.
func (g *grants) envelope(ctx context.Context, h *held) []byte {
	if policy.IsWorkload(h.payload.Requester) {
		return nil // there is none
	}
	row, err := g.store.Grant(ctx, h.row.ID)
	if err != nil && !errors.Is(err, store.ErrNoGrant) {
		g.log.Error("grant cannot be read again", "grant", h.row.ID, "error", err)
	}
	return row.Envelope
}

// outdated tells why a grant may not go on under the resources: they refuse it, or its service is another instance now. Else
// it gives the policy that allows it. What it reads of the grant does not change while it is active.
func (g *grants) outdated(h *held, envelope []byte, e *enforced) (under, why string) {
	service, ok := e.service(h.payload.Service)
	if !ok || !sameInstance(service, h.service) {
		return "", fmt.Sprintf("service %s is not what it was", h.payload.Service)
	}
	v, err := h.verify(envelope, e.set.Keyrings())
	var may policy.Allowance
	if err == nil {
		may, err = g.allowed(v, e, g.clock.wall())
	}
	if err == nil && !may.Until.IsZero() && may.Until.Before(h.row.Deadline) {
		err = fmt.Errorf("policy %q ends it sooner, at %s", may.Policy, may.Until.Format(time.RFC3339))
	}
	if err != nil {
		return "", "resources changed: " + oneLine(err.Error())
	}
	return may.Policy, ""
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
	paths, err := g.pathsOf(h, g.allPaths)
	if err != nil {
		return err
	}
	if err := g.closePaths(h, e, paths); err != nil {
		return err
	}
	return g.recordEnds(ctx, []*held{h})
}

// pathsOf reads the paths of a grant: in the slots that it has, or among all where it does not have these, because its
// activation was cut off or its record is from elsewhere.
func (g *grants) pathsOf(h *held, all func() (map[string][]datapath.PathStatus, error)) (paths []datapath.PathStatus, err error) {
	for _, slot := range h.row.Slots {
		p, err := g.datapath.Path(slot)
		if err != nil {
			return nil, fmt.Errorf("read paths: %w", err)
		}
		if p.Grant == h.row.ID {
			paths = append(paths, p)
		}
	}
	if len(paths) > 0 && len(paths) >= len(h.payload.Addresses) {
		return paths, nil
	}
	carried, err := all()
	return carried[h.row.ID], err
}

// allPaths reads all paths, by their grants.
func (g *grants) allPaths() (map[string][]datapath.PathStatus, error) {
	paths, err := g.datapath.Paths()
	if err != nil {
		return nil, fmt.Errorf("read paths: %w", err)
	}
	return byGrant(paths), nil
}

// closePaths is what end does in the kernel. A grant whose record could not be written stays, closed, until a tick records it.
// g.mu is held.
func (g *grants) closePaths(h *held, e ending, paths []datapath.PathStatus) error {
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
	return nil
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

// recordEnds makes ends durable in one transaction, and lets go of the grants. The first cause stands. g.mu is held.
func (g *grants) recordEnds(ctx context.Context, batch []*held) error {
	if len(batch) == 0 {
		return nil
	}
	ends := make([]store.End, len(batch))
	for i, h := range batch {
		h.end(g.clock.wall())
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
	g.drop(h)
	g.reviews.note(h.row, h.payload, false)
	g.events.count(h.over.step)
	g.log.Info("grant ended", "grant", h.row.ID, "state", h.over.state, "why", h.over.why, "actor", h.over.actor)
	g.kick()
}
