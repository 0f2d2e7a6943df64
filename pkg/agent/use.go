package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

const (
	// noteOfUse is where the store has the use of a grant, with its id behind it.
	noteOfUse = "use/"
	// keepUse is how often the use of active grants is made durable: a kill costs so much of it.
	keepUse = time.Minute
	// longestLook bounds what one look can add to the time with traffic: an agent that was stopped has not seen it.
	longestLook = 2 * time.Second
)

// use is what the paths of a grant have carried. Counters are the kernel's; times are as far as agents have seen it, which
// look once a second. Times in it are nanoseconds.
type use struct {
	Open    time.Duration        `json:"open"` // from activation on, as of the last look
	Busy    time.Duration        `json:"busy"` // of it, with traffic
	Last    time.Duration        `json:"last"` // from activation to the last traffic
	Clients map[netip.Addr]spent `json:"clients"`
	Ports   []uint16             `json:"ports"`          // of the service, that flows were for
	Granted []uint16             `json:"granted"`        // those that they could have been for
	Ended   time.Time            `json:"ended,omitzero"` // wall clock; zero while it is active

	looked  bool
	changed bool          // since it was kept
	packets uint64        // at the last look
	at      time.Duration // CLOCK_BOOTTIME of the last look
	moved   time.Duration // CLOCK_BOOTTIME of the last look that found more packets, or of the first look
}

// spent is what the path of one client has carried.
type spent struct {
	Bytes   uint64 `json:"bytes"`
	Packets uint64 `json:"packets"`
	Flows   uint64 `json:"flows"`
}

// total adds up all clients.
func (u *use) total() (all spent) {
	for _, s := range u.Clients {
		all.Bytes, all.Packets, all.Flows = all.Bytes+s.Bytes, all.Packets+s.Packets, all.Flows+s.Flows
	}
	return all
}

// copied shares nothing with the original.
func (u *use) copied() use {
	c := *u
	c.Clients, c.Ports = maps.Clone(u.Clients), slices.Clone(u.Ports)
	return c
}

// look compares the paths of a grant with the last look at them. open is how long it has been active; now is CLOCK_BOOTTIME.
func (u *use) look(paths []datapath.PathStatus, ports []uint16, open, now time.Duration) {
	if len(paths) == 0 {
		return // they are gone with their counters
	}
	var packets uint64
	for _, p := range paths {
		packets += p.PacketsToServer + p.PacketsToClient
	}
	u.Open = open
	if packets > u.packets {
		if u.Clients == nil {
			u.Clients = make(map[netip.Addr]spent)
		}
		for _, p := range paths {
			u.Clients[p.Client] = spent{Bytes: p.BytesToServer + p.BytesToClient, Packets: p.PacketsToServer + p.PacketsToClient, Flows: p.Flows}
		}
		u.Last, u.changed = open, true
		if u.looked {
			u.Busy += min(now-u.at, longestLook)
		}
	}
	if packets > u.packets || !u.looked {
		u.moved = now
	}
	for _, port := range ports {
		if !slices.Contains(u.Ports, port) {
			u.Ports, u.changed = append(u.Ports, port), true
		}
	}
	u.looked, u.packets, u.at = true, packets, now
}

// lookAt is the look at an active grant. g.mu is held.
func (g *grants) lookAt(h *held, paths []datapath.PathStatus, now time.Duration) {
	h.use.Granted = portsOf(h.payload, h.service)
	life := h.row.Deadline.Sub(h.row.Activated)
	h.use.look(paths, g.ports.of(h.row.ID), min(life-(h.row.DeadlineBoot-now), life), now)
}

// note is the form in which the store keeps it.
func (u *use) note(id string) (store.Note, error) {
	data, err := json.Marshal(u)
	if err != nil {
		return store.Note{}, fmt.Errorf("keep use of %s: %w", id, err)
	}
	return store.Note{Name: noteOfUse + id, Data: data}, nil
}

// KeepUses makes the use of active grants durable, when it is time, some of them in each transaction: others want to write in
// between. What could not be kept is kept the next time.
func (g *grants) KeepUses(ctx context.Context) error {
	now := g.clock.boot()
	if now-g.usesKept < keepUse {
		return nil
	}
	g.usesKept = now
	for batch := range slices.Chunk(g.changedUses(), endBatch) {
		if err := g.keepSome(ctx, batch); err != nil {
			return fmt.Errorf("keep use: %w", err)
		}
	}
	return nil
}

// changedUses are the grants whose use changed since it was kept.
func (g *grants) changedUses() (changed []*held) {
	_ = inTurns(&g.mu, g.every(), func(h *held) error {
		if h.use.changed {
			changed = append(changed, h)
		}
		return nil
	})
	return changed
}

// keepSome lets nobody wait for the disk. Of a grant that ends meanwhile the store keeps what was noted with its end.
func (g *grants) keepSome(ctx context.Context, batch []*held) error {
	notes, err := g.notesOf(batch)
	if err == nil {
		err = g.store.KeepOfActive(ctx, notes)
	}
	if err != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, h := range batch {
			h.use.changed = true
		}
	}
	return err
}

// notesOf gives the uses as they are now, which are kept then.
func (g *grants) notesOf(batch []*held) (map[string]store.Note, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	notes := make(map[string]store.Note, len(batch))
	for _, h := range batch {
		n, err := h.use.note(h.row.ID)
		if err != nil {
			return nil, err
		}
		notes[h.row.ID], h.use.changed = n, false
	}
	return notes, nil
}

// end notes when a grant ended: at its deadline at the latest, whoever noticed when. The first time stands.
func (h *held) end(now time.Time) {
	if h.use.Ended.IsZero() {
		h.use.Ended = earlierOf(now, h.row.Deadline)
	}
}

// endedAt is when a grant ended, by the node's clock; zero while it is active. Where nobody has noted it, at its deadline.
func (g *grants) endedAt(ctx context.Context, row store.GrantRow) (time.Time, error) {
	if row.State == store.StateActive {
		return time.Time{}, nil
	}
	notes, err := g.store.Notes(ctx, noteOfUse+row.ID)
	for _, n := range notes {
		var u use
		if json.Unmarshal(n.Data, &u) == nil && !u.Ended.IsZero() {
			return u.Ended, err
		}
	}
	return row.Deadline, err
}

// uses reads what the store has, by grant. One that cannot be read is left out.
func (g *grants) uses(ctx context.Context) (map[string]*use, error) {
	notes, err := g.store.Notes(ctx, noteOfUse)
	if err != nil {
		return nil, err
	}
	out := make(map[string]*use, len(notes))
	for _, n := range notes {
		u := &use{}
		if json.Unmarshal(n.Data, u) == nil {
			out[n.Name[len(noteOfUse):]] = u
		}
	}
	return out, nil
}

// recallUse goes on with what an earlier agent has seen of a grant.
func (g *grants) recallUse(h *held, uses map[string]*use) {
	if u, ok := uses[h.row.ID]; ok {
		h.use = *u
		h.use.packets = u.total().Packets
	}
}

// portUse is which ports the flows of active grants were for. Safe for concurrent use; the nil one knows none.
type portUse struct {
	mu sync.Mutex
	by map[string]map[uint16]bool // guarded by mu; grant -> ports
}

func newPortUse() *portUse { return &portUse{by: make(map[string]map[uint16]bool)} }

// note takes a flow record.
func (p *portUse) note(rec flow.Record) {
	if p == nil || rec.Grant == "" || rec.Event == flow.EventDeny {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.by[rec.Grant] == nil {
		p.by[rec.Grant] = make(map[uint16]bool)
	}
	p.by[rec.Grant][rec.Server.Port()] = true
}

// of gives the ports that a grant's flows were for, ascending.
func (p *portUse) of(grant string) []uint16 {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.by[grant] == nil {
		return nil
	}
	return slices.Sorted(maps.Keys(p.by[grant]))
}

// keep forgets the grants that are over. Who they are is asked after what is known: a grant that comes in between is kept.
func (p *portUse) keep(active func() []*held) {
	if p == nil {
		return
	}
	p.mu.Lock()
	over := maps.Clone(p.by)
	p.mu.Unlock()
	for _, h := range active() {
		delete(over, h.row.ID)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for grant := range over {
		delete(p.by, grant)
	}
}
