package policy_test

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func TestDurationText(t *testing.T) {
	for v, want := range map[time.Duration]string{
		0: "0s", time.Second: "1s", time.Minute: "1m", time.Hour: "1h", 90 * time.Second: "1m30s",
		time.Hour + time.Second: "1h0m1s", 10 * time.Minute: "10m", 20 * time.Hour: "20h",
		100 * time.Hour: "100h", 1500 * time.Millisecond: "1.5s", -time.Minute: "-1m",
	} {
		if got := (policy.Duration{Duration: v}).String(); got != want {
			t.Errorf("%v is %q, want %q", v, got, want)
		}
	}
	r := rand.New(rand.NewPCG(7, 8))
	for range 10000 {
		d := policy.Duration{Duration: time.Duration(r.Int64N(1<<50)) / 1000 * 1000}
		if r.IntN(2) == 0 {
			d.Duration = d.Truncate(time.Minute)
		}
		var back policy.Duration
		if err := back.UnmarshalText([]byte(d.String())); err != nil || back != d {
			t.Fatalf("%s comes back as %s, %v", d, back, err)
		}
	}
}

func TestDurationJSON(t *testing.T) {
	raw, err := json.Marshal(policy.Duration{Duration: 15 * time.Minute})
	if err != nil || string(raw) != `"15m"` {
		t.Errorf("got %s, %v", raw, err)
	}
}

func TestPublicKey(t *testing.T) {
	k, err := policy.ParsePublicKey(aliceKey)
	if err != nil || k.String() != aliceKey || k.IsZero() {
		t.Fatalf("got %v, %v", k, err)
	}
	if k.ID() != "sp:139e3940e64b5491" {
		t.Errorf("id is %s", k.ID())
	}
	if same, _ := policy.ParsePublicKey(aliceKey); same != k {
		t.Error("equal keys are not ==")
	}
	var none policy.PublicKey
	if !none.IsZero() || none.String() != "" || none.Verify(nil, make([]byte, 64)) {
		t.Error("the zero key is a key")
	}
}

func TestPublicKeyWrong(t *testing.T) {
	for _, s := range []string{
		"", "ed25519:", "ed25519:AA", "ED25519:" + aliceKey[8:], aliceKey + "\n", aliceKey[:30] + "\n" + aliceKey[30:],
		aliceKey + "=", " " + aliceKey, strings.ReplaceAll(aliceKey, "=", ""), "ed25519:" + strings.Repeat("A", 60000),
	} {
		k, err := policy.ParsePublicKey(s)
		if e, ok := errors.AsType[*policy.Error](err); !ok || e.Hint == "" || !k.IsZero() {
			t.Errorf("%.80q gave %v, %v", s, k, err)
		}
	}
}

// TestSmallOrderKeysAreRefused shows that the refused keys are those under which anybody can sign:
// a signature without a private key verifies under each of them.
func TestSmallOrderKeysAreRefused(t *testing.T) {
	keys := []string{
		"0000000000000000000000000000000000000000000000000000000000000000",
		"0100000000000000000000000000000000000000000000000000000000000000",
		"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
		"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
		"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	}
	for _, k := range keys {
		raw, err := hex.DecodeString(k)
		if err != nil {
			t.Fatal(err)
		}
		if !forgeable(raw) {
			t.Errorf("%s cannot be forged: the list is wrong", k)
		}
		for _, sign := range []byte{0, 0x80} {
			raw[31] = raw[31]&0x7f | sign
			if _, err := policy.ParsePublicKey("ed25519:" + base64.StdEncoding.EncodeToString(raw)); err == nil {
				t.Errorf("%x was taken", raw)
			}
		}
	}
}

// forgeable looks for a message whose signature is the neutral point and zero.
func forgeable(key ed25519.PublicKey) bool {
	sig := make([]byte, ed25519.SignatureSize)
	sig[0] = 1
	for i := range 1000 {
		if ed25519.Verify(key, fmt.Appendf(nil, "message %d", i), sig) {
			return true
		}
	}
	return false
}

func TestSourceText(t *testing.T) {
	for want, s := range map[string]policy.Source{"": {}, "a.yaml:3": {File: "a.yaml", Line: 3}} {
		if s.String() != want {
			t.Errorf("got %q, want %q", s, want)
		}
	}
}

func TestErrors(t *testing.T) {
	a, b := &policy.Error{Field: "a", Msg: "wrong"}, &policy.Error{File: "f", Line: 2, Field: "b", Msg: "wrong"}
	plain := errors.New("plain")
	for _, c := range []struct {
		name string
		err  error
		want string
	}{
		{"none", nil, "[]"},
		{"one", a, "[a: wrong]"},
		{"joined", errors.Join(a, b), "[a: wrong f:2: b: wrong]"},
		{"wrapped and joined", fmt.Errorf("activate: %w", errors.Join(a, errors.Join(b, plain))), "[a: wrong f:2: b: wrong plain]"},
		{"plain", plain, "[plain]"},
		{"plain and wrapped", fmt.Errorf("x: %w", plain), "[x: plain]"},
		{"with a sentinel", &policy.Error{Msg: "refused", Err: policy.ErrRefused}, "[refused]"},
	} {
		if got := fmt.Sprint(policy.Errors(c.err)); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
}
