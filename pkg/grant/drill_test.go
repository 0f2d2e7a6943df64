package grant_test

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func someDrill(t *testing.T) grant.Drill {
	t.Helper()
	at := time.Date(2026, 7, 1, 22, 0, 0, 0, time.UTC)
	id, err := grant.NewID(at)
	if err != nil {
		t.Fatal(err)
	}
	return grant.Drill{ID: id, By: "alice", Node: "node-1", Service: "postgres", Client: netip.MustParseAddr("127.83.80.2"),
		Server: netip.MustParseAddrPort("127.0.0.1:5432"), Grant: id, Digest: strings.Repeat("ab", 32),
		Activated: at, Stopped: at.Add(time.Second), Deadline: at.Add(10 * time.Second), Tried: at.Add(11 * time.Second), Back: at.Add(12 * time.Second),
		Before: "reset", Live: "reset", New: "reset", Closed: true}
}

// TestDrillIsOnesWord: what was signed is read back, nobody else signs it, and no letter of it can be changed.
func TestDrillIsOnesWord(t *testing.T) {
	alice, bob := newKey(t), newKey(t)
	keys := []policy.Keyring{{Spec: policy.KeyringSpec{People: []policy.Person{
		{Name: "alice", Keys: []policy.Key{{PublicKey: alice.Public()}}}, {Name: "bob", Keys: []policy.Key{{PublicKey: bob.Public()}}}}}}}
	d := someDrill(t)
	signed, err := grant.SignDrill(t.Context(), d, alice)
	if err != nil {
		t.Fatal(err)
	}
	got, signers, err := grant.VerifyDrill(signed, keys, d.Back)
	if err != nil || got != d || len(signers) != 1 || signers[0].Person != "alice" {
		t.Errorf("%+v, %v, %v; want %+v", got, signers, err, d)
	}
	foreign, err := grant.SignDrill(t.Context(), d, bob)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := grant.VerifyDrill(foreign, keys, d.Back); !errors.Is(err, grant.ErrSigner) {
		t.Errorf("signed by bob in alice's name: %v", err)
	}
	d.Service = "postgret"
	other, err := grant.SignDrill(t.Context(), d, alice)
	if err != nil {
		t.Fatal(err)
	}
	body := func(envelope []byte) string {
		_, rest, _ := strings.Cut(string(envelope), `"payload":"`)
		text, _, _ := strings.Cut(rest, `"`)
		if _, err := base64.StdEncoding.DecodeString(text); err != nil {
			t.Fatal(err)
		}
		return text
	}
	if _, _, err := grant.VerifyDrill([]byte(strings.Replace(string(signed), body(signed), body(other), 1)), keys, d.Back); err == nil {
		t.Error("a record of another service passes with the signature of this one")
	}
}

// TestDrillHasOneForm: what says the same in other letters is not taken, though it is signed.
func TestDrillHasOneForm(t *testing.T) {
	f := newForger(t)
	d := someDrill(t)
	d.By = "mallory"
	body, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	for more, want := range map[string]error{"": nil, " ": grant.ErrNotCanonical} {
		said := append(slices.Clone(body), more...)
		sig := ed25519.Sign(f.private, dsse.PAE(grant.DrillType, said))
		envelope := marshal(dsse.Envelope{PayloadType: grant.DrillType, Payload: base64.StdEncoding.EncodeToString(said),
			Signatures: []dsse.Signature{{KeyID: f.public.ID(), Sig: base64.StdEncoding.EncodeToString(sig)}}})
		if _, _, err := grant.VerifyDrill(envelope, f.keyring(), d.Back); !errors.Is(err, want) {
			t.Errorf("with %q at its end: %v, want %v", more, err, want)
		}
	}
}

// TestDrillProvesNothingOutOfOrder: who was not stopped before the deadline may have closed the path itself.
func TestDrillProvesNothingOutOfOrder(t *testing.T) {
	key := newKey(t)
	for name, change := range map[string]func(*grant.Drill){
		"stopped too late": func(d *grant.Drill) { d.Stopped = d.Deadline.Add(time.Millisecond) },
		"opened too late":  func(d *grant.Drill) { d.Activated = d.Stopped.Add(time.Millisecond) },
		"tried too early":  func(d *grant.Drill) { d.Tried = d.Deadline.Add(-time.Millisecond) },
		"back too early":   func(d *grant.Drill) { d.Back = d.Tried.Add(-time.Millisecond) },
	} {
		d := someDrill(t)
		change(&d)
		if _, err := grant.SignDrill(t.Context(), d, key); err == nil {
			t.Errorf("%s: signed", name)
		}
		d.Closed = false
		if _, err := grant.SignDrill(t.Context(), d, key); err != nil {
			t.Errorf("%s, and says so: %v", name, err)
		}
	}
}
