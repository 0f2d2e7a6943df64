package agent

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/policy"
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
	n := &node{identity: source, resources: &resources{}}
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

// TestStatusTellsOfTrustAndWorkloads: with whom this node is federated, and what is known of whom by whom.
func TestStatusTellsOfTrustAndWorkloads(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://example.org/sallyport/agent/node-1")
	authority, err := devauthority.New(id.TrustDomain(), devauthority.Options{})
	must(t, err)
	partner, err := devauthority.New(spiffeid.RequireTrustDomainFromString("partner.example"), devauthority.Options{})
	must(t, err)
	dir := t.TempDir()
	cfg := policy.DefaultAgentConfig()
	cfg.Name, cfg.Spec.TrustDomain, cfg.Spec.WorkloadAPI = "node-1", "example.org", "unix://"+dir+"/w.sock"
	cfg.Spec.Workloads = policy.WorkloadsConfig{API: policy.WorkloadsBroker, Address: "unix://" + dir + "/b.sock"}
	n := &node{cfg: cfg, resources: &resources{}, log: slog.New(slog.DiscardHandler)}
	must(t, n.makeIdentity(t.Context()))
	t.Cleanup(func() { must(t, n.closeBroker()) })
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	running.Go(func() { _ = n.runIdentity(ctx) })
	running.Go(func() { _ = authority.Serve(ctx, dir+"/w.sock", id) })
	running.Go(func() {
		_ = authority.ServeBroker(ctx, dir+"/b.sock", spiffeid.RequireFromPath(id.TrustDomain(), "/spire/agent/1"), id)
	})
	authority.Federate(partner.TrustBundle())
	authority.SetEntries(devauthority.Entry{ID: spiffeid.RequireFromString("spiffe://example.org/web"), PodUID: "x"})
	told := make(chan identity.Attested, 100)
	running.Go(func() {
		_ = n.broker.Watch(ctx, identity.Workload{PodUID: "x"}, func(a identity.Attested) { told <- a })
	})
	const want = "fresh; federated with partner.example (1 X.509, 1 JWT keys); workloads by broker: 1 fresh"
	for deadline := time.After(10 * time.Second); n.identityState() != want; {
		select {
		case <-told:
		case <-n.identity.Changed():
		case <-deadline:
			t.Fatalf("status says %q, want %q", n.identityState(), want)
		}
	}
}
