package agent

import (
	"errors"
	"sync"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// errBehind ends a follower that did not keep up: it learns of its loss instead of missing records in silence.
var errBehind = errors.New("reader fell behind the node's records")

// followerRoom is how many records a follower may be behind.
const followerRoom = 4096

// recent keeps the node's latest flow records in memory, for those who look at the node itself. It never keeps a writer
// waiting. Safe for concurrent use.
type recent struct {
	mu        sync.Mutex
	ring      []flow.Record // guarded by mu
	next      int           // guarded by mu; where the next record goes
	full      bool          // guarded by mu
	followers map[*follower]struct{}
}

// follower gets every record from the moment it was made. Its channel closes when it fell behind.
type follower struct{ records chan flow.Record }

func newRecent(size int) *recent {
	return &recent{ring: make([]flow.Record, size), followers: make(map[*follower]struct{})}
}

func (r *recent) add(rec flow.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ring[r.next] = rec
	r.next = (r.next + 1) % len(r.ring)
	r.full = r.full || r.next == 0
	for f := range r.followers {
		select {
		case f.records <- rec:
		default:
			close(f.records)
			delete(r.followers, f)
		}
	}
}

// last gives up to n of the latest records, oldest first; 0 means all that are kept.
func (r *recent) last(n int) []flow.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lastLocked(n)
}

func (r *recent) lastLocked(n int) []flow.Record {
	var all []flow.Record
	if r.full {
		all = append(all, r.ring[r.next:]...)
	}
	all = append(all, r.ring[:r.next]...)
	if n > 0 && len(all) > n {
		all = all[len(all)-n:]
	}
	return all
}

// follow gives the latest records and a follower that gets each one after them, without a gap. leave must be called.
func (r *recent) follow(n int) (before []flow.Record, f *follower, leave func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f = &follower{records: make(chan flow.Record, followerRoom)}
	r.followers[f] = struct{}{}
	return r.lastLocked(n), f, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.followers, f)
	}
}
