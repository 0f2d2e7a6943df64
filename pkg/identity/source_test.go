package identity

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
)

var (
	domain = spiffeid.RequireTrustDomainFromString("example.org")
	proxy  = spiffeid.RequireFromPath(domain, "/sallyport/proxy/node-1")
)

// bench is an authority and a source of it, over a real socket.
type bench struct {
	t         *testing.T
	authority *devauthority.Authority
	socket    string
	*Source

	mu   sync.Mutex
	skew time.Duration // guarded by mu; added to the source's clock
}

func newBench(t *testing.T, ttl time.Duration, change func(*Config)) *bench {
	t.Helper()
	a, err := devauthority.New(domain, devauthority.Options{TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, authority: a, socket: filepath.Join(t.TempDir(), "w.sock")}
	cfg := Config{
		Address: "unix://" + b.socket, MinRetry: 5 * time.Millisecond, MaxRetry: 20 * time.Millisecond,
		Confirm: Confirm{Answers: 2, Window: 50 * time.Millisecond}, Clock: b.now,
	}
	if change != nil {
		change(&cfg)
	}
	if b.Source, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	b.start(func(ctx context.Context) error { return b.Run(ctx) })
	return b
}

func (b *bench) now() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Now().Add(b.skew)
}

func (b *bench) advance(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.skew += d
}

// start runs f until the test ends or stop is called.
func (b *bench) start(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Error(err)
		}
	})
	b.t.Cleanup(stop)
	return stop
}

func (b *bench) serve() (stop func()) {
	return b.start(func(ctx context.Context) error { return b.authority.Serve(ctx, b.socket, proxy) })
}

func (b *bench) until(want State) {
	b.t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		changed := b.Changed()
		if b.Status().State == want {
			return
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond): // states also change by time alone
		case <-deadline:
			b.t.Fatalf("state %+v, want %s", b.Status(), want)
		}
	}
}

func (b *bench) mustGet() *x509svid.SVID {
	b.t.Helper()
	svid, err := b.GetX509SVID()
	if err != nil {
		b.t.Fatal(err)
	}
	return svid
}

func (b *bench) refuses(want error) {
	b.t.Helper()
	if _, err := b.GetX509SVID(); !errors.Is(err, want) {
		b.t.Errorf("got %v, want %v", err, want)
	}
}

func TestFollowsTheAuthority(t *testing.T) {
	b := newBench(t, time.Hour, nil)
	b.until(Unreachable)
	b.refuses(ErrUnreachable)
	stop := b.serve()
	if err := b.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	first := b.mustGet()
	if first.ID != proxy || b.Status().State != Fresh || b.Status().ID != proxy {
		t.Fatalf("got %s, status %+v", first.ID, b.Status())
	}

	changed := b.Changed()
	b.authority.Rotate()
	<-changed
	if b.mustGet().Certificates[0].Equal(first.Certificates[0]) {
		t.Error("rotation not seen")
	}

	stop() // a valid identity is kept while the source is away
	b.until(StaleValid)
	b.mustGet()
	if b.Status().Err == nil {
		t.Error("trouble not told")
	}
	b.serve()
	b.until(Fresh)
}

func TestExpires(t *testing.T) {
	b := newBench(t, time.Hour, nil)
	stop := b.serve()
	b.until(Fresh)
	stop()
	b.until(StaleValid)
	b.advance(2 * time.Hour)
	b.until(Expired)
	b.refuses(ErrExpired)
	if _, err := b.GetX509BundleForTrustDomain(domain); err != nil {
		t.Errorf("bundle went with the identity: %v", err)
	}
}

// TestNotRenewed: a source that is connected and does not renew is not fresh. SPIRE's agent, its
// server stopped, said nothing on the stream: no error, no update of a 2-minute identity for 58 s.
func TestNotRenewed(t *testing.T) {
	b := newBench(t, time.Hour, nil)
	b.serve()
	b.until(Fresh)
	if err := b.Status().Err; err != nil {
		t.Errorf("fresh with %v", err)
	}
	b.advance(46 * time.Minute)
	b.until(StaleValid)
	b.mustGet()
	if err := b.Status().Err; err == nil || !strings.Contains(err.Error(), "not renewed") {
		t.Errorf("trouble is told as %v", err)
	}
	b.authority.Rotate()
	b.until(Fresh)
}

func TestWithdrawnAndRestored(t *testing.T) {
	b := newBench(t, time.Hour, nil)
	b.serve()
	b.until(Fresh)
	b.authority.Withdraw(proxy)
	b.until(Withdrawn)
	b.refuses(ErrWithdrawn)
	b.authority.Restore(proxy)
	b.until(Fresh)
	b.mustGet()
}

func TestNeverIssued(t *testing.T) {
	b := newBench(t, time.Hour, nil)
	b.authority.Withdraw(proxy)
	b.serve()
	b.until(Unissued)
	b.refuses(ErrUnissued)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.Wait(ctx); !errors.Is(err, ErrUnissued) {
		t.Errorf("wait: %v", err)
	}
}

func TestWantedIdentityIsNotAmongThem(t *testing.T) {
	b := newBench(t, time.Hour, func(c *Config) { c.ID = spiffeid.RequireFromPath(domain, "/else") })
	b.serve()
	b.until(Unissued)
}

func TestReplacedRootIsFollowed(t *testing.T) {
	b := newBench(t, time.Hour, nil)
	b.serve()
	b.until(Fresh)
	old := b.mustGet()
	changed := b.Changed()
	if err := b.authority.ReplaceRoot(); err != nil {
		t.Fatal(err)
	}
	<-changed
	if _, _, err := x509svid.Verify(old.Certificates, b); err == nil {
		t.Error("the old root is still trusted")
	}
	if _, _, err := x509svid.Verify(b.mustGet().Certificates, b); err != nil {
		t.Error(err)
	}
}

func TestBadAddress(t *testing.T) {
	s, err := New(Config{Address: "http://example.org"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil {
		t.Error("ran")
	}
	if _, err := New(Config{}); err == nil {
		t.Error("made without address")
	}
}

func TestRetryIsBoundedAndJittered(t *testing.T) {
	b := retry{min: 100, max: 1000}.NewBackoff()
	limit := time.Duration(100)
	for range 20 {
		if d := b.Next(); d > limit || d < limit/2 {
			t.Errorf("%d is outside %d..%d", d, limit/2, limit)
		}
		limit = min(2*limit, 1000)
	}
	b.Reset()
	if d := b.Next(); d > 100 {
		t.Errorf("%d after reset", d)
	}
}
