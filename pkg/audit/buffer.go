package audit

import (
	"sort"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// buffer is the bounded memory of the flow class. Every number above base and up to last belongs to
// exactly one of: a span of lost (the oldest ones), a held record, or a held span of losses that were
// reported to us. It is not safe for concurrent use.
type buffer struct {
	limit int    // of held, in items
	base  uint64 // the collector has everything up to here
	last  uint64 // the last number given out
	lost  []span // ascending, without gaps, directly above base
	held  fifo   // ascending, without gaps, directly above lost
	shed  uint64 // numbers that this buffer had to let go, ever
}

// maxSpans bounds lost. Neighbours of one stage and cause are merged, so it takes a strange mixture
// to get there; then the two oldest become one with the cause "several".
const maxSpans = 1024

// span stands for records that are gone.
type span struct {
	first, last  uint64
	stage, cause string
	from, to     time.Time
	atMost       bool
}

func (s span) alike(o span) bool {
	return s.stage == o.stage && s.cause == o.cause && s.atMost == o.atMost
}

// item is a record, or losses that were reported in its place.
type item struct {
	first, last uint64
	rec         flow.Record
	wire        *api.FlowRecord // instead of rec, for a record that an earlier process left
	loss        *span
}

func (i *item) when() time.Time {
	if i.wire != nil {
		return wireTime(i.wire.GetTime())
	}
	return i.rec.Time
}

// add takes a record in and sheds the oldest if there is no room. It returns the record's number.
func (b *buffer) add(r flow.Record) uint64 {
	b.last++
	b.push(item{first: b.last, last: b.last, rec: r})
	return b.last
}

// lose gives numbers to n records that never got here.
func (b *buffer) lose(s span, n uint64) {
	s.first, s.last = b.last+1, b.last+n
	b.last = s.last
	if k := b.held.len(); k > 0 {
		if h := b.held.at(k - 1); h.loss != nil && h.loss.alike(s) {
			h.last, h.loss.last, h.loss.to = s.last, s.last, s.to
			return
		}
	}
	b.push(item{first: s.first, last: s.last, loss: &s})
}

func (b *buffer) push(i item) {
	b.held.push(i)
	for b.held.len() > b.limit {
		b.shedOldest()
	}
}

func (b *buffer) shedOldest() {
	i := *b.held.at(0)
	b.held.drop(1)
	if i.loss != nil {
		b.appendLost(*i.loss)
		return
	}
	b.shed++
	b.appendLost(span{first: i.first, last: i.last, stage: StageAgentMemory, cause: CauseBufferFull, from: i.when(), to: i.when()})
}

func (b *buffer) appendLost(s span) {
	if k := len(b.lost); k > 0 && b.lost[k-1].alike(s) {
		b.lost[k-1].last, b.lost[k-1].to = s.last, s.to
		return
	}
	b.lost = append(b.lost, s)
	if len(b.lost) > maxSpans {
		two := b.lost[:2]
		two[1] = span{two[0].first, two[1].last, StageAgentMemory, CauseSeveral, two[0].from, two[1].to, two[0].atMost || two[1].atMost}
		b.lost = b.lost[1:]
	}
}

// ack forgets what the collector has: everything up to n. A record that was shed after it had been
// sent is thereby no loss.
func (b *buffer) ack(n uint64) {
	if n <= b.base {
		return
	}
	b.base = n
	for len(b.lost) > 0 && b.lost[0].last <= n {
		b.lost = b.lost[1:]
	}
	if len(b.lost) > 0 {
		b.lost[0].first = max(b.lost[0].first, n+1)
	}
	b.held.drop(b.firstAbove(n))
	if b.held.len() == 0 {
		return
	}
	if h := b.held.at(0); h.first <= n {
		h.first, h.loss.first = n+1, n+1
	}
}

// firstAbove finds the first held item with a number above n.
func (b *buffer) firstAbove(n uint64) int {
	return sort.Search(b.held.len(), func(i int) bool { return b.held.at(i).last > n })
}

// forgotten is for a collector that has less than it once acknowledged: what is gone becomes a loss.
func (b *buffer) forgotten(from uint64) {
	if from >= b.base {
		return
	}
	b.lost = append([]span{{first: from + 1, last: b.base, stage: StageCollector, cause: CauseForgotten}}, b.lost...)
	b.base = from
}

// after returns up to limit entries with numbers above cursor and up to reserved.
func (b *buffer) after(cursor, reserved uint64, limit int) []*api.Entry {
	if reserved <= cursor {
		return nil
	}
	var out []*api.Entry
	for _, s := range b.lost {
		if len(out) == limit || s.first > reserved {
			return out
		}
		if s.last > cursor {
			out = append(out, s.entry(cursor, reserved))
		}
	}
	for i := b.firstAbove(cursor); i < b.held.len() && len(out) < limit && b.held.at(i).first <= reserved; i++ {
		out = append(out, b.held.at(i).entry(cursor, reserved))
	}
	return out
}

func (i *item) entry(cursor, reserved uint64) *api.Entry {
	switch {
	case i.loss != nil:
		return i.loss.entry(cursor, reserved)
	case i.wire != nil:
		return &api.Entry{Seq: i.last, Record: &api.Entry_Flow{Flow: i.wire}}
	}
	return &api.Entry{Seq: i.last, Record: &api.Entry_Flow{Flow: FlowToAPI(i.rec)}}
}

// entry is the part of the span between cursor and reserved.
func (s span) entry(cursor, reserved uint64) *api.Entry {
	s.first, s.last = max(s.first, cursor+1), min(s.last, reserved)
	return &api.Entry{Seq: s.last, Record: &api.Entry_Loss{Loss: &api.LossRecord{
		Stage: s.stage, Cause: s.cause, Count: s.last - s.first + 1, From: timestamp(s.from), To: timestamp(s.to), AtMost: s.atMost,
	}}}
}

// spool is everything that the collector does not have, for the next process.
func (b *buffer) spool() ([]store.Entry, error) {
	var out []store.Entry
	for _, e := range b.after(b.base, b.last, len(b.lost)+b.held.len()) {
		data, err := proto.Marshal(e)
		if err != nil {
			return nil, err
		}
		out = append(out, store.Entry{Seq: e.GetSeq(), Data: data})
	}
	return out, nil
}

// restore makes the buffer that goes on where the process before ended. What neither the collector
// nor the spool has is lost: to the unit after a kill, as a bound after a power loss.
func restore(st store.FlowState, limit int, now time.Time) *buffer {
	b := &buffer{limit: limit, base: st.Acked, last: st.Acked}
	for _, s := range st.Spool {
		var e api.Entry
		if err := proto.Unmarshal(s.Data, &e); err != nil || e.GetRecord() == nil {
			b.restart(s.Seq, st.Unsure, now)
			continue
		}
		b.take(s.Seq, &e, st.Unsure, now)
	}
	b.restart(st.Produced, st.Unsure, now)
	return b
}

func (b *buffer) take(seq uint64, e *api.Entry, unsure uint64, now time.Time) {
	if seq <= b.last {
		return
	}
	if l := e.GetLoss(); l != nil {
		n := min(l.GetCount(), seq-b.last)
		b.restart(seq-n, unsure, now)
		b.lose(span{stage: l.GetStage(), cause: l.GetCause(), from: wireTime(l.GetFrom()), to: wireTime(l.GetTo()), atMost: l.GetAtMost()}, n)
		return
	}
	b.restart(seq-1, unsure, now)
	b.last = seq
	b.push(item{first: seq, last: seq, wire: e.GetFlow()})
}

// restart counts numbers up to seq as gone with the process before.
func (b *buffer) restart(seq, unsure uint64, now time.Time) {
	lost := span{stage: StageAgentMemory, cause: CauseAgentRestart, to: now}
	if bound := min(seq, unsure); bound > b.last {
		lost.atMost = true
		b.lose(lost, bound-b.last)
	}
	if seq > b.last {
		lost.atMost = false
		b.lose(lost, seq-b.last)
	}
}

// records counts what is held and not lost.
func (b *buffer) records() uint64 {
	var n uint64
	for i := range b.held.len() {
		if b.held.at(i).loss == nil {
			n++
		}
	}
	return n
}
