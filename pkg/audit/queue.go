package audit

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// queue holds critical flow records on their way to the disk, so that many share one fsync. It is
// guarded by the Streamer's mu.
type queue struct {
	waiting []flow.Record
	writing int           // taken out of waiting, not durable yet
	taken   uint64        // ever, in this epoch
	dirty   bool          // the store has entries that the stream has not read
	room    chan struct{} // closed, and replaced, when there is room again
}

// enqueue counts first: a kill between the two steps is a loss too many, never one too few.
func (s *Streamer) enqueue(r flow.Record) bool {
	q := &s.queue
	if s.stopped || len(q.waiting)+q.writing >= queueLimit {
		return false
	}
	q.taken++
	s.cfg.Store.CountQueued(q.taken)
	q.waiting = append(q.waiting, r)
	wake(s.wakeWrite)
	return true
}

func (s *Streamer) runQueue(ctx context.Context) {
	var retry backoff
	for {
		select {
		case <-s.wakeWrite:
		case <-ctx.Done():
			return
		}
		for s.writeQueue(ctx) != nil && retry.wait(ctx) {
		}
		retry = backoff{}
	}
}

// writeQueue makes durable what waits. On an error all of it waits again.
func (s *Streamer) writeQueue(ctx context.Context) error {
	if err := s.settleQueue(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	batch := s.queue.waiting
	s.queue.waiting, s.queue.writing = nil, len(batch)
	s.mu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	err := s.appendFlows(ctx, batch)
	s.noteStore(ctx, err)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue.writing = 0
	if err != nil {
		s.queue.waiting = append(batch, s.queue.waiting...)
		return err
	}
	s.cfg.Kept(batch...)
	s.queue.dirty = true
	close(s.queue.room)
	s.queue.room = make(chan struct{})
	wake(s.wakeSend)
	return nil
}

func (s *Streamer) appendFlows(ctx context.Context, batch []flow.Record) error {
	items := make([]store.Item, 0, len(batch))
	for _, r := range batch {
		data, err := proto.Marshal(&api.Entry{Record: &api.Entry_Flow{Flow: FlowToAPI(r)}})
		if err != nil {
			return fmt.Errorf("encode flow record: %w", err)
		}
		items = append(items, store.Item{Data: data, Queued: true})
	}
	_, err := s.cfg.Store.AppendAll(ctx, items)
	return err
}

// unsettled is what the process before had taken in and not made durable, to be told before anything else is.
type unsettled struct {
	items  []store.Item
	queued uint64          // ever, when it was read
	inHand uint64          // records that it had read from the kernel, and did not get to queue or to number
	ranges []*api.CPURange // of these, where they are known
}

// readUnsettled says what is gone; taken are the kernel's numbers of what was read and not kept, those in the queue among them.
func readUnsettled(ctx context.Context, st *store.Store, taken []*api.CPURange) (unsettled, error) {
	u := unsettled{queued: st.Queued()}
	n, unsure, err := st.Unsettled(ctx)
	if err != nil {
		return u, err
	}
	if all := inRanges(taken); all > n {
		u.inHand = all - n
	}
	if n == 0 {
		u.ranges = taken
	}
	add := func(n uint64, atMost bool, ranges []*api.CPURange) error {
		data, err := proto.Marshal(&api.Entry{Record: &api.Entry_Loss{Loss: &api.LossRecord{
			Stage: StageAgentMemory, Cause: CauseAgentRestart, Count: n, To: timestamp(time.Now()), AtMost: atMost,
			Ranges: ranges,
		}}})
		u.items = append(u.items, store.Item{Data: data, Numbers: n})
		return err
	}
	if n > 0 {
		var ranges []*api.CPURange
		if inRanges(taken) == n {
			ranges = known(taken, n)
		}
		err = add(n, false, ranges)
	}
	if unsure {
		err = errors.Join(err, add(queueLimit, true, nil))
	}
	return u, err
}

// settleQueue makes durable what the process before took with it. It is called by one goroutine at a time.
func (s *Streamer) settleQueue(ctx context.Context) error {
	if len(s.unsettled.items) == 0 {
		return nil
	}
	err := s.cfg.Store.Settle(ctx, s.unsettled.items, s.unsettled.queued)
	s.noteStore(ctx, err)
	if err == nil {
		s.unsettled.items = nil
	}
	return err
}
