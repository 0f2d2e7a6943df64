package token

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// fuzzed is a provider with one key, and no way to fetch others.
func fuzzed(t testing.TB) (openID, *issuer) {
	t.Helper()
	i := &issuer{key: newKey(t)}
	p := providerAt("https://login.example.org", "login.example.org:443", "")
	k := newKeySet(originOf(p), Config{Clock: time.Now}, defaultPace)
	k.keys, k.fetched, k.tried = []jose.JSONWebKey{{Key: i.key.Public(), KeyID: "one"}}, time.Now(), time.Now()
	return openID{name: p.Name, spec: p.Spec, keys: k}, i
}

// FuzzToken: whatever comes, a token is taken apart by one reading or refused. What is read is what every other reader
// reads, and nobody is proven without a signature of the provider's key over these very bytes.
func FuzzToken(f *testing.F) {
	provider, i := fuzzed(f)
	now := time.Now().Unix()
	header := fields{"alg": "ES256", "kid": "one"}.part(f)
	claims := fields{"iss": provider.spec.Issuer, "aud": audience, "sub": "alice", "exp": now + 3600}.part(f)
	signature, err := signES256(i.key, header+"."+claims)
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{
		header + "." + claims + "." + signature, "", "..", "a.b.c", encode(`{"alg":"none"}`) + "." + claims + ".",
		encode(`{"alg":"HS256"}`) + "." + claims + ".YQ", header + "." + encode(`{"sub":"a","sub":"b"}`) + "." + signature,
		header + "." + encode(`{"sub":"\ud800","SUB":"x","exp":1e999}`) + "." + signature,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		read, err := examine(raw)
		if err == nil {
			agree(t, raw, read)
		}
		got, err := provider.Verify(t.Context(), raw, time.Now())
		if err != nil {
			if got.Caller.Subject != "" {
				t.Errorf("refused, and proves %+v", got)
			}
			return
		}
		if !signedByKey(i.key, raw) {
			t.Errorf("%q proves %s without a signature", raw, got.Caller)
		}
	})
}

// agree holds that other readers see the same in what was taken apart.
func agree(t *testing.T, raw string, read examined) {
	t.Helper()
	parts := strings.Split(raw, ".")
	var header struct {
		Algorithm string `json:"alg"`
	}
	if err := json.Unmarshal([]byte(decoded(parts[0])), &header); err == nil && read.algorithm != header.Algorithm && !otherCase(parts[0], "alg") {
		t.Errorf("alg is read as %q and as %q", read.algorithm, header.Algorithm)
	}
	var claims map[string]any
	if err := json.Unmarshal([]byte(decoded(parts[1])), &claims); err != nil {
		t.Errorf("payload is no JSON elsewhere: %v", err)
	}
	if s, _ := claims["sub"].(string); s != read.subject {
		t.Errorf("sub is read as %q and as %q", read.subject, s)
	}
	if s, _ := claims["iss"].(string); s != read.issuer {
		t.Errorf("iss is read as %q and as %q", read.issuer, s)
	}
}

// otherCase tells whether a name is there in another case: readers that fold it see another value.
func otherCase(part, name string) bool {
	var names map[string]any
	if json.Unmarshal([]byte(decoded(part)), &names) != nil {
		return false
	}
	for n := range names {
		if n != name && strings.EqualFold(n, name) {
			return true
		}
	}
	return false
}

// signedByKey verifies by hand, and not by a library for tokens.
func signedByKey(key *ecdsa.PrivateKey, raw string) bool {
	at := strings.LastIndexByte(raw, '.')
	signature, err := base64.RawURLEncoding.DecodeString(raw[at+1:])
	if err != nil || len(signature) != 64 {
		return false
	}
	digest := sha256.Sum256([]byte(raw[:at]))
	return ecdsa.Verify(&key.PublicKey, digest[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
}

// BenchmarkVerify is what a bearer token costs a request, once the keys are there.
func BenchmarkVerify(b *testing.B) {
	provider, i := fuzzed(b)
	now := time.Now().Unix()
	input := fields{"alg": "ES256", "kid": "one", "typ": "at+jwt"}.part(b) + "." + fields{"iss": provider.spec.Issuer,
		"aud": audience, "sub": "alice", "groups": []string{"ops", "dev"}, "iat": now, "exp": now + 3600}.part(b)
	signature, err := signES256(i.key, input)
	if err != nil {
		b.Fatal(err)
	}
	raw := input + "." + signature
	b.Run("seen", func(b *testing.B) {
		for b.Loop() {
			if _, err := provider.Verify(b.Context(), raw, time.Now()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unseen", func(b *testing.B) {
		for b.Loop() {
			clear(provider.keys.seen)
			if _, err := provider.Verify(b.Context(), raw, time.Now()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("examine alone", func(b *testing.B) {
		for b.Loop() {
			if _, err := examine(raw); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("signature alone", func(b *testing.B) {
		for b.Loop() {
			if !signedByKey(i.key, raw) {
				b.Fatal("not signed")
			}
		}
	})
}
