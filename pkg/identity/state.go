package identity

import (
	"errors"
	"time"
)

// State says how far the own identity can be relied on.
type State string

// States of an identity. Unreachable and withdrawn never share a branch: a source that does not
// answer says nothing about whether the identity is still ours.
const (
	// Unreachable: no identity is held, and the source has not answered.
	Unreachable State = "unreachable"
	// Unissued: no identity was ever held, and the source answers that it has none.
	Unissued State = "unissued"
	// Fresh: the identity is valid and the source is connected.
	Fresh State = "fresh"
	// StaleValid: the identity is valid, but the source is gone, does not renew it, or has taken it away and
	// not confirmed that.
	StaleValid State = "stale-valid"
	// Expired: the identity that is held has passed its not-after time.
	Expired State = "expired"
	// Withdrawn: a healthy source has taken the identity away, and confirmed it.
	Withdrawn State = "withdrawn"
)

// States are all of them.
func States() []State { return []State{Unreachable, Unissued, Fresh, StaleValid, Expired, Withdrawn} }

// Usable tells whether an identity in this state may be presented.
func (s State) Usable() bool { return s == Fresh || s == StaleValid }

// Errors that callers match. Each stands for one state in which no identity is given.
var (
	ErrUnreachable = errors.New("identity source is unreachable and no identity is held")
	ErrUnissued    = errors.New("identity source issues no identity to this process")
	ErrExpired     = errors.New("own identity has expired")
	ErrWithdrawn   = errors.New("own identity was withdrawn")
)

func (s State) err() error {
	switch s {
	case Fresh, StaleValid:
		return nil
	case Unissued:
		return ErrUnissued
	case Expired:
		return ErrExpired
	case Withdrawn:
		return ErrWithdrawn
	default:
		return ErrUnreachable
	}
}

// evidence is everything that the state follows from. It is a plain value.
type evidence struct {
	notAfter    time.Time // of the identity that is held; zero: none is
	renewal     time.Time // when it ought to have been renewed
	connected   bool      // the stream is up and has told an identity
	denials     int       // answers since the last identity, of a healthy source, that there is none
	firstDenied time.Time
	absent      bool // the stream is up and told a full set without our identity: it will not repeat it
	withdrawn   bool // once confirmed, until a new identity comes
}

// lateMost bounds how long before the end of an identity its renewal counts as late: sources that are told to
// may renew a long-lived one a day before it ends.
const lateMost = 12 * time.Hour

// updated: the source told an identity. Sources renew at half of its time; one that has not when a quarter is
// left may be connected and yet cut off from who signs.
func (e evidence) updated(now, notAfter time.Time) evidence {
	return evidence{notAfter: notAfter, renewal: notAfter.Add(-min(notAfter.Sub(now)/4, lateMost)), connected: true}
}

// overdue: the source is connected and has not renewed the identity.
func (e evidence) overdue(now time.Time) bool { return e.connected && !now.Before(e.renewal) }

// unreachable: the source could not be asked. What it said before stands.
func (e evidence) unreachable() evidence {
	e.connected, e.absent = false, false
	return e
}

// denied: the source was asked and has no identity for us. One such answer proves little (sources
// do forget entries for a while), so a held identity is given up only when it was confirmed.
func (e evidence) denied(now time.Time, c Confirm) evidence {
	if e.denials == 0 {
		e.firstDenied = now
	}
	e.connected, e.absent = false, false
	e.denials++
	held := !e.notAfter.IsZero()
	if held && e.denials >= c.Answers && now.Sub(e.firstDenied) >= c.Window {
		e.withdrawn = true
	}
	return e
}

// missing: the source told a full set, and ours is not among it. The stream goes on, so that no
// second answer is to be expected: silence through the window confirms it.
func (e evidence) missing(now time.Time, c Confirm) evidence {
	e = e.denied(now, c)
	e.absent = true
	return e
}

func (e evidence) state(now time.Time, c Confirm) State {
	switch {
	case e.withdrawn, e.absent && !e.notAfter.IsZero() && now.Sub(e.firstDenied) >= c.Window:
		return Withdrawn
	case e.notAfter.IsZero() && e.denials > 0:
		return Unissued
	case e.notAfter.IsZero():
		return Unreachable
	case !now.Before(e.notAfter):
		return Expired
	case e.connected && !e.overdue(now):
		return Fresh
	default:
		return StaleValid
	}
}
