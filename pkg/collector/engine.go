package collector

import (
	"context"
	"database/sql"
	"errors"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// engine is where a collector keeps what nodes send: SQLite files, or PostgreSQL. Both have the same tables for each day, and answer the
// same SQL, with parameters as $1.
type engine interface {
	// stored is what is durable.
	stored(ctx context.Context) stored
	// enter says that a node has a new stream, and returns its turn. What an earlier one has on the way is not stored from then on, at whichever collector.
	enter(ctx context.Context, node string) (turn int64, err error)
	// write runs do in one transaction on the day that it is, and makes it durable with what do says that it adds.
	write(ctx context.Context, do func(*transaction) (state, error)) error
	// days are those that have records, oldest first. Once there is a newer one, nothing is written to a day.
	days(ctx context.Context) ([]day, error)
	// hashes reads those of the log, also of days that are gone.
	hashes(ctx context.Context, indexes []int64) ([]tlog.Hash, error)
	// changed returns a channel that is closed after the next commit, of whichever collector.
	changed() <-chan struct{}
	// keep does what is due without a write: it is called now and then.
	keep(ctx context.Context)
	// kind tells cursors of one kind of engine from those of the other.
	kind() byte
	// damaged counts days that this process set aside.
	damaged() uint64
	close() error
}

// stored answers what is durable, but for the records themselves.
type stored interface {
	mark(sequence) (mark, error) // the zero mark if nothing is stored of it
	marks() (marks, error)
	nodeKey(nodeEpoch) (nodeKey, bool, error)
	head() (head, error)
	turn(node string) (int64, error) // of the node's last stream
}

// day is one day of receipt (UTC).
type day interface {
	name() string // as dayLayout
	// read runs do with the day's tables, which stay meanwhile. It returns false, and does nothing, if the day was removed.
	read(do func(tables) error) (bool, error)
}

// tables are those of one day.
type tables struct {
	*sql.DB
	suffix string // of their names
}

// transaction is one of the engine, on one day.
type transaction struct {
	ctx context.Context
	*sql.Tx
	stored // as it was before
	sink
	suffix   string // of the names of the day's tables
	received time.Time
}

// sink takes rows on their way into tables.
type sink interface {
	// add puts a row behind those that a table has, with values for its columns.
	add(table string, values ...any) error
	// flush brings what was added to where queries find it.
	flush() error
}

// querier is a database or a transaction.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// columns are those that rows are added with, beside ids.
var columns = map[string]string{
	"flows":        `node, epoch, class, seq, received, time, event, verdict, reason, service, identity, grant_id, client, client_port, server, server_port, data`,
	"grant_events": `node, epoch, class, seq, received, time, grant_id, step, leaf, data`,
	"losses":       `node, epoch, class, seq, received, stage, cause, count, at_most, data`,
	"tides":        `node, epoch, class, seq, received, time, grants, differing, data`,
	"batches":      `leaf, node, epoch, class, number, first, last, received`,
	"leaves":       `idx, data`,
	"hashes":       `idx, hash`,
	"keys":         `node, epoch, vkey, leaf`,
}

// errAway says that what is stored cannot be asked now.
var errAway = errors.New("the collector's database is away: ask again later, and look at the collector's log for why; nodes keep their records meanwhile")

// recordTables are those whose rows are records, with an id in the order of receipt.
var recordTables = []string{"flows", "grant_events", "losses", "tides"}

// put writes a mark, in the place of the one before.
func (t *transaction) put(s sequence, m mark) error {
	seal := m.seal
	if seal == nil {
		seal = []byte{} // nil would be NULL
	}
	_, err := t.ExecContext(t.ctx, `INSERT INTO marks (node, epoch, class, seq, lost, received, number, seal, breaks) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
		ON CONFLICT (node, epoch, class) DO UPDATE SET seq = excluded.seq, lost = excluded.lost, received = excluded.received,
			number = excluded.number, seal = excluded.seal, breaks = excluded.breaks`,
		s.node, s.epoch, int64(s.class), m.seq, m.lost, m.received.UnixNano(), m.number, seal, m.breaks)
	return err
}

const markColumns = `node, epoch, class, seq, lost, received, number, seal, breaks`

func scanMark(row interface{ Scan(...any) error }) (s sequence, m mark, err error) {
	var received int64
	err = row.Scan(&s.node, &s.epoch, &s.class, &m.seq, &m.lost, &received, &m.number, &m.seal, &m.breaks)
	m.received = time.Unix(0, received)
	return s, m, err
}

func readMarks(ctx context.Context, q querier) (marks, error) {
	rows, err := q.QueryContext(ctx, `SELECT `+markColumns+` FROM marks`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := marks{}
	for rows.Next() {
		s, m, err := scanMark(rows)
		if err != nil {
			return nil, err
		}
		all[s] = m
	}
	return all, rows.Err()
}

// hashReader reads the log's hashes for one caller.
type hashReader struct {
	ctx    context.Context
	engine engine
	seen   map[int64]tlog.Hash
}

// hashCache bounds what a reader remembers.
const hashCache = 1 << 16

func newHashReader(ctx context.Context, e engine) *hashReader {
	return &hashReader{ctx: ctx, engine: e, seen: map[int64]tlog.Hash{}}
}

// ReadHashes implements tlog.HashReader.
func (r *hashReader) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	if len(r.seen) >= hashCache {
		clear(r.seen)
	}
	var missing []int64
	for _, x := range indexes {
		if _, ok := r.seen[x]; !ok {
			missing = append(missing, x)
		}
	}
	read, err := r.engine.hashes(r.ctx, missing)
	if err != nil {
		return nil, err
	}
	for i, h := range read {
		r.seen[missing[i]] = h
	}
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = r.seen[x]
	}
	return out, nil
}

// bell wakes those who wait for a commit. Safe for concurrent use.
type bell struct {
	mu   sync.Mutex
	more chan struct{} // closed and replaced at each ring; guarded by mu
}

func newBell() *bell { return &bell{more: make(chan struct{})} }

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.more)
	b.more = make(chan struct{})
}

func (b *bell) changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.more
}
