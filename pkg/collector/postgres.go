package collector

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	// postgresChannel is where collectors tell each other that there is more.
	postgresChannel = "sallyport_records"
	// postgresLook is how often is looked whether there is more, with nobody saying so.
	postgresLook = 30 * time.Second
	// postgresWithin bounds a transaction, and the wait for a database that does not answer.
	postgresWithin = time.Minute
	postgresStart  = 10 * time.Second
	postgresAgain  = time.Second
	// lockWithin is how long a day that goes waits for those who read it: who writes waits as long.
	lockWithin = "2s"
)

// postgresEngine keeps a partition for each day. Other collectors write to it too, so that nothing of its state is remembered: a transaction
// reads what it needs after it has taken head for itself.
type postgresEngine struct {
	*bell
	*retention
	log     *slog.Logger
	lock    *os.File // of the directory of the key
	config  *pgx.ConnConfig
	writer  *sql.DB // of its own, so that readers cannot hold up the writer
	readers *sql.DB
	states  *sql.DB // for what nodes are told, so that readers cannot hold up that either

	stop      context.CancelFunc
	listening sync.WaitGroup
}

// ErrDatabase says that the database is away, or is not one that this collector may write to.
var ErrDatabase = errors.New("database cannot be used")

// CheckPostgres says what is wrong with the address of a database, and nothing of what is in it: that may be a password.
func CheckPostgres(address string) error {
	_, err := parsePostgres(address)
	return err
}

func parsePostgres(address string) (*pgx.ConnConfig, error) {
	c, err := pgx.ParseConfig(address)
	if err != nil {
		return nil, errors.New("the address of the database is neither postgres://USER@HOST/NAME nor host=HOST user=USER dbname=NAME")
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = "sallyport-collector"
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = postgresStart
	}
	if c.ValidateConnect == nil { // a standby is behind: nodes would be told that what they were acknowledged is gone
		c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	return c, nil
}

// openPostgres connects, makes the tables where there are none, and holds the log against its key.
func openPostgres(ctx context.Context, cfg Config) (_ engine, key logKey, err error) {
	e := &postgresEngine{bell: newBell(), retention: newRetention(cfg), log: cfg.Logger}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.close())
		}
	}()
	if e.config, err = parsePostgres(cfg.Postgres); err != nil {
		return nil, logKey{}, err
	}
	if e.lock, err = lockDir(cfg.Dir); err != nil {
		return nil, logKey{}, err
	}
	e.writer, e.readers, e.states = e.pool(1), e.pool(8), e.pool(4)
	starting, cancel := context.WithTimeout(ctx, postgresStart)
	defer cancel()
	err = e.transact(starting, func(_ *sql.Conn, tx *sql.Tx) (err error) {
		key, err = e.prepare(starting, tx, cfg)
		return err
	})
	if err == nil {
		var h head
		if h, err = e.stored(starting).head(); err == nil {
			err = h.check(key)
		}
	}
	if err != nil {
		name := cmp.Or(e.config.Database, e.config.User) // as the server takes it
		return nil, logKey{}, fmt.Errorf("%w: %s at %s: %v", ErrDatabase, name, e.config.Host, err)
	}
	listening, stop := context.WithCancel(ctx)
	e.stop = stop
	e.listening.Go(func() { e.listen(listening) })
	e.keep(ctx)
	return e, key, nil
}

func (e *postgresEngine) pool(size int) *sql.DB {
	db := stdlib.OpenDB(*e.config, stdlib.OptionAfterConnect(func(ctx context.Context, c *pgx.Conn) error {
		// What is acknowledged is durable, whatever the server does for others.
		_, err := c.Exec(ctx, `SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'`)
		return err
	}))
	db.SetMaxOpenConns(size)
	db.SetMaxIdleConns(size)
	db.SetConnMaxIdleTime(10 * time.Minute)
	return db
}

// prepare makes the tables of a database that has none, and returns the log's key. A database knows its log's key: another one is refused.
func (e *postgresEngine) prepare(ctx context.Context, tx *sql.Tx, cfg Config) (key logKey, err error) {
	if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock(hashtext($1))`, postgresChannel); err != nil { // two collectors may begin at once
		return logKey{}, err
	}
	var made bool
	var encoding string
	if err := tx.QueryRowContext(ctx, `SELECT to_regclass('head') IS NOT NULL, current_setting('server_encoding')`).Scan(&made, &encoding); err != nil {
		return logKey{}, err
	}
	if encoding != "UTF8" { // a text that it cannot write would hold up its node for ever
		return logKey{}, fmt.Errorf("its encoding is %s: make one with ENCODING 'UTF8' TEMPLATE template0", encoding)
	}
	if !made {
		return e.create(ctx, tx, cfg)
	}
	var version int
	var vkey string
	if err := tx.QueryRowContext(ctx, `SELECT layout, vkey FROM head`).Scan(&version, &vkey); err != nil {
		return logKey{}, err
	}
	if version != postgresLayout {
		return logKey{}, fmt.Errorf("it has layout %d, this program knows %d: give it a database of its own", version, postgresLayout)
	}
	path := filepath.Join(cfg.Dir, keyFile)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return logKey{}, fmt.Errorf("it has a log already, and %s is not there: copy it from a collector that has it", path)
	}
	if key, err = openLogKey(cfg.Dir, cfg.TrustDomain); err == nil && key.vkey != vkey {
		err = fmt.Errorf("its log has the key %s, and %s is another: copy it from a collector that has it", vkey, path)
	}
	return key, err
}

func (e *postgresEngine) create(ctx context.Context, tx *sql.Tx, cfg Config) (key logKey, err error) {
	if names, err := filepath.Glob(filepath.Join(cfg.Dir, "2*"+daySuffix+"*")); err != nil || len(names) > 0 {
		return logKey{}, errors.Join(err, fmt.Errorf("it is empty, and %s has days of a log: move them away with %s and %s, which are theirs", cfg.Dir, keyFile, publicKeyFile))
	}
	if key, err = openLogKey(cfg.Dir, cfg.TrustDomain); err != nil {
		return logKey{}, err
	}
	var h head
	if err := h.sign(key); err != nil {
		return logKey{}, err
	}
	if _, err := tx.ExecContext(ctx, postgresTables); err != nil {
		return logKey{}, fmt.Errorf("make tables: %w", err)
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO head (one, layout, vkey, base, last_id, size, checkpoint) VALUES (1, $1, $2, 0, 0, 0, $3)`,
		postgresLayout, key.vkey, h.checkpoint)
	return key, err
}

// transact runs do in a transaction of the writer.
func (e *postgresEngine) transact(ctx context.Context, do func(*sql.Conn, *sql.Tx) error) error {
	conn, err := e.writer.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := do(conn, tx); err != nil {
		return err
	}
	return tx.Commit()
}

func (e *postgresEngine) write(ctx context.Context, do func(*transaction) (state, error)) error {
	ctx, cancel := context.WithTimeout(ctx, postgresWithin)
	defer cancel()
	began := false
	err := e.transact(ctx, func(conn *sql.Conn, tx *sql.Tx) error {
		day, last, isNew, err := e.today(ctx, tx)
		if err != nil {
			return err
		}
		began = isNew
		c := &copies{ctx: ctx, conn: conn, suffix: suffixOf(day), last: last, rows: map[string][][]any{}}
		if _, err := do(&transaction{ctx: ctx, Tx: tx, stored: asked{e, ctx, tx}, sink: c, suffix: c.suffix, received: e.now()}); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `UPDATE head SET last_id = $1`, c.last)
		if err == nil {
			_, err = tx.ExecContext(ctx, `NOTIFY `+postgresChannel)
		}
		return err
	})
	e.ring()
	if began && err == nil {
		e.keep(ctx)
	}
	return e.away(err)
}

// enter waits for who is writing: his batch may be of the node.
func (e *postgresEngine) enter(ctx context.Context, node string) (turn int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, postgresWithin)
	defer cancel()
	err = e.transact(ctx, func(_ *sql.Conn, tx *sql.Tx) error {
		if err := take(ctx, tx); err != nil {
			return err
		}
		return tx.QueryRowContext(ctx, `INSERT INTO streams (node, turn) VALUES ($1, 1) ON CONFLICT (node) DO UPDATE SET turn = streams.turn + 1 RETURNING turn`, node).Scan(&turn)
	})
	return turn, err
}

// take has head for the transaction: nobody else writes then.
func take(ctx context.Context, tx *sql.Tx) error {
	_, err := tx.ExecContext(ctx, `SELECT one FROM head FOR UPDATE`)
	return err
}

// today takes head for the transaction, and returns the day to write to and the last id. It begins a day that is new. It never goes back to an older
// one, whatever the clocks of collectors do, or a reader who follows would miss what is written there.
func (e *postgresEngine) today(ctx context.Context, tx *sql.Tx) (day string, last int64, isNew bool, err error) {
	var size int64
	err = tx.QueryRowContext(ctx, `SELECT coalesce(to_char(day, 'YYYY-MM-DD'), ''), last_id, size FROM head FOR UPDATE`).Scan(&day, &last, &size)
	now := e.now().UTC().Format(dayLayout)
	if err != nil || day >= now {
		return day, last, false, err
	}
	if err := partitions(ctx, tx, now); err != nil {
		return "", 0, false, err
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO days (day, base) VALUES ($1, $2)`, now, size); err != nil {
		return "", 0, false, err
	}
	_, err = tx.ExecContext(ctx, `UPDATE head SET day = $1, base = size`, now)
	return now, last, true, err
}

// copies brings rows by COPY, all of a table at once.
type copies struct {
	ctx    context.Context
	conn   *sql.Conn
	suffix string
	last   int64 // id
	rows   map[string][][]any
}

func (c *copies) add(table string, values ...any) error {
	if slices.Contains(recordTables, table) {
		c.last++
		values = append([]any{c.last}, values...)
	}
	c.rows[table] = append(c.rows[table], values)
	return nil
}

func (c *copies) flush() error {
	return c.conn.Raw(func(driver any) error {
		to := driver.(*stdlib.Conn).Conn()
		for table, rows := range c.rows {
			names := strings.Split(columns[table], ", ")
			if slices.Contains(recordTables, table) {
				names = append([]string{"id"}, names...)
			}
			if slices.Contains(dated, table) {
				table += c.suffix
			}
			if _, err := to.CopyFrom(c.ctx, pgx.Identifier{table}, names, pgx.CopyFromRows(rows)); err != nil {
				return fmt.Errorf("copy to %s: %w", table, err)
			}
		}
		clear(c.rows)
		return nil
	})
}

// stored asks the database.
func (e *postgresEngine) stored(ctx context.Context) stored { return asked{e, ctx, e.states} }

// asked is what is durable, as the database says at each question.
type asked struct {
	e   *postgresEngine
	ctx context.Context
	q   querier
}

func (a asked) mark(s sequence) (mark, error) {
	_, m, err := scanMark(a.q.QueryRowContext(a.ctx, `SELECT `+markColumns+` FROM marks WHERE node = $1 AND epoch = $2 AND class = $3`, s.node, s.epoch, int64(s.class)))
	if errors.Is(err, sql.ErrNoRows) {
		return mark{}, nil
	}
	return m, a.e.away(err)
}

func (a asked) marks() (marks, error) {
	all, err := readMarks(a.ctx, a.q)
	return all, a.e.away(err)
}

func (a asked) nodeKey(of nodeEpoch) (k nodeKey, known bool, err error) {
	err = a.q.QueryRowContext(a.ctx, `SELECT vkey, leaf FROM keys WHERE node = $1 AND epoch = $2`, of.node, of.epoch).Scan(&k.vkey, &k.leaf)
	if errors.Is(err, sql.ErrNoRows) {
		return k, false, nil
	}
	return k, err == nil, a.e.away(err)
}

func (a asked) turn(node string) (turn int64, err error) {
	err = a.q.QueryRowContext(a.ctx, `SELECT turn FROM streams WHERE node = $1`, node).Scan(&turn)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return turn, a.e.away(err)
}

func (a asked) head() (h head, err error) {
	if err := a.q.QueryRowContext(a.ctx, `SELECT size, checkpoint FROM head`).Scan(&h.size, &h.checkpoint); err != nil {
		return h, a.e.away(err)
	}
	indexes := edgeIndexes(h.size)
	hashes, err := a.hashes(indexes)
	if err != nil {
		return h, err
	}
	h.edge = map[int64]tlog.Hash{}
	for i, x := range indexes {
		h.edge[x] = hashes[i]
	}
	return h, nil
}

// hashes are there for ever, whatever becomes of their day.
func (a asked) hashes(indexes []int64) ([]tlog.Hash, error) {
	rows, err := a.q.QueryContext(a.ctx, `SELECT idx, hash FROM hashes WHERE idx = ANY ($1)`, indexes)
	if err != nil {
		return nil, a.e.away(err)
	}
	defer rows.Close()
	read := map[int64]tlog.Hash{}
	for rows.Next() {
		var x int64
		var b []byte
		if err := rows.Scan(&x, &b); err != nil {
			return nil, err
		}
		if len(b) != tlog.HashSize {
			return nil, fmt.Errorf("%w: hash %d of the log has %d bytes", errDamaged, x, len(b))
		}
		read[x] = tlog.Hash(b)
	}
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		h, ok := read[x]
		if !ok && rows.Err() == nil {
			return nil, fmt.Errorf("%w: hash %d of the log is not there", errDamaged, x)
		}
		out[i] = h
	}
	return out, a.e.away(rows.Err())
}

func (e *postgresEngine) hashes(ctx context.Context, indexes []int64) ([]tlog.Hash, error) {
	return asked{e, ctx, e.states}.hashes(indexes)
}

func (e *postgresEngine) days(ctx context.Context) ([]day, error) { return e.daysBy(ctx, e.readers) }

func (e *postgresEngine) daysBy(ctx context.Context, q querier) (all []day, err error) {
	rows, err := q.QueryContext(ctx, `SELECT to_char(day, 'YYYY-MM-DD') FROM days ORDER BY day`)
	if err != nil {
		return nil, e.away(err)
	}
	defer rows.Close()
	for rows.Next() {
		d := postgresDay{e: e}
		if err := rows.Scan(&d.day); err != nil {
			return nil, err
		}
		all = append(all, d)
	}
	return all, e.away(rows.Err())
}

// postgresDay is a day's partitions.
type postgresDay struct {
	e   *postgresEngine
	day string
}

func (d postgresDay) name() string { return d.day }

func (d postgresDay) read(do func(tables) error) (bool, error) {
	err := do(tables{d.e.readers, suffixOf(d.day)})
	var p *pgconn.PgError
	if errors.As(err, &p) && p.Code == "42P01" { // undefined_table
		return false, nil
	}
	return true, d.e.away(err)
}

// away tells a database that is not there from what else goes wrong.
func (e *postgresEngine) away(err error) error {
	var p *pgconn.PgError
	var connect *pgconn.ConnectError
	var op *net.OpError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &p) && (strings.HasPrefix(p.Code, "57P") || strings.HasPrefix(p.Code, "08")), // shutdown, connection
		errors.As(err, &connect), errors.As(err, &op), errors.Is(err, driver.ErrBadConn), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		e.log.Error("database is away", "err", err)
		return errAway
	}
	return err
}

func (*postgresEngine) kind() byte { return 'p' }

func (e *postgresEngine) damaged() uint64 { return 0 }

// keep makes the next day's partitions, and drops a day that is over its time.
func (e *postgresEngine) keep(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, postgresWithin)
	defer cancel()
	if err := e.ahead(ctx); err != nil {
		e.log.ErrorContext(ctx, "partitions of the next day cannot be made", "err", err)
	}
	if err := e.drop(ctx); err != nil {
		e.log.ErrorContext(ctx, "day cannot be removed", "err", err)
	}
}

func (e *postgresEngine) ahead(ctx context.Context) error {
	day := e.now().UTC().AddDate(0, 0, 1).Format(dayLayout)
	return e.transact(ctx, func(_ *sql.Conn, tx *sql.Tx) error {
		if err := take(ctx, tx); err != nil {
			return err
		}
		return partitions(ctx, tx, day)
	})
}

func (e *postgresEngine) drop(ctx context.Context) error {
	days, err := e.daysBy(ctx, e.states) // who writes waits for this
	if err != nil {
		return err
	}
	var names []string
	for _, d := range days {
		names = append(names, d.name())
	}
	if !e.due(names) {
		return nil
	}
	err = e.transact(ctx, func(_ *sql.Conn, tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `SET LOCAL lock_timeout = '`+lockWithin+`'`); err != nil {
			return err
		}
		if err := take(ctx, tx); err != nil {
			return err
		}
		return removeDay(ctx, tx, names[0])
	})
	if err == nil {
		e.log.InfoContext(ctx, "day removed", "day", names[0])
	}
	return err
}

// listen rings when another collector has committed, until ctx ends.
func (e *postgresEngine) listen(ctx context.Context) {
	for {
		err := e.hear(ctx)
		if ctx.Err() != nil {
			return
		}
		e.log.WarnContext(ctx, "other collectors cannot be heard", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(postgresAgain):
		}
	}
}

func (e *postgresEngine) hear(ctx context.Context) error {
	conn, err := pgx.ConnectConfig(ctx, e.config)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, `LISTEN `+postgresChannel); err != nil {
		return err
	}
	for {
		e.ring() // first for what came before it could be heard
		wait, cancel := context.WithTimeout(ctx, postgresLook)
		_, err := conn.WaitForNotification(wait)
		late := wait.Err() != nil
		cancel()
		if late && ctx.Err() == nil {
			err = conn.Ping(ctx) // a connection that died without a word is found
		}
		if err != nil {
			return err
		}
	}
}

func (e *postgresEngine) close() error {
	if e.stop != nil {
		e.stop()
	}
	e.listening.Wait()
	var errs []error
	for _, db := range []*sql.DB{e.writer, e.readers, e.states} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	if e.lock != nil {
		errs = append(errs, e.lock.Close())
	}
	return errors.Join(errs...)
}
