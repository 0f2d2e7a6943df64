package audit_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/collector"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

var (
	domain      = spiffeid.RequireTrustDomainFromString("example.org")
	collectorID = spiffeid.RequireFromPath(domain, "/sallyport/collector")
	agentID     = spiffeid.RequireFromPath(domain, "/sallyport/agent/node-1")
	silent      = slog.New(slog.DiscardHandler)
)

type identity struct {
	*x509svid.SVID
	*x509bundle.Bundle
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// site is a node and a collector on this machine, each of which may come and go.
type site struct {
	t         testing.TB
	dir       string
	address   string
	spoolDir  string // empty: there is no spool
	spool     int64  // bytes
	agent     identity
	collector identity
	logKey    string // in the node's configuration
	act       func(context.Context, *api.Act) *api.Acted

	mu     sync.Mutex
	alarms []string // of the node; guarded by mu
}

func (s *site) alarm(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.alarms = append(s.alarms, why)
}

// alarmed returns the alarms so far.
func (s *site) alarmed() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.alarms)
}

func newSite(t testing.TB) *site {
	t.Helper()
	// Longer than TestHourAway lasts: these identities are not renewed.
	auth := must(devauthority.New(domain, devauthority.Options{TTL: 24 * time.Hour}))(t)
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t) // a port of our own
	defer l.Close()
	return &site{t: t, dir: t.TempDir(), address: l.Addr().String(),
		agent: identity{must(auth.Issue(agentID))(t), auth.Bundle()}, collector: identity{must(auth.Issue(collectorID))(t), auth.Bundle()}}
}

func (s *site) collectorConfig() collector.Config {
	return collector.Config{Dir: filepath.Join(s.dir, "days"), TrustDomain: domain, Source: s.collector, Listen: s.address,
		Socket: s.socket(), Logger: silent}
}

func (s *site) socket() string { return filepath.Join(s.dir, "sock") }

// startCollector returns what stops it.
func (s *site) startCollector() func() {
	s.t.Helper()
	return s.running(must(collector.New(s.collectorConfig()))(s.t).Run)
}

func (s *site) running(run func(context.Context) error) func() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("run: %v", err)
		}
	})
	s.t.Cleanup(stop)
	return stop
}

// node is a streamer on the site's store.
type node struct {
	*audit.Streamer
	store *store.Store
	stop  func()
}

func (s *site) startNode(flowBuffer int) *node {
	s.t.Helper()
	st := must(store.Open(filepath.Join(s.dir, "state", "node.db")))(s.t)
	cfg := s.nodeConfig(st, flowBuffer)
	n := &node{Streamer: must(audit.New(cfg))(s.t), store: st}
	stop := s.running(n.Run)
	n.stop = sync.OnceFunc(func() {
		stop()
		st.Close()
	})
	s.t.Cleanup(n.stop)
	return n
}

func (s *site) nodeConfig(st *store.Store, flowBuffer int) audit.Config {
	return audit.Config{Store: st, Node: "node-1", Address: s.address, Source: s.agent, ServerID: collectorID, FlowBuffer: flowBuffer,
		SpoolDir: s.spoolDir, SpoolBudget: s.spool, Logger: silent, LogKey: s.logKey, Alarm: s.alarm, Act: s.act}
}

// drained waits until the collector has everything.
func (n *node) drained(t testing.TB) audit.Status {
	t.Helper()
	var st audit.Status
	waitFor(t, func() bool {
		st = must(n.Status(t.Context()))(t)
		return st.Connected && st.CriticalPending == 0 && st.FlowPending == 0 && st.FlowSpooled == 0 && st.FlowLost == 0
	}, func() string { return fmt.Sprintf("%+v", st) })
	return st
}

// halfFree waits until the disk has what half of the memory has no room for.
func (n *node) halfFree(t testing.TB, buffer int) {
	t.Helper()
	var st audit.Status
	waitFor(t, func() bool {
		st = must(n.Status(t.Context()))(t)
		return int(st.FlowPending) <= buffer/2
	}, func() string { return fmt.Sprintf("%+v", st) })
}

func waitFor(t testing.TB, ready func() bool, what func() string) {
	t.Helper()
	deadline := time.After(60 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited for too long: %s", what())
		}
	}
}

// held is what the collector has of one class.
type held struct {
	flows  map[string]int // by flow id
	grants int
	last   uint64
	lost   uint64
	atMost uint64
	causes map[string]uint64
}

func (s *site) held() map[api.Class]*held {
	s.t.Helper()
	conn := must(grpc.NewClient("unix:"+s.socket(), grpc.WithTransportCredentials(insecure.NewCredentials())))(s.t)
	defer conn.Close()
	client := api.NewAuditClient(conn)
	out := map[api.Class]*held{}
	for _, c := range []api.Class{api.Class_CLASS_CRITICAL, api.Class_CLASS_FLOW} {
		out[c] = &held{flows: map[string]int{}, causes: map[string]uint64{}}
	}
	flows, err := client.Flows(s.t.Context(), &api.FlowQuery{Limit: 1 << 30})
	for _, f := range drain(s.t, flows, err) {
		h := out[f.GetClass()]
		h.flows[f.GetFlow().GetFlowId()]++
		h.last = max(h.last, f.GetSeq())
	}
	events, err := client.GrantEvents(s.t.Context(), &api.GrantQuery{Limit: 1 << 30})
	for _, e := range drain(s.t, events, err) {
		h := out[api.Class_CLASS_CRITICAL]
		h.grants++
		h.last = max(h.last, e.GetSeq())
	}
	losses, err := client.Losses(s.t.Context(), &api.LossQuery{Limit: 1 << 30})
	for _, l := range drain(s.t, losses, err) {
		h, n := out[l.GetClass()], l.GetLoss().GetCount()
		h.lost += n
		h.causes[l.GetLoss().GetStage()+"/"+l.GetLoss().GetCause()] += n
		if l.GetLoss().GetAtMost() {
			h.atMost += n
		}
		h.last = max(h.last, l.GetSeq())
	}
	return out
}

// states is how the collector stands with each sequence.
func (s *site) states() []*api.NodeState {
	s.t.Helper()
	conn := must(grpc.NewClient("unix:"+s.socket(), grpc.WithTransportCredentials(insecure.NewCredentials())))(s.t)
	defer conn.Close()
	return must(api.NewAuditClient(conn).Nodes(s.t.Context(), &api.NodesRequest{}))(s.t).GetNodes()
}

func drain[M any](t testing.TB, stream grpc.ServerStreamingClient[M], err error) (out []*M) {
	t.Helper()
	for err == nil {
		var m *M
		if m, err = stream.Recv(); err == nil {
			out = append(out, m)
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return out
}

// check holds delivered + lost = produced, each record once.
func (h *held) check(t *testing.T, produced uint64) {
	t.Helper()
	if delivered := uint64(len(h.flows) + h.grants); delivered+h.lost != produced || h.last != produced {
		t.Errorf("produced %d, delivered %d, lost %d (%v), last number %d", produced, delivered, h.lost, h.causes, h.last)
	}
	for id, n := range h.flows {
		if n != 1 {
			t.Errorf("record %s is there %d times", id, n)
		}
	}
}

func proxied(id string) flow.Record {
	return flow.Record{Event: flow.EventOpen, Verdict: flow.VerdictProxied, Reason: flow.ReasonIdentity, FlowID: id, Time: time.Now(), Count: 1}
}

func bypassed(id string) flow.Record {
	return flow.Record{Event: flow.EventOpen, Verdict: flow.VerdictBypassed, Reason: flow.ReasonPathOpen, FlowID: id, Grant: "g", Time: time.Now(), Count: 1}
}

// The collector comes and goes, the agent restarts, memory is short: delivered + lost = produced.
func TestDeliveredPlusLostIsProduced(t *testing.T) {
	for _, c := range []struct {
		buffer int
		spool  int64 // with one, memory is waited for until half of it is free
	}{{50, 0}, {100000, 0}, {1000, 1 << 30}, {1000, 1 << 20}} {
		buffer := c.buffer
		t.Run(fmt.Sprintf("buffer %d, spool %d", buffer, c.spool), func(t *testing.T) {
			s := newSite(t)
			if s.spool = c.spool; s.spool > 0 {
				s.spoolDir = filepath.Join(s.dir, "state", "flows")
			}
			rng := rand.New(rand.NewPCG(uint64(buffer), 1))
			stop := func() {}
			n := s.startNode(buffer)
			var flows, critical, kernel uint64
			for round := range 12 {
				if round%2 == 1 {
					stop = s.startCollector()
				}
				for i := range 50 + rng.IntN(300) {
					id := fmt.Sprintf("%d-%d", round, i)
					switch k := rng.IntN(20); {
					case k == 0:
						lost := 1 + rng.Uint64N(1000)
						n.Lost(audit.StageKernelRing, "full", lost)
						flows, kernel = flows+lost, kernel+lost
					case k <= 3:
						if err := n.Critical(t.Context(), bypassed(id)); err != nil {
							t.Fatal(err)
						}
						critical++
					case k == 4:
						must(n.store.Append(t.Context(), must(audit.GrantEntry(&api.GrantEvent{Grant: id, Step: "ACTIVATED"}))(t)))(t)
						n.Kick()
						critical++
					default:
						r := proxied(id)
						r.Detail = strings.Repeat("d", 2000)
						n.Flow(r)
						flows++
					}
				}
				if s.spool > 0 {
					n.halfFree(t, buffer)
				}
				if rng.IntN(2) == 0 {
					n.stop()
					n = s.startNode(buffer)
				}
				if round%2 == 1 && rng.IntN(2) == 0 {
					n.drained(t)
				}
				stop()
			}
			s.startCollector()
			n.drained(t)
			have := s.held()
			have[api.Class_CLASS_FLOW].check(t, flows)
			have[api.Class_CLASS_CRITICAL].check(t, critical)
			if c := have[api.Class_CLASS_CRITICAL]; c.lost != 0 {
				t.Errorf("critical records were lost: %v", c.causes)
			}
			causes := have[api.Class_CLASS_FLOW].causes
			if causes["kernel_ring/full"] != kernel {
				t.Errorf("the kernel lost %d, reported are %v", kernel, causes)
			}
			if states := s.states(); len(states) != 2 || states[0].GetChainBreaks()+states[1].GetChainBreaks() != 0 || s.alarmed() != nil {
				t.Errorf("sequences are %v, alarms %v", states, s.alarmed())
			}
			want := map[string]bool{"kernel_ring/full": true, "agent_spool/buffer_full": buffer < 1000, "flow_spool/spool_full": c.spool == 1<<20}
			for cause := range want {
				if want[cause] != (causes[cause] > 0) || len(causes) > 2 {
					t.Errorf("losses are %v", causes)
				}
			}
		})
	}
}

// Flow and Lost never wait, whatever the collector and the disk do.
func TestFlowNeverBlocks(t *testing.T) {
	s := newSite(t)
	st := must(store.Open(filepath.Join(s.dir, "state", "node.db")))(t)
	defer st.Close()
	n := must(audit.New(audit.Config{Store: st, Node: "node-1", FlowBuffer: 100, Logger: silent}))(t) // nobody runs it
	for i := range 20000 {
		n.Flow(proxied(fmt.Sprint(i)))
		n.Flow(bypassed(fmt.Sprint(i)))
		n.Lost(audit.StageProxyBuffer, "full", 2)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Critical(ctx, bypassed("one too many")); !errors.Is(err, context.Canceled) {
		t.Errorf("critical record with a full queue: %v", err)
	}
	got := must(n.Status(t.Context()))(t)
	if got.FlowPending+got.FlowLost != got.FlowProduced || got.FlowProduced+got.CriticalPending != 80001 {
		t.Errorf("status is %+v", got)
	}
}

// A collector that proves another identity gets nothing.
func TestWrongCollector(t *testing.T) {
	s := newSite(t)
	s.collector = s.agent
	defer s.startCollector()()
	n := s.startNode(10)
	n.Flow(proxied("a"))
	waitFor(t, func() bool { return strings.Contains(must(n.Status(t.Context()))(t).Problem, "unexpected ID") },
		func() string { return must(n.Status(t.Context()))(t).Problem })
}

// A store that was set back would give numbers out again, and the collector would take the new records
// for those that it has. Nothing is sent then.
func TestStoreSetBack(t *testing.T) {
	s := newSite(t)
	defer s.startCollector()()
	for _, id := range []string{"a", "b"} {
		n := s.startNode(10)
		n.Flow(proxied(id))
		n.drained(t)
		n.stop()
		if id == "a" {
			s.backup()
		}
	}
	s.restore()
	n := s.startNode(10)
	waitFor(t, func() bool { return strings.Contains(must(n.Status(t.Context()))(t).Problem, "set back") },
		func() string { return must(n.Status(t.Context()))(t).Problem })
}

// A collector that has what it never got to acknowledge says so in its Welcome, and that is enough.
func TestAcknowledgementLost(t *testing.T) {
	s := newSite(t)
	n := s.startNode(100)
	for i := range 10 {
		n.Flow(proxied(fmt.Sprint(i)))
		if err := n.Critical(t.Context(), bypassed(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	n.stop()
	s.backup()
	defer s.startCollector()()
	n = s.startNode(100)
	n.drained(t)
	n.stop()
	s.restore()
	n = s.startNode(100)
	n.drained(t)
	for _, h := range s.held() {
		h.check(t, 10)
	}
}

func (s *site) backup() {
	s.t.Helper()
	if err := os.CopyFS(filepath.Join(s.dir, "backup"), os.DirFS(filepath.Join(s.dir, "state"))); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) restore() {
	s.t.Helper()
	state := filepath.Join(s.dir, "state")
	if err := errors.Join(os.RemoveAll(state), os.Rename(filepath.Join(s.dir, "backup"), state)); err != nil {
		s.t.Fatal(err)
	}
}

// usual is a record as most are, with all that they tell.
func usual(i uint64) flow.Record {
	r := proxied(fmt.Sprintf("01M820C9DB9KARVAY8MNDHWZ-%08x", i))
	r.Client, r.Server = netip.MustParseAddrPort("192.0.2.10:41234"), netip.MustParseAddrPort("192.0.2.7:5432")
	r.Protocol, r.Service, r.Device, r.Identity = "tcp", "postgres", "eth0", "spiffe://example.org/ns/payments/sa/settlement"
	r.Boot, r.CPU, r.Seq = time.Duration(i)*time.Millisecond, 3, i
	return r
}
