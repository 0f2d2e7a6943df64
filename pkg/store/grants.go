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

// States of a grant on a node. A grant is active once and never again.
const (
	StateActive  = "active"
	StateExpired = "expired"
	StateRevoked = "revoked"
	StateSpent   = "spent"
)

// GrantRow is what the node remembers of a grant.
type GrantRow struct {
	ID           string
	State        string
	Kind         string        // empty: an ordinary grant
	Digest       string        // of the payload, as statements name it
	Envelope     []byte        // as it was handed in
	Payload      []byte        // JSON, verified
	Activated    time.Time     // wall clock
	Deadline     time.Time     // wall clock, for people
	DeadlineBoot time.Duration // CLOCK_BOOTTIME; means something only in the boot BootID
	BootID       string
	Slots        []uint32
	Signers      []string // ids of keys
	People       []string // whose signatures are on it, also by keys that counted no more
	EndedWhy     string
}

// Activate records in one durable transaction that the grant is used up, the grant itself, and the
// critical entry that tells of it, with notes that are about it. The caller may then, and only then, open the path. Nothing is written with
// ErrReplayed, if a grant with this id was ever activated here; ErrFinal, if it was withdrawn or denied; ErrClockBehind
// and ErrDoubt, if the store cannot tell.
func (s *Store) Activate(ctx context.Context, row GrantRow, event []byte, notes ...Note) error {
	row.State = StateActive
	err := s.write(ctx, func(tx *sql.Tx, h *head) error {
		var n int
		if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM replay WHERE id = ?`, row.ID).Scan(&n); err != nil {
			return err
		}
		if n > 0 {
			return ErrReplayed
		}
		if err := checkFinal(ctx, tx, row.Digest); err != nil {
			return err
		}
		if err := h.see(row.Activated); err != nil {
			return err
		}
		hash := replayHash(h.replayHash, row.ID)
		if _, err := tx.ExecContext(ctx, `INSERT INTO replay (id, hash) VALUES (?, ?)`, row.ID, hash); err != nil {
			return err
		}
		h.replayHash = hash
		if err := putGrant(ctx, tx, row); err != nil {
			return err
		}
		for _, n := range notes {
			if err := putNote(ctx, tx, n); err != nil {
				return err
			}
		}
		return appendEntry(ctx, tx, h, Item{Data: event})
	})
	if err != nil {
		return fmt.Errorf("activate grant %q: %w", row.ID, err)
	}
	return nil
}

// EndGrant records the end of an active grant and the critical entry that tells of it, in one durable
// transaction. ErrNoGrant and ErrEnded say that there was nothing to end; nothing is written then.
func (s *Store) EndGrant(ctx context.Context, id, state, why string, event []byte) error {
	err := s.write(ctx, func(tx *sql.Tx, h *head) error {
		return endGrant(ctx, tx, h, End{ID: id, State: state, Why: why, Event: event})
	})
	if err != nil {
		return fmt.Errorf("end grant %q: %w", id, err)
	}
	return nil
}

func endGrant(ctx context.Context, tx *sql.Tx, h *head, e End) error {
	row, err := getGrant(ctx, tx, e.ID)
	if err != nil {
		return err
	}
	if row.State != StateActive {
		return fmt.Errorf("%w: it is %s", ErrEnded, row.State)
	}
	row.State, row.EndedWhy = e.State, e.Why
	if err := putGrant(ctx, tx, row); err != nil {
		return err
	}
	if e.Note.Name != "" {
		if err := putNote(ctx, tx, e.Note); err != nil {
			return err
		}
	}
	return appendEntry(ctx, tx, h, Item{Data: e.Event})
}

// SetSlots notes the path slots that an active grant has.
func (s *Store) SetSlots(ctx context.Context, id string, slots []uint32) error {
	err := s.write(ctx, func(tx *sql.Tx, _ *head) error {
		row, err := getGrant(ctx, tx, id)
		if err != nil {
			return err
		}
		row.Slots = slots
		return putGrant(ctx, tx, row)
	})
	if err != nil {
		return fmt.Errorf("set slots of grant %q: %w", id, err)
	}
	return nil
}

// Grant returns one grant that the node activated: ErrNoGrant if there is none of that id.
func (s *Store) Grant(ctx context.Context, id string) (GrantRow, error) {
	g, err := scanGrant(s.db.QueryRowContext(ctx, selectGrants+` WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNoGrant
	}
	if err != nil {
		return GrantRow{}, fmt.Errorf("read grant %q: %w", id, classify(err))
	}
	return g, nil
}

// Grants returns every grant that the node ever activated, oldest first.
func (s *Store) Grants(ctx context.Context) ([]GrantRow, error) {
	return s.grants(ctx, selectGrants+` ORDER BY activated, id`)
}

// ActiveGrants returns those that have not ended, oldest first: few, however many there ever were.
func (s *Store) ActiveGrants(ctx context.Context) ([]GrantRow, error) {
	return s.grants(ctx, selectGrants+` WHERE state = '`+StateActive+`' ORDER BY activated, id`)
}

func (s *Store) grants(ctx context.Context, query string) ([]GrantRow, error) {
	rows, err := s.db.QueryContext(ctx, query)
	if err != nil {
		return nil, fmt.Errorf("read grants: %w", classify(err))
	}
	defer rows.Close()
	var out []GrantRow
	for rows.Next() {
		g, err := scanGrant(rows)
		if err != nil {
			return nil, fmt.Errorf("read grants: %w", classify(err))
		}
		out = append(out, g)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read grants: %w", classify(err))
	}
	return out, nil
}

const selectGrants = `SELECT id, state, kind, digest, envelope, payload, activated, deadline, deadline_boot, boot_id, slots, signers, people, ended_why, sum FROM grants`

func getGrant(ctx context.Context, tx *sql.Tx, id string) (GrantRow, error) {
	g, err := scanGrant(tx.QueryRowContext(ctx, selectGrants+` WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		return GrantRow{}, ErrNoGrant
	}
	return g, err
}

// grantCells is a grant as the table has it.
type grantCells struct {
	id, state, kind, digest        string
	envelope, payload              []byte
	activated, deadline            int64 // Unix ns
	deadlineBoot                   int64 // ns
	bootID, slots, signers, people string
	endedWhy                       string
}

func (c grantCells) sum() []byte {
	return digest([]byte("sallyport grant"), []byte(c.id), []byte(c.state), []byte(c.kind), []byte(c.digest), c.envelope, c.payload, num(uint64(c.activated)), num(uint64(c.deadline)),
		num(uint64(c.deadlineBoot)), []byte(c.bootID), []byte(c.slots), []byte(c.signers), []byte(c.people), []byte(c.endedWhy))
}

func putGrant(ctx context.Context, tx *sql.Tx, g GrantRow) error {
	slots, err := json.Marshal(g.Slots)
	if err != nil {
		return err
	}
	signers, err := json.Marshal(g.Signers)
	if err != nil {
		return err
	}
	people, err := json.Marshal(g.People)
	if err != nil {
		return err
	}
	c := grantCells{g.ID, g.State, g.Kind, g.Digest, notNil(g.Envelope), notNil(g.Payload), g.Activated.UnixNano(), g.Deadline.UnixNano(),
		int64(g.DeadlineBoot), g.BootID, string(slots), string(signers), string(people), g.EndedWhy}
	_, err = tx.ExecContext(ctx, `INSERT OR REPLACE INTO grants (id, state, kind, digest, envelope, payload, activated, deadline, deadline_boot, boot_id, slots, signers, people, ended_why, sum)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		c.id, c.state, c.kind, c.digest, c.envelope, c.payload, c.activated, c.deadline, c.deadlineBoot, c.bootID, c.slots, c.signers, c.people, c.endedWhy, c.sum())
	return err
}

func scanGrant(row interface{ Scan(...any) error }) (GrantRow, error) {
	var c grantCells
	var sum []byte
	if err := row.Scan(&c.id, &c.state, &c.kind, &c.digest, &c.envelope, &c.payload, &c.activated, &c.deadline, &c.deadlineBoot,
		&c.bootID, &c.slots, &c.signers, &c.people, &c.endedWhy, &sum); err != nil {
		return GrantRow{}, err
	}
	if !bytes.Equal(sum, c.sum()) {
		return GrantRow{}, fmt.Errorf("%w: checksum of grant %q does not fit", ErrDamaged, c.id)
	}
	g := GrantRow{ID: c.id, State: c.state, Kind: c.kind, Digest: c.digest, Envelope: c.envelope, Payload: c.payload, Activated: time.Unix(0, c.activated).UTC(),
		Deadline: time.Unix(0, c.deadline).UTC(), DeadlineBoot: time.Duration(c.deadlineBoot), BootID: c.bootID, EndedWhy: c.endedWhy}
	return g, errors.Join(json.Unmarshal([]byte(c.slots), &g.Slots), json.Unmarshal([]byte(c.signers), &g.Signers),
		json.Unmarshal([]byte(c.people), &g.People))
}

func replayHash(prev []byte, id string) []byte {
	return digest([]byte("sallyport replay"), prev, []byte(id))
}

// verifyReplay holds the chain of used ids: one that was taken out would let its grant in again.
func verifyReplay(ctx context.Context, tx *sql.Tx, h head) error {
	rows, err := tx.QueryContext(ctx, `SELECT id, hash FROM replay ORDER BY n`)
	if err != nil {
		return err
	}
	defer rows.Close()
	prev := digest([]byte("sallyport epoch"), []byte(h.epoch))
	for rows.Next() {
		var id string
		var hash []byte
		if err := rows.Scan(&id, &hash); err != nil {
			return err
		}
		if !bytes.Equal(hash, replayHash(prev, id)) {
			return fmt.Errorf("%w: chain of used grants breaks at %q", ErrDamaged, id)
		}
		prev = hash
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if !bytes.Equal(prev, h.replayHash) {
		return fmt.Errorf("%w: chain of used grants is cut off", ErrDamaged)
	}
	return nil
}

// verifyGrants reads every grant, and finds a used id without its grant.
func verifyGrants(ctx context.Context, tx *sql.Tx, _ head) error {
	var missing int
	if err := tx.QueryRowContext(ctx, `SELECT (SELECT count(*) FROM replay WHERE id NOT IN (SELECT id FROM grants)) +
		(SELECT count(*) FROM grants WHERE id NOT IN (SELECT id FROM replay))`).Scan(&missing); err != nil {
		return err
	}
	if missing > 0 {
		return fmt.Errorf("%w: %d grants without their used id, or used ids without their grant", ErrDamaged, missing)
	}
	rows, err := tx.QueryContext(ctx, selectGrants)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if _, err := scanGrant(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}
