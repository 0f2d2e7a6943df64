package proxy

import "time"

// siege is a time in which many clients at once have not proven an identity: a flood of handshakes, or clients that are slow on purpose.
type siege struct {
	tell func(bool) // at each change; nil: nobody asked
	on   bool
	many time.Time // when there were last many, or not few
}

// Bounds of a siege, in strangers at a time. An honest client is one for milliseconds.
const (
	siegeBegins = 128
	siegeEnds   = 32              // or fewer, for
	siegeCalm   = 2 * time.Second // by the monotonic clock
)

func (s *siege) look(strangers int, now time.Time) {
	if strangers > siegeEnds {
		s.many = now
	}
	on := strangers >= siegeBegins || s.on && now.Sub(s.many) < siegeCalm
	if on == s.on {
		return
	}
	s.on = on
	if s.tell != nil {
		s.tell(on)
	}
}
