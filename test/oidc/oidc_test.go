package oidc

import (
	"testing"

	"github.com/go-jose/go-jose/v4"
)

// TestProviderGivesTokens holds what other tests build on: tokens of the provider's key, a new key after a rotation, and
// the same address all along.
func TestProviderGivesTokens(t *testing.T) {
	t.Parallel()
	p := Start(t, Options{})
	issuer := p.Issuer
	kid := func() string {
		t.Helper()
		parsed, err := jose.ParseSignedCompact(p.Token("robot", "secret", ""), []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		return parsed.Signatures[0].Header.KeyID
	}
	if got := kid(); got != "first" {
		t.Errorf("token is signed by %q", got)
	}
	p.Rotate("second")
	if got := kid(); got != "second" || p.Issuer != issuer {
		t.Errorf("token of %s is signed by %q after a rotation", p.Issuer, got)
	}
}
