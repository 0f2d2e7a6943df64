package collector

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

const (
	critical = api.Class_CLASS_CRITICAL
	flows    = api.Class_CLASS_FLOW
)

// The node is the one in the certificate, whatever is said in a Hello.
func TestHello(t *testing.T) {
	r := start(t, newIDs(t), nil)
	for _, c := range []struct {
		name  string
		hello *api.AgentFrame
		want  codes.Code
	}{
		{"a lie", hello("node-2", epoch1, wireVersion), codes.PermissionDenied},
		{"no name", hello("", epoch1, wireVersion), codes.PermissionDenied},
		{"other version", hello("node-1", epoch1, 99), codes.FailedPrecondition},
		{"no version", hello("node-1", epoch1, 0), codes.FailedPrecondition},
		{"no epoch", hello("node-1", "", wireVersion), codes.InvalidArgument},
		{"odd epoch", hello("node-1", "../../etc/passwd00000000000", wireVersion), codes.InvalidArgument},
		{"batch first", &api.AgentFrame{Frame: &api.AgentFrame_Batch{Batch: &api.Batch{}}}, codes.InvalidArgument},
		{"nothing", &api.AgentFrame{}, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := &node{t: t, stream: must(api.NewAuditIngestClient(r.dial(t, r.ids.of(agentPath+"node-1"))).Stream(t.Context()))(t)}
			n.send(c.hello)
			n.refused(c.want)
		})
	}
}

func hello(node, epoch string, version uint32) *api.AgentFrame {
	vkey := ""
	if key, err := note.NewEd25519VerifierKey(proof.NodeSigner(node, epoch), make([]byte, 32)); err == nil {
		vkey = key
	}
	return &api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: &api.Hello{Node: node, Epoch: epoch, Version: version, NodeKey: vkey}}}
}

// Who may write, who may read, and who may not even finish a handshake.
func TestWhoMay(t *testing.T) {
	r := start(t, newIDs(t), nil)
	for _, c := range []struct {
		path        string
		write, read codes.Code
	}{
		{"/sallyport/agent/node-1", codes.OK, codes.PermissionDenied},
		{"/ops/alice", codes.PermissionDenied, codes.OK},
		{"/ops/db/bob", codes.PermissionDenied, codes.OK},
		{"/auditor", codes.PermissionDenied, codes.OK},
		{"/ops", codes.Unavailable, codes.Unavailable},
		{"/opsmith", codes.Unavailable, codes.Unavailable},
		{"/auditor/2", codes.Unavailable, codes.Unavailable},
		{"/sallyport/agent/node-1/x", codes.Unavailable, codes.Unavailable},
		{"/sallyport/proxy/node-1", codes.Unavailable, codes.Unavailable},
	} {
		t.Run(c.path, func(t *testing.T) {
			conn := r.dial(t, r.ids.of(c.path))
			if got := tryWrite(t, api.NewAuditIngestClient(conn)); got != c.write {
				t.Errorf("write: %s, want %s", got, c.write)
			}
			stream, err := api.NewAuditClient(conn).Flows(t.Context(), &api.FlowQuery{})
			if _, err = drain(stream, err); status.Code(err) != c.read {
				t.Errorf("read: %v, want %s", err, c.read)
			}
		})
	}
	t.Run("other authority", func(t *testing.T) {
		stranger := ids{t: t, auth: must(devauthority.New(domain, devauthority.Options{}))(t)}.of(agentPath + "node-1")
		stranger.Bundle = r.ids.auth.Bundle()
		if got := tryWrite(t, api.NewAuditIngestClient(r.dial(t, stranger))); got != codes.Unavailable {
			t.Errorf("write: %s", got)
		}
	})
}

func tryWrite(t *testing.T, c api.AuditIngestClient) codes.Code {
	stream, err := c.Stream(t.Context())
	if err != nil {
		return status.Code(err)
	}
	stream.Send(hello("node-1", epoch1, wireVersion))
	_, err = stream.Recv()
	return status.Code(err)
}

// A new stream takes over from the node's other one and goes on where that was. Nodes and epochs are apart.
func TestSequences(t *testing.T) { onEngines(t, testSequences) }

func testSequences(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, w := r.connect(t, "node-1", epoch1)
	if w.GetCriticalSeq() != 0 || w.GetFlowSeq() != 0 {
		t.Fatalf("welcome to a new node: %v", w)
	}
	n.store(flows, flowEntries(1, 5)...)
	n.store(flows, flowEntries(6, 8)...)
	n.store(critical, grantEntry(1, "g", "ACTIVATED"))
	n.store(flows, lossEntry(18, 10), flowEntry(19, nil))

	again, w := r.connect(t, "node-1", epoch1)
	if w.GetCriticalSeq() != 1 || w.GetFlowSeq() != 19 {
		t.Fatalf("welcome: %v", w)
	}
	again.store(flows, flowEntries(20, 20)...)
	n.refused(codes.Aborted) // the new stream took over

	other, w := r.connect(t, "node-2", epoch1)
	if w.GetFlowSeq() != 0 {
		t.Fatalf("welcome to another node: %v", w)
	}
	other.store(flows, flowEntries(1, 1)...)
	fresh, w := r.connect(t, "node-1", epoch2)
	if w.GetFlowSeq() != 0 {
		t.Fatalf("welcome to another epoch: %v", w)
	}
	fresh.store(flows, flowEntries(1, 1)...)

	want := []uint64{1, 2, 3, 4, 5, 6, 7, 8, 19, 20, 1, 1}
	if got := seqs(r.flows(t, &api.FlowQuery{})); !reflect.DeepEqual(got, want) {
		t.Errorf("stored are %v, want %v", got, want)
	}
}

// What is no batch is refused, under whatever seal.
func TestBatchRefused(t *testing.T) { onEngines(t, testBatchRefused) }

func testBatchRefused(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 3)...)
	wrongClass := func(n *node) { n.batch(api.Class_CLASS_UNSPECIFIED, flowEntry(4, nil)) }
	wrongEpoch := func(n *node) { n.epoch = epoch2; n.batch(flows, flowEntry(4, nil)) }
	for _, c := range []struct {
		name string
		send func(*node)
		want codes.Code
	}{
		{"gap", func(n *node) { n.batch(flows, flowEntry(5, nil)) }, codes.FailedPrecondition},
		{"gap inside", func(n *node) { n.batch(flows, flowEntry(4, nil), flowEntry(6, nil)) }, codes.FailedPrecondition},
		{"loss too small", func(n *node) { n.batch(flows, lossEntry(10, 6)) }, codes.FailedPrecondition},
		{"loss reaches back", func(n *node) { n.batch(flows, lossEntry(10, 8)) }, codes.FailedPrecondition},
		{"loss of nothing", func(n *node) { n.batch(flows, lossEntry(4, 0)) }, codes.InvalidArgument},
		{"loss before the first", func(n *node) { n.batch(flows, lossEntry(4, 5)) }, codes.InvalidArgument},
		{"twice in a batch", func(n *node) { n.batch(flows, flowEntry(4, nil), flowEntry(4, nil)) }, codes.InvalidArgument},
		{"descending", func(n *node) { n.batch(flows, flowEntry(5, nil), flowEntry(4, nil)) }, codes.InvalidArgument},
		{"no record", func(n *node) { n.batch(flows, &api.Entry{Seq: 4}) }, codes.InvalidArgument},
		{"number zero", func(n *node) { n.batch(flows, flowEntry(0, nil)) }, codes.InvalidArgument},
		{"huge", func(n *node) { n.batch(flows, lossEntry(1<<63, 1<<63-4)) }, codes.InvalidArgument},
		{"class", wrongClass, codes.InvalidArgument},
		{"epoch", wrongEpoch, codes.InvalidArgument},
		{"second hello", func(n *node) { n.send(hello("node-1", epoch1, wireVersion)) }, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, w := r.connect(t, "node-1", epoch1)
			if w.GetFlowSeq() != 3 {
				t.Fatalf("welcome: %v", w)
			}
			c.send(n)
			n.refused(c.want)
		})
	}
	if got := seqs(r.flows(t, &api.FlowQuery{})); !reflect.DeepEqual(got, []uint64{1, 2, 3}) {
		t.Errorf("stored are %v", got)
	}
}

// Many nodes at once share commits and keep apart.
func TestManyNodes(t *testing.T) { onEngines(t, testManyNodes) }

func testManyNodes(t *testing.T, i ids) {
	r := start(t, i, nil)
	const nodes, batches, size = 8, 20, 25
	var wg sync.WaitGroup
	for i := range nodes {
		wg.Go(func() {
			n, _ := r.connect(t, fmt.Sprint("node-", i), epoch1)
			for b := range uint64(batches) {
				n.batch(flows, flowEntries(b*size+1, (b+1)*size)...)
			}
			for n.ack().GetSeq() < batches*size {
			}
		})
	}
	wg.Wait()
	for i := range nodes {
		if got := len(r.flows(t, &api.FlowQuery{Node: fmt.Sprint("node-", i), Limit: 100000})); got != batches*size {
			t.Errorf("node %d has %d records", i, got)
		}
	}
}

// The next collector goes on where this one ended, in the same file or on another day.
func TestRestart(t *testing.T) { onEngines(t, testRestart) }

func testRestart(t *testing.T, i ids) {
	at := &clock{t: time.Date(2026, 3, 1, 23, 59, 0, 0, time.UTC)}
	dir := filepath.Join(t.TempDir(), "days")
	run := func() *running { return start(t, i, func(c *Config) { c.Dir, c.Now = dir, at.now }) }
	next := uint64(1)
	for _, step := range []time.Duration{0, 0, 2 * time.Minute, 24 * time.Hour, -48 * time.Hour, 0} {
		at.set(at.now().Add(step))
		r := run()
		n, w := r.connect(t, "node-1", epoch1)
		if w.GetFlowSeq() != next-1 {
			t.Fatalf("welcome: %v, want %d", w, next-1)
		}
		n.store(flows, flowEntries(next, next+2)...)
		next += 3
		r.stop()
	}
	r := run()
	all := r.flows(t, &api.FlowQuery{})
	for k, f := range all {
		if f.GetSeq() != uint64(k+1) {
			t.Fatalf("order is %v", seqs(all))
		}
	}
	if len(all) != int(next-1) {
		t.Errorf("%d records, want %d", len(all), next-1)
	}
	if days := r.dayNames(t); len(days) != 3 { // the clock that went back made none
		t.Errorf("days are %v", days)
	}
	files := must(filepath.Glob(filepath.Join(dir, "*.db")))(t)
	for _, f := range append(files, dir) {
		if mode := must(os.Stat(f))(t).Mode().Perm() & 0o077; mode != 0 {
			t.Errorf("%s can be used by others (%#o)", f, mode)
		}
	}
}

// A file that was made but not filled when the collector was killed gets its tables and its marks.
func TestUnfinishedDay(t *testing.T) {
	at := &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	dir := filepath.Join(t.TempDir(), "days")
	i := newIDs(t)
	r := start(t, i, func(c *Config) { c.Dir, c.Now = dir, at.now })
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 3)...)
	r.stop()
	if err := os.WriteFile(filepath.Join(dir, "2026-03-02.db"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	at.set(at.now().Add(24 * time.Hour))
	r = start(t, i, func(c *Config) { c.Dir, c.Now = dir, at.now })
	n, w := r.connect(t, "node-1", epoch1)
	if w.GetFlowSeq() != 3 {
		t.Fatalf("welcome: %v", w)
	}
	n.store(flows, flowEntries(4, 4)...)
}

func TestOneCollectorPerDirectory(t *testing.T) {
	r := start(t, newIDs(t), nil)
	cfg := r.cfg
	if c, err := New(cfg); err == nil {
		c.Close()
		t.Fatal("a second collector opened the directory")
	}
}

// What is read is what was sent.
func TestRecordsKeepTheirContent(t *testing.T) { onEngines(t, testRecordsKeepTheirContent) }

func testRecordsKeepTheirContent(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	flow := flowEntry(1, func(f *api.FlowRecord) {
		f.Client, f.Identity, f.Detail = "[::ffff:10.1.0.2]:4000", "spiffe://example.org/app/web", "ok"
		f.BytesToServer = 1<<64 - 1
	})
	grant := grantEntry(2, "g", "ACTIVATED")
	grant.GetGrant().Envelope = []byte{0, 1, 2}
	n.store(critical, flow, grant, lossEntry(5, 3))
	got := r.flows(t, &api.FlowQuery{Client: "10.1.0.2"})
	if len(got) != 1 || !proto.Equal(got[0].GetFlow(), flow.GetFlow()) || got[0].GetNode() != "node-1" || got[0].GetClass() != critical {
		t.Errorf("flows are %v", got)
	}
	events, err := r.reader(t).GrantEvents(t.Context(), &api.GrantQuery{Grant: "g"})
	if got := must(drain(events, err))(t); len(got) != 1 || !proto.Equal(got[0].GetEvent(), grant.GetGrant()) {
		t.Errorf("grant events are %v", got)
	}
	losses, err := r.reader(t).Losses(t.Context(), &api.LossQuery{Node: "node-1"})
	if got := must(drain(losses, err))(t); len(got) != 1 || got[0].GetLoss().GetCount() != 3 || got[0].GetSeq() != 5 {
		t.Errorf("losses are %v", got)
	}
}

// A full disk acknowledges nothing and loses nothing: the node goes on where the collector is.
func TestDiskFull(t *testing.T) {
	r := start(t, newIDs(t), nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 3)...)
	limit := func(pages int) {
		t.Helper()
		must(r.files().all()[0].writer.Exec(fmt.Sprintf("PRAGMA max_page_count = %d", pages)))(t)
	}
	limit(40)
	n.batch(flows, flowEntries(4, 2000)...)
	n.refused(codes.Unavailable)
	n, w := r.connect(t, "node-1", epoch1)
	if w.GetFlowSeq() != 3 {
		t.Fatalf("welcome: %v", w)
	}
	limit(1 << 20)
	n.store(flows, flowEntries(4, 2000)...)
	if got := r.flows(t, &api.FlowQuery{Limit: 10000}); len(got) != 2000 {
		t.Errorf("%d records", len(got))
	}
}

// After a take-over the old stream stores nothing, even a batch that had already arrived: the Welcome
// was an answer for good.
func TestTakenOver(t *testing.T) { onEngines(t, testTakenOver) }

func testTakenOver(t *testing.T, i ids) {
	r := start(t, i, nil)
	g := newIngest(t.Context(), r.write, r.peers, r.nodes, r.meters, r.log)
	signer, vkey := nodeSigner(t, "node-1", epoch1)
	session := func() *session {
		return must(g.open(t.Context(), &api.Hello{Node: "node-1", Epoch: epoch1, Version: wireVersion, NodeKey: vkey}, "node-1"))(t)
	}
	sealed := must((&chain{}).seal(sequence{"node-1", epoch1, flows}, flowEntries(1, 3), signer, nil))(t)
	batch := &api.AgentFrame{Frame: &api.AgentFrame_Batch{Batch: sealed}}
	first, second := session(), session()
	if err := errors.Join(g.enter(t.Context(), first), g.enter(t.Context(), second)); err != nil {
		t.Fatal(err)
	}
	if _, err := g.take(first, batch); status.Code(err) != codes.Aborted {
		t.Errorf("batch of the old stream: %v", err)
	}
	if ack, err := g.take(second, batch); err != nil || ack.GetSeq() != 3 {
		t.Errorf("batch of the new stream: %v, %v", ack, err)
	}
}

// A commit may take place and still return an error. The marks are what the file says then.
func TestCommitUnknown(t *testing.T) {
	r := start(t, newIDs(t), nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 3)...)
	e := r.engine.(*sqliteEngine)
	e.mu.Lock()
	clear(e.state.marks) // as if the answer to that commit had been an error
	e.mu.Unlock()
	n.chains[flows] = &chain{}
	n.batch(flows, flowEntries(1, 3)...)
	n.refused(codes.Unavailable)
	n, w := r.connect(t, "node-1", epoch1)
	if w.GetFlowSeq() != 3 {
		t.Fatalf("welcome: %v", w)
	}
	n.store(flows, flowEntries(4, 4)...)
}

// What is acknowledged has been through fsync.
func TestSynchronous(t *testing.T) {
	r := start(t, newIDs(t), nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 1)...)
	for pragma, want := range map[string]string{"synchronous": "2", "journal_mode": "wal"} {
		var got string
		if err := r.files().all()[0].writer.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %s, %v; want %s", pragma, got, err, want)
		}
	}
}
