package collector

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// layout is the version of the tables, kept in user_version.
const layout = 2

// The columns beside data are what queries filter by; data is the entry as it came, in the bytes that its node sealed. Times are
// Unix nanoseconds. Marks, keys and head are copied from day to day, and so are the hashes that the log needs to grow.
const tables = `
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
CREATE INDEX flows_time ON flows (time);
CREATE INDEX flows_grant ON flows (grant_id) WHERE grant_id <> '';
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
		for _, q := range []string{tables, fmt.Sprintf("PRAGMA user_version = %d", layout)} {
			if _, err := tx.ExecContext(ctx, q); err != nil {
				return err
			}
		}
		if err := copyState(ctx, tx, s); err != nil {
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

func copyState(ctx context.Context, tx *sql.Tx, s state) error {
	for seq, m := range s.marks {
		if err := putMark(ctx, tx, seq, m); err != nil {
			return err
		}
	}
	for of, k := range s.keys {
		if err := putKey(ctx, tx, of, k); err != nil {
			return err
		}
	}
	for at, h := range s.log.edge {
		if err := putHash(ctx, tx, at, h); err != nil {
			return err
		}
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO head (one, base, size, checkpoint) VALUES (1, ?, ?, ?)`, s.log.size, s.log.size, s.log.checkpoint)
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

func readMarks(ctx context.Context, db *sql.DB) (marks, error) {
	rows, err := db.QueryContext(ctx, `SELECT node, epoch, class, seq, lost, received, number, seal, breaks FROM marks`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := marks{}
	for rows.Next() {
		var s sequence
		var m mark
		var received int64
		if err := rows.Scan(&s.node, &s.epoch, &s.class, &m.seq, &m.lost, &received, &m.number, &m.seal, &m.breaks); err != nil {
			return nil, err
		}
		m.received = time.Unix(0, received)
		all[s] = m
	}
	return all, rows.Err()
}

func putMark(ctx context.Context, tx *sql.Tx, s sequence, m mark) error {
	seal := m.seal
	if seal == nil {
		seal = []byte{} // nil would be NULL
	}
	_, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO marks (node, epoch, class, seq, lost, received, number, seal, breaks) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		s.node, s.epoch, s.class, m.seq, m.lost, m.received.UnixNano(), m.number, seal, m.breaks)
	return err
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

func putKey(ctx context.Context, tx *sql.Tx, of nodeEpoch, k nodeKey) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO keys (node, epoch, vkey, leaf) VALUES (?, ?, ?, ?)`, of.node, of.epoch, k.vkey, k.leaf)
	return err
}

func putHash(ctx context.Context, tx *sql.Tx, at int64, h tlog.Hash) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO hashes (idx, hash) VALUES (?, ?)`, at, h[:])
	return err
}

func putBatch(ctx context.Context, tx *sql.Tx, s sequence, seal proof.Seal, leaf int64, received time.Time) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO batches (leaf, node, epoch, class, number, first, last, received) VALUES (?, ?, ?, ?, ?, ?, ?, ?)`,
		leaf, s.node, s.epoch, s.class, seal.Number, seal.First, seal.Last, received.UnixNano())
	return err
}

// row is an entry on its way into its table.
type row struct {
	sequence
	entry    *api.Entry
	data     []byte
	leaf     sql.NullInt64 // of a grant event
	received time.Time
}

// insert writes one entry into its table.
func insert(ctx context.Context, tx *sql.Tx, r row) error {
	var err error
	seq, received := r.entry.GetSeq(), r.received.UnixNano()
	switch e := r.entry.GetRecord().(type) {
	case *api.Entry_Flow:
		client, clientPort := splitAddr(e.Flow.GetClient())
		server, serverPort := splitAddr(e.Flow.GetServer())
		_, err = tx.ExecContext(ctx, `INSERT INTO flows (node, epoch, class, seq, received, time, event, verdict, reason, service, identity, grant_id,
			client, client_port, server, server_port, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			r.node, r.epoch, r.class, seq, received, nanos(e.Flow.GetTime(), r.received), e.Flow.GetEvent(), e.Flow.GetVerdict(), e.Flow.GetReason(),
			e.Flow.GetService(), e.Flow.GetIdentity(), e.Flow.GetGrant(), client, clientPort, server, serverPort, r.data)
	case *api.Entry_Grant:
		_, err = tx.ExecContext(ctx, `INSERT INTO grant_events (node, epoch, class, seq, received, time, grant_id, step, leaf, data)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			r.node, r.epoch, r.class, seq, received, nanos(e.Grant.GetTime(), r.received), e.Grant.GetGrant(), e.Grant.GetStep(), r.leaf, r.data)
	case *api.Entry_Loss:
		_, err = tx.ExecContext(ctx, `INSERT INTO losses (node, epoch, class, seq, received, stage, cause, count, at_most, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			r.node, r.epoch, r.class, seq, received, e.Loss.GetStage(), e.Loss.GetCause(), e.Loss.GetCount(), e.Loss.GetAtMost(), r.data)
	case *api.Entry_Tide:
		grants, differing := summary(e.Tide)
		_, err = tx.ExecContext(ctx, `INSERT INTO tides (node, epoch, class, seq, received, time, grants, differing, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			r.node, r.epoch, r.class, seq, received, nanos(e.Tide.GetTime(), r.received), grants, differing, r.data)
	default:
		err = fmt.Errorf("entry %d has no record", seq)
	}
	return err
}

// summary is what queries look for in a tide: the grants that it names, each between blanks, and whether any path differs.
func summary(t *api.Tide) (grants string, differing bool) {
	for _, p := range t.GetPaths() {
		grants += " " + p.GetGrant()
		differing = differing || p.GetCause() != ""
	}
	return grants + " ", differing
}

// splitAddr takes address and port apart, so that one address has one spelling. What is no address is
// kept as it is.
func splitAddr(s string) (addr string, port uint16) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr().Unmap().String(), ap.Port()
	}
	return s, 0
}

// nanos is the time for the index. A node's clock may say anything; the record keeps what it said.
func nanos(ts *timestamppb.Timestamp, received time.Time) int64 {
	if ts == nil || ts.CheckValid() != nil || ts.GetSeconds() < 0 || ts.GetSeconds() > math.MaxInt64/int64(time.Second)-1 {
		return received.UnixNano()
	}
	return ts.AsTime().UnixNano()
}
