package policy_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const backupTemplate = `---
apiVersion: sallyport.dev/v1alpha1
kind: GrantTemplate
metadata: {name: backup}
spec:
  service: postgres
  ports: [5432]
  bindings: [address]
  clients: ["10.1.0.2"]
  ingress: uplink
  maxDuration: 10m
  maxBudget: {bytes: 1GiB}
  reasonPrefix: "backup: "
`

// TestTemplate: a grant that names a template may say less than it in every field, and more in none.
func TestTemplate(t *testing.T) {
	only := strings.Replace(good, "ticket: {required: false}", "templates: [backup]", 1)
	for _, c := range []struct {
		name   string
		text   string
		change func(*policy.GrantFacts)
		fields []string
	}{
		{"all of it", good, func(*policy.GrantFacts) {}, nil},
		{"less", good, func(g *policy.GrantFacts) { g.Duration, g.Budget.Bytes, g.Budget.Packets = time.Second, 1, 1 }, nil},
		{"none", good, func(g *policy.GrantFacts) { g.Template, g.Duration, g.Reason = "", 15*time.Minute, "other" }, nil},
		{"unknown", good, func(g *policy.GrantFacts) { g.Template = "restore" }, []string{"template"}},
		{"none where one is asked for", only, func(g *policy.GrantFacts) { g.Template = "" }, []string{"template"}},
		{"the one that is asked for", only, func(*policy.GrantFacts) {}, nil},
		{"longer", good, func(g *policy.GrantFacts) { g.Duration = 10*time.Minute + 1 }, []string{"duration"}},
		{"another client", good, func(g *policy.GrantFacts) { g.Addresses = addrs("10.1.0.2", "10.1.0.3") }, []string{"addresses[1]"}},
		{"by another device", good, func(g *policy.GrantFacts) { g.Ingress = "" }, []string{"ingress"}},
		{"no budget", good, func(g *policy.GrantFacts) { g.Budget = policy.Budget{} }, []string{"budget.bytes"}},
		{"more of it", good, func(g *policy.GrantFacts) { g.Budget.Bytes = 2 << 30 }, []string{"budget.bytes"}},
		{"for another reason", good, func(g *policy.GrantFacts) { g.Reason = "restore" }, []string{"reason"}},
		{"another port", strings.Replace(good, "ports: [5432]", "ports: [5432, 5433]", 1), func(g *policy.GrantFacts) { g.Ports = []uint16{5433} }, []string{"ports[0]"}},
		{"every port", strings.Replace(good, "ports: [5432]", "ports: [5432, 5433]", 1), func(g *policy.GrantFacts) { g.Ports = nil }, []string{"ports[1]"}},
		{"another service", strings.Replace(good, "services: [postgres]", "services: [postgres, cache]", 1),
			func(g *policy.GrantFacts) { g.Service, g.Ports = "cache", []uint16{6379} }, []string{"service", "ports[0]"}},
		{"another binding", strings.Replace(good, "bindings: [address]", "bindings: [address]", 1), func(g *policy.GrantFacts) { g.Binding = "tuple" }, []string{"binding", "binding"}},
	} {
		facts := goodFacts()
		facts.Template, facts.Addresses, facts.Duration, facts.Reason = "backup", addrs("10.1.0.2"), 10*time.Minute, "backup: the usual"
		facts.Ingress, facts.Budget = policy.IngressUplink, policy.Budget{Bytes: 1 << 30}
		c.change(&facts)
		var fields []string
		for _, e := range policy.Errors(mustParse(t, c.text+backupTemplate).Evaluate(facts).Err()) {
			fields = append(fields, e.Field)
		}
		if !slices.Equal(fields, c.fields) {
			t.Errorf("%s: refused for %v, want %v", c.name, fields, c.fields)
		}
	}
}

// TestTemplateIsChecked: what a template says wrongly is found when it is read.
func TestTemplateIsChecked(t *testing.T) {
	for from, to := range map[string]string{
		"service: postgres": "service: mysql", "ports: [5432]": "ports: [0]", "ingress: uplink": "ingress: door",
		"maxDuration: 10m": "maxDuration: 25h", "bindings: [address]": "bindings: [address, address]", "name: backup": "name: Backup",
	} {
		if _, err := policy.Parse("resources.yaml", []byte(good+strings.Replace(backupTemplate, from, to, 1))); len(policy.Errors(err)) != 1 {
			t.Errorf("%s: %v", to, err)
		}
	}
	if _, err := policy.Parse("resources.yaml", []byte(strings.Replace(good, "ticket: {required: false}", "templates: [restore]", 1))); err == nil {
		t.Error("a policy asks for a template that is not there")
	}
}
