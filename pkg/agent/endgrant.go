package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
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
	closed := g.closeMany(all)
	recorded := g.recordOver(ctx, heldOf(all))
	if closed != nil {
		return closed // the next tick tells of the rest
	}
	return recorded
}

func heldOf(all []doomed) []*held {
	over := make([]*held, len(all))
	for i, d := range all {
		over[i] = d.held
	}
	return over
}

// closeMany is what endMany does in the kernel. It waits for no disk.
func (g *grants) closeMany(all []doomed) error {
	allPaths := sync.OnceValues(g.allPaths)
	return inTurns(&g.mu, all, func(d doomed) error {
		if !g.holds(d.held) || d.over != nil {
			return nil
		}
		paths, err := g.pathsOf(d.held, allPaths)
		if err != nil {
			return err
		}
		return g.closePaths(d.held, d.ending, paths)
	})
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
	e := ending{}.revoked(actor, why)
	e.step = step
	if err := g.closeAll(e); err != nil {
		return err
	}
	return g.endMany(ctx, g.doomAll(e))
}

// closeAll is what endAll does in the kernel. It waits for nobody, and nothing opens until endAll has gone on.
func (g *grants) closeAll(e ending) error {
	g.shutFor.Store(&e) // before: a sweep may find the paths closed at once
	_, err := g.datapath.Shut()
	return err
}

// doomAll gives the end of every grant that closeAll has closed, and lets others open.
func (g *grants) doomAll(e ending) []doomed {
	g.mu.Lock()
	defer g.mu.Unlock()
	over := g.doomActive(e)
	g.shutFor.Store(nil)
	if g.panicked.Load() == nil { // one that comes now shuts again, once it has the lock
		g.datapath.Reopen()
	}
	return over
}

// doomActive gives every active grant the same end, now that its paths are closed. The first stands. g.mu is held.
func (g *grants) doomActive(e ending) (over []doomed) {
	for id, h := range g.active {
		if h.fate == nil {
			h.fate = &e
		}
		mine := *h.fate
		mine.grant = id
		over = append(over, doomed{h, mine})
	}
	return over
}

// causeOf is why a grant ends. Where every path was closed at once, nobody has closed this one. g.mu is held.
func (g *grants) causeOf(h *held, e ending) ending {
	all := h.fate
	if p := g.panicked.Load(); all == nil && p != nil {
		byPanic := p.ending()
		all = &byPanic
	}
	if all == nil {
		all = g.shutFor.Load()
	}
	if e.actor != actorKernel || all == nil {
		return e
	}
	cause := *all
	cause.grant = h.row.ID
	return cause
}

// checkedAtOnce is how many grants are held against changed resources before those of them that may not go on are closed.
const checkedAtOnce = 256

// recheck ends the grants that the resources now in force would refuse: it closes them as it finds them, and waits for the disk
// when all are closed. What is activated meanwhile was held against them. The error says what could not be looked at or
// closed, or else recorded (errNotRecorded: a tick does it); only what the resources refuse is a reason to end a grant.
func (g *grants) recheck(ctx context.Context, e *enforced) error {
	known := policy.KnownKeys(e.set.Keyrings())
	var over []doomed
	var wrong error // the first: the others are mostly the same
	for some := range slices.Chunk(g.every(), checkedAtOnce) {
		refused, err := g.recheckSome(some, known, e)
		over = append(over, refused...)
		if err = errors.Join(err, g.closeMany(refused)); wrong == nil {
			wrong = err
		}
	}
	recorded := g.recordOver(ctx, heldOf(over))
	if wrong != nil {
		return wrong
	}
	return recorded
}

// recheckSome gives those that the resources refuse. Where the node's addresses cannot be read, the rest is held against them all the same.
func (g *grants) recheckSome(some []*held, known map[string]policy.KnownKey, e *enforced) (over []doomed, err error) {
	var clients []netip.Addr
	for _, h := range some {
		clients = append(clients, h.payload.Addresses...)
	}
	own, err := g.own(clients)
	under := make(map[*held]string, len(some))
	for _, h := range some {
		v, uncounted := h.recount(known)
		by, why := g.outdated(h, v, uncounted, own, e)
		if why != "" {
			over = append(over, doomed{h, ending{grant: h.row.ID}.revoked("agent", why)})
			continue
		}
		under[h] = by
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for h, by := range under {
		h.policy = by
	}
	return over, err
}

// outdated tells why a grant may not go on under the resources: they refuse it, or its service is another instance now. Else
// it gives the policy that allows it. v is what its signers say by their keyrings, or uncounted why none of these counts. What it
// reads of the grant does not change while it is active.
func (g *grants) outdated(h *held, v grant.Verified, uncounted error, own []netip.Addr, e *enforced) (under, why string) {
	service, ok := e.service(h.payload.Service)
	if h.isProbe() {
		return "", h.unlisted(e.set, service)
	}
	if !ok || !sameInstance(service, h.service) {
		return "", fmt.Sprintf("service %s is not what it was", h.payload.Service)
	}
	var may policy.Allowance
	err := uncounted
	if err == nil {
		may, err = e.set.CheckGrant(v.Facts(own, g.clock.wall()))
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
	h.endBy(g.causeOf(h, e))
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
	for _, slot := range h.row.Slots { // from now on who needs one may have it
		g.ended[slot] = g.clock.boot()
	}
	g.reviews.note(h.row, h.payload, false)
	g.events.count(h.over.step)
	g.log.Info("grant ended", "grant", h.row.ID, "state", h.over.state, "why", h.over.why, "actor", h.over.actor)
	g.kick()
}
