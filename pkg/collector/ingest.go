package collector

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

const (
	wireVersion = 2
	helloWithin = 30 * time.Second
	growEvery   = 10 * time.Second
)

// ingest is the AuditIngest service.
type ingest struct {
	api.UnimplementedAuditIngestServer
	stopping context.Context
	write    *writer
	peers    peers
	nodes    *nodes
	meters   *meters
	every    time.Duration // between checkpoints, while the log grows
	log      *slog.Logger

	mu     sync.Mutex
	active map[string]*session // by node; guarded by mu
}

func newIngest(stopping context.Context, w *writer, p peers, n *nodes, m *meters, log *slog.Logger) *ingest {
	return &ingest{stopping: stopping, write: w, peers: p, nodes: n, meters: m, every: growEvery, log: log, active: map[string]*session{}}
}

// session is one stream of one node. A node has one at a time: a new one takes over, because the old
// may be a connection that died without a word.
type session struct {
	node  string
	epoch string
	vkey  string        // of the node's seals
	key   note.Verifier // of vkey
	over  chan struct{} // closed when another took over
	turn  int64         // among the node's streams
	told  int64         // leaves of the log that the node knows of; owned by Stream

	gone chan struct{} // closed when the stream has ended
	acts *acts

	presence *presence

	mu    sync.Mutex
	ended bool // guarded by mu, which is held while a batch is stored
}

// Stream takes a node's batches and acknowledges what is durable.
func (g *ingest) Stream(stream api.AuditIngest_StreamServer) error {
	node, err := g.peers.node(stream.Context())
	if err != nil {
		return err
	}
	frames, broken := receive(stream)
	proven := time.NewTimer(proofTTL)
	defer proven.Stop()
	s, err := g.greet(stream, node, frames, broken)
	if err != nil {
		return err
	}
	defer g.leave(s)
	tick := time.NewTicker(g.every)
	defer tick.Stop()
	s.presence = g.nodes.heard(node, 1)
	defer g.nodes.heard(node, -1)
	acks, ended, stop := g.work(stream.Context(), s, frames, broken)
	defer stop()
	for {
		select {
		case ack := <-acks:
			if err := stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Ack{Ack: ack}}); err != nil {
				return err
			}
		case act := <-s.acts.out:
			if err := stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Act{Act: act}}); err != nil {
				return err
			}
		case <-tick.C:
			if err := g.tell(stream, s); err != nil {
				return err
			}
		case err := <-ended:
			return err
		case <-s.over:
			return status.Errorf(codes.Aborted, "node %q opened another stream", node)
		case <-proven.C:
			return status.Error(codes.Unavailable, "identity must be proven again")
		case <-g.stopping.Done():
			return status.Error(codes.Unavailable, errStopping.Error())
		}
	}
}

// work takes frames in a goroutine of its own, until stop returns: the stream's own is the only one that sends, and what it has to send
// does not wait for a batch that is being stored. Answers of the node come behind the batches that it sent before.
func (g *ingest) work(ctx context.Context, s *session, frames <-chan *api.AgentFrame, broken <-chan error) (_ <-chan *api.Ack, _ <-chan error, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	acks, ended, done := make(chan *api.Ack), make(chan error, 1), make(chan struct{})
	go func() {
		defer close(done)
		ended <- g.takeAll(ctx, s, frames, broken, acks)
	}()
	return acks, ended, func() { cancel(); <-done }
}

func (g *ingest) takeAll(ctx context.Context, s *session, frames <-chan *api.AgentFrame, broken <-chan error, acks chan<- *api.Ack) error {
	for {
		var f *api.AgentFrame
		select {
		case f = <-frames:
		case err := <-broken:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
		if a := f.GetActed(); a != nil {
			s.acts.answer(a)
			continue
		}
		if err := g.hold(ctx, s, f.GetBatch()); err != nil {
			return err
		}
		ack, err := g.take(s, f)
		if err != nil {
			return err
		}
		select {
		case acks <- ack:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// receive reads in a goroutine of its own, which ends with the stream's handler.
func receive(stream api.AuditIngest_StreamServer) (<-chan *api.AgentFrame, <-chan error) {
	frames, broken := make(chan *api.AgentFrame), make(chan error, 1)
	go func() {
		for {
			f, err := stream.Recv()
			if err != nil {
				broken <- err
				return
			}
			select {
			case frames <- f:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	return frames, broken
}

// greet answers the Hello. The node is the one that was proven; a Hello that says otherwise is refused.
func (g *ingest) greet(stream api.AuditIngest_StreamServer, node string, frames <-chan *api.AgentFrame, broken <-chan error) (*session, error) {
	late := time.NewTimer(helloWithin)
	defer late.Stop()
	var frame *api.AgentFrame
	select {
	case frame = <-frames:
	case err := <-broken:
		return nil, err
	case <-late.C:
		return nil, status.Error(codes.DeadlineExceeded, "no hello")
	case <-g.stopping.Done():
		return nil, status.Error(codes.Unavailable, errStopping.Error())
	}
	s, err := g.open(stream.Context(), frame.GetHello(), node)
	if err != nil {
		g.log.WarnContext(stream.Context(), "hello refused", "node", node, "err", err)
		return nil, err
	}
	if err := g.enter(stream.Context(), s); err != nil {
		return nil, err
	}
	g.log.InfoContext(stream.Context(), "node connected", "node", node, "epoch", s.epoch, "boot", word(frame.GetHello().GetBootId()))
	w, err := g.welcome(stream.Context(), s, frame.GetHello().GetCheckpoint())
	if err == nil {
		err = stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Welcome{Welcome: w}})
	}
	if err != nil {
		g.leave(s)
		return nil, err
	}
	return s, nil
}

// open makes the session that a Hello asks for.
func (g *ingest) open(ctx context.Context, h *api.Hello, node string) (*session, error) {
	oldest := h.GetOldest()
	if oldest == 0 {
		oldest = h.GetVersion()
	}
	switch {
	case h == nil:
		return nil, status.Error(codes.InvalidArgument, "first frame is no hello")
	case h.GetNode() != node:
		return nil, status.Errorf(codes.PermissionDenied, "hello names node %.200q, the certificate %q", h.GetNode(), node)
	case h.GetVersion() < wireVersion || oldest > wireVersion:
		return nil, status.Errorf(codes.FailedPrecondition, "versions %d to %d of the stream, this collector speaks %d", oldest, h.GetVersion(), wireVersion)
	}
	if _, err := ulid.ParseStrict(h.GetEpoch()); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "epoch %.200q: %v", h.GetEpoch(), err)
	}
	s := &session{node: node, epoch: h.GetEpoch(), vkey: h.GetNodeKey(), over: make(chan struct{}), gone: make(chan struct{}), acts: newActs(h.GetActs())}
	var err error
	if s.key, err = note.NewVerifier(s.vkey); err != nil || s.key.Name() != proof.NodeSigner(node, s.epoch) || !isKeyLeaf(node, s.epoch, s.vkey) {
		return nil, status.Errorf(codes.InvalidArgument, "node key %.200q is none of node %q in epoch %s", s.vkey, node, s.epoch)
	}
	switch k, known, err := g.write.engine.stored(ctx).nodeKey(nodeEpoch{node, s.epoch}); {
	case err != nil:
		return nil, g.unread(err)
	case known && k.vkey != s.vkey:
		return nil, status.Error(codes.FailedPrecondition, errOtherKey(node, s.epoch).Error())
	}
	return s, nil
}

// isKeyLeaf tells whether a key can be read from its leaf again: base64 may be broken into lines, and a leaf may not. One that cannot would
// make all evidence worthless that it is part of.
func isKeyLeaf(node, epoch, vkey string) bool {
	n, e, v, err := proof.ParseKeyLeaf(proof.KeyLeaf(node, epoch, vkey))
	return err == nil && n == node && e == epoch && v == vkey && !strings.Contains(vkey, "\r")
}

// unread is what a node is told when its state cannot be read now. As long as that is so nothing is stored, and no batch comes to be refused for it: each
// attempt of a node counts as one.
func (g *ingest) unread(err error) error {
	if !errors.Is(err, context.Canceled) { // the node left
		g.meters.refuse(err)
	}
	g.log.Error("state cannot be read", "err", err)
	return status.Error(codes.Unavailable, "state cannot be read") // the node need not know our disk
}

func (g *ingest) welcome(ctx context.Context, s *session, checkpoint []byte) (*api.Welcome, error) {
	stored := g.write.engine.stored(ctx)
	critical, err := stored.mark(sequence{s.node, s.epoch, api.Class_CLASS_CRITICAL})
	if err != nil {
		return nil, g.unread(err)
	}
	flow, err := stored.mark(sequence{s.node, s.epoch, api.Class_CLASS_FLOW})
	if err != nil {
		return nil, g.unread(err)
	}
	w := &api.Welcome{Version: wireVersion, CriticalSeq: critical.seq, FlowSeq: flow.seq, CriticalSeal: critical.seal, FlowSeal: flow.seal,
		LogKey: g.write.key.vkey}
	if c, err := proof.OpenCheckpoint(checkpoint, g.write.key); err == nil {
		s.told = c.Size
	}
	h, err := stored.head()
	if err != nil {
		return nil, g.unread(err)
	}
	w.Grown = g.grown(ctx, s, h)
	return w, nil
}

// grown is the log's checkpoint for a node. What cannot be proven now, because this log is shorter or has lost hashes, goes without
// proof, and the node judges: its records come all the same.
func (g *ingest) grown(ctx context.Context, s *session, h head) *api.Grown {
	out, err := grown(ctx, g.write.engine, h, s.told)
	if err != nil {
		g.log.ErrorContext(ctx, "growth of the log cannot be proven", "node", s.node, "from", s.told, "err", err)
		out = &api.Grown{Checkpoint: h.checkpoint}
	}
	s.told = h.size
	return out
}

// tell sends a checkpoint if the log grew since the last one.
func (g *ingest) tell(stream api.AuditIngest_StreamServer, s *session) error {
	h, err := g.write.engine.stored(stream.Context()).head()
	if err != nil {
		return g.unread(err)
	}
	if h.size == s.told {
		return nil
	}
	return stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Grown{Grown: g.grown(stream.Context(), s, h)}})
}

// connected tells whether a node has a stream in this epoch.
func (g *ingest) connected(node, epoch string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.active[node]
	return s != nil && s.epoch == epoch
}

// enter ends the node's other stream and waits until it stores nothing any more: only then does the
// Welcome say where the sequence goes on.
func (g *ingest) enter(ctx context.Context, s *session) (err error) {
	g.mu.Lock()
	old := g.active[s.node]
	g.active[s.node] = s
	g.mu.Unlock()
	if old != nil {
		close(old.over)
		old.mu.Lock()
		old.ended = true
		old.mu.Unlock()
	}
	if err = g.turn(ctx, s); err != nil {
		g.leave(s)
	}
	return err
}

// turn takes the session's. A node that begins streams as fast as it can waits for itself: a database gives a turn between two commits.
func (g *ingest) turn(ctx context.Context, s *session) (err error) {
	entering := g.nodes.heard(s.node, 0).entering
	select {
	case entering <- struct{}{}:
		defer func() { <-entering }()
	case <-s.over:
		return status.Errorf(codes.Aborted, "node %q opened another stream", s.node)
	case <-ctx.Done():
		return ctx.Err()
	}
	if s.turn, err = g.write.engine.enter(ctx, s.node); err != nil {
		return g.unread(err)
	}
	return nil
}

func (g *ingest) leave(s *session) {
	close(s.gone)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.active[s.node] == s {
		delete(g.active, s.node)
	}
}

// take stores one batch.
func (g *ingest) take(s *session, f *api.AgentFrame) (*api.Ack, error) {
	b := f.GetBatch()
	switch {
	case b == nil:
		return nil, status.Error(codes.InvalidArgument, "frame is no batch")
	case b.GetEpoch() != s.epoch:
		return nil, status.Errorf(codes.InvalidArgument, "batch of epoch %.200q in a stream of %q", b.GetEpoch(), s.epoch)
	case b.GetClass() != api.Class_CLASS_CRITICAL && b.GetClass() != api.Class_CLASS_FLOW:
		return nil, status.Errorf(codes.InvalidArgument, "class %d", b.GetClass())
	}
	read, err := s.read(b)
	if err != nil {
		return nil, g.refuse(s, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, status.Errorf(codes.Aborted, "node %q opened another stream", s.node)
	}
	r, err := g.write.put(g.stopping, read)
	if err != nil {
		return nil, g.refuse(s, err)
	}
	g.meters.stored(b.GetClass(), read.entries, r.before, r.mark.seq)
	return &api.Ack{Class: b.GetClass(), Epoch: s.epoch, Seq: r.mark.seq, Number: r.mark.number}, nil
}

// read decodes a batch, and holds a sealed one against its seal.
func (s *session) read(b *api.Batch) (batch, error) {
	out := batch{sequence: sequence{s.node, s.epoch, b.GetClass()}, vkey: s.vkey, turn: s.turn, signed: b.GetSeal()}
	if err := out.decode(b.GetRaw()); err != nil {
		return batch{}, err
	}
	return out, out.open(s.key)
}

func (g *ingest) refuse(s *session, err error) error {
	g.meters.refuse(err)
	switch {
	case errors.Is(err, errGap):
		g.log.Error("gap in a sequence", "node", s.node, "epoch", s.epoch, "err", err)
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, errEntry):
		g.log.Error("malformed entry", "node", s.node, "epoch", s.epoch, "err", err)
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, errTakenOver):
		return status.Errorf(codes.Aborted, "node %q opened another stream", s.node)
	case errors.Is(err, errStopping):
		return status.Error(codes.Unavailable, err.Error())
	}
	g.log.Error("batch cannot be stored", "node", s.node, "err", err)
	return status.Error(codes.Unavailable, "batch cannot be stored") // the node need not know our disk
}
