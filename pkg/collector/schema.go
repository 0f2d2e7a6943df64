package collector

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// layout is the version of the tables, kept in user_version.
const layout = 1

// The columns beside data are what queries filter by; data is the record as it came, in protobuf.
// Times are Unix nanoseconds.
const tables = `
CREATE TABLE marks (
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL,
	seq INTEGER NOT NULL,
	PRIMARY KEY (node, epoch, class)
) STRICT;
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

// marks say how far each sequence is stored.
type marks map[sequence]uint64

// prepare makes the tables of a day that has none: it is new, or it was begun when a process ended.
func (f *dayFile) prepare(ctx context.Context, m marks) error {
	_, err := f.marks(ctx)
	if errors.Is(err, errNoTables) {
		return f.create(ctx, m)
	}
	return err
}

// create makes the tables, with the marks that hold so far, in one transaction: a file has all of it
// or nothing.
func (f *dayFile) create(ctx context.Context, m marks) error {
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
		for seq, n := range m {
			if err := putMark(ctx, tx, seq, n); err != nil {
				return err
			}
		}
		return tx.Commit()
	})
	if err != nil {
		return fmt.Errorf("create day %s: %w", f.day, err)
	}
	return nil
}

// errNoTables says that the file was made, but not filled, when the process ended.
var errNoTables = errors.New("day has no tables")

func (f *dayFile) marks(ctx context.Context) (m marks, err error) {
	_, err = f.write(func(db *sql.DB) error {
		var version int
		if err := db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
			return err
		}
		switch version {
		case layout:
			m, err = readMarks(ctx, db)
			return err
		case 0:
			return errNoTables
		}
		return fmt.Errorf("it has layout %d, this program knows %d", version, layout)
	})
	if err != nil {
		return nil, fmt.Errorf("read marks of day %s: %w", f.day, err)
	}
	return m, nil
}

func readMarks(ctx context.Context, db *sql.DB) (marks, error) {
	rows, err := db.QueryContext(ctx, `SELECT node, epoch, class, seq FROM marks`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	m := marks{}
	for rows.Next() {
		var s sequence
		var n uint64
		if err := rows.Scan(&s.node, &s.epoch, &s.class, &n); err != nil {
			return nil, err
		}
		m[s] = n
	}
	return m, rows.Err()
}

func putMark(ctx context.Context, tx *sql.Tx, s sequence, n uint64) error {
	_, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO marks (node, epoch, class, seq) VALUES (?, ?, ?, ?)`, s.node, s.epoch, s.class, n)
	return err
}

// insert writes one entry into its table.
func insert(ctx context.Context, tx *sql.Tx, s sequence, e *api.Entry, received time.Time) error {
	switch r := e.GetRecord().(type) {
	case *api.Entry_Flow:
		return insertFlow(ctx, tx, s, e.GetSeq(), r.Flow, received)
	case *api.Entry_Grant:
		return insertGrantEvent(ctx, tx, s, e.GetSeq(), r.Grant, received)
	case *api.Entry_Loss:
		return insertLoss(ctx, tx, s, e.GetSeq(), r.Loss, received)
	}
	return fmt.Errorf("entry %d has no record", e.GetSeq())
}

func insertFlow(ctx context.Context, tx *sql.Tx, s sequence, seq uint64, r *api.FlowRecord, received time.Time) error {
	data, err := proto.Marshal(r)
	if err != nil {
		return err
	}
	client, clientPort := splitAddr(r.GetClient())
	server, serverPort := splitAddr(r.GetServer())
	_, err = tx.ExecContext(ctx, `INSERT INTO flows (node, epoch, class, seq, received, time, event, verdict, reason, service, identity, grant_id,
		client, client_port, server, server_port, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		s.node, s.epoch, s.class, seq, received.UnixNano(), nanos(r.GetTime(), received), r.GetEvent(), r.GetVerdict(), r.GetReason(),
		r.GetService(), r.GetIdentity(), r.GetGrant(), client, clientPort, server, serverPort, data)
	return err
}

func insertGrantEvent(ctx context.Context, tx *sql.Tx, s sequence, seq uint64, r *api.GrantEvent, received time.Time) error {
	data, err := proto.Marshal(r)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO grant_events (node, epoch, class, seq, received, time, grant_id, step, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		s.node, s.epoch, s.class, seq, received.UnixNano(), nanos(r.GetTime(), received), r.GetGrant(), r.GetStep(), data)
	return err
}

func insertLoss(ctx context.Context, tx *sql.Tx, s sequence, seq uint64, r *api.LossRecord, received time.Time) error {
	data, err := proto.Marshal(r)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO losses (node, epoch, class, seq, received, stage, cause, count, at_most, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		s.node, s.epoch, s.class, seq, received.UnixNano(), r.GetStage(), r.GetCause(), r.GetCount(), r.GetAtMost(), data)
	return err
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
