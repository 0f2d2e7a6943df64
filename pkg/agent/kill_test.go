package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/collector"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// killsEnv asks for another number of kills than the common run has.
const killsEnv = "SALLYPORT_KILLS"

// TestKillAgentAtRandom is invariant 5 from outside: whenever the agent is killed, each open path has its active row, and
// what it had said is so: nothing is lost, and nothing that is over begins again. A collector is there all the time, and has in the
// end every step that somebody was told of, or whose effect was seen, once.
func TestKillAgentAtRandom(t *testing.T) {
	in := install(t)
	c := in.collect()
	told := newToldLedger()
	for range fromEnv(t, killsEnv, 15) {
		agent := in.ready("run")
		in.tryOver(told)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			in.churn(ctx, told)
		}()
		pause := time.NewTimer(time.Duration(rand.IntN(300)) * time.Millisecond)
		<-pause.C
		must(t, agent.Kill())
		cancel()
		<-done
		in.checkRows(told)
	}
	delivered := len(c.events(t))
	agent := in.ready("run")
	if s := in.status(); len(s.Problems) != 0 {
		t.Errorf("problems after all kills: %v", s.Problems)
	}
	in.eventually("the collector has everything", func() bool { return in.status().SpoolCritical == 0 })
	must(t, agent.Kill())
	in.checkRows(told)
	in.checkEvents(told, c)
	t.Logf("%d grants were active to the end, %d were over; %d of %d events were at the collector before the last start",
		len(told.active), len(told.over), delivered, len(c.events(t)))
	in.uninstall()
}

// toldLedger is what the agent had said before it died, by the ids of grants.
type toldLedger struct {
	active, over map[string][]byte
	steps        map[toldStep]bool // that somebody was told of
	rows         map[string]string // states that were seen in the store
}

type toldStep struct{ grant, step string }

func newToldLedger() *toldLedger {
	return &toldLedger{active: map[string][]byte{}, over: map[string][]byte{}, steps: map[toldStep]bool{}, rows: map[string]string{}}
}

// churn activates, revokes and withdraws until the agent is gone. Some grants end by themselves.
func (in *installed) churn(ctx context.Context, told *toldLedger) {
	agent := in.agent()
	alice := crew{"alice": in.signer.key}
	for i := 0; ctx.Err() == nil; i++ {
		a, b := byte(rand.IntN(250)), byte(rand.IntN(250))
		short := i%4 == 2 && rand.IntN(2) == 0
		envelope := in.signer.envelope(in.t, func(p *grant.Payload) {
			p.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 1, a, b}), netip.AddrFrom4([4]byte{10, 2, a, b})}
			if short {
				p.Duration = time.Second
			}
		})
		said := alice.says(in.t, "alice", grant.StepWithdrawn, envelope, time.Now())
		if i%4 == 3 { // before it begins
			if reply, err := agent.State(ctx, &api.StateRequest{Statement: said, Envelope: envelope}); err != nil || reply.Grant != nil {
				return
			}
			p, err := grant.Peek(envelope)
			must(in.t, err)
			told.over[p.ID] = envelope
			told.steps[toldStep{p.ID, stepWithdrawn}] = true
			continue
		}
		reply, err := in.activate(ctx, agent, envelope)
		if err != nil {
			return
		}
		id := reply.Grant.Id
		told.active[id] = envelope
		told.steps[toldStep{id, stepActivated}] = true
		step := stepRevoked
		switch i % 4 {
		case 0:
			_, err = agent.Revoke(ctx, &api.RevokeRequest{Grant: id})
		case 1:
			step = stepWithdrawn
			_, err = agent.State(ctx, &api.StateRequest{Statement: said})
		default:
			continue
		}
		delete(told.active, id) // it may be over, whether we are told or not
		if err != nil {
			return
		}
		told.over[id] = envelope
		told.steps[toldStep{id, step}] = true
	}
}

// tryOver activates some of what is over once more.
func (in *installed) tryOver(told *toldLedger) {
	in.t.Helper()
	agent, tries := in.agent(), 5
	for id, envelope := range told.over {
		if _, err := in.activate(in.t.Context(), agent, envelope); err == nil {
			in.t.Errorf("grant %s, which was over, is active again", id)
		}
		if tries--; tries == 0 {
			return
		}
	}
}

// checkRows looks at kernel and store while no agent lives.
func (in *installed) checkRows(told *toldLedger) {
	in.t.Helper()
	rows, open := in.offline()
	for id, n := range open {
		if rows[id] != stateActive {
			in.t.Errorf("%d open paths of grant %s, whose row is %q", n, id, rows[id])
		}
	}
	for id := range told.active {
		if rows[id] == "" {
			in.t.Errorf("grant %s is lost", id)
		}
	}
	for id := range told.over {
		if rows[id] == stateActive || open[id] > 0 {
			in.t.Errorf("grant %s is over, and its row is %q with %d open paths", id, rows[id], open[id])
		}
	}
	for id, was := range told.rows {
		if now := rows[id]; now == "" || was != stateActive && now != was {
			in.t.Errorf("grant %s was %s, and is %q", id, was, now)
		}
	}
	told.rows = rows
}

// endSteps are the events of the states that grants of this test end in: one whose withdrawal was recorded when the agent died is ended by the next.
var endSteps = map[string]string{"revoked": stepRevoked, "expired": stepExpired, stateEnded: stepRevoked}

// checkEvents holds what was told and what was seen against the collector's records. The rows are the last that there were.
func (in *installed) checkEvents(told *toldLedger, c *collecting) {
	in.t.Helper()
	have := map[toldStep]int{}
	for _, e := range c.events(in.t) {
		have[toldStep{e.GetGrant(), e.GetStep()}]++
	}
	want := map[toldStep]bool{}
	for s := range told.steps {
		want[s] = true
	}
	for id, state := range told.rows {
		want[toldStep{id, stepActivated}] = true
		if step := endSteps[state]; step != "" {
			want[toldStep{id, step}] = true
		} else if state != stateActive {
			in.t.Errorf("grant %s is %s, and nobody did that", id, state)
		}
	}
	for s := range want {
		if have[s] != 1 {
			in.t.Errorf("the collector has %s of grant %s %d times", s.step, s.grant, have[s])
		}
	}
	once := []string{stepActivated, stepRevoked, stepExpired, stepWithdrawn}
	for s, n := range have {
		if slices.Contains(once, s.step) && n > 1 {
			in.t.Errorf("the collector has %s of grant %s %d times", s.step, s.grant, n)
		}
		if s.step != stepWithdrawn && slices.Contains(once, s.step) && told.rows[s.grant] == "" {
			in.t.Errorf("the collector has %s of grant %s, which the node does not know", s.step, s.grant)
		}
	}
	if n := c.lost(in.t); n > 0 || len(told.rows) == 0 {
		in.t.Errorf("%d critical records are counted as lost; %d grants were begun", n, len(told.rows))
	}
}

// collecting is a collector on the node of an agent.
type collecting struct{ rpc api.AuditClient }

// collectorIdentity is issued once: it outlasts the longest run.
type collectorIdentity struct {
	*x509svid.SVID
	*x509bundle.Bundle
}

// collect starts a collector and has agents send to it from their next start on.
func (in *installed) collect() *collecting {
	in.t.Helper()
	domain := spiffeid.RequireTrustDomainFromString("example.org")
	id := spiffeid.RequireFromPath(domain, "/sallyport/collector")
	authority, err := devauthority.New(domain, devauthority.Options{TTL: 24 * time.Hour})
	must(in.t, err)
	svid, err := authority.Issue(id)
	must(in.t, err)
	socket := filepath.Join(in.lab.Dir, "records.sock")
	var c *collector.Collector
	must(in.t, in.lab.Node.Do(func() error {
		c, err = collector.New(collector.Config{Dir: filepath.Join(in.lab.Dir, "records"), TrustDomain: domain, Source: collectorIdentity{svid, authority.Bundle()},
			Listen: "127.0.0.1:9443", Socket: socket, Logger: slog.New(slog.DiscardHandler)})
		return err
	}))
	in.background(c.Run)
	agent := in.cfg.AgentID()
	in.background(func(ctx context.Context) error {
		return authority.Serve(ctx, filepath.Join(in.lab.Dir, "workload.sock"), agent)
	})
	text, err := os.ReadFile(in.config)
	must(in.t, err)
	must(in.t, os.WriteFile(in.config, fmt.Appendf(text, "  collector: {address: \"127.0.0.1:9443\", id: %q}\n", id), 0o600))
	in.cfg, err = loadConfig(in.config)
	must(in.t, err)
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(in.t, err)
	in.t.Cleanup(func() { conn.Close() })
	return &collecting{api.NewAuditClient(conn)}
}

// background runs f until the test ends.
func (in *installed) background(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	in.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			in.t.Error(err)
		}
	})
}

// events are all grant events.
func (c *collecting) events(t *testing.T) (all []*api.GrantEvent) {
	t.Helper()
	stream, err := c.rpc.GrantEvents(t.Context(), &api.GrantQuery{Limit: math.MaxInt32})
	must(t, err)
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		must(t, err)
		all = append(all, e.GetEvent())
	}
}

// lost counts what is missing of the critical class.
func (c *collecting) lost(t *testing.T) (n uint64) {
	t.Helper()
	reply, err := c.rpc.Nodes(t.Context(), &api.NodesRequest{})
	must(t, err)
	for _, s := range reply.Nodes {
		if s.Class == api.Class_CLASS_CRITICAL {
			n += s.Lost
		}
	}
	return n
}
