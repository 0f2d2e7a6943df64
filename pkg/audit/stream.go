package audit

import (
	"bytes"
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
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

const (
	wireVersion   = 2
	batchEntries  = 512
	batchBytes    = 1 << 20
	batchesAhead  = 8 // batches of one class on the way, not acknowledged yet
	welcomeWithin = 30 * time.Second
	goodAfter     = time.Minute // a connection that lasts as long was worth something
)

// runStream connects again and again, and waits longer each time that nothing comes of it: a collector that only greets and hangs up
// would be met without end.
func (s *Streamer) runStream(ctx context.Context) {
	var retry backoff
	for {
		good, err := s.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		s.noteConn(ctx, err)
		if good {
			retry = backoff{}
		}
		if !retry.wait(ctx) {
			return
		}
	}
}

// connect makes one connection and works on it until it breaks. It returns no nil error, and whether the connection was good for
// anything: the collector took records, or it lasted.
func (s *Streamer) connect(ctx context.Context) (good bool, err error) {
	began := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Nobody but the collector of our configuration gets past this: records go to it alone, and acts come from it alone.
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
	ss := &session{Streamer: s, stream: stream, frames: make(chan *api.CollectorFrame, 2*batchesAhead), broken: make(chan error, 1),
		answers: make(chan *api.Acted, 2*actsWaiting)}
	defer func() { err = errors.Join(err, ss.keepLast(ctx)) }()
	if err := ss.hello(ctx, cancel); err != nil {
		return false, err
	}
	s.noteConn(ctx, nil)
	go ss.receive(ctx)
	err = ss.send(ctx)
	return ss.taken || time.Since(began) >= goodAfter, err
}

// session is one stream to the collector. It is owned by send, but for receive's channels.
type session struct {
	*Streamer
	stream api.AuditIngest_StreamClient
	frames chan *api.CollectorFrame
	broken chan error // capacity 1

	answers chan *api.Acted // to acts

	critical, flow cursor
	taken          bool // the collector acknowledged something
	disputed       bool // the log that the collector shows is not the one that the node knows
}

// cursor is how far one class was sent, and what of it is not acknowledged.
type cursor struct {
	sent  uint64
	seal  link   // that the next one follows
	ahead []link // seals of batches on the way
}

func (c *cursor) advance(l link) {
	c.sent, c.seal = l.last, l
	c.ahead = append(c.ahead, l)
}

// ack finds the seal that is acknowledged, with those before it. The collector has whole batches, or nothing of them.
func (c *cursor) ack(a *api.Ack) (link, error) {
	for i, l := range c.ahead {
		if l.last == a.GetSeq() && l.number == a.GetNumber() {
			c.ahead = c.ahead[i+1:]
			return l, nil
		}
	}
	return link{}, fmt.Errorf("collector acknowledges number %d by seal %d, which is not on the way; sent was %d", a.GetSeq(), a.GetNumber(), c.sent)
}

func (c *cursor) full() bool { return len(c.ahead) >= batchesAhead }

// hello introduces the node and takes up the sequence where the collector has it.
func (ss *session) hello(ctx context.Context, cancel context.CancelFunc) error {
	if err := ss.takeSeals(ctx); err != nil {
		return err
	}
	late := time.AfterFunc(welcomeWithin, cancel)
	defer late.Stop()
	err := ss.stream.Send(&api.AgentFrame{Frame: &api.AgentFrame_Hello{Hello: &api.Hello{
		Node: ss.cfg.Node, BootId: ss.cfg.BootID, Epoch: ss.cfg.Store.Epoch(), Version: wireVersion,
		NodeKey: ss.sealer.vkey, Checkpoint: ss.witness.signed, Acts: ss.cfg.Act != nil,
	}}})
	frame, recvErr := ss.stream.Recv() // it has the reason when Send has none
	if err := errors.Join(err, recvErr); err != nil {
		return fmt.Errorf("greet collector: %w", recvErr)
	}
	w := frame.GetWelcome()
	if w == nil {
		return errors.New("greet collector: it answered with another frame")
	}
	if w.GetVersion() != wireVersion {
		return fmt.Errorf("greet collector: it speaks version %d of the stream, this node %d", w.GetVersion(), wireVersion)
	}
	if err := ss.meetLog(ctx, w); err != nil {
		return err
	}
	return ss.resume(ctx, w)
}

// resume takes up both classes where the collector has them. What it has and did not get to acknowledge is acknowledged by that.
func (ss *session) resume(ctx context.Context, w *api.Welcome) error {
	last, _, err := ss.cfg.Store.Seqs(ctx)
	if err != nil {
		return err
	}
	ss.mu.Lock()
	lastFlow, kept := ss.buf.last, ss.acked
	ss.mu.Unlock()
	if w.GetCriticalSeq() > last || w.GetFlowSeq() > lastFlow {
		return fmt.Errorf("collector has entries up to %d (critical) and %d (flow) of epoch %s, this node only to %d and %d: "+
			"the store was set back; move it aside to begin a new epoch", w.GetCriticalSeq(), w.GetFlowSeq(), ss.cfg.Store.Epoch(), last, lastFlow)
	}
	ss.critical = ss.place(ctx, api.Class_CLASS_CRITICAL, kept.critical, w.GetCriticalSeq(), w.GetCriticalSeal())
	ss.flow = ss.place(ctx, api.Class_CLASS_FLOW, kept.flow, w.GetFlowSeq(), w.GetFlowSeal())
	if err := ss.ackCritical(ctx, ss.critical.seal); err != nil {
		return err
	}
	ss.ackFlow(ss.flow.seal)
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.buf.forgotten(ss.flow.sent)
	ss.queue.dirty = true
	return nil
}

// place is where a class goes on, told loudly where the collector is not as it was left: once, however often it says the same.
func (ss *session) place(ctx context.Context, class api.Class, kept link, at uint64, signed []byte) cursor {
	c, why := ss.sealer.judge(class, kept, at, signed)
	if why != "" && why != ss.told[class] {
		ss.told[class] = why
		ss.log.ErrorContext(ctx, "collector is not as it was left", "why", why)
		ss.cfg.Alarm("the collector " + ss.cfg.Address + ": " + why)
	}
	return c
}

func (ss *session) receive(ctx context.Context) {
	for {
		frame, err := ss.stream.Recv()
		if err != nil {
			ss.broken <- fmt.Errorf("read from collector: %w", err)
			return
		}
		if act := frame.GetAct(); act != nil {
			ss.order(ctx, act)
			continue
		}
		select {
		case ss.frames <- frame:
		case <-ctx.Done():
			return
		}
	}
}

// send sends what there is and waits for more, critical entries first.
func (ss *session) send(ctx context.Context) error {
	keep := time.NewTicker(keepEvery)
	defer keep.Stop()
	for {
		if err := ss.sendReady(ctx); err != nil {
			return err
		}
		select {
		case f := <-ss.frames:
			if err := ss.take(ctx, f); err != nil {
				return err
			}
		case a := <-ss.answers:
			if err := ss.deliver(&api.AgentFrame{Frame: &api.AgentFrame_Acted{Acted: a}}); err != nil {
				return err
			}
		case <-ss.wakeSend:
		case <-keep.C:
			if err := ss.keepWitness(ctx); err != nil {
				return err
			}
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

func (ss *session) take(ctx context.Context, f *api.CollectorFrame) error {
	switch {
	case f.GetAck() != nil:
		return ss.takeAck(ctx, f.GetAck())
	case f.GetGrown() != nil:
		ss.grow(ctx, f.GetGrown())
		return nil
	}
	return errors.New("collector sent neither an acknowledgement nor a checkpoint")
}

func (ss *session) takeAck(ctx context.Context, a *api.Ack) error {
	if a.GetEpoch() != ss.cfg.Store.Epoch() {
		return fmt.Errorf("collector acknowledges epoch %q", a.GetEpoch())
	}
	switch a.GetClass() {
	case api.Class_CLASS_CRITICAL:
		l, err := ss.critical.ack(a)
		if err != nil {
			return err
		}
		ss.taken = true
		return ss.ackCritical(ctx, l)
	case api.Class_CLASS_FLOW:
		l, err := ss.flow.ack(a)
		if err != nil {
			return err
		}
		ss.taken = true
		ss.ackFlow(l)
		return nil
	}
	return fmt.Errorf("collector acknowledges class %s", a.GetClass())
}

// ackCritical has the store forget what the seal covers and keep the seal, in one write: the chain goes on from there.
func (ss *session) ackCritical(ctx context.Context, l link) error {
	if l.number == ss.acked.critical.number && bytes.Equal(l.signed, ss.acked.critical.signed) {
		return nil
	}
	if err := ss.cfg.Store.Ack(ctx, l.last, l.notes(noteAckedCritical)...); err != nil {
		return err
	}
	ss.mu.Lock()
	ss.acked.critical = l
	ss.mu.Unlock()
	return nil
}

// ackFlow forgets what the seal covers. Both are durable with the next reservation: until then the collector's Welcome tells it, and to a
// store that was damaged its count, as no collector knows of the epoch that begins then.
func (ss *session) ackFlow(l link) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.acked.flow = l
	ss.buf.ack(l.last)
	ss.cfg.Store.CountFlowAcked(l.last)
}

func (ss *session) sendFlow() (bool, error) {
	if ss.flow.full() {
		return false, nil
	}
	entries, err := ss.nextFlow(ss.flow.sent)
	if err != nil {
		return false, err
	}
	sealed, err := encodeAll(entries)
	if err != nil {
		return false, err
	}
	return ss.sendBatch(api.Class_CLASS_FLOW, &ss.flow, sealed)
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
func (ss *session) readCritical(ctx context.Context) ([]entry, error) {
	last, acked, err := ss.cfg.Store.Seqs(ctx)
	if err != nil {
		return nil, err
	}
	stored, err := ss.cfg.Store.Entries(ctx, ss.critical.sent, batchEntries)
	if err != nil {
		return nil, err
	}
	var out []entry
	next, size := ss.critical.sent, 0
	if gone := min(acked, last); gone > next {
		e, err := encode(span{first: next + 1, last: gone, stage: StageCollector, cause: CauseForgotten}.entry(next, gone))
		if err != nil {
			return nil, err
		}
		out, next = append(out, e), gone
	}
	for _, st := range stored {
		if size += len(st.Data); size > batchBytes && len(out) > 0 {
			break
		}
		e, err := criticalEntry(next, st.Seq, st.Data)
		if err != nil {
			return nil, err
		}
		out, next = append(out, e), st.Seq
	}
	return out, nil
}

// criticalEntry seals the bytes that the store has, as they are.
func criticalEntry(prev, seq uint64, data []byte) (entry, error) {
	var e api.Entry
	if err := proto.Unmarshal(data, &e); err != nil || e.GetRecord() == nil {
		return encode(span{first: prev + 1, last: seq, stage: StageAgentMemory, cause: CauseUnreadable}.entry(prev, seq))
	}
	return entry{proof.Entry{Seq: seq, Data: data}, e.GetLoss().GetCount()}, nil
}

func (ss *session) sendBatch(class api.Class, c *cursor, entries []entry) (bool, error) {
	if len(entries) == 0 {
		return false, nil
	}
	seal, err := ss.sealer.seal(class, c.seal, c.sent, entries)
	if err != nil {
		return false, err
	}
	c.advance(seal)
	raw := make([]*api.Raw, 0, len(entries))
	for _, e := range entries {
		raw = append(raw, &api.Raw{Seq: e.Seq, Data: e.Data})
	}
	err = ss.deliver(&api.AgentFrame{Frame: &api.AgentFrame_Batch{Batch: &api.Batch{
		Class: class, Epoch: ss.cfg.Store.Epoch(), Raw: raw, Seal: seal.signed,
	}}})
	return err == nil, err
}

func (ss *session) deliver(f *api.AgentFrame) error {
	err := ss.stream.Send(f)
	if err == nil {
		return nil
	}
	select { // the status is with Recv
	case err = <-ss.broken:
	case <-time.After(time.Second):
	}
	return fmt.Errorf("send to collector: %w", err)
}
