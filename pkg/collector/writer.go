package collector

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"math"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

var (
	// errGap says that a batch does not continue its sequence: what is in between would be missing
	// without a word.
	errGap = errors.New("batch does not continue the sequence")
	// errEntry says that an entry is not one.
	errEntry = errors.New("entry is malformed")
	// errStopping says that the collector is going.
	errStopping = errors.New("collector stops")
)

// groupEntries is how many entries share one commit at most.
const groupEntries = 8192

// job is a batch on its way to the disk.
type job struct {
	batch
	done chan result // capacity 1
}

type result struct {
	mark mark
	err  error
}

// writer is the only one who writes. Batches of many nodes share a transaction.
type writer struct {
	days    *days
	key     logKey
	archive archive
	jobs    chan job
	quit    chan struct{}

	mu    sync.Mutex
	state state         // what is durable; guarded by mu
	more  chan struct{} // closed and replaced after each commit; guarded by mu
}

func newWriter(d *days, td spiffeid.TrustDomain) (*writer, error) {
	w := &writer{days: d, archive: newArchive(d.dir), jobs: make(chan job), quit: make(chan struct{}), more: make(chan struct{})}
	ctx := context.Background()
	s, newest, err := d.recover(ctx)
	if err != nil {
		return nil, err
	}
	if w.key, err = openLogKey(d.dir, td); err != nil {
		return nil, err
	}
	if w.state, err = w.sound(ctx, s, newest); err != nil {
		return nil, err
	}
	for _, f := range d.all() {
		if err := f.prepare(ctx, w.state); err != nil {
			return nil, err
		}
	}
	d.archive = w.archive.keep
	d.drop(ctx)
	return w, nil
}

// sound holds the newest day's log against its checkpoint and its seals against their keys, and goes back to the day before where it is damaged. With no day that is
// sound it begins anew.
func (w *writer) sound(ctx context.Context, s state, newest *dayFile) (state, error) {
	for newest != nil {
		err := errors.Join(s.log.check(w.key), s.checkSeals())
		if !errors.Is(err, errDamaged) {
			return s, err
		}
		if err := w.days.setAside(ctx, &damage{newest, err}); err != nil {
			return state{}, err
		}
		if s, newest, err = w.days.recover(ctx); err != nil {
			return state{}, err
		}
	}
	s = state{marks: marks{}, keys: nodeKeys{}}
	return s, s.log.sign(w.key)
}

// close is for after the last use.
func (w *writer) close() error { return w.archive.file.close() }

// mark returns how far a sequence is durable.
func (w *writer) mark(s sequence) mark {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state.marks[s]
}

// marks returns how far all are.
func (w *writer) marks() marks {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.state.marks)
}

// nodeKey returns what a node seals with, if it ever sealed in that epoch.
func (w *writer) nodeKey(of nodeEpoch) (nodeKey, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	k, ok := w.state.keys[of]
	return k, ok
}

// head returns the log as far as it is durable.
func (w *writer) head() head {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state.log
}

// hashes reads for one caller.
func (w *writer) hashes(ctx context.Context) *hashReader {
	return &hashReader{ctx: ctx, days: w.days, archive: w.archive, seen: map[int64]tlog.Hash{}}
}

// changed returns a channel that is closed after the next commit.
func (w *writer) changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.more
}

// put stores what is new in a batch and returns how far the sequence is durable then.
func (w *writer) put(b batch) (mark, error) {
	j := job{batch: b, done: make(chan result, 1)}
	select {
	case w.jobs <- j:
		r := <-j.done
		return r.mark, r.err
	case <-w.quit:
		return mark{}, errStopping
	}
}

// run writes until stop.
func (w *writer) run() {
	look := time.NewTicker(steadyLook)
	defer look.Stop()
	for {
		select {
		case j := <-w.jobs:
			w.commit(w.gather(j))
		case <-look.C:
			w.keep(context.Background())
		case <-w.quit:
			return
		}
	}
}

func (w *writer) stop() { close(w.quit) }

// gather takes what else is waiting, so that it shares the fsync.
func (w *writer) gather(first job) []job {
	group, n := []job{first}, len(first.entries)
	for n < groupEntries {
		select {
		case j := <-w.jobs:
			group, n = append(group, j), n+len(j.entries)
		default:
			return group
		}
	}
	return group
}

// commit writes a group in one transaction. A batch that is refused does not touch the others.
func (w *writer) commit(group []job) {
	ctx := context.Background() // what was taken is finished
	results := make([]result, len(group))
	reached, err := w.write(ctx, group, results)
	if err != nil { // a commit that failed may yet have taken place: the file knows
		reached = w.stored(ctx)
	}
	w.publish(reached)
	for i, j := range group {
		if err != nil {
			results[i] = result{err: fmt.Errorf("store batch: %w", err)}
		}
		j.done <- results[i]
	}
}

func (w *writer) publish(reached *state) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if reached != nil {
		maps.Copy(w.state.marks, reached.marks)
		maps.Copy(w.state.keys, reached.keys)
		w.state.log = reached.log
	}
	close(w.more)
	w.more = make(chan struct{})
}

// stored reads the state from the newest day, or nil if it cannot be read now.
func (w *writer) stored(ctx context.Context) *state {
	files := w.days.all()
	if len(files) == 0 {
		return nil
	}
	s, err := files[len(files)-1].state(ctx)
	if err != nil {
		return nil
	}
	return &s
}

func (w *writer) write(ctx context.Context, group []job, results []result) (*state, error) {
	file, err := w.today(ctx)
	if err != nil {
		return nil, err
	}
	var reached *state
	ok, err := file.write(func(db *sql.DB) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		c := &change{state: state{marks: marks{}, keys: nodeKeys{}, log: w.head()}, w: w, ctx: ctx, tx: tx, received: w.days.now()}
		for i, j := range group {
			if results[i], err = c.put(j.batch); err != nil {
				return err
			}
		}
		reached = &c.state
		if err := c.putHead(); err != nil {
			return err
		}
		return tx.Commit()
	})
	if err == nil && !ok {
		err = errStopping
	}
	if bad := file.damageBehind(ctx, err); bad != nil {
		err = errors.Join(err, w.mend(ctx, bad))
	}
	return reached, err
}

// today returns the file of the day, made if it is a new day.
func (w *writer) today(ctx context.Context) (*dayFile, error) {
	if err := w.mendFound(ctx); err != nil {
		return nil, err
	}
	f, isNew := w.days.today()
	if !isNew {
		return f, nil
	}
	w.mu.Lock()
	s := w.state // nobody else writes: the maps stay as they are
	w.mu.Unlock()
	if err := f.prepare(ctx, s); err != nil {
		return nil, errors.Join(err, f.close())
	}
	w.days.add(ctx, f)
	return f, nil
}

// continues tells how far entries reach above number end, and how many numbers losses among them count. Each must take up where the one
// before ended: a record takes one number, a loss as many as it counts.
func continues(end uint64, entries []*api.Entry) (_, lost uint64, err error) {
	for _, e := range entries {
		n := uint64(1)
		switch r := e.GetRecord().(type) {
		case nil:
			return 0, 0, fmt.Errorf("%w: entry %d has no record that this collector knows", errEntry, e.GetSeq())
		case *api.Entry_Loss:
			n = r.Loss.GetCount()
			lost += n
		}
		switch seq := e.GetSeq(); {
		case n == 0 || seq < n || seq > math.MaxInt64 || seq <= end:
			return 0, 0, fmt.Errorf("%w: entry %d takes %d numbers after %d", errEntry, seq, n, end)
		case seq-n != end:
			return 0, 0, fmt.Errorf("%w: entry %d takes %d numbers, the one before it ends at %d", errGap, seq, n, end)
		default:
			end = seq
		}
	}
	return end, lost, nil
}
