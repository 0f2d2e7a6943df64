package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// Note is what the node has to remember beside its grants, under a name: bytes that the store does not look into.
type Note struct {
	Name string
	Data []byte
}

// Keep keeps notes under their names, each in the place of what was there, and forgets those without data. The critical
// entries that tell of it are appended in the same durable transaction.
func (s *Store) Keep(ctx context.Context, notes []Note, events ...[]byte) error {
	return s.keep(ctx, common, notes, events)
}

// KeepUrgent is Keep for what takes away, or people ask for: it finds room where Keep does not.
func (s *Store) KeepUrgent(ctx context.Context, notes []Note, events ...[]byte) error {
	return s.keep(ctx, urgent, notes, events)
}

// KeepOfActive keeps a note of each grant, by the grant's id, unless it has ended by then: what was noted with its end stands.
func (s *Store) KeepOfActive(ctx context.Context, notes map[string]Note) error {
	err := s.write(ctx, common, func(tx *sql.Tx, _ *head) error {
		for id, n := range notes {
			row, err := getGrant(ctx, tx, id)
			if err == nil && row.State == StateActive {
				err = putNote(ctx, tx, n)
			}
			if err != nil && !errors.Is(err, ErrNoGrant) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("keep notes of active grants: %w", err)
	}
	return nil
}

func (s *Store) keep(ctx context.Context, c class, notes []Note, events [][]byte) error {
	err := s.write(ctx, c, func(tx *sql.Tx, h *head) error {
		if err := putNotes(ctx, tx, notes); err != nil {
			return err
		}
		for _, e := range events {
			if err := appendEntry(ctx, tx, h, Item{Data: e}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("keep notes: %w", err)
	}
	return nil
}

func putNotes(ctx context.Context, tx *sql.Tx, notes []Note) error {
	for _, n := range notes {
		if err := putNote(ctx, tx, n); err != nil {
			return err
		}
	}
	return nil
}

func putNote(ctx context.Context, tx *sql.Tx, n Note) (err error) {
	if len(n.Data) == 0 {
		_, err = tx.ExecContext(ctx, `DELETE FROM notes WHERE name = ?`, n.Name)
	} else {
		_, err = tx.ExecContext(ctx, `INSERT OR REPLACE INTO notes (name, data, sum) VALUES (?, ?, ?)`, n.Name, n.Data, n.sum())
	}
	return err
}

func (n Note) sum() []byte { return digest([]byte("sallyport note"), []byte(n.Name), n.Data) }

// Notes returns the notes whose names begin with a prefix, by name.
func (s *Store) Notes(ctx context.Context, prefix string) ([]Note, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT name, data, sum FROM notes WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name`, prefix)
	if err != nil {
		return nil, fmt.Errorf("read notes: %w", classify(err))
	}
	notes, err := scanNotes(rows)
	if err != nil {
		return nil, fmt.Errorf("read notes: %w", classify(err))
	}
	return notes, nil
}

func scanNotes(rows *sql.Rows) (notes []Note, err error) {
	defer rows.Close()
	for rows.Next() {
		var n Note
		var sum []byte
		if err := rows.Scan(&n.Name, &n.Data, &sum); err != nil {
			return nil, err
		}
		if !bytes.Equal(sum, n.sum()) {
			return nil, fmt.Errorf("%w: checksum of note %q does not fit", ErrDamaged, n.Name)
		}
		notes = append(notes, n)
	}
	return notes, rows.Err()
}

func verifyNotes(ctx context.Context, tx *sql.Tx, _ head) error {
	rows, err := tx.QueryContext(ctx, `SELECT name, data, sum FROM notes`)
	if err != nil {
		return err
	}
	_, err = scanNotes(rows)
	return err
}

// End is how one grant ended, with the critical entry that tells of it, and a note of what is to be known of it after.
type End struct {
	ID, State, Why string
	Event          []byte
	Note           Note // none without a name
}

// EndGrants is EndGrant for several grants in one durable transaction, all or none. Those that have ended already are left
// as they are.
func (s *Store) EndGrants(ctx context.Context, ends []End) error {
	err := s.write(ctx, urgent, func(tx *sql.Tx, h *head) error {
		for _, e := range ends {
			if err := endGrant(ctx, tx, h, e); err != nil && !errors.Is(err, ErrEnded) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("end grants: %w", err)
	}
	return nil
}
