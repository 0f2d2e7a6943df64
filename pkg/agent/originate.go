package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Bounds of what is signed for workloads.
const (
	signFor        = time.Minute // since the proxy has asked whose a connection is
	signaturesEach = 4           // of a connection: a handshake needs one
	keptAsked      = 16384       // connections
	signRate       = 2000        // signatures a second, all connections together
)

// originations lets the proxy speak TLS as the workload behind a connection, to a remote service and to nobody else: it gives the
// proxy the workload's certificates, and signs with the key, which stays here. Safe for concurrent use.
type originations struct {
	callers *openers
	set     func() *policy.Set // in force; its remote services are elsewhere
	clock   clock
	pace    *rate.Limiter

	mu    sync.Mutex
	asked map[connection]*asked // guarded by mu
}

// connection is one of a client on this node.
type connection struct{ client, server netip.AddrPort }

// asked is a connection of which the proxy was told whose it is.
type asked struct {
	began    time.Duration // as the kernel tells: another one of the same ports began at another time
	attended *attended
	as       spiffeid.ID   // whom the proxy speaks as
	at       time.Duration // guarded by originations.mu; when the proxy asked last
	signed   int           // guarded by originations.mu
}

func newOriginations(callers *openers, set func() *policy.Set, clock clock) *originations {
	return &originations{callers: callers, set: set, clock: clock, pace: rate.NewLimiter(signRate, signRate), asked: make(map[connection]*asked)}
}

// chain gives the certificates of the workload behind a connection, where policy lets it ask that remote service; none where not. The
// error is that the broker knows the workload and gives it no identity, or not any more the one that the connection began with. as is whom
// the proxy says that this is, which an agent that has just begun cannot know; zero: it speaks as nobody yet.
func (o *originations) chain(c connection, found *called, told *flow.Workload, as spiffeid.ID) ([][]byte, error) {
	service, ok := o.set().RemoteServiceAt(c.server)
	if !ok || found == nil || found.attended == nil {
		return nil, nil
	}
	if told.Identity == "" {
		if found.attended.isDenied() {
			return nil, status.Error(codes.PermissionDenied, told.Why)
		}
		return nil, nil
	}
	if known := o.spokenAs(c, found); !known.IsZero() {
		as = known
	}
	if !as.IsZero() && found.attended.lacks(as) {
		return nil, status.Errorf(codes.PermissionDenied, "%s is its identity no more", as)
	}
	svid := found.attended.svidFor(func(id spiffeid.ID) bool { return (as.IsZero() || id == as) && o.mayAsk(service.Name, id) })
	if svid == nil || !o.note(c, found, svid.ID) {
		return nil, nil
	}
	told.Identity = svid.ID.String() // of several, the one that may ask
	raw := make([][]byte, 0, len(svid.Certificates))
	for _, cert := range svid.Certificates {
		raw = append(raw, cert.Raw)
	}
	return raw, nil
}

func (o *originations) mayAsk(service string, id spiffeid.ID) bool {
	return o.set().AuthoriseCaller(service, policy.Caller{ID: id, Proof: policy.ProofLocal}, o.clock.wall()).Allowed
}

// spokenAs is whom the proxy speaks as for a connection that it asked about before; zero of any other.
func (o *originations) spokenAs(c connection, found *called) spiffeid.ID {
	o.mu.Lock()
	defer o.mu.Unlock()
	if a := o.asked[c]; a.isOf(found) {
		return a.as
	}
	return spiffeid.ID{}
}

// isOf tells whether it is that very connection, of the same workload. nil is of none.
func (a *asked) isOf(found *called) bool {
	return a != nil && a.began == found.began && a.attended == found.attended
}

// note remembers that the proxy has asked. Asking again does not give a connection more signatures.
func (o *originations) note(c connection, found *called, as spiffeid.ID) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := o.clock.boot()
	if a := o.asked[c]; a.isOf(found) {
		a.at = now
		return true
	}
	if len(o.asked) >= keptAsked {
		for key, a := range o.asked {
			if now-a.at > signFor {
				delete(o.asked, key)
			}
		}
	}
	if len(o.asked) >= keptAsked {
		return false
	}
	o.asked[c] = &asked{began: found.began, attended: found.attended, as: as, at: now}
	return true
}

// ended forgets a connection of which the proxy tells the end.
func (o *originations) ended(rec flow.Record) {
	if o == nil || rec.Event != flow.EventClose && rec.Event != flow.EventDeny {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.asked, connection{plainAddr(rec.Client), plainAddr(rec.Server)})
}

// take counts a signature of a connection, if it may have one more.
func (o *originations) take(c connection) (*attended, error) {
	from, err := o.callers.opened(c.client, c.server)
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, whyNoSocket)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	a := o.asked[c]
	switch {
	case a == nil:
		return nil, status.Error(codes.PermissionDenied, "nobody has asked whose this connection is, or it has ended, or its caller may not ask this server")
	case a.began != from.Taken:
		return nil, status.Error(codes.PermissionDenied, whyLater)
	case o.clock.boot()-a.at > signFor:
		return nil, status.Errorf(codes.PermissionDenied, "it is longer than %s ago that somebody asked whose this connection is", signFor)
	case a.signed >= signaturesEach || !o.pace.Allow():
		return nil, status.Error(codes.ResourceExhausted, "that are more signatures than TLS needs")
	}
	a.signed++
	return a.attended, nil
}

// sign answers the proxy's request.
func (o *originations) sign(c connection, q *api.SignRequest) ([]byte, error) {
	opts, err := signerOpts(q)
	if err != nil {
		return nil, err
	}
	service, ok := o.set().RemoteServiceAt(c.server)
	if !ok {
		return nil, status.Errorf(codes.PermissionDenied, "%s is no remote service", c.server)
	}
	whose, err := o.take(c)
	if err != nil {
		return nil, err
	}
	if !o.callers.isStill(whose) {
		return nil, status.Error(codes.PermissionDenied, whyEnded)
	}
	svid := whose.svidOf([sha256.Size]byte(q.GetLeaf()), o.clock.wall())
	if svid == nil {
		return nil, status.Error(codes.PermissionDenied, "that certificate is none of the caller's, or not any more")
	}
	if !o.mayAsk(service.Name, svid.ID) {
		return nil, status.Errorf(codes.PermissionDenied, "%s may not ask %s", svid.ID, service.Name)
	}
	if err := fitsKey(svid.PrivateKey, opts); err != nil {
		return nil, err
	}
	signature, err := svid.PrivateKey.Sign(rand.Reader, q.GetDigest(), opts)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "sign: %s", oneLine(err.Error()))
	}
	return signature, nil
}

// beforeTranscript is what TLS 1.3 has a client sign in front of the hash of all that was said (RFC 8446, 4.4.3).
var beforeTranscript = strings.Repeat(" ", 64) + "TLS 1.3, client CertificateVerify\x00"

// signerOpts checks the form of a request. Ed25519 hashes by itself, so that there the whole of what is signed can be seen.
func signerOpts(q *api.SignRequest) (crypto.SignerOpts, error) {
	if len(q.GetLeaf()) != sha256.Size {
		return nil, status.Errorf(codes.InvalidArgument, "leaf: %d bytes, want the %d of a SHA-256", len(q.GetLeaf()), sha256.Size)
	}
	hash := crypto.Hash(q.GetHash())
	switch hash {
	case 0:
		if n := len(q.GetDigest()) - len(beforeTranscript); n != crypto.SHA256.Size() && n != crypto.SHA384.Size() || string(q.GetDigest()[:len(beforeTranscript)]) != beforeTranscript {
			return nil, status.Error(codes.InvalidArgument, "digest: without a hash, want what a client signs in TLS 1.3")
		}
		return hash, nil
	case crypto.SHA256, crypto.SHA384, crypto.SHA512:
		if len(q.GetDigest()) != hash.Size() {
			return nil, status.Errorf(codes.InvalidArgument, "digest: %d bytes, want the %d of %s", len(q.GetDigest()), hash.Size(), hash)
		}
	default:
		return nil, status.Errorf(codes.InvalidArgument, "hash: %d is none of TLS 1.3", q.GetHash())
	}
	if q.GetPss() {
		return &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}, nil
	}
	return hash, nil
}

// fitsKey refuses what TLS 1.3 does not sign with such a key.
func fitsKey(key crypto.Signer, opts crypto.SignerOpts) error {
	_, pss := opts.(*rsa.PSSOptions)
	hashed := opts.HashFunc() != 0
	ok := false
	switch key.Public().(type) {
	case *rsa.PublicKey:
		ok = pss
	case *ecdsa.PublicKey:
		ok = hashed && !pss
	case ed25519.PublicKey:
		ok = !hashed
	}
	if !ok {
		return status.Error(codes.InvalidArgument, "that is not how TLS 1.3 signs with such a key")
	}
	return nil
}

// Sign signs with the key of the workload behind a connection to a remote service.
func (r *reports) Sign(_ context.Context, q *api.SignRequest) (*api.SignReply, error) {
	c, err := readConnection(q.GetConnection())
	if err != nil {
		return nil, err
	}
	if r.originations == nil {
		return nil, status.Error(codes.Unavailable, "nobody looks at callers yet")
	}
	signature, err := r.originations.sign(c, q)
	if err != nil {
		r.log.Warn("signature refused", "client", c.client, "server", c.server, "error", err)
		return nil, err
	}
	return &api.SignReply{Signature: signature}, nil
}

// isDenied tells whether the broker has said that the workload has no identity. One that is away says nothing.
func (a *attended) isDenied() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.denied
}

// svidFor is the first of the workload's SVIDs that may be used; nil: none may.
func (a *attended) svidFor(may func(spiffeid.ID) bool) *x509svid.SVID {
	a.mu.Lock()
	all := a.svids
	a.mu.Unlock()
	for _, s := range all {
		if may(s.ID) {
			return s
		}
	}
	return nil
}

// lacks tells whether the broker gives the workload other identities, and not that one.
func (a *attended) lacks(id spiffeid.ID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.svids) > 0 && !hasID(a.svids, id)
}

// svidOf is the SVID of the workload with that leaf: one that it has, or had until the last rotation, which may be under way. An
// identity that it has no more is none of its own, however short ago it was.
func (a *attended) svidOf(leaf [sha256.Size]byte, now time.Time) *x509svid.SVID {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range slices.Concat(a.svids, a.before) {
		if sha256.Sum256(s.Certificates[0].Raw) == leaf && now.Before(s.Certificates[0].NotAfter) && hasID(a.svids, s.ID) {
			return s
		}
	}
	return nil
}

func hasID(all []*x509svid.SVID, id spiffeid.ID) bool {
	return slices.ContainsFunc(all, func(s *x509svid.SVID) bool { return s.ID == id })
}
