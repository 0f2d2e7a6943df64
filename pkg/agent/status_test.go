package agent

import (
	"context"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/identity"
)

// TestStatusTellsUntilWhen: whoever reads the status while the identity provider is away sees how long there is.
func TestStatusTellsUntilWhen(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://example.org/sallyport/agent/node-1")
	authority, err := devauthority.New(id.TrustDomain(), devauthority.Options{})
	must(t, err)
	path := filepath.Join(t.TempDir(), "w.sock")
	var skew atomic.Int64
	source, err := identity.New(identity.Config{Address: "unix://" + path, MinRetry: 10 * time.Millisecond,
		Clock: func() time.Time { return time.Now().Add(time.Duration(skew.Load())) }})
	must(t, err)
	run := func(f func(context.Context) error) (stop func()) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- f(ctx) }()
		stop = sync.OnceFunc(func() { cancel(); must(t, <-done) })
		t.Cleanup(stop)
		return stop
	}
	leave := run(func(ctx context.Context) error { return authority.Serve(ctx, path, id) })
	run(source.Run)
	n := &node{identity: source}
	says := func(prefix string) {
		t.Helper()
		for deadline := time.After(10 * time.Second); !strings.HasPrefix(n.identityState(), prefix); {
			select {
			case <-source.Changed():
			case <-time.After(10 * time.Millisecond):
			case <-deadline:
				t.Fatalf("status says %q, want %q", n.identityState(), prefix)
			}
		}
	}
	says("fresh")
	end := source.Status().NotAfter
	leave()
	says("stale-valid until " + end.UTC().Format(time.RFC3339) + ": ")
	skew.Store(int64(2 * time.Hour))
	says("expired since " + end.UTC().Format(time.RFC3339) + ": ")
}
