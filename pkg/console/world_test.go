package console_test

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	_ "modernc.org/sqlite"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/collector"
	"github.com/sallyport-dev/sallyport/pkg/console"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// world is a collector with its nodes, and a console in front of its socket.
type world struct {
	t         testing.TB
	authority *devauthority.Authority
	dir       string
	collector *collector.Collector
	stop      func()
	audit     api.AuditClient
	mayAct    bool
	key       string
}

var domain = spiffeid.RequireTrustDomainFromString("example.org")

type identity struct {
	*x509svid.SVID
	*x509bundle.Bundle
}

func (w *world) of(path string) identity {
	w.t.Helper()
	return identity{must(w.authority.Issue(spiffeid.RequireFromPath(domain, path)))(w.t), w.authority.Bundle()}
}

func newWorld(t testing.TB) *world {
	t.Helper()
	dir := must(os.MkdirTemp("", "console"))(t) // short: socket paths have a limit
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, authority: must(devauthority.New(domain, devauthority.Options{}))(t), mayAct: true}
	w.start()
	t.Cleanup(func() { w.stop() })
	conn := must(grpc.NewClient("unix:"+dir+"/sock", grpc.WithTransportCredentials(insecure.NewCredentials())))(t)
	t.Cleanup(func() { conn.Close() })
	w.audit = api.NewAuditClient(conn)
	return w
}

func (w *world) start() {
	w.t.Helper()
	w.collector = must(collector.New(collector.Config{Dir: w.dir + "/days", TrustDomain: domain, Source: w.of("/sallyport/collector"), Listen: "127.0.0.1:0",
		Socket: w.dir + "/sock", SocketUIDs: []uint32{uint32(os.Getuid())}, Logger: slog.New(slog.DiscardHandler)}))(w.t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.collector.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("collector: %v", err)
		}
	})
}

// logKey is the public key of the collector's log.
func (w *world) logKey() string {
	w.t.Helper()
	return strings.TrimSpace(string(must(os.ReadFile(w.dir + "/days/log.pub"))(w.t)))
}

// serve is the console over HTTP, as a reader who was let in sees it.
func (w *world) serve() *httptest.Server {
	w.t.Helper()
	h := must(console.New(console.Config{Audit: w.audit, LogKey: w.key, Who: func(*http.Request) string { return "carol" }, MayAct: func(*http.Request) bool { return w.mayAct }}))(w.t)
	s := httptest.NewServer(h)
	w.t.Cleanup(s.Close)
	return s
}

// tamper changes the day's file behind the collector's back.
func (w *world) tamper(statement string) {
	w.t.Helper()
	w.stop()
	changed := int64(0)
	for _, f := range must(filepath.Glob(w.dir + "/days/20*.db"))(w.t) {
		db := must(sql.Open("sqlite", f))(w.t)
		n, err := must(db.Exec(statement))(w.t).RowsAffected()
		if err != nil {
			w.t.Fatal(err)
		}
		changed += n
		db.Close()
	}
	if changed == 0 {
		w.t.Fatalf("nothing was changed by %s", statement)
	}
	w.start()
}

// testNode is a node's own side of the stream, with its store.
type testNode struct {
	*audit.Streamer
	t     testing.TB
	name  string
	store *store.Store
	stop  func()
}

// ends is what the agent does when somebody at the collector revokes: it is in the record before it is answered. What a statement says is
// for keyrings to judge, and this node has none.
func (n *testNode) ends(_ context.Context, act *api.Act) *api.Acted {
	r := act.GetRevoke()
	if r == nil {
		return &api.Acted{Code: uint32(codes.FailedPrecondition), Refusal: "by: no Keyring has the key\nhint: have it signed by somebody whom policy names"}
	}
	n.event(&api.GrantEvent{Grant: r.GetGrant(), Step: "REVOKED", Time: timestamppb.Now(), Actor: act.GetActor(), Why: r.GetWhy()})
	return &api.Acted{Grant: &api.Grant{Id: r.GetGrant(), State: "revoked", EndedWhy: r.GetWhy()}}
}

// node connects one. What it has by then goes in one batch.
func (w *world) node(name string, has ...*api.Entry) *testNode {
	w.t.Helper()
	n := &testNode{t: w.t, name: name, store: must(store.Open(filepath.Join(w.dir, name, "node.db")))(w.t)}
	for _, e := range has {
		must(n.store.Append(context.Background(), must(proto.Marshal(e))(w.t)))(w.t)
	}
	n.Streamer = must(audit.New(audit.Config{Store: n.store, Node: name, Address: w.collector.Addr().String(), Source: w.of("/sallyport/agent/" + name),
		ServerID: spiffeid.RequireFromPath(domain, "/sallyport/collector"), Act: n.ends, Logger: slog.New(slog.DiscardHandler)}))(w.t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("node %s: %v", name, err)
		}
		n.store.Close()
	})
	w.t.Cleanup(n.stop)
	return n
}

func (n *testNode) entry(e *api.Entry) {
	n.t.Helper()
	must(n.store.Append(context.Background(), must(proto.Marshal(e))(n.t)))(n.t)
	n.Kick()
}

func (n *testNode) event(e *api.GrantEvent) {
	n.t.Helper()
	n.entry(&api.Entry{Record: &api.Entry_Grant{Grant: e}})
}

// delivered waits until the collector has all that was given to the node.
func (n *testNode) delivered() {
	n.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; <-time.After(5 * time.Millisecond) {
		s := must(n.Status(context.Background()))(n.t)
		if s.FlowPending == 0 && s.CriticalPending == 0 {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("not delivered: %+v", s)
		}
	}
}

// asked is a grant as somebody signed it.
type asked struct {
	grant.Payload
	envelope []byte
	key      grant.PrivateKey
}

func newGrant(t testing.TB, now time.Time, change func(*grant.Payload)) asked {
	t.Helper()
	p := grant.Payload{Requester: "alice", Service: "postgres", Binding: policy.BindingAddress, Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.2")},
		Ports: []uint16{5432}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(6 * time.Hour), Duration: 45 * time.Minute, Budget: policy.Budget{Bytes: 10 << 30},
		Reason: "nightly backup, the proxy is too slow for it", Ticket: "OPS-4711", Audience: "node-1"}
	if change != nil {
		change(&p)
	}
	p = must(p.Named(now.Add(-30 * time.Minute)))(t)
	key := must(grant.GenerateKey())(t)
	return asked{p, must(grant.Sign(t.Context(), p, key))(t), key}
}

// activated is the event with which a node says that it opened the grant's paths.
func (a asked) activated(at, deadline time.Time) *api.GrantEvent {
	e := &api.GrantEvent{Grant: a.ID, Step: "ACTIVATED", Time: timestamppb.New(at), Requester: a.Requester, Actor: "uid:0", Service: a.Service, Deadline: timestamppb.New(deadline),
		Slots: []uint32{3}, Why: a.Reason, Envelope: a.envelope, Signers: []string{a.key.Public().ID()}, Kind: string(a.Kind)}
	for _, c := range a.Addresses {
		e.Clients = append(e.Clients, c.String())
	}
	return e
}

func (a asked) ended(step, why string, at time.Time) *api.GrantEvent {
	e := a.activated(at, at)
	e.Step, e.Why, e.Actor, e.Envelope = step, why, "agent", nil
	return e
}

// statement is somebody's signed word about the grant.
func (a asked) statement(t testing.TB, step grant.Step, by, why string, at time.Time) []byte {
	t.Helper()
	s := grant.Statement{ID: must(grant.NewID(at))(t), Step: step, Grant: a.ID, Digest: must(grant.Digest(a.envelope))(t), By: by, At: at, Why: why}
	return must(grant.SignStatement(t.Context(), s, must(grant.GenerateKey())(t)))(t)
}

func bypassed(a asked, id string, event flow.Event, at time.Time, toServer, toClient uint64) flow.Record {
	return flow.Record{Event: event, Time: at, FlowID: id, Verdict: flow.VerdictBypassed, Reason: flow.ReasonPathOpen, Protocol: "tcp", Client: netip.MustParseAddrPort("10.1.0.2:40312"),
		Server: netip.MustParseAddrPort("10.2.0.9:5432"), Service: a.Service, Device: "eth0", Grant: a.ID, Slot: 3, BytesToServer: toServer, BytesToClient: toClient, Count: 1}
}

func tide(at time.Time, paths ...*api.PathTide) *api.Entry {
	return &api.Entry{Record: &api.Entry_Tide{Tide: &api.Tide{Time: timestamppb.New(at), BootId: "b", Paths: paths}}}
}

// night is what the tests' collector holds: two grants that are live, two that are over, and flows of all kinds.
type night struct {
	*world
	now               time.Time
	backup, broke     asked // live; broken glass that nobody has reviewed
	reviewed, earlier asked
	one               *testNode
}

func newNight(t testing.TB) *night {
	t.Helper()
	w, now := newWorld(t), time.Now().UTC()
	breakGlass := func(service string) func(*grant.Payload) {
		return func(p *grant.Payload) {
			p.Kind, p.Requester, p.Service, p.Reason, p.Ticket, p.Audience = grant.BreakGlass, "bob", service, "identity provider is down, orders are stuck", "INC-90", "node-2"
		}
	}
	n := &night{world: w, now: now, backup: newGrant(t, now, nil), broke: newGrant(t, now, breakGlass("orders-db")), reviewed: newGrant(t, now, breakGlass("ledger")),
		earlier: newGrant(t, now.Add(-3*time.Hour), nil)}
	n.one = w.node("node-1")
	two := w.node("node-2")
	n.fillOne()
	n.fillTwo(two)
	for _, node := range []*testNode{n.one, two} {
		node.delivered()
	}
	two.stop()
	w.away("node-2")
	return n
}

// away waits until the collector has seen that a node has left.
func (w *world) away(node string) {
	w.t.Helper()
	is := func(s *api.NodeState) bool { return s.GetNode() == node && s.GetConnected() }
	for deadline := time.Now().Add(30 * time.Second); ; <-time.After(5 * time.Millisecond) {
		if !slices.ContainsFunc(must(w.audit.Nodes(w.t.Context(), &api.NodesRequest{}))(w.t).GetNodes(), is) {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s has not left", node)
		}
	}
}

func (n *night) fillOne() {
	one, now := n.one, n.now
	one.event(n.earlier.activated(now.Add(-200*time.Minute), now.Add(-155*time.Minute)))
	one.event(n.earlier.ended("EXPIRED", "its time was over", now.Add(-155*time.Minute)))
	one.event(n.backup.activated(now.Add(-10*time.Minute), now.Add(35*time.Minute)))
	warned := n.backup.ended("WARNED", "80% of its bytes are used", now.Add(-time.Minute))
	one.event(warned)
	one.Flow(bypassed(n.backup, "f1", flow.EventOpen, now.Add(-9*time.Minute), 0, 0))
	one.Flow(bypassed(n.backup, "f1", flow.EventClose, now.Add(-2*time.Minute), 48_211_004, 1_402_993_711))
	one.Flow(bypassed(n.backup, "f2", flow.EventOpen, now.Add(-2*time.Minute), 0, 0))
	for i := range 8 {
		one.Flow(flow.Record{Event: flow.EventOpen, Time: now.Add(-time.Duration(i) * time.Minute), FlowID: fmt.Sprint("p", i), Verdict: flow.VerdictProxied, Reason: flow.ReasonIdentity,
			Protocol: "tcp", Client: netip.MustParseAddrPort(fmt.Sprintf("10.1.3.%d:5000%d", i, i)), Server: netip.MustParseAddrPort("10.2.0.9:5432"), Service: "postgres",
			Identity: "spiffe://example.org/ns/shop/sa/checkout", Count: 1, CPU: -1})
	}
	one.Flow(flow.Record{Event: flow.EventDeny, Time: now.Add(-3 * time.Minute), FlowID: "d1", Verdict: flow.VerdictDenied, Reason: flow.ReasonNoTLS, Protocol: "tcp",
		Client: netip.MustParseAddrPort("[fd00:1::77]:33012"), Server: netip.MustParseAddrPort("[fd00:2::9]:5432"), Service: "postgres", Count: 14, Detail: "first byte 0x50 is no TLS record"})
	one.Flow(flow.Record{Event: flow.EventWatched, Time: now.Add(-3 * time.Minute), FlowID: "w1", Verdict: flow.VerdictDenied, Reason: flow.ReasonNoTLS, Protocol: "tcp",
		Client: netip.MustParseAddrPort("10.1.0.8:33012"), Server: netip.MustParseAddrPort("10.2.0.10:9000"), Service: "reports", Count: 2})
	one.Lost(audit.StageKernelRing, "best_effort_full", 1204)
	one.entry(tide(now.Add(-time.Minute), &api.PathTide{Slot: 3, Grant: n.backup.ID, Service: "postgres", Client: "10.1.0.2",
		Kernel: &api.Volume{Flows: 2, BytesToServer: 48_911_004, BytesToClient: 1_502_993_711}, Recorded: &api.Volume{Flows: 1, BytesToServer: 48_211_004, BytesToClient: 1_402_993_711},
		Live: &api.Volume{Flows: 1, BytesToServer: 700_000, BytesToClient: 100_000_000}}))
}

func (n *night) fillTwo(two *testNode) {
	now := n.now
	two.event(n.reviewed.activated(now.Add(-26*time.Hour), now.Add(-25*time.Hour)))
	two.event(n.reviewed.ended("REVOKED", "done", now.Add(-25*time.Hour)))
	done := n.reviewed.ended("REVIEWED", "reviewed by dave", now.Add(-20*time.Hour))
	done.Envelope, done.Actor = n.reviewed.statement(n.t, grant.StepReviewed, "dave", "restarted the primary, nothing else", now.Add(-20*time.Hour)), "uid:0"
	two.event(done)
	broke := n.broke.activated(now.Add(-5*time.Minute), now.Add(12*time.Minute))
	broke.Signals = []string{"pager: incident INC-90 is being worked on"}
	two.event(broke)
	two.Flow(bypassed(n.broke, "g1", flow.EventOpen, now.Add(-4*time.Minute), 0, 0))
}
