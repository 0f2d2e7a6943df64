package agent

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestCandidate: each flow of the node is counted by what would become of it, beside what is in force, and a candidate that
// is wrong changes nothing.
func TestCandidate(t *testing.T) {
	leak.Check(t)
	signer, dir := newSigner(t), filepath.Join(t.TempDir(), "candidate.d")
	must(t, os.Mkdir(dir, 0o755))
	text := strings.Replace(signer.resources("10m"), "ports: [5432, 5433]", "ports: [5432]\n  access: [{identities: [\"spiffe://example.org/app/*\"]}]", 1)
	write := func(text string) { must(t, os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(text), 0o644)) }
	write(text)
	long, short := signer.payload(t, func(p *grant.Payload) { p.Duration = 15 * time.Minute }), signer.payload(t, nil)
	row := store.GrantRow{Activated: time.Now(), Signers: []string{signer.key.Public().ID()}}
	g := &grants{active: map[string]*held{long.ID: {payload: long, row: row}, short.ID: {payload: short, row: row}}}
	c := &candidate{dir: dir, recent: newRecent(8), facts: g.factsOf, problems: newProblems(slog.New(slog.DiscardHandler)), log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	until := func(what string, holds func() bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s; problems %v", what, c.problems.lines())
			}
		}
	}
	until("no follower", func() bool {
		c.recent.mu.Lock()
		defer c.recent.mu.Unlock()
		return len(c.recent.followers) == 1
	})
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr("10.1.0.1"), port) }
	for _, rec := range []flow.Record{
		{Event: flow.EventOpen, Verdict: flow.VerdictProxied, Reason: flow.ReasonIdentity, Server: at(5432), Identity: "spiffe://example.org/app/web"},
		{Event: flow.EventOpen, Verdict: flow.VerdictProxied, Reason: flow.ReasonIdentity, Server: at(5432), Identity: "spiffe://example.org/ops/a"},
		{Event: flow.EventClose, Verdict: flow.VerdictProxied, Reason: flow.ReasonIdentity, Server: at(5432), Identity: "spiffe://example.org/ops/a"},
		{Event: flow.EventDeny, Verdict: flow.VerdictDenied, Reason: flow.ReasonNotAuthorised, Server: at(5432), Identity: "spiffe://example.org/app/x", Count: 3},
		{Event: flow.EventDeny, Verdict: flow.VerdictDenied, Reason: flow.ReasonNoTLS, Server: at(5433)},
		{Event: flow.EventOpen, Verdict: flow.VerdictBypassed, Reason: flow.ReasonPathOpen, Server: at(5432), Grant: short.ID},
		{Event: flow.EventOpen, Verdict: flow.VerdictBypassed, Reason: flow.ReasonPathOpen, Server: at(5432), Grant: long.ID},
		{Event: flow.EventOpen, Verdict: flow.VerdictBypassed, Reason: flow.ReasonPathOpen, Server: at(5432), Grant: "another"},
		{Event: flow.EventWatched, Verdict: flow.VerdictProxied, Reason: flow.ReasonNoPath, Server: at(5432), Count: 4},
		{Event: flow.EventWatched, Verdict: flow.VerdictDenied, Reason: flow.ReasonBadFlags, Server: at(5432), Count: 8},
		{Event: flow.EventWatched, Verdict: flow.VerdictNone, Server: at(5432), Count: 16},
		{Event: flow.EventWatched, Verdict: flow.VerdictBypassed, Reason: flow.ReasonPathOpen, Server: at(5432), Count: 32},
		{Event: flow.EventWatched, Verdict: flow.VerdictNone, Server: at(5433), Count: 64},
	} {
		rec.Protocol = "tcp"
		c.recent.add(rec)
	}
	counted := func() map[candidateLabels]float64 {
		c.mu.Lock()
		defer c.mu.Unlock()
		return maps.Clone(c.counts)
	}
	want := map[candidateLabels]float64{{"postgres", policy.FateSame}: 2, {"postgres", policy.FatePasses}: 3, {"postgres", policy.FateBreaks}: 2 + 4 + 8 + 16,
		{"postgres", policy.FateUnknown}: 1 + 32, {"", policy.FatePasses}: 1, {"", policy.FateSame}: 64}
	until("counts", func() bool { return maps.Equal(counted(), want) })
	registry := prometheus.NewPedanticRegistry()
	must(t, registry.Register(c))
	if families, err := registry.Gather(); err != nil || len(families) != 1 || len(families[0].GetMetric()) != len(want) {
		t.Errorf("metrics: %v, %v", families, err)
	}
	write("nonsense")
	until("no problem", func() bool { return len(c.problems.lines()) == 1 })
	if got := counted(); !maps.Equal(got, want) {
		t.Errorf("a candidate that is wrong: %v", got)
	}
	write(strings.Replace(text, "10m", "20m", 1))
	until("counts of another candidate", func() bool { return len(c.problems.lines()) == 0 && len(counted()) == 0 })
	cancel()
	must(t, <-done)
}
