package devauthority

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var (
	domain = spiffeid.RequireTrustDomainFromString("example.org")
	web    = spiffeid.RequireFromPath(domain, "/app/web")
)

// recorder is a watcher that hands on what it is told.
type recorder struct {
	updates chan *workloadapi.X509Context
	errs    chan error
}

func (r recorder) OnX509ContextUpdate(c *workloadapi.X509Context) { r.updates <- c }
func (r recorder) OnX509ContextWatchError(err error) {
	select {
	case r.errs <- err:
	default:
	}
}

type constantBackoff time.Duration

func (b constantBackoff) NewBackoff() workloadapi.Backoff { return b }
func (b constantBackoff) Next() time.Duration             { return time.Duration(b) }
func (b constantBackoff) Reset()                          {}

func serve(t *testing.T, a *Authority, id spiffeid.ID) (address string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "w.sock")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Serve(ctx, path, id) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("socket is left: %v", err)
		}
	})
	return "unix://" + path
}

func watch(t *testing.T, address string) recorder {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(address),
		workloadapi.WithBackoffStrategy(constantBackoff(10*time.Millisecond)))
	if err != nil {
		t.Fatal(err)
	}
	r := recorder{updates: make(chan *workloadapi.X509Context), errs: make(chan error, 1)}
	go client.WatchX509Context(ctx, r)
	t.Cleanup(func() { cancel(); client.Close() })
	return r
}

func (r recorder) next(t *testing.T) *workloadapi.X509Context {
	t.Helper()
	select {
	case c := <-r.updates:
		return c
	case <-time.After(10 * time.Second):
		t.Fatal("no update")
		return nil
	}
}

func (r recorder) nextCode(t *testing.T, want codes.Code) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		select {
		case err := <-r.errs:
			if status.Code(err) == want {
				return
			}
		case <-deadline:
			t.Fatalf("no error of code %s", want)
		}
	}
}

func verify(t *testing.T, svid *x509svid.SVID, a *Authority) error {
	t.Helper()
	id, _, err := x509svid.Verify(svid.Certificates, a.Bundle())
	if err == nil && id != svid.ID {
		t.Errorf("certificate is of %s", id)
	}
	return err
}

func newAuthority(t *testing.T, o Options) *Authority {
	t.Helper()
	a, err := New(domain, o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestWorkloadAPI(t *testing.T) {
	a := newAuthority(t, Options{})
	r := watch(t, serve(t, a, web))
	first := r.next(t)
	if id := first.DefaultSVID().ID; id != web {
		t.Fatalf("got identity %s", id)
	}
	if err := verify(t, first.DefaultSVID(), a); err != nil {
		t.Error(err)
	}
	if _, err := first.Bundles.GetX509BundleForTrustDomain(domain); err != nil {
		t.Error(err)
	}

	a.Rotate()
	second := r.next(t)
	if second.DefaultSVID().Certificates[0].Equal(first.DefaultSVID().Certificates[0]) {
		t.Error("rotated to the same certificate")
	}
	if err := verify(t, second.DefaultSVID(), a); err != nil {
		t.Error(err)
	}

	if err := a.ReplaceRoot(); err != nil {
		t.Fatal(err)
	}
	third := r.next(t)
	if err := verify(t, third.DefaultSVID(), a); err != nil {
		t.Error(err)
	}
	if verify(t, second.DefaultSVID(), a) == nil {
		t.Error("the old root is still trusted")
	}
}

func TestRenewsAtHalfLife(t *testing.T) {
	a := newAuthority(t, Options{TTL: 200 * time.Millisecond})
	r := watch(t, serve(t, a, web))
	first := r.next(t).DefaultSVID().Certificates[0]
	second := r.next(t).DefaultSVID().Certificates[0]
	if !second.NotAfter.After(first.NotAfter) && second.Equal(first) {
		t.Error("not renewed")
	}
}

func TestWithdrawAndRestore(t *testing.T) {
	a := newAuthority(t, Options{})
	r := watch(t, serve(t, a, web))
	r.next(t)
	a.Withdraw(web)
	r.nextCode(t, codes.PermissionDenied)
	a.Restore(web)
	r.next(t)
}

func TestOneIdentityPerSocket(t *testing.T) {
	a := newAuthority(t, Options{})
	db := spiffeid.RequireFromPath(domain, "/app/db")
	r, other := watch(t, serve(t, a, web)), watch(t, serve(t, a, db))
	if r.next(t).DefaultSVID().ID != web || other.next(t).DefaultSVID().ID != db {
		t.Error("identities mixed up")
	}
	a.Withdraw(db)
	other.nextCode(t, codes.PermissionDenied)
	if id := r.next(t).DefaultSVID().ID; id != web { // every change is a rotation for the others
		t.Errorf("got %s", id)
	}
}

func TestServeRefuses(t *testing.T) {
	a := newAuthority(t, Options{})
	foreign := spiffeid.RequireFromString("spiffe://other.org/x")
	if err := a.Serve(t.Context(), filepath.Join(t.TempDir(), "s"), foreign); err == nil {
		t.Error("served a foreign identity")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.Serve(t.Context(), file, web); err == nil {
		t.Error("replaced a file that is no socket")
	}
	if _, err := New(spiffeid.TrustDomain{}, Options{}); err == nil {
		t.Error("made an authority of nothing")
	}
}
