package policy_test

import (
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// automation is the good set with a policy that lets workloads ask for paths of their own.
func automation(t *testing.T, more string) *policy.Set {
	t.Helper()
	text := strings.NewReplacer("bindings: [address]", "bindings: [address, workload, tuple]",
		"requesters: [alice]", `requesters: [alice, "spiffe://example.org/backup/*"]`,
		`"10.1.0.2", `, `"10.1.0.2", "127.0.0.0/8", `).Replace(good)
	return mustParse(t, text+more)
}

// asked are the facts of a workload's own request.
func asked(id string) policy.GrantFacts {
	g := goodFacts()
	g.Requester, g.Signers = id, []policy.Signer{{Person: id, KeyID: "svid:1", Uses: []policy.Use{policy.UseRequest}}}
	return g
}

// TestWorkloadsAsk: a workload is known by its SPIFFE ID, and a pattern means what it means in access rules.
func TestWorkloadsAsk(t *testing.T) {
	set := automation(t, "")
	for id, field := range map[string]string{
		"spiffe://example.org/backup/nightly": "",
		"spiffe://example.org/backup/a/b":     "",
		"spiffe://example.org/backup":         "requester",
		"spiffe://example.org/backups":        "requester",
		"spiffe://example.org.evil/backup/x":  "requester",
		"spiffe://example.org/app/web":        "requester",
	} {
		if got := fields(check(set, asked(id))); strings.Join(got, " ") != field {
			t.Errorf("%s: refused for %q, want %q", id, got, field)
		}
	}
	unproven := asked("spiffe://example.org/backup/nightly")
	unproven.Signers = signed("alice")
	if got := fields(check(set, unproven)); strings.Join(got, " ") != "signatures" {
		t.Errorf("asked for in another's name: refused for %q", got)
	}
}

// TestDeniedWorkload: a deny list of identities keeps them from asking, too.
func TestDeniedWorkload(t *testing.T) {
	for entries, field := range map[string]string{
		`identities: ["spiffe://example.org/backup/*"]`:       "requester",
		`identities: ["spiffe://example.org/backup/nightly"]`: "requester",
		`identities: ["spiffe://example.org/backup/weekly"]`:  "",
	} {
		set := automation(t, "---\n"+head+"DenyList\nmetadata: {name: incident}\nspec: {reason: stolen key, "+entries+"}\n")
		if got := fields(check(set, asked("spiffe://example.org/backup/nightly"))); strings.Join(got, " ") != field {
			t.Errorf("%s: refused for %q, want %q", entries, got, field)
		}
	}
}

// TestBindingsToSockets: the node's own addresses are refused where a path would serve whoever has them, and only there.
func TestBindingsToSockets(t *testing.T) {
	set := automation(t, "")
	for binding, field := range map[string]string{policy.BindingWorkload: "", policy.BindingTuple: "", policy.BindingAddress: "addresses[0]"} {
		for _, a := range []string{"10.1.0.1", "127.0.0.1"} {
			g := asked("spiffe://example.org/backup/nightly")
			g.Binding, g.Addresses = binding, addrs(a)
			if got := fields(check(set, g)); strings.Join(got, " ") != field {
				t.Errorf("%s from %s: refused for %q, want %q", binding, a, got, field)
			}
		}
	}
	g := asked("spiffe://example.org/backup/nightly")
	g.Binding, g.Addresses = policy.BindingWorkload, addrs("10.9.9.9")
	if got := fields(check(set, g)); strings.Join(got, " ") != "addresses[0]" {
		t.Errorf("from an address that is not listed: refused for %q", got)
	}
}

func check(set *policy.Set, g policy.GrantFacts) error {
	_, err := set.CheckGrant(g)
	return err
}

func fields(err error) (list []string) {
	for _, e := range policy.Errors(err) {
		list = append(list, e.Field)
	}
	return list
}
