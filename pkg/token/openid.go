package token

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// openID verifies tokens of one OpenID Connect provider.
type openID struct {
	name  string
	spec  policy.IdentityProviderSpec
	keys  *keySet
	login *loginClaims // nil: it is a bearer token
}

// loginClaims are what an ID token must say to the client that a login was for.
type loginClaims struct{ client, nonce string }

// Verify implements Provider.
func (o openID) Verify(ctx context.Context, raw string, now time.Time) (Verified, error) {
	t, err := examine(raw)
	if err != nil {
		return Verified{}, err
	}
	if err := o.judge(t); err != nil {
		return Verified{}, err
	}
	if err := o.signed(ctx, raw, t, now); err != nil {
		return Verified{}, err
	}
	return o.read(t.claims, now)
}

// signed holds that the provider has signed the token. That of one that was seen before is remembered, and nothing else of it.
func (o openID) signed(ctx context.Context, raw string, t examined, now time.Time) error {
	sum := sha256.Sum256([]byte(raw))
	if o.keys.signed(sum, now, o.spec.Keep.Duration) {
		return nil
	}
	s := &signature{keys: o.keys, keep: o.spec.Keep.Duration, now: now, examined: t}
	verifier := oidc.NewVerifier(o.spec.Issuer, s, &oidc.Config{
		SupportedSigningAlgs: o.spec.Algorithms,
		SkipClientIDCheck:    true, // it knows of one audience
		SkipExpiryCheck:      true, // its skew is not policy's
	})
	if _, err := verifier.Verify(ctx, raw); s.err != nil {
		return s.err
	} else if err != nil {
		return fmt.Errorf("%w: %s", ErrMalformed, quote(err.Error()))
	}
	o.keys.remember(sum, s.fetched)
	return nil
}

// judge is what can be said before a key is looked for.
func (o openID) judge(t examined) error {
	kinds := []string{"", "jwt", "at+jwt"}
	if o.login != nil {
		kinds = []string{"", "jwt"}
	}
	switch {
	case t.issuer != o.spec.Issuer:
		return fmt.Errorf("%w: issuer %s is not that of %s", ErrNotTaken, quote(t.issuer), o.name)
	case !slices.Contains(o.spec.Algorithms, t.algorithm):
		return fmt.Errorf("%w: algorithm %s is none of %q", ErrNotTaken, quote(t.algorithm), o.spec.Algorithms)
	case !t.ofKind(kinds...):
		return fmt.Errorf("%w: typ %s is not that of such a token", ErrNotTaken, quote(t.kind))
	}
	return nil
}

// read takes what policy asks for from the claims of a token that the provider has signed.
func (o openID) read(c claims, now time.Time) (Verified, error) {
	audiences := o.spec.Audiences
	if o.login != nil {
		audiences = []string{o.login.client}
	}
	if err := c.audience(audiences); err != nil {
		return Verified{}, err
	}
	if err := o.login.check(c); err != nil {
		return Verified{}, err
	}
	end, err := c.period(now, o.spec.Skew.Duration)
	if err != nil {
		return Verified{}, err
	}
	subject, err := c.name(o.spec.SubjectClaim)
	if err != nil {
		return Verified{}, err
	}
	groups, err := c.groups(o.spec.GroupsClaim)
	if err != nil {
		return Verified{}, err
	}
	who := policy.Caller{Provider: o.name, Subject: subject, Groups: groups, Claims: c, Proof: policy.ProofOIDC}
	return Verified{Caller: who, Expires: end}, nil
}

// check holds that an ID token answers this login, and was given to this client.
func (l *loginClaims) check(c claims) error {
	if l == nil {
		return nil
	}
	if c["nonce"] != l.nonce {
		return fmt.Errorf("%w: nonce is not that of the login", ErrNotTaken)
	}
	party, there := c["azp"]
	if !there {
		if list, err := c.list("aud", maxAudiences); err != nil || len(list) == 1 {
			return err
		}
	}
	if party != l.client {
		return fmt.Errorf("%w: azp is not the client of the login", ErrNotTaken)
	}
	return nil
}

// signature is the key set as one verification sees it.
type signature struct {
	keys *keySet
	keep time.Duration
	now  time.Time
	examined
	fetched time.Time // when the keys were that it was verified with
	err     error     // why VerifySignature refused: go-oidc keeps its text alone
}

// VerifySignature implements oidc.KeySet.
func (s *signature) VerifySignature(ctx context.Context, raw string) (payload []byte, err error) {
	defer func() { s.err = err }()
	algorithm := jose.SignatureAlgorithm(s.algorithm)
	parsed, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{algorithm})
	if err != nil {
		return nil, fmt.Errorf("%w: %s", ErrMalformed, quote(err.Error()))
	}
	keys, fetched, err := s.keys.find(ctx, s.examined, s.now, s.keep)
	if err != nil {
		return nil, err
	}
	s.fetched = fetched
	for _, key := range keys {
		if payload, verr := parsed.Verify(key.Key); verr == nil {
			return payload, nil
		} else if !errors.Is(verr, jose.ErrCryptoFailure) {
			err = verr
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s", ErrSignature, quote(err.Error()))
	}
	return nil, fmt.Errorf("%w: key %s did not make this signature", ErrSignature, quote(s.keyID))
}
