package policy_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// ofClass is quorum's policy with a class and whatever else it says.
func ofClass(approvals, duration, says string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, ports: [5432, 5433, 5434]}
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: p}
spec: {services: [postgres], bindings: [address], sources: [10.0.0.0/8], maxDuration: %s, requesters: [alice], approvals: [%s], %s}
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: k}
spec: {version: 1, people: [{name: alice, keys: [{publicKey: "%s"}]}, {name: bob, keys: [{publicKey: "%s"}]}]}
`, duration, approvals, says, aliceKey, bobKey)
}

// TestClass: what follows from each class is held against the policy when it is read.
func TestClass(t *testing.T) {
	const one, two = "{from: [bob]}", "{from: [bob]}, {from: [bob]}"
	for _, c := range []struct {
		approvals, duration, says string
		wrong                     string // field, and a part of what is said
	}{
		{"", "24h", "class: Routine", ""},
		{one, "4h", "class: Sensitive, ticket: {required: true}", ""},
		{one, "4h1s", "class: Sensitive, ticket: {required: true}", "spec.maxDuration: a Sensitive policy allows at most 4h"},
		{one, "4h", "class: Sensitive", "spec.ticket: a Sensitive policy requires a ticket"},
		{"", "4h", "class: Sensitive, ticket: {required: true}", "spec.approvals: a Sensitive policy wants the approval of others, at least 1"},
		{two, "1h", "class: Critical, ticket: {required: true}", ""},
		{"{from: [bob], min: 2}", "1h", "class: Critical, ticket: {required: true}", ""},
		{one, "1h", "class: Critical, ticket: {required: true}", "spec.approvals: a Critical policy wants the approval of others, at least 2"},
		{two, "61m", "class: Critical, ticket: {required: true}", "spec.maxDuration: a Critical policy allows at most 1h"},
		{two, "1h", "class: critical", `spec.class: class "critical" is not known`},
	} {
		_, err := policy.Parse("resources.yaml", []byte(ofClass(c.approvals, c.duration, c.says)))
		if (err == nil) != (c.wrong == "") || err != nil && !strings.Contains(err.Error(), c.wrong) {
			t.Errorf("%s, %s, [%s]: %v, want %q", c.says, c.duration, c.approvals, err, c.wrong)
		}
	}
}

// TestReach: a grant opens no more ways in than its policy allows, or else the class of it.
func TestReach(t *testing.T) {
	const two = "{from: [bob]}, {from: [bob]}"
	for _, c := range []struct {
		approvals, says string
		clients         int
		ports           []uint16
		allowed         bool
	}{
		{"", "", 64, nil, true},
		{"", "maxReach: 6", 2, nil, true},
		{"", "maxReach: 5", 2, nil, false},
		{"", "maxReach: 5", 5, []uint16{5432}, true},
		{"", "maxReach: 5", 6, []uint16{5432}, false},
		{two, "class: Critical, ticket: {required: true}", 5, nil, true},
		{two, "class: Critical, ticket: {required: true}", 6, nil, false},
		{two, "class: Critical, ticket: {required: true}, maxReach: 18", 6, nil, true},
		{"{from: [bob]}", "class: Sensitive, ticket: {required: true}", 21, nil, true},
		{"{from: [bob]}", "class: Sensitive, ticket: {required: true}", 22, nil, false},
	} {
		facts := goodFacts()
		facts.Addresses, facts.Ports, facts.Ticket = nil, c.ports, "OPS-1"
		for i := range c.clients {
			facts.Addresses = append(facts.Addresses, addrs(fmt.Sprintf("10.1.0.%d", 10+i))...)
		}
		var refused bool
		for _, n := range mustParse(t, ofClass(c.approvals, "15m", c.says)).Evaluate(facts).Near {
			for _, e := range n.Missing {
				refused = refused || e.Field == "reach" && strings.Contains(e.Msg, "more ways in than")
			}
		}
		if refused == c.allowed {
			t.Errorf("%s: %d clients, ports %v: refused %v", c.says, c.clients, c.ports, refused)
		}
	}
}
