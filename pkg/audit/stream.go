package audit

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

const (
	wireVersion   = 1
	batchEntries  = 512
	batchBytes    = 1 << 20
	batchesAhead  = 8 // batches of one class on the way, not acknowledged yet
	welcomeWithin = 30 * time.Second
)

// runStream connects again and again.
func (s *Streamer) runStream(ctx context.Context) {
	var retry backoff
	for {
		welcomed, err := s.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		s.noteConn(ctx, err)
		if welcomed {
			retry = backoff{}
		}
		if !retry.wait(ctx) {
			return
		}
	}
}

// connect makes one connection and works on it until it breaks. It returns no nil error.
func (s *Streamer) connect(ctx context.Context) (welcomed bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	creds := grpccredentials.MTLSClientCredentials(s.cfg.Source, s.cfg.Source, tlsconfig.AuthorizeID(s.cfg.ServerID))
	conn, err := grpc.NewClient("passthrough:///"+s.cfg.Address, grpc.WithTransportCredentials(creds),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}))
	if err != nil {
		return false, fmt.Errorf("dial collector: %w", err)
	}
	defer conn.Close()
	stream, err := api.NewAuditIngestClient(conn).Stream(ctx)
	if err != nil {
		return false, fmt.Errorf("open stream: %w", err)
	}
	ss := &session{Streamer: s, stream: stream, acks: make(chan *api.Ack, 2*batchesAhead), broken: make(chan error, 1)}
	if err := ss.hello(cancel); err != nil {
		return false, err
	}
	s.noteConn(ctx, nil)
	go ss.receive(ctx)
	return true, ss.send(ctx)
}

// session is one stream to the collector. It is owned by send, but for receive's channels.
type session struct {
	*Streamer
	stream api.AuditIngest_StreamClient
	acks   chan *api.Ack
	broken chan error // capacity 1

	critical, flow cursor
}

// cursor is how far one class was sent, and what of it is not acknowledged.
type cursor struct {
	sent  uint64
	ahead []uint64 // last numbers of batches on the way
}

func (c *cursor) advance(to uint64) {
	c.sent = to
	c.ahead = append(c.ahead, to)
}

func (c *cursor) ack(seq uint64) error {
	if seq > c.sent {
		return fmt.Errorf("collector acknowledges number %d, sent was %d", seq, c.sent)
	}
	for len(c.ahead) > 0 && c.ahead[0] <= seq {
		c.ahead = c.ahead[1:]
	}
	return nil
}

func (c *cursor) full() bool { return len(c.ahead) >= batchesAhead }

// hello introduces the node and takes up the sequence where the collector has it.
func (ss *session) hello(cancel context.CancelFunc) error {
	late := time.AfterFunc(welcomeWithin, cancel)
	defer late.Stop()
	err := ss.stream.Send(&api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: &api.Hello{
		Node: ss.cfg.Node, BootId: ss.cfg.BootID, Epoch: ss.cfg.Store.Epoch(), Version: wireVersion,
	}}})
	frame, recvErr := ss.stream.Recv() // it has the reason when Send has none
	if err := errors.Join(err, recvErr); err != nil {
		return fmt.Errorf("greet collector: %w", recvErr)
	}
	w := frame.GetWelcome()
	if w == nil {
		return errors.New("greet collector: it answered with another frame")
	}
	return ss.resume(w)
}

func (ss *session) resume(w *api.Welcome) error {
	last, acked, err := ss.cfg.Store.Seqs(ss.stream.Context())
	if err != nil {
		return err
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if w.GetCriticalSeq() > last || w.GetFlowSeq() > ss.buf.last {
		return fmt.Errorf("collector has entries up to %d (critical) and %d (flow) of epoch %s, this node only to %d and %d: "+
			"the store was set back; move it aside to begin a new epoch", w.GetCriticalSeq(), w.GetFlowSeq(), ss.cfg.Store.Epoch(), last, ss.buf.last)
	}
	ss.critical.sent, ss.flow.sent = w.GetCriticalSeq(), w.GetFlowSeq()
	if ss.critical.sent > acked {
		ss.acks <- &api.Ack{Class: api.Class_CLASS_CRITICAL, Epoch: ss.cfg.Store.Epoch(), Seq: ss.critical.sent}
	}
	ss.buf.ack(w.GetFlowSeq())
	ss.buf.forgotten(w.GetFlowSeq())
	ss.queue.dirty = true
	return nil
}

func (ss *session) receive(ctx context.Context) {
	for {
		frame, err := ss.stream.Recv()
		if err == nil && frame.GetAck() == nil {
			err = errors.New("it sent no acknowledgement")
		}
		if err != nil {
			ss.broken <- fmt.Errorf("read from collector: %w", err)
			return
		}
		select {
		case ss.acks <- frame.GetAck():
		case <-ctx.Done():
			return
		}
	}
}

// send sends what there is and waits for more, critical entries first.
func (ss *session) send(ctx context.Context) error {
	for {
		if err := ss.sendReady(ctx); err != nil {
			return err
		}
		select {
		case a := <-ss.acks:
			if err := ss.acked(ctx, a); err != nil {
				return err
			}
		case <-ss.wakeSend:
		case err := <-ss.broken:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (ss *session) sendReady(ctx context.Context) error {
	for {
		sentCritical, err := ss.sendCritical(ctx)
		if err != nil {
			return err
		}
		sentFlow, err := ss.sendFlow()
		if err != nil {
			return err
		}
		if !sentCritical && !sentFlow {
			return nil
		}
	}
}

func (ss *session) acked(ctx context.Context, a *api.Ack) error {
	if a.GetEpoch() != ss.cfg.Store.Epoch() {
		return fmt.Errorf("collector acknowledges epoch %q", a.GetEpoch())
	}
	switch a.GetClass() {
	case api.Class_CLASS_CRITICAL:
		if err := ss.critical.ack(a.GetSeq()); err != nil {
			return err
		}
		return ss.cfg.Store.Ack(ctx, a.GetSeq())
	case api.Class_CLASS_FLOW:
		if err := ss.flow.ack(a.GetSeq()); err != nil {
			return err
		}
		ss.mu.Lock()
		ss.buf.ack(a.GetSeq())
		ss.mu.Unlock()
		return nil
	}
	return fmt.Errorf("collector acknowledges class %s", a.GetClass())
}

func (ss *session) sendFlow() (bool, error) {
	if ss.flow.full() {
		return false, nil
	}
	entries, err := ss.nextFlow(ss.flow.sent)
	if err != nil {
		return false, err
	}
	return ss.sendBatch(api.Class_CLASS_FLOW, &ss.flow, entries)
}

func (ss *session) sendCritical(ctx context.Context) (bool, error) {
	ss.mu.Lock()
	dirty := ss.queue.dirty && !ss.critical.full()
	if dirty {
		ss.queue.dirty = false
	}
	ss.mu.Unlock()
	if !dirty {
		return false, nil
	}
	entries, err := ss.readCritical(ctx)
	if err != nil {
		return false, err
	}
	sent, err := ss.sendBatch(api.Class_CLASS_CRITICAL, &ss.critical, entries)
	if sent { // there may be more
		ss.mu.Lock()
		ss.queue.dirty = true
		ss.mu.Unlock()
	}
	return sent, err
}

// readCritical reads the next entries from the store. What the store no longer has, because the
// collector acknowledged it and lost it since, becomes a loss; so does what cannot be read.
func (ss *session) readCritical(ctx context.Context) ([]*api.Entry, error) {
	last, acked, err := ss.cfg.Store.Seqs(ctx)
	if err != nil {
		return nil, err
	}
	stored, err := ss.cfg.Store.Entries(ctx, ss.critical.sent, batchEntries)
	if err != nil {
		return nil, err
	}
	var out []*api.Entry
	next, size := ss.critical.sent, 0
	if gone := min(acked, last); gone > next {
		out = append(out, span{first: next + 1, last: gone, stage: StageCollector, cause: CauseForgotten}.entry(next, gone))
		next = gone
	}
	for _, st := range stored {
		if size += len(st.Data); size > batchBytes && len(out) > 0 {
			break
		}
		out = append(out, criticalEntry(next, st.Seq, st.Data))
		next = st.Seq
	}
	return out, nil
}

func criticalEntry(prev, seq uint64, data []byte) *api.Entry {
	var e api.Entry
	if err := proto.Unmarshal(data, &e); err != nil || e.GetRecord() == nil {
		return span{first: prev + 1, last: seq, stage: StageAgentMemory, cause: CauseUnreadable}.entry(prev, seq)
	}
	e.Seq = seq
	return &e
}

func (ss *session) sendBatch(class api.Class, c *cursor, entries []*api.Entry) (bool, error) {
	if len(entries) == 0 {
		return false, nil
	}
	c.advance(entries[len(entries)-1].GetSeq())
	err := ss.stream.Send(&api.AgentFrame{Frame: &api.AgentFrame_Batch{Batch: &api.Batch{
		Class: class, Epoch: ss.cfg.Store.Epoch(), Entries: entries,
	}}})
	if err == nil {
		return true, nil
	}
	select { // the status is with Recv
	case err = <-ss.broken:
	case <-time.After(time.Second):
	}
	return false, fmt.Errorf("send batch: %w", err)
}
