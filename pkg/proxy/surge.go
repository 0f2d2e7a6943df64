package proxy

import "time"

// surge is a time in which there are many at once of what is few in peace.
type surge struct {
	begins int        // with so many
	ends   int        // when there were no more than so many, for surgeCalm
	tell   func(bool) // at each change; nil: nobody asked
	on     bool
	many   time.Time // when there were last more than ends
}

const surgeCalm = 10 * time.Second // by the monotonic clock

// newSiege is of those who have not proven an identity: a flood of handshakes, or clients that are slow on purpose. An honest client is
// one of them for milliseconds.
func newSiege(tell func(bool)) surge { return surge{begins: 128, ends: 32, tell: tell} }

// newThrong is of all connections.
func newThrong(tell func(bool)) surge { return surge{begins: 1024, ends: 512, tell: tell} }

func (s *surge) look(n int, now time.Time) {
	if n > s.ends {
		s.many = now
	}
	on := n >= s.begins || s.on && now.Sub(s.many) < surgeCalm
	if on == s.on {
		return
	}
	s.on = on
	if s.tell != nil {
		s.tell(on)
	}
}
