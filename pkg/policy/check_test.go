package policy_test

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func goodFacts() policy.GrantFacts {
	return policy.GrantFacts{
		Service: "postgres", Ports: []uint16{5432}, Addresses: addrs("10.1.0.2", "fd00:1::9"),
		Duration: 15 * time.Minute, Binding: policy.BindingAddress, Reason: "nightly backup",
		Requester: "alice", Signers: signed("alice"), NodeAddresses: addrs("10.1.0.1", "fd00:1::1"),
	}
}

func signed(people ...string) (list []policy.Signer) {
	for _, p := range people {
		list = append(list, policy.Signer{Person: p, KeyID: "sp:" + p})
	}
	return list
}

func TestCheckGrant(t *testing.T) {
	for _, c := range []struct {
		name   string
		policy func(string) string
		facts  func(*policy.GrantFacts)
		fields []string // that are refused
		msg    string   // in the first error
	}{
		{name: "good", fields: nil},
		{name: "all ports", facts: func(g *policy.GrantFacts) { g.Ports = nil }},
		{name: "second signer counts", facts: func(g *policy.GrantFacts) { g.Signers = signed("mallory", "alice") }},
		{name: "unknown service", facts: func(g *policy.GrantFacts) { g.Service = "mysql" }, fields: []string{"service"}, msg: `no ProtectedService is named "mysql"`},
		{name: "service without policy", facts: func(g *policy.GrantFacts) { g.Service = "cache" }, fields: []string{"service"}, msg: "no BypassPolicy covers"},
		{name: "port not protected", facts: func(g *policy.GrantFacts) { g.Ports = []uint16{5432, 22} }, fields: []string{"ports[1]"}, msg: "does not protect port 22"},
		{name: "no address", facts: func(g *policy.GrantFacts) { g.Addresses = nil }, fields: []string{"addresses"}, msg: "at least one"},
		{name: "address not listed", facts: func(g *policy.GrantFacts) { g.Addresses = addrs("10.1.1.2") }, fields: []string{"addresses[0]"}, msg: "does not list 10.1.1.2"},
		{name: "v4-mapped address", facts: func(g *policy.GrantFacts) { g.Addresses = addrs("::ffff:10.1.0.2") }, fields: []string{"addresses[0]"}, msg: "mapped into IPv6"},
		{name: "address with a zone", facts: func(g *policy.GrantFacts) { g.Addresses = addrs("fd00:1::9%eth0") }, fields: []string{"addresses[0]"}, msg: "has a zone"},
		{name: "zero address", facts: func(g *policy.GrantFacts) { g.Addresses = []netip.Addr{{}} }, fields: []string{"addresses[0]"}, msg: "not an IP address"},
		{name: "address of the node", facts: func(g *policy.GrantFacts) { g.Addresses = addrs("10.1.0.1") }, fields: []string{"addresses[0]"}, msg: "is an address of the node"},
		{name: "address of the node, mapped in its list", facts: func(g *policy.GrantFacts) { g.NodeAddresses = addrs("::ffff:10.1.0.2") }, fields: []string{"addresses[0]"}, msg: "is an address of the node"},
		{name: "address of the node, allowed", policy: allowNode, facts: func(g *policy.GrantFacts) { g.Addresses = addrs("10.1.0.1") }},
		{name: "loopback", facts: func(g *policy.GrantFacts) { g.Addresses = addrs("127.0.0.1") }, fields: []string{"addresses[0]", "addresses[0]"}, msg: "does not list 127.0.0.1"},
		{name: "loopback, allowed but not listed", policy: allowNode, facts: func(g *policy.GrantFacts) { g.Addresses = addrs("127.0.0.1") }, fields: []string{"addresses[0]"}, msg: "does not list"},
		{name: "loopback, allowed and listed", policy: func(s string) string { return strings.Replace(allowNode(s), `"10.1.0.2"`, `"127.0.0.1"`, 1) }, facts: func(g *policy.GrantFacts) { g.Addresses = addrs("127.0.0.1") }},
		{name: "zero duration", facts: func(g *policy.GrantFacts) { g.Duration = 0 }, fields: []string{"duration"}, msg: "more than 0"},
		{name: "negative duration", facts: func(g *policy.GrantFacts) { g.Duration = -1 }, fields: []string{"duration"}, msg: "more than 0"},
		{name: "over the cap", facts: func(g *policy.GrantFacts) { g.Duration++ }, fields: []string{"duration"}, msg: "over the cap of 15m"},
		{name: "budget, none required", facts: func(g *policy.GrantFacts) { g.Budget.Bytes = 1 }},
		{name: "no budget", policy: needBudget, fields: []string{"budget.bytes", "budget.connections"}, msg: "requires a limit of at most 10GiB"},
		{name: "budget", policy: needBudget, facts: func(g *policy.GrantFacts) {
			g.Budget = policy.Budget{Bytes: 10 << 30, Connections: 3, Packets: 1 << 40}
		}},
		{name: "budget over the cap", policy: needBudget, facts: func(g *policy.GrantFacts) { g.Budget = policy.Budget{Bytes: 10<<30 + 1, Connections: 4} },
			fields: []string{"budget.bytes", "budget.connections"}, msg: "10737418241B is over the cap of 10GiB"},
		{name: "ingress, none required", facts: func(g *policy.GrantFacts) { g.Ingress = policy.IngressPod }},
		{name: "ingress", policy: needUplink, facts: func(g *policy.GrantFacts) { g.Ingress = policy.IngressUplink }},
		{name: "no ingress", policy: needUplink, fields: []string{"ingress"}, msg: "uplink devices alone"},
		{name: "another ingress", policy: needUplink, facts: func(g *policy.GrantFacts) { g.Ingress = policy.IngressPod }, fields: []string{"ingress"}, msg: "uplink devices alone"},
		{name: "another binding", facts: func(g *policy.GrantFacts) { g.Binding = "workload" }, fields: []string{"binding"}, msg: `binding "workload"`},
		{name: "no binding", facts: func(g *policy.GrantFacts) { g.Binding = "" }, fields: []string{"binding"}, msg: `binding ""`},
		{name: "empty reason", facts: func(g *policy.GrantFacts) { g.Reason = " \t" }, fields: []string{"reason"}, msg: "is empty"},
		{name: "no ticket", policy: needTicket, fields: []string{"ticket"}, msg: "requires a ticket"},
		{name: "ticket", policy: needTicket, facts: func(g *policy.GrantFacts) { g.Ticket = "OPS-1" }},
		{name: "nobody signed", facts: func(g *policy.GrantFacts) { g.Signers = nil }, fields: []string{"signatures"}, msg: "the requester alice has not signed it"},
		{name: "another signed", facts: func(g *policy.GrantFacts) { g.Signers = signed("bob") }, fields: []string{"signatures"}, msg: "the requester alice has not signed it"},
		{name: "another asked", facts: func(g *policy.GrantFacts) { g.Requester, g.Signers = "bob", signed("alice", "bob") }, fields: []string{"requester"}, msg: `lets "bob" ask for nothing`},
		{name: "signed with a key for something else", facts: func(g *policy.GrantFacts) { g.Signers[0].Uses = []policy.Use{policy.UseApprove} }, fields: []string{"signatures"}, msg: "the requester alice has not signed it"},
		{
			name: "everything at once", policy: needTicket,
			facts: func(g *policy.GrantFacts) {
				*g = policy.GrantFacts{Service: "postgres", Ports: []uint16{1}, Addresses: addrs("10.9.9.9")}
			},
			fields: []string{"binding", "ports[0]", "addresses[0]", "duration", "reason", "ticket", "requester"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			text, facts := good, goodFacts()
			if c.policy != nil {
				text = c.policy(text)
			}
			if c.facts != nil {
				c.facts(&facts)
			}
			checkRefusal(t, refusal(mustParse(t, text).CheckGrant(facts)), c.fields, c.msg)
		})
	}
}

func checkRefusal(t *testing.T, err error, want []string, msg string) {
	t.Helper()
	var fields []string
	for _, e := range policy.Errors(err) {
		fields = append(fields, e.Field)
		if e.Hint == "" || !errors.Is(e, policy.ErrRefused) {
			t.Errorf("error lacks hint or sentinel: %+v", e)
		}
	}
	if !slices.Equal(fields, want) {
		t.Errorf("refused %v, want %v: %v", fields, want, err)
	}
	if err != nil && !strings.Contains(err.Error(), msg) {
		t.Errorf("error says %q, want %q", err, msg)
	}
}

func allowNode(s string) string {
	return strings.Replace(s, "nodeAddresses: false", "nodeAddresses: true", 1)
}

func needBudget(s string) string {
	return strings.Replace(s, "ticket: {required: false}", "ticket: {required: false}\n  maxBudget: {bytes: 10GiB, connections: 3}", 1)
}

func needUplink(s string) string {
	return strings.Replace(s, "ticket: {required: false}", "ticket: {required: false}\n  ingress: uplink", 1)
}

func needTicket(s string) string {
	return strings.Replace(s, "ticket: {required: false}", "ticket: {required: true}", 1)
}

const widePolicy = `---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: wide}
spec:
  services: [postgres, cache]
  bindings: [address]
  sources: ["10.0.0.0/8"]
  maxDuration: 1h
  requesters: [alice]
  ticket: {required: true}
`

func TestCheckGrantOnePolicyMustAllowAll(t *testing.T) {
	s := mustParse(t, good+widePolicy)
	long := goodFacts()
	long.Duration, long.Addresses = time.Hour, addrs("10.1.0.2")
	// nightly-backup refuses the duration, wide refuses the missing ticket.
	_, err := s.CheckGrant(long)
	if e := policy.Errors(err); len(e) != 1 || !strings.Contains(e[0].Msg, "nightly-backup") || e[0].Line != 21 {
		t.Errorf("got %v", err)
	}
	long.Ticket = "OPS-1"
	if _, err := s.CheckGrant(long); err != nil {
		t.Errorf("wide should allow it: %v", err)
	}
	far := long
	far.Addresses = addrs("10.200.0.1", "fd00:1::9") // no policy lists both
	if _, err := s.CheckGrant(far); err == nil {
		t.Error("two policies were added up")
	}
}

// TestCheckGrantNeverWidens changes facts at random: what was refused is refused with more of it.
func TestCheckGrantNeverWidens(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	s := mustParse(t, good+widePolicy)
	for range 5000 {
		g := randomFacts(r)
		if refusal(s.CheckGrant(g)) == nil {
			continue
		}
		more := g
		more.Duration += time.Duration(r.IntN(3600)) * time.Second
		more.Addresses = append(slices.Clone(g.Addresses), randomAddr(r))
		if len(g.Addresses) > 0 && g.Duration > 0 && refusal(s.CheckGrant(more)) == nil {
			t.Fatalf("refused %+v but allowed %+v", g, more)
		}
	}
}

// TestCheckGrantAllowsOnlyWhatItSays looks at every allowed grant with other eyes.
func TestCheckGrantAllowsOnlyWhatItSays(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	s := mustParse(t, good+widePolicy)
	allowed := 0
	for range 20000 {
		g := randomFacts(r)
		if refusal(s.CheckGrant(g)) != nil {
			continue
		}
		allowed++
		most := 15 * time.Minute
		if g.Ticket != "" {
			most = time.Hour
		}
		if g.Duration <= 0 || g.Duration > most || g.Binding != "address" || g.Reason == "" || !slices.ContainsFunc(g.Signers, func(s policy.Signer) bool { return s.Person == "alice" }) {
			t.Fatalf("allowed %+v", g)
		}
		for _, a := range g.Addresses {
			if a.IsLoopback() || a.Is4In6() || slices.Contains(g.NodeAddresses, a) {
				t.Fatalf("allowed %+v", g)
			}
		}
	}
	if allowed < 100 {
		t.Errorf("only %d grants were allowed: the test shows little", allowed)
	}
}

func pick[T any](r *rand.Rand, list ...T) T { return list[r.IntN(len(list))] }

func randomAddr(r *rand.Rand) netip.Addr {
	return netip.MustParseAddr(pick(r, "10.1.0.1", "10.1.0.2", "10.200.0.1", "192.0.2.1", "127.0.0.1", "fd00:1::9", "::1", "::ffff:10.1.0.2"))
}

func randomFacts(r *rand.Rand) policy.GrantFacts {
	g := goodFacts()
	g.Service = pick(r, "postgres", "postgres", "cache")
	g.Ports = pick(r, nil, []uint16{5432}, []uint16{6379})
	g.Duration = pick(r, 0, time.Second, 15*time.Minute, time.Hour, 25*time.Hour)
	g.Ticket = pick(r, "", "OPS-1")
	g.Reason = pick(r, "backup", "backup", "")
	g.Signers = pick(r, signed("alice"), signed("bob", "alice"), signed("bob"), nil)
	g.Addresses = nil
	for range 1 + r.IntN(2) {
		g.Addresses = append(g.Addresses, randomAddr(r))
	}
	return g
}
