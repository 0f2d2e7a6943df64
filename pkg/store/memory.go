package store

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

// ClockBound is how far the wall clock may be behind the latest time that the store has seen: what corrections of a clock
// that runs explain.
const ClockBound = time.Minute

// Owner is who keeps a store.
type Owner struct {
	Node    string // its name
	Machine string // id of the installation; empty: not known
	// Witness is a file outside of the store's directory that does not outlive the boot. It knows how far the store was.
	Witness string
}

// Memory is what the store knows of its own memory.
type Memory struct {
	// Latest is the latest wall-clock time that was ever seen.
	Latest time.Time
	// Floor is the wall-clock time before which the store may have forgotten. Zero: it has not.
	Floor time.Time
	// Doubt says in words why nothing may be activated before somebody vouches. Empty: it may.
	Doubt string
}

func (h head) memory() Memory {
	return Memory{Latest: instant(h.latest), Floor: instant(h.floor), Doubt: h.doubt}
}

func instant(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// Memory returns what stands since the last write. It waits for nothing: no lock, and no disk.
func (s *Store) Memory() Memory { return *s.memory.Load() }

func (s *Store) remember(h head) {
	m := h.memory()
	s.memory.Store(&m)
}

// CheckClock tells whether now is not far behind what was seen: ErrClockBehind if it is.
func (m Memory) CheckClock(now time.Time) error {
	if behind := m.Latest.Sub(now); behind > ClockBound {
		return fmt.Errorf("%w: it says %s, and %s was seen before", ErrClockBehind, now.UTC().Format(time.RFC3339), m.Latest.Format(time.RFC3339))
	}
	return nil
}

// Check adds to CheckClock whether the store may have forgotten what was used: ErrDoubt.
func (m Memory) Check(now time.Time) error {
	if m.Doubt != "" {
		return fmt.Errorf("%w: %s", ErrDoubt, m.Doubt)
	}
	return m.CheckClock(now)
}

// see takes now for seen, if nothing speaks against it.
func (h *head) see(now time.Time) error {
	if err := h.memory().Check(now); err != nil {
		return err
	}
	h.latest = max(h.latest, now.UnixNano())
	return nil
}

// See makes it durable that the wall clock was seen to say now. A clock that is behind is ErrClockBehind; nothing is
// written then.
func (s *Store) See(ctx context.Context, now time.Time) error {
	err := s.write(ctx, urgent, func(_ *sql.Tx, h *head) error {
		h.latest = max(h.latest, now.UnixNano())
		return h.memory().CheckClock(now)
	})
	if err != nil {
		return fmt.Errorf("note the time: %w", err)
	}
	return nil
}

// Vouch ends every doubt, in one durable transaction with the critical entry that tells of it: now is right, and this is
// the node's store. Where it may have forgotten, or called a time its floor that is still to come, floor is the new one.
func (s *Store) Vouch(ctx context.Context, o Owner, now, floor time.Time, event []byte) error {
	err := s.write(ctx, urgent, func(tx *sql.Tx, h *head) error {
		if h.doubt != "" || h.floor > floor.UnixNano() {
			h.floor = floor.UnixNano()
		}
		h.node, h.machine, h.doubt, h.latest = o.Node, o.Machine, "", now.UnixNano()
		return appendEntry(ctx, tx, h, Item{Data: event})
	})
	if err != nil {
		return fmt.Errorf("vouch for the store: %w", err)
	}
	return nil
}

// Claim says who opens the store. One that another node or machine kept, and one that is older than what this boot has
// seen, is in doubt until somebody vouches for it: that is durable, and no error. A disk that takes nothing now is no error
// either: the doubt is there at once, and durable before anything else is.
func (s *Store) Claim(ctx context.Context, o Owner) error {
	w, err := readWitness(o.Witness, s.boot)
	if err != nil {
		return fmt.Errorf("claim store: %w", err)
	}
	s.mu.Lock()
	s.due.claim, s.due.witness = &claim{owner: o, seen: w}, o.Witness
	s.mu.Unlock()
	if err := s.view(ctx, func(_ *sql.Tx, h *head) error { s.remember(*h); return nil }); err != nil {
		return fmt.Errorf("claim store: %w", err)
	}
	if err := s.CatchUp(ctx); err != nil && !Unwritable(err) {
		return fmt.Errorf("claim store: %w", err)
	}
	return nil
}

// claim is an owner's, and what speaks for it or against it.
type claim struct {
	owner Owner
	seen  witness
}

func (c *claim) settle(h *head) {
	if h.doubt == "" {
		h.doubt = c.seen.against(*h) // a doubt that there was stays
	}
	if h.doubt == "" {
		h.doubt = c.owner.against(*h)
	}
	if h.node == "" {
		h.node = c.owner.Node
	}
	if h.machine == "" {
		h.machine = c.owner.Machine
	}
}

// against says what speaks against the store being the owner's own. What is not known speaks against nothing.
func (o Owner) against(h head) string {
	if h.node != "" && h.node != o.Node {
		return fmt.Sprintf("it was kept by the node %q, and this is %q", h.node, o.Node)
	}
	if h.machine != "" && o.Machine != "" && h.machine != o.Machine {
		return fmt.Sprintf("it was kept on the machine %s, and this is %s", h.machine, o.Machine)
	}
	return ""
}

// witness is what this boot has seen of a store. The zero value has seen nothing.
type witness struct {
	epoch  []byte
	writes uint64
}

// against says what speaks against the store being the one that the witness saw, as far as it was.
func (w witness) against(h head) string {
	switch {
	case w.epoch == nil:
		return ""
	case !bytes.Equal(w.epoch, countHeader(h.epoch, "")[:offBoot]):
		return "another store was in its place earlier in this boot"
	case w.writes > h.writes:
		return "it is older than it was earlier in this boot: it was restored"
	}
	return ""
}

// readWitness takes a file that is not there, or of another boot, for none.
func readWitness(path, boot string) (witness, error) {
	if path == "" {
		return witness{}, nil
	}
	page, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return witness{}, nil
	}
	if err != nil {
		return witness{}, err
	}
	if len(page) != countSize || !bytes.Equal(page[offBoot:offWrites], countHeader("", boot)[offBoot:offWrites]) {
		return witness{}, nil
	}
	return witness{page[:offBoot], binary.NativeEndian.Uint64(page[offWrites:])}, nil
}

// testify has the witness follow the store from here on. s.mu is held.
func (s *Store) testify(path string, h head) error {
	if err := replaceFile(path, countPage(s.boot, h)); err != nil {
		return err
	}
	page, err := mapCount(path)
	if err == nil {
		s.witness = page
	}
	return err
}
