package collector

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // the driver "sqlite"
)

const (
	dayLayout = "2006-01-02"
	daySuffix = ".db"
)

// ErrInUse says that another collector has the directory.
var ErrInUse = errors.New("another collector uses it")

// days are the daily files of one directory.
type days struct {
	dir  string
	log  *slog.Logger
	lock *os.File
	*retention

	archive func(context.Context, *dayFile) error // what is to be kept of a day, before it is removed

	mu      sync.Mutex
	files   []*dayFile // ascending by day; guarded by mu
	hurt    *damage    // of the newest, found by a reader; guarded by mu
	damaged uint64     // days that were set aside; guarded by mu
}

// dayFile is one day of receipt (UTC).
type dayFile struct {
	day  string
	path string
	base int64 // leaves of the log before this day; set when the tables are made or first read
	// unclean says that the process that wrote it last did not close it; known from look on.
	unclean bool

	mu      sync.RWMutex // held for reading while a database is used
	readers *sql.DB      // nil until first used
	writer  *sql.DB      // of its own, so that readers cannot hold up the writer
	gone    bool
}

// lockDir takes the directory for this process alone, and makes it.
func lockDir(dir string) (lock *os.File, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create directory: %w", err)
	}
	if lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("lock %s: %w: %w", dir, ErrInUse, err)
	}
	return lock, nil
}

// openDays finds the files in the directory.
func openDays(cfg Config) (_ *days, err error) {
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, err
	}
	d := &days{dir: dir, log: cfg.Logger, retention: newRetention(cfg)}
	if d.lock, err = lockDir(dir); err != nil {
		return nil, err
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"+daySuffix))
	if err != nil {
		d.lock.Close()
		return nil, err
	}
	slices.Sort(names)
	for _, path := range names {
		day := strings.TrimSuffix(filepath.Base(path), daySuffix)
		if _, err := time.Parse(dayLayout, day); err == nil {
			d.files = append(d.files, &dayFile{day: day, path: path})
		}
	}
	return d, nil
}

func (d *days) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, f := range d.files {
		errs = append(errs, f.close())
	}
	d.files = nil
	return errors.Join(append(errs, d.lock.Close())...)
}

// all returns the files, oldest first.
func (d *days) all() []*dayFile {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.files)
}

// today returns the file to write to. It never goes back to an older one, whatever the clock does, or
// a reader who follows would miss what is written there.
func (d *days) today() (*dayFile, bool) {
	day := d.now().UTC().Format(dayLayout)
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.files); n > 0 && d.files[n-1].day >= day {
		return d.files[n-1], false
	}
	return &dayFile{day: day, path: filepath.Join(d.dir, day+daySuffix)}, true
}

// add makes a file visible to readers, when it has its tables, and drops those past their time.
func (d *days) add(ctx context.Context, f *dayFile) {
	d.mu.Lock()
	d.files = append(d.files, f)
	d.mu.Unlock()
	d.drop(ctx)
}

// drop removes a day that ended longer ago than days are to be kept, but never the newest.
func (d *days) drop(ctx context.Context) {
	files := d.all()
	if len(files) == 0 || d.retain <= 0 || !d.steady.look() {
		return
	}
	var names []string
	for _, f := range files {
		names = append(names, f.day)
	}
	old := files[:0]
	if d.due(names) {
		old = files[:1]
	}
	for i, f := range old { // while they can still be read
		if err := d.archive(ctx, f); err != nil {
			d.log.ErrorContext(ctx, "day cannot be removed", "day", f.day, "err", err)
			old = old[:i]
			break
		}
	}
	d.mu.Lock()
	d.files = slices.Clone(d.files[len(old):])
	d.mu.Unlock()
	for _, f := range old {
		if err := f.remove(); err != nil {
			d.log.ErrorContext(ctx, "day cannot be removed", "day", f.day, "err", err)
			continue
		}
		d.log.InfoContext(ctx, "day removed", "day", f.day)
	}
	d.removeDamaged(ctx, d.oldest(names[len(names)-1]))
}

// read runs do with the file's database, which stays open meanwhile. It returns false, and does
// nothing, if the file was removed.
func (f *dayFile) read(do func(*sql.DB) error) (bool, error) {
	return f.use(func() error { return do(f.readers) })
}

// write is read, for the only one who writes.
func (f *dayFile) write(do func(*sql.DB) error) (bool, error) {
	return f.use(func() error { return do(f.writer) })
}

func (f *dayFile) use(do func() error) (bool, error) {
	if err := f.open(); err != nil {
		return false, fmt.Errorf("open day %s: %w", f.day, err)
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.gone {
		return false, nil
	}
	return true, f.findDamage(do())
}

// open makes the two pools unless that has been done. They connect when they are used.
func (f *dayFile) open() (err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.readers != nil || f.gone {
		return nil
	}
	file, err := os.OpenFile(f.path, os.O_CREATE|os.O_RDWR, 0o600) // SQLite would take its mode from the umask
	if err != nil {
		return err
	}
	file.Close()
	if f.writer, err = f.pool(1, "journal_mode(WAL)", "synchronous(FULL)", "journal_size_limit(67108864)"); err != nil {
		return err
	}
	f.readers, err = f.pool(8, "query_only(1)")
	return err
}

func (f *dayFile) pool(size int, pragmas ...string) (*sql.DB, error) {
	q := url.Values{"_pragma": append([]string{"busy_timeout(10000)"}, pragmas...)}
	u := url.URL{Scheme: "file", Path: f.path, RawQuery: q.Encode()}
	db, err := sql.Open("sqlite", u.String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(size)
	db.SetConnMaxIdleTime(time.Minute)
	return db, nil
}

// close waits for those who use the file. The writer goes last: it takes the log with it.
func (f *dayFile) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gone = true
	var errs []error
	for _, db := range []*sql.DB{f.readers, f.writer} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(errs...)
}

func (f *dayFile) remove() error {
	err := f.close()
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if e := os.Remove(f.path + suffix); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
