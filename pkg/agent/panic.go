package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// What callers of Panic, Lift and Activate may match.
var (
	// ErrPanic says that a panic stands: no path is open, and no grant is activated.
	ErrPanic = errors.New("a panic stands on this node")
	// ErrNoPanic says that there is none to lift.
	ErrNoPanic = errors.New("no panic stands on this node")
	// ErrNotRoot says that the caller is an operator, but not root.
	ErrNotRoot = errors.New("only root may do this")
)

// noteOfPanic is where the store has the panic that stands.
const noteOfPanic = "panic"

// panicNote is a panic: who called it, why, and when by the wall clock. It stands until it is lifted, also over a restart
// and a reboot.
type panicNote struct {
	By  string    `json:"by"`
	Why string    `json:"why"`
	At  time.Time `json:"at"`
}

func (p *panicNote) String() string {
	if p == nil {
		return ""
	}
	return fmt.Sprintf("since %s, by %s: %s", p.At.UTC().Format(time.RFC3339), p.By, p.Why)
}

// Panic ends every path of the node and lets none be opened until Lift. What the kernel holds ends before anything is
// waited for, a lock or the disk included; records follow, and when it returns without error they are durable. A second
// call ends what is open by then, and leaves the first one's record.
func (g *grants) Panic(ctx context.Context, why, actor string) (ended int, err error) {
	at, _ := g.clock.read()
	p := &panicNote{By: actor, Why: why, At: at}
	ended, shut := g.shut(p)
	g.log.Error("panic: every path ends", "paths", ended, "actor", actor, "why", why)
	g.mu.Lock()
	late, again := g.shut(p) // a lift may have come between
	kept, over := g.keepPanic(ctx), g.doomedByPanic()
	g.mu.Unlock()
	return ended + late, errors.Join(shut, again, kept, g.endMany(ctx, over))
}

// shut is the part of a panic that waits for nobody. An agent that is killed before the store has the panic finds the mark.
func (g *grants) shut(p *panicNote) (ended int, err error) {
	g.panicked.CompareAndSwap(nil, p)
	ended, err = g.datapath.Shut()
	return ended, errors.Join(err, g.panicMark.put(p))
}

// keepPanic makes the panic that stands durable, if it is not yet. g.mu is held.
func (g *grants) keepPanic(ctx context.Context) error {
	p := g.panicked.Load()
	if p == nil {
		return nil
	}
	if p == g.panicKept {
		return g.panicMark.remove()
	}
	data, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("keep panic: %w", err)
	}
	event, err := encodeEvent(newEvent(stepPanic, p.By, p.Why, g.clock))
	if err == nil {
		err = g.store.KeepUrgent(ctx, []store.Note{{Name: noteOfPanic, Data: data}}, event)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errNotRecorded, err)
	}
	g.panicKept = p
	g.events.count(stepPanic)
	g.kick()
	return g.panicMark.remove()
}

// doomedByPanic gives every grant its end while a panic stands: its paths are closed already. g.mu is held.
func (g *grants) doomedByPanic() (over []doomed) {
	p := g.panicked.Load()
	if p == nil {
		return nil
	}
	return g.doomActive(p.ending())
}

// ending is what a panic does to every grant.
func (p *panicNote) ending() ending { return ending{}.revoked(p.By, "panic: "+p.Why) }

// Lift lets grants be activated again. Nothing that the panic ended comes back. It is durable before it takes effect. The
// error wraps ErrNoPanic if there is nothing to lift.
func (g *grants) Lift(ctx context.Context, why, actor string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.panicked.Load()
	if p == nil {
		return fmt.Errorf("lift panic: %w", ErrNoPanic)
	}
	if err := g.keepPanic(ctx); err != nil { // it is on record before its end is, and no mark says that it stands
		return fmt.Errorf("lift panic: %w", err)
	}
	event, err := encodeEvent(newEvent(stepLifted, actor, fmt.Sprintf("%s (panic %s)", why, p), g.clock))
	if err == nil {
		err = g.store.KeepUrgent(ctx, []store.Note{{Name: noteOfPanic}}, event)
	}
	if err != nil {
		return fmt.Errorf("lift panic: %w", err)
	}
	g.panicKept = nil
	g.panicked.Store(nil)
	g.datapath.Reopen()
	g.events.count(stepLifted)
	g.log.Warn("panic lifted", "actor", actor, "why", why)
	g.kick()
	return nil
}

// recallPanic goes on with a panic of an earlier agent, which may have been killed before it was durable. One that cannot be
// read is one all the same. g.mu is held.
func (g *grants) recallPanic(ctx context.Context) error {
	notes, err := g.store.Notes(ctx, noteOfPanic)
	if err != nil {
		return fmt.Errorf("recall panic: %w", err)
	}
	p, err := g.panicMark.read()
	if err != nil {
		return fmt.Errorf("recall panic: %w", err)
	}
	if len(notes) > 0 {
		p = readPanic(notes[0].Data)
		g.panicKept = p
	}
	if p == nil {
		return nil
	}
	g.panicked.Store(p)
	_, err = g.datapath.Shut()
	g.problems.report(problemGrants, "panic", g.keepPanic(ctx)) // else a tick does
	return err
}

func readPanic(data []byte) *panicNote {
	p := &panicNote{}
	if err := json.Unmarshal(data, p); err != nil {
		p.By, p.Why = "unknown", "its record cannot be read: "+err.Error()
	}
	return p
}

// panicMark is a file of the run directory that says that a panic stands, until the store does: its disk may be stuck, and a
// memory is not. The empty one is none.
type panicMark string

func (m panicMark) put(p *panicNote) error {
	if m == "" {
		return nil
	}
	data, err := json.Marshal(p)
	if err == nil {
		err = os.WriteFile(string(m), data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("mark panic: %w", err)
	}
	return nil
}

// read gives nil where there is no mark.
func (m panicMark) read() (*panicNote, error) {
	data, err := os.ReadFile(string(m))
	if m == "" || errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return readPanic(data), err
}

func (m panicMark) remove() error {
	if err := os.Remove(string(m)); m != "" && err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mark of panic: %w", err)
	}
	return nil
}

// standing is the panic that stands, in words, or nothing.
func (g *grants) standing() string { return g.panicked.Load().String() }

// refusePanic refuses an activation while a panic stands.
func (g *grants) refusePanic() error {
	if p := g.panicked.Load(); p != nil {
		return fmt.Errorf("%w %s", ErrPanic, p)
	}
	return nil
}

// Panic ends all paths. Every operator may: it only takes away.
func (o *operators) Panic(ctx context.Context, req *api.PanicRequest) (*api.PanicReply, error) {
	ended, err := o.grants.Panic(ctx, orNoReason(plain(req.GetWhy())), caller(ctx))
	if err != nil {
		return nil, toStatus(err)
	}
	return &api.PanicReply{Ended: uint32(ended)}, nil
}

// LiftPanic lets paths be opened again. Root alone may: it gives back what an operator took away.
func (o *operators) LiftPanic(ctx context.Context, req *api.LiftPanicRequest) (*api.LiftPanicReply, error) {
	actor := caller(ctx)
	if actor != root {
		return nil, toStatus(fmt.Errorf("lift panic, as %s: %w", actor, ErrNotRoot))
	}
	if err := o.grants.Lift(ctx, orNoReason(plain(req.GetWhy())), actor); err != nil {
		return nil, toStatus(err)
	}
	return &api.LiftPanicReply{}, nil
}

// root is the caller with all rights on the node.
const root = "uid:0"

func orNoReason(why string) string {
	if why == "" {
		return "no reason was given"
	}
	return why
}
