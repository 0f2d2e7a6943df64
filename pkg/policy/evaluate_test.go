package policy_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// TestAnswer: it names the rule that allows a grant, and of a refused one every policy that was asked, the nearest first.
func TestAnswer(t *testing.T) {
	s := mustParse(t, good+widePolicy)
	a := s.Evaluate(goodFacts())
	if !a.Allowed || a.Policy != "nightly-backup" || a.Err() != nil ||
		!strings.Contains(a.Rule, `policy "nightly-backup" (resources.yaml:21): asked for by alice, for at most 15m`) {
		t.Errorf("allowed by: %+v", a.Allowance)
	}
	if len(a.Near) != 1 || a.Near[0].Policy.Name != "wide" {
		t.Errorf("beside it came near: %+v", a.Near)
	}
	long := goodFacts()
	long.Duration, long.Addresses, long.Binding = 2*time.Hour, addrs("192.0.2.1"), "tuple"
	a = s.Evaluate(long)
	var near []string
	for _, n := range a.Near {
		var fields []string
		for _, e := range n.Missing {
			fields = append(fields, e.Field)
		}
		near = append(near, n.Policy.Name+": "+strings.Join(fields, " "))
	}
	if want := []string{"nightly-backup: binding addresses[0] duration", "wide: binding addresses[0] duration ticket"}; a.Allowed || !slices.Equal(near, want) {
		t.Errorf("near: %q, want %q", near, want)
	}
	if got := policy.Errors(a.Err()); len(got) != 3 {
		t.Errorf("the error is not of the nearest alone: %v", got)
	}
}

// TestAnswerOpen: a grant for a service that is not enforced is judged as any other, and the answer says that nothing depends on it.
func TestAnswerOpen(t *testing.T) {
	for _, mode := range []string{"Observe", "Shadow"} {
		s := mustParse(t, strings.Replace(good, "  target: Host\n", "  target: Host\n  mode: "+mode+"\n", 1))
		a := s.Evaluate(goodFacts())
		if !a.Allowed || a.Open != "postgres is not enforced (mode: "+mode+"): everybody reaches it, with or without a grant" {
			t.Errorf("%s: allowed %v, %q", mode, a.Allowed, a.Open)
		}
		strange := goodFacts()
		strange.BreakGlass = true
		if a := s.Evaluate(strange); a.Allowed || a.Open == "" || len(a.Denied) == 0 {
			t.Errorf("%s, by no policy: %+v", mode, a)
		}
	}
	if a := mustParse(t, good).Evaluate(goodFacts()); a.Open != "" {
		t.Errorf("enforced: %q", a.Open)
	}
}

// TestAnswerUnapproved: what others have to agree to is nearer than what nobody can mend, and is told apart.
func TestAnswerUnapproved(t *testing.T) {
	s := quorum(t, `[{from: [b, c], min: 2}]
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: alone}
spec: {services: [postgres], bindings: [address], sources: [10.1.0.2], maxDuration: 1m, requesters: [a]}
`)
	facts := goodFacts()
	facts.Addresses, facts.Ports, facts.Requester, facts.Signers = addrs("10.1.0.2"), nil, "a", signed("a")
	a := s.Evaluate(facts)
	if got := a.Unapproved(); len(got) != 2 || a.Allowed || len(a.Near) != 2 || a.Near[0].Policy.Name != "quorum" {
		t.Errorf("missing: %v, near %v", got, a.Near)
	}
	facts.Reason = ""
	if got := s.Evaluate(facts).Unapproved(); got != nil {
		t.Errorf("without a reason: %v", got)
	}
}

// TestTerms: every term of a policy is said.
func TestTerms(t *testing.T) {
	const terms = "asked for by alice, for at most 15m and 10GiB, with a ticket, approved by 2 of bob, alice, from 22:00 to 06:00 UTC on Mon or 01:00 to 02:00 UTC, until 2030-01-01T00:00:00Z"
	p := policy.BypassPolicy{Spec: policy.BypassPolicySpec{
		Requesters: []string{"alice"}, MaxDuration: policy.Duration{Duration: 15 * time.Minute}, MaxBudget: policy.Budget{Bytes: 10 << 30},
		Ticket: policy.TicketRule{Required: true}, Approvals: []policy.Approval{{From: []string{"bob", "alice"}, Min: 2}},
		Windows: []policy.Window{{Days: []string{"Mon"}, From: 22 * 60, To: 6 * 60}, {From: 60, To: 120}}, NotAfter: at(t, "2030-01-01T00:00:00Z"),
	}}
	if got := p.Terms(); got != terms {
		t.Errorf("got %s", got)
	}
}
