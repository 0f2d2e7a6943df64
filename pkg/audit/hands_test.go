package audit_test

import (
	"crypto/rand"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// ledger is a log in the test's hands.
type ledger struct {
	signer note.Signer
	vkey   string
	hashes []tlog.Hash
	size   int64
}

func newLedger(t *testing.T) *ledger {
	t.Helper()
	skey, vkey, err := note.GenerateKey(rand.Reader, proof.LogSigner("example.org", t.Name()))
	if err != nil {
		t.Fatal(err)
	}
	return &ledger{signer: must(note.NewSigner(skey))(t), vkey: vkey}
}

func (l *ledger) ReadHashes(indexes []int64) (out []tlog.Hash, err error) {
	for _, x := range indexes {
		out = append(out, l.hashes[x])
	}
	return out, nil
}

func (l *ledger) add(leaves ...string) {
	for _, leaf := range leaves {
		more, _ := tlog.StoredHashes(l.size, []byte(leaf), l)
		l.hashes, l.size = append(l.hashes, more...), l.size+1
	}
}

// grown is the checkpoint of now, with the proof from an older size.
func (l *ledger) grown(from int64) *api.Grown {
	root, _ := tlog.TreeHash(l.size, l)
	signed, _ := proof.Checkpoint{Origin: l.signer.Name(), Size: l.size, Root: root}.Sign(l.signer)
	g := &api.Grown{Checkpoint: signed, From: uint64(from)}
	if from > 0 && from <= l.size {
		p, _ := tlog.ProveTree(l.size, from, l)
		for _, h := range p {
			g.Proof = append(g.Proof, h[:])
		}
	}
	return g
}

// taken is what hands have of one class.
type taken struct {
	seq    uint64
	seals  [][]byte
	breaks int
	losses []*api.LossRecord
}

func (c *taken) last() []byte {
	if len(c.seals) == 0 {
		return nil
	}
	return c.seals[len(c.seals)-1]
}

// hands are a collector's side of the stream, for what no collector of ours would do. They hold what they get against the seals.
type hands struct {
	api.UnimplementedAuditIngestServer
	t   *testing.T
	log *ledger

	mu      sync.Mutex // guards what follows
	hello   *api.Hello // the last
	hellos  int
	classes map[api.Class]*taken
	welcome func(*api.Welcome)        // changes it
	hangUp  bool                      // after the welcome
	answer  func(*api.Ack) []*api.Ack // what is said for it
	batches []*api.Batch              // in the order in which they came
	push    chan *api.Grown           // to be sent
	acts    chan *api.Act             // to be sent
	cut     chan struct{}             // ends a stream
	acted   map[uint64]*api.Acted     // by id
	streams int                       // that are open
}

// newHands listen where the site's collector would.
func (s *site) newHands(t *testing.T) *hands {
	t.Helper()
	h := &hands{t: t, log: newLedger(t), push: make(chan *api.Grown), acts: make(chan *api.Act), cut: make(chan struct{}),
		acted:   map[uint64]*api.Acted{},
		classes: map[api.Class]*taken{api.Class_CLASS_CRITICAL: {}, api.Class_CLASS_FLOW: {}}}
	l := must(net.Listen("tcp", s.address))(t)
	server := grpc.NewServer(grpc.Creds(grpccredentials.MTLSServerCredentials(s.collector, s.collector, tlsconfig.AuthorizeID(agentID))))
	api.RegisterAuditIngestServer(server, h)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	return h
}

// with runs f while nothing is taken.
func (h *hands) with(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

func (h *hands) Stream(stream api.AuditIngest_StreamServer) error {
	f, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Welcome{Welcome: h.greet(f.GetHello())}}); err != nil {
		return err
	}
	if h.hangsUp() {
		return nil
	}
	h.with(func() { h.streams++ })
	defer h.with(func() { h.streams-- })
	frames := make(chan *api.AgentFrame)
	go func() {
		defer close(frames)
		for {
			f, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case frames <- f:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	for {
		select {
		case f, ok := <-frames:
			if !ok {
				return nil
			}
			if a := f.GetActed(); a != nil {
				h.with(func() { h.acted[a.GetId()] = a })
				continue
			}
			for _, a := range h.take(f.GetBatch()) {
				if err := stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Ack{Ack: a}}); err != nil {
					return err
				}
			}
		case g := <-h.push:
			if err := stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Grown{Grown: g}}); err != nil {
				return err
			}
		case a := <-h.acts:
			if err := stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Act{Act: a}}); err != nil {
				return err
			}
		case <-h.cut:
			return nil
		}
	}
}

func (h *hands) hangsUp() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hangUp
}

func (h *hands) greet(hello *api.Hello) *api.Welcome {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hello = hello
	h.hellos++
	var from int64
	if key, err := note.NewVerifier(h.log.vkey); err == nil {
		if c, err := proof.OpenCheckpoint(hello.GetCheckpoint(), key); err == nil {
			from = c.Size
		}
	}
	w := &api.Welcome{Version: 2, LogKey: h.log.vkey, Grown: h.log.grown(from)}
	w.CriticalSeq, w.CriticalSeal = h.classes[api.Class_CLASS_CRITICAL].seq, h.classes[api.Class_CLASS_CRITICAL].last()
	w.FlowSeq, w.FlowSeal = h.classes[api.Class_CLASS_FLOW].seq, h.classes[api.Class_CLASS_FLOW].last()
	if h.welcome != nil {
		h.welcome(w)
	}
	return w
}

// take holds a batch against its seal, and the seal against the one before.
func (h *hands) take(b *api.Batch) []*api.Ack {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.batches = append(h.batches, b)
	c := h.classes[b.GetClass()]
	seal, losses, err := h.open(b)
	if err != nil {
		h.t.Error(err)
		return nil
	}
	before := uint64(0)
	if prev := c.last(); prev != nil {
		s, _ := proof.OpenSeal(prev, must(note.NewVerifier(h.hello.GetNodeKey()))(h.t))
		before = s.Number
	}
	if seal.First != c.seq+1 {
		h.t.Errorf("seal %d is over %d to %d, stored is up to %d", seal.Number, seal.First, seal.Last, c.seq)
	}
	if seal.Number != before+1 || seal.Before != proof.Follows(c.last()) {
		c.breaks++
		if len(losses) == 0 || losses[0].GetCause() != "forgotten" {
			h.t.Errorf("seal %d does not follow on seal %d", seal.Number, before)
		}
	}
	c.seq, c.seals, c.losses = seal.Last, append(c.seals, b.GetSeal()), append(c.losses, losses...)
	ack := &api.Ack{Class: b.GetClass(), Epoch: b.GetEpoch(), Seq: seal.Last, Number: seal.Number}
	if h.answer != nil {
		return h.answer(ack)
	}
	return []*api.Ack{ack}
}

func (h *hands) open(b *api.Batch) (proof.Seal, []*api.LossRecord, error) {
	key, err := note.NewVerifier(h.hello.GetNodeKey())
	if err != nil {
		return proof.Seal{}, nil, err
	}
	seal, err := proof.OpenSeal(b.GetSeal(), key)
	if err != nil {
		return seal, nil, err
	}
	var entries []proof.Entry
	var losses []*api.LossRecord
	var lost uint64
	for _, r := range b.GetRaw() {
		var e api.Entry
		if err := proto.Unmarshal(r.GetData(), &e); err != nil || e.GetRecord() == nil || e.GetSeq() != 0 {
			return seal, nil, errors.Join(err, errors.New("data is not an entry without its number"))
		}
		entries = append(entries, proof.Entry{Seq: r.GetSeq(), Data: r.GetData()})
		if l := e.GetLoss(); l != nil {
			losses, lost = append(losses, l), lost+l.GetCount()
		}
	}
	if lost != seal.Lost || seal.Last-seal.First+1 != lost+uint64(len(entries)-len(losses)) {
		return seal, nil, errors.New("seal counts other numbers than there are")
	}
	return seal, losses, seal.Check(entries)
}

// have copies what there is of a class.
func (h *hands) have(c api.Class) taken {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := *h.classes[c]
	t.seals = slices.Clone(t.seals)
	return t
}
