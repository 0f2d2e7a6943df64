package agent

import (
	"fmt"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
)

const (
	// askBurst is how many requests of one identity may come at a time.
	askBurst = 20
	// maxAskers bounds the identities that are remembered.
	maxAskers = 4096
)

// asker is one identity: how often it may ask for a path, and for one again, how much it holds, and how many streams and connections
// it has.
type asker struct {
	bucket, again               *rate.Limiter
	holds, streams, connections uint32
}

// askLimits bounds what each identity may ask for. Safe for concurrent use.
type askLimits struct {
	perMinute, paths uint32

	mu     sync.Mutex
	askers map[spiffeid.ID]*asker // guarded by mu
}

func newAskLimits(c policy.AutomationConfig) *askLimits {
	return &askLimits{perMinute: c.RequestsPerMinute, paths: c.PathsPerIdentity, askers: make(map[spiffeid.ID]*asker)}
}

// take counts a request, and a path more, at a boot time. The error wraps ErrTooMany; nothing is held then.
func (l *askLimits) take(id spiffeid.ID, boot time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Unix(0, int64(boot)) // a bucket wants a time, and any that only goes forward will do
	a, err := l.find(id, now)
	if err != nil {
		return err
	}
	if !a.bucket.AllowN(now, 1) {
		return fmt.Errorf("%w: %s may ask %d times a minute", ErrTooMany, id, l.perMinute)
	}
	if a.holds >= l.paths {
		return fmt.Errorf("%w: %s may hold %d paths at a time", ErrTooMany, id, l.paths)
	}
	a.holds++
	return nil
}

// takeUp counts a path that is taken up, which is no more than was granted: each may be asked for again once a second, and all at once
// when the agent was restarted. The path is counted beside the one of the broken stream, until that is seen to be gone.
func (l *askLimits) takeUp(id spiffeid.ID, boot time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Unix(0, int64(boot))
	a, err := l.find(id, now)
	if err != nil {
		return err
	}
	if !a.again.AllowN(now, 1) {
		return fmt.Errorf("%w: %s may take up a path %d times a second", ErrTooMany, id, l.paths)
	}
	a.holds++
	return nil
}

// give counts a path less.
func (l *askLimits) give(id spiffeid.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.askers[id].holds--
}

// hear counts a stream, at a boot time: one for each path, and as many again for each of those that are broken, and that say nothing
// yet. The error wraps ErrTooMany; it is not counted then.
func (l *askLimits) hear(id spiffeid.ID, boot time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	a, err := l.find(id, time.Unix(0, int64(boot)))
	if err != nil {
		return err
	}
	if most := 3 * l.paths; a.streams >= most {
		return fmt.Errorf("%w: %s may have %d streams at a time", ErrTooMany, id, most)
	}
	a.streams++
	return nil
}

// heard counts a stream less.
func (l *askLimits) heard(id spiffeid.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.askers[id].streams--
}

// connect counts a connection of an identity, at a boot time. The error wraps ErrTooMany; it is not counted then. There is room
// for a connection for each path, and for those that the holders of these make anew before the old ones are seen to be gone.
func (l *askLimits) connect(id spiffeid.ID, boot time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	a, err := l.find(id, time.Unix(0, int64(boot)))
	if err != nil {
		return err
	}
	if most := 2 * l.paths; a.connections >= most {
		return fmt.Errorf("%w: %s may have %d connections at a time", ErrTooMany, id, most)
	}
	a.connections++
	return nil
}

// disconnect counts a connection less.
func (l *askLimits) disconnect(id spiffeid.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.askers[id].connections--
}

// find remembers an identity. Those that hold nothing, have no connection and whose bucket is full again are as if they had never asked. l.mu
// is held.
func (l *askLimits) find(id spiffeid.ID, now time.Time) (*asker, error) {
	if a, ok := l.askers[id]; ok {
		return a, nil
	}
	if len(l.askers) >= maxAskers {
		for other, a := range l.askers {
			if a.holds == 0 && a.streams == 0 && a.connections == 0 && a.bucket.TokensAt(now) >= askBurst {
				delete(l.askers, other)
			}
		}
	}
	if len(l.askers) >= maxAskers {
		return nil, fmt.Errorf("%w: %d identities ask at a time", ErrTooMany, maxAskers)
	}
	a := &asker{bucket: rate.NewLimiter(rate.Limit(l.perMinute)/60, askBurst), again: rate.NewLimiter(rate.Limit(l.paths), 2*int(l.paths))}
	l.askers[id] = a
	return a, nil
}
