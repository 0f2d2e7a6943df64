// Package identity knows who this process is, and how far that can still be relied on.
package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Confirm says when a denial counts as a withdrawal: after so many answers over at least so long.
type Confirm struct {
	Answers int
	Window  time.Duration
}

// Config of a source. Only Address must be set.
type Config struct {
	// Address of the Workload API: "unix:///run/spire/sockets/agent.sock".
	Address string
	// ID is the identity to take of several; zero: the first.
	ID spiffeid.ID
	// Confirm of a withdrawal; zero: 2 answers over 10 s.
	Confirm Confirm
	// MinRetry and MaxRetry bound the time between attempts, which doubles and has jitter. Zero: 250 ms, 10 s.
	MinRetry, MaxRetry time.Duration
	// Clock gives the wall clock; nil: time.Now.
	Clock  func() time.Time
	Logger *slog.Logger
}

// Source is the process's own identity and the bundles it verifies others with, kept up to date from
// the Workload API by Run: those of its own trust domain and of those that it is federated with. It implements
// x509svid.Source, x509bundle.Source and jwtbundle.Source; all methods may be called from anywhere, before,
// during and after Run.
//
// An identity that is past its time or was withdrawn is never given. One that is valid is never
// discarded because the source went away. Bundles are kept through all states: they are public, and
// verifying others does not depend on the own identity.
type Source struct {
	cfg Config

	mu       sync.Mutex
	evidence evidence        // guarded by mu
	svid     *x509svid.SVID  // guarded by mu
	bundles  *x509bundle.Set // guarded by mu
	tokens   *jwtbundle.Set  // guarded by mu; what verifies JWT-SVIDs
	lastErr  error           // guarded by mu
	told     State           // guarded by mu; the state last logged
	changed  chan struct{}   // guarded by mu; closed and replaced at every change
}

// New makes a source that holds nothing yet.
func New(cfg Config) (*Source, error) {
	if cfg.Address == "" {
		return nil, errors.New("make identity source: no Workload API address")
	}
	cfg.complete()
	return &Source{cfg: cfg, bundles: x509bundle.NewSet(), tokens: jwtbundle.NewSet(), changed: make(chan struct{})}, nil
}

// complete fills in what was left out.
func (cfg *Config) complete() {
	if cfg.Confirm == (Confirm{}) {
		cfg.Confirm = Confirm{Answers: 2, Window: 10 * time.Second}
	}
	if cfg.MinRetry <= 0 {
		cfg.MinRetry = 250 * time.Millisecond
	}
	if cfg.MaxRetry < cfg.MinRetry {
		cfg.MaxRetry = max(10*time.Second, cfg.MinRetry)
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
}

// Run follows the Workload API until ctx ends, and returns nil then. It outlives every trouble of
// the source; only an address that cannot be one is an error.
func (s *Source) Run(ctx context.Context) error {
	strategy := retry{s.cfg.MinRetry, s.cfg.MaxRetry}
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.cfg.Address),
		workloadapi.WithBackoffStrategy(strategy), workloadapi.WithDialOptions(strategy.connect()))
	if err != nil {
		return fmt.Errorf("open Workload API %s: %w", s.cfg.Address, err)
	}
	defer client.Close()
	var tokens sync.WaitGroup
	tokens.Go(func() {
		s.again(ctx, strategy, func() error { return client.WatchJWTBundles(ctx, (*tokenWatcher)(s)) })
	})
	s.again(ctx, strategy, func() error { return client.WatchX509Context(ctx, (*watcher)(s)) })
	tokens.Wait()
	return nil
}

// again watches until ctx ends: a watch also ends by errors that the client thinks final and we do not.
func (s *Source) again(ctx context.Context, r retry, watch func() error) {
	pauses := r.NewBackoff()
	for {
		err := watch()
		if ctx.Err() != nil {
			return
		}
		s.cfg.Logger.Warn("watch of Workload API ended", "error", err)
		select {
		case <-time.After(pauses.Next()):
		case <-ctx.Done():
			return
		}
	}
}

// errOverdue is for people: nothing but the state follows from it.
var errOverdue = errors.New("source answers, but has not renewed the identity in time")

// Status is what people are told about the source.
type Status struct {
	State    State
	ID       spiffeid.ID // zero: none was ever held
	NotAfter time.Time   // wall clock
	Err      error       // last trouble with the source; nil while it is connected and renews
	Trusts   []Trust     // in the order of their names; empty before the source has answered
}

// Trust is what is held to verify the identities of a trust domain.
type Trust struct {
	Domain    spiffeid.TrustDomain
	X509, JWT int // keys that sign its certificates and its tokens
}

// Status of this moment.
func (s *Source) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{State: s.state(), NotAfter: s.evidence.notAfter, Err: s.lastErr}
	if st.Err == nil && s.evidence.overdue(s.cfg.Clock()) {
		st.Err = errOverdue
	}
	if s.svid != nil {
		st.ID = s.svid.ID
	}
	st.Trusts = s.trusts()
	return st
}

// trusts is called with mu held.
func (s *Source) trusts() []Trust {
	held := map[spiffeid.TrustDomain]Trust{}
	for _, b := range s.bundles.Bundles() {
		held[b.TrustDomain()] = Trust{Domain: b.TrustDomain(), X509: len(b.X509Authorities())}
	}
	for _, b := range s.tokens.Bundles() {
		held[b.TrustDomain()] = Trust{Domain: b.TrustDomain(), X509: held[b.TrustDomain()].X509, JWT: len(b.JWTAuthorities())}
	}
	return slices.SortedFunc(maps.Values(held), func(a, b Trust) int { return a.Domain.Compare(b.Domain) })
}

// GetX509SVID gives the own identity. Errors: ErrUnreachable, ErrUnissued, ErrExpired, ErrWithdrawn.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.state().err(); err != nil {
		return nil, err
	}
	return s.svid, nil
}

// GetX509BundleForTrustDomain gives what verifies identities of a trust domain.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundles.GetX509BundleForTrustDomain(td)
}

// GetJWTBundleForTrustDomain gives what verifies JWT-SVIDs of a trust domain.
func (s *Source) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tokens.GetJWTBundleForTrustDomain(td)
}

// Changed gives a channel that is closed at the next change of identity, bundles or source. An
// identity that expires by itself closes nothing.
func (s *Source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Wait returns nil as soon as an identity can be given, else when ctx ends with the reason why not.
func (s *Source) Wait(ctx context.Context) error {
	for {
		changed := s.Changed()
		_, err := s.GetX509SVID()
		if err == nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errors.Join(err, s.Status().Err, ctx.Err())
		}
	}
}

// state is called with mu held.
func (s *Source) state() State { return s.evidence.state(s.cfg.Clock(), s.cfg.Confirm) }

// change applies f and wakes those who wait; it logs a change of state, once.
func (s *Source) change(f func(now time.Time)) {
	s.mu.Lock()
	now := s.cfg.Clock()
	f(now)
	state, before, err := s.state(), s.told, s.lastErr
	s.told = state
	if state == Withdrawn && s.svid != nil { // forget the private key
		s.svid = &x509svid.SVID{ID: s.svid.ID, Certificates: s.svid.Certificates}
	}
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	if state != before {
		s.cfg.Logger.Info("identity state", "state", state, "before", before, "error", err)
	}
}

// watcher is the side of a Source that the Workload API client talks to.
type watcher Source

// OnX509ContextUpdate takes a full set of identities and bundles.
func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	s := (*Source)(w)
	svid := pick(c.SVIDs, s.cfg.ID)
	s.change(func(now time.Time) {
		s.bundles = c.Bundles
		if svid == nil {
			s.lastErr = fmt.Errorf("find %s among %d identities: %w", s.cfg.ID, len(c.SVIDs), ErrUnissued)
			s.evidence = s.evidence.missing(now, s.cfg.Confirm)
			return
		}
		s.lastErr = nil
		s.svid = svid
		s.evidence = s.evidence.updated(now, svid.Certificates[0].NotAfter)
	})
}

// OnX509ContextWatchError sorts what went wrong. The client asks again by itself.
func (w *watcher) OnX509ContextWatchError(err error) {
	s := (*Source)(w)
	s.change(func(now time.Time) {
		s.lastErr = err
		if isDenial(err) {
			s.evidence = s.evidence.denied(now, s.cfg.Confirm)
		} else {
			s.evidence = s.evidence.unreachable()
		}
	})
}

// tokenWatcher is the side of a Source that is told what verifies JWT-SVIDs. Trouble with it says nothing about
// the own identity, and whoever serves no tokens at all is no trouble.
type tokenWatcher Source

// OnJWTBundlesUpdate takes a full set of bundles.
func (w *tokenWatcher) OnJWTBundlesUpdate(bundles *jwtbundle.Set) {
	s := (*Source)(w)
	s.mu.Lock()
	same := slices.EqualFunc(s.tokens.Bundles(), bundles.Bundles(), (*jwtbundle.Bundle).Equal)
	s.mu.Unlock()
	if !same {
		s.change(func(time.Time) { s.tokens = bundles })
	}
}

// OnJWTBundlesWatchError leaves the bundles as they are: they are public. The client asks again by itself.
func (w *tokenWatcher) OnJWTBundlesWatchError(err error) {
	w.cfg.Logger.Debug("watch of JWT bundles", "error", err)
}

// isDenial tells answers of a source that is well from all other trouble.
func isDenial(err error) bool {
	code := status.Code(err)
	return code == codes.PermissionDenied || code == codes.NotFound
}

func pick(svids []*x509svid.SVID, id spiffeid.ID) *x509svid.SVID {
	for _, svid := range svids {
		if id.IsZero() || svid.ID == id {
			return svid
		}
	}
	return nil
}

// retry doubles the time between attempts, up to max, and takes up to half of it off at random.
type retry struct{ min, max time.Duration }

type attempts struct {
	retry
	next time.Duration
}

// NewBackoff implements workloadapi.BackoffStrategy.
func (r retry) NewBackoff() workloadapi.Backoff { return &attempts{retry: r, next: r.min} }

// Next implements workloadapi.Backoff.
func (a *attempts) Next() time.Duration {
	d := a.next
	a.next = min(2*d, a.max)
	return d - rand.N(d/2+1)
}

// Reset implements workloadapi.Backoff.
func (a *attempts) Reset() { a.next = a.min }
