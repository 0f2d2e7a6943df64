package policy_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const databases = `---
apiVersion: sallyport.dev/v1alpha1
kind: Rollout
metadata: {name: databases}
spec:
  services: [postgres]
  operators: [alice]
  waves:
    - {name: first, nodes: ["node-1", "db-*"], mode: Enforce, bake: 1h}
    - {name: tenth, percent: 10, mode: Enforce, bake: 24h}
    - {name: all, percent: 100, mode: Enforce, bake: 24h}
  budget: {refusals: 5, window: 10m, except: ["10.0.9.0/24"]}
`

var shadowed = strings.Replace(good, "target: Host", "target: Host\n  mode: Shadow", 1)

// TestRolloutWrong: what a Rollout must not say is refused at its field.
func TestRolloutWrong(t *testing.T) {
	for _, c := range []struct{ from, to, field string }{
		{"services: [postgres]", "services: [postgers]", "spec.services[0]"},
		{"services: [postgres]", "services: []", "spec.services"},
		{"operators: [alice]", "operators: [nobody]", "spec.operators[0]"},
		{"operators: [alice]", "operators: [\"group:none\"]", "spec.operators[0]"},
		{"name: tenth", "name: first", "spec.waves[1].name"},
		{`nodes: ["node-1", "db-*"], `, "", "spec.waves[0]"},
		{`"db-*"`, `"db-["`, "spec.waves[0].nodes[1]"},
		{"percent: 10,", "percent: 101,", "spec.waves[1].percent"},
		{"mode: Enforce, bake: 1h", "mode: Observe, bake: 1h", "spec.waves[0].mode"},
		{"bake: 1h", "bake: 0s", "spec.waves[0].bake"},
		{"window: 10m", "window: 48h", "spec.budget.window"},
		{"refusals: 5", "refusals: 5, percent: 101", "spec.budget.percent"},
		{"refusals: 5", "refusals: 5, reasons: [SOMETHING]", "spec.budget.reasons[0]"},
		{"  budget:", "  advance: Always\n  budget:", "spec.advance"},
		{"  budget:", "  unknown: 1\n  budget:", "spec.unknown"},
	} {
		text := strings.Replace(databases, c.from, c.to, 1)
		_, err := policy.Parse("resources.yaml", []byte(shadowed+text))
		if text == databases || err == nil || policy.Errors(err)[0].Field != c.field {
			t.Errorf("%s: %v, want the field %s", c.to, err, c.field)
		}
	}
	twice := shadowed + databases + strings.Replace(databases, "name: databases", "name: other", 1)
	if _, err := policy.Parse("resources.yaml", []byte(twice)); err == nil || !strings.Contains(err.Error(), "already rolled out") {
		t.Errorf("a service in two: %v", err)
	}
}

// TestRolloutLoosenings: a Rollout that is new only tightens; one that is gone, or says anything else, has to be signed.
func TestRolloutLoosenings(t *testing.T) {
	without, with := mustParse(t, shadowed), mustParse(t, shadowed+databases)
	if got := policy.Loosenings(without, with); len(got) != 0 {
		t.Errorf("new: %v", got)
	}
	if got := policy.Loosenings(with, without); len(got) != 1 || !strings.Contains(got[0].String(), "Rollout databases: is gone") {
		t.Errorf("gone: %v", got)
	}
	for _, c := range []struct{ from, to, says string }{
		{"refusals: 5", "refusals: 1", "spec.budget"},
		{"window: 10m", "window: 24h", "spec.budget"},
		{`, except: ["10.0.9.0/24"]`, "", "spec.budget"},
		{`"node-1", `, "", "spec.waves"},
		{"mode: Enforce, bake: 1h", "mode: Shadow, bake: 1h", "spec.waves"},
		{"services: [postgres]", "services: [postgres, cache]", "spec.services"},
		{"  budget:", "  advance: Auto\n  budget:", "spec.advance"},
	} {
		next := mustParse(t, shadowed+strings.Replace(databases, c.from, c.to, 1))
		if got := policy.Loosenings(with, next); len(got) != 1 || !strings.Contains(got[0].String(), "Rollout databases: "+c.says) {
			t.Errorf("%s became %s: %v", c.from, c.to, got)
		}
		if next.Digest() == with.Digest() {
			t.Errorf("%s is not in the digest", c.to)
		}
	}
	enforced := mustParse(t, good+databases)
	if got := policy.Loosenings(with, enforced); len(got) != 0 {
		t.Errorf("a service that goes over to Enforce by itself: %v", got)
	}
	if got := policy.Loosenings(enforced, with); len(got) != 1 || !strings.Contains(got[0].String(), "spec.mode") {
		t.Errorf("and back: %v", got)
	}
}

// TestUDPBesideRolledOut: UDP at the ports of a service that a Rollout may have enforced is opened by nobody's hand.
func TestUDPBesideRolledOut(t *testing.T) {
	udp := "---\napiVersion: sallyport.dev/v1alpha1\nkind: ProtectedService\nmetadata: {name: quic}\nspec: {target: Host, protocol: UDP, mode: Observe, ports: [5432]}\n"
	if got := policy.Loosenings(mustParse(t, shadowed+databases), mustParse(t, shadowed+databases+udp)); len(got) != 1 {
		t.Errorf("loosenings: %v", got)
	}
	if got := policy.Loosenings(mustParse(t, shadowed), mustParse(t, shadowed+udp)); len(got) != 0 {
		t.Errorf("beside a service that is shadowed everywhere: %v", got)
	}
}

// TestAtModes: a roll-out makes services stricter and never less strict than they say.
func TestAtModes(t *testing.T) {
	modes := []policy.Mode{policy.ModeObserve, policy.ModeShadow, policy.ModeEnforce}
	for i, own := range modes {
		set := mustParse(t, strings.Replace(good, "target: Host", "target: Host\n  mode: "+string(own), 1)+databases)
		for j, reached := range modes {
			at := set.AtModes(map[string]policy.Mode{"postgres": reached})
			svc, _ := at.Service("postgres")
			if svc.Spec.Mode != modes[max(i, j)] {
				t.Errorf("%s that has reached %s is %s", own, reached, svc.Spec.Mode)
			}
			if len(at.Rollouts()) != 0 || strings.Contains(string(at.YAML()), "Rollout") || (at.Digest() == set.Digest()) {
				t.Errorf("%s that has reached %s: the set has roll-outs still", own, reached)
			}
			if again, err := policy.Parse("again.yaml", at.YAML()); err != nil || again.Digest() != at.Digest() {
				t.Errorf("does not come back: %v", err)
			}
		}
		if svc, _ := set.AtModes(nil).Service("postgres"); svc.Spec.Mode != own {
			t.Errorf("%s that has reached nothing is %s", own, svc.Spec.Mode)
		}
	}
}

// TestWaves: about as many nodes as said are in a percentage, and who is in a small one is in a larger one.
func TestWaves(t *testing.T) {
	ten, fifty, in := policy.Wave{Percent: 10}, policy.Wave{Percent: 50}, 0
	for i := range 1000 {
		node := fmt.Sprintf("node-%d", i)
		if ten.Has(node) {
			in++
			if !fifty.Has(node) {
				t.Errorf("%s is in 10 %% and not in 50 %%", node)
			}
		}
		if !(policy.Wave{Percent: 100}).Has(node) || (policy.Wave{}).Has(node) {
			t.Errorf("%s is not in all, or is in none", node)
		}
	}
	if in < 70 || in > 130 {
		t.Errorf("%d of 1000 are in 10 %%", in)
	}
	named := policy.Wave{Nodes: []string{"node-1", "db-*"}}
	for node, want := range map[string]bool{"node-1": true, "node-12": false, "db-7": true, "adb-7": false} {
		if named.Has(node) != want {
			t.Errorf("%s: %v", node, !want)
		}
	}
}

// TestBudgetCounts: attacks, strangers that are left out, and what is none of a client's connections cost nothing.
func TestBudgetCounts(t *testing.T) {
	set := mustParse(t, shadowed+databases)
	b := set.Rollouts()[0].Spec.Budget
	client, scanner := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.0.9.7")
	for reason, want := range map[flow.Reason]bool{flow.ReasonNoTLS: true, flow.ReasonNotAuthorised: true, flow.ReasonNoListener: true,
		flow.ReasonUpstreamFailed: true, flow.ReasonStray: false, flow.ReasonSourceForeign: false, flow.ReasonMalformed: false, flow.ReasonPathExpired: false} {
		if b.Counts(client, reason) != want || b.Counts(scanner, reason) {
			t.Errorf("%s counts: %v", reason, !want)
		}
	}
	b.Reasons = []string{"STRAY"}
	if !b.Counts(client, flow.ReasonStray) || b.Counts(client, flow.ReasonNoTLS) {
		t.Error("the reasons that are written do not count alone")
	}
	if !set.MayRollOut(set.Rollouts()[0], "alice") || set.MayRollOut(set.Rollouts()[0], "bob") {
		t.Error("others than its operators may say how it goes on")
	}
}
