package grant_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// about is a statement about an envelope.
func about(t *testing.T, envelope []byte) grant.Statement {
	t.Helper()
	digest, err := grant.Digest(envelope)
	if err != nil {
		t.Fatal(err)
	}
	return grant.Statement{ID: "01J8ZQ4X5M3T9V0Y2B7C6D1E4G", Step: grant.StepDenied, Grant: goodPayload().ID, Digest: digest, By: "bob",
		At: time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC), Why: "the backup can wait"}
}

func TestStatement(t *testing.T) {
	alice, bob := newKey(t), newKey(t)
	keys := keyring(person(t, "alice", alice), person(t, "bob", bob))
	envelope, err := grant.Sign(t.Context(), goodPayload(), alice)
	if err != nil {
		t.Fatal(err)
	}
	want := about(t, envelope)
	approved, err := grant.Approve(t.Context(), envelope, bob)
	if err != nil {
		t.Fatal(err)
	}
	if same, err := grant.Digest(approved); err != nil || same != want.Digest {
		t.Errorf("an approval changes what is approved: %s, %v", same, err)
	}
	signed, err := grant.SignStatement(t.Context(), want, bob)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := grant.VerifyStatement(signed, keys, want.At); err != nil || got != want {
		t.Errorf("comes back as %+v, %v", got, err)
	}
	forged, err := grant.SignStatement(t.Context(), want, alice)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := grant.VerifyStatement(forged, keys, want.At); !errors.Is(err, grant.ErrSigner) {
		t.Errorf("alice speaks for bob: %v", err)
	}
	// A grant is no statement, nor the other way round, though the same key signed both.
	if _, err := grant.VerifyStatement(envelope, keys, want.At); !errors.Is(err, grant.ErrMalformed) {
		t.Errorf("a grant is taken for a statement: %v", err)
	}
	if _, err := grant.Verify(signed, keys, want.At); !errors.Is(err, grant.ErrMalformed) {
		t.Errorf("a statement is taken for a grant: %v", err)
	}
	swapped := bytes.Replace(signed, []byte("statement.v1"), []byte("grant.v1"), 1)
	if _, err := grant.Verify(swapped, keys, want.At); err == nil {
		t.Error("a statement that calls itself a grant is taken for one")
	}
}

// TestChangedStatements: one changed byte anywhere is refused.
func TestChangedStatements(t *testing.T) {
	bob := newKey(t)
	keys := keyring(person(t, "bob", bob))
	envelope, err := grant.Sign(t.Context(), goodPayload(), bob)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := grant.SignStatement(t.Context(), about(t, envelope), bob)
	if err != nil {
		t.Fatal(err)
	}
	for i := range signed {
		for _, bit := range []byte{1, 0x20} {
			changed := bytes.Clone(signed)
			changed[i] ^= bit
			if _, err := grant.VerifyStatement(changed, keys, time.Now()); err == nil {
				t.Fatalf("byte %d changed: %s", i, changed)
			}
		}
	}
}

func TestStatementWrong(t *testing.T) {
	bob := newKey(t)
	envelope, err := grant.Sign(t.Context(), goodPayload(), bob)
	if err != nil {
		t.Fatal(err)
	}
	for field, change := range map[string]func(*grant.Statement){
		"id":     func(s *grant.Statement) { s.ID = "1" },
		"step":   func(s *grant.Statement) { s.Step = "approved" },
		"grant":  func(s *grant.Statement) { s.Grant = "" },
		"digest": func(s *grant.Statement) { s.Digest = strings.ToUpper(s.Digest) },
		"by":     func(s *grant.Statement) { s.By = "bob\n" },
		"at":     func(s *grant.Statement) { s.At = time.Time{} },
		"why":    func(s *grant.Statement) { s.Why = " " },
	} {
		s := about(t, envelope)
		change(&s)
		_, err := grant.SignStatement(t.Context(), s, bob)
		if e := policy.Errors(err); len(e) != 1 || e[0].Field != field || !errors.Is(err, grant.ErrInvalid) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if _, err := grant.Digest([]byte("{}")); err == nil {
		t.Error("nothing has a digest")
	}
}

func FuzzVerifyStatement(f *testing.F) {
	key, err := grant.GenerateKey()
	if err != nil {
		f.Fatal(err)
	}
	keys := keyring(person(f, "bob", key))
	signed, err := grant.SignStatement(f.Context(), grant.Statement{ID: "01J8ZQ4X5M3T9V0Y2B7C6D1E4G", Step: grant.StepDenied, Grant: "01J8ZQ4X5M3T9V0Y2B7C6D1E4F",
		Digest: strings.Repeat("0", 64), By: "bob", At: time.Unix(1, 0), Why: "w"}, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signed)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := grant.VerifyStatement(data, keys, time.Unix(2, 0))
		if err == nil && (s.By != "bob" || s.Validate() != nil || !json.Valid(data)) {
			t.Fatalf("taken: %s", data)
		}
	})
}
