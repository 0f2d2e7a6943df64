package collector

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

const (
	epoch1 = "01HZZZZZZZZZZZZZZZZZZZZZZ1"
	epoch2 = "01HZZZZZZZZZZZZZZZZZZZZZZ2"
)

var domain = spiffeid.RequireTrustDomainFromString("example.org")

// ids issues identities of the test's trust domain.
type ids struct {
	t    *testing.T
	auth *devauthority.Authority
	at   string // a database; empty: files
}

// onEngines runs a test with files and with a database of its own.
func onEngines(t *testing.T, test func(*testing.T, ids)) {
	t.Run("sqlite", func(t *testing.T) { test(t, newIDs(t)) })
	t.Run("postgres", func(t *testing.T) {
		i := newIDs(t)
		i.at = newDatabase(t)
		test(t, i)
	})
}

type identity struct {
	*x509svid.SVID
	*x509bundle.Bundle
}

func newIDs(t *testing.T) ids {
	t.Helper()
	return ids{t: t, auth: must(devauthority.New(domain, devauthority.Options{}))(t)}
}

func (i ids) of(path string) identity {
	i.t.Helper()
	return identity{must(i.auth.Issue(spiffeid.RequireFromPath(domain, path)))(i.t), i.auth.Bundle()}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// clock is a machine's clocks, which the test moves.
type clock struct {
	mu sync.Mutex
	t  time.Time
	up time.Duration // since boot
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) set(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = t
}

func (c *clock) boot() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.up
}

// pass lets time go by on both clocks.
func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t, c.up = c.t.Add(d), c.up+d
}

// running is a collector that serves.
type running struct {
	*Collector
	ids  ids
	stop func() // returns when it has ended
}

func start(t *testing.T, ids ids, change func(*Config)) *running {
	t.Helper()
	cfg := Config{Dir: filepath.Join(t.TempDir(), "days"), TrustDomain: domain, Source: ids.of("/sallyport/collector"), Listen: "127.0.0.1:0",
		Readers: []string{"spiffe://example.org/ops/*", "spiffe://example.org/auditor"}, Logger: slog.New(slog.DiscardHandler)}
	cfg.Postgres = ids.at
	if change != nil {
		change(&cfg)
	}
	c := must(New(cfg))(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	r := &running{Collector: c, ids: ids, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("collector: %v", err)
		}
	})}
	t.Cleanup(r.stop)
	return r
}

// files are those of a collector with SQLite.
func (r *running) files() *days { return r.engine.(*sqliteEngine).files }

func (r *running) eachDay(t *testing.T, do func(tables) error) {
	t.Helper()
	for _, d := range must(r.engine.days(t.Context()))(t) {
		if ok, err := d.read(do); err != nil || !ok {
			t.Fatalf("day %s: %v, %v", d.name(), ok, err)
		}
	}
}

func (r *running) dayNames(t *testing.T) (names []string) {
	t.Helper()
	for _, d := range must(r.engine.days(t.Context()))(t) {
		names = append(names, d.name())
	}
	return names
}

func (r *running) head(t *testing.T) head {
	t.Helper()
	return must(r.engine.stored(t.Context()).head())(t)
}

func (r *running) mark(t *testing.T, s sequence) mark {
	t.Helper()
	return must(r.engine.stored(t.Context()).mark(s))(t)
}

func (r *running) dial(t *testing.T, as identity) *grpc.ClientConn {
	t.Helper()
	server := spiffeid.RequireFromPath(domain, "/sallyport/collector")
	conn := must(grpc.NewClient("passthrough:///"+r.Addr().String(),
		grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(as, as, tlsconfig.AuthorizeID(server)))))(t)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// node is an agent's side of a stream, in the test's hands. It seals what it sends.
type node struct {
	t      *testing.T
	stream api.AuditIngest_StreamClient
	name   string
	epoch  string
	chains map[api.Class]*chain
}

// chain is a node's last seal of a class.
type chain struct {
	number uint64
	signed []byte
}

// nodeSigner is the one key of a node's epoch, in all of the tests.
func nodeSigner(t *testing.T, name, epoch string) (note.Signer, string) {
	t.Helper()
	return signerOf(t, proof.NodeSigner(name, epoch), seedOf(name, epoch))
}

func seedOf(name, epoch string) [32]byte { return sha256.Sum256([]byte(name + epoch)) }

func signerOf(t *testing.T, name string, seed [32]byte) (note.Signer, string) {
	t.Helper()
	signer, vkey, err := newSigner(name, seed)
	if err != nil {
		t.Fatal(err)
	}
	return signer, vkey
}

func newSigner(name string, seed [32]byte) (note.Signer, string, error) {
	public, _ := ed25519.NewKeyFromSeed(seed[:]).Public().(ed25519.PublicKey)
	vkey, err := note.NewEd25519VerifierKey(name, public)
	if err != nil {
		return nil, "", err
	}
	key, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, "", err
	}
	signer, err := note.NewSigner(fmt.Sprintf("PRIVATE+KEY+%s+%08x+%s", name, key.KeyHash(), base64.StdEncoding.EncodeToString(append([]byte{1}, seed[:]...))))
	return signer, vkey, err
}

// connect speaks the newest version.
func (r *running) connect(t *testing.T, name, epoch string) (*node, *api.Welcome) {
	t.Helper()
	_, vkey := nodeSigner(t, name, epoch)
	return r.greet(t, &api.Hello{Node: name, Epoch: epoch, Version: wireVersion, NodeKey: vkey})
}

func (r *running) greet(t *testing.T, h *api.Hello) (*node, *api.Welcome) {
	t.Helper()
	n := &node{t: t, name: h.GetNode(), epoch: h.GetEpoch(), stream: must(api.NewAuditIngestClient(r.dial(t, r.ids.of(agentPath+h.GetNode()))).Stream(t.Context()))(t)}
	n.send(&api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: h}})
	w := must(n.stream.Recv())(t).GetWelcome()
	n.chains = map[api.Class]*chain{critical: n.chain(w.GetCriticalSeal()), flows: n.chain(w.GetFlowSeal())}
	return n, w
}

func (n *node) chain(signed []byte) *chain {
	n.t.Helper()
	if len(signed) == 0 {
		return &chain{}
	}
	_, vkey := nodeSigner(n.t, n.name, n.epoch)
	s := must(proof.OpenSeal(signed, must(note.NewVerifier(vkey))(n.t)))(n.t)
	return &chain{number: s.Number, signed: signed}
}

func (n *node) send(f *api.AgentFrame) {
	n.t.Helper()
	if err := n.stream.Send(f); err != nil && !errors.Is(err, io.EOF) {
		n.t.Fatal(err)
	}
}

func (n *node) batch(class api.Class, entries ...*api.Entry) {
	n.t.Helper()
	n.sendBatch(n.sealed(class, entries, nil))
}

func (n *node) sendBatch(b *api.Batch) {
	n.t.Helper()
	n.send(&api.AgentFrame{Frame: &api.AgentFrame_Batch{Batch: b}})
}

// sealed is the next batch of a class, with a seal that a test may change before it is signed.
func (n *node) sealed(class api.Class, entries []*api.Entry, change func(*proof.Seal)) *api.Batch {
	n.t.Helper()
	c := n.chains[class]
	if c == nil {
		c = &chain{}
	}
	signer, _ := nodeSigner(n.t, n.name, n.epoch)
	return must(c.seal(sequence{n.name, n.epoch, class}, entries, signer, change))(n.t)
}

func (c *chain) seal(of sequence, entries []*api.Entry, signer note.Signer, change func(*proof.Seal)) (*api.Batch, error) {
	b := batch{sequence: of, entries: entries}
	for _, e := range entries {
		data, err := proto.Marshal(&api.Entry{Record: e.GetRecord()})
		if err != nil {
			return nil, err
		}
		b.data = append(b.data, data)
	}
	s := proof.Seal{Sequence: b.proofSequence(), Number: c.number + 1, Before: proof.Follows(c.signed), First: entries[0].GetSeq(),
		Last: entries[len(entries)-1].GetSeq(), Entries: len(entries), Root: proof.Root(b.proofEntries())}
	if l := entries[0].GetLoss(); l != nil {
		s.First -= l.GetCount() - 1
	}
	out := &api.Batch{Class: of.class, Epoch: of.epoch}
	for i, e := range entries {
		s.Lost += e.GetLoss().GetCount()
		out.Raw = append(out.Raw, &api.Raw{Seq: e.GetSeq(), Data: b.data[i]})
	}
	if change != nil {
		change(&s)
	}
	signed, err := s.Sign(signer)
	out.Seal, c.number, c.signed = signed, s.Number, signed
	return out, err
}

// next reads a frame that is no checkpoint: on a slow machine one comes at any time.
func (n *node) next() (*api.CollectorFrame, error) {
	for {
		f, err := n.stream.Recv()
		if err != nil || f.GetGrown() == nil {
			return f, err
		}
	}
}

func (n *node) ack() *api.Ack {
	n.t.Helper()
	return must(n.next())(n.t).GetAck()
}

func (n *node) store(class api.Class, entries ...*api.Entry) {
	n.t.Helper()
	n.batch(class, entries...)
	if a := n.ack(); a.GetSeq() != entries[len(entries)-1].GetSeq() || a.GetClass() != class || a.GetEpoch() != n.epoch {
		n.t.Fatalf("acknowledged was %v", a)
	}
}

// refused reads the status with which the stream ended.
func (n *node) refused(code codes.Code) {
	n.t.Helper()
	f, err := n.next()
	if status.Code(err) != code {
		n.t.Fatalf("have %v, %v; want %s", f, err, code)
	}
}

func flowEntry(seq uint64, change func(*api.FlowRecord)) *api.Entry {
	r := &api.FlowRecord{Event: "OPEN", Verdict: "PROXIED", Reason: "IDENTITY", Service: "postgres", Client: "10.1.0.2:4000", Server: "10.2.0.2:5432",
		FlowId: fmt.Sprint("f", seq), Time: timestamppb.New(time.Unix(1700000000+int64(seq), 0)), Count: 1}
	if change != nil {
		change(r)
	}
	return &api.Entry{Seq: seq, Record: &api.Entry_Flow{Flow: r}}
}

func flowEntries(from, to uint64) (out []*api.Entry) {
	for seq := from; seq <= to; seq++ {
		out = append(out, flowEntry(seq, nil))
	}
	return out
}

func lossEntry(seq, count uint64) *api.Entry {
	return &api.Entry{Seq: seq, Record: &api.Entry_Loss{Loss: &api.LossRecord{Stage: "kernel_ring", Cause: "full", Count: count}}}
}

func grantEntry(seq uint64, grant, step string) *api.Entry {
	return &api.Entry{Seq: seq, Record: &api.Entry_Grant{Grant: &api.GrantEvent{Grant: grant, Step: step, Time: timestamppb.New(time.Unix(1700000000, 0))}}}
}

func (r *running) reader(t *testing.T) api.AuditClient {
	t.Helper()
	return api.NewAuditClient(r.dial(t, r.ids.of("/ops/alice")))
}

// drain reads a stream to its end.
func drain[M any](stream grpc.ServerStreamingClient[M], err error) ([]*M, error) {
	if err != nil {
		return nil, err
	}
	var out []*M
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, m)
	}
}

func (r *running) flows(t *testing.T, q *api.FlowQuery) []*api.StoredFlow {
	t.Helper()
	stream, err := r.reader(t).Flows(t.Context(), q)
	return must(drain(stream, err))(t)
}

func seqs(flows []*api.StoredFlow) (out []uint64) {
	for _, f := range flows {
		out = append(out, f.GetSeq())
	}
	return out
}

func dialUnix(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
}
