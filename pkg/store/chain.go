package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// Entry is one critical record: bytes that the store does not look into.
type Entry struct {
	Seq  uint64
	Data []byte
}

// Item is one record to append.
type Item struct {
	Data []byte
	// Numbers is how many sequence numbers the item takes; 0 is 1. A record of losses takes as many as
	// it counts, and stands at the last of them.
	Numbers uint64
	// Queued says that the record was counted by CountQueued before.
	Queued bool
}

func entryHash(prev []byte, seq uint64, data []byte) []byte {
	return digest([]byte("sallyport entry"), prev, num(seq), data)
}

// Append adds one critical entry, and returns its sequence number once it is durable. ErrFull says
// that nothing was written and nothing may take effect that depends on it.
func (s *Store) Append(ctx context.Context, data []byte) (uint64, error) {
	return s.AppendAll(ctx, []Item{{Data: data}})
}

// AppendAll adds critical entries in one durable transaction, all or none, and returns the sequence
// number of the last.
func (s *Store) AppendAll(ctx context.Context, items []Item) (last uint64, err error) {
	err = s.write(ctx, common, func(tx *sql.Tx, h *head) error {
		for _, it := range items {
			if err := appendEntry(ctx, tx, h, it); err != nil {
				return err
			}
		}
		last = h.seq
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("append entry: %w", err)
	}
	return last, nil
}

func appendEntry(ctx context.Context, tx *sql.Tx, h *head, it Item) error {
	n := max(it.Numbers, 1)
	seq := h.seq + n
	hash := entryHash(h.hash, seq, it.Data)
	if _, err := tx.ExecContext(ctx, `INSERT INTO entries (seq, data, hash) VALUES (?, ?, ?)`, seq, notNil(it.Data), hash); err != nil {
		return err
	}
	h.seq, h.hash = seq, hash
	if it.Queued {
		h.queued += n
	}
	return nil
}

// Entries returns up to limit entries with a sequence number above after, in ascending order.
func (s *Store) Entries(ctx context.Context, after uint64, limit int) ([]Entry, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT seq, data FROM entries WHERE seq > ? ORDER BY seq LIMIT ?`, after, limit)
	if err != nil {
		return nil, fmt.Errorf("read entries: %w", classify(err))
	}
	defer rows.Close()
	var out []Entry
	for rows.Next() {
		var e Entry
		if err := rows.Scan(&e.Seq, &e.Data); err != nil {
			return nil, fmt.Errorf("read entries: %w", classify(err))
		}
		out = append(out, e)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read entries: %w", classify(err))
	}
	return out, nil
}

// Seqs returns the last number given out and the last number acknowledged, of the critical class.
func (s *Store) Seqs(ctx context.Context) (last, acked uint64, err error) {
	if err := s.db.QueryRowContext(ctx, `SELECT seq, base_seq FROM head`).Scan(&last, &acked); err != nil {
		return 0, 0, fmt.Errorf("read head: %w", classify(err))
	}
	return last, acked, nil
}

// Ack removes the entries up to seq, which the collector has durably, and keeps the notes that tell of it in the same durable
// transaction. The chain goes on from the hash of the last one removed. ErrAhead if the store never gave out seq.
func (s *Store) Ack(ctx context.Context, seq uint64, notes ...Note) error {
	err := s.write(ctx, urgent, func(tx *sql.Tx, h *head) error {
		if seq > h.seq {
			return fmt.Errorf("%w: %d of %d", ErrAhead, seq, h.seq)
		}
		if err := putNotes(ctx, tx, notes); err != nil {
			return err
		}
		var last uint64
		var hash []byte
		err := tx.QueryRowContext(ctx, `SELECT seq, hash FROM entries WHERE seq <= ? ORDER BY seq DESC LIMIT 1`, seq).Scan(&last, &hash)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		h.baseSeq, h.baseHash = last, hash
		_, err = tx.ExecContext(ctx, `DELETE FROM entries WHERE seq <= ?`, last)
		return err
	})
	if err != nil {
		return fmt.Errorf("acknowledge entries: %w", err)
	}
	return nil
}

// verify reads everything once and compares it with its hashes.
func (s *Store) verify(ctx context.Context) (head, error) {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return head{}, err
	}
	defer tx.Rollback()
	if err := quickCheck(ctx, tx); err != nil {
		return head{}, err
	}
	h, err := loadHead(ctx, tx)
	if err != nil {
		return head{}, err
	}
	for _, check := range []func(context.Context, *sql.Tx, head) error{verifyEntries, verifyReplay, verifyStatements, verifyGrants, verifyNotes, verifySpool} {
		if err := check(ctx, tx, h); err != nil {
			return head{}, err
		}
	}
	return h, nil
}

func quickCheck(ctx context.Context, tx *sql.Tx) error {
	var result string
	if err := tx.QueryRowContext(ctx, `PRAGMA quick_check(1)`).Scan(&result); err != nil {
		return err
	}
	if result != "ok" {
		return fmt.Errorf("%w: %s", ErrDamaged, result)
	}
	return nil
}

func verifyEntries(ctx context.Context, tx *sql.Tx, h head) error {
	rows, err := tx.QueryContext(ctx, `SELECT seq, data, hash FROM entries ORDER BY seq`)
	if err != nil {
		return err
	}
	defer rows.Close()
	seq, prev := h.baseSeq, h.baseHash
	for rows.Next() {
		var e Entry
		var hash []byte
		if err := rows.Scan(&e.Seq, &e.Data, &hash); err != nil {
			return err
		}
		if e.Seq <= seq || !bytes.Equal(hash, entryHash(prev, e.Seq, e.Data)) {
			return fmt.Errorf("%w: chain of entries breaks at number %d", ErrDamaged, e.Seq)
		}
		seq, prev = e.Seq, hash
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if seq != h.seq || !bytes.Equal(prev, h.hash) {
		return fmt.Errorf("%w: chain of entries ends at number %d, not %d", ErrDamaged, seq, h.seq)
	}
	return nil
}

// notNil keeps empty bytes from becoming NULL.
func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
