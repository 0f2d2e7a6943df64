package proxy

import (
	"sync"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// room is who has one of the proxy's places. Strangers, who have not proven an identity yet, push out nobody but each other, and a
// proven caller nobody but one that has more connections: nobody keeps others out by number.
type room struct {
	limit  int            // of places
	kept   int            // of them, that the proven leave to strangers
	inside sync.WaitGroup // one for each session

	mu        sync.Mutex
	strangers crowd // guarded by mu; by the network that they come from
	proven    crowd // guarded by mu; by caller
	closed    bool  // guarded by mu; nobody else comes in
}

// keptShare is the part of the places that strangers can always have: with all of them proven, who has none yet could not even
// say who it is. Where there are few places, it is none.
const keptShare = 8

func newRoom(limit int) *room {
	return &room{limit: limit, kept: limit / keptShare, strangers: newCrowd(), proven: newCrowd()}
}

// enter gives a session a place, if need be that of another stranger, or tells why there is none.
func (r *room) enter(s *session) flow.Reason {
	out, reason := r.admit(s)
	if out != nil {
		out.cut(flow.ReasonLimit, "made room for another connection before it proved an identity")
	}
	return reason
}

func (r *room) admit(s *session) (out *session, reason flow.Reason) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, flow.ReasonDrained
	}
	if r.strangers.size()+r.proven.size() >= r.limit {
		if out = r.strangers.pick(); out == nil {
			return nil, flow.ReasonLimit
		}
		r.strangers.remove(out)
	}
	r.strangers.add(s, s.neighbourhood().String())
	r.inside.Add(1)
	return out, flow.ReasonNone
}

// settle makes a stranger one of the proven. When those have all the places that they may have, that is at the expense of a caller with
// more connections; it is false if there is none.
func (r *room) settle(s *session, caller string) bool {
	out, ok := r.promote(s, caller)
	if out != nil {
		out.cut(flow.ReasonLimit, "made room for a caller that has fewer connections")
	}
	return ok
}

func (r *room) promote(s *session, caller string) (out *session, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.strangers.has(s) {
		return nil, true // it was pushed out, and cut
	}
	if r.proven.size() >= r.limit-r.kept {
		out = r.proven.pick()
		if r.proven.share(out) <= r.proven.count[caller]+1 {
			return nil, false
		}
		r.proven.remove(out)
	}
	r.strangers.remove(s)
	s.standing = welcome // like that of all others here
	r.proven.add(s, caller)
	return out, true
}

func (r *room) leave(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.strangers.remove(s)
	r.proven.remove(s)
}

// close lets nobody in any more.
func (r *room) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
}

// unproven is how many strangers there are.
func (r *room) unproven() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.strangers.size()
}

func (r *room) snapshot() []*session {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*session, 0, r.strangers.size()+r.proven.size())
	for _, c := range []crowd{r.strangers, r.proven} {
		for s := range c.whose {
			all = append(all, s)
		}
	}
	return all
}

// crowd is a set of sessions, of which many can be of one.
type crowd struct {
	whose map[*session]string
	count map[string]int // of sessions, by whose they are
}

func newCrowd() crowd { return crowd{map[*session]string{}, map[string]int{}} }

func (c crowd) size() int { return len(c.whose) }

func (c crowd) has(s *session) bool {
	_, in := c.whose[s]
	return in
}

// share is how many there are of the session's own.
func (c crowd) share(s *session) int { return c.count[c.whose[s]] }

func (c crowd) add(s *session, whose string) {
	c.whose[s] = whose
	c.count[whose]++
}

func (c crowd) remove(s *session) {
	whose, in := c.whose[s]
	if !in {
		return
	}
	delete(c.whose, s)
	if c.count[whose]--; c.count[whose] == 0 {
		delete(c.count, whose)
	}
}

// looks are how many sessions are compared when one must go: to compare all would take longer than what comes.
const looks = 8

// pick gives, of a few that chance takes out, one of who has the worst standing, of these one of who has the most, and of these the
// oldest: who was let in before, has few and is quick is hardly ever met. It gives nil when there is nobody.
func (c crowd) pick() (out *session) {
	left := looks
	for s := range c.whose {
		if out == nil || c.before(s, out) {
			out = s
		}
		if left--; left == 0 {
			break
		}
	}
	return out
}

func (c crowd) before(s, other *session) bool {
	if s.standing != other.standing {
		return s.standing > other.standing
	}
	if own, others := c.share(s), c.share(other); own != others {
		return own > others
	}
	return s.accepted.Before(other.accepted)
}
