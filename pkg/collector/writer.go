package collector

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

var (
	// errGap says that a batch does not continue its sequence: what is in between would be missing
	// without a word.
	errGap = errors.New("batch does not continue the sequence")
	// errEntry says that an entry is not one.
	errEntry = errors.New("entry is malformed")
	// errTakenOver says that the node has another stream by now.
	errTakenOver = errors.New("node opened another stream")
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
	mark   mark
	before uint64 // how far the sequence was durable without the batch
	err    error
}

// writer puts batches of many nodes into one transaction.
type writer struct {
	engine engine
	key    logKey
	jobs   chan job
	quit   chan struct{}
	life   context.Context    // of what is being written
	abort  context.CancelFunc // of life
}

func newWriter(e engine, key logKey) *writer {
	w := &writer{engine: e, key: key, jobs: make(chan job), quit: make(chan struct{})}
	w.life, w.abort = context.WithCancel(context.Background())
	return w
}

// put stores what is new in a batch and returns how far the sequence is durable then. What nobody has taken when ctx ends is not stored; what
// was taken is waited for.
func (w *writer) put(ctx context.Context, b batch) (result, error) {
	j := job{batch: b, done: make(chan result, 1)}
	select {
	case w.jobs <- j:
		r := <-j.done
		return r, r.err
	case <-ctx.Done():
	case <-w.quit:
	}
	return result{}, errStopping
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
			w.engine.keep(w.life)
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

// commit writes a group in one transaction. A batch that is refused does not touch the others; one that the engine cannot take, for whatever is in
// it, would, so that each is then tried by itself.
func (w *writer) commit(group []job) {
	results, err := w.store(group)
	if err != nil && len(group) > 1 && w.life.Err() == nil && !errors.Is(err, errAway) && !errors.Is(err, context.DeadlineExceeded) {
		for _, j := range group {
			w.commit([]job{j})
		}
		return
	}
	for i, j := range group {
		if err != nil {
			results[i] = result{err: fmt.Errorf("store batch: %w", err)}
		}
		j.done <- results[i]
	}
}

func (w *writer) store(group []job) ([]result, error) {
	results := make([]result, len(group))
	err := w.engine.write(w.life, func(tx *transaction) (state, error) {
		c, err := newChange(tx, w.key)
		if err != nil {
			return state{}, err
		}
		for i, j := range group {
			if results[i], err = c.put(j.batch); err != nil {
				return state{}, err
			}
		}
		return c.state, c.finish(w.key)
	})
	return results, err
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
