package grant_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// signedSet is a set of the version, whose keyring has alice, bob and carol; carol's key signs no resources.
func signedSet(t *testing.T, version int, keys map[string]grant.PrivateKey) *policy.Set {
	t.Helper()
	person := func(name, uses string) string {
		return fmt.Sprintf("{name: %s, keys: [{publicKey: \"%s\"%s}]}", name, keys[name].Public(), uses)
	}
	const uses = ", uses: [resources]"
	set, err := policy.Parse("r.yaml", fmt.Appendf(nil, `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, ports: [5432]}
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: k}
spec: {version: 1, people: [%s, %s, %s]}
---
apiVersion: sallyport.dev/v1alpha1
kind: ResourceSet
metadata: {name: all}
spec: {version: %d}
`, person("alice", uses), person("bob", uses), person("carol", ""), version))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// TestSignedResources: the signatures of enough people, with keys for this use, over this very set.
func TestSignedResources(t *testing.T) {
	keys, now := map[string]grant.PrivateKey{}, time.Now()
	for _, name := range []string{"alice", "bob", "carol", "mallory"} {
		key, err := grant.GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		keys[name] = key
	}
	set, other := signedSet(t, 1, keys), signedSet(t, 2, keys)
	sign := func(of *policy.Set, names ...string) (envelope []byte) {
		for _, name := range names {
			var err error
			if envelope, err = grant.SignResources(t.Context(), of, envelope, keys[name]); err != nil {
				t.Fatal(err)
			}
		}
		return envelope
	}
	grantOf, err := grant.Sign(t.Context(), goodPayload(), keys["alice"])
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		envelope []byte
		wanted   int
		err      error
	}{
		{"one", sign(set, "alice"), 1, nil},
		{"two", sign(set, "alice", "bob"), 2, nil},
		{"one of two", sign(set, "alice"), 2, grant.ErrUnsigned},
		{"with a key for something else", sign(set, "carol"), 1, grant.ErrUnsigned},
		{"which does not count as the second", sign(set, "alice", "carol"), 2, grant.ErrUnsigned},
		{"with a key that nobody knows", sign(set, "mallory"), 1, grant.ErrUnknownKey},
		{"which spoils nothing", sign(set, "mallory", "alice"), 1, nil},
		{"of another version", sign(other, "alice"), 1, grant.ErrUnsigned},
		{"nothing", nil, 1, grant.ErrMalformed},
		{"a grant", grantOf, 1, grant.ErrMalformed},
		{"changed", bytes.Replace(sign(set, "alice"), []byte(`"sig":"`), []byte(`"sig":"AAAA`), 1), 1, grant.ErrSignature},
		{"huge", bytes.Repeat([]byte(" "), grant.MaxEnvelope+1), 1, grant.ErrMalformed},
	} {
		signers, err := grant.VerifyResources(c.envelope, set, set.Keyrings(), nil, c.wanted, now)
		if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) || (err == nil) != (len(signers) >= c.wanted) {
			t.Errorf("%s: %v by %v, want %v", c.name, err, signers, c.err)
		}
	}
	// Nobody knows whose a pinned key is: with one of a keyring it counts as two people, and by itself as one.
	mallory := []policy.PublicKey{keys["mallory"].Public()}
	if signers, err := grant.VerifyResources(sign(set, "alice", "mallory"), set, set.Keyrings(), mallory, 2, now); err != nil {
		t.Errorf("a pinned key and one of a keyring: %v by %v", err, signers)
	}
	alice := []policy.PublicKey{keys["alice"].Public()}
	if signers, err := grant.VerifyResources(sign(set, "alice"), set, set.Keyrings(), alice, 2, now); !errors.Is(err, grant.ErrUnsigned) {
		t.Errorf("one key, in a keyring and pinned: %v by %v", err, signers)
	}
	if _, err := grant.SignResources(t.Context(), set, sign(set, "alice"), keys["alice"]); err == nil || !strings.Contains(err.Error(), "signed it already") {
		t.Errorf("twice by one key: %v", err)
	}
	if fresh := sign(set, "alice"); !bytes.Equal(fresh, mustSign(t, set, sign(other, "bob"), keys["alice"])) {
		t.Error("signatures of another set were kept")
	}
}

func mustSign(t *testing.T, set *policy.Set, envelope []byte, key grant.PrivateKey) []byte {
	t.Helper()
	out, err := grant.SignResources(t.Context(), set, envelope, key)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// FuzzVerifyResources: nothing but signatures over this very set is taken for such, and what is refused is refused in words.
func FuzzVerifyResources(f *testing.F) {
	key, err := grant.GenerateKey()
	if err != nil {
		f.Fatal(err)
	}
	set, err := policy.Parse("r.yaml", fmt.Appendf(nil, `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, ports: [5432]}
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: k}
spec: {version: 1, people: [{name: alice, keys: [{publicKey: "%s", uses: [resources]}]}]}
`, key.Public()))
	if err != nil {
		f.Fatal(err)
	}
	good, err := grant.SignResources(f.Context(), set, nil, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"payloadType"`), []byte(`"payloadtype"`), 1))
	f.Add(bytes.Replace(good, []byte(`{`), []byte(`{"payload":"",`), 1))
	f.Add(bytes.Replace(good, []byte(`"sig":"`), []byte(`"sig":"\u0041`), 1))
	f.Add(append(bytes.Clone(good), good...))
	f.Fuzz(func(t *testing.T, data []byte) {
		signers, err := grant.VerifyResources(data, set, set.Keyrings(), nil, 1, time.Unix(0, 0))
		if err == nil {
			var compact bytes.Buffer
			if len(signers) != 1 || json.Compact(&compact, data) != nil || !bytes.Contains(compact.Bytes(), []byte(key.Public().ID())) {
				t.Fatalf("signed by %v: %q", signers, data)
			}
			return
		}
		for _, e := range policy.Errors(err) {
			if e.Msg == "" || e.Hint == "" {
				t.Fatalf("refused without words: %+v", e)
			}
		}
	})
}
