package collector

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// layout is the version of the tables, kept in user_version.
const layout = 3

// The columns beside data are what queries filter by; data is the entry as it came, in the bytes that its node sealed. Times are
// Unix nanoseconds. Marks, keys and head are copied from day to day, and so are the hashes that the log needs to grow.
const sqliteTables = `
CREATE TABLE marks (
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL,
	seq INTEGER NOT NULL, lost INTEGER NOT NULL, received INTEGER NOT NULL,
	number INTEGER NOT NULL, seal BLOB NOT NULL, breaks INTEGER NOT NULL,
	PRIMARY KEY (node, epoch, class)
) STRICT;
CREATE TABLE keys (
	node TEXT NOT NULL, epoch TEXT NOT NULL,
	vkey TEXT NOT NULL, leaf INTEGER NOT NULL,
	PRIMARY KEY (node, epoch)
) STRICT;
CREATE TABLE head (
	one INTEGER PRIMARY KEY CHECK (one = 1),
	base INTEGER NOT NULL, size INTEGER NOT NULL, checkpoint BLOB NOT NULL
) STRICT;
CREATE TABLE leaves (idx INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE TABLE hashes (idx INTEGER PRIMARY KEY, hash BLOB NOT NULL) STRICT;
CREATE TABLE batches (
	leaf INTEGER PRIMARY KEY,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL,
	number INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
	received INTEGER NOT NULL,
	UNIQUE (node, epoch, class, number)
) STRICT;
CREATE INDEX batches_last ON batches (node, epoch, class, last);
CREATE TABLE flows (
	id INTEGER PRIMARY KEY,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL, seq INTEGER NOT NULL,
	received INTEGER NOT NULL, time INTEGER NOT NULL,
	event TEXT NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL,
	service TEXT NOT NULL, identity TEXT NOT NULL, grant_id TEXT NOT NULL,
	client TEXT NOT NULL, client_port INTEGER NOT NULL, server TEXT NOT NULL, server_port INTEGER NOT NULL,
	data BLOB NOT NULL,
	UNIQUE (node, epoch, class, seq)
) STRICT;
CREATE INDEX flows_time ON flows (time, service);
CREATE INDEX flows_grant ON flows (grant_id) WHERE grant_id <> '';
CREATE INDEX flows_identity ON flows (identity) WHERE identity <> '';
CREATE INDEX flows_reason ON flows (reason) WHERE reason <> 'IDENTITY' AND reason <> 'CLOSED';
CREATE INDEX flows_verdict ON flows (verdict) WHERE verdict <> 'PROXIED';
CREATE TABLE grant_events (
	id INTEGER PRIMARY KEY,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL, seq INTEGER NOT NULL,
	received INTEGER NOT NULL, time INTEGER NOT NULL,
	grant_id TEXT NOT NULL, step TEXT NOT NULL,
	leaf INTEGER,
	data BLOB NOT NULL,
	UNIQUE (node, epoch, class, seq)
) STRICT;
CREATE INDEX grant_events_grant ON grant_events (grant_id);
CREATE TABLE tides (
	id INTEGER PRIMARY KEY,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL, seq INTEGER NOT NULL,
	received INTEGER NOT NULL, time INTEGER NOT NULL,
	grants TEXT NOT NULL, differing INTEGER NOT NULL,
	data BLOB NOT NULL,
	UNIQUE (node, epoch, class, seq)
) STRICT;
CREATE TABLE losses (
	id INTEGER PRIMARY KEY,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL, seq INTEGER NOT NULL,
	received INTEGER NOT NULL,
	stage TEXT NOT NULL, cause TEXT NOT NULL, count INTEGER NOT NULL, at_most INTEGER NOT NULL,
	data BLOB NOT NULL,
	UNIQUE (node, epoch, class, seq)
) STRICT;
`

// common are values that most records have. Indexes leave them out, and SQLite takes such an index only where a query leaves them out too.
var common = map[string][]string{"grant_id": {""}, "identity": {""}, "reason": {"IDENTITY", "CLOSED"}, "verdict": {"PROXIED"}}

// sequence is one run of numbers of one node.
type sequence struct {
	node, epoch string
	class       api.Class
}

// mark is how far a sequence is stored.
type mark struct {
	seq      uint64 // everything up to it is stored, or counted as lost
	lost     uint64
	received time.Time // the last batch

	number uint64 // of the last seal; 0: there was none
	seal   []byte // the last one, signed
	breaks uint64 // seals that did not continue their chain
}

type marks map[sequence]mark

type nodeEpoch struct{ node, epoch string }

// nodeKey is what a node seals with in an epoch, and the leaf that says so.
type nodeKey struct {
	vkey string
	leaf int64
}

type nodeKeys map[nodeEpoch]nodeKey

// state is what is durable, but for the records themselves.
type state struct {
	marks marks
	keys  nodeKeys
	log   head
}

// checkSeals holds the last seals against the keys of their nodes. With another seal or key than its own a node could not go on.
func (s state) checkSeals() error {
	for of, m := range s.marks {
		if m.number == 0 && len(m.seal) == 0 {
			continue
		}
		key, err := note.NewVerifier(s.keys[nodeEpoch{of.node, of.epoch}].vkey)
		var last proof.Seal
		if err == nil {
			last, err = proof.OpenSeal(m.seal, key)
		}
		if err == nil && (last.Sequence != of.proofSequence() || last.Number != m.number || last.Last > m.seq) {
			err = fmt.Errorf("it is over %d to %d", last.First, last.Last)
		}
		if err != nil {
			return fmt.Errorf("%w: seal %d of node %q in epoch %s: %w", errDamaged, m.number, of.node, of.epoch, err)
		}
	}
	return nil
}

// prepare makes the tables of a day that has none: it is new, or it was begun when a process ended.
func (f *dayFile) prepare(ctx context.Context, s state) error {
	_, err := f.state(ctx)
	if errors.Is(err, errNoTables) {
		return f.create(ctx, s)
	}
	return err
}

// create makes the tables, with the state so far, in one transaction: a file has all of it or nothing.
func (f *dayFile) create(ctx context.Context, s state) error {
	_, err := f.write(func(db *sql.DB) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		for _, q := range []string{sqliteTables, fmt.Sprintf("PRAGMA user_version = %d", layout)} {
			if _, err := tx.ExecContext(ctx, q); err != nil {
				return err
			}
		}
		if err := copyState(&transaction{ctx: ctx, Tx: tx, sink: newInserts(ctx, tx)}, s); err != nil {
			return err
		}
		return tx.Commit()
	})
	if err != nil {
		return fmt.Errorf("create day %s: %w", f.day, err)
	}
	f.base = s.log.size
	return nil
}

func copyState(tx *transaction, s state) error {
	for seq, m := range s.marks {
		if err := tx.put(seq, m); err != nil {
			return err
		}
	}
	for of, k := range s.keys {
		if err := tx.add("keys", of.node, of.epoch, k.vkey, k.leaf); err != nil {
			return err
		}
	}
	for at, h := range s.log.edge {
		if err := tx.add("hashes", at, h[:]); err != nil {
			return err
		}
	}
	_, err := tx.ExecContext(tx.ctx, `INSERT INTO head (one, base, size, checkpoint) VALUES (1, $1, $1, $2)`, s.log.size, s.log.checkpoint)
	return err
}

// errNoTables says that the file was made, but not filled, when the process ended.
var errNoTables = errors.New("day has no tables")

func (f *dayFile) state(ctx context.Context) (s state, err error) {
	_, err = f.write(func(db *sql.DB) error {
		var version int
		if err := db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
			return err
		}
		switch version {
		case layout:
			s, err = f.readState(ctx, db)
			return err
		case 0:
			return errNoTables
		}
		return fmt.Errorf("it has layout %d, this program knows %d: move the directory's records away, and begin with an empty one", version, layout)
	})
	if err != nil {
		return state{}, fmt.Errorf("read state of day %s: %w", f.day, err)
	}
	return s, nil
}

func (f *dayFile) readState(ctx context.Context, db *sql.DB) (s state, err error) {
	if s.marks, err = readMarks(ctx, db); err != nil {
		return state{}, err
	}
	if s.keys, err = readKeys(ctx, db); err != nil {
		return state{}, err
	}
	if err := db.QueryRowContext(ctx, `SELECT base, size, checkpoint FROM head`).Scan(&f.base, &s.log.size, &s.log.checkpoint); err != nil {
		if errors.Is(err, sql.ErrNoRows) {
			err = fmt.Errorf("%w: it has no head of the log", errDamaged)
		}
		return state{}, err
	}
	s.log.edge, err = readEdge(ctx, db, s.log.size)
	return s, err
}

func readKeys(ctx context.Context, db *sql.DB) (nodeKeys, error) {
	rows, err := db.QueryContext(ctx, `SELECT node, epoch, vkey, leaf FROM keys`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := nodeKeys{}
	for rows.Next() {
		var of nodeEpoch
		var k nodeKey
		if err := rows.Scan(&of.node, &of.epoch, &k.vkey, &k.leaf); err != nil {
			return nil, err
		}
		all[of] = k
	}
	return all, rows.Err()
}
