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
	if same, err := goodPayload().Digest(); err != nil || same != want.Digest {
		t.Errorf("the payload has the digest %s, %v, its envelope %s", same, err, want.Digest)
	}
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
	if got, by, err := grant.VerifyStatement(signed, keys, want.At); err != nil || got != want || len(by) != 1 || by[0].Person != "bob" {
		t.Errorf("comes back as %+v by %v, %v", got, by, err)
	}
	if got, err := grant.PeekStatement(signed); err != nil || got != want {
		t.Errorf("reads as %+v, %v", got, err)
	}
	forged, err := grant.SignStatement(t.Context(), want, alice)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := grant.VerifyStatement(forged, keys, want.At); !errors.Is(err, grant.ErrSigner) {
		t.Errorf("alice speaks for bob: %v", err)
	}
	// A grant is no statement, nor the other way round, though the same key signed both.
	if _, _, err := grant.VerifyStatement(envelope, keys, want.At); !errors.Is(err, grant.ErrMalformed) {
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
			if _, _, err := grant.VerifyStatement(changed, keys, time.Now()); err == nil {
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

		"rollout": func(s *grant.Statement) { s.Rollout = "databases" },
		"wave":    func(s *grant.Statement) { s.Wave = 1 },

		"challenge": func(s *grant.Statement) { s.Challenge = goodChallenge() },
		"challenge.node": func(s *grant.Statement) {
			s.Step, s.Challenge = grant.StepActivated, goodChallenge()
			s.Challenge.Node = ""
		},
		"challenge.boot": func(s *grant.Statement) {
			s.Step, s.Challenge = grant.StepActivated, goodChallenge()
			s.Challenge.Boot = ""
		},
		"challenge.nonce": func(s *grant.Statement) {
			s.Step, s.Challenge = grant.StepActivated, goodChallenge()
			s.Challenge.Nonce = "00"
		},
		"challenge.expires": func(s *grant.Statement) {
			s.Step, s.Challenge = grant.StepActivated, goodChallenge()
			s.Challenge.Expires = time.Time{}
		},
	} {
		s := about(t, envelope)
		change(&s)
		_, err := grant.SignStatement(t.Context(), s, bob)
		if e := policy.Errors(err); len(e) != 1 || e[0].Field != field || !errors.Is(err, grant.ErrInvalid) {
			t.Errorf("%s: %v", field, err)
		}
	}
	vouched := about(t, envelope)
	vouched.Step, vouched.Challenge = grant.StepVouched, goodChallenge()
	if _, err := grant.SignStatement(t.Context(), vouched, bob); !errors.Is(err, grant.ErrInvalid) {
		t.Errorf("somebody vouches for a node and a grant at once: %v", err)
	}
	vouched.Grant, vouched.Digest = "", ""
	if _, err := grant.SignStatement(t.Context(), vouched, bob); err != nil {
		t.Error(err)
	}
	if _, err := grant.Digest([]byte("{}")); err == nil {
		t.Error("nothing has a digest")
	}
}

func goodChallenge() grant.Challenge {
	return grant.NewChallenge("node-1", "0d8ccf0b-97a2-4ff8-a2ac-0d4b1ebbd5a9", time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC))
}

// TestAnswer: the answer is about this grant, for this challenge, by its requester.
func TestAnswer(t *testing.T) {
	alice, bob := newKey(t), newKey(t)
	keys := keyring(person(t, "alice", alice), person(t, "bob", bob))
	now := time.Date(2026, 11, 22, 11, 50, 0, 0, time.UTC)
	p := goodPayload()
	p.Requester = "alice"
	envelope, err := grant.Sign(t.Context(), p, alice)
	if err != nil {
		t.Fatal(err)
	}
	c := goodChallenge()
	c.Node = p.Audience
	challenge, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := grant.Answer(t.Context(), envelope, append(challenge, '\n'), alice, now)
	if err != nil {
		t.Fatal(err)
	}
	s, by, err := grant.VerifyStatement(answer, keys, now)
	digest, _ := grant.Digest(envelope)
	if err != nil || s.Step != grant.StepActivated || s.Challenge != c || s.Digest != digest || s.By != "alice" || by[0].Person != s.By {
		t.Errorf("answer is %+v by %v, %v", s, by, err)
	}
	stolen, err := grant.Answer(t.Context(), envelope, challenge, bob, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := grant.VerifyStatement(stolen, keys, now); !errors.Is(err, grant.ErrSigner) {
		t.Errorf("bob answers for alice: %v", err)
	}
	c.Node = "node-9"
	elsewhere, _ := json.Marshal(c)
	if _, err := grant.Answer(t.Context(), envelope, elsewhere, alice, now); !errors.Is(err, grant.ErrAudience) {
		t.Errorf("answered to another node: %v", err)
	}
}

func TestChallengesDiffer(t *testing.T) {
	if a, b := goodChallenge(), goodChallenge(); a.Nonce == b.Nonce {
		t.Error("a nonce comes twice")
	}
}

func FuzzParseChallenge(f *testing.F) {
	good, err := json.Marshal(goodChallenge())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"0d8ccf0b`), []byte(`"&`), 1))
	f.Add(bytes.Replace(good, []byte(`"node"`), []byte(`"Node"`), 1))
	f.Add(bytes.Replace(good, []byte(`{`), []byte(`{"node":"x",`), 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := grant.ParseChallenge(data)
		if err != nil {
			return
		}
		again, err := json.Marshal(c)
		if back, parseErr := grant.ParseChallenge(again); err != nil || parseErr != nil || back != c {
			t.Fatalf("%s becomes %s: %v, %v", data, again, err, parseErr)
		}
	})
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
	vouched, err := grant.SignStatement(f.Context(), grant.Statement{ID: "01J8ZQ4X5M3T9V0Y2B7C6D1E4G", Step: grant.StepVouched, By: "bob", At: time.Unix(1, 0), Why: "w",
		Challenge: goodChallenge()}, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(vouched)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, _, err := grant.VerifyStatement(data, keys, time.Unix(2, 0))
		if err == nil && (s.By != "bob" || s.Validate() != nil || !json.Valid(data)) {
			t.Fatalf("taken: %s", data)
		}
	})
}

// TestChallengeForm: what another reader would read differently is refused.
func TestChallengeForm(t *testing.T) {
	good, err := json.Marshal(goodChallenge())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		old, new string
		want     error
	}{
		"other letters":  {`"node"`, `"Node"`, grant.ErrNotCanonical},
		"a key twice":    {`{`, `{"node":"other",`, grant.ErrNotCanonical},
		"escapes":        {`"node-1"`, `"node\u002d1"`, grant.ErrNotCanonical},
		"unknown field":  {`{`, `{"more":1,`, grant.ErrUnknownField},
		"something more": {`}`, `}{}`, grant.ErrTrailing},
		"cut off":        {`}`, ``, grant.ErrMalformed},
		"huge":           {`{`, `{` + strings.Repeat(" ", grant.MaxChallenge), grant.ErrMalformed},
	} {
		if _, err := grant.ParseChallenge([]byte(strings.Replace(string(good), c.old, c.new, 1))); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// TestRolloutStatements: a word about a roll-out names it, its plan and, where one begins, its wave, and no grant.
func TestRolloutStatements(t *testing.T) {
	alice := newKey(t)
	keys := keyring(person(t, "alice", alice))
	good := grant.Statement{ID: "01J8ZQ4X5M3T9V0Y2B7C6D1E4G", Step: grant.StepAdvanced, Digest: strings.Repeat("0a", 32), By: "alice",
		At: time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC), Why: "a week of Shadow", Rollout: "databases", Wave: 2}
	resumed := good
	resumed.Step, resumed.Wave = grant.StepResumed, 0
	for _, want := range []grant.Statement{good, resumed} {
		signed, err := grant.SignStatement(t.Context(), want, alice)
		if err != nil {
			t.Fatal(err)
		}
		if got, _, err := grant.VerifyStatement(signed, keys, want.At); err != nil || got != want {
			t.Errorf("comes back as %+v, %v", got, err)
		}
	}
	for field, change := range map[string]func(*grant.Statement){
		"rollout": func(s *grant.Statement) { s.Rollout = "" },
		"wave":    func(s *grant.Statement) { s.Wave = 0 },
		"grant":   func(s *grant.Statement) { s.Grant = goodPayload().ID },
		"digest":  func(s *grant.Statement) { s.Digest = "" },
		"why":     func(s *grant.Statement) { s.Why = "" },
	} {
		s := good
		change(&s)
		if errs := policy.Errors(s.Validate()); len(errs) != 1 || errs[0].Field != field {
			t.Errorf("%s: %v", field, errs)
		}
	}
}
