package policy_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// variants are what stands in the places of a set: @1, @2 and so on.
var variants = [][]string{
	{"ports: [5432]", "ports: [5432, 5433]"},
	{`["spiffe://example.org/app/web"]`, `["spiffe://example.org/*"]`, `["spiffe://example.org/app/*", "spiffe://example.org/ops/a"]`, `["spiffe://example.org/ops/a"]`},
	{`["10.1.0.2"]`, `["10.1.0.0/24"]`, `["10.1.0.0/24", "fd00:1::9"]`, `["10.0.0.0/8"]`},
	{"1m", "15m", "1h"},
	{"[alice]", "[bob]", `["group:dba"]`, "[alice, bob]"},
	{"[]", "[{from: [bob]}]", `[{from: ["group:dba"]}]`, "[{from: [bob]}, {from: [carol]}]", "[{from: [bob, carol], min: 2}]", "[{from: [carol], min: 2}]"},
	{"{}", "{required: true}", `{required: true, pattern: "OPS-[0-9]"}`, `{pattern: "OPS-[0-9]"}`},
	{"[]", `[{from: "08:00", to: "20:00"}]`, `[{from: "09:00", to: "10:00"}, {from: "08:00", to: "20:00"}]`, `[{days: [Mon], from: "08:00", to: "20:00"}]`},
	{`""`, `'duration < duration("10m")'`},
	{"{}", "{bytes: 1GiB}", "{bytes: 2GiB, packets: 10}"},
	{"", "class: Sensitive, ", "maxReach: 1, ", "maxReach: 2, ", "nodeAddresses: true, "},
	{"", "notAfter: 2026-11-23T12:00:00Z, ", "notAfter: 2026-12-01T00:00:00Z, "},
	{"[alice]", "[alice, bob]", "[bob, carol]"},
	{"", "people: [alice], ", "addresses: [10.1.0.2], ", "addresses: [10.1.0.0/24], ", "services: [postgres], ", "people: [carol, bob], "},
	{"", "identities: [\"spiffe://example.org/ops/*\"], ", "identities: [\"spiffe://example.org/ops/a\"], "},
	{"[]", "[nightly]", "[nightly, other]"},
	{"uplink", `""`, "pod"},
	{"", "mode: Shadow, ", "mode: Enforce, ", "mode: Observe, "},
}

const variable = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, @17 @0, access: [{identities: @1}]}
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: backup}
spec: {services: [postgres], bindings: [address], sources: @2, maxDuration: @3, requesters: @4, approvals: @5, ticket: @6, windows: @7,
  when: @8, maxBudget: @9, @10 @11 templates: @15, ingress: @16}
---
apiVersion: sallyport.dev/v1alpha1
kind: GrantTemplate
metadata: {name: nightly}
spec: {service: postgres, maxDuration: 10m}
---
apiVersion: sallyport.dev/v1alpha1
kind: GrantTemplate
metadata: {name: other}
spec: {service: postgres, maxDuration: 1h}
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: k}
spec:
  version: 1
  people:
    - {name: alice, keys: [{publicKey: "` + aliceKey + `"}]}
    - {name: bob, keys: [{publicKey: "` + bobKey + `"}]}
    - {name: carol, keys: [{publicKey: "` + carolKey + `"}]}
  groups: [{name: dba, members: @12}]
---
apiVersion: sallyport.dev/v1alpha1
kind: DenyList
metadata: {name: stop}
spec: {reason: r, @13 @14 grants: ["` + grantID + `"]}
`

// filled is the set with those variants; nil where they do not fit together.
func filled(choice []int) *policy.Set {
	text := variable
	for i := len(variants) - 1; i >= 0; i-- { // @1 is in @10
		text = strings.ReplaceAll(text, fmt.Sprintf("@%d", i), variants[i][choice[i]])
	}
	set, err := policy.Parse("resources.yaml", []byte(text))
	if err != nil {
		return nil
	}
	return set
}

// TestNoLooseningIsOverlooked: between two sets at random, where none is found, whatever the new one allows the old one did.
func TestNoLooseningIsOverlooked(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 12))
	found, none, allowed := 0, 0, 0
	for range 250 {
		choice := make([]int, len(variants))
		for i := range choice {
			choice[i] = r.IntN(len(variants[i]))
			if r.IntN(2) == 0 {
				choice[i] = 0
			}
		}
		old := filled(choice)
		for range 1 + r.IntN(2) {
			i := r.IntN(len(choice))
			choice[i] = r.IntN(len(variants[i]))
		}
		next := filled(choice)
		if old == nil || next == nil {
			continue
		}
		if len(policy.Loosenings(old, next)) > 0 {
			found++
			continue
		}
		none++
		for range 150 {
			allowed += noLooser(t, r, old, next)
		}
	}
	t.Logf("%d looser, %d not, and what %d grants were allowed in the new one", found, none, allowed)
	if found < 30 || none < 30 || allowed < 60 {
		t.Error("that shows little")
	}
}

// noLooser tries a grant and an identity at both, and counts a grant that the new one allows.
func noLooser(t *testing.T, r *rand.Rand, old, next *policy.Set) (allowed int) {
	t.Helper()
	if is, _ := next.Service("postgres"); !is.Enforced() {
		if was, _ := old.Service("postgres"); was.Enforced() {
			t.Fatalf("everybody is let in:\n%s\n--- became ---\n%s", old.YAML(), next.YAML())
		}
	}
	for _, id := range []string{"spiffe://example.org/app/web", "spiffe://example.org/ops/a", "spiffe://example.org/ops/b", "spiffe://example.org/x"} {
		who := spiffeid.RequireFromString(id)
		if next.Authorise("postgres", policy.Caller{ID: who}, nil, time.Time{}).Allowed && !old.Authorise("postgres", policy.Caller{ID: who}, nil, time.Time{}).Allowed {
			t.Fatalf("%s is let in:\n%s\n--- became ---\n%s", id, old.YAML(), next.YAML())
		}
	}
	g := policy.GrantFacts{
		Service: "postgres", Ports: pick(r, nil, []uint16{5432}, []uint16{5433}), Addresses: pick(r, addrs("10.1.0.2"), addrs("10.1.0.9", "fd00:1::9"), addrs("10.2.0.1")),
		Duration: pick(r, time.Minute, 10*time.Minute, time.Hour), Binding: policy.BindingAddress, Reason: "r", Ticket: pick(r, "OPS-1", "OPS-1", "", "X"),
		Requester: pick(r, "alice", "bob"), Signers: pick(r, signed("alice"), signed("bob", "alice"), signed("alice", "bob", "carol")),
		Now: pick(r, time.Time{}, at(t, "2026-11-23T09:30:00Z"), at(t, "2026-11-24T18:00:00Z")), Template: pick(r, "", "nightly", "other"),
		Budget: pick(r, policy.Budget{Bytes: 1 << 20, Packets: 5}, policy.Budget{}), Ingress: pick(r, policy.IngressUplink, policy.IngressUplink, policy.IngressPod, ""),
		NodeAddresses: addrs("10.2.0.1"),
	}
	is, was := next.Evaluate(g), old.Evaluate(g)
	if !is.Allowed {
		return 0
	}
	longer := is.Until.IsZero() && !was.Until.IsZero() || !was.Until.IsZero() && is.Until.After(was.Until)
	if !was.Allowed && errorAt(was, "ports[0]") {
		return 0 // a port that is new: nobody had protected it
	}
	if !was.Allowed || longer {
		t.Fatalf("%+v is allowed:\n%s\n--- became ---\n%s", g, old.YAML(), next.YAML())
	}
	return 1
}

// errorAt says that the answer refuses that field.
func errorAt(a policy.Answer, field string) bool {
	return slices.ContainsFunc(policy.Errors(a.Err()), func(e *policy.Error) bool { return e.Field == field })
}
