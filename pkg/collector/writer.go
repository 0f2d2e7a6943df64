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
	seq     sequence
	entries []*api.Entry
	done    chan result // capacity 1
}

type result struct {
	mark uint64
	err  error
}

// writer is the only one who writes. Batches of many nodes share a transaction.
type writer struct {
	days *days
	jobs chan job
	quit chan struct{}

	mu    sync.Mutex
	marks marks         // what is durable; guarded by mu
	more  chan struct{} // closed and replaced after each commit; guarded by mu
}

func newWriter(d *days) (*writer, error) {
	w := &writer{days: d, jobs: make(chan job), quit: make(chan struct{}), marks: marks{}, more: make(chan struct{})}
	ctx := context.Background()
	m, err := d.recover(ctx)
	if err != nil {
		return nil, err
	}
	w.marks = m
	for _, f := range d.all() {
		if err := f.prepare(ctx, w.marks); err != nil {
			return nil, err
		}
	}
	d.drop(ctx)
	return w, nil
}

// mark returns how far a sequence is durable.
func (w *writer) mark(s sequence) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.marks[s]
}

// changed returns a channel that is closed after the next commit.
func (w *writer) changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.more
}

// put stores what is new in a batch and returns how far the sequence is durable then.
func (w *writer) put(s sequence, entries []*api.Entry) (uint64, error) {
	j := job{seq: s, entries: entries, done: make(chan result, 1)}
	select {
	case w.jobs <- j:
		r := <-j.done
		return r.mark, r.err
	case <-w.quit:
		return 0, errStopping
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

func (w *writer) publish(reached marks) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.Copy(w.marks, reached)
	close(w.more)
	w.more = make(chan struct{})
}

// stored reads the marks of the newest day, or none if it cannot be read now.
func (w *writer) stored(ctx context.Context) marks {
	files := w.days.all()
	if len(files) == 0 {
		return nil
	}
	m, err := files[len(files)-1].marks(ctx)
	if err != nil {
		return nil
	}
	return m
}

func (w *writer) write(ctx context.Context, group []job, results []result) (reached marks, err error) {
	file, err := w.today(ctx)
	if err != nil {
		return nil, err
	}
	reached = marks{}
	ok, err := file.write(func(db *sql.DB) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		for i, j := range group {
			if results[i], err = w.writeJob(ctx, tx, j, reached); err != nil {
				return err
			}
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
	m := maps.Clone(w.marks)
	w.mu.Unlock()
	if err := f.prepare(ctx, m); err != nil {
		return nil, errors.Join(err, f.close())
	}
	w.days.add(ctx, f)
	return f, nil
}

// writeJob checks the whole batch before it writes any of it. Its error is the disk's, the one in the
// result is the batch's.
func (w *writer) writeJob(ctx context.Context, tx *sql.Tx, j job, reached marks) (result, error) {
	mark, ok := reached[j.seq]
	if !ok {
		mark = w.mark(j.seq)
	}
	fresh, end, err := continues(mark, j.entries)
	if err != nil {
		return result{err: err}, nil
	}
	if len(fresh) == 0 {
		return result{mark: mark}, nil
	}
	received := w.days.now()
	for _, e := range fresh {
		if err := insert(ctx, tx, j.seq, e, received); err != nil {
			return result{}, err
		}
	}
	reached[j.seq] = end
	return result{mark: end}, putMark(ctx, tx, j.seq, end)
}

// continues returns the entries that follow on mark, without those that are there already. Each must
// take up where the one before ended: a record takes one number, a loss as many as it counts.
func continues(mark uint64, entries []*api.Entry) (fresh []*api.Entry, end uint64, err error) {
	end = mark
	var last uint64 // of the batch, known or not
	for _, e := range entries {
		n := uint64(1)
		switch r := e.GetRecord().(type) {
		case nil:
			return nil, 0, fmt.Errorf("%w: entry %d has no record", errEntry, e.GetSeq())
		case *api.Entry_Loss:
			n = r.Loss.GetCount()
		}
		seq := e.GetSeq()
		if n == 0 || seq < n || seq > math.MaxInt64 || seq <= last {
			return nil, 0, fmt.Errorf("%w: entry %d takes %d numbers after %d", errEntry, seq, n, last)
		}
		last = seq
		if seq <= mark {
			continue
		}
		if seq-n != end {
			return nil, 0, fmt.Errorf("%w: entry %d takes %d numbers, stored is up to %d", errGap, seq, n, end)
		}
		fresh, end = append(fresh, e), seq
	}
	return fresh, end, nil
}
