// Package token tells whom a bearer token proves: JWT-SVIDs by the bundles of their trust domains, and tokens of OpenID
// Connect providers by key sets that are fetched in the background and kept.
package token

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Why a token proves nobody. Every error of a verification is one of these, with what was wrong in it.
var (
	// ErrMalformed: it could be read in two ways, or in none.
	ErrMalformed = errors.New("token is malformed")
	// ErrNotTaken: its provider, algorithm, type or audience is none that counts here.
	ErrNotTaken = errors.New("token is not taken here")
	// ErrSignature: no key that counts has signed it.
	ErrSignature = errors.New("token is signed by no key that counts")
	// ErrTime: it has expired, or does not count yet.
	ErrTime = errors.New("token is out of its time")
	// ErrNoKeys: the keys of its provider have never been fetched, or too long ago.
	ErrNoKeys = errors.New("keys of the token's provider are not known")
)

// Verified is whom a token proves. The caller's address is left to whoever has the connection.
type Verified struct {
	Caller policy.Caller
	// Expires is when it stops to count, by the wall clock, with the skew that is allowed for.
	Expires time.Time
}

// Provider verifies the tokens of one issuer.
type Provider interface {
	Verify(ctx context.Context, raw string, now time.Time) (Verified, error)
}

// Config of a verifier. Policy and Dial must be set.
type Config struct {
	// Policy gives the policy in force.
	Policy func() *policy.Set
	// Bundles verify JWT-SVIDs; nil: none is taken.
	Bundles jwtbundle.Source
	// Dial reaches the providers.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Custom verifies the tokens of the IdentityProviders of these names in place of OpenID Connect.
	Custom map[string]Provider
	// Clock gives the wall clock; nil: time.Now.
	Clock  func() time.Time
	Logger *slog.Logger
}

// Verifier verifies the tokens of services. All methods may be called from anywhere, before, during and after Run; without
// Run no keys are fetched. Keys are kept in memory alone: they are public, and fetched again after a restart.
type Verifier struct {
	cfg  Config
	pace pace
	wake chan struct{} // has room for one

	mu   sync.Mutex
	sets map[string]*keySet // guarded by mu; by the name of the provider
}

// New makes a verifier that has no keys yet.
func New(cfg Config) (*Verifier, error) {
	if cfg.Policy == nil || cfg.Dial == nil {
		return nil, errors.New("make token verifier: Policy and Dial must be set")
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Verifier{cfg: cfg, pace: defaultPace, wake: make(chan struct{}, 1), sets: make(map[string]*keySet)}, nil
}

// look is how often a changed policy is looked for.
const look = time.Second

// Run keeps the key sets of all providers until ctx ends, and returns nil then. It outlives every trouble of them.
func (v *Verifier) Run(ctx context.Context) error {
	var fetching sync.WaitGroup
	defer fetching.Wait()
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		for _, k := range v.reconcile(ctx) {
			fetching.Go(func() { k.run() })
		}
		select {
		case <-tick.C:
		case <-v.wake:
		case <-ctx.Done():
			return nil
		}
	}
}

// reconcile ends the key sets that policy does not have any more, and gives those that have to be started.
func (v *Verifier) reconcile(ctx context.Context) (start []*keySet) {
	providers := v.cfg.Policy().Providers()
	v.mu.Lock()
	defer v.mu.Unlock()
	for name, k := range v.sets {
		i := slices.IndexFunc(providers, func(p policy.IdentityProvider) bool { return p.Name == name })
		if i < 0 {
			k.end()
			delete(v.sets, name)
		}
	}
	for _, p := range providers {
		if v.cfg.Custom[p.Name] != nil {
			continue
		}
		if k := v.keysLocked(p); k.ctx == nil {
			k.ctx, k.cancel = context.WithCancel(ctx)
			start = append(start, k)
		}
	}
	return start
}

// keys are those of a provider. Run fetches them from the moment on that somebody asks.
func (v *Verifier) keys(p policy.IdentityProvider) *keySet {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.keysLocked(p)
}

// keysLocked takes none over that were fetched from elsewhere. v.mu is held.
func (v *Verifier) keysLocked(p policy.IdentityProvider) *keySet {
	from := originOf(p)
	k := v.sets[p.Name]
	if k != nil && k.from.equal(from) {
		return k
	}
	if k != nil {
		k.end()
	}
	k = newKeySet(from, v.cfg, v.pace)
	v.sets[p.Name] = k
	select {
	case v.wake <- struct{}{}:
	default: // Run has not looked yet
	}
	return k
}

// Verify tells whom a token proves to a service. Which provider counts is by the token's issuer among those that
// the service names; a token of none of them may be a JWT-SVID. The request may have to wait for keys, once, for 2 s.
func (v *Verifier) Verify(ctx context.Context, service policy.ProtectedService, raw string) (Verified, error) {
	t, err := examine(raw)
	if err != nil {
		return Verified{}, err
	}
	p, err := v.provider(service.Spec.Proofs(), t)
	if err != nil {
		return Verified{}, err
	}
	return p.Verify(ctx, raw, v.cfg.Clock())
}

// IDToken tells whom an ID token proves that the provider's login has brought. nonce is what the login asked for.
func (v *Verifier) IDToken(ctx context.Context, provider, nonce, raw string) (Verified, error) {
	p, ok := v.cfg.Policy().Provider(provider)
	if !ok || p.Spec.Login == nil || nonce == "" {
		return Verified{}, fmt.Errorf("%w: %q has no login", ErrNotTaken, provider)
	}
	o := openID{name: p.Name, spec: p.Spec, keys: v.keys(p), login: &loginClaims{client: p.Spec.Login.ClientID, nonce: nonce}}
	return o.Verify(ctx, raw, v.cfg.Clock())
}

func (v *Verifier) provider(proofs policy.Proofs, t examined) (Provider, error) {
	if proofs.Take(policy.AuthenticateOIDC) {
		set := v.cfg.Policy()
		for _, name := range proofs.Providers {
			if p, ok := set.Provider(name); ok && p.Spec.Issuer == t.issuer {
				return v.ofIssuer(p), nil
			}
		}
	}
	if proofs.Take(policy.AuthenticateJWT) && v.cfg.Bundles != nil && strings.HasPrefix(t.subject, "spiffe://") {
		return jwtSVID{bundles: v.cfg.Bundles, audiences: proofs.Audiences}, nil
	}
	return nil, fmt.Errorf("%w: issuer %s is none that the service takes tokens of", ErrNotTaken, quote(t.issuer))
}

func (v *Verifier) ofIssuer(p policy.IdentityProvider) Provider {
	if custom := v.cfg.Custom[p.Name]; custom != nil {
		return custom
	}
	return openID{name: p.Name, spec: p.Spec, keys: v.keys(p)}
}
