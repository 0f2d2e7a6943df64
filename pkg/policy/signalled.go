package policy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Said is what a source says about callers: for them, when Against is not set, or against them. What is empty fits all.
type Said struct {
	Source string `json:"source"`
	UID    uint32 `json:"uid"` // of whoever spoke for it
	// Caller is a SPIFFE ID or PROVIDER/SUBJECT, Service a service's name, and Clients have the caller's address.
	Caller  string       `json:"caller,omitempty"`
	Service string       `json:"service,omitempty"`
	Clients netip.Prefix `json:"clients,omitzero"`
	// Against makes rules that hear the source not hold, from From on if there is one.
	Against bool      `json:"against,omitempty"`
	From    time.Time `json:"from,omitzero"`
	// Until is when it counts no longer.
	Until  time.Time `json:"until"`
	Reason string    `json:"reason,omitempty"`
}

// Signals are what was said about callers. They do not change. They can only take from what a set allows.
type Signals struct {
	bySource map[string][]Said
}

// NewSignals puts together what was said.
func NewSignals(all []Said) *Signals {
	s := &Signals{bySource: map[string][]Said{}}
	for _, said := range all {
		s.bySource[said.Source] = append(s.bySource[said.Source], said)
	}
	return s
}

// ParseSignals reads what WriteSignals wrote.
func ParseSignals(data []byte) (*Signals, error) {
	var all []Said
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, fmt.Errorf("read signals: %w", err)
	}
	return NewSignals(all), nil
}

// WriteSignals writes what was said for those who decide about callers elsewhere.
func WriteSignals(all []Said) ([]byte, error) {
	data, err := json.MarshalIndent(all, "", " ")
	if err != nil {
		return nil, fmt.Errorf("write signals: %w", err)
	}
	return append(data, '\n'), nil
}

// Heeding is the set with what was said in the place of what it heard before. Nil: nothing was said. It never allows more than a set
// without any signal rules would.
func (s *Set) Heeding(signals *Signals) *Set {
	if s == nil {
		return nil
	}
	heeding := *s
	heeding.signals = signals
	return &heeding
}

// Hears tells whether an access rule of the set lets the user speak for a source.
func (s *Set) Hears(source string, uid uint32) bool {
	for _, svc := range s.Services() {
		for _, r := range svc.Spec.Access {
			if slices.ContainsFunc(r.Signals, func(a AccessSignal) bool { return a.believes(source, uid) }) {
				return true
			}
		}
	}
	return false
}

func (a AccessSignal) believes(source string, uid uint32) bool {
	return SignalRule{Source: a.Source, UIDs: a.UIDs}.Believes(source, uid)
}

// concerns tells whether it is about the caller at the service, and counts at now. At a time that nobody knows all of it does.
func (s Said) concerns(service string, who Caller, now time.Time) bool {
	return (now.IsZero() || now.Before(s.Until)) &&
		(s.Caller == "" || s.Caller == who.String()) &&
		(s.Service == "" || s.Service == service) &&
		(!s.Clients.IsValid() || s.Clients.Contains(plainAddress(who.Address)))
}

// against says whether it speaks against whom it concerns.
func (s Said) against(now time.Time) bool {
	return s.Against && (now.IsZero() || !now.Before(s.From))
}

// objection says what the source has against a caller; empty: nothing.
func (a AccessSignal) objection(said *Signals, service string, who Caller, now time.Time) string {
	heard := false
	if said != nil {
		for _, s := range said.bySource[a.Source] {
			if !a.believes(s.Source, s.UID) || !s.concerns(service, who, now) {
				continue
			}
			if s.against(now) {
				return fmt.Sprintf("%s speaks against %s: %s", a.Source, who, s.Reason)
			}
			heard = true
		}
	}
	if a.Required && (!heard || now.IsZero()) {
		return fmt.Sprintf("nothing was heard of %s about %s, which the rule requires", a.Source, who)
	}
	return ""
}

// next is when it begins or ceases to count after now.
func (s Said) next(now time.Time) (next time.Time) {
	for _, t := range []time.Time{s.From, s.Until} {
		if t.After(now) {
			next = earlier(next, t)
		}
	}
	return next
}
