package audit

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// spooling is a streamer that nobody runs, with a spool on a real disk: the test does in any order what its goroutines do.
type spooling struct {
	t       *testing.T
	rng     *rand.Rand
	dir     string
	budget  int64
	limit   int // of memory
	s       *Streamer
	st      store.FlowState
	sent    uint64
	ledger  *ledger
	records map[uint64]string
	kernel  uint64
	killed  uint64 // numbers that were in memory alone when the process was killed
	damaged bool
}

func newSpooling(t *testing.T, seed uint64, budget int64) *spooling {
	p := &spooling{t: t, rng: rand.New(rand.NewPCG(seed, 9)), dir: t.TempDir(), budget: budget, limit: 64 >> (seed % 5), ledger: newLedger(), records: map[uint64]string{}}
	p.start()
	return p
}

// start is what New does.
func (p *spooling) start() {
	p.t.Helper()
	spool, err := store.OpenSpool(p.dir, "epoch", p.budget)
	if err != nil {
		p.t.Fatal(err)
	}
	from, to := spool.Range()
	p.s = &Streamer{cfg: Config{SpoolDir: p.dir, SpoolBudget: p.budget}, spool: spool, log: slog.New(slog.DiscardHandler), wakeSend: make(chan struct{}, 1)}
	p.s.buf = restore(p.st, from, to, p.limit, time.Unix(0, 0))
	p.s.buf.ack(p.ledger.seq) // the collector says so
	p.sent = p.ledger.seq
}

func (p *spooling) record() {
	id := fmt.Sprint("flow ", p.s.buf.last+1)
	p.records[p.s.buf.add(flow.Record{FlowID: id, Time: time.Unix(int64(p.s.buf.last), 0), Detail: string(make([]byte, 400))})] = id
}

func (p *spooling) lose() {
	n := 1 + p.rng.Uint64N(5)
	p.s.buf.lose(span{stage: StageKernelRing, cause: "full"}, n)
	p.kernel += n
}

func (p *spooling) send() {
	p.t.Helper()
	p.s.reserved = p.s.buf.last - min(p.s.buf.last, p.rng.Uint64N(4))
	entries, err := p.s.nextFlow(p.sent)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range entries[:min(len(entries), p.rng.IntN(40))] {
		if e.GetSeq() > p.s.reserved {
			p.t.Fatalf("number %d is sent, reserved is up to %d", e.GetSeq(), p.s.reserved)
		}
		p.ledger.take(p.t, e)
		p.sent = e.GetSeq()
	}
}

func (p *spooling) spool() {
	p.t.Helper()
	if err := p.s.toSpool(p.t.Context(), p.s.buf.last-min(p.s.buf.last, p.rng.Uint64N(40))); err != nil {
		p.t.Fatal(err)
	}
}

// end has the next process start after a stop, or after a kill, which leaves what the collector acknowledged at some time.
func (p *spooling) end(orderly bool) {
	p.t.Helper()
	b := p.s.buf
	p.st = store.FlowState{Acked: b.base, Produced: b.last, Spool: p.st.Spool}
	if orderly {
		rest, err := b.rest()
		if err != nil {
			p.t.Fatal(err)
		}
		p.st.Spool = rest
	} else {
		p.killed += b.last - b.base - (b.disk.to - b.disk.from)
		p.st.Acked -= min(p.st.Acked, p.rng.Uint64N(100))
	}
	p.s.spool.Close()
	p.start()
}

// harm flips a bit of the spool, or takes the end of a file away.
func (p *spooling) harm() {
	p.t.Helper()
	files, err := filepath.Glob(filepath.Join(p.dir, "epoch", "*"))
	if err != nil || len(files) == 0 {
		return
	}
	name := files[p.rng.IntN(len(files))]
	data, err := os.ReadFile(name)
	if err != nil || len(data) == 0 {
		p.t.Fatal(err)
	}
	if p.rng.IntN(3) == 0 {
		data = data[:p.rng.IntN(len(data))]
	} else {
		data[p.rng.IntN(len(data))] ^= 1 << p.rng.IntN(8)
	}
	if err := os.WriteFile(name, data, 0o600); err != nil {
		p.t.Fatal(err)
	}
	p.damaged = true
}

// finish has the collector get everything, and holds it to produced = delivered + lost.
func (p *spooling) finish() {
	p.t.Helper()
	p.s.buf.ack(p.ledger.seq)
	p.sent, p.s.reserved = p.ledger.seq, p.s.buf.last
	for p.sent < p.s.buf.last {
		entries, err := p.s.nextFlow(p.sent)
		if err != nil || len(entries) == 0 {
			p.t.Fatalf("nothing comes after %d of %d: %v", p.sent, p.s.buf.last, err)
		}
		for _, e := range entries {
			p.ledger.take(p.t, e)
		}
		p.sent = p.ledger.seq
		p.s.buf.ack(p.sent)
	}
	finish(p.t, &producer{buf: p.s.buf, records: p.records}, p.ledger)
	if err := p.s.trimSpool(); err != nil || p.s.spool.Size() != 0 {
		p.t.Errorf("%d bytes are left in the spool, %v", p.s.spool.Size(), err)
	}
}

// Whatever is produced, spooled, shed, sent, acknowledged, sent again, stopped, killed or damaged: the collector sees every number
// once, a record under its own number, a loss under its own cause, and no more losses than there were.
func TestSpoolAccounts(t *testing.T) {
	for seed := range uint64(12) {
		p := newSpooling(t, seed, []int64{1 << 20, 16 << 10}[seed%2]) // the small one is always full
		harmful := seed%3 == 0
		for range 300 {
			switch k := p.rng.IntN(40); {
			case k < 16:
				for range p.rng.IntN(20) {
					p.record()
				}
			case k < 20:
				p.lose()
			case k < 28:
				p.send()
			case k < 31:
				p.s.buf.ack(p.s.buf.base + p.rng.Uint64N(p.ledger.seq-p.s.buf.base+1))
			case k < 33: // the connection breaks and comes back
				p.s.buf.ack(p.ledger.seq)
				p.sent = p.ledger.seq
			case k < 38:
				p.spool()
			case k == 38:
				p.end(p.rng.IntN(2) == 0)
			case harmful:
				p.harm()
			}
			checkCover(t, p.s.buf)
		}
		p.finish()
		losses := p.ledger.losses
		if n := losses[StageAgentMemory+"/"+CauseAgentRestart]; !p.damaged && n > p.killed {
			t.Errorf("seed %d: %d are lost by restarts, in memory were %d", seed, n, p.killed)
		}
		if n := losses[StageFlowSpool+"/"+CauseDamaged]; !p.damaged && n > 0 {
			t.Errorf("seed %d: %d are damaged, and nobody did it", seed, n)
		}
		if n := losses[StageKernelRing+"/full"]; n > p.kernel || p.killed == 0 && !p.damaged && n != p.kernel {
			t.Errorf("seed %d: the kernel lost %d, reported are %v", seed, p.kernel, losses)
		}
		if p.budget > 1<<19 && losses[StageFlowSpool+"/"+CauseSpoolFull] > 0 {
			t.Errorf("seed %d: room for all, and yet %v", seed, losses)
		}
	}
}

// Memory that is half full goes to the disk without waiting for more.
func TestHalfFullIsSpooled(t *testing.T) {
	dir := t.TempDir()
	st, err := store.Open(filepath.Join(dir, "node.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	s, err := New(Config{Store: st, Node: "node-1", FlowBuffer: 100, SpoolDir: filepath.Join(dir, "flows"), SpoolBudget: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 51 {
		if len(s.wakeSpool) > 0 {
			t.Errorf("the disk is asked at %d records of 100", n)
		}
		s.Flow(flow.Record{})
	}
	if len(s.wakeSpool) == 0 {
		t.Error("the disk is not asked")
	}
}

// What is on the disk is lost by no kill.
func TestSpooledOutlivesAKill(t *testing.T) {
	p := newSpooling(t, 5, 1<<20)
	for range 50 {
		p.record()
	}
	if err := p.s.toSpool(t.Context(), 50); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		p.record()
	}
	p.st = store.FlowState{Produced: 53}
	p.start()
	p.finish()
	if len(p.ledger.flows) != 50 || p.ledger.losses[StageAgentMemory+"/"+CauseAgentRestart] != 3 || p.ledger.lost() != 3 {
		t.Errorf("delivered %d, lost %v", len(p.ledger.flows), p.ledger.losses)
	}
}

// Losses that are older than what is on the disk are told as what they were, however little memory there is.
func TestRestoreBelowTheDisk(t *testing.T) {
	p := newSpooling(t, 5, 1<<20)
	for _, cause := range []string{"a", "b", "c"} {
		p.s.buf.lose(span{stage: StageKernelRing, cause: cause}, 10)
	}
	rest, err := p.s.buf.rest()
	if err != nil {
		t.Fatal(err)
	}
	b := restore(store.FlowState{Produced: 45, Spool: rest}, 30, 40, 1, time.Unix(0, 0))
	checkCover(t, b)
	if len(b.gone) != 3 || b.disk.from != 30 || b.disk.to != 40 || b.last != 45 {
		t.Errorf("gone are %+v, on the disk %+v, last is %d", b.gone, b.disk, b.last)
	}
}

// The oldest give way on the disk, and what they told of losses elsewhere is told all the same.
func TestSpoolGivesWay(t *testing.T) {
	p := newSpooling(t, 5, 256<<10)
	for range 40 {
		for range 30 {
			p.record()
		}
		p.lose()
		if err := p.s.toSpool(t.Context(), p.s.buf.last); err != nil {
			t.Fatal(err)
		}
	}
	if size := p.s.spool.Size(); size > p.budget {
		t.Errorf("the spool takes %d bytes of %d", size, p.budget)
	}
	shed := p.s.buf.shed
	p.finish()
	l := p.ledger.losses
	if full := l[StageFlowSpool+"/"+CauseSpoolFull]; full == 0 || full != shed || l[StageKernelRing+"/full"] != p.kernel || len(l) != 2 {
		t.Errorf("losses are %v, shed %d, the kernel's %d", l, shed, p.kernel)
	}
}
