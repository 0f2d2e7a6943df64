package policy_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// glass is a set with a policy for break-glass beside an ordinary one. People a to e have keys that may break the glass.
func glass(t *testing.T, change ...string) (*policy.Set, error) {
	t.Helper()
	var people []string
	for i, name := range strings.Split("a b c d e", " ") {
		people = append(people, fmt.Sprintf("{name: %s, keys: [{publicKey: \"%s\", uses: [request, approve, breakGlass]}]}", name, numberedKey(t, i)))
	}
	text := strings.NewReplacer(change...).Replace(fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, ports: [5432]}
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: daily}
spec:
  services: [postgres]
  bindings: [address]
  sources: [10.1.0.2]
  maxDuration: 2h
  requesters: [a]
  approvals: [{from: [b]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: glass}
spec:
  services: [postgres]
  bindings: [address]
  sources: [10.1.0.2]
  breakGlass: true
  maxDuration: 30m
  requesters: [a]
  approvals: [{from: [a, b, c, d], min: 2}]
  reviewers: [a, d, e]
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: k}
spec:
  version: 1
  people: [%s]
`, strings.Join(people, ", ")))
	return policy.Parse("glass.yaml", []byte(text))
}

func TestBreakGlassPolicyIsNarrow(t *testing.T) {
	for _, c := range []struct{ from, to, field string }{
		{"maxDuration: 30m", "maxDuration: 61m", "spec.maxDuration"},
		{"approvals: [{from: [a, b, c, d], min: 2}]", "approvals: [{from: [a, b, c, d]}]", "spec.approvals"},
		{"approvals: [{from: [a, b, c, d], min: 2}]", "", "spec.approvals"},
		{"reviewers: [a, d, e]", "", "spec.reviewers"},
		{"reviewers: [a, d, e]", "reviewers: [mallory]", "spec.reviewers[0]"},
	} {
		_, err := glass(t, c.from, c.to)
		if e := policy.Errors(err); len(e) != 1 || e[0].Field != c.field || e[0].Hint == "" {
			t.Errorf("%s: %v, want one about %s", c.to, err, c.field)
		}
	}
	for _, c := range []string{"maxDuration: 30m", "maxDuration: 1h", "min: 2}]", "min: 1}, {from: [c]}]"} {
		if _, err := glass(t, c, c); err != nil {
			t.Error(err)
		}
	}
}

// TestBreakGlassIsItsOwn: neither kind of grant is allowed by a policy for the other, nor by keys for the other.
func TestBreakGlassIsItsOwn(t *testing.T) {
	s, err := glass(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name       string
		breakGlass bool
		signers    string
		uses       []policy.Use
		duration   time.Duration
		wrong      string
	}{
		{"daily", false, "a b", nil, time.Hour, ""},
		{"daily, with keys that may also break the glass", false, "a b", []policy.Use{policy.UseRequest, policy.UseApprove, policy.UseBreakGlass}, time.Hour, ""},
		{"daily, with keys that may only break the glass", false, "a b", []policy.Use{policy.UseBreakGlass}, time.Hour, "signatures signatures"},
		{"glass", true, "a b c", []policy.Use{policy.UseBreakGlass}, 30 * time.Minute, ""},
		{"glass, longer", true, "a b c", []policy.Use{policy.UseBreakGlass}, 31 * time.Minute, "duration"},
		{"glass, one approval", true, "a b", []policy.Use{policy.UseBreakGlass}, time.Minute, "signatures"},
		{"glass, twice the same", true, "a b b", []policy.Use{policy.UseBreakGlass}, time.Minute, "signatures"},
		{"glass, with keys for every day", true, "a b c", nil, time.Minute, "signatures signatures signatures"},
		{"glass, with keys for resources", true, "a b c", []policy.Use{policy.UseResources}, time.Minute, "signatures signatures signatures"},
	} {
		g := goodFacts()
		g.Addresses, g.Requester, g.Duration, g.BreakGlass = addrs("10.1.0.2"), "a", c.duration, c.breakGlass
		g.Signers = nil
		for _, person := range strings.Fields(c.signers) {
			g.Signers = append(g.Signers, policy.Signer{Person: person, Uses: c.uses})
		}
		may, err := s.CheckGrant(g)
		var fields []string
		for _, e := range policy.Errors(err) {
			fields = append(fields, e.Field)
		}
		if got := strings.Join(fields, " "); got != c.wrong || c.wrong == "" && (may.Policy == "glass") != c.breakGlass {
			t.Errorf("%s: by %q, wrong %q, want %q: %v", c.name, may.Policy, got, c.wrong, err)
		}
	}
	without, err := glass(t, "breakGlass: true", "breakGlass: false")
	if err != nil {
		t.Fatal(err)
	}
	g := goodFacts()
	g.BreakGlass = true
	if _, err := without.CheckGrant(g); err == nil || !strings.Contains(err.Error(), "for break-glass") {
		t.Errorf("without a policy for it: %v", err)
	}
}

func TestWhoMaySayNoAndReview(t *testing.T) {
	s, err := glass(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		breakGlass   bool
		deny, review string
	}{{false, "b", "b"}, {true, "b c d", "d e"}} {
		g := goodFacts()
		g.Requester, g.BreakGlass, g.Signers = "a", c.breakGlass, nil
		var deny, review []string
		for _, p := range strings.Split("a b c d e mallory", " ") {
			if s.MayDeny(g, p) {
				deny = append(deny, p)
			}
			if s.MayReview(g, p) {
				review = append(review, p)
			}
			g.Signers = signed("a", p)
			if s.MayReview(g, p) {
				t.Errorf("%s reviews what %s signed", p, p)
			}
			g.Signers = nil
		}
		if got := strings.Join(deny, " "); got != c.deny {
			t.Errorf("break-glass %v: may deny %q, want %q", c.breakGlass, got, c.deny)
		}
		if got := strings.Join(review, " "); got != c.review {
			t.Errorf("break-glass %v: may review %q, want %q", c.breakGlass, got, c.review)
		}
	}
}
