package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// FlowState is where the numbers of the flow class stand.
type FlowState struct {
	// Acked is the last number that the collector is known to have; it may have more.
	Acked uint64
	// Produced is the last number that may be in use. Numbers go on above it.
	Produced uint64
	// Unsure is not zero after a boot that ended without warning: numbers above Acked and up to
	// Unsure were reserved then, and how many of them were in use is not known.
	Unsure uint64
	// Spool are the records that an orderly stop left behind, ascending.
	Spool []Entry
}

// adopt compares the store with the count file of the process before. In a new boot it notes durably
// what the boot before left unknown, and only then replaces the file: a kill in between repeats it.
func (s *Store) adopt(ctx context.Context, h head) (err error) {
	last, exact, err := readCount(s.countPath(), h.epoch, s.boot)
	if err != nil {
		return fmt.Errorf("read count file: %w", err)
	}
	if last > h.writes {
		return fmt.Errorf("%w: %d writes were acknowledged, the store has %d", ErrDamaged, last, h.writes)
	}
	if exact {
		if s.count, err = mapCount(s.countPath()); err == nil {
			return nil
		}
		if !errors.Is(err, unix.EROFS) {
			return err
		}
	}
	s.due.boot, s.due.count = !exact, true
	if s.count, err = s.countInMemory(h, exact); err != nil {
		return err
	}
	if err := s.CatchUp(ctx); err != nil && !Unwritable(err) {
		return err
	}
	return nil
}

func (s *Store) countPath() string { return s.path + "-count" }

// countInMemory counts for as long as the disk takes no count file.
func (s *Store) countInMemory(h head, exact bool) (*countFile, error) {
	if !exact {
		return &countFile{page: countPage(s.boot, h)}, nil
	}
	page, err := os.ReadFile(s.countPath())
	return &countFile{page: page}, err
}

func (s *Store) settleBoot(ctx context.Context, tx *sql.Tx, h *head) error {
	if h.clean == 0 {
		h.flowUnsure = h.flowReserved
		used, err := grantsInBoot(ctx, tx, h.boot)
		if err != nil {
			return err
		}
		if used {
			h.queueUnsure = 1
		}
	}
	h.boot, h.clean = s.boot, 1
	return nil
}

// grantsInBoot says whether a bypassed flow was possible in that boot.
func grantsInBoot(ctx context.Context, tx *sql.Tx, boot string) (bool, error) {
	var n int
	err := tx.QueryRowContext(ctx, `SELECT count(*) FROM grants WHERE boot_id = ?`, boot).Scan(&n)
	return n > 0, err
}

// Flow returns where the flow class stands.
func (s *Store) Flow(ctx context.Context) (FlowState, error) {
	var st FlowState
	err := s.view(ctx, func(tx *sql.Tx, h *head) error {
		st = FlowState{Acked: h.flowAcked, Produced: max(s.count.load(offFlow), h.flowAcked), Unsure: h.flowUnsure}
		var err error
		st.Spool, err = readSpool(ctx, tx, h.flowAcked)
		return err
	})
	if err != nil {
		return FlowState{}, fmt.Errorf("read flow state: %w", err)
	}
	return st, nil
}

// ReserveFlow makes it durable that numbers up to upTo may be in use and that the collector has those
// up to acked, with the notes that tell of it. Neither ever goes back.
func (s *Store) ReserveFlow(ctx context.Context, upTo, acked uint64, notes ...Note) error {
	err := s.write(ctx, urgent, func(tx *sql.Tx, h *head) error {
		h.flowReserved, h.clean = max(h.flowReserved, upTo), 0
		return errors.Join(setAcked(ctx, tx, h, acked), putNotes(ctx, tx, notes))
	})
	if err != nil {
		return fmt.Errorf("reserve flow numbers: %w", err)
	}
	return nil
}

// SaveFlow is for an orderly stop: produced is the last number in use, acked the last that the
// collector has, and spool what it does not have. The next process finds all three, and the notes.
func (s *Store) SaveFlow(ctx context.Context, produced, acked uint64, spool []Entry, notes ...Note) error {
	err := s.write(ctx, common, func(tx *sql.Tx, h *head) error {
		h.flowReserved, h.clean = produced, 1
		if err := errors.Join(setAcked(ctx, tx, h, acked), putNotes(ctx, tx, notes)); err != nil {
			return err
		}
		for _, e := range spool {
			if err := putSpool(ctx, tx, e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("save flow records: %w", err)
	}
	s.CountFlow(produced)
	return nil
}

func setAcked(ctx context.Context, tx *sql.Tx, h *head, acked uint64) error {
	if acked <= h.flowAcked {
		return nil
	}
	h.flowAcked = acked
	if acked >= h.flowUnsure {
		h.flowUnsure = 0
	}
	_, err := tx.ExecContext(ctx, `DELETE FROM spool WHERE seq <= ?`, acked)
	return err
}

// Unsettled says how many entries were taken into the queue for AppendAll and are gone with the
// process before. With unsure, a power loss may have taken some, and nobody knows how many.
func (s *Store) Unsettled(ctx context.Context) (n uint64, unsure bool, err error) {
	err = s.view(ctx, func(_ *sql.Tx, h *head) error {
		if q := s.count.load(offQueued); q > h.queued {
			n = q - h.queued
		}
		unsure = h.queueUnsure != 0
		return nil
	})
	if err != nil {
		return 0, false, fmt.Errorf("read queue state: %w", err)
	}
	return n, unsure, nil
}

// Settle appends the entries that tell of what Unsettled reported, and forgets it, in one durable
// transaction. queued is what Queued said then: what was queued since is not forgotten.
func (s *Store) Settle(ctx context.Context, items []Item, queued uint64) error {
	err := s.write(ctx, common, func(tx *sql.Tx, h *head) error {
		for _, it := range items {
			if err := appendEntry(ctx, tx, h, it); err != nil {
				return err
			}
		}
		h.queued, h.queueUnsure = max(h.queued, queued), 0
		return nil
	})
	if err != nil {
		return fmt.Errorf("settle queue: %w", err)
	}
	return nil
}

// Queued is how many entries ever went through the queue, for CountQueued to go on from.
func (s *Store) Queued() uint64 { return s.count.load(offQueued) }

func spoolSum(e Entry) []byte { return digest([]byte("sallyport spool"), num(e.Seq), e.Data) }

func putSpool(ctx context.Context, tx *sql.Tx, e Entry) error {
	_, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO spool (seq, data, sum) VALUES (?, ?, ?)`, e.Seq, notNil(e.Data), spoolSum(e))
	return err
}

func readSpool(ctx context.Context, tx *sql.Tx, after uint64) ([]Entry, error) {
	rows, err := tx.QueryContext(ctx, `SELECT seq, data, sum FROM spool WHERE seq > ? ORDER BY seq`, after)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []Entry
	for rows.Next() {
		var e Entry
		var sum []byte
		if err := rows.Scan(&e.Seq, &e.Data, &sum); err != nil {
			return nil, err
		}
		if !bytes.Equal(sum, spoolSum(e)) {
			return nil, fmt.Errorf("%w: checksum of spooled flow record %d does not fit", ErrDamaged, e.Seq)
		}
		out = append(out, e)
	}
	return out, rows.Err()
}

func verifySpool(ctx context.Context, tx *sql.Tx, _ head) error {
	_, err := readSpool(ctx, tx, 0)
	return err
}
