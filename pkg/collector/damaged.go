package collector

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// errDamaged says that a day is not what was written.
var errDamaged = errors.New("damaged")

// damagedMark stands in the name of a file that was set aside, after the name that it had.
const damagedMark = ".damaged-"

// damage is what was found wrong in the file of a day.
type damage struct {
	file *dayFile
	err  error
}

func (d *damage) Error() string { return fmt.Sprintf("day %s is damaged: %v", d.file.day, d.err) }
func (d *damage) Unwrap() error { return d.err }

// findDamage tells damage of the file from what else can go wrong with it.
func (f *dayFile) findDamage(err error) error {
	var known *damage
	var e *sqlite.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	isDamage := errors.Is(err, errDamaged)
	if errors.As(err, &e) {
		code := e.Code() & 0xff
		isDamage = isDamage || code == sqlite3.SQLITE_CORRUPT || code == sqlite3.SQLITE_NOTADB
	}
	if isDamage {
		return &damage{f, err}
	}
	return err
}

// damageBehind returns the damage because of which a write failed, or nil. A number that is there twice may be one: it is not if the marks
// of the file fit its records, and only what this process made of them did not.
func (f *dayFile) damageBehind(ctx context.Context, err error) *damage {
	var e *sqlite.Error
	if errors.As(err, &e) && e.Code()&0xff == sqlite3.SQLITE_CONSTRAINT {
		var s state
		if s, err = f.look(ctx); err == nil {
			err = f.verify(ctx, s.marks, nil)
		}
	}
	var bad *damage
	errors.As(err, &bad)
	return bad
}

// recover sets aside the days that are damaged, and returns the newest that is sound with its state, or nil. What a damaged day had is gone for
// the collector; nodes see that by the marks, and count it.
func (d *days) recover(ctx context.Context) (state, *dayFile, error) {
	type sound struct {
		file  *dayFile
		state state
	}
	var kept []sound
	for _, f := range d.all() {
		s, err := f.look(ctx)
		var bad *damage
		switch {
		case errors.Is(err, errNoTables): // it gets them
		case errors.As(err, &bad):
			if err := d.setAside(ctx, bad); err != nil {
				return state{}, nil, err
			}
		case err != nil:
			return state{}, nil, err
		default:
			kept = append(kept, sound{f, s})
		}
	}
	for n := len(kept); n > 0; n-- {
		var before marks
		if n > 1 {
			before = kept[n-2].state.marks
		}
		newest, bad := kept[n-1], (*damage)(nil)
		if err := newest.file.verify(ctx, newest.state.marks, before); !errors.As(err, &bad) {
			return newest.state, newest.file, err
		}
		if err := d.setAside(ctx, bad); err != nil {
			return state{}, nil, err
		}
	}
	return state{}, nil, nil
}

// look reads the state, if the tables are ours.
func (f *dayFile) look(ctx context.Context) (s state, err error) {
	if info, err := os.Lstat(f.path); err == nil && !info.Mode().IsRegular() {
		return state{}, fmt.Errorf("day %s: %s is no file; move it away", f.day, f.path)
	}
	want, err := schemaOf(ctx)
	if err != nil {
		return state{}, err
	}
	f.unclean = f.hasLog()
	_, err = f.write(func(db *sql.DB) error {
		have, err := readSchema(ctx, db)
		var version int
		if err == nil {
			err = db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version)
		}
		switch {
		case err != nil:
			return err
		case version == layout && !have.has(want):
			return fmt.Errorf("%w: its tables are not those of layout %d", errDamaged, layout)
		case version != layout && have.has(want) && want.has(have), version == 0 && len(have) > 0:
			return fmt.Errorf("%w: it has the tables of layout %d, and says that it has %d", errDamaged, layout, version)
		}
		return nil
	})
	if err != nil {
		return state{}, fmt.Errorf("look at day %s: %w", f.day, err)
	}
	return f.state(ctx)
}

// hasLog tells whether the process that wrote the file last did not close it.
func (f *dayFile) hasLog() bool {
	info, err := os.Stat(f.path + "-wal")
	return err == nil && info.Size() > 0
}

// schema is what a database has, in SQL.
type schema map[string]bool

func (s schema) has(other schema) bool {
	for q := range other {
		if !s[q] {
			return false
		}
	}
	return true
}

// schemaOf is what readSchema finds in a sound day of this layout.
func schemaOf(ctx context.Context) (schema, error) {
	db, err := sql.Open("sqlite", ":memory:")
	if err != nil {
		return nil, err
	}
	defer db.Close()
	db.SetMaxOpenConns(1) // each connection has a memory of its own
	if _, err := db.ExecContext(ctx, sqliteTables); err != nil {
		return nil, err
	}
	return readSchema(ctx, db)
}

func readSchema(ctx context.Context, db *sql.DB) (schema, error) {
	rows, err := db.QueryContext(ctx, `SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\_%' ESCAPE '\'`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	s := schema{}
	for rows.Next() {
		var q string
		if err := rows.Scan(&q); err != nil {
			return nil, err
		}
		s[q] = true
	}
	return s, rows.Err()
}

// verify holds the marks against the records, and against the day before: those of a node never fall. Marks that are too high would hide
// that records are missing, marks that are too low could not be continued. The pages are looked at if the file was not closed.
func (f *dayFile) verify(ctx context.Context, m, before marks) error {
	_, err := f.write(func(db *sql.DB) error {
		if f.unclean {
			var result string
			if err := db.QueryRowContext(ctx, `PRAGMA quick_check(1)`).Scan(&result); err != nil {
				return err
			}
			if result != "ok" {
				return fmt.Errorf("%w: %s", errDamaged, result)
			}
			if err := hasMarks(ctx, db, m); err != nil {
				return err
			}
		}
		for s, was := range before {
			if m[s].seq < was.seq {
				return fmt.Errorf("%w: node %q has class %d of epoch %s up to %d, and had it up to %d the day before", errDamaged, s.node, s.class, s.epoch, m[s].seq, was.seq)
			}
		}
		tables, err := numberedTables(ctx, db)
		if err != nil {
			return err
		}
		var parts []string
		for _, t := range tables {
			parts = append(parts, fmt.Sprintf(`SELECT max(seq) AS seq FROM "%s" WHERE node = ?1 AND epoch = ?2 AND class = ?3`, t))
		}
		query := "SELECT coalesce(max(seq), 0) FROM (" + strings.Join(parts, " UNION ALL ") + ")"
		for s, is := range m {
			var last uint64
			if err := db.QueryRowContext(ctx, query, s.node, s.epoch, s.class).Scan(&last); err != nil {
				return err
			}
			if last != 0 && last != is.seq {
				return fmt.Errorf("%w: node %q has class %d of epoch %s up to %d, its records go to %d", errDamaged, s.node, s.class, s.epoch, is.seq, last)
			}
		}
		return nil
	})
	return err
}

// hasMarks tells whether every sequence that has records has a mark.
func hasMarks(ctx context.Context, db *sql.DB, m marks) error {
	tables, err := numberedTables(ctx, db)
	if err != nil {
		return err
	}
	for _, t := range tables {
		rows, err := db.QueryContext(ctx, fmt.Sprintf(`SELECT DISTINCT node, epoch, class FROM "%s"`, t))
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var s sequence
			if err := rows.Scan(&s.node, &s.epoch, &s.class); err != nil {
				return err
			}
			if _, ok := m[s]; !ok {
				return fmt.Errorf("%w: node %q has records of class %d of epoch %s, and no mark", errDamaged, s.node, s.class, s.epoch)
			}
		}
		if err := rows.Err(); err != nil {
			return err
		}
	}
	return nil
}

// numberedTables are those whose rows have numbers.
func numberedTables(ctx context.Context, db *sql.DB) (names []string, err error) {
	rows, err := db.QueryContext(ctx, `SELECT t.name FROM sqlite_schema t JOIN pragma_table_info(t.name) c ON c.name = 'seq'
		WHERE t.type = 'table' AND t.name <> 'marks' ORDER BY t.name`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, rows.Err()
}

// setAside takes a damaged day out of use and renames it, with its log, for people to look at. It does nothing if that has been done.
func (d *days) setAside(ctx context.Context, bad *damage) error {
	f := bad.file
	d.mu.Lock()
	i := slices.Index(d.files, f)
	if i >= 0 {
		d.files = slices.Delete(slices.Clone(d.files), i, i+1)
		d.damaged++
	}
	d.mu.Unlock()
	if i < 0 {
		return nil
	}
	closed := f.close() // of no consequence: what it wants to write belongs to a damaged file
	to, err := freeName(f.path + damagedMark)
	if err == nil {
		err = moveDay(f.path, to)
	}
	if err != nil {
		return fmt.Errorf("%w; set it aside: %w", bad, err)
	}
	d.log.ErrorContext(ctx, "day is damaged: its records are missing from answers until somebody recovers them", "day", f.day, "aside", to, "err", bad.err, "closed", closed)
	return nil
}

// freeName finds the first number that no file has at the end of its name.
func freeName(prefix string) (string, error) {
	for n := 1; ; n++ {
		path := prefix + strconv.Itoa(n)
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			return path, nil
		} else if err != nil {
			return "", err
		}
	}
}

// moveDay moves the log first: a process that ends in between leaves a damaged day, not half of one under a good name.
func moveDay(from, to string) error {
	if err := os.Rename(from+"-wal", to+"-wal"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	if err := os.Remove(from + "-shm"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// found takes note of damage that a reader met, and says so: asked again, the collector answers without that day. The newest day is the writer's to
// set aside, because its marks go with it.
func (d *days) found(ctx context.Context, err error) error {
	var bad *damage
	if !errors.As(err, &bad) {
		return err
	}
	d.mu.Lock()
	n := len(d.files)
	newest := n > 0 && d.files[n-1] == bad.file
	if newest {
		d.hurt = bad
	}
	d.mu.Unlock()
	if !newest {
		if err := d.setAside(ctx, bad); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w; it is set aside at the collector: ask again for what the other days have", bad)
}

// toMend returns what a reader found in the newest day, once.
func (d *days) toMend() *damage {
	d.mu.Lock()
	defer d.mu.Unlock()
	bad := d.hurt
	d.hurt = nil
	return bad
}

// removeDamaged removes the oldest file that was set aside, if it is past its time.
func (d *days) removeDamaged(ctx context.Context, oldest string) {
	names, err := filepath.Glob(filepath.Join(d.dir, "*"+daySuffix+damagedMark+"*"))
	if err != nil || len(names) == 0 {
		return
	}
	path := slices.Min(names)
	if day, _, _ := strings.Cut(filepath.Base(path), daySuffix+damagedMark); day >= oldest || !d.steady.spend() {
		return
	}
	if err := os.Remove(path); err != nil {
		d.log.ErrorContext(ctx, "damaged day cannot be removed", "file", path, "err", err)
	}
}
