package audit

import (
	"sort"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// buffer knows where every number of the flow class is that the collector does not have: each above base and up to last
// belongs to exactly one of what is named here, one directly above the other. It is not safe for concurrent use.
type buffer struct {
	limit int    // of held, in items
	base  uint64 // the collector has everything up to here
	last  uint64 // the last number given out
	shed  uint64 // records that this buffer had to let go, ever

	gone spans                     // what the disk had to let go
	disk struct{ from, to uint64 } // above from and up to to: in the spool
	lost spans                     // what memory had to let go
	held fifo                      // records, and losses that were reported to us
}

// spans are ascending and without gaps.
type spans []span

// maxSpans bounds spans. Neighbours of one stage and cause are merged, so it takes a strange mixture
// to get there; then the two oldest become one with the cause "several".
const maxSpans = 1024

// span stands for records that are gone.
type span struct {
	first, last  uint64
	stage, cause string
	from, to     time.Time
	atMost       bool
	ranges       []*api.CPURange // which of the kernel's records, where that is known
}

func (s span) alike(o span) bool {
	return s.stage == o.stage && s.cause == o.cause && s.atMost == o.atMost && len(s.ranges)+len(o.ranges) == 0
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
	if i.loss == nil {
		b.shed++
	}
	b.lost.add(i.span(StageAgentMemory, CauseBufferFull))
}

// span is what is told of the item when it is gone.
func (i *item) span(stage, cause string) span {
	if i.loss != nil {
		return *i.loss
	}
	return span{first: i.first, last: i.last, stage: stage, cause: cause, from: i.when(), to: i.when()}
}

func (l *spans) add(s span) {
	if k := len(*l); k > 0 && (*l)[k-1].alike(s) {
		(*l)[k-1].last, (*l)[k-1].to = s.last, s.to
		return
	}
	*l = append(*l, s)
	if len(*l) > maxSpans {
		two := (*l)[:2]
		two[1] = span{first: two[0].first, last: two[1].last, stage: StageAgentMemory, cause: CauseSeveral, from: two[0].from, to: two[1].to,
			atMost: two[0].atMost || two[1].atMost}
		*l = (*l)[1:]
	}
}

// drop forgets numbers up to n.
func (l *spans) drop(n uint64) {
	for len(*l) > 0 && (*l)[0].last <= n {
		*l = (*l)[1:]
	}
	if len(*l) > 0 && (*l)[0].first <= n {
		(*l)[0].first, (*l)[0].ranges = n+1, nil
	}
}

func (l spans) entries(cursor, reserved uint64, limit int) (out []*api.Entry) {
	for _, s := range l {
		if len(out) == limit || s.first > reserved {
			break
		}
		if s.last > cursor {
			out = append(out, s.entry(cursor, reserved))
		}
	}
	return out
}

// ack forgets what the collector has: everything up to n. A record that was shed after it had been
// sent is thereby no loss.
func (b *buffer) ack(n uint64) {
	if n <= b.base {
		return
	}
	b.base = n
	b.gone.drop(n)
	b.disk.from = min(max(b.disk.from, n), b.disk.to)
	b.dropMemory(n)
}

// dropMemory forgets what memory has up to n.
func (b *buffer) dropMemory(n uint64) {
	b.lost.drop(n)
	b.held.drop(b.firstAbove(n))
	if b.held.len() == 0 {
		return
	}
	if h := b.held.at(0); h.first <= n {
		h.first, h.loss.first, h.loss.ranges = n+1, n+1, nil
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
	b.gone = append(spans{{first: from + 1, last: b.base, stage: StageCollector, cause: CauseForgotten}}, b.gone...)
	b.base = from
}

// after returns up to limit entries with numbers above cursor and up to reserved. None with onDisk says that the next is in
// the spool.
func (b *buffer) after(cursor, reserved uint64, limit int) (out []*api.Entry, onDisk bool) {
	if reserved <= cursor {
		return nil, false
	}
	if out = b.gone.entries(cursor, reserved, limit); len(out) > 0 {
		return out, false
	}
	if b.disk.from < b.disk.to && cursor < b.disk.to {
		return nil, true
	}
	return b.inMemory(cursor, reserved, limit), false
}

func (b *buffer) inMemory(cursor, reserved uint64, limit int) []*api.Entry {
	out := b.lost.entries(cursor, reserved, limit)
	for i := b.firstAbove(cursor); i < b.held.len() && len(out) < limit && b.held.at(i).first <= reserved; i++ {
		out = append(out, b.held.at(i).entry(cursor, reserved))
	}
	return out
}

// oldest copies up to limit items of memory that begin at upTo or below, for the spool.
func (b *buffer) oldest(upTo uint64, limit int) []item {
	var out []item
	for _, s := range b.lost {
		if s.first > upTo || len(out) == limit {
			return out
		}
		out = append(out, item{first: s.first, last: s.last, loss: &s})
	}
	for k := 0; k < b.held.len() && len(out) < limit && b.held.at(k).first <= upTo; k++ {
		i := *b.held.at(k)
		if i.loss != nil { // it may grow
			loss := *i.loss
			i.loss = &loss
		}
		out = append(out, i)
	}
	return out
}

// spooled takes out of memory what the disk has: everything from first, the oldest of then, to last.
func (b *buffer) spooled(first, last uint64) {
	if last <= b.base {
		return
	}
	if b.disk.from == b.disk.to {
		b.disk.from = max(first-1, b.base)
	}
	b.disk.to = last
	b.dropMemory(last)
}

// unspooled is for what the disk had to let go, from the oldest on.
func (b *buffer) unspooled(items []item) {
	for _, i := range items {
		if i.last <= b.disk.from || i.last > b.disk.to {
			continue
		}
		if i.loss == nil {
			b.shed++
		}
		s := i.span(StageFlowSpool, CauseSpoolFull)
		s.first = max(s.first, b.disk.from+1)
		b.gone.add(s)
		b.disk.from = i.last
	}
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

// entry is the part of the span between cursor and reserved. Of a part nobody knows which of the kernel's records it stands for.
func (s span) entry(cursor, reserved uint64) *api.Entry {
	if s.first <= cursor || s.last > reserved {
		s.ranges = nil
	}
	s.first, s.last = max(s.first, cursor+1), min(s.last, reserved)
	return &api.Entry{Seq: s.last, Record: &api.Entry_Loss{Loss: &api.LossRecord{
		Stage: s.stage, Cause: s.cause, Count: s.last - s.first + 1, From: timestamp(s.from), To: timestamp(s.to), AtMost: s.atMost, Ranges: s.ranges,
	}}}
}

// rest is everything that neither the collector nor the spool has, for the next process.
func (b *buffer) rest() ([]store.Entry, error) {
	entries := b.gone.entries(b.base, b.last, len(b.gone))
	entries = append(entries, b.inMemory(b.base, b.last, len(b.lost)+b.held.len())...)
	var out []store.Entry
	for _, e := range entries {
		data, err := proto.Marshal(e)
		if err != nil {
			return nil, err
		}
		out = append(out, store.Entry{Seq: e.GetSeq(), Data: data})
	}
	return out, nil
}

// restore makes the buffer that goes on where the process before ended; the spool has the numbers above from and up to to.
// What neither the collector nor spool or store has is lost: to the unit after a kill, as a bound after a power loss.
func restore(st store.FlowState, from, to uint64, limit int, now time.Time) *buffer {
	b := &buffer{limit: limit, base: st.Acked, last: st.Acked}
	from = max(from, st.Acked)
	for _, s := range st.Spool {
		if s.Seq > from {
			b.mount(from, to, now)
		}
		var e api.Entry
		if err := proto.Unmarshal(s.Data, &e); err != nil || e.GetRecord() == nil {
			b.restart(s.Seq, st.Unsure, now)
			continue
		}
		b.take(s.Seq, &e, st.Unsure, now)
	}
	b.mount(from, to, now)
	b.restart(st.Produced, st.Unsure, now)
	return b
}

// mount puts what the spool has above what is there.
func (b *buffer) mount(from, to uint64, now time.Time) {
	if to <= max(from, b.disk.to) {
		return
	}
	b.restart(from, 0, now) // not only reserved: what came later is there
	b.gone = b.lost
	for k := range b.held.len() {
		b.gone.add(b.held.at(k).span(StageFlowSpool, CauseSpoolFull))
	}
	b.lost, b.held = nil, fifo{}
	b.disk.from, b.disk.to, b.last = from, to, to
}

func (b *buffer) take(seq uint64, e *api.Entry, unsure uint64, now time.Time) {
	if seq <= b.last {
		return
	}
	if l := e.GetLoss(); l != nil {
		n := min(l.GetCount(), seq-b.last)
		b.restart(seq-n, unsure, now)
		s := span{stage: l.GetStage(), cause: l.GetCause(), from: wireTime(l.GetFrom()), to: wireTime(l.GetTo()), atMost: l.GetAtMost()}
		if n == l.GetCount() {
			s.ranges = l.GetRanges()
		}
		b.lose(s, n)
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
