package policy_test

import (
	"crypto/ed25519"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// keysUntil is a keyring of one key, whose ends are given.
func keysUntil(key, ring time.Time, revoked ...string) (policy.Keyring, string) {
	k, err := policy.ParsePublicKey(aliceKey)
	if err != nil {
		panic(err)
	}
	return policy.Keyring{Spec: policy.KeyringSpec{NotAfter: ring, RevokedKeys: revoked,
		People: []policy.Person{{Name: "alice", Keys: []policy.Key{{PublicKey: k, NotAfter: key}}}}}}, k.ID()
}

func TestKnownKeys(t *testing.T) {
	end := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		key, ring, now time.Time
		want           bool
	}{
		{time.Time{}, time.Time{}, end, false}, {end, time.Time{}, end.Add(-1), false}, {end, time.Time{}, end, true},
		{time.Time{}, end, end, true}, {end.Add(1), end, end, true}, {end, end.Add(1), end, true}, {end.Add(1), end.Add(1), end, false},
	} {
		ring, id := keysUntil(c.key, c.ring)
		if k := policy.KnownKeys([]policy.Keyring{ring})[id]; k.Person != "alice" || k.Ended(c.now) != c.want || k.Revoked {
			t.Errorf("a key until %s in a keyring until %s at %s: %+v", c.key, c.ring, c.now, k)
		}
	}
	ring, id := keysUntil(time.Time{}, time.Time{})
	other := policy.Keyring{Spec: policy.KeyringSpec{RevokedKeys: []string{"sp:0000000000000000", id}}}
	for _, rings := range [][]policy.Keyring{{ring, other}, {other, ring}} {
		if known := policy.KnownKeys(rings); !known[id].Revoked || len(known) != 1 {
			t.Errorf("a key that another keyring revokes: %+v", known)
		}
	}
}

// quorum is a policy that wants the approvals, in a set with people a to h, of whom a, b and c are dba and c and d are sec.
func quorum(t *testing.T, approvals string) *policy.Set {
	t.Helper()
	var people []string
	for i, name := range strings.Split("a b c d e f g h", " ") {
		people = append(people, fmt.Sprintf("{name: %s, keys: [{publicKey: \"%s\"}]}", name, numberedKey(t, i)))
	}
	return mustParse(t, fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, ports: [5432]}
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: quorum}
spec:
  services: [postgres]
  bindings: [address]
  sources: [10.1.0.2]
  maxDuration: 15m
  requesters: [a, "group:sec"]
  approvals: %s
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: k}
spec:
  version: 1
  people: [%s]
  groups: [{name: dba, members: [a, b, c]}, {name: sec, members: [c, d]}]
`, approvals, strings.Join(people, ", ")))
}

// TestApprovals: all must be met, by people who count once each, and never by the requester.
func TestApprovals(t *testing.T) {
	const both = `[{from: ["group:dba"]}, {from: ["group:sec"]}]`
	for _, c := range []struct {
		approvals string
		signers   string // the first asked for it
		missing   int
	}{
		{"[]", "a", 0},
		{"[{from: [b]}]", "a", 1},
		{"[{from: [b]}]", "a b", 0},
		{"[{from: [a, b]}]", "a", 1},        // not the requester, though he is on the list
		{"[{from: [b], min: 2}]", "a b", 1}, // who is one
		{`[{from: ["group:dba"], min: 2}]`, "a b c", 0},
		{`[{from: ["group:dba"], min: 2}]`, "a b d", 1},
		{both, "a b d", 0},
		{both, "a c", 1},                       // in both groups, and yet one
		{both, "a c d", 0}, {both, "a d c", 0}, // c has to be the one of dba
		{both, "a b c", 0}, {both, "a c b", 0}, // and here of sec
		{both, "d b c", 0}, {both, "d b", 1}, // the requester is of sec
		{both, "a e f", 2},
	} {
		signers := strings.Fields(c.signers)
		facts := goodFacts()
		facts.Addresses, facts.Requester, facts.Signers = addrs("10.1.0.2"), signers[0], signed(signers...)
		got := policy.Errors(refusal(quorum(t, c.approvals).CheckGrant(facts)))
		if len(got) != c.missing {
			t.Errorf("%s signed by %s: %v, want %d missing", c.approvals, c.signers, got, c.missing)
		}
	}
}

// TestApprovalsByExhaustion: what the matching finds is what trying all ways finds.
func TestApprovalsByExhaustion(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		var wanted [][]string
		for range 1 + r.IntN(3) {
			wanted = append(wanted, pick(r, []string{"b"}, []string{"b", "c"}, []string{"c", "d"}, []string{"b", "e", "f"}, []string{"d", "e"}))
		}
		var text []string
		for _, w := range wanted {
			text = append(text, "{from: ["+strings.Join(w, ", ")+"]}")
		}
		people := slices.DeleteFunc(strings.Split("b c d e f", " "), func(string) bool { return r.IntN(2) == 0 })
		facts := goodFacts()
		facts.Addresses, facts.Requester, facts.Signers = addrs("10.1.0.2"), "a", signed(append([]string{"a"}, people...)...)
		got := len(policy.Errors(refusal(quorum(t, "["+strings.Join(text, ", ")+"]").CheckGrant(facts))))
		if want := len(wanted) - most(wanted, people); got != want {
			t.Fatalf("%v by %v: %d missing, want %d", wanted, people, got, want)
		}
	}
}

// most is how many of the seats can be filled at once.
func most(seats [][]string, people []string) int {
	if len(seats) == 0 {
		return 0
	}
	best := most(seats[1:], people)
	for i, p := range people {
		if slices.Contains(seats[0], p) {
			best = max(best, 1+most(seats[1:], slices.Delete(slices.Clone(people), i, i+1)))
		}
	}
	return best
}

// TestKeyUses: a key counts for what it is for.
func TestKeyUses(t *testing.T) {
	s := quorum(t, "[{from: [b]}]")
	for _, c := range []struct {
		asks, approves []policy.Use
		allowed        bool
	}{
		{nil, nil, true},
		{[]policy.Use{policy.UseRequest}, []policy.Use{policy.UseApprove}, true},
		{[]policy.Use{policy.UseApprove}, nil, false},
		{nil, []policy.Use{policy.UseRequest}, false},
	} {
		facts := goodFacts()
		facts.Addresses, facts.Requester = addrs("10.1.0.2"), "a"
		facts.Signers = []policy.Signer{{Person: "a", Uses: c.asks}, {Person: "b", Uses: c.approves}}
		if _, err := s.CheckGrant(facts); (err == nil) != c.allowed {
			t.Errorf("asked with a key for %v, approved with one for %v: %v", c.asks, c.approves, err)
		}
	}
}

// numberedKey is a public key, another one for each number.
func numberedKey(t *testing.T, n int) policy.PublicKey {
	t.Helper()
	seed := make([]byte, ed25519.SeedSize)
	seed[0] = byte(n + 1)
	k, err := policy.NewPublicKey(ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func refusal(_ policy.Allowance, err error) error { return err }
