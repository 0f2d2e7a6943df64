package token

import (
	"context"
	"crypto"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/oidc"
)

// TestRealProvider is the life of a service with npm's oidc-provider: a token, a rotation, an outage, the return.
func TestRealProvider(t *testing.T) {
	t.Parallel()
	p := oidc.Start(t, oidc.Options{
		Resource: audience, TTL: time.Hour,
		Accounts: map[string]map[string]any{"robot": {"groups": []string{"robots", "ops"}}},
	})
	v := newVerifying(t, quick, providerAt(p.Issuer, p.Endpoint, p.CA))
	first := p.Token("robot", "secret", "")
	got := v.want(first, nil, policy.AuthenticateOIDC)
	if who := got.Caller; who.String() != "corp/robot" || !slices.Equal(who.Groups, []string{"robots", "ops"}) ||
		who.Proof != policy.ProofOIDC || who.Claims["client_id"] != "robot" {
		t.Errorf("proves %+v", who)
	}
	if left := time.Until(got.Expires); left < 59*time.Minute || left > 61*time.Minute {
		t.Errorf("counts for %s", left)
	}
	v.want(p.Token("robot", "secret", "https://other.example.org"), ErrNotTaken, policy.AuthenticateOIDC)

	p.Stop()
	v.advance(50 * time.Minute)
	v.want(first, nil, policy.AuthenticateOIDC)
	p.Rotate("second")
	second := p.Token("robot", "secret", "")
	v.want(second, nil, policy.AuthenticateOIDC)
	v.want(first, ErrSignature, policy.AuthenticateOIDC)
	v.advance(11 * time.Minute)
	v.want(second, ErrTime, policy.AuthenticateOIDC)
}

// TestIDToken: what a login brings counts for that login, and for nothing else.
func TestIDToken(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	v := newVerifying(t, nil, i.provider())
	id := func(header, claims fields) string {
		return i.mint(fields{"typ": "JWT"}.with(header), fields{"aud": "web", "nonce": "n-1"}.with(claims))
	}
	for name, c := range map[string]struct {
		token string
		want  error
	}{
		"good":                       {id(nil, nil), nil},
		"good with the client's azp": {id(nil, fields{"azp": "web"}), nil},
		"good for several":           {id(nil, fields{"aud": []string{"web", "x"}, "azp": "web"}), nil},
		"another nonce":              {id(nil, fields{"nonce": "n-2"}), ErrNotTaken},
		"no nonce":                   {id(nil, fields{"nonce": nil}), ErrNotTaken},
		"another client":             {id(nil, fields{"aud": "other"}), ErrNotTaken},
		"the audience of the API":    {id(nil, fields{"aud": audience}), ErrNotTaken},
		"given to another client":    {id(nil, fields{"azp": "other"}), ErrNotTaken},
		"for several without azp":    {id(nil, fields{"aud": []string{"web", "x"}}), ErrNotTaken},
		"an access token":            {id(fields{"typ": "at+jwt"}, nil), ErrNotTaken},
		"expired":                    {id(nil, fields{"exp": 1}), ErrTime},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := v.IDToken(t.Context(), "corp", "n-1", c.token)
			if !errors.Is(err, c.want) || (err == nil) != (got.Caller.String() == "corp/alice") {
				t.Errorf("IDToken: %+v, %v; want %v", got, err, c.want)
			}
		})
	}
	for _, provider := range []string{"", "nobody"} {
		if _, err := v.IDToken(t.Context(), provider, "n-1", id(nil, nil)); !errors.Is(err, ErrNotTaken) {
			t.Errorf("IDToken of %q: %v", provider, err)
		}
	}
	if _, err := v.IDToken(t.Context(), "corp", "", id(nil, fields{"nonce": ""})); !errors.Is(err, ErrNotTaken) {
		t.Errorf("IDToken without a nonce: %v", err)
	}
}

// stamp proves whoever shows the token that it knows.
type stamp string

// Verify implements Provider.
func (s stamp) Verify(_ context.Context, raw string, now time.Time) (Verified, error) {
	if raw != string(s) {
		return Verified{}, ErrSignature
	}
	return Verified{Caller: policy.Caller{Provider: "corp", Subject: "stamped", Proof: policy.ProofOIDC}, Expires: now.Add(time.Minute)}, nil
}

// TestWhichProviderCounts: the token's issuer decides among those that the service names, and the ways that it takes.
func TestWhichProviderCounts(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	v := newVerifying(t, nil, i.provider())
	token := i.mint(nil, nil)
	v.want(token, nil, policy.AuthenticateOIDC)
	v.want(token, ErrNotTaken, policy.AuthenticateSPIFFE)
	v.want(token, ErrNotTaken, policy.AuthenticateJWT)
	other := orders(policy.AuthenticateOIDC)
	other.Spec.HTTP.Providers = []string{"another"}
	if _, err := v.Verify(t.Context(), other, token); !errors.Is(err, ErrNotTaken) {
		t.Errorf("token of a provider that the service does not name: %v", err)
	}
	plain := policy.ProtectedService{}
	if _, err := v.Verify(t.Context(), plain, token); !errors.Is(err, ErrNotTaken) {
		t.Errorf("token for a service without HTTP: %v", err)
	}

	custom := newVerifying(t, func(cfg *Config, _ *pace) { cfg.Custom = map[string]Provider{"corp": stamp(token)} }, i.provider())
	fetches := i.fetches.Load()
	if got := custom.want(token, nil, policy.AuthenticateOIDC); got.Caller.Subject != "stamped" {
		t.Errorf("custom provider proves %+v", got)
	}
	custom.want(i.mint(nil, fields{"sub": "bob"}), ErrSignature, policy.AuthenticateOIDC)
	if i.fetches.Load() != fetches {
		t.Error("keys were fetched that a custom provider does not need")
	}
}

// TestJWTSVID: JWT-SVIDs of every trust domain that there is a bundle of, and what only looks like one.
func TestJWTSVID(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	own, foreign := spiffeid.RequireTrustDomainFromString("example.org"), spiffeid.RequireTrustDomainFromString("partner.example")
	foreignKey := &issuer{t: t, key: newKey(t)}
	bundles := jwtbundle.NewSet(
		jwtbundle.FromJWTAuthorities(own, map[string]crypto.PublicKey{"one": i.key.Public()}),
		jwtbundle.FromJWTAuthorities(foreign, map[string]crypto.PublicKey{"theirs": foreignKey.key.Public()}))
	v := newVerifying(t, func(cfg *Config, _ *pace) { cfg.Bundles = bundles }, i.provider())
	const id = "spiffe://example.org/app/web"
	svid := func(header, claims fields) string {
		h, c := i.good()
		c = c.with(fields{"iss": nil, "sub": id, "groups": nil}).with(claims)
		return i.sign(h.with(fields{"typ": "JWT"}).with(header).part(t) + "." + c.part(t))
	}
	now := time.Now().Unix()
	theirs := fields{"alg": "ES256", "kid": "theirs"}.part(t) + "." +
		fields{"aud": audience, "sub": "spiffe://partner.example/app", "exp": now + 60}.part(t)
	for name, c := range map[string]struct {
		token string
		id    string // empty: refused
		want  error
	}{
		"good":                          {svid(nil, nil), id, nil},
		"good with an issuer":           {svid(nil, fields{"iss": "https://spire.example.org"}), id, nil},
		"good of a federated domain":    {foreignKey.sign(theirs), "spiffe://partner.example/app", nil},
		"of a domain that nobody knows": {svid(nil, fields{"sub": "spiffe://evil.example/app"}), "", ErrSignature},
		"of another domain by our key":  {svid(nil, fields{"sub": "spiffe://partner.example/app"}), "", ErrSignature},
		"of our domain by their key":    {svid(fields{"kid": "theirs"}, nil), "", ErrSignature},
		"a trust domain's own":          {svid(nil, fields{"sub": "spiffe://example.org"}), "", ErrMalformed},
		"an odd path":                   {svid(nil, fields{"sub": "spiffe://example.org/app/../web"}), "", ErrSignature},
		"a domain in capitals":          {svid(nil, fields{"sub": "spiffe://EXAMPLE.org/app"}), "", ErrSignature},
		"no SPIFFE ID":                  {svid(nil, fields{"sub": "alice"}), "", ErrNotTaken},
		"for somebody else":             {svid(nil, fields{"aud": "other"}), "", ErrNotTaken},
		"for nobody":                    {svid(nil, fields{"aud": nil}), "", ErrMalformed},
		"expired":                       {svid(nil, fields{"exp": now - 61}), "", ErrTime},
		"without end":                   {svid(nil, fields{"exp": nil}), "", ErrMalformed},
		"not yet":                       {svid(nil, fields{"nbf": now + 90}), "", ErrTime},
		"without kid":                   {svid(fields{"kid": nil}, nil), "", ErrSignature},
		"none":                          {encode(`{"alg":"none"}`) + "." + fields{"sub": id, "aud": audience, "exp": now + 60}.part(t) + ".YQ", "", ErrNotTaken},
		"another type":                  {svid(fields{"typ": "at+jwt"}, nil), "", ErrSignature},
	} {
		t.Run(name, func(t *testing.T) {
			got := v.want(c.token, c.want, policy.AuthenticateJWT)
			if got.Caller.String() != c.id || c.id != "" && got.Caller.Proof != policy.ProofJWT {
				t.Errorf("proves %+v", got)
			}
		})
	}
	v.want(svid(nil, nil), ErrNotTaken, policy.AuthenticateOIDC)
	v.want(svid(nil, nil), nil, policy.AuthenticateOIDC, policy.AuthenticateJWT)
	v.want(i.mint(nil, nil), nil, policy.AuthenticateOIDC, policy.AuthenticateJWT)
	both := v.want(svid(nil, fields{"iss": i.URL}), nil, policy.AuthenticateOIDC, policy.AuthenticateJWT)
	if !both.Caller.ID.IsZero() { // the provider's word about whom it is does not make an identity of a trust domain
		t.Errorf("token of a provider proves %+v", both)
	}
	nowhere := orders(policy.AuthenticateJWT)
	nowhere.Spec.HTTP.Audiences = nil
	if _, err := v.Verify(t.Context(), nowhere, svid(nil, nil)); !errors.Is(err, ErrNotTaken) {
		t.Errorf("a service without audiences takes a token: %v", err)
	}
}

// TestTimesAreComparable: who reads that a token is out of its time sees the node's own beside it.
func TestTimesAreComparable(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, c := range []claims{{"exp": 1.0}, {"exp": 9e9, "nbf": 8e9}} {
		if _, err := c.period(now, 0); !errors.Is(err, ErrTime) || !strings.Contains(err.Error(), "here it is 2026-03-01T12:00:00Z") {
			t.Errorf("%v: %v", c, err)
		}
	}
}
