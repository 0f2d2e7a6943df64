package signal

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// LookBack is how far back grants count for the frequency of a person.
const LookBack = 7 * 24 * time.Hour

// always is the life of what is built in: it is found anew whenever it is asked for.
const always = time.Minute

// History is what a node remembers of grants.
type History struct {
	Seen   func(service string, client netip.Addr) bool // had a grant before
	Recent int                                          // grants of the requester within LookBack
}

// BuiltIn are the signals that a grant gives itself at its activation.
func BuiltIn(g Facts, h History, rules []policy.SignalRule, now time.Time) (out []Signal) {
	say := func(source string, is bool, format string, args ...any) {
		if is {
			out = append(out, Signal{Source: source, Effect: effectOf(source, rules, now), Until: now.Add(always), Reason: fmt.Sprintf(format, args...)})
		}
	}
	for _, c := range g.Clients {
		say(policy.SignalFirstSeen, !h.Seen(g.Service, c), "%s never had a way to %s on this node", c, g.Service)
	}
	if r, ok := ruleOf(policy.SignalOutOfHours, rules); ok {
		say(policy.SignalOutOfHours, r.OutOfHours(now), "it is %s", now.UTC().Format("Mon 15:04 UTC"))
	}
	breadth := uint64(len(g.Clients)) * uint64(g.Ports) * uint64(max(g.Duration/time.Minute, 1))
	say(policy.SignalBreadth, breadth > above(policy.SignalBreadth, rules, 10_000),
		"%d clients, %d ports and %s are a wide way", len(g.Clients), g.Ports, policy.Duration{Duration: g.Duration})
	say(policy.SignalFrequency, uint64(h.Recent) > above(policy.SignalFrequency, rules, 5),
		"%s had %d grants on this node within 7 days", g.Requester, h.Recent)
	return out
}

// NearBudget is the signal of a grant of which a path has used so many per cent of a limit.
func NearBudget(used uint64, rules []policy.SignalRule, now time.Time) (out []Signal) {
	if most := above(policy.SignalNearBudget, rules, 80); used >= most {
		out = append(out, Signal{Source: policy.SignalNearBudget, Effect: effectOf(policy.SignalNearBudget, rules, now), Until: now.Add(always),
			Reason: fmt.Sprintf("%d %% of a limit are used", most)})
	}
	return out
}

// effectOf is what policy makes of a signal that is built in.
func effectOf(source string, rules []policy.SignalRule, now time.Time) (e Effect) {
	r, ok := ruleOf(source, rules)
	if !ok {
		return e
	}
	e.Revoke = r.Revoke
	if d := r.ShortenTo.Duration; d != 0 {
		e.End = now.Add(d)
	}
	return e
}

func ruleOf(source string, rules []policy.SignalRule) (policy.SignalRule, bool) {
	for _, r := range rules {
		if r.Source == source {
			return r, true
		}
	}
	return policy.SignalRule{}, false
}

func above(source string, rules []policy.SignalRule, otherwise uint64) uint64 {
	if r, ok := ruleOf(source, rules); ok && r.Above != 0 {
		return r.Above
	}
	return otherwise
}
