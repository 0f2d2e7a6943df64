package audit

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// ledger is a collector in a few lines: it takes the next number or nothing.
type ledger struct {
	seq    uint64
	flows  map[uint64]string // flow id by number
	losses map[string]uint64
	atMost uint64
}

func newLedger() *ledger { return &ledger{flows: map[uint64]string{}, losses: map[string]uint64{}} }

func (l *ledger) take(t *testing.T, e *api.Entry) {
	t.Helper()
	n := uint64(1)
	if loss := e.GetLoss(); loss != nil {
		n = loss.GetCount()
		l.losses[loss.GetStage()+"/"+loss.GetCause()] += n
		if loss.GetAtMost() {
			l.atMost += n
		}
	} else {
		l.flows[e.GetSeq()] = e.GetFlow().GetFlowId()
	}
	if n == 0 || e.GetSeq() != l.seq+n {
		t.Fatalf("entry %d of %d numbers after %d", e.GetSeq(), n, l.seq)
	}
	l.seq = e.GetSeq()
}

func (l *ledger) lost() (n uint64) {
	for _, c := range l.losses {
		n += c
	}
	return n
}

// producer hands records to a buffer and remembers what it handed over.
type producer struct {
	buf     *buffer
	records map[uint64]string
	kernel  uint64
}

func (p *producer) record() {
	id := fmt.Sprint("flow ", p.buf.last+1)
	p.records[p.buf.add(flow.Record{FlowID: id, Time: time.Unix(int64(p.buf.last), 0)})] = id
}

func (p *producer) lose(n uint64) {
	p.buf.lose(span{stage: StageKernelRing, cause: "full"}, n)
	p.kernel += n
}

// Whatever is produced, shed, sent, acknowledged late or never, and sent again: the collector sees
// every number once, a record under its own number, and a reported loss under its own cause.
func TestBufferAccounts(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 7))
		p := &producer{buf: &buffer{limit: 1 + rng.IntN(20)}, records: map[uint64]string{}}
		l := newLedger()
		var sent uint64
		for range 400 {
			switch rng.IntN(6) {
			case 0, 1:
				p.record()
			case 2:
				p.lose(1 + rng.Uint64N(5))
			case 3: // a batch arrives
				reserved := p.buf.last - min(p.buf.last, rng.Uint64N(4))
				entries, _ := p.buf.after(sent, reserved, 1+rng.IntN(10))
				for _, e := range entries {
					if e.GetSeq() > reserved {
						t.Fatalf("number %d is sent, reserved is up to %d", e.GetSeq(), reserved)
					}
					l.take(t, e)
					sent = e.GetSeq()
				}
			case 4: // an acknowledgement arrives
				p.buf.ack(p.buf.base + rng.Uint64N(l.seq-p.buf.base+1))
			case 5: // the connection breaks and comes back
				p.buf.ack(l.seq)
				sent = l.seq
			}
			checkCover(t, p.buf)
		}
		finish(t, p, l)
		if got := l.losses[StageKernelRing+"/full"]; got != p.kernel {
			t.Fatalf("seed %d: %d losses reported by the kernel, %d arrived", seed, p.kernel, got)
		}
	}
}

// checkCover holds that every number above base and up to last is somewhere, once.
func checkCover(t *testing.T, b *buffer) {
	t.Helper()
	next := checkSpans(t, b.gone, b.base+1)
	if b.disk.from < b.disk.to {
		if b.disk.from != next-1 {
			t.Fatalf("the disk has what is above %d, want it from %d", b.disk.from, next)
		}
		next = b.disk.to + 1
	}
	next = checkSpans(t, b.lost, next)
	for k := range b.held.len() {
		i := b.held.at(k)
		if i.first != next || i.last < i.first || (i.loss == nil && i.last != i.first) {
			t.Fatalf("held is %d to %d, want it from %d", i.first, i.last, next)
		}
		next = i.last + 1
	}
	if next != b.last+1 {
		t.Fatalf("numbers end at %d, want %d", next-1, b.last)
	}
}

func checkSpans(t *testing.T, l spans, next uint64) uint64 {
	t.Helper()
	for _, s := range l {
		if s.first != next || s.last < s.first {
			t.Fatalf("lost is %d to %d, want it from %d", s.first, s.last, next)
		}
		next = s.last + 1
	}
	return next
}

func finish(t *testing.T, p *producer, l *ledger) {
	t.Helper()
	p.buf.ack(l.seq)
	for { // losses of the disk and memory come apart
		entries, _ := p.buf.after(l.seq, p.buf.last, 1<<20)
		if len(entries) == 0 {
			break
		}
		for _, e := range entries {
			l.take(t, e)
		}
	}
	p.buf.ack(l.seq)
	if l.seq != p.buf.last || uint64(len(l.flows))+l.lost() != p.buf.last {
		t.Fatalf("produced %d, the collector is at %d with %d delivered and %d lost", p.buf.last, l.seq, len(l.flows), l.lost())
	}
	for n, id := range l.flows {
		if p.records[n] != id {
			t.Fatalf("number %d is %q, produced was %q", n, id, p.records[n])
		}
	}
	if p.buf.held.len()+len(p.buf.lost)+len(p.buf.gone) != 0 {
		t.Fatalf("%d held and %d lost after everything was acknowledged", p.buf.held.len(), len(p.buf.lost)+len(p.buf.gone))
	}
}

// The spool and the next process go on with the same numbers.
func TestBufferRestore(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 8))
		p := &producer{buf: &buffer{limit: 10}, records: map[uint64]string{}}
		l := newLedger()
		var killed, unsure uint64
		for range 10 {
			for range rng.IntN(30) {
				if rng.IntN(3) == 0 {
					p.lose(1 + rng.Uint64N(3))
				} else {
					p.record()
				}
			}
			entries, _ := p.buf.after(l.seq, p.buf.last, rng.IntN(8))
			for _, e := range entries {
				l.take(t, e)
			}
			st := store.FlowState{Acked: p.buf.base + rng.Uint64N(l.seq-p.buf.base+1)}
			switch rng.IntN(3) {
			case 0: // stopped
				spool, err := p.buf.rest()
				if err != nil {
					t.Fatal(err)
				}
				st.Spool, st.Produced = spool, p.buf.last
			case 1: // killed
				st.Produced = p.buf.last
				killed++
			case 2: // power lost
				st.Produced = p.buf.last + rng.Uint64N(50)
				st.Unsure = st.Produced
				unsure++
			}
			p.buf = restore(st, 0, 0, 10, time.Unix(0, 0))
			p.buf.ack(l.seq)
		}
		p.kernel = 0
		finish(t, p, l)
		if l.atMost > 0 && unsure == 0 {
			t.Fatalf("seed %d: %d lost at most, but no power loss", seed, l.atMost)
		}
		if killed+unsure == 0 && l.losses[StageAgentMemory+"/"+CauseAgentRestart] > 0 {
			t.Fatalf("seed %d: losses by restart, but every stop was orderly", seed)
		}
	}
}

// A collector that lost its store gets the rest, and the count of what only it had.
func TestBufferForgotten(t *testing.T) {
	p := &producer{buf: &buffer{limit: 100}, records: map[uint64]string{}}
	for range 50 {
		p.record()
	}
	p.buf.ack(30)
	p.buf.forgotten(10)
	l := newLedger()
	l.seq = 10
	for l.seq < 50 {
		entries, _ := p.buf.after(l.seq, 50, 100)
		for _, e := range entries {
			l.take(t, e)
		}
	}
	if l.seq != 50 || l.losses[StageCollector+"/"+CauseForgotten] != 20 || len(l.flows) != 20 {
		t.Errorf("collector is at %d with %v and %d records", l.seq, l.losses, len(l.flows))
	}
}

// A mixture of causes does not grow without bound, and stays counted.
func TestBufferManyCauses(t *testing.T) {
	p := &producer{buf: &buffer{limit: 4}, records: map[uint64]string{}}
	for i := range 5 * maxSpans {
		p.buf.lose(span{stage: StageKernelRing, cause: fmt.Sprint(i % 3)}, 2)
		p.record()
	}
	if n := len(p.buf.lost); n > maxSpans {
		t.Errorf("%d spans", n)
	}
	l := newLedger()
	finish(t, p, l)
}
