package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
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

	mu     sync.Mutex
	active map[string]*held         // guarded by mu
	ended  map[uint32]time.Duration // guarded by mu; slot of an ended path -> boot time since which it is known

	signals map[string]signal.Signal // guarded by mu; that were given, by the names of their notes; made by adopt
	history *history                 // guarded by mu

	refused  map[string]*refused // guarded by mu; by who asked
	ports    *portUse            // what the records of flows tell
	usesKept time.Duration       // guarded by mu; CLOCK_BOOTTIME at which the uses were made durable
	forgot   time.Duration       // owned by the sweeper; CLOCK_BOOTTIME at which all was forgotten that could be

	panicked  atomic.Pointer[panicNote] // that stands; read without a lock, so that nothing waits to tell of it
	panicKept *panicNote                // guarded by mu; the one that the store has
}

// adopt takes over what an earlier agent of this boot left, and ends the rest: rows of another boot, rows without their
// paths, and paths without their row. It must come before the lease is renewed. An end that the disk does not take keeps
// nobody from going on: its paths are closed, and a tick records it.
func (g *grants) adopt(ctx context.Context) error {
	if err := g.adoptRows(ctx); err != nil {
		return err
	}
	late, err := g.agree(ctx)
	g.problems.report(problemGrants, "", late)
	return err
}

func (g *grants) adoptRows(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.recallPanic(ctx); err != nil {
		return err
	}
	rows, err := g.store.Grants(ctx)
	if err != nil {
		return fmt.Errorf("adopt grants: %w", err)
	}
	if err := g.recallSignals(ctx, rows); err != nil {
		return fmt.Errorf("adopt grants: %w", err)
	}
	uses, err := g.uses(ctx)
	if err != nil {
		return fmt.Errorf("adopt grants: %w", err)
	}
	left, err := g.left(ctx)
	if err != nil {
		return fmt.Errorf("adopt grants: %w", err)
	}
	against, err := g.final(ctx)
	if err != nil {
		return fmt.Errorf("adopt grants: %w", err)
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
		g.active[row.ID] = h
		if why == "" {
			continue
		}
		e := ending{grant: row.ID, actor: "agent"}
		if err := g.end(ctx, h, e.as(stateEnded, stepRevoked, datapath.PathRevoked, why)); err != nil && !store.Unwritable(err) {
			return fmt.Errorf("adopt grants: %w", err)
		}
	}
	if err := g.adoptReviews(ctx); err != nil {
		return fmt.Errorf("adopt grants: %w", err)
	}
	return nil
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
	why = g.outdated(h, row.Envelope, e)
	h.forget()
	return h, why
}

// tick makes grants and kernel agree, and tells when to look again at the latest.
func (g *grants) tick(ctx context.Context) (next time.Duration, err error) {
	g.mu.Lock()
	err = errors.Join(g.keepPanic(ctx), g.endLost(ctx))
	g.mu.Unlock()
	err = errors.Join(err, g.reconcile(ctx))
	g.mu.Lock()
	defer g.mu.Unlock()
	g.reviews.remind()
	next = time.Second
	for _, h := range g.active {
		next = min(next, max(h.ends()-g.clock.boot(), time.Millisecond))
	}
	if err != nil {
		next = time.Second
	}
	return next, err
}

// reconcile is agree for those to whom every error is one.
func (g *grants) reconcile(ctx context.Context) error {
	late, err := g.agree(ctx)
	return errors.Join(late, err)
}

// agree carries out planPaths. Whoever activates does not wait while thousands of paths are looked at: what has changed
// since is left to the next time. late is what was done, but the disk did not take the record of it.
func (g *grants) agree(ctx context.Context) (late, err error) {
	g.mu.Lock()
	active := make([]live, 0, len(g.active)) // before the paths: each of these has its own by now
	for _, h := range g.active {
		active = append(active, h.live())
	}
	g.mu.Unlock()
	paths, err := g.datapath.Paths()
	if err != nil {
		return nil, fmt.Errorf("read paths: %w", err)
	}
	now := g.clock.boot()
	plan := planPaths(active, paths, now)
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for _, p := range plan.orphans {
		if _, known := g.active[p.Grant]; !known {
			errs = append(errs, g.endOrphan(p))
		}
	}
	for _, e := range plan.end {
		if h, still := g.active[e.grant]; still {
			errs = append(errs, g.endIn(ctx, h, e, paths))
		}
	}
	errs = append(errs, g.oversee(ctx, paths, now), g.free(plan.idle, now))
	isLate := slices.IndexFunc(errs, store.Unwritable) // the next tick finds the others
	if isLate >= 0 {
		late = errs[isLate]
		errs = slices.DeleteFunc(errs, store.Unwritable)
	}
	return late, errors.Join(errs...)
}

// endOrphan closes a path that no record explains. Somebody wrote the map, or the store was replaced.
func (g *grants) endOrphan(p datapath.PathStatus) error {
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
	var errs []error
	for slot := range g.ended {
		if !slices.Contains(idle, slot) {
			delete(g.ended, slot)
		}
	}
	for _, slot := range idle {
		since, known := g.ended[slot]
		switch {
		case !known:
			g.ended[slot] = now
		case now-since >= keepEnded:
			errs = append(errs, g.freeSlot(slot))
		}
	}
	return errors.Join(errs...)
}

func (g *grants) freeSlot(slot uint32) error {
	if err := g.datapath.FreePath(slot); err != nil {
		return fmt.Errorf("free slot %d: %w", slot, err)
	}
	delete(g.ended, slot)
	return nil
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
