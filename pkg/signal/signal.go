// Package signal folds what others say about grants into the limits of grants: a signal only ever takes away.
package signal

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Signal is what a source says about some grants. All times are wall-clock times.
type Signal struct {
	Source string // one that policy names, or one of policy.BuiltInSignals
	UID    uint32 // of whoever spoke for it
	About  About
	Effect Effect
	Until  time.Time // it counts no longer
	Reason string    // in words; what takes nothing away may have none
}

// About says which grants a signal concerns: those that everything in it fits. What is empty fits all.
type About struct {
	Grant     string
	Requester string
	Service   string
	Clients   netip.Prefix // has one of the grant's clients
}

// Effect is what a signal takes from a grant. The zero effect takes nothing: all is well.
type Effect struct {
	Revoke bool
	End    time.Time     // no path lives past it
	Budget policy.Budget // no path carries more
}

// Facts are what signals look at in a grant.
type Facts struct {
	Grant, Requester, Service string
	Clients                   []netip.Addr
	Ports                     int           // that it reaches
	Duration                  time.Duration // of its paths
}

// Limits are what a grant may still have.
type Limits struct {
	Revoked bool
	End     time.Time
	Budget  policy.Budget // of each path; 0 is no limit
	Reasons []string      // why it is less than was granted, and what else was said; each once
}

// Concerns tells whether a signal is about a grant and counts at now.
func (s Signal) Concerns(g Facts, now time.Time) bool {
	a := s.About
	return now.Before(s.Until) &&
		(a.Grant == "" || a.Grant == g.Grant) &&
		(a.Requester == "" || a.Requester == g.Requester) &&
		(a.Service == "" || a.Service == g.Service) &&
		(!a.Clients.IsValid() || slices.ContainsFunc(g.Clients, a.Clients.Contains))
}

// Fold takes from the limits of a grant what signals that count at now say, as far as the rules let their sources. Where a
// required source has said nothing, the grant is revoked. The result is never more than l, in any part: what was taken
// stays taken when its signal lapses, as long as the caller goes on with the result.
func Fold(l Limits, g Facts, rules []policy.SignalRule, said []Signal, now time.Time) Limits {
	l.Reasons = slices.Clone(l.Reasons)
	for _, r := range rules {
		heard := false
		for _, s := range said {
			if r.Believes(s.Source, s.UID) && s.Concerns(g, now) {
				l, heard = l.take(s, r), true
			}
		}
		if r.Required && !heard {
			l.Revoked = true
			l.because("nothing was heard of " + r.Source + ", which policy requires")
		}
	}
	for _, s := range said { // of what is built in the reason counts, too, where policy makes nothing of it
		if policy.IsBuiltInSignal(s.Source) && s.Concerns(g, now) {
			l.because(s.String())
		}
	}
	return l
}

// take is one signal under one rule.
func (l Limits) take(s Signal, r policy.SignalRule) Limits {
	if s.Effect.Revoke && r.MayDo(policy.SignalRevoke) {
		l.Revoked = true
	}
	if e := s.Effect.End; !e.IsZero() && e.Before(l.End) && r.MayDo(policy.SignalShorten) {
		l.End = e
	}
	if r.MayDo(policy.SignalLower) {
		l.Budget = lower(l.Budget, s.Effect.Budget)
	}
	if s.Reason != "" {
		l.because(s.String())
	}
	return l
}

func (s Signal) String() string { return fmt.Sprintf("%s: %s", s.Source, s.Reason) }

func (l *Limits) because(reason string) {
	if !slices.Contains(l.Reasons, reason) {
		l.Reasons = append(l.Reasons, reason)
	}
}

// lower is the smaller of two budgets in each part, where 0 is no limit.
func lower(a, b policy.Budget) policy.Budget {
	return policy.Budget{Bytes: least(a.Bytes, b.Bytes), Packets: least(a.Packets, b.Packets),
		Connections: least(a.Connections, b.Connections), ConnectionsPerSecond: least(a.ConnectionsPerSecond, b.ConnectionsPerSecond)}
}

func least[T policy.Size | uint64 | uint32](a, b T) T {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}
