package grant_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// approved is the envelope with the signatures of some more keys.
func approved(t *testing.T, envelope []byte, keys ...grant.PrivateKey) []byte {
	t.Helper()
	for _, k := range keys {
		var err error
		if envelope, err = grant.Approve(t.Context(), envelope, k); err != nil {
			t.Fatal(err)
		}
	}
	return envelope
}

func signed(t *testing.T, p grant.Payload, k grant.PrivateKey) []byte {
	t.Helper()
	envelope, err := grant.Sign(t.Context(), p, k)
	if err != nil {
		t.Fatal(err)
	}
	return envelope
}

// TestJoin: approvals that were given at the same time, each on a copy, become those of one grant, each once.
func TestJoin(t *testing.T) {
	alice, bob, carol, dave := newKey(t), newKey(t), newKey(t), newKey(t)
	keys := keyring(person(t, "alice", alice), person(t, "bob", bob), person(t, "carol", carol), person(t, "dave", dave))
	asked := signed(t, goodPayload(), alice)
	joined, err := grant.Join(approved(t, asked, bob), approved(t, asked, carol, bob))
	if err != nil {
		t.Fatal(err)
	}
	if joined, err = grant.Join(joined, approved(t, asked, dave)); err != nil {
		t.Fatal(err)
	}
	v, err := grant.Verify(joined, keys, goodPayload().NotBefore)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range v.Signers {
		names = append(names, s.Person)
	}
	if got := strings.Join(names, " "); got != "alice bob carol dave" {
		t.Errorf("signed by %s", got)
	}
	if again, err := grant.Join(joined, asked); err != nil || string(again) != string(joined) {
		t.Errorf("joined with what it has: %s, %v", again, err)
	}
}

func TestJoinRefuses(t *testing.T) {
	alice := newKey(t)
	p := goodPayload()
	asked := signed(t, p, alice)
	for field, change := range map[string]func(*grant.Payload){
		"addresses": func(p *grant.Payload) { p.Addresses = []netip.Addr{netip.MustParseAddr("10.1.0.99")} },
		"duration":  func(p *grant.Payload) { p.Duration += time.Minute },
		"budget":    func(p *grant.Payload) { p.Budget.Bytes = 12345 },
		"ports":     func(p *grant.Payload) { p.Ports = []uint16{1} },
		"audience":  func(p *grant.Payload) { p.Audience = "node-2" },
	} {
		other := p
		change(&other)
		_, err := grant.Join(asked, signed(t, other, alice))
		checkError(t, err, grant.ErrMalformed, field)
		if n := len(policy.Errors(err)); n != 1 {
			t.Errorf("%s: %d fields are named: %v", field, n, err)
		}
	}
	other := p
	other.Reason, other.Ticket = "something else", "OPS-9"
	if _, err := grant.Join(asked, signed(t, other, alice)); len(policy.Errors(err)) != 2 || !strings.Contains(err.Error(), `ticket: is "OPS-9", and "OPS-1" in`) {
		t.Errorf("two fields differ: %v", err)
	}
	for _, nothing := range []string{"", "{}", "no JSON"} {
		if _, err := grant.Join(asked, []byte(nothing)); err == nil {
			t.Errorf("joined with %q", nothing)
		}
		if _, err := grant.Join([]byte(nothing), asked); err == nil {
			t.Errorf("%q was joined", nothing)
		}
	}
}

func TestJoinHasABound(t *testing.T) {
	asked := signed(t, goodPayload(), newKey(t))
	half := func(n int) []byte {
		var keys []grant.PrivateKey
		for range n {
			keys = append(keys, newKey(t))
		}
		return approved(t, asked, keys...)
	}
	if _, err := grant.Join(half(8), half(7)); err != nil {
		t.Errorf("16 signatures: %v", err)
	}
	_, err := grant.Join(half(8), half(8))
	checkError(t, err, grant.ErrMalformed, "signatures")
	if !errors.Is(err, grant.ErrMalformed) || !strings.Contains(err.Error(), "would have 17 signatures, the most is 16") {
		t.Errorf("17 signatures: %v", err)
	}
}
