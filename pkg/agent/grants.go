package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/signal"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// keepEnded is how long an ended path stays in the kernel for people to look at, unless its slot is needed.
const keepEnded = time.Minute

// What callers of grants may match.
var (
	// ErrNoGrant says that no active grant has the id.
	ErrNoGrant = errors.New("no active grant")
	// ErrOverlap says that another grant already has a path for the same client and service.
	ErrOverlap = errors.New("another grant serves this client")
	// ErrReviewOpen says that somebody has a part in a break-glass grant that nobody has reviewed.
	ErrReviewOpen = errors.New("review is open")
	// ErrNoService says that no protected service has the name.
	ErrNoService = errors.New("no such protected service")
	// ErrNoResources says that there is no verified set of resources to decide by.
	ErrNoResources = errors.New("no verified resources")
)

// held is an active grant.
type held struct {
	row     store.GrantRow // without what was handed in, once it is in the store: there may be many
	payload grant.Payload
	service datapath.Service // as it was when the path was opened
	policy  string           // that allows it
	use     use              // of its paths
	warned  []warning        // that were given
	limits  limits           // that signals left
	over    *ending          // set once it is over in the kernel; then only its record is missing
	fate    *ending          // of all that were active when every path was closed at once; guarded by grants.mu
	holding *holding         // of a workload's grant; nil: of people's
}

// forget lets go of what the store can tell again.
func (h *held) forget() { h.row.Envelope, h.row.Payload = nil, nil }

func (h *held) live() live {
	return live{grant: h.row.ID, clients: h.payload.Addresses, deadline: h.row.DeadlineBoot, budget: budgetOf(h.payload),
		ingress: ingressOf(h.payload), port: h.payload.ClientPort, cgroup: h.payload.Cgroup}
}

// ingressOf is the kind of device that its clients come by.
func ingressOf(p grant.Payload) datapath.Ingress {
	switch p.Ingress {
	case policy.IngressUplink:
		return datapath.IngressUplink
	case policy.IngressPod:
		return datapath.IngressPod
	case policy.IngressLocal:
		return datapath.IngressLocal
	}
	return datapath.IngressAny
}

// budgetOf is what each path of a grant may carry.
func budgetOf(p grant.Payload) datapath.Budget {
	b := p.Budget
	return datapath.Budget{Bytes: uint64(b.Bytes), Packets: b.Packets, Connections: b.Connections, ConnectionsPerSecond: b.ConnectionsPerSecond}
}

// grants opens paths for grants and ends them. An active row in the store comes before a path in the kernel, and goes
// after it. Safe for concurrent use.
type grants struct {
	node       string
	bootID     string
	owner      store.Owner // that the store was claimed for
	store      *store.Store
	datapath   *datapath.Datapath
	enforced   func() *enforced
	own        func([]netip.Addr) ([]netip.Addr, error) // the node's own addresses
	clock      clock
	challenges *challenges
	reviews    *reviews
	problems   *problems
	events     *eventCounter
	log        *slog.Logger
	recorded   func() // there is something new for the sender of records
	kick       func() // and a grant has ended

	mu      sync.Mutex
	active  map[string]*held         // guarded by mu
	serving map[clientOf][]*held     // guarded by mu; the active ones by whom they let in
	ended   map[uint32]time.Duration // guarded by mu; slot of an ended path -> boot time since which it is known

	probing probing // the active ones of kubelet's probes

	parting func(datapath.PathStatus) // a path leaves its slot; nil: nobody wants to know

	leavers leavers

	signals  map[string]signal.Signal // guarded by mu; that were given, by the names of their notes; made by adopt
	urged    []urgedSignal            // guarded by mu; the latest
	saidFile string                   // where the proxy reads what was said about callers; empty: nobody does
	history  *history                 // guarded by mu

	appliedSince time.Time // guarded by mu; since when it is known which grants of the cluster were used; zero: of none

	refused  map[refusedWhat]*refused // guarded by mu
	ports    *portUse                 // what the records of flows tell
	usesKept time.Duration            // owned by the sweeper; CLOCK_BOOTTIME at which the uses were made durable
	forgot   time.Duration            // owned by the sweeper; CLOCK_BOOTTIME at which all was forgotten that could be

	panicked  atomic.Pointer[panicNote] // that stands; read without a lock, so that nothing waits to tell of it
	panicKept *panicNote                // guarded by mu; the one that the store has
	panicMark panicMark
	shutFor   atomic.Pointer[ending] // why every path was closed at once, but for a panic; until each grant has its fate
}

// adopt takes over what an earlier agent of this boot left, and ends the rest: rows of another boot, rows without their
// paths, and paths without their row. It must come before the lease is renewed. An end that the disk does not take keeps
// nobody from going on: its paths are closed, and a tick records it.
func (g *grants) adopt(ctx context.Context) error {
	if err := g.adoptRows(ctx); err != nil {
		return err
	}
	_, late, err := g.reconcile(ctx)
	g.problems.report(problemGrants, "", late)
	return err
}

func (g *grants) adoptRows(ctx context.Context) error {
	over, err := g.recall(ctx)
	if err == nil {
		err = g.endMany(ctx, over)
		if store.Unwritable(err) {
			err = nil // a tick records it
		}
	}
	if err == nil {
		err = g.adoptReviews(ctx)
	}
	if err != nil {
		return fmt.Errorf("adopt grants: %w", err)
	}
	return nil
}

// recall takes up the active rows, and gives those that may not go on.
func (g *grants) recall(ctx context.Context) (over []doomed, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.recallPanic(ctx); err != nil {
		return nil, err
	}
	rows, err := g.store.Grants(ctx)
	if err != nil {
		return nil, err
	}
	if err := g.recallSignals(ctx, rows); err != nil {
		return nil, err
	}
	uses, err := g.uses(ctx)
	if err != nil {
		return nil, err
	}
	left, err := g.left(ctx)
	if err != nil {
		return nil, err
	}
	against, err := g.final(ctx)
	if err != nil {
		return nil, err
	}
	for _, row := range rows {
		if row.State != store.StateActive {
			continue
		}
		h, why := g.revive(row)
		if s, ok := against[row.Digest]; ok {
			why = s.String()
		}
		g.recallUse(h, uses)
		h.recallLimits(left)
		g.take(h)
		if why != "" {
			over = append(over, doomed{h, ending{grant: row.ID, actor: "agent"}.as(stateEnded, stepRevoked, datapath.PathRevoked, why)})
		}
	}
	return append(over, g.doomedByPanic()...), nil
}

// adoptReviews goes on with the alarms of an earlier agent.
func (g *grants) adoptReviews(ctx context.Context) error {
	rows, err := g.store.Grants(ctx)
	if err != nil {
		return err
	}
	reviewed, err := g.reviewed(ctx)
	if err != nil {
		return err
	}
	for _, row := range rows {
		if _, done := reviewed[row.Digest]; done {
			continue
		}
		var p grant.Payload
		_ = json.Unmarshal(row.Payload, &p) // one that cannot be read is told of without its content
		g.reviews.note(row, p, row.State == store.StateActive)
	}
	return nil
}

// revive reads an active row; why says what forbids going on with it.
func (g *grants) revive(row store.GrantRow) (h *held, why string) {
	h = &held{row: row}
	if row.BootID != g.bootID {
		return h, "reboot"
	}
	if why := restored(g.store.Memory()); why != "" {
		return h, why
	}
	if err := json.Unmarshal(row.Payload, &h.payload); err != nil {
		return h, "its record cannot be read: " + err.Error()
	}
	if why := g.reclaim(h); why != "" {
		return h, why
	}
	then, now := row.Deadline.Add(-row.DeadlineBoot), g.clock.origin()
	if jumped(then, now, g.clock.wall().Sub(row.Activated)) {
		return h, fmt.Sprintf("the wall clock moved by %s against boot time", now.Sub(then).Round(time.Second))
	}
	e := g.enforced()
	if e == nil {
		h.forget()
		return h, ""
	}
	h.service, _ = e.service(h.payload.Service)
	own, err := g.own(h.payload.Addresses)
	if err != nil {
		return h, "it cannot be held against the resources: " + oneLine(err.Error())
	}
	v, err := h.verify(row.Envelope, e.set.Keyrings())
	h.policy, why = g.outdated(h, v, err, own, e)
	h.forget()
	return h, why
}

// tick makes grants and kernel agree, and tells when to look again at the latest.
func (g *grants) tick(ctx context.Context) (next time.Duration, err error) {
	g.reviews.remind()
	g.mu.Lock()
	err = g.keepPanic(ctx)
	g.mu.Unlock()
	err = errors.Join(err, g.recordOver(ctx, g.every()), g.endLost(ctx))
	next, late, wrong := g.reconcile(ctx)
	if err = errors.Join(err, late, wrong); err != nil {
		next = time.Second
	}
	return next, err
}

// reconcile carries out planPaths, oversees what is active, and tells when the next grant ends, or a second. Whoever
// activates does not wait while thousands of paths are looked at: what has changed since is left to the next time. late is
// what was done, but the disk did not take the record of it.
func (g *grants) reconcile(ctx context.Context) (next time.Duration, late, err error) {
	all := g.every() // before the paths: each of these has its own by now
	carried, err := g.allPaths()
	if err != nil {
		return time.Second, nil, err
	}
	now := g.clock.boot()
	plan := planPaths(lives(all), carried, now)
	orphans := inTurns(&g.mu, plan.orphans, g.endOrphan)
	ended := g.endMany(ctx, g.doom(all, plan.end))
	next, wrong := g.oversee(ctx, all, carried, now)
	errs := []error{orphans, ended, wrong, g.free(plan.idle, now)}
	if i := slices.IndexFunc(errs, store.Unwritable); i >= 0 { // the next tick finds the others
		late = errs[i]
		errs = slices.DeleteFunc(errs, store.Unwritable)
	}
	return next, late, errors.Join(errs...)
}

// lives is what the agent believes of grants. What it reads of them does not change while they are active.
func lives(all []*held) []live {
	out := make([]live, 0, len(all))
	for _, h := range all {
		out = append(out, h.live())
	}
	return out
}

// doom finds the grants that end.
func (g *grants) doom(all []*held, ends []ending) (over []doomed) {
	by := make(map[string]ending, len(ends))
	for _, e := range ends {
		by[e.grant] = e
	}
	for _, h := range all {
		if e, ok := by[h.row.ID]; ok {
			over = append(over, doomed{h, e})
		}
	}
	return over
}

// endOrphan closes a path that no record explains. Somebody wrote the map, or the store was replaced. g.mu is held.
func (g *grants) endOrphan(p datapath.PathStatus) error {
	if g.active[p.Grant] != nil {
		return nil // it came since
	}
	if at, err := g.datapath.Path(p.Slot); err == nil && (at.Grant != p.Grant || !isOpen(at)) {
		return nil // it has ended since
	}
	g.log.Error("path without a recorded grant", "slot", p.Slot, "grant", p.Grant, "client", p.Client)
	if err := g.datapath.EndPath(p.Slot, datapath.PathRevoked); err != nil {
		return fmt.Errorf("end path in slot %d, which has no grant: %w", p.Slot, err)
	}
	return nil
}

// free gives back the slots of ended grants once people had time to look.
func (g *grants) free(idle []uint32, now time.Duration) error {
	is := make(map[uint32]bool, len(idle))
	for _, slot := range idle {
		is[slot] = true
	}
	g.mu.Lock()
	maps.DeleteFunc(g.ended, func(slot uint32, _ time.Duration) bool { return !is[slot] })
	g.mu.Unlock()
	return inTurns(&g.mu, idle, func(slot uint32) error {
		since, known := g.ended[slot]
		switch {
		case !known:
			over, err := g.isOver(slot)
			if over {
				g.ended[slot] = now
			}
			return err
		case now-since >= keepEnded:
			_, err := g.freeSlot(slot)
			return err
		}
		return nil
	})
}

// freeSlots is how many paths can be opened: an ended path gives its slot back to who needs it.
func (g *grants) freeSlots() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.datapath.FreePaths() + len(g.ended)
}

// isOver tells whether the slot has the path of a grant that has ended. Whoever looked at all paths before may have seen another
// path in it. g.mu is held.
func (g *grants) isOver(slot uint32) (bool, error) {
	p, err := g.datapath.Path(slot)
	if err != nil {
		return false, fmt.Errorf("read slot %d: %w", slot, err)
	}
	return p.State != datapath.PathFree && !isOpen(p) && g.active[p.Grant] == nil, nil
}

// freeSlot gives back the slot of an ended path, and tells if there was one. What the kernel closed alone is in the index still.
// g.mu is held.
func (g *grants) freeSlot(slot uint32) (freed bool, err error) {
	if freed, err = g.isOver(slot); err != nil {
		return false, err
	}
	if freed {
		err = g.datapath.EndPath(slot, datapath.PathRevoked)
		if err == nil {
			err = g.leaveSlot(slot)
		}
		if err != nil {
			return false, fmt.Errorf("free slot %d: %w", slot, err)
		}
	}
	delete(g.ended, slot)
	return freed, nil
}

// leaveSlot gives back the slot of a path that is closed. g.mu is held.
func (g *grants) leaveSlot(slot uint32) error {
	if g.parting != nil {
		p, err := g.datapath.Path(slot)
		if err != nil {
			return err
		}
		g.parting(p)
	}
	return g.datapath.FreePath(slot)
}

// endedSlots are those of paths whose grants have ended.
func (g *grants) endedSlots() map[uint32]bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make(map[uint32]bool, len(g.ended))
	for slot := range g.ended {
		all[slot] = true
	}
	return all
}

// all lists every grant that the node ever activated, oldest first.
func (g *grants) all(ctx context.Context) ([]store.GrantRow, error) { return g.store.Grants(ctx) }

// portsOf are the ports that a grant's paths serve: those that it names, or all of the service.
func portsOf(p grant.Payload, s datapath.Service) []uint16 {
	if len(p.Ports) == 0 {
		return s.Ports
	}
	return p.Ports
}
