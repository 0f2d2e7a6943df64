package collector

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/tlog"
)

// sqliteEngine keeps a file for each day. Nobody else writes to them, so what is durable is known without asking.
type sqliteEngine struct {
	*bell
	files   *days
	archive archive
	key     logKey

	mu    sync.Mutex
	state state // what is durable; guarded by mu
}

// openSQLite takes the files as they are found, and sets aside what is damaged.
func openSQLite(ctx context.Context, d *days, td spiffeid.TrustDomain) (*sqliteEngine, error) {
	e := &sqliteEngine{bell: newBell(), files: d, archive: newArchive(d.dir)}
	s, newest, err := d.recover(ctx)
	if err != nil {
		return nil, err
	}
	if e.key, err = openLogKey(d.dir, td); err != nil {
		return nil, err
	}
	if e.state, err = e.sound(ctx, s, newest); err != nil {
		return nil, err
	}
	for _, f := range d.all() {
		if err := f.prepare(ctx, e.state); err != nil {
			return nil, err
		}
	}
	d.archive = e.archive.keep
	d.drop(ctx)
	return e, nil
}

// sound holds the newest day's log against its checkpoint and its seals against their keys, and goes back to the day before where it is damaged. With no day that is
// sound it begins anew.
func (e *sqliteEngine) sound(ctx context.Context, s state, newest *dayFile) (state, error) {
	for newest != nil {
		err := errors.Join(s.log.check(e.key), s.checkSeals())
		if !errors.Is(err, errDamaged) {
			return s, err
		}
		if err := e.files.setAside(ctx, &damage{newest, err}); err != nil {
			return state{}, err
		}
		if s, newest, err = e.files.recover(ctx); err != nil {
			return state{}, err
		}
	}
	s = state{marks: marks{}, keys: nodeKeys{}}
	return s, s.log.sign(e.key)
}

// close is for after the last use.
func (e *sqliteEngine) close() error {
	return errors.Join(e.archive.file.close(), e.files.close())
}

// stored answers from memory.
func (e *sqliteEngine) stored(context.Context) stored { return cached{e} }

// cached is what is durable, as the engine knows it.
type cached struct{ e *sqliteEngine }

func (c cached) mark(s sequence) (mark, error) {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	return c.e.state.marks[s], nil
}

func (c cached) marks() (marks, error) {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	return maps.Clone(c.e.state.marks), nil
}

func (c cached) nodeKey(of nodeEpoch) (nodeKey, bool, error) {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	k, ok := c.e.state.keys[of]
	return k, ok, nil
}

func (c cached) head() (head, error) {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	return c.e.state.log, nil
}

// enter has nothing to do: a node's streams are all at this collector, which ends the one before.
func (*sqliteEngine) enter(context.Context, string) (int64, error) { return 0, nil }

func (cached) turn(string) (int64, error) { return 0, nil }

func (e *sqliteEngine) days(context.Context) (all []day, err error) {
	for _, f := range e.files.all() {
		all = append(all, sqliteDay{f, e.files})
	}
	return all, nil
}

func (*sqliteEngine) kind() byte { return 's' }

func (e *sqliteEngine) damaged() uint64 {
	e.files.mu.Lock()
	defer e.files.mu.Unlock()
	return e.files.damaged
}

func (e *sqliteEngine) write(ctx context.Context, do func(*transaction) (state, error)) error {
	file, err := e.today(ctx)
	var reached *state
	if err == nil {
		reached, err = e.writeTo(ctx, file, do)
	}
	if err != nil { // a commit that failed may yet have taken place: the file knows
		reached = e.reached(ctx)
	}
	e.publish(reached)
	return err
}

func (e *sqliteEngine) publish(reached *state) {
	e.mu.Lock()
	if reached != nil {
		maps.Copy(e.state.marks, reached.marks)
		maps.Copy(e.state.keys, reached.keys)
		e.state.log = reached.log
	}
	e.mu.Unlock()
	e.ring()
}

// reached reads the state from the newest day, or nil if it cannot be read now.
func (e *sqliteEngine) reached(ctx context.Context) *state {
	files := e.files.all()
	if len(files) == 0 {
		return nil
	}
	s, err := files[len(files)-1].state(ctx)
	if err != nil {
		return nil
	}
	return &s
}

func (e *sqliteEngine) writeTo(ctx context.Context, file *dayFile, do func(*transaction) (state, error)) (reached *state, err error) {
	ok, err := file.write(func(db *sql.DB) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		s, err := do(&transaction{ctx: ctx, Tx: tx, stored: cached{e}, sink: newInserts(ctx, tx), received: e.files.now()})
		if err != nil {
			return err
		}
		reached = &s
		return tx.Commit()
	})
	if err == nil && !ok {
		err = errStopping
	}
	if bad := file.damageBehind(ctx, err); bad != nil {
		err = errors.Join(err, e.mend(ctx, bad))
	}
	return reached, err
}

// today returns the file of the day, made if it is a new day.
func (e *sqliteEngine) today(ctx context.Context) (*dayFile, error) {
	if err := e.mendFound(ctx); err != nil {
		return nil, err
	}
	f, isNew := e.files.today()
	if !isNew {
		return f, nil
	}
	e.mu.Lock()
	s := e.state // nobody else writes: the maps stay as they are
	e.mu.Unlock()
	if err := f.prepare(ctx, s); err != nil {
		return nil, errors.Join(err, f.close())
	}
	e.files.add(ctx, f)
	return f, nil
}

func (e *sqliteEngine) keep(ctx context.Context) {
	if err := e.mendFound(ctx); err != nil {
		e.files.log.ErrorContext(ctx, "damaged day stays in use", "err", err)
	}
	e.files.drop(ctx)
}

// mend sets the newest day aside and goes back to the marks of the one before, so that nodes see what is gone.
func (e *sqliteEngine) mend(ctx context.Context, bad *damage) error {
	if err := e.files.setAside(ctx, bad); err != nil {
		return err
	}
	s, newest, err := e.files.recover(ctx)
	if err == nil {
		s, err = e.sound(ctx, s, newest)
	}
	if err != nil {
		return err
	}
	e.mu.Lock()
	e.state = s
	e.mu.Unlock()
	return nil
}

// mendFound is mend of what a reader found.
func (e *sqliteEngine) mendFound(ctx context.Context) error {
	if bad := e.files.toMend(); bad != nil {
		return e.mend(ctx, bad)
	}
	return nil
}

// hashes looks for each in the day in which its leaf came, then in the archive, and last in later days: they began with a few of them.
func (e *sqliteEngine) hashes(ctx context.Context, indexes []int64) (out []tlog.Hash, err error) {
	for _, x := range indexes {
		h, err := e.hash(ctx, x)
		if err != nil {
			return nil, fmt.Errorf("read hash %d of the log: %w", x, err)
		}
		out = append(out, h)
	}
	return out, nil
}

func (e *sqliteEngine) hash(ctx context.Context, at int64) (h tlog.Hash, err error) {
	files := e.files.all()
	slices.Reverse(files)
	after := slices.IndexFunc(files, func(f *dayFile) bool { return tlog.StoredHashCount(f.base) <= at })
	places := slices.Clone(files)
	if after >= 0 {
		places = append([]*dayFile{files[after]}, files[:after]...)
	}
	if _, err := os.Stat(e.archive.file.path); err == nil {
		places = slices.Insert(places, min(1, len(places)), e.archive.file)
	}
	for _, f := range places {
		ok, err := f.read(func(db *sql.DB) (err error) {
			h, err = readHash(ctx, db, at)
			return err
		})
		if ok && err == nil {
			return h, nil
		}
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return h, e.files.found(context.WithoutCancel(ctx), err)
		}
	}
	return h, errors.New("it is gone with its day")
}

// sqliteDay is a file for those who read.
type sqliteDay struct {
	file  *dayFile
	files *days
}

func (d sqliteDay) name() string { return d.file.day }

func (d sqliteDay) read(do func(tables) error) (bool, error) {
	ok, err := d.file.read(func(db *sql.DB) error { return do(tables{DB: db}) })
	if err != nil {
		err = d.files.found(context.Background(), err)
	}
	return ok, err
}

// inserts adds each row at once.
type inserts struct {
	ctx      context.Context
	tx       *sql.Tx
	prepared map[string]*sql.Stmt // by table; they end with the transaction
}

func newInserts(ctx context.Context, tx *sql.Tx) inserts {
	return inserts{ctx, tx, map[string]*sql.Stmt{}}
}

func (i inserts) add(table string, values ...any) (err error) {
	s, ok := i.prepared[table]
	if !ok {
		marks := strings.TrimSuffix(strings.Repeat("?, ", len(values)), ", ")
		if s, err = i.tx.PrepareContext(i.ctx, fmt.Sprintf(`INSERT INTO %s (%s) VALUES (%s)`, table, columns[table], marks)); err != nil {
			return err
		}
		i.prepared[table] = s
	}
	_, err = s.ExecContext(i.ctx, values...)
	return err
}

func (inserts) flush() error { return nil }
