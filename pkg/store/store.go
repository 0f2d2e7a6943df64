// Package store is the durable state of one node: its critical audit entries, its grants with the
// ids that may not be used again, and the numbers of its flow records.
//
// What survives what:
//
//   - Everything that a method acknowledged survives a kill and a power loss: the database runs in
//     WAL mode with synchronous=FULL, so a commit returns after its fsync.
//   - The counters of the count file (CountFlow, CountQueued) survive a kill of the process to the
//     unit, because they live in a shared mapping; they do not survive a power loss. What was
//     reserved durably (ReserveFlow) is then the upper bound.
//   - Critical entries are chained by SHA-256 from the epoch on, replay ids have a chain of their own,
//     and every other row carries a checksum, so that damage is found at Open. The chain has no key:
//     it finds damage and careless edits, not a forger with root.
package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// What callers may match.
var (
	// ErrReplayed says that a grant with this id was activated on this node before.
	ErrReplayed = errors.New("grant was used before")
	// ErrOther says that the node knows another grant by this id.
	ErrOther = errors.New("another grant has this id")
	// ErrForgotten says that the grant is so old that the node may have forgotten that it was used.
	ErrForgotten = errors.New("the node has forgotten grants of that age")
	// ErrNoGrant says that the node never activated a grant with this id.
	ErrNoGrant = errors.New("no such grant")
	// ErrEnded says that the grant is no longer active.
	ErrEnded = errors.New("grant has ended")
	// ErrFinal says that the grant was withdrawn or denied.
	ErrFinal = errors.New("grant is not to be")
	// ErrStated says that the node has a statement of this step about this grant already.
	ErrStated = errors.New("that was said of the grant before")
	// ErrClockBehind says that the wall clock is behind what the store has seen.
	ErrClockBehind = errors.New("clock is behind the node's memory")
	// ErrDoubt says that the store may have forgotten grants that were used.
	ErrDoubt = errors.New("the node's memory of used grants is in doubt")
	// ErrDamaged says that what is stored is not what was written.
	ErrDamaged = errors.New("store is damaged")
	// ErrFull says that the store or its disk has no room; nothing of the call was written.
	ErrFull = errors.New("store is full")
	// ErrUnwritable says that the disk takes nothing, for another reason; nothing of the call was written.
	ErrUnwritable = errors.New("store cannot be written")
	// ErrInUse says that another process holds the store.
	ErrInUse = errors.New("store is in use by another process")
	// ErrVersion says that the file is of a layout that this program does not know.
	ErrVersion = errors.New("store has an unknown layout")
	// ErrAhead says that a sequence number was named which the store never gave out.
	ErrAhead = errors.New("sequence number is ahead of the store")
)

// Store is the durable state of one node. Its methods may be called from any goroutine.
type Store struct {
	path     string
	epoch    string
	boot     string
	pages    pages
	db       *sql.DB
	count    *countFile
	memory   atomic.Pointer[Memory] // as of the last write
	readOnly atomic.Bool            // the disk was, when the file was opened

	mu      sync.Mutex // held by one write at a time, so that the count file follows the database
	due     due        // guarded by mu
	ballast ballast    // guarded by mu
	witness *countFile // nil until Claim; guarded by mu
}

// Open opens the store in the file at path, and creates file and directory (modes 0600 and 0700)
// where they are missing. A directory that others may write to is refused. The whole content is
// checked; ErrDamaged names what does not fit, and Recover goes on from there. Only one process at a time has a store open.
//
// A store whose disk takes nothing is open all the same: it can be read, and each write tries anew.
func Open(path string) (*Store, error) {
	return openSized(path, pages{most: maxPages, kept: keptPages, disk: keptBytes})
}

func openSized(path string, p pages) (*Store, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	boot, err := bootID()
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s, err := openOnce(abs, boot, p)
	if errors.Is(err, ErrDamaged) { // a disk may fail to read once; what is damaged stays so
		s, err = openOnce(abs, boot, p)
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", abs, err)
	}
	return s, nil
}

func openOnce(path, boot string, p pages) (*Store, error) {
	s := &Store{path: path, boot: boot, pages: p, ballast: ballast{path: path + "-kept", size: p.disk}}
	second := secondLog(path)
	if err := classify(s.open()); err != nil {
		if errors.Is(err, ErrDamaged) {
			s.keepLog()
		}
		return nil, errors.Join(err, s.closeFiles(), second.backIf(err))
	}
	return s, second.drop()
}

// secondName is another name of the log, from before SQLite looks at it: a connection that fails early deletes the log as it goes, and of
// a damaged store that is part of what people look at.
type secondName struct{ log, name string }

// secondLog gives the log its second name.
func secondLog(path string) secondName {
	n := secondName{path + "-wal", path + "-wal-seen"}
	_ = os.Remove(n.name)
	if err := os.Link(n.log, n.name); err != nil {
		return secondName{} // there is none, or the disk takes nothing: nothing is deleted from it either
	}
	return n
}

// backIf gives a damaged store its log back, if it is gone.
func (n secondName) backIf(err error) error {
	if n.name == "" {
		return nil
	}
	if errors.Is(err, ErrDamaged) {
		if err := os.Link(n.name, n.log); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return n.drop()
}

func (n secondName) drop() error {
	if n.name == "" {
		return nil
	}
	return os.Remove(n.name)
}

func (s *Store) open() error {
	if err := s.whole(); err != nil {
		return err
	}
	err := makePrivate(s.path)
	if errors.Is(err, unix.EROFS) {
		s.readOnly.Store(true)
	} else if err != nil {
		return err
	}
	if err := s.inPlace(); err != nil {
		return err
	}
	s.db = sql.OpenDB(connector{s})
	s.db.SetMaxOpenConns(1)
	ctx := context.Background()
	if !s.readOnly.Load() {
		if err := s.migrate(ctx); err != nil {
			return s.readsWrong(err)
		}
	}
	h, err := s.verify(ctx)
	if err != nil {
		return s.readsWrong(err)
	}
	s.epoch = h.epoch
	s.remember(h)
	if err := s.ballast.find(); err != nil {
		return err
	}
	_ = s.ballast.take() // CatchUp tells of it
	return s.adopt(ctx, h)
}

// whole finds a recovery that was stopped, before anything is made in the store's place: Recover would take that for what was
// damaged, and put it over what it set aside.
func (s *Store) whole() error {
	epoch, err := nextEpoch(s.path)
	if err != nil {
		return err
	}
	if epoch != "" {
		return fmt.Errorf("%w: its recovery is not finished", ErrDamaged)
	}
	return nil
}

// inPlace finds a file that is not the store, before SQLite takes it for a new one.
func (s *Store) inPlace() error {
	file, err := os.Stat(s.path)
	if err != nil {
		return nil // on a disk that takes none
	}
	if size := file.Size(); size > 0 && size < pageSize {
		return fmt.Errorf("%w: the file is cut off after %d bytes", ErrDamaged, size)
	} else if _, err := os.Stat(s.countPath()); err == nil && size == 0 {
		return fmt.Errorf("%w: the file is empty or was not there, and %s is of one that was", ErrDamaged, s.countPath())
	}
	return nil
}

// readsWrong makes damage of what the disk does not explain: tables that are not there, cells of another kind, sectors
// that cannot be read, and a header that forbids to write.
func (s *Store) readsWrong(err error) error {
	err = classify(err)
	var e *sqlite.Error
	switch {
	case errors.Is(err, ErrDamaged), errors.Is(err, ErrVersion):
		return err
	case errors.As(err, &e):
		switch e.Code() {
		case sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_FORMAT,
			sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_DATA, sqlite3.SQLITE_IOERR_CORRUPTFS:
		case sqlite3.SQLITE_READONLY:
			if s.readOnly.Load() {
				return err
			}
		default:
			return err
		}
	}
	return fmt.Errorf("%w: %w", ErrDamaged, err)
}

// keepLog keeps SQLite from deleting the log of a file that is damaged: it is part of what people look at.
func (s *Store) keepLog() {
	if s.db == nil {
		return
	}
	c, err := s.db.Conn(context.Background())
	if err != nil {
		return
	}
	defer c.Close()
	_ = c.Raw(func(conn any) error {
		_, err := conn.(sqlite.FileControl).FileControlPersistWAL("main", 1)
		return err
	})
}

// connector opens the file as its disk allows it.
type connector struct{ s *Store }

func (c connector) Connect(context.Context) (driver.Conn, error) {
	name := dsn(c.s.path, c.s.pages)
	if c.s.readOnly.Load() {
		name = readOnlyDSN(c.s.path)
	}
	return c.Driver().Open(name)
}

func (c connector) Driver() driver.Driver { return &sqlite.Driver{} }

// dsn has exclusive locking so that two agents can never number the same epoch, and caps the file so
// that the store cannot fill the disk: refusing a grant is better than that. The journal's mode is set last, by a parameter of
// its own: locked by then, SQLite keeps its index of the log in memory, and not in a file that a full disk would not take.
func dsn(path string, p pages) string {
	return fileURL(path, url.Values{"_txlock": {"immediate"}, "_journal_mode": {"WAL"}, "_pragma": {
		"busy_timeout(2000)", "locking_mode(EXCLUSIVE)", "synchronous(FULL)",
		"secure_delete(OFF)", fmt.Sprintf("max_page_count(%d)", p.most),
	}})
}

// readOnlyDSN can lock nothing, as a lock of this kind is a write. Without a log SQLite could not make one: then there is
// nothing in it.
func readOnlyDSN(path string) string {
	q := url.Values{"mode": {"ro"}, "vfs": {"unix-none"}, "_pragma": {"locking_mode(EXCLUSIVE)"}}
	if _, err := os.Stat(path + "-wal"); errors.Is(err, fs.ErrNotExist) {
		q.Set("immutable", "1")
	}
	return fileURL(path, q)
}

func fileURL(path string, q url.Values) string {
	u := url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}
	return u.String()
}

// Close gives the files back. Nothing is lost by not calling it. After it only CountFlow and
// CountQueued may be called.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closeFiles()
}

func (s *Store) closeFiles() error {
	var errs []error
	if s.db != nil {
		errs = append(errs, s.db.Close())
	}
	errs = append(errs, s.count.close(), s.witness.close())
	s.db = nil
	return errors.Join(errs...)
}

// Epoch is the ULID of this store: new with a new file, so that numbers of a lost store are never
// taken for numbers of this one.
func (s *Store) Epoch() string { return s.epoch }

// BootID is the kernel's id of the running boot.
func (s *Store) BootID() string { return s.boot }

// due is what an earlier process or machine left to be settled before anything else is written: done with the next write
// that the disk takes.
type due struct {
	boot    bool   // what the boot before left unknown is to be noted
	count   bool   // the count file is to be made anew
	claim   *claim // somebody claimed the store
	witness string // file that is to follow it from here on
	why     error  // the files beside the database could not follow it
}

func (d due) nothing() bool { return !d.boot && !d.count && d.claim == nil && d.witness == "" }

// settle does in the head what is due.
func (s *Store) settle(ctx context.Context, tx *sql.Tx, h *head) error {
	if s.due.boot {
		if err := s.settleBoot(ctx, tx, h); err != nil {
			return err
		}
	}
	if s.due.claim != nil {
		s.due.claim.settle(h)
	}
	return nil
}

// CatchUp writes what the disk did not take when the store was opened or claimed, and takes on again what is kept on it for
// people. The error says why it still does not.
func (s *Store) CatchUp(ctx context.Context) error {
	s.mu.Lock()
	nothing, err := s.due.nothing(), s.ballast.take()
	s.mu.Unlock()
	if nothing || err != nil {
		return err
	}
	err = s.write(ctx, urgent, func(*sql.Tx, *head) error { return nil })
	if err == nil {
		s.mu.Lock()
		err = s.due.why
		s.mu.Unlock()
	}
	if err != nil {
		return fmt.Errorf("take over the store: %w", err)
	}
	return nil
}

// Unwritable tells whether the disk, or the store's size, is why nothing was written: it may be later.
func Unwritable(err error) bool { return errors.Is(err, ErrFull) || errors.Is(err, ErrUnwritable) }

// write runs f in one durable transaction, with the head loaded before and saved after it. The count
// file is told afterwards, so that it never knows of a write that is not durable.
func (s *Store) write(ctx context.Context, c class, f func(tx *sql.Tx, h *head) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.reopen(ctx); err != nil {
		return err
	}
	if c == common {
		if err := s.ballast.take(); err != nil {
			return err
		}
	}
	h, err := s.update(ctx, c, f)
	for c == urgent && Unwritable(err) && s.ballast.throw() { // a quota, and a write that is put off, are refused in other words
		h, err = s.update(ctx, c, f)
	}
	if err != nil {
		return err
	}
	if !s.due.nothing() {
		s.settled(h)
	}
	s.count.follow(h)
	s.witness.follow(h)
	return nil
}

// settled has the files beside the database follow it. What their disks do not take now stays due.
func (s *Store) settled(h head) {
	var errs []error
	s.due.boot, s.due.claim = false, nil
	if s.due.count {
		err := s.count.settle(s.countPath())
		s.due.count = err != nil
		errs = append(errs, err)
	}
	if s.due.witness != "" {
		err := s.testify(s.due.witness, h)
		if err == nil {
			s.due.witness = ""
		}
		errs = append(errs, err)
	}
	s.due.why = ofFile(errors.Join(errs...))
}

// ofFile gives an error of a file the sentinel that its cause has in the database.
func ofFile(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: %w", ErrUnwritable, err)
	}
	return err
}

// reopen goes over to writing, once a disk that was read-only allows it. It waits for whoever reads: the only connection is
// theirs until then, and must not be anybody's after.
func (s *Store) reopen(ctx context.Context) error {
	if !s.readOnly.Load() {
		return nil
	}
	if err := makePrivate(s.path); err != nil {
		return fmt.Errorf("%w: %w", ErrUnwritable, err)
	}
	c, err := s.db.Conn(ctx)
	if err != nil {
		return classify(err)
	}
	s.readOnly.Store(false)
	_ = c.Raw(func(any) error { return driver.ErrBadConn }) // has it closed, and the next one opened to write
	return nil
}

// view runs f on what the head would be, had all that is due been written. It writes nothing.
func (s *Store) view(ctx context.Context, f func(tx *sql.Tx, h *head) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return classify(err)
	}
	defer tx.Rollback()
	h, err := loadHead(ctx, tx)
	if err == nil {
		err = s.settle(ctx, tx, &h)
	}
	if err == nil {
		err = f(tx, &h)
	}
	return classify(err)
}

func (s *Store) update(ctx context.Context, c class, f func(tx *sql.Tx, h *head) error) (head, error) {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return head{}, classify(err)
	}
	defer tx.Rollback()
	h, err := loadHead(ctx, tx)
	if err != nil {
		return head{}, classify(err)
	}
	if err := s.settle(ctx, tx, &h); err != nil {
		return head{}, classify(err)
	}
	if err := f(tx, &h); err != nil {
		return head{}, classify(err)
	}
	h.writes++
	if err := saveHead(ctx, tx, h); err != nil {
		return head{}, classify(err)
	}
	if err := s.pages.check(ctx, tx, c); err != nil {
		return head{}, classify(err)
	}
	if err := tx.Commit(); err != nil {
		return head{}, classify(err)
	}
	s.remember(h)
	return h, nil
}

// classify puts the sentinel for a SQLite result code in front of the error.
func classify(err error) error {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_FULL:
		return fmt.Errorf("%w: %w", ErrFull, err)
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return fmt.Errorf("%w: %w", ErrInUse, err)
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN:
		return fmt.Errorf("%w: %w", ErrUnwritable, err)
	}
	switch e.Code() {
	case sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC, sqlite3.SQLITE_IOERR_TRUNCATE:
		return fmt.Errorf("%w: %w", ErrUnwritable, err)
	}
	return err
}

// makePrivate sees to it that the file exists with mode 0600 before SQLite sees it; its log inherits
// the mode.
func makePrivate(path string) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if st.Mode().Perm()&0o022 != 0 && st.Mode()&os.ModeSticky == 0 {
		return fmt.Errorf("directory %s has mode %#o and others may write to it: chmod 700 %s", dir, st.Mode().Perm(), dir)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Chmod(0o600)
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return string(b[:min(len(b), 36)]), nil
}
