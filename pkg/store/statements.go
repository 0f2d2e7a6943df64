package store

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Steps that statements take.
const (
	StepWithdrawn = "withdrawn"
	StepDenied    = "denied"
	StepReviewed  = "reviewed"
)

// StatementRow is what somebody said of a grant, whether the node ever activated it or not. It is never taken back.
type StatementRow struct {
	Digest   string // of the grant's payload: another grant by the same id is another
	Step     string
	Grant    string // id
	By       string // person
	At       time.Time
	Why      string
	Envelope []byte // as it was handed in
}

// State records in one durable transaction what somebody said of a grant, and the critical entry that tells of it. From
// then on a withdrawn or denied grant is ErrFinal. ErrStated: somebody said so before; nothing is written then.
func (s *Store) State(ctx context.Context, row StatementRow, event []byte) error {
	err := s.write(ctx, urgent, func(tx *sql.Tx, h *head) error {
		var n int
		if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM statements WHERE digest = ? AND step = ?`, row.Digest, row.Step).Scan(&n); err != nil {
			return err
		}
		if n > 0 {
			return ErrStated
		}
		cells, err := json.Marshal(row)
		if err != nil {
			return err
		}
		hash := statementHash(h.statementHash, row.Digest, row.Step, cells)
		if _, err := tx.ExecContext(ctx, `INSERT INTO statements (digest, step, cells, hash) VALUES (?, ?, ?, ?)`, row.Digest, row.Step, string(cells), hash); err != nil {
			return err
		}
		h.statementHash = hash
		return appendEntry(ctx, tx, h, Item{Data: event})
	})
	if err != nil {
		return fmt.Errorf("record statement about grant %q: %w", row.Grant, err)
	}
	return nil
}

// Statements returns what was said of grants, in its order.
func (s *Store) Statements(ctx context.Context) (out []StatementRow, err error) {
	rows, err := s.db.QueryContext(ctx, `SELECT cells FROM statements ORDER BY n`)
	if err != nil {
		return nil, fmt.Errorf("read statements: %w", classify(err))
	}
	defer rows.Close()
	for rows.Next() {
		row, err := scanStatement(rows)
		if err != nil {
			return nil, fmt.Errorf("read statements: %w", classify(err))
		}
		out = append(out, row)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read statements: %w", classify(err))
	}
	return out, nil
}

func scanStatement(row interface{ Scan(...any) error }) (s StatementRow, err error) {
	var cells string
	if err := row.Scan(&cells); err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(cells), &s)
}

// checkFinal gives ErrFinal, with who said so, for a grant that was withdrawn or denied.
func checkFinal(ctx context.Context, tx *sql.Tx, digest string) error {
	s, err := scanStatement(tx.QueryRowContext(ctx, `SELECT cells FROM statements WHERE digest = ? AND step IN (?, ?) ORDER BY n LIMIT 1`,
		digest, StepWithdrawn, StepDenied))
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: %s", ErrFinal, s)
}

// String says it in words: "denied by bob at 2026-11-22T10:00:00Z: not tonight".
func (s StatementRow) String() string {
	return fmt.Sprintf("%s by %s at %s: %s", s.Step, s.By, s.At.UTC().Format(time.RFC3339), s.Why)
}

func statementHash(prev []byte, digestOf, step string, cells []byte) []byte {
	return digest([]byte("sallyport statement"), prev, []byte(digestOf), []byte(step), cells)
}

// verifyStatements holds the chain: a statement that was taken out would let its grant in again.
func verifyStatements(ctx context.Context, tx *sql.Tx, h head) error {
	rows, err := tx.QueryContext(ctx, `SELECT digest, step, cells, hash FROM statements ORDER BY n`)
	if err != nil {
		return err
	}
	defer rows.Close()
	prev := startHash(h.epoch)
	for rows.Next() {
		var of, step, cells string
		var hash []byte
		if err := rows.Scan(&of, &step, &cells, &hash); err != nil {
			return err
		}
		if !bytes.Equal(hash, statementHash(prev, of, step, []byte(cells))) {
			return fmt.Errorf("%w: chain of statements breaks", ErrDamaged)
		}
		prev = hash
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if !bytes.Equal(prev, h.statementHash) {
		return fmt.Errorf("%w: chain of statements is cut off", ErrDamaged)
	}
	return nil
}
