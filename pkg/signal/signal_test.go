package signal_test

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/signal"
)

var (
	now    = time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	client = netip.MustParseAddr("10.1.0.2")
	facts  = signal.Facts{Grant: "G", Requester: "alice", Service: "postgres", Clients: []netip.Addr{client}, Ports: 1, Duration: time.Hour}
	whole  = signal.Limits{End: now.Add(time.Hour), Budget: policy.Budget{Bytes: 1000}}
	all    = []string{policy.SignalShorten, policy.SignalLower, policy.SignalRevoke}
)

func TestFold(t *testing.T) {
	shorten, lower := signal.Effect{End: now.Add(time.Minute)}, signal.Effect{Budget: policy.Budget{Bytes: 10, Connections: 3}}
	revoke := signal.Effect{Revoke: true}
	short, less, gone := whole, whole, whole
	short.End, less.Budget, gone.Revoked = shorten.End, lower.Budget, true
	rule := func(may ...string) []policy.SignalRule { return []policy.SignalRule{{Source: "posture", May: may}} }
	said := func(e signal.Effect, change ...func(*signal.Signal)) []signal.Signal {
		s := signal.Signal{Source: "posture", Effect: e, Until: now.Add(time.Second)}
		for _, c := range change {
			c(&s)
		}
		return []signal.Signal{s}
	}
	about := func(a signal.About) func(*signal.Signal) { return func(s *signal.Signal) { s.About = a } }
	for _, c := range []struct {
		name  string
		rules []policy.SignalRule
		said  []signal.Signal
		want  signal.Limits
	}{
		{"shortened", rule(policy.SignalShorten), said(shorten), short},
		{"lowered", rule(policy.SignalLower), said(lower), less},
		{"revoked", rule(policy.SignalRevoke), said(revoke), gone},
		{"all is well", rule(all...), said(signal.Effect{}), whole},
		{"a source that policy does not name", nil, said(revoke), whole},
		{"more than it may: shorten", rule(policy.SignalLower, policy.SignalRevoke), said(shorten), whole},
		{"more than it may: lower", rule(policy.SignalShorten, policy.SignalRevoke), said(lower), whole},
		{"more than it may: revoke", rule(policy.SignalShorten, policy.SignalLower), said(revoke), whole},
		{"somebody else spoke for it", rule(all...), said(revoke, func(s *signal.Signal) { s.UID = 7 }), whole},
		{"who may speak for it", []policy.SignalRule{{Source: "posture", UIDs: []uint32{7}, May: all}}, said(revoke, func(s *signal.Signal) { s.UID = 7 }), gone},
		{"lapsed", rule(all...), said(revoke, func(s *signal.Signal) { s.Until = now }), whole},
		{"a later end", rule(all...), said(signal.Effect{End: now.Add(2 * time.Hour)}), whole},
		{"a larger budget", rule(all...), said(signal.Effect{Budget: policy.Budget{Bytes: 2000}}), whole},
		{"about it", rule(all...), said(revoke, about(signal.About{Grant: "G", Requester: "alice", Service: "postgres", Clients: netip.MustParsePrefix("10.1.0.0/24")})), gone},
		{"another grant", rule(all...), said(revoke, about(signal.About{Grant: "H"})), whole},
		{"another person", rule(all...), said(revoke, about(signal.About{Requester: "bob"})), whole},
		{"another service", rule(all...), said(revoke, about(signal.About{Service: "redis"})), whole},
		{"another network", rule(all...), said(revoke, about(signal.About{Clients: netip.MustParsePrefix("10.2.0.0/24")})), whole},
		{"required, heard", []policy.SignalRule{{Source: "posture", May: all, Required: true}}, said(signal.Effect{}), whole},
	} {
		if got := signal.Fold(whole, facts, c.rules, c.said, now); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	required := []policy.SignalRule{{Source: "posture", May: all, Required: true}}
	for name, said := range map[string][]signal.Signal{
		"silent": nil, "lapsed": said(signal.Effect{}, func(s *signal.Signal) { s.Until = now }), "about another": said(signal.Effect{}, about(signal.About{Grant: "H"})),
	} {
		if got := signal.Fold(whole, facts, required, said, now); !got.Revoked || !slices.Equal(got.Reasons, []string{"nothing was heard of posture, which policy requires"}) {
			t.Errorf("required and %s: %+v", name, got)
		}
	}
}

// TestSignalsOnlyTakeAway: whatever is said under whatever rules, the result is no more than before, more signals leave
// no more, and what was taken stays taken when everything has lapsed.
func TestSignalsOnlyTakeAway(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 20_000 {
		l, rules, said := drawLimits(rng), drawRules(rng), drawSignals(rng)
		some := said[:rng.IntN(len(said)+1)]
		less, least := signal.Fold(l, facts, rules, some, now), signal.Fold(l, facts, rules, said, now)
		if !within(less, l) || !within(least, l) {
			t.Fatalf("%+v grew to %+v and %+v by %+v under %+v", l, less, least, said, rules)
		}
		if heard(rules) && !within(least, less) {
			t.Fatalf("%+v was said more of and grew to %+v, by %+v under %+v", less, least, said, rules)
		}
		if later := signal.Fold(least, facts, rules, nil, now.Add(24*time.Hour)); !within(later, least) {
			t.Fatalf("%+v grew to %+v when all had lapsed", least, later)
		}
	}
}

// heard leaves out what silence does: a source that speaks up can be better than one that does not.
func heard(rules []policy.SignalRule) bool {
	return !slices.ContainsFunc(rules, func(r policy.SignalRule) bool { return r.Required })
}

func within(a, b signal.Limits) bool {
	budget := func(a, b uint64) bool { return b == 0 || a != 0 && a <= b }
	return (a.Revoked || !b.Revoked) && !a.End.After(b.End) && budget(uint64(a.Budget.Bytes), uint64(b.Budget.Bytes)) &&
		budget(a.Budget.Packets, b.Budget.Packets) && budget(a.Budget.Connections, b.Budget.Connections) &&
		budget(uint64(a.Budget.ConnectionsPerSecond), uint64(b.Budget.ConnectionsPerSecond)) && len(a.Reasons) >= len(b.Reasons)
}

func drawLimits(rng *rand.Rand) signal.Limits {
	return signal.Limits{Revoked: rng.IntN(5) == 0, End: now.Add(time.Duration(rng.IntN(100)) * time.Minute), Budget: drawBudget(rng)}
}

func drawBudget(rng *rand.Rand) policy.Budget {
	return policy.Budget{Bytes: policy.Size(rng.IntN(5)), Packets: uint64(rng.IntN(5)), Connections: uint64(rng.IntN(5)), ConnectionsPerSecond: uint32(rng.IntN(5))}
}

var sources = []string{"posture", "incident", policy.SignalFirstSeen, policy.SignalNearBudget}

func drawRules(rng *rand.Rand) (rules []policy.SignalRule) {
	for _, s := range sources {
		if rng.IntN(3) > 0 {
			may := slices.Clone(all)
			rng.Shuffle(len(may), func(i, j int) { may[i], may[j] = may[j], may[i] })
			rules = append(rules, policy.SignalRule{Source: s, May: may[:rng.IntN(4)], Required: rng.IntN(4) == 0})
		}
	}
	return rules
}

func drawSignals(rng *rand.Rand) (said []signal.Signal) {
	for range rng.IntN(6) {
		s := signal.Signal{Source: sources[rng.IntN(len(sources))], UID: uint32(rng.IntN(2)), Until: now.Add(time.Duration(rng.IntN(4)-1) * time.Minute), Reason: "why"}
		s.Effect = signal.Effect{Revoke: rng.IntN(4) == 0, Budget: drawBudget(rng)}
		if rng.IntN(2) == 0 {
			s.Effect.End = now.Add(time.Duration(rng.IntN(100)) * time.Minute)
		}
		if rng.IntN(3) == 0 {
			s.About.Requester = []string{"alice", "bob"}[rng.IntN(2)]
		}
		said = append(said, s)
	}
	return said
}

func TestBuiltIn(t *testing.T) {
	known := func(string, netip.Addr) bool { return true }
	office := []policy.Window{{Days: []string{"Mon"}, From: 8 * 60, To: 18 * 60}}
	wide := facts
	wide.Ports, wide.Duration = 200, time.Hour
	for _, c := range []struct {
		name    string
		facts   signal.Facts
		history signal.History
		rules   []policy.SignalRule
		want    []string
	}{
		{"nothing", facts, signal.History{Seen: known}, nil, nil},
		{"first seen", facts, signal.History{Seen: func(string, netip.Addr) bool { return false }}, nil, []string{"firstSeen: 10.1.0.2 never had a way to postgres on this node"}},
		{"often", facts, signal.History{Seen: known, Recent: 6}, nil, []string{"frequency: alice had 6 grants on this node within 7 days"}},
		{"often, policy's choice", facts, signal.History{Seen: known, Recent: 6}, []policy.SignalRule{{Source: policy.SignalFrequency, Above: 6}}, nil},
		{"wide", wide, signal.History{Seen: known}, nil, []string{"breadth: 1 clients, 200 ports and 1h are a wide way"}},
		{"out of hours", facts, signal.History{Seen: known}, []policy.SignalRule{{Source: policy.SignalOutOfHours, Hours: office}}, []string{"outOfHours: it is Sun 03:00 UTC"}},
	} {
		var got []string
		for _, s := range signal.BuiltIn(c.facts, c.history, c.rules, now) {
			got = append(got, s.String())
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	rules := []policy.SignalRule{{Source: policy.SignalNearBudget, ShortenTo: policy.Duration{Duration: time.Minute}}}
	if got := signal.Fold(whole, facts, rules, signal.NearBudget(79, rules, now), now); !got.End.Equal(whole.End) {
		t.Errorf("shortened at 79 %%: %+v", got)
	}
	if got := signal.Fold(whole, facts, rules, signal.NearBudget(80, rules, now), now); !got.End.Equal(now.Add(time.Minute)) || len(got.Reasons) != 1 {
		t.Errorf("at 80 %%: %+v", got)
	}
}
