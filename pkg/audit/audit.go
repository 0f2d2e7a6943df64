// Package audit brings the records of a node to the collector, each once, or counts it as lost.
//
// Numbers. Every record that the node produces takes one number of its class when it is produced,
// and a LossRecord takes as many as it counts and stands at the last of them. The collector therefore
// sees a sequence without gaps, and its last number is what was delivered plus what was lost. Numbers
// are not given out at the time of sending, because what is shed or killed before that time would
// leave no trace; and they are not renumbered when something is shed, because a record may be shed
// after it was sent and before it was acknowledged: its number says at the next Welcome whether it
// arrived after all.
//
// Restarts. How many flow numbers are in use stands in a shared mapping of the store, so a process
// that was killed leaves the exact count, and the next one reports the difference with cause
// agent_restart. A mapping does not survive a power loss. Therefore numbers are also reserved durably
// in blocks, nothing above the reservation is ever sent, and after a power loss the rest of the block
// is reported with at_most. (Blocks grow with the rate. A burst that outruns the disk for a moment is
// not held up by it, so a power loss in that moment can take more than the bound says.) An orderly stop
// leaves the records themselves on the disk and loses none.
//
// Classes. Grant events and opens of bypassed flows are critical: they are in the store, on disk,
// until the collector has them. Everything else is of the flow class and lives in bounded memory. What
// the collector does not take from there within seconds, and what memory is short for, goes to a spool
// of bounded size on the disk, and is sent from there: a kill takes the records of the last seconds, and
// a collector that is away costs none that has room. On both the oldest give way. Records never wait for
// the spool: while it is slow or takes nothing, memory is all there is.
package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// Stages at which records are lost.
const (
	StageKernelRing  = "kernel_ring"
	StageProxyBuffer = "proxy_buffer"
	StageAgentMemory = "agent_spool"
	StageFlowSpool   = "flow_spool" // on the agent's disk
	StageCollector   = "collector"
	StageAgentStore  = "agent_store"
)

// Causes of losses.
const (
	CauseBufferFull   = "buffer_full"
	CauseAgentRestart = "agent_restart" // the agent was killed, or lost power (then at_most)
	CauseForgotten    = "forgotten"     // the collector acknowledged it and has it no more
	CauseUnreadable   = "unreadable"    // an entry of the store that is no record
	CauseDamaged      = "damaged"       // what the store or the spool held of them does not hold, or cannot be read
	CauseSpoolFull    = "spool_full"
	CauseSeveral      = "several"
)

// Source gives the agent's own X.509 identity and the bundles that it trusts, at every handshake anew.
type Source interface {
	x509svid.Source
	x509bundle.Source
}

// Config of a Streamer.
type Config struct {
	Store *store.Store
	Node  string // as in the agent's SPIFFE ID
	// BootID is told to the collector. Empty: the store's.
	BootID string
	// Address of the collector, host:port. Empty: there is none, and records stay on the node.
	Address  string
	Source   Source      // needed with Address
	ServerID spiffeid.ID // the collector must prove it; needed with Address
	// LogKey is the verifier key of the collector's log. Empty: the one that it shows first.
	LogKey string
	// Alarm is told when the collector shows another history than it did before. It must not wait. Nil: nobody is.
	Alarm func(why string)
	// Act does what somebody at the collector wants ended, and says so when it is durable, or why not; its id is filled in. Acts come one
	// after the other, from this collector alone, and may be anything at all. Nil: none are taken.
	Act func(ctx context.Context, act *api.Act) *api.Acted
	// FlowBuffer is how many records of the flow class are kept in memory. 0: 65536.
	FlowBuffer int
	// SpoolDir keeps records of the flow class that the collector does not take, up to SpoolBudget bytes. Empty: there is no
	// spool. With a budget of 0 what is in it is sent, and nothing more goes there.
	SpoolDir    string
	SpoolBudget int64
	// Taken are records that the process before had read from the kernel's rings and not kept: they went with it.
	Taken []*api.CPURange
	// Kept is told of opens of bypassed flows once they are durable. It must not wait. Nil: nobody is.
	Kept   func(...flow.Record)
	Logger *slog.Logger // nil: slog.Default
}

const (
	defaultFlowBuffer = 65536
	// queueLimit is how many critical flow records may wait for the disk.
	queueLimit = 4096
	// A block of reserved numbers bounds what a power loss leaves unknown. It doubles while a block
	// lasts less than reserveLasts, and halves again.
	minBlock, maxBlock = 4096, 1 << 20
	reserveLasts       = time.Second
	// maxLost keeps one report of losses from using up the numbers.
	maxLost = 1 << 40
	// stopTimeout bounds the writes of an orderly stop.
	stopTimeout = 10 * time.Second
)

// Streamer numbers, keeps and sends the records of one node.
type Streamer struct {
	cfg Config
	log *slog.Logger

	mu       sync.Mutex // guards what follows, and is never held over I/O
	buf      *buffer
	reserved uint64
	block    uint64 // numbers that reserved is ahead after a reservation
	stopped  bool
	state    connState
	queue    queue
	acked    acked
	witness  witness // written by the goroutine of the stream alone

	unsettled unsettled            // owned by whoever writes the queue
	sealer    *sealer              // owned by the goroutine of the stream; nil until its key is kept
	kept      witness              // as the store has it; owned by the goroutine of the stream
	told      map[api.Class]string // what was last told of the collector's claims; owned by the goroutine of the stream
	spool     *store.Spool         // nil: there is none

	orders chan order // acts that wait for their turn

	wakeSend    chan struct{} // capacity 1: there may be something to send
	wakeReserve chan struct{} // capacity 1: numbers are running low
	wakeWrite   chan struct{} // capacity 1: the queue is not empty
	wakeSpool   chan struct{} // capacity 1: memory is half full
}

// New takes over where the process before ended, and reports durably what it took with it: before anything else, once the
// disk takes it.
func New(cfg Config) (*Streamer, error) {
	if cfg.Store == nil || cfg.Node == "" {
		return nil, errors.New("create audit stream: store and node are needed")
	}
	if cfg.Address != "" && (cfg.Source == nil || cfg.ServerID.IsZero()) {
		return nil, errors.New("create audit stream: a collector needs an identity source and the collector's SPIFFE ID")
	}
	if cfg.BootID == "" {
		cfg.BootID = cfg.Store.BootID()
	}
	if cfg.FlowBuffer <= 0 {
		cfg.FlowBuffer = defaultFlowBuffer
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Alarm == nil {
		cfg.Alarm = func(string) {}
	}
	s := &Streamer{
		cfg: cfg, log: cfg.Logger.With("collector", cfg.Address), state: connState{since: time.Now()}, told: map[api.Class]string{},
		wakeSend: make(chan struct{}, 1), wakeReserve: make(chan struct{}, 1), wakeWrite: make(chan struct{}, 1),
		wakeSpool: make(chan struct{}, 1), orders: make(chan order, actsWaiting),
	}
	if cfg.Kept == nil {
		s.cfg.Kept = func(...flow.Record) {}
	}
	if err := s.takeOver(context.Background()); err != nil {
		return nil, fmt.Errorf("create audit stream: %w", err)
	}
	return s, nil
}

func (s *Streamer) takeOver(ctx context.Context) error {
	var err error
	if s.unsettled, err = readUnsettled(ctx, s.cfg.Store, s.cfg.Taken); err != nil {
		return err
	}
	s.queue = queue{taken: s.unsettled.queued, room: make(chan struct{})}
	st, err := s.cfg.Store.Flow(ctx)
	if err != nil {
		return err
	}
	from, to := s.openSpool(ctx)
	s.buf, s.block = restore(st, from, to, s.cfg.FlowBuffer, time.Now()), minBlock
	s.Lost(StageAgentMemory, CauseAgentRestart, s.unsettled.inHand, s.unsettled.ranges...)
	if err := s.takeWitness(ctx); err != nil {
		return err
	}
	for _, err := range []error{s.takeSeals(ctx), s.settleQueue(ctx), s.reserve(ctx)} {
		switch {
		case store.Unwritable(err): // it is tried again
			wake(s.wakeWrite)
			wake(s.wakeReserve)
		case err != nil:
			return err
		}
	}
	return nil
}

// Flow takes a record in and never blocks. Opens of bypassed flows go to the critical class while
// its queue has room. Any other record, and those that find no room there, go to the bounded memory.
func (s *Streamer) Flow(r flow.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if IsCritical(r) && s.enqueue(r) {
		return
	}
	s.number(func() { s.buf.add(r) })
}

// Critical is Flow for callers who can wait, and should: the reader of the ring on which the kernel
// puts opens of bypassed flows. It blocks while the disk is behind; the ring then fills, and the
// kernel lets no more flows by. Records that are not critical are taken as by Flow. The error is that
// of the context, and the record is then counted as lost.
func (s *Streamer) Critical(ctx context.Context, r flow.Record) error {
	if !IsCritical(r) {
		s.Flow(r)
		return nil
	}
	for {
		s.mu.Lock()
		taken, room := s.enqueue(r), s.queue.room
		s.mu.Unlock()
		if taken {
			return nil
		}
		select {
		case <-room:
		case <-ctx.Done():
			s.Lost(StageAgentMemory, CauseBufferFull, 1)
			return fmt.Errorf("wait for room: %w", ctx.Err())
		}
	}
}

// IsCritical tells whether a record belongs to the critical class.
func IsCritical(r flow.Record) bool {
	return r.Verdict == flow.VerdictBypassed && r.Event == flow.EventOpen
}

// Lost counts n records of the flow class that were lost before they got here, with those of the kernel's numbers that they had, where
// that is known. It never blocks.
func (s *Streamer) Lost(stage, cause string, n uint64, ranges ...*api.CPURange) {
	if n == 0 {
		return
	}
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.number(func() {
		s.buf.lose(span{stage: stage, cause: cause, from: now, to: now, ranges: known(ranges, n)}, min(n, maxLost))
	})
}

// maxRanges bounds a loss record.
const maxRanges = 1024

// known are ranges that stand for no more than n records.
func known(ranges []*api.CPURange, n uint64) []*api.CPURange {
	if len(ranges) > maxRanges || inRanges(ranges) > n {
		return nil
	}
	return ranges
}

func inRanges(ranges []*api.CPURange) (n uint64) {
	for _, r := range ranges {
		n += r.GetLast() - r.GetFirst() + 1
	}
	return n
}

// number gives out numbers and notes them where the next process finds them. After an orderly stop
// the numbers go on, but nothing is kept any more: the next process counts these records as lost.
func (s *Streamer) number(take func()) {
	if s.stopped {
		s.buf = &buffer{limit: 1, base: s.buf.last, last: s.buf.last}
	}
	take()
	s.cfg.Store.CountFlow(s.buf.last)
	if s.buf.last+s.block/2 > s.reserved {
		wake(s.wakeReserve)
	}
	if s.buf.held.len() > s.buf.limit/2 {
		wake(s.wakeSpool)
	}
	wake(s.wakeSend)
}

// Kick says that there are new critical entries in the store.
func (s *Streamer) Kick() {
	s.mu.Lock()
	s.queue.dirty = true
	s.mu.Unlock()
	wake(s.wakeSend)
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run writes and sends until the context ends, and then leaves in the store what was not delivered.
// Records may still be handed in while and after it ends: they are counted.
func (s *Streamer) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { s.runQueue(ctx) })
	wg.Go(func() { s.runReserve(ctx) })
	if s.spool != nil {
		wg.Go(func() { s.runSpool(ctx) })
	}
	if s.cfg.Address != "" {
		wg.Go(func() { s.runStream(ctx) })
	}
	if s.cfg.Act != nil {
		wg.Go(func() { s.runActs(ctx) })
	}
	wg.Wait()
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	return errors.Join(s.writeQueue(last), s.save(last))
}

// save leaves the bounded memory on the disk: in the spool, and in the store what has no room there or came since.
func (s *Streamer) save(ctx context.Context) error {
	if s.spool != nil {
		_ = s.toSpool(ctx, s.lastFlow()) // the store then takes it all
		defer s.spool.Close()
	}
	s.mu.Lock()
	s.stopped = true
	rest, err := s.buf.rest()
	produced, acked, notes := s.buf.last, s.buf.base, s.acked.flow.notes(noteAckedFlow)
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("save flow records: %w", err)
	}
	return s.cfg.Store.SaveFlow(ctx, produced, acked, rest, notes...)
}

// runReserve keeps the durable reservation ahead of the numbers.
func (s *Streamer) runReserve(ctx context.Context) {
	var retry backoff
	last := time.Now()
	for {
		select {
		case <-s.wakeReserve:
		case <-ctx.Done():
			return
		}
		s.resize(time.Since(last))
		for s.reserve(ctx) != nil && retry.wait(ctx) {
		}
		retry, last = backoff{}, time.Now()
	}
}

// resize fits the block to the rate: lasted is how long the one before did.
func (s *Streamer) resize(lasted time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if lasted < reserveLasts {
		s.block = min(2*s.block, maxBlock)
	} else {
		s.block = max(s.block/2, minBlock)
	}
}

func (s *Streamer) reserve(ctx context.Context) error {
	s.mu.Lock()
	upTo, acked, notes := s.buf.last+s.block, s.buf.base, s.acked.flow.notes(noteAckedFlow)
	s.mu.Unlock()
	err := s.cfg.Store.ReserveFlow(ctx, upTo, acked, notes...)
	s.noteStore(ctx, err)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.reserved = max(s.reserved, upTo)
	s.mu.Unlock()
	wake(s.wakeSend)
	return nil
}
