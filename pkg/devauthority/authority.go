// Package devauthority is an embedded SPIFFE authority with a real Workload API, for the demo and
// for tests.
//
// It attests nobody: whoever may open a socket gets the identity that is served there. Never use it
// where identities must mean something; that is what SPIRE is for.
package devauthority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const (
	defaultTTL   = time.Hour
	authorityTTL = 365 * 24 * time.Hour
	// backdate covers readers whose clock is a little behind.
	backdate = 30 * time.Second
)

// Options of an authority.
type Options struct {
	// TTL is how long an identity is valid (wall clock); 0: one hour. It is renewed at half of it.
	TTL time.Duration
}

// Authority issues identities of one trust domain, from keys that it keeps in memory. Its methods
// may be called at any time by anybody.
type Authority struct {
	trustDomain spiffeid.TrustDomain
	ttl         time.Duration

	mu        sync.Mutex
	root      root                                          // guarded by mu
	withdrawn map[spiffeid.ID]bool                          // guarded by mu
	federated map[spiffeid.TrustDomain]*spiffebundle.Bundle // guarded by mu
	entries   []Entry                                       // guarded by mu
	changed   chan struct{}                                 // guarded by mu; closed and replaced at every change
}

// root signs certificates and, by another key, tokens.
type root struct {
	cert     *x509.Certificate
	key      *ecdsa.PrivateKey
	tokenKey *ecdsa.PrivateKey
	keyID    string
}

// New makes an authority with a new root key.
func New(trustDomain spiffeid.TrustDomain, o Options) (*Authority, error) {
	if trustDomain.IsZero() {
		return nil, fmt.Errorf("make authority: no trust domain")
	}
	if o.TTL <= 0 {
		o.TTL = defaultTTL
	}
	r, err := newRoot(trustDomain)
	if err != nil {
		return nil, err
	}
	return &Authority{
		trustDomain: trustDomain, ttl: o.TTL, root: r,
		withdrawn: map[spiffeid.ID]bool{}, federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{}, changed: make(chan struct{}),
	}, nil
}

// Rotate gives every workload that is connected a new key and certificate.
func (a *Authority) Rotate() { a.change(func() {}) }

// Withdraw takes an identity away: its streams end with PermissionDenied, and so does every new
// one until Restore.
func (a *Authority) Withdraw(id spiffeid.ID) { a.change(func() { a.withdrawn[id] = true }) }

// Restore issues a withdrawn identity again.
func (a *Authority) Restore(id spiffeid.ID) { a.change(func() { delete(a.withdrawn, id) }) }

// Federate has all workloads trust another trust domain, too, by the bundle as it is now: after a change of it,
// call again.
func (a *Authority) Federate(b *spiffebundle.Bundle) {
	a.change(func() { a.federated[b.TrustDomain()] = b.Clone() })
}

// Unfederate ends that.
func (a *Authority) Unfederate(td spiffeid.TrustDomain) {
	a.change(func() { delete(a.federated, td) })
}

// ReplaceRoot makes a new root key at once, without overlap: what the old one signed is trusted no
// more by whoever has the new bundle.
func (a *Authority) ReplaceRoot() error {
	r, err := newRoot(a.trustDomain)
	if err == nil {
		a.change(func() { a.root = r })
	}
	return err
}

// Bundle is what verifies the identities of this authority.
func (a *Authority) Bundle() *x509bundle.Bundle {
	a.mu.Lock()
	defer a.mu.Unlock()
	return x509bundle.FromX509Authorities(a.trustDomain, []*x509.Certificate{a.root.cert})
}

// TrustBundle is what verifies certificates and tokens of this authority, as others federate with it.
func (a *Authority) TrustBundle() *spiffebundle.Bundle {
	a.mu.Lock()
	defer a.mu.Unlock()
	b := spiffebundle.New(a.trustDomain)
	b.SetX509Authorities([]*x509.Certificate{a.root.cert})
	b.SetJWTAuthorities(map[string]crypto.PublicKey{a.root.keyID: a.root.tokenKey.Public()})
	return b
}

// IssueToken makes a JWT-SVID, withdrawn or not, without a Workload API.
func (a *Authority) IssueToken(id spiffeid.ID, audience ...string) (string, error) {
	a.mu.Lock()
	r := a.root
	a.mu.Unlock()
	return r.issueToken(id, a.ttl, audience)
}

// Issue makes an identity, withdrawn or not, without a Workload API.
func (a *Authority) Issue(id spiffeid.ID) (*x509svid.SVID, error) {
	a.mu.Lock()
	r := a.root
	a.mu.Unlock()
	return r.issue(id, a.ttl)
}

func (a *Authority) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	close(a.changed)
	a.changed = make(chan struct{})
}

// moment is what a stream needs of one moment.
type moment struct {
	root      root
	withdrawn map[spiffeid.ID]bool
	federated map[spiffeid.TrustDomain]*spiffebundle.Bundle
	entries   []Entry
	changed   <-chan struct{}
}

func (a *Authority) look() moment {
	a.mu.Lock()
	defer a.mu.Unlock()
	return moment{a.root, maps.Clone(a.withdrawn), maps.Clone(a.federated), slices.Clone(a.entries), a.changed}
}

func newRoot(td spiffeid.TrustDomain) (root, error) {
	template := x509.Certificate{
		Subject:               pkix.Name{Organization: []string{"Sallyport development authority"}},
		URIs:                  []*url.URL{td.ID().URL()},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	cert, key, err := sign(template, authorityTTL, root{})
	if err != nil {
		return root{}, fmt.Errorf("make root: %w", err)
	}
	tokenKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return root{}, fmt.Errorf("make key of tokens: %w", err)
	}
	return root{cert: cert, key: key, tokenKey: tokenKey, keyID: cert.SerialNumber.Text(16)}, nil
}

func (r root) issueToken(id spiffeid.ID, ttl time.Duration, audience []string) (string, error) {
	key := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: r.tokenKey, KeyID: r.keyID}}
	signer, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("issue token of %s: %w", id, err)
	}
	now := time.Now()
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Subject: id.String(), Audience: audience, IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(ttl)),
	}).Serialize()
	if err != nil {
		return "", fmt.Errorf("issue token of %s: %w", id, err)
	}
	return token, nil
}

func (r root) issue(id spiffeid.ID, ttl time.Duration) (*x509svid.SVID, error) {
	template := x509.Certificate{
		Subject:               pkix.Name{Organization: []string{"Sallyport development authority"}},
		URIs:                  []*url.URL{id.URL()},
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, key, err := sign(template, ttl, r)
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}, nil
}

// sign makes a key and its certificate, signed by the issuer or, without one, by itself.
func sign(template x509.Certificate, ttl time.Duration, issuer root) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, nil, fmt.Errorf("draw serial number: %w", err)
	}
	now := time.Now()
	template.SerialNumber = serial
	template.NotBefore, template.NotAfter = now.Add(-backdate), now.Add(ttl)
	parent, signer := issuer.cert, issuer.key
	if parent == nil {
		parent, signer = &template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, parent, key.Public(), signer)
	if err != nil {
		return nil, nil, fmt.Errorf("sign certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, err
}
