package proxy

import (
	"sync"
	"sync/atomic"
	"time"
)

// activity tells when something moved on a connection last.
type activity struct {
	began    time.Time // origin of lastMove, monotonic
	lastMove atomic.Int64
	mu       sync.Mutex
	timer    *time.Timer // guarded by mu
}

func (a *activity) moved() { a.lastMove.Store(int64(time.Since(a.began))) }

func (a *activity) idle() time.Duration {
	return time.Since(a.began) - time.Duration(a.lastMove.Load())
}

// watch calls cut, once, when nothing has moved for so long. stop ends that.
func (a *activity) watch(limit time.Duration, cut func()) (stop func()) {
	a.moved()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.timer = time.AfterFunc(limit, func() {
		left := limit - a.idle()
		if left <= 0 {
			cut()
			return
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.timer != nil {
			a.timer.Reset(left)
		}
	})
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.timer.Stop()
		a.timer = nil
	}
}
