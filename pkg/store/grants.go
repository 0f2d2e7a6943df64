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
	// NotAfter is until when somebody could hand it in again, by the wall clock. Zero: nobody can, as the node made it itself.
	NotAfter time.Time
	// Keep is until when it is kept after its end, by the wall clock; zero: for good.
	Keep time.Time
}

// Activate records in one durable transaction that the grant is used up, the grant itself, and the
// critical entry that tells of it, with notes that are about it. The caller may then, and only then, open the path. Nothing is written with
// ErrReplayed, if this grant was ever activated here; ErrOther, if another one has its id; ErrForgotten, if the store may have
// forgotten it; ErrFinal, if it was withdrawn or denied; ErrClockBehind and ErrDoubt, if the store cannot tell.
//
// What the node made itself finds no room in the part that is kept for people.
func (s *Store) Activate(ctx context.Context, row GrantRow, event []byte, notes ...Note) error {
	row.State = StateActive
	class := urgent
	if row.NotAfter.IsZero() {
		class = common
	}
	err := s.write(ctx, class, func(tx *sql.Tx, h *head) error {
		if err := h.admit(ctx, tx, row); err != nil {
			return err
		}
		if err := h.useUp(ctx, tx, row); err != nil {
			return err
		}
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

// admit says what speaks against the activation.
func (h *head) admit(ctx context.Context, tx *sql.Tx, row GrantRow) error {
	known, err := getGrant(ctx, tx, row.ID)
	if err == nil && known.Digest == row.Digest {
		return ErrReplayed
	}
	if err == nil {
		return fmt.Errorf("%w: it was activated at %s until %s, and its payload's digest is %s", ErrOther,
			known.Activated.Format(time.RFC3339), known.Deadline.Format(time.RFC3339), known.Digest)
	}
	if !errors.Is(err, ErrNoGrant) {
		return err
	}
	if !row.NotAfter.IsZero() && row.NotAfter.UnixNano() <= h.forgotten {
		return fmt.Errorf("%w: those that were to end by %s", ErrForgotten, instant(h.forgotten).Format(time.RFC3339))
	}
	if err := checkFinal(ctx, tx, row.Digest); err != nil {
		return err
	}
	return h.see(row.Activated)
}

// useUp notes the id for as long as the grant could be handed in again.
func (h *head) useUp(ctx context.Context, tx *sql.Tx, row GrantRow) error {
	if row.NotAfter.IsZero() {
		return nil
	}
	h.replayHash = replayHash(h.replayHash, row.ID, row.Digest)
	_, err := tx.ExecContext(ctx, `INSERT INTO replay (id, digest, hash) VALUES (?, ?, ?)`, row.ID, row.Digest, h.replayHash)
	return err
}

// EndGrant records the end of an active grant and the critical entry that tells of it, in one durable
// transaction. ErrNoGrant and ErrEnded say that there was nothing to end; nothing is written then.
func (s *Store) EndGrant(ctx context.Context, id, state, why string, event []byte) error {
	err := s.write(ctx, urgent, func(tx *sql.Tx, h *head) error {
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
	err := s.write(ctx, urgent, func(tx *sql.Tx, _ *head) error {
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

// Grants returns every grant that the node activated and has not forgotten, oldest first.
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

const selectGrants = `SELECT id, state, kind, digest, envelope, payload, activated, deadline, deadline_boot, boot_id, slots, signers, people, ended_why, not_after, keep, sum FROM grants`

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
	notAfter, keep                 int64 // Unix ns; 0: none
}

func (c grantCells) sum() []byte {
	return digest([]byte("sallyport grant"), []byte(c.id), []byte(c.state), []byte(c.kind), []byte(c.digest), c.envelope, c.payload, num(uint64(c.activated)), num(uint64(c.deadline)),
		num(uint64(c.deadlineBoot)), []byte(c.bootID), []byte(c.slots), []byte(c.signers), []byte(c.people), []byte(c.endedWhy), num(uint64(c.notAfter)), num(uint64(c.keep)))
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
		int64(g.DeadlineBoot), g.BootID, string(slots), string(signers), string(people), g.EndedWhy, nanos(g.NotAfter), nanos(g.Keep)}
	_, err = tx.ExecContext(ctx, `INSERT OR REPLACE INTO grants (id, state, kind, digest, envelope, payload, activated, deadline, deadline_boot, boot_id, slots, signers, people, ended_why, not_after, keep, sum)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		c.id, c.state, c.kind, c.digest, c.envelope, c.payload, c.activated, c.deadline, c.deadlineBoot, c.bootID, c.slots, c.signers, c.people, c.endedWhy, c.notAfter, c.keep, c.sum())
	return err
}

func scanGrant(row interface{ Scan(...any) error }) (GrantRow, error) {
	var c grantCells
	var sum []byte
	if err := row.Scan(&c.id, &c.state, &c.kind, &c.digest, &c.envelope, &c.payload, &c.activated, &c.deadline, &c.deadlineBoot,
		&c.bootID, &c.slots, &c.signers, &c.people, &c.endedWhy, &c.notAfter, &c.keep, &sum); err != nil {
		return GrantRow{}, err
	}
	if !bytes.Equal(sum, c.sum()) {
		return GrantRow{}, fmt.Errorf("%w: checksum of grant %q does not fit", ErrDamaged, c.id)
	}
	g := GrantRow{ID: c.id, State: c.state, Kind: c.kind, Digest: c.digest, Envelope: c.envelope, Payload: c.payload, Activated: time.Unix(0, c.activated).UTC(),
		Deadline: time.Unix(0, c.deadline).UTC(), DeadlineBoot: time.Duration(c.deadlineBoot), BootID: c.bootID, EndedWhy: c.endedWhy,
		NotAfter: instant(c.notAfter), Keep: instant(c.keep)}
	return g, errors.Join(json.Unmarshal([]byte(c.slots), &g.Slots), json.Unmarshal([]byte(c.signers), &g.Signers),
		json.Unmarshal([]byte(c.people), &g.People))
}

func replayHash(prev []byte, id, of string) []byte {
	return digest([]byte("sallyport replay"), prev, []byte(id), []byte(of))
}

// verifyReplay holds the chain of used ids: one that was taken out would let its grant in again.
func verifyReplay(ctx context.Context, tx *sql.Tx, h head) error {
	rows, err := tx.QueryContext(ctx, `SELECT id, digest, hash FROM replay ORDER BY n`)
	if err != nil {
		return err
	}
	defer rows.Close()
	prev := h.replayBase
	for rows.Next() {
		var id, of string
		var hash []byte
		if err := rows.Scan(&id, &of, &hash); err != nil {
			return err
		}
		if !bytes.Equal(hash, replayHash(prev, id, of)) {
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

// verifyGrants reads every grant, and finds a used one without its row, which is what Activate looks at.
func verifyGrants(ctx context.Context, tx *sql.Tx, _ head) error {
	var missing int
	if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM replay WHERE NOT EXISTS
		(SELECT 1 FROM grants WHERE grants.id = replay.id AND grants.digest = replay.digest AND not_after <> 0)`).Scan(&missing); err != nil {
		return err
	}
	if missing > 0 {
		return fmt.Errorf("%w: %d used ids without their grant", ErrDamaged, missing)
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
