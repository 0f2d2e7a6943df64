package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// Prune forgets up to limit grants that are over and were kept as long as they had to be, each with the notes that have its
// id behind one of the prefixes, and gives how many. What time it is says the latest time that was ever seen.
//
// A used grant is forgotten behind a floor: no grant that was to end by the time at which a forgotten one was is activated
// ever again, whatever the clock says. They go in the order of their use, so that the chain of the others holds. Those of a
// kind stay until they were reviewed.
func (s *Store) Prune(ctx context.Context, limit int, prefixes ...string) (n int, err error) {
	if err := s.view(ctx, func(tx *sql.Tx, h *head) error {
		_, ids, err := h.forgettable(ctx, tx, limit)
		n = len(ids)
		return err
	}); err != nil {
		return 0, fmt.Errorf("forget grants: %w", err)
	}
	if n == 0 {
		return 0, nil
	}
	err = s.write(ctx, urgent, func(tx *sql.Tx, h *head) error {
		after, ids, err := h.forgettable(ctx, tx, limit)
		if err != nil {
			return err
		}
		n = len(ids)
		*h = after.head
		if _, err := tx.ExecContext(ctx, `DELETE FROM replay WHERE n <= ?`, after.upTo); err != nil {
			return err
		}
		for _, id := range ids {
			if err := forget(ctx, tx, id, prefixes); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("forget grants: %w", err)
	}
	return n, nil
}

func forget(ctx context.Context, tx *sql.Tx, id string, prefixes []string) error {
	_, err := tx.ExecContext(ctx, `DELETE FROM grants WHERE id = ?`, id)
	for _, prefix := range prefixes {
		err = errors.Join(err, putNote(ctx, tx, Note{Name: prefix + id}))
	}
	return err
}

// shorter is the head with the chain of used ids beginning later.
type shorter struct {
	head
	upTo int64 // n of the last used id that goes
}

// forgettable gives the head without what may be forgotten, and the ids of the rows that may.
func (h *head) forgettable(ctx context.Context, tx *sql.Tx, limit int) (shorter, []string, error) {
	after := shorter{head: *h}
	if h.doubt != "" {
		return after, nil, nil
	}
	if err := after.cutChain(ctx, tx, limit); err != nil {
		return after, nil, err
	}
	rows, err := tx.QueryContext(ctx, `SELECT id FROM grants WHERE state <> 'active' AND keep > 0 AND keep <= ? AND
		(kind = '' OR EXISTS (SELECT 1 FROM statements WHERE statements.digest = grants.digest AND step = ?)) AND
		NOT EXISTS (SELECT 1 FROM replay WHERE replay.id = grants.id AND n > ?) LIMIT ?`, h.latest, StepReviewed, after.upTo, limit)
	if err != nil {
		return after, nil, err
	}
	defer rows.Close()
	var ids []string
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return after, nil, err
		}
		ids = append(ids, id)
	}
	return after, ids, rows.Err()
}

// cutChain goes along the chain of used ids, for as long as their grants may be forgotten.
func (s *shorter) cutChain(ctx context.Context, tx *sql.Tx, limit int) error {
	rows, err := tx.QueryContext(ctx, `SELECT n, hash, not_after, state <> 'active' AND keep > 0 AND keep <= ?
		FROM replay JOIN grants ON grants.id = replay.id ORDER BY n LIMIT ?`, s.latest, limit)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var n, notAfter int64
		var hash []byte
		var over bool
		if err := rows.Scan(&n, &hash, &notAfter, &over); err != nil || !over {
			return err
		}
		s.upTo, s.replayBase, s.forgotten = n, hash, max(s.forgotten, notAfter)
	}
	return rows.Err()
}
