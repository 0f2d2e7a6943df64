package audit

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

const (
	// spoolEvery is how often memory is looked through for what the collector has not taken: what was there the time before
	// goes to the disk. A kill takes no more than the records of twice as long.
	spoolEvery = time.Second
	spoolItems = 1024 // at a time
)

// openSpool finds what is on the disk. A spool that cannot be read is done without, and what is in it is counted as lost.
func (s *Streamer) openSpool(ctx context.Context) (from, to uint64) {
	if s.cfg.SpoolDir == "" {
		return 0, 0
	}
	spool, err := store.OpenSpool(s.cfg.SpoolDir, s.cfg.Store.Epoch(), s.cfg.SpoolBudget)
	s.noteSpool(ctx, err)
	if err != nil {
		return 0, 0
	}
	s.spool = spool
	return spool.Range()
}

// runSpool moves to the disk what waits for the collector: what is old, and everything when memory is half full. Whoever hands
// in records never waits for it.
func (s *Streamer) runSpool(ctx context.Context) {
	tick := time.NewTicker(spoolEvery)
	defer tick.Stop()
	var before, due uint64
	failed := false
	for {
		select {
		case <-tick.C:
			due, before = before, s.lastFlow()
		case <-s.wakeSpool:
			if failed { // the next tick tries again
				continue
			}
			due = s.lastFlow()
		case <-ctx.Done():
			return
		}
		failed = s.toSpool(ctx, due) != nil
	}
}

func (s *Streamer) lastFlow() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.last
}

// toSpool moves numbers up to due from memory to the disk, and removes from it what the collector has.
func (s *Streamer) toSpool(ctx context.Context, due uint64) error {
	err := s.trimSpool()
	for more := true; more && err == nil && s.cfg.SpoolBudget > 0; {
		more, err = s.spoolSome(due)
	}
	s.noteSpool(ctx, err)
	return err
}

func (s *Streamer) trimSpool() error {
	s.mu.Lock()
	upTo := max(s.buf.disk.from, s.buf.base)
	s.mu.Unlock()
	return s.spool.Trim(upTo)
}

func (s *Streamer) spoolSome(due uint64) (more bool, err error) {
	s.mu.Lock()
	items := s.buf.oldest(due, spoolItems)
	s.mu.Unlock()
	if len(items) == 0 {
		return false, nil
	}
	if err := s.makeRoom(); err != nil {
		return false, err
	}
	entries, err := spoolEntries(items)
	if err != nil {
		return false, err
	}
	n, err := s.spool.Append(entries)
	if err != nil {
		return false, err
	}
	s.mu.Lock()
	s.buf.spooled(entries[0].First, entries[n-1].Last)
	s.mu.Unlock()
	return true, nil
}

// makeRoom has the oldest records give way to new ones. They are counted before they are removed: a kill in between leaves both,
// and the collector takes whichever comes first.
func (s *Streamer) makeRoom() error {
	for s.spool.Full() {
		oldest, err := s.spool.Oldest()
		if err != nil || len(oldest) == 0 {
			return err
		}
		items := make([]item, 0, len(oldest))
		for _, k := range oldest {
			items = append(items, spooledItem(k))
		}
		s.mu.Lock()
		s.buf.unspooled(items)
		s.mu.Unlock()
		err = s.spool.Trim(oldest[len(oldest)-1].Last)
		wake(s.wakeSend)
		if err != nil {
			return err
		}
	}
	return nil
}

// spoolEntries encodes without the number, which the collector's batch has beside the bytes.
func spoolEntries(items []item) ([]store.Spooled, error) {
	out := make([]store.Spooled, 0, len(items))
	for _, i := range items {
		e := i.entry(i.first-1, i.last)
		e.Seq = 0
		data, err := proto.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("encode flow record: %w", err)
		}
		out = append(out, store.Spooled{First: i.first, Last: i.last, Data: data})
	}
	return out, nil
}

// spooledItem is what stands in the spool; what cannot be read is a loss.
func spooledItem(k store.Spooled) item {
	i := item{first: k.First, last: k.Last}
	var e api.Entry
	if k.Data == nil || proto.Unmarshal(k.Data, &e) != nil {
		i.loss = &span{first: k.First, last: k.Last, stage: StageFlowSpool, cause: CauseDamaged}
		return i
	}
	switch l, f := e.GetLoss(), e.GetFlow(); {
	case l != nil:
		i.loss = &span{first: k.First, last: k.Last, stage: l.GetStage(), cause: l.GetCause(), from: wireTime(l.GetFrom()), to: wireTime(l.GetTo()), atMost: l.GetAtMost(), ranges: l.GetRanges()}
	case f != nil && k.First == k.Last:
		i.wire = f
	default:
		i.loss = &span{first: k.First, last: k.Last, stage: StageFlowSpool, cause: CauseDamaged}
	}
	return i
}

// nextFlow gives the entries that follow those that were sent, wherever they are. None while the disk lets some go: a wake comes.
func (s *Streamer) nextFlow(sent uint64) ([]*api.Entry, error) {
	s.mu.Lock()
	reserved := s.reserved
	entries, onDisk := s.buf.after(sent, reserved, batchEntries)
	s.mu.Unlock()
	if !onDisk {
		return entries, nil
	}
	kept, err := s.spool.Read(sent, batchEntries)
	if err != nil {
		return nil, err
	}
	for _, k := range kept {
		if k.First > reserved {
			break
		}
		i := spooledItem(k)
		if i.loss != nil && i.loss.cause == CauseDamaged {
			s.log.Error("flow records of the spool cannot be read", "records", k.Last-k.First+1)
		}
		entries = append(entries, i.entry(sent, reserved))
	}
	return entries, nil
}

func (s *Streamer) spoolBytes() uint64 {
	if s.spool == nil {
		return 0
	}
	return uint64(s.spool.Size())
}

// noteSpool keeps the state of the spool and logs its changes only.
func (s *Streamer) noteSpool(ctx context.Context, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	s.mu.Lock()
	was := s.state.spoolProblem
	s.state.spoolProblem = problem
	s.mu.Unlock()
	switch {
	case problem == was:
	case err != nil:
		s.log.WarnContext(ctx, "flow spool takes nothing", "err", err)
	default:
		s.log.InfoContext(ctx, "flow spool takes records again")
	}
}
