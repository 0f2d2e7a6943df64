package proxy

import (
	"errors"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// pace bounds the requests of each caller to each service.
type pace struct {
	mu      sync.Mutex
	callers map[paced]*rate.Limiter // guarded by mu
	swept   time.Time               // guarded by mu
}

type paced struct {
	service, caller string
	perMinute       uint32
}

// paceSweep is how often callers are forgotten that have not asked for a while.
const paceSweep = time.Minute

func newPace() *pace { return &pace{callers: map[paced]*rate.Limiter{}} }

// allow takes one request. A third of a minute's may come at a time, as with automation at the agent.
func (p *pace) allow(service, caller string, perMinute uint32, now time.Time) bool {
	if perMinute == 0 {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if now.Sub(p.swept) > paceSweep {
		p.sweep(now)
	}
	key := paced{service, caller, perMinute}
	l := p.callers[key]
	if l == nil {
		l = rate.NewLimiter(rate.Limit(perMinute)/60, max(1, int(perMinute)/3))
		p.callers[key] = l
	}
	return l.AllowN(now, 1)
}

// sweep forgets who has all there is: a new limiter would let through as much. p.mu is held.
func (p *pace) sweep(now time.Time) {
	p.swept = now
	for key, l := range p.callers {
		if l.TokensAt(now) >= float64(l.Burst()) {
			delete(p.callers, key)
		}
	}
}

func isTimeout(err error) bool {
	var netErr net.Error
	return errors.As(err, &netErr) && netErr.Timeout()
}
