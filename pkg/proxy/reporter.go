package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

const (
	maxFrame    = 512                    // records in one frame
	framePause  = 5 * time.Millisecond   // between frames that are not full: what comes meanwhile goes with the next
	minRedial   = 100 * time.Millisecond // doubles up to maxRedial, with jitter
	maxRedial   = 3 * time.Second
	maxUnacked  = 8192 // records under way
	defaultHold = 32768
)

// ReporterConfig of a reporter.
type ReporterConfig struct {
	Socket  string // Unix socket of the agent's ProxyReport service
	Version string
	// Hold is how many records are kept in memory until the agent has them; 0: 32768.
	Hold   int
	Logger *slog.Logger
}

// Reporter hands flow records to the agent. It numbers them, keeps each until the agent has
// acknowledged it, and sends again after a broken stream. When there is no room, records are lost;
// a lost one leaves its number out, so that the agent can count even what was not yet told to it.
type Reporter struct {
	cfg      ReporterConfig
	instance string
	started  time.Time

	mu    sync.Mutex
	next  uint64            // guarded by mu; number of the next record
	acked uint64            // guarded by mu; the agent knows of all up to here
	held  []*api.FlowRecord // guarded by mu; ascending numbers above acked
	lost  uint64            // guarded by mu; ever
	wake  chan struct{}     // has room for one
}

// NewReporter makes a reporter that collects records until Run sends them.
func NewReporter(cfg ReporterConfig) *Reporter {
	if cfg.Hold <= 0 {
		cfg.Hold = defaultHold
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Reporter{
		cfg: cfg, instance: ulid.Make().String(), started: time.Now(), next: 1, wake: make(chan struct{}, 1),
	}
}

// Report takes a record. It never blocks.
func (r *Reporter) Report(rec flow.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec.CPU, rec.Seq = -1, r.next
	r.next++
	if len(r.held) >= r.cfg.Hold {
		r.lost++
		return
	}
	r.held = append(r.held, toWire(rec))
	r.nudge()
}

// Lost is how many records there was no room for.
func (r *Reporter) Lost() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lost
}

// Waiting is how many records the agent has not acknowledged.
func (r *Reporter) Waiting() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.held)
}

// Flush returns nil when the agent has everything that was reported before, or ctx's error. Run
// must be running.
func (r *Reporter) Flush(ctx context.Context) error {
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		if r.settled() {
			return nil
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return fmt.Errorf("hand over %d flow records: %w", r.Waiting(), ctx.Err())
		}
	}
}

// settled: the agent knows of every number.
func (r *Reporter) settled() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.acked == r.next-1
}

// Run sends until ctx ends, and returns nil then. An agent that is away is tried again and again.
func (r *Reporter) Run(ctx context.Context) error {
	conn, err := grpc.NewClient("unix:"+r.cfg.Socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the agent checks who opened its socket
		grpc.WithNoProxy())
	if err != nil {
		return fmt.Errorf("open agent's socket %s: %w", r.cfg.Socket, err)
	}
	defer conn.Close()
	away := false
	for wait := minRedial; ; wait = min(2*wait, maxRedial) {
		began := time.Now()
		err := r.stream(ctx, api.NewProxyReportClient(conn))
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > maxRedial { // it was there
			wait, away = minRedial, false
		}
		if !away {
			r.cfg.Logger.Warn("agent takes no flow records", "error", err, "waiting", r.Waiting(), "lost", r.Lost())
			away = true
		}
		conn.ResetConnectBackoff() // ours is the one that counts
		select {
		case <-time.After(wait/2 + rand.N(wait/2)):
		case <-ctx.Done():
			return nil
		}
	}
}

// stream speaks to the agent until something breaks.
func (r *Reporter) stream(ctx context.Context, client api.ProxyReportClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Report(ctx)
	if err != nil {
		return err
	}
	hello := &api.ProxyHello{Version: r.cfg.Version, Started: timestamppb.New(r.started), Instance: r.instance}
	if err := stream.Send(&api.ProxyFrame{Frame: &api.ProxyFrame_Hello{Hello: hello}}); err != nil {
		return receiveError(stream, err)
	}
	broken := make(chan error, 1)
	go func() { broken <- r.receive(stream) }()
	err = r.send(ctx, stream, broken)
	cancel()
	return err
}

// send sends what is held and not yet sent on this stream. A frame costs the agent and the proxy more than the records in it: what
// comes alone goes at once, and what follows it goes together.
func (r *Reporter) send(ctx context.Context, stream api.ProxyReport_ReportClient, broken <-chan error) error {
	sent := r.ackedSeq()
	for {
		frame, last := r.frame(sent)
		if frame != nil {
			if err := stream.Send(&api.ProxyFrame{Frame: &api.ProxyFrame_Records{Records: frame}}); err != nil {
				return receiveErrorOf(broken, err)
			}
			sent = last
			if len(frame.Records) < maxFrame {
				if err := await(ctx, time.After(framePause), broken); err != nil {
					return err
				}
			}
			continue
		}
		if err := await(ctx, r.wake, broken); err != nil {
			return err
		}
	}
}

// await waits for something to come, unless the stream breaks or ctx ends before.
func await[T any](ctx context.Context, comes <-chan T, broken <-chan error) error {
	select {
	case <-comes:
		return nil
	case err := <-broken:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// frame gives the next records above sent, and how many numbers up to its last one were lost. It
// gives nil when there is nothing to send, or too much under way.
func (r *Reporter) frame(sent uint64) (frame *api.ProxyRecords, last uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := 0
	for first < len(r.held) && r.held[first].Seq <= sent {
		first++
	}
	if last := r.next - 1; len(r.held) == 0 && sent < last { // the latest were lost
		return &api.ProxyRecords{Lost: last - sent, Last: last}, last
	}
	if first == len(r.held) || first >= maxUnacked {
		return nil, 0
	}
	records := r.held[first:min(first+maxFrame, len(r.held))]
	last = records[len(records)-1].Seq
	frame = &api.ProxyRecords{
		Records: append([]*api.FlowRecord(nil), records...), // acknowledging moves held
		Lost:    last - sent - uint64(len(records)),
		Last:    last,
	}
	return frame, last
}

// receive takes acknowledgements until the stream breaks.
func (r *Reporter) receive(stream api.ProxyReport_ReportClient) error {
	for {
		ack, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return errors.New("agent ended the stream")
		}
		if err != nil {
			return err
		}
		r.acknowledge(ack.GetSeq())
	}
}

func (r *Reporter) acknowledge(seq uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.acked = max(r.acked, min(seq, r.next-1))
	keep := 0
	for keep < len(r.held) && r.held[keep].Seq <= seq {
		keep++
	}
	if keep == 0 {
		return
	}
	r.held = slices.Delete(r.held, 0, keep)
	r.nudge()
}

func (r *Reporter) ackedSeq() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.acked
}

// nudge wakes the sender. mu is held.
func (r *Reporter) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// receiveError finds out why a stream of which only sending failed has ended.
func receiveError(stream api.ProxyReport_ReportClient, sendErr error) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	return sendErr
}

func receiveErrorOf(broken <-chan error, sendErr error) error {
	if !errors.Is(sendErr, io.EOF) {
		return sendErr
	}
	return <-broken
}
