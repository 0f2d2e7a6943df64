package token

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// until polls: what has no event of its own.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func quick(_ *Config, p *pace) { p.floor = 0 }

// TestOutage: tokens go on while the provider is away, for as long as its keys are kept, and again when it is back. That
// it is away at the start holds nothing up.
func TestOutage(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	var away atomic.Bool
	away.Store(true)
	v := newVerifying(t, func(cfg *Config, p *pace) {
		p.floor, p.every = 0, 5*time.Millisecond
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if away.Load() {
				return nil, errors.New("cable is out")
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
	}, i.provider())
	token := i.mint(nil, fields{"exp": time.Now().Add(24 * time.Hour).Unix()})
	v.want(token, ErrNoKeys, policy.AuthenticateOIDC)
	until(t, "people can know that its keys were never fetched", func() bool { return v.hasState(0, "never fetched: ", "cable is out", "; see that") })
	away.Store(false)
	until(t, "it is there", func() bool {
		_, err := v.Verify(t.Context(), orders(policy.AuthenticateOIDC), token)
		return err == nil
	})
	until(t, "people can know that all is well", func() bool { return v.hasState(1) })
	away.Store(true)
	k := v.keys(i.provider())
	until(t, "its absence is seen", func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.err != nil
	})
	v.advance(59 * time.Minute)
	v.want(token, nil, policy.AuthenticateOIDC)
	if !v.hasState(1, "cannot be fetched, and those that it had count until ", "cable is out") {
		t.Errorf("away: %+v", v.States())
	}
	v.advance(2 * time.Minute)
	v.want(token, ErrNoKeys, policy.AuthenticateOIDC)
	if !v.hasState(1, "are refused since ", "too old", "cable is out") {
		t.Errorf("away for longer than its keys are kept: %+v", v.States())
	}
	away.Store(false)
	until(t, "it is back", func() bool {
		_, err := v.Verify(t.Context(), orders(policy.AuthenticateOIDC), token)
		return err == nil
	})
}

// TestNewKey: a token of a key that came since is taken as soon as it comes, and one of a key that went is not.
func TestNewKey(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	v := newVerifying(t, quick, i.provider())
	before := i.mint(nil, nil)
	v.want(before, nil, policy.AuthenticateOIDC)
	i.key = newKey(t)
	i.change(func() { i.keys = []jose.JSONWebKey{{Key: i.key.Public(), KeyID: "next", Use: "sig"}} })
	v.want(i.mint(fields{"kid": "next"}, nil), nil, policy.AuthenticateOIDC)
	v.want(before, ErrSignature, policy.AuthenticateOIDC)
}

// TestUnknownKeysFetchOnce: whoever makes up keys has us ask the provider once in an interval, however many come at once.
func TestUnknownKeysFetchOnce(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	v := newVerifying(t, func(_ *Config, p *pace) { p.floor = time.Hour }, i.provider())
	v.want(i.mint(nil, nil), nil, policy.AuthenticateOIDC)
	k := v.keys(i.provider())
	k.mu.Lock()
	k.tried = time.Now().Add(-2 * time.Hour) // the interval is over
	k.mu.Unlock()
	before := i.fetches.Load()
	var all sync.WaitGroup
	for n := range 200 {
		all.Go(func() { v.want(i.mint(fields{"kid": fmt.Sprint(n)}, nil), ErrSignature, policy.AuthenticateOIDC) })
	}
	all.Wait()
	for n := range 200 {
		v.want(i.mint(fields{"kid": fmt.Sprint("later", n)}, nil), ErrSignature, policy.AuthenticateOIDC)
	}
	if got := i.fetches.Load() - before; got != 1 {
		t.Errorf("400 unknown keys had us ask %d times", got)
	}
	v.want(i.mint(nil, nil), nil, policy.AuthenticateOIDC)
}

// TestSlowProvider: a provider that answers nothing holds a request up for a bounded time, and those with known keys not at all.
func TestSlowProvider(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	hang := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	i.change(func() { i.say["/keys"] = hang })
	v := newVerifying(t, func(_ *Config, p *pace) {
		p.floor, p.wait, p.fetch = 0, 10*time.Millisecond, 50*time.Millisecond
	}, i.provider())
	v.want(i.mint(nil, nil), ErrNoKeys, policy.AuthenticateOIDC)
	i.change(func() { delete(i.say, "/keys") })
	until(t, "keys are there", func() bool {
		_, err := v.Verify(t.Context(), orders(policy.AuthenticateOIDC), i.mint(nil, nil))
		return err == nil
	})
	i.change(func() { i.say["/keys"] = hang })
	v.want(i.mint(fields{"kid": "unknown"}, nil), ErrSignature, policy.AuthenticateOIDC)
	v.want(i.mint(nil, nil), nil, policy.AuthenticateOIDC)
}

// TestKeysOfAnotherOriginDoNotCount: a policy that says where keys come from counts at once.
func TestKeysOfAnotherOriginDoNotCount(t *testing.T) {
	t.Parallel()
	i, other := newIssuer(t), newIssuer(t)
	v := newVerifying(t, func(_ *Config, p *pace) { p.floor, p.wait = 0, 5*time.Second }, i.provider())
	v.want(i.mint(nil, nil), nil, policy.AuthenticateOIDC)
	for what, change := range map[string]func(*policy.IdentityProviderSpec){
		"endpoints": func(s *policy.IdentityProviderSpec) { s.Endpoints = append(s.Endpoints, other.endpoint()) },
		"CA":        func(s *policy.IdentityProviderSpec) { s.CA += other.ca() }, // the same certificate again, in tests: by the letter it is another
	} {
		before := i.fetches.Load()
		p := i.provider()
		change(&p.Spec)
		v.policy(p)
		v.want(i.mint(nil, nil), nil, policy.AuthenticateOIDC)
		if i.fetches.Load() == before {
			t.Errorf("keys that were fetched with other %s count on", what)
		}
	}
	v.policy()
	v.want(i.mint(nil, nil), ErrNotTaken, policy.AuthenticateOIDC)
	until(t, "keys of no provider are forgotten", func() bool {
		v.Verifier.mu.Lock()
		defer v.Verifier.mu.Unlock()
		return len(v.sets) == 0
	})
}

// TestWhoTellsKeys holds a provider, or whoever speaks in its place, to what policy says: nobody else is asked, and what is
// odd is no answer.
func TestWhoTellsKeys(t *testing.T) {
	t.Parallel()
	var elsewhere atomic.Int64
	victim := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(victim.Close)
	for name, c := range map[string]struct {
		path string
		say  func(i *issuer) http.HandlerFunc
		why  string
	}{
		"another issuer": {discovery, func(i *issuer) http.HandlerFunc {
			return documentOf(i.URL+"/other", i.URL+"/keys")
		}, "issuer"},
		"keys in plaintext": {discovery, func(i *issuer) http.HandlerFunc {
			return documentOf(i.URL, strings.Replace(i.URL, "https", "http", 1)+"/keys")
		}, "no https"},
		"keys in a file": {discovery, func(i *issuer) http.HandlerFunc { return documentOf(i.URL, "file:///etc/shadow") }, "no https"},
		"keys elsewhere": {discovery, func(i *issuer) http.HandlerFunc {
			return documentOf(i.URL, victim.URL+"/keys")
		}, "not among the endpoints"},
		"keys at the metadata service": {discovery, func(i *issuer) http.HandlerFunc {
			return documentOf(i.URL, "https://169.254.169.254/latest/meta-data/")
		}, "not among the endpoints"},
		"keys with a password": {discovery, func(i *issuer) http.HandlerFunc {
			return documentOf(i.URL, strings.Replace(i.URL, "https://", "https://somebody@", 1)+"/keys")
		}, "no https"},
		"a redirect of the document": {discovery, func(*issuer) http.HandlerFunc { return redirectTo(victim.URL) }, "302"},
		"a redirect of the keys":     {"/keys", func(*issuer) http.HandlerFunc { return redirectTo(victim.URL) }, "302"},
		"a redirect to itself":       {"/keys", func(i *issuer) http.HandlerFunc { return redirectTo(i.URL + "/others") }, "302"},
		"an error":                   {"/keys", func(*issuer) http.HandlerFunc { return http.NotFound }, "404"},
		"an endless document":        {discovery, func(*issuer) http.HandlerFunc { return endless }, "too large"},
		"endless keys":               {"/keys", func(*issuer) http.HandlerFunc { return endless }, "too large"},
		"no JSON":                    {"/keys", func(*issuer) http.HandlerFunc { return saying(`<html>`) }, "read keys"},
		"no keys":                    {"/keys", func(*issuer) http.HandlerFunc { return saying(`{"keys":[]}`) }, "none that can verify"},
		"a secret as the key": {"/keys", func(*issuer) http.HandlerFunc {
			return saying(`{"keys":[{"kty":"oct","kid":"one","k":"AAAA"}]}`)
		}, "none that can verify"},
		"too many keys": {"/keys", func(*issuer) http.HandlerFunc {
			return saying(`{"keys":[` + strings.Repeat(`{},`, maxKeys) + `{}]}`)
		}, "more than"},
		"a private key": {"/keys", func(i *issuer) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) {
				answer(w, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.key, KeyID: "one"}}})
			}
		}, "none that can verify"},
		"a weak key":            {"/keys", func(*issuer) http.HandlerFunc { return rsaKey(1024) }, "none that can verify"},
		"a key that takes long": {"/keys", func(*issuer) http.HandlerFunc { return rsaKey(16384) }, "none that can verify"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			i := newIssuer(t)
			i.change(func() { i.say[c.path] = c.say(i) })
			v := newVerifying(t, nil, i.provider())
			_, err := v.Verify(t.Context(), orders(policy.AuthenticateOIDC), i.mint(nil, nil))
			if !errors.Is(err, ErrNoKeys) || !strings.Contains(err.Error(), c.why) {
				t.Errorf("Verify: %v, want one that says %q", err, c.why)
			}
		})
	}
	t.Cleanup(func() { // after the parallel ones
		if n := elsewhere.Load(); n > 0 {
			t.Errorf("who is no endpoint was asked %d times", n)
		}
	})
}

func documentOf(issuer, keys string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]string{"issuer": issuer, "jwks_uri": keys})
	}
}

func redirectTo(url string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, url, http.StatusFound) }
}

func saying(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) }
}

func endless(w http.ResponseWriter, r *http.Request) {
	fmt.Fprint(w, `{"issuer":"`)
	for r.Context().Err() == nil {
		if _, err := w.Write(make([]byte, 32<<10)); err != nil {
			return
		}
	}
}

// rsaKey has a made-up modulus: only its length is looked at before a signature is.
func rsaKey(bits int) http.HandlerFunc {
	n := base64.RawURLEncoding.EncodeToString(bytes.Repeat([]byte{0xff}, bits/8))
	return saying(`{"keys":[{"kty":"RSA","kid":"one","e":"AQAB","n":"` + n + `"}]}`)
}

// TestWhoProvidesIsProven: a provider that its CA does not vouch for is not listened to.
func TestWhoProvidesIsProven(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	p := i.provider()
	p.Spec.CA = "" // the system's
	v := newVerifying(t, nil, p)
	_, err := v.Verify(t.Context(), orders(policy.AuthenticateOIDC), i.mint(nil, nil))
	if !errors.Is(err, ErrNoKeys) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("Verify: %v", err)
	}
}

// TestEveryAlgorithm: each that can be listed is verified, by a key that says what it is for and by one that does not.
func TestEveryAlgorithm(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i.change(func() {
		i.keys = append(i.keys, jose.JSONWebKey{Key: rsaKey.Public(), KeyID: "rsa"}, jose.JSONWebKey{Key: public, KeyID: "ed"})
	})
	v := newVerifying(t, nil, i.provider())
	_, claims := i.good()
	for algorithm, key := range map[jose.SignatureAlgorithm]jose.JSONWebKey{
		jose.RS256: {Key: rsaKey, KeyID: "rsa"}, jose.PS256: {Key: rsaKey, KeyID: "rsa"},
		jose.ES256: {Key: i.key, KeyID: "one"}, jose.EdDSA: {Key: edKey, KeyID: "ed"},
	} {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: key}, nil)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := signer.Sign([]byte(decoded(claims.part(t))))
		if err != nil {
			t.Fatal(err)
		}
		raw, err := signed.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		v.want(raw, nil, policy.AuthenticateOIDC)
	}
}

// TestSeenTokensAreJudgedAgain: that a token was taken before says nothing but that its signature was good, and that only
// until keys are fetched anew.
func TestSeenTokensAreJudgedAgain(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	v := newVerifying(t, nil, i.provider())
	token := i.mint(nil, nil)
	v.want(token, nil, policy.AuthenticateOIDC)
	v.want(token, nil, policy.AuthenticateOIDC)
	k := v.keys(i.provider())
	k.mu.Lock()
	seen := len(k.seen)
	k.mu.Unlock()
	if seen != 1 {
		t.Errorf("%d tokens are remembered", seen)
	}
	p := i.provider()
	p.Spec.Audiences = []string{"other"}
	v.policy(p)
	v.want(token, ErrNotTaken, policy.AuthenticateOIDC)
	p = i.provider()
	p.Spec.Algorithms = []string{"RS256"}
	v.policy(p)
	v.want(token, ErrNotTaken, policy.AuthenticateOIDC)
	p = i.provider()
	p.Spec.Keep = policy.Duration{Duration: time.Minute}
	v.policy(p)
	v.advance(2 * time.Minute)
	i.Close()
	v.want(token, ErrNoKeys, policy.AuthenticateOIDC)
	v.advance(4 * time.Minute)
	v.policy(i.provider())
	v.want(token, ErrTime, policy.AuthenticateOIDC)
	parts := strings.Split(token, ".")
	_, claims := i.good()
	v.want(parts[0]+"."+claims.with(fields{"sub": "root"}).part(t)+"."+parts[2], ErrSignature, policy.AuthenticateOIDC)
}

// TestRememberedTokensAreBounded: and none is remembered of keys that were replaced meanwhile.
func TestRememberedTokensAreBounded(t *testing.T) {
	t.Parallel()
	o, _ := fuzzed(t)
	k := o.keys
	for n := range 2*maxSeen + 1 {
		k.remember(sha256.Sum256(fmt.Append(nil, n)), k.fetched)
	}
	if len(k.seen) > maxSeen {
		t.Errorf("%d tokens are remembered", len(k.seen))
	}
	last := sha256.Sum256([]byte("last"))
	k.remember(last, k.fetched.Add(-time.Second))
	if k.signed(last, time.Now(), time.Hour) {
		t.Error("a signature of earlier keys is remembered")
	}
}

// hasState tells whether the one provider has so many keys, and a problem with these words, or none.
func (v *verifying) hasState(keys int, words ...string) bool {
	all := v.States()
	if len(all) != 1 || all[0].Keys != keys || all[0].Fetched.IsZero() != (keys == 0) || (all[0].Problem == "") != (len(words) == 0) {
		return false
	}
	for _, w := range words {
		if !strings.Contains(all[0].Problem, w) {
			return false
		}
	}
	return true
}
