package collector

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// forgotten is the loss with which a node says that this collector was set back.
func forgotten(seq, count uint64) *api.Entry {
	e := lossEntry(seq, count)
	e.GetLoss().Stage, e.GetLoss().Cause = stageCollector, causeForgotten
	return e
}

// A sealed batch that is not the next one, or not what its seal says, is refused whole: neither records nor log know of it.
func TestSealedBatchRefused(t *testing.T) { onEngines(t, testSealedBatchRefused) }

func testSealedBatchRefused(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 3)...)
	n.store(flows, flowEntries(4, 5)...)
	size := r.head(t).size
	otherKey := func(t *testing.T, n *node) note.Signer {
		s, _ := signerOf(t, proof.NodeSigner(n.name, n.epoch), [32]byte{1})
		return s
	}
	one := func(change func(*proof.Seal)) func(*testing.T, *node) *api.Batch {
		return func(_ *testing.T, n *node) *api.Batch { return n.sealed(flows, flowEntries(6, 7), change) }
	}
	of := func(entries ...*api.Entry) func(*testing.T, *node) *api.Batch {
		return func(_ *testing.T, n *node) *api.Batch { return n.sealed(flows, entries, nil) }
	}
	changed := func(change func(*api.Batch)) func(*testing.T, *node) *api.Batch {
		return func(_ *testing.T, n *node) *api.Batch {
			b := n.sealed(flows, flowEntries(6, 7), nil)
			change(b)
			return b
		}
	}
	for _, c := range []struct {
		name string
		make func(*testing.T, *node) *api.Batch
		want codes.Code
	}{
		{"gap", of(flowEntries(7, 8)...), codes.FailedPrecondition},
		{"gap inside", of(flowEntry(6, nil), flowEntry(8, nil)), codes.FailedPrecondition},
		{"reaches back", of(flowEntries(5, 7)...), codes.FailedPrecondition},
		{"loss reaches back", of(lossEntry(9, 5)), codes.FailedPrecondition},
		{"stored, under another seal", func(_ *testing.T, n *node) *api.Batch { return n.sealed(flows, flowEntries(4, 5), nil) }, codes.FailedPrecondition},
		{"stored, with other entries", func(_ *testing.T, n *node) *api.Batch {
			n.chains[flows].number-- // number 2 again
			return n.sealed(flows, flowEntries(5, 5), nil)
		}, codes.FailedPrecondition},
		{"number left out", one(func(s *proof.Seal) { s.Number++ }), codes.FailedPrecondition},
		{"number of before", one(func(s *proof.Seal) { s.Number-- }), codes.FailedPrecondition},
		{"another chain", one(func(s *proof.Seal) { s.Before = proof.Follows([]byte("x")) }), codes.FailedPrecondition},
		{"another chain after a loss", func(_ *testing.T, n *node) *api.Batch {
			return n.sealed(flows, []*api.Entry{lossEntry(7, 2)}, func(s *proof.Seal) { s.Before = proof.Follows(nil) })
		}, codes.FailedPrecondition},
		{"forgotten, and an old number", func(_ *testing.T, n *node) *api.Batch {
			return n.sealed(flows, []*api.Entry{forgotten(7, 2)}, func(s *proof.Seal) { s.Number = 1 })
		}, codes.FailedPrecondition},
		{"more lost than counted", one(func(s *proof.Seal) { s.Lost = 1 }), codes.InvalidArgument},
		{"begins before its entries", one(func(s *proof.Seal) { s.First = 5 }), codes.FailedPrecondition},
		{"ends after its entries", one(func(s *proof.Seal) { s.Last = 9 }), codes.InvalidArgument},
		{"other root", one(func(s *proof.Seal) { s.Root[0] ^= 1 }), codes.InvalidArgument},
		{"other class", one(func(s *proof.Seal) { s.Class = proof.ClassCritical }), codes.InvalidArgument},
		{"other epoch", one(func(s *proof.Seal) { s.Epoch = epoch2 }), codes.InvalidArgument},
		{"other node", one(func(s *proof.Seal) { s.Node = "node-2" }), codes.InvalidArgument},
		{"other key", func(t *testing.T, n *node) *api.Batch {
			c := &chain{n.chains[flows].number, n.chains[flows].signed}
			return must(c.seal(sequence{n.name, n.epoch, flows}, flowEntries(6, 7), otherKey(t, n), nil))(t)
		}, codes.InvalidArgument},
		{"no seal", changed(func(b *api.Batch) { b.Seal = nil }), codes.InvalidArgument},
		{"entry changed", changed(func(b *api.Batch) { b.Raw[0].Data = b.Raw[1].Data }), codes.InvalidArgument},
		{"entry left out", changed(func(b *api.Batch) { b.Raw = b.Raw[1:] }), codes.InvalidArgument},
		{"entry put in", changed(func(b *api.Batch) { b.Raw = append(b.Raw, &api.Raw{Seq: 8, Data: b.Raw[0].Data}) }), codes.InvalidArgument},
		{"number changed", changed(func(b *api.Batch) { b.Raw[1].Seq = 8 }), codes.InvalidArgument},
		{"nothing", changed(func(b *api.Batch) { b.Raw = nil }), codes.InvalidArgument},
		{"no record", of(&api.Entry{Seq: 6}), codes.InvalidArgument},
		{"no entry", func(_ *testing.T, n *node) *api.Batch {
			return &api.Batch{Class: flows, Epoch: epoch1, Raw: []*api.Raw{{Seq: 6, Data: []byte{0xff}}}}
		}, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, w := r.connect(t, "node-1", epoch1)
			if w.GetFlowSeq() != 5 || !bytes.Equal(w.GetFlowSeal(), n.chains[flows].signed) || n.chains[flows].number != 2 {
				t.Fatalf("welcome: %v", w)
			}
			n.sendBatch(c.make(t, n))
			n.refused(c.want)
		})
	}
	if got := seqs(r.flows(t, &api.FlowQuery{})); !reflect.DeepEqual(got, []uint64{1, 2, 3, 4, 5}) {
		t.Errorf("stored are %v", got)
	}
	if got := r.head(t).size; got != size {
		t.Errorf("the log grew from %d leaves to %d", size, got)
	}
}

// rawBatch is the first batch of a node, of one entry in any bytes.
func (n *node) rawBatch(data []byte) *api.Batch {
	n.t.Helper()
	e := proof.Entry{Seq: 1, Data: data}
	signer, _ := nodeSigner(n.t, n.name, n.epoch)
	s := proof.Seal{Sequence: sequence{n.name, n.epoch, flows}.proofSequence(), Number: 1, Before: proof.Follows(nil), First: 1, Last: 1, Entries: 1,
		Root: proof.Root([]proof.Entry{e})}
	return &api.Batch{Class: flows, Epoch: n.epoch, Raw: []*api.Raw{{Seq: e.Seq, Data: data}}, Seal: must(s.Sign(signer))(n.t)}
}

// A node cannot store what would make evidence of the log worthless: two records in one are refused, and what protobuf leaves alone proofs do too.
func TestOddEntries(t *testing.T) { onEngines(t, testOddEntries) }

func testOddEntries(t *testing.T, i ids) {
	r := start(t, i, nil)
	flow := must(proto.Marshal(&api.Entry{Record: flowEntry(1, nil).GetRecord()}))(t)
	grant := must(proto.Marshal(&api.Entry{Record: grantEntry(1, "g", "ACTIVATED").GetRecord()}))(t)
	n, _ := r.connect(t, "node-1", epoch1)
	n.sendBatch(n.rawBatch(append(bytes.Clone(grant), flow...)))
	n.refused(codes.InvalidArgument)
	n, _ = r.connect(t, "node-1", epoch1)
	n.sendBatch(n.rawBatch(protowire.AppendVarint(protowire.AppendTag(flow, 3, protowire.VarintType), 1)))
	if a := n.ack(); a.GetSeq() != 1 {
		t.Fatalf("acknowledged is %v", a)
	}
	if report, err := proof.Verify(bytes.NewReader(r.evidence(t, &api.EvidenceRequest{})), r.logKeyOf(t)); err != nil || report.Verdict != proof.Proven {
		t.Errorf("%v: %s, %v", report.Verdict, report.Why, err)
	}
}

// One batch cannot keep the writer from the other nodes for long.
func TestBatchOfTooMany(t *testing.T) { onEngines(t, testBatchOfTooMany) }

func testBatchOfTooMany(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, maxEntries)...)
	n.batch(flows, flowEntries(maxEntries+1, 2*maxEntries+1)...)
	n.refused(codes.InvalidArgument)
	if got := r.mark(t, sequence{"node-1", epoch1, flows}).seq; got != maxEntries {
		t.Errorf("stored is up to %d", got)
	}
}

// A node cannot fill the days of all nodes with epochs. Those that it has go on, and the day after it may begin others.
func TestEpochsOfADay(t *testing.T) { onEngines(t, testEpochsOfADay) }

func testEpochsOfADay(t *testing.T, i ids) {
	at := &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	r := start(t, i, func(c *Config) { c.Now, c.Boot = at.now, at.boot })
	chains := map[string]*chain{}
	put := func(node string, epoch int) error {
		name := fmt.Sprintf("01HZZZZZZZZZZZZZZZZZZZ%04d", epoch)
		signer, vkey := nodeSigner(t, node, name)
		s := &session{node: node, epoch: name, vkey: vkey, key: must(note.NewVerifier(vkey))(t)}
		id := node + name
		if chains[id] == nil {
			chains[id] = &chain{}
		}
		next := chains[id].number + 1
		sent := must(chains[id].seal(sequence{node, name, flows}, flowEntries(next, next), signer, nil))(t)
		_, err := r.write.put(t.Context(), must(s.read(sent))(t))
		return err
	}
	for epoch := range maxNewEpochs {
		if err := put("node-1", epoch); err != nil {
			t.Fatalf("epoch %d: %v", epoch, err)
		}
	}
	size := r.head(t).size
	if err := put("node-1", maxNewEpochs); !errors.Is(err, errGap) {
		t.Errorf("one more: %v", err)
	}
	if got := r.head(t).size; got != size {
		t.Errorf("the log grew from %d leaves to %d", size, got)
	}
	for node, epoch := range map[string]int{"node-1": 0, "node-2": maxNewEpochs} {
		if err := put(node, epoch); err != nil {
			t.Errorf("epoch %d of %s: %v", epoch, node, err)
		}
	}
	at.pass(24 * time.Hour)
	if err := put("node-1", maxNewEpochs+1); err != nil {
		t.Errorf("the day after: %v", err)
	}
}

// A batch that is sent again is acknowledged again, and is there once: the last one, an older one, and after a restart.
func TestSealedTwice(t *testing.T) { onEngines(t, testSealedTwice) }

func testSealedTwice(t *testing.T, i ids) {
	dir := t.TempDir()
	r := start(t, i, func(c *Config) { c.Dir = dir })
	n, _ := r.connect(t, "node-1", epoch1)
	var sent []*api.Batch
	for seq := uint64(1); seq <= 5; seq += 2 {
		sent = append(sent, n.sealed(flows, flowEntries(seq, seq+1), nil))
		n.sendBatch(sent[len(sent)-1])
		if a := n.ack(); a.GetSeq() != seq+1 || a.GetNumber() != uint64(len(sent)) {
			t.Fatalf("acknowledged is %v", a)
		}
	}
	size := r.head(t).size
	again := func(b *api.Batch) {
		t.Helper()
		n.sendBatch(b)
		if a := n.ack(); a.GetSeq() != 6 || a.GetNumber() != 3 {
			t.Errorf("acknowledged is %v", a)
		}
	}
	for _, b := range sent {
		again(b)
	}
	r.stop()
	r = start(t, i, func(c *Config) { c.Dir = dir })
	n, _ = r.connect(t, "node-1", epoch1)
	again(sent[2])
	n.store(flows, flowEntries(7, 8)...)
	if got := seqs(r.flows(t, &api.FlowQuery{})); !reflect.DeepEqual(got, []uint64{1, 2, 3, 4, 5, 6, 7, 8}) {
		t.Errorf("stored are %v", got)
	}
	if got := r.head(t).size; got != size+1 {
		t.Errorf("the log has %d leaves, it had %d before the last seal", got, size)
	}
}

// A chain that does not go on is taken where the node says that this collector forgot, and is counted.
func TestChainBreaks(t *testing.T) { onEngines(t, testChainBreaks) }

func testChainBreaks(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.chains[flows] = &chain{6, []byte("a seal that this collector lost")}
	n.store(flows, forgotten(40, 40), flowEntry(41, nil))
	n.store(flows, flowEntries(42, 43)...)
	n.chains[flows] = &chain{9, []byte("another one")}
	n.store(flows, forgotten(50, 7))
	states := must(r.reader(t).Nodes(t.Context(), &api.NodesRequest{}))(t).GetNodes()
	if len(states) != 1 {
		t.Fatalf("states are %v", states)
	}
	s := states[0]
	if s.GetChainBreaks() != 2 || s.GetLost() != 47 || s.GetSeq() != 50 || s.GetSeals() != 10 || !s.GetConnected() || s.GetClass() != flows || s.GetReceived() == nil {
		t.Errorf("state is %v", s)
	}
}

// A node has one key in an epoch.
func TestOneKeyPerEpoch(t *testing.T) { onEngines(t, testOneKeyPerEpoch) }

func testOneKeyPerEpoch(t *testing.T, i ids) {
	r := start(t, i, nil)
	_, vkey := nodeSigner(t, "node-1", epoch1)
	otherSigner, otherKey := signerOf(t, proof.NodeSigner("node-1", epoch1), [32]byte{1})
	n := &node{t: t}
	greet := func(key string) {
		n.stream = must(api.NewAuditIngestClient(r.dial(t, r.ids.of(agentPath+"node-1"))).Stream(t.Context()))(t)
		n.send(&api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: &api.Hello{Node: "node-1", Epoch: epoch1, Version: 2, NodeKey: key}}})
	}
	_, foreign := nodeSigner(t, "node-2", epoch1)
	for _, key := range []string{"", "x", foreign} {
		greet(key)
		n.refused(codes.InvalidArgument)
	}
	first, _ := r.connect(t, "node-1", epoch1) // says its key, and sealed nothing yet
	greet(otherKey)
	if f := must(n.stream.Recv())(t); f.GetWelcome() == nil {
		t.Fatalf("have %v", f)
	}
	first.refused(codes.Aborted)
	n.sendBatch(must((&chain{}).seal(sequence{"node-1", epoch1, flows}, flowEntries(1, 1), otherSigner, nil))(t))
	if a := n.ack(); a.GetSeq() != 1 {
		t.Fatalf("acknowledged is %v", a)
	}
	greet(vkey)
	n.refused(codes.FailedPrecondition)
	again, _ := r.connect(t, "node-1", epoch2)
	again.store(flows, flowEntries(1, 1)...)
}

// The key of a batch is looked at again when it is stored: two streams may have begun before there was one.
func TestKeyIsTheStoredOne(t *testing.T) { onEngines(t, testKeyIsTheStoredOne) }

func testKeyIsTheStoredOne(t *testing.T, i ids) {
	r := start(t, i, nil)
	g := newIngest(t.Context(), r.write, r.peers, r.nodes, r.meters, r.log)
	session := func(seed byte, c *chain) (*session, *api.AgentFrame) {
		signer, vkey := signerOf(t, proof.NodeSigner("node-1", epoch1), [32]byte{seed})
		s := must(g.open(t.Context(), &api.Hello{Node: "node-1", Epoch: epoch1, Version: 2, NodeKey: vkey}, "node-1"))(t)
		b := must(c.seal(sequence{"node-1", epoch1, critical}, []*api.Entry{grantEntry(c.number+1, "g", "ACTIVATED")}, signer, nil))(t)
		return s, &api.AgentFrame{Frame: &api.AgentFrame_Batch{Batch: b}}
	}
	var c chain
	first, a := session(1, &c)
	second, b := session(2, &c) // follows on the first
	must(g.take(first, a))(t)
	if _, err := g.take(second, b); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a batch under another key: %v", err)
	}
}

// Both sides speak the newest version that both know.
func TestNegotiation(t *testing.T) {
	r := start(t, newIDs(t), nil)
	_, vkey := nodeSigner(t, "node-1", epoch1)
	for _, c := range []struct{ version, oldest, want uint32 }{{2, 0, 2}, {2, 1, 2}, {3, 2, 2}, {9, 1, 2}} {
		n, w := r.greet(t, &api.Hello{Node: "node-1", Epoch: epoch1, Version: c.version, Oldest: c.oldest, NodeKey: vkey})
		if n == nil || w.GetVersion() != c.want || w.GetLogKey() == "" {
			t.Errorf("%v: welcome is %v", c, w)
		}
	}
	for _, c := range [][2]uint32{{3, 3}, {3, 0}, {0, 0}, {1, 2}, {1, 0}, {1, 1}} {
		n := &node{t: t, stream: must(api.NewAuditIngestClient(r.dial(t, r.ids.of(agentPath+"node-1"))).Stream(t.Context()))(t)}
		n.send(&api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: &api.Hello{Node: "node-1", Epoch: epoch1, Version: c[0], Oldest: c[1], NodeKey: vkey}}})
		n.refused(codes.FailedPrecondition)
	}
}

// What the collector does not know of a record is kept and proven all the same.
func TestBytesAreKept(t *testing.T) { onEngines(t, testBytesAreKept) }

func testBytesAreKept(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	data := must(proto.Marshal(&api.Entry{Record: grantEntry(1, "g", "ACTIVATED").GetRecord()}))(t)
	data = append(data, 0xf2, 0x3f, 1, 'x') // field 1022, of a later version
	e := proof.Entry{Seq: 1, Data: data}
	seal := proof.Seal{Sequence: proof.Sequence{Node: "node-1", Epoch: epoch1, Class: proof.ClassCritical}, Number: 1, First: 1, Last: 1, Entries: 1,
		Root: proof.Root([]proof.Entry{e}), Before: proof.Follows(nil)}
	signer, _ := nodeSigner(t, "node-1", epoch1)
	n.sendBatch(&api.Batch{Class: critical, Epoch: epoch1, Raw: []*api.Raw{{Seq: 1, Data: data}}, Seal: must(seal.Sign(signer))(t)})
	n.ack()
	for _, q := range []*api.EvidenceRequest{{}, {Grant: "g"}, {Node: "node-1", Epoch: epoch1, Class: critical, Seq: 1}} {
		got, err := proven(r.evidence(t, q), r.logKeyOf(t))
		if err != nil || len(got) != 1 || !bytes.Equal(got[0].Data, data) {
			t.Errorf("proven are %v, %v", got, err)
		}
	}
}

// A node hears of the log when it comes, against the checkpoint that it keeps, and then while it grows.
func TestNodesHearOfTheLog(t *testing.T) { onEngines(t, testNodesHearOfTheLog) }

func testNodesHearOfTheLog(t *testing.T, i ids) {
	r := start(t, i, func(c *Config) { c.growEvery = 1 })
	key := r.logKeyOf(t)
	n, w := r.connect(t, "node-1", epoch1)
	if k, err := note.NewVerifier(w.GetLogKey()); err != nil || k.Name() != key.Name() || k.KeyHash() != key.KeyHash() {
		t.Errorf("key is %s", w.GetLogKey())
	}
	last := grownTo(t, key, proof.Checkpoint{}, w.GetGrown())
	var kept []byte
	for seq := uint64(1); seq <= 5; seq++ {
		n.batch(flows, flowEntry(seq, nil))
		for acked := false; !acked || last.Size < int64(seq)+1; {
			f := must(n.stream.Recv())(t)
			if f.GetAck() != nil {
				acked = true
				continue
			}
			if uint64(last.Size) != f.GetGrown().GetFrom() {
				t.Fatalf("growth is from %d, told was %d", f.GetGrown().GetFrom(), last.Size)
			}
			last = grownTo(t, key, last, f.GetGrown())
			kept = f.GetGrown().GetCheckpoint()
		}
	}
	other, _ := r.connect(t, "node-2", epoch1)
	other.batch(flows, flowEntries(1, 9)...)
	for other.ack() == nil {
	}
	_, vkey := nodeSigner(t, "node-1", epoch1)
	_, w = r.greet(t, &api.Hello{Node: "node-1", Epoch: epoch1, Version: 2, NodeKey: vkey, Checkpoint: kept})
	if c := grownTo(t, key, last, w.GetGrown()); c.Size <= last.Size || w.GetGrown().GetFrom() != uint64(last.Size) {
		t.Errorf("welcome has %d leaves since %d", c.Size, w.GetGrown().GetFrom())
	}
	longer := last
	longer.Size = 1000
	_, w = r.greet(t, &api.Hello{Node: "node-1", Epoch: epoch1, Version: 2, NodeKey: vkey, Checkpoint: must(longer.Sign(r.write.key))(t)})
	if _, err := tryGrown(key, longer, w.GetGrown()); err == nil {
		t.Error("a log that was set back looks well")
	}
}

func TestTides(t *testing.T) { onEngines(t, testTides) }

func testTides(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	tide := func(seq uint64, grant, cause string) *api.Entry {
		return &api.Entry{Seq: seq, Record: &api.Entry_Tide{Tide: &api.Tide{Time: timestamppb.Now(), Paths: []*api.PathTide{
			{Grant: "of all"}, {Grant: grant, Cause: cause, Kernel: &api.Volume{BytesToServer: seq}}}}}}
	}
	n.store(critical, tide(1, "a", ""), tide(2, "b", "unexplained"), grantEntry(3, "b", "ENDED"), tide(4, "ab", ""))
	for _, c := range []struct {
		q    *api.TideQuery
		want []uint64
	}{
		{&api.TideQuery{}, []uint64{1, 2, 4}},
		{&api.TideQuery{Grant: "b"}, []uint64{2}},
		{&api.TideQuery{Grant: "of all", Limit: 2}, []uint64{2, 4}},
		{&api.TideQuery{Differing: true}, []uint64{2}},
		{&api.TideQuery{Node: "node-2"}, nil},
	} {
		stream, err := r.reader(t).Tides(t.Context(), c.q)
		var got []uint64
		for _, m := range must(drain(stream, err))(t) {
			got = append(got, m.GetSeq())
			if m.GetTide().GetPaths()[1].GetKernel().GetBytesToServer() != m.GetSeq() {
				t.Errorf("tide is %v", m)
			}
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v: have %v, want %v", c.q, got, c.want)
		}
	}
	got, err := proven(r.evidence(t, &api.EvidenceRequest{}), r.logKeyOf(t))
	if err != nil || len(got) != 4 {
		t.Errorf("%d entries are proven: %v", len(got), err)
	}
}
