package collector

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

const (
	wireVersion = 1
	helloWithin = 30 * time.Second
)

// ingest is the AuditIngest service.
type ingest struct {
	api.UnimplementedAuditIngestServer
	stopping context.Context
	write    *writer
	peers    peers
	nodes    *nodes
	meters   *meters
	log      *slog.Logger

	mu     sync.Mutex
	active map[string]*session // by node; guarded by mu
}

func newIngest(stopping context.Context, w *writer, p peers, n *nodes, m *meters, log *slog.Logger) *ingest {
	return &ingest{stopping: stopping, write: w, peers: p, nodes: n, meters: m, log: log, active: map[string]*session{}}
}

// session is one stream of one node. A node has one at a time: a new one takes over, because the old
// may be a connection that died without a word.
type session struct {
	node  string
	epoch string
	over  chan struct{} // closed when another took over

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
	proof := time.NewTimer(proofTTL)
	defer proof.Stop()
	s, err := g.greet(stream, node, frames, broken)
	if err != nil {
		return err
	}
	defer g.leave(s)
	s.presence = g.nodes.heard(node, 1)
	defer g.nodes.heard(node, -1)
	for {
		select {
		case f := <-frames:
			if err := g.hold(stream.Context(), s, f.GetBatch()); err != nil {
				return err
			}
			ack, err := g.take(s, f)
			if err != nil {
				return err
			}
			if err := stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Ack{Ack: ack}}); err != nil {
				return err
			}
		case err := <-broken:
			return err
		case <-s.over:
			return status.Errorf(codes.Aborted, "node %q opened another stream", node)
		case <-proof.C:
			return status.Error(codes.Unavailable, "identity must be proven again")
		case <-g.stopping.Done():
			return status.Error(codes.Unavailable, errStopping.Error())
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
	h := frame.GetHello()
	if err := checkHello(h, node); err != nil {
		g.log.WarnContext(stream.Context(), "hello refused", "node", node, "err", err)
		return nil, err
	}
	s := &session{node: node, epoch: h.GetEpoch(), over: make(chan struct{})}
	g.enter(s)
	g.log.InfoContext(stream.Context(), "node connected", "node", node, "epoch", h.GetEpoch(), "boot", h.GetBootId())
	err := stream.Send(&api.CollectorFrame{Frame: &api.CollectorFrame_Welcome{Welcome: &api.Welcome{
		CriticalSeq: g.write.mark(sequence{node, s.epoch, api.Class_CLASS_CRITICAL}),
		FlowSeq:     g.write.mark(sequence{node, s.epoch, api.Class_CLASS_FLOW}),
	}}})
	if err != nil {
		g.leave(s)
		return nil, err
	}
	return s, nil
}

func checkHello(h *api.Hello, node string) error {
	switch {
	case h == nil:
		return status.Error(codes.InvalidArgument, "first frame is no hello")
	case h.GetNode() != node:
		return status.Errorf(codes.PermissionDenied, "hello names node %q, the certificate %q", h.GetNode(), node)
	case h.GetVersion() != wireVersion:
		return status.Errorf(codes.FailedPrecondition, "version %d of the stream, this collector speaks %d", h.GetVersion(), wireVersion)
	}
	if _, err := ulid.ParseStrict(h.GetEpoch()); err != nil {
		return status.Errorf(codes.InvalidArgument, "epoch %q: %v", h.GetEpoch(), err)
	}
	return nil
}

// enter ends the node's other stream and waits until it stores nothing any more: only then does the
// Welcome say where the sequence goes on.
func (g *ingest) enter(s *session) {
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
}

func (g *ingest) leave(s *session) {
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
		return nil, status.Errorf(codes.InvalidArgument, "batch of epoch %q in a stream of %q", b.GetEpoch(), s.epoch)
	case b.GetClass() != api.Class_CLASS_CRITICAL && b.GetClass() != api.Class_CLASS_FLOW:
		return nil, status.Errorf(codes.InvalidArgument, "class %d", b.GetClass())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, status.Errorf(codes.Aborted, "node %q opened another stream", s.node)
	}
	of := sequence{s.node, s.epoch, b.GetClass()}
	before := g.write.mark(of)
	mark, err := g.write.put(of, b.GetEntries())
	if err != nil {
		return nil, g.refuse(s, err)
	}
	g.meters.stored(b.GetClass(), b.GetEntries(), before, mark)
	return &api.Ack{Class: b.GetClass(), Epoch: s.epoch, Seq: mark}, nil
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
	case errors.Is(err, errStopping):
		return status.Error(codes.Unavailable, err.Error())
	}
	g.log.Error("batch cannot be stored", "node", s.node, "err", err)
	return status.Error(codes.Unavailable, "batch cannot be stored") // the node need not know our disk
}
