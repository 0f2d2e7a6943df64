package audit

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// Status is how the stream stands.
type Status struct {
	Address   string    // of the collector, empty if there is none
	Connected bool      // the collector has answered with its Welcome
	Since     time.Time // of Connected
	// Problem is why the collector is away, in words for people; empty while Connected.
	Problem string
	// StoreProblem is why critical records cannot be written; empty if they can.
	StoreProblem string
	// SpoolProblem is why flow records cannot be kept on the disk; empty if they can.
	SpoolProblem string

	CriticalPending uint64 // numbers that the collector has not acknowledged, those in the queue included
	FlowPending     uint64 // flow records in memory that the collector has not acknowledged
	FlowSpooled     uint64 // numbers of the flow class on the disk that the collector has not acknowledged
	SpoolBytes      uint64 // that the flow spool takes on the disk
	FlowProduced    uint64 // numbers of the flow class given out in this epoch
	FlowShed        uint64 // flow records that this process had to let go for want of room
	FlowLost        uint64 // numbers that are going to be, or wait to be, reported as lost

	LogSize int64 // leaves of the collector's log at the latest checkpoint that the node has
	// LogProblem is why the log that the collector shows is not the one that it was; empty: it is.
	LogProblem string
}

type connState struct {
	connected    bool
	since        time.Time
	problem      string
	storeProblem string
	spoolProblem string
}

// Status returns how the stream stands now.
func (s *Streamer) Status(ctx context.Context) (Status, error) {
	last, acked, err := s.cfg.Store.Seqs(ctx)
	if err != nil {
		return Status{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	held, spooled := s.buf.records(), s.buf.disk.to-s.buf.disk.from
	return Status{
		Address: s.cfg.Address, Connected: s.state.connected, Since: s.state.since, Problem: s.state.problem,
		StoreProblem: s.state.storeProblem, SpoolProblem: s.state.spoolProblem,
		CriticalPending: last - acked + uint64(len(s.queue.waiting)+s.queue.writing), FlowPending: held,
		FlowSpooled: spooled, SpoolBytes: s.spoolBytes(),
		FlowProduced: s.buf.last, FlowShed: s.buf.shed, FlowLost: s.buf.last - s.buf.base - held - spooled,
		LogSize: s.witness.latest.Size, LogProblem: s.witness.problem,
	}, nil
}

// noteConn keeps the state of the connection and logs its changes only.
func (s *Streamer) noteConn(ctx context.Context, err error) {
	s.mu.Lock()
	was := s.state
	s.state.connected, s.state.problem = err == nil, ""
	if err != nil {
		s.state.problem = err.Error()
	}
	if s.state.connected != was.connected || was.since.IsZero() {
		s.state.since = time.Now()
	}
	now := s.state
	s.mu.Unlock()
	if now.connected != was.connected || now.problem != was.problem {
		if err != nil {
			s.log.WarnContext(ctx, "collector is away", "err", err)
			return
		}
		s.log.InfoContext(ctx, "collector is connected")
	}
}

// noteStore does the same for the store.
func (s *Streamer) noteStore(ctx context.Context, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	s.mu.Lock()
	was := s.state.storeProblem
	s.state.storeProblem = problem
	s.mu.Unlock()
	if problem == was {
		return
	}
	if err != nil {
		s.log.ErrorContext(ctx, "audit store cannot be written", "err", err)
		return
	}
	s.log.InfoContext(ctx, "audit store can be written again")
}

// backoff waits longer each time, with jitter, so that the nodes of a fleet do not come back at once.
type backoff struct{ last time.Duration }

const (
	firstWait = 100 * time.Millisecond
	maxWait   = 15 * time.Second
)

// wait returns false when the context ended.
func (b *backoff) wait(ctx context.Context) bool {
	b.last = min(max(2*b.last, firstWait), maxWait)
	t := time.NewTimer(b.last/2 + rand.N(b.last/2))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
