package agent

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/proxy"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/grpc"
)

// otherProxy is another proxy's question on its way to the grants of a life.
type otherProxy struct {
	*life
	outside *proxy.Outside
	judge   *proxy.Judge
}

func newOtherProxy(t *testing.T) *otherProxy {
	t.Helper()
	l := newTestbedBeside(t, 16).begin()
	t.Cleanup(l.kill)
	dir := t.TempDir()
	ep, err := newEndpoint(filepath.Join(dir, "proxy.sock"), callers{uids: []uint32{0}},
		func(reg grpc.ServiceRegistrar) { api.RegisterProxyReportServer(reg, &reports{live: l.liveFor}) })
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ep.Run(ctx) }()
	a := &otherProxy{life: l}
	a.outside, err = proxy.NewOutside(ep.path)
	must(t, err)
	t.Cleanup(func() {
		must(t, a.outside.Close())
		cancel()
		must(t, <-done)
	})
	file := filepath.Join(dir, "policy.yaml")
	must(t, os.WriteFile(file, []byte(l.signer.resources("15m")), 0o600))
	a.judge, err = proxy.NewJudge(proxy.JudgeConfig{Trust: x509bundle.NewSet(), Policy: proxy.NewPolicyFile(file, slog.New(slog.DiscardHandler)),
		Report: func(flow.Record) {}, Live: a.outside.Live})
	must(t, err)
	return a
}

// by is the grant by which a client may ask; empty: by none.
func (a *otherProxy) by(client netip.Addr, port uint16) string {
	a.t.Helper()
	r, err := http.NewRequest(http.MethodGet, "http://db.example.org/", nil)
	must(a.t, err)
	r.RequestURI = "/"
	answer := a.judge.Judge(a.t.Context(), proxy.Question{Asker: "a test", Client: netip.AddrPortFrom(client, 40000),
		Server: netip.AddrPortFrom(netip.MustParseAddr("10.9.0.1"), port), Request: r})
	if answer.Allowed != (answer.Grant != "") {
		a.t.Errorf("answer %+v", answer)
	}
	return answer.Grant
}

// TestLiveGrant: another proxy lets a client in by the grant by which the kernel would, while the path is live and no longer.
func TestLiveGrant(t *testing.T) {
	a := newOtherProxy(t)
	if id := a.by(clientA, 5432); id != "" {
		t.Errorf("before: by %s", id)
	}
	row, err := a.Activate(t.Context(), a.signer.envelope(t, func(p *grant.Payload) { p.Ports = []uint16{5432} }), "uid:0")
	must(t, err)
	if id := a.by(clientA, 5432); id != row.ID {
		t.Errorf("live: by %q, want %s", id, row.ID)
	}
	if id := a.by(clientB, 5432); id != "" {
		t.Errorf("another client: by %s", id)
	}
	if id := a.by(clientA, 5433); id != "" {
		t.Errorf("another port: by %s", id)
	}
	a.grants.clock.boot = func() time.Duration { return row.DeadlineBoot }
	if id := a.by(clientA, 5432); id != "" {
		t.Errorf("at the deadline, before anybody has swept: by %s", id)
	}
	a.grants.clock = a.testbed.clock.clock()
	must(t, a.endAll(t.Context(), stepRevoked, "enough", "test"))
	if id := a.by(clientA, 5432); id != "" {
		t.Errorf("revoked: by %s", id)
	}
}

// TestGrantsThatTheKernelHasToSee: what another proxy carries is on no path that could count it.
func TestGrantsThatTheKernelHasToSee(t *testing.T) {
	a := newOtherProxy(t)
	for name, change := range map[string]func(*grant.Payload){
		"bytes":       func(p *grant.Payload) { p.Budget.Bytes = 1 << 20 },
		"packets":     func(p *grant.Payload) { p.Budget.Packets = 100 },
		"connections": func(p *grant.Payload) { p.Budget.Connections = 3 },
		"a device":    func(p *grant.Payload) { p.Ingress = policy.IngressUplink },
	} {
		_, err := a.Activate(t.Context(), a.signer.envelope(t, change), "uid:0")
		must(t, err)
		if id := a.by(clientA, 5432); id != "" {
			t.Errorf("with %s: by %s", name, id)
		}
		must(t, a.endAll(t.Context(), stepRevoked, "next case", "test"))
	}
}

// TestLiveRefuses questions that nobody can answer.
func TestLiveRefuses(t *testing.T) {
	r := &reports{}
	for name, q := range map[string]*api.LiveRequest{
		"no client": {Service: "postgres", Port: 5432}, "a name": {Client: "db:1", Port: 5432}, "no port": {Client: "10.0.0.1:1"},
		"port beyond": {Client: "10.0.0.1:1", Port: 65536}, "nobody there": {Client: "10.0.0.1:1", Port: 5432},
	} {
		if _, err := r.Live(t.Context(), q); err == nil {
			t.Errorf("%s: answered", name)
		}
	}
}
