package identity

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

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
	b.untilTrue(string(want), func() bool { return b.Status().State == want })
}

// untilTrue waits for what the source comes to know.
func (b *bench) untilTrue(what string, holds func() bool) {
	b.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		changed := b.Changed()
		if holds() {
			return
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond): // states also change by time alone
		case <-deadline:
			b.t.Fatalf("status %+v, want: %s", b.Status(), what)
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
	if err := b.authority.ReplaceRoot(); err != nil {
		t.Fatal(err)
	}
	b.untilTrue("the old root is trusted no more", func() bool {
		_, _, err := x509svid.Verify(old.Certificates, b)
		return err != nil
	})
	if _, _, err := x509svid.Verify(b.mustGet().Certificates, b); err != nil {
		t.Error(err)
	}
}

// trusts says whether certificate and token of a foreign identity verify.
func (b *bench) trusts(svid *x509svid.SVID, token string) (certificate, jwt bool) {
	_, _, err := x509svid.Verify(svid.Certificates, b)
	_, tokenErr := jwtsvid.ParseAndValidate(token, b, []string{"service"})
	return err == nil, tokenErr == nil
}

// TestFederation: who belongs to a federated trust domain is verified, by certificate and by token; a federation
// that is ended ends that, and one that is merely not heard of does not.
func TestFederation(t *testing.T) {
	foreign, err := devauthority.New(partner, devauthority.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t, time.Hour, nil)
	stop := b.serve()
	b.until(Fresh)
	id := spiffeid.RequireFromPath(partner, "/web")
	svid, err := foreign.Issue(id)
	if err != nil {
		t.Fatal(err)
	}
	token, err := foreign.IssueToken(id, "service")
	if err != nil {
		t.Fatal(err)
	}
	both := func(want bool) func() bool {
		return func() bool {
			certificate, jwt := b.trusts(svid, token)
			return certificate == want && jwt == want
		}
	}
	if !both(false)() {
		t.Error("strangers are trusted")
	}
	b.authority.Federate(foreign.TrustBundle())
	b.untilTrue("partner is trusted", both(true))
	if got := fmt.Sprint(b.Status().Trusts); got != "[{example.org 1 1} {partner.example 1 1}]" {
		t.Errorf("status says %s", got)
	}

	stop()
	b.until(StaleValid)
	if !both(true)() {
		t.Error("a source that is away takes trust away")
	}
	b.serve()
	b.until(Fresh)

	if err := foreign.ReplaceRoot(); err != nil {
		t.Fatal(err)
	}
	b.authority.Federate(foreign.TrustBundle())
	b.untilTrue("partner's old keys are trusted no more", both(false))
	b.authority.Unfederate(partner)
	b.untilTrue("partner is unknown", func() bool { return len(b.Status().Trusts) == 1 })
}

// TestTokensOfTheOwnDomain come from the Workload API, and verify until its keys are replaced.
func TestTokensOfTheOwnDomain(t *testing.T) {
	b := newBench(t, time.Hour, nil)
	b.serve()
	b.until(Fresh)
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+b.socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	svid, err := client.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "service"})
	if err != nil {
		t.Fatal(err)
	}
	valid := func(audience string) bool {
		v, err := jwtsvid.ParseAndValidate(svid.Marshal(), b, []string{audience})
		return err == nil && v.ID == proxy
	}
	b.untilTrue("token verifies", func() bool { return valid("service") })
	if valid("another") {
		t.Error("a token for another audience verifies")
	}
	if err := b.authority.ReplaceRoot(); err != nil {
		t.Fatal(err)
	}
	b.untilTrue("token verifies no more", func() bool { return !valid("service") })
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
