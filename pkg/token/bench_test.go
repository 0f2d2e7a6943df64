package token

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"maps"
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

// audience of the tokens of tests.
const audience = "https://orders.example.org"

// issuer is a provider of keys that says what a test has it say.
type issuer struct {
	*httptest.Server
	t       *testing.T
	key     *ecdsa.PrivateKey
	fetches atomic.Int64 // of the discovery document

	mu   sync.Mutex
	say  map[string]http.HandlerFunc // guarded by mu; in place of the usual answer, by path
	keys []jose.JSONWebKey           // guarded by mu
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{t: t, key: newKey(t), say: map[string]http.HandlerFunc{}}
	i.Server = httptest.NewUnstartedServer(http.HandlerFunc(i.serve))
	i.Config.ErrorLog = log.New(io.Discard, "", 0)
	i.StartTLS()
	t.Cleanup(i.Close)
	i.keys = []jose.JSONWebKey{{Key: i.key.Public(), KeyID: "one", Algorithm: "ES256", Use: "sig"}}
	return i
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (i *issuer) change(f func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f()
}

func (i *issuer) serve(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	say, keys := i.say[r.URL.Path], i.keys
	i.mu.Unlock()
	if r.URL.Path == discovery {
		i.fetches.Add(1)
	}
	switch {
	case say != nil:
		say(w, r)
	case r.URL.Path == discovery:
		answer(w, map[string]string{"issuer": i.URL, "jwks_uri": i.URL + "/keys"})
	case r.URL.Path == "/keys":
		answer(w, jose.JSONWebKeySet{Keys: keys})
	default:
		http.NotFound(w, r)
	}
}

const discovery = "/.well-known/openid-configuration"

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

func (i *issuer) endpoint() string { return i.Listener.Addr().String() }

func (i *issuer) ca() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw}))
}

// provider is the issuer as policy has it.
func (i *issuer) provider() policy.IdentityProvider { return providerAt(i.URL, i.endpoint(), i.ca()) }

func providerAt(issuer, endpoint, ca string) policy.IdentityProvider {
	return policy.IdentityProvider{
		TypeMeta: policy.TypeMeta{APIVersion: "sallyport.dev/v1alpha1", Kind: "IdentityProvider"}, Metadata: policy.Metadata{Name: "corp"},
		Spec: policy.IdentityProviderSpec{
			Issuer: issuer, Audiences: []string{audience}, Algorithms: []string{"RS256", "PS256", "ES256", "EdDSA"},
			SubjectClaim: "sub", GroupsClaim: "groups", Endpoints: []string{endpoint}, CA: ca,
			Skew: policy.Duration{Duration: 30 * time.Second}, Keep: policy.Duration{Duration: time.Hour},
			Login: &policy.LoginSpec{ClientID: "web"},
		},
	}
}

// orders is the service that tests ask for.
func orders(authenticate ...string) policy.ProtectedService {
	s := policy.ProtectedService{Metadata: policy.Metadata{Name: "orders"}}
	s.Spec.HTTP = &policy.HTTPSpec{Authenticate: authenticate, Providers: []string{"corp"}, Audiences: []string{audience}}
	return s
}

// verifying is a verifier that runs, with a clock and a policy that tests move.
type verifying struct {
	*Verifier
	t testing.TB

	mu   sync.Mutex
	set  *policy.Set   // guarded by mu
	skew time.Duration // guarded by mu; added to the clock
}

func newVerifying(t testing.TB, change func(*Config, *pace), providers ...policy.IdentityProvider) *verifying {
	t.Helper()
	v := &verifying{t: t}
	v.policy(providers...)
	cfg := Config{Policy: v.current, Dial: new(net.Dialer).DialContext, Clock: v.now}
	p := defaultPace
	p.retry = 20 * time.Millisecond
	if change != nil {
		change(&cfg, &p)
	}
	var err error
	if v.Verifier, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	v.pace = p
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return v
}

// policy puts these providers in force.
func (v *verifying) policy(providers ...policy.IdentityProvider) {
	v.t.Helper()
	documents := []string{`{"apiVersion": "sallyport.dev/v1alpha1", "kind": "ProtectedService", "metadata": {"name": "orders"},
		"spec": {"target": "Host", "ports": [8080]}}`}
	for _, p := range providers {
		data, err := json.Marshal(p)
		if err != nil {
			v.t.Fatal(err)
		}
		documents = append(documents, string(data))
	}
	set, err := policy.Parse("test.yaml", []byte(strings.Join(documents, "\n---\n")))
	if err != nil {
		v.t.Fatal(err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.set = set
}

func (v *verifying) current() *policy.Set {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.set
}

func (v *verifying) now() time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return time.Now().Add(v.skew)
}

func (v *verifying) advance(d time.Duration) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.skew += d
}

// want verifies the token and holds that the error is of this kind; nil: there is none.
func (v *verifying) want(raw string, kind error, authenticate ...string) Verified {
	v.t.Helper()
	got, err := v.Verify(v.t.Context(), orders(authenticate...), raw)
	if !errors.Is(err, kind) || (err == nil) != (got.Caller.String() != "") {
		v.t.Errorf("Verify: %+v, %v; want %v", got, err, kind)
	}
	return got
}

// fields of a token's header or payload; nil takes one out.
type fields map[string]any

func (f fields) with(change fields) fields {
	out := maps.Clone(f)
	for name, value := range change {
		if out[name] = value; value == nil {
			delete(out, name)
		}
	}
	return out
}

func (f fields) part(t testing.TB) string {
	t.Helper()
	data, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	return encode(string(data))
}

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// good are header and claims of a token that counts.
func (i *issuer) good() (header, claims fields) {
	now := time.Now().Unix()
	return fields{"alg": "ES256", "kid": "one", "typ": "at+jwt"}, fields{"iss": i.URL, "aud": audience, "sub": "alice",
		"groups": []string{"ops", "dev"}, "iat": now, "nbf": now, "exp": now + 300}
}

// mint signs a token that counts but for the changes.
func (i *issuer) mint(header, claims fields) string {
	i.t.Helper()
	h, c := i.good()
	return i.sign(h.with(header).part(i.t) + "." + c.with(claims).part(i.t))
}

// sign signs with the issuer's key, whatever it is.
func (i *issuer) sign(input string) string {
	i.t.Helper()
	signature, err := signES256(i.key, input)
	if err != nil {
		i.t.Fatal(err)
	}
	return input + "." + signature
}
