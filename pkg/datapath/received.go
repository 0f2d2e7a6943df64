package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// The kernel numbers its records on each CPU, over both rings and those that did not fit. Which of the numbers an agent has read, and
// of which it has seen to it that they are not forgotten, stands in an array of its own (receivedMap), mapped into the agent: a kill
// leaves it as it is. What was read and not kept went with the agent; what was not read, once the rings were read beyond it, was lost in
// between: in the kernel, as far as that counted losses.

// receivedMap is the pin of the array: a page for each CPU, and one that says that the others were begun. No program knows it.
const receivedMap = "sp_received"

const (
	pageWords   = 512
	windowWords = 254 // of bits
	windowSize  = windowWords * 64

	// Words in the page of a CPU.
	atRead = 0                        // a window
	atKept = atRead + 1 + windowWords // a window
	atTold = atKept + 1 + windowWords // losses that were told, of either ring
)

// Range are numbers that the kernel gave to records on one CPU.
type Range struct {
	CPU         int
	First, Last uint64
}

// Count is how many numbers are in ranges.
func Count(ranges []Range) (n uint64) {
	for _, r := range ranges {
		n += r.Last - r.First + 1
	}
	return n
}

// received is safe for concurrent use.
type received struct {
	m    *ebpf.Map
	upTo [2]atomic.Int64 // CLOCK_BOOTTIME up to which each ring was read

	mu     sync.Mutex
	unmap  runtime.Cleanup
	memory []byte     // guarded by mu; the array, shared with whoever comes next; nil after close
	pages  [][]uint64 // guarded by mu; what is in it, by CPU
}

// openReceived adopts the pinned array, or makes one, in which everything until now is done with.
func (d *Datapath) openReceived() error {
	cpus := ebpf.MustPossibleCPU()
	m, err := openArray(d.cfg.Dir, receivedMap, [pageWords]uint64{}, uint32(cpus)+1, unix.BPF_F_MMAPABLE)
	if err != nil {
		return err
	}
	// Not by the library: what it maps stays until memory is collected, also after Close.
	memory, err := unix.Mmap(m.FD(), 0, (cpus+1)*pageWords*8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return errors.Join(fmt.Errorf("map memory of %s: %w", receivedMap, err), m.Close())
	}
	r := &d.received
	r.m, r.memory = m, memory
	r.unmap = runtime.AddCleanup(d, func(memory []byte) { _ = unix.Munmap(memory) }, memory) // of who does not close
	for cpu := range cpus + 1 {
		page := make([]uint64, pageWords)
		for at := range page {
			page[at] = binary.NativeEndian.Uint64(memory[(cpu*pageWords+at)*8:])
		}
		r.pages = append(r.pages, page)
	}
	if r.pages[cpus][0] != 0 {
		return nil
	}
	return d.beginReceived(cpus)
}

func (d *Datapath) beginReceived(cpus int) error {
	now, err := d.sequences()
	if err != nil {
		return err
	}
	r := &d.received
	for cpu, s := range now {
		r.put(cpu, atRead, s.Produced)
		r.put(cpu, atKept, s.Produced)
		r.put(cpu, atTold, s.MustDeliverLost)
		r.put(cpu, atTold+1, s.BestEffortLost)
	}
	r.put(cpus, 0, 1)
	return nil
}

func (d *Datapath) sequences() ([]bpf.Sequence, error) {
	var perCPU []bpf.Sequence
	if err := d.objs.SpSequence.Lookup(uint32(0), &perCPU); err != nil {
		return nil, fmt.Errorf("read sequences: %w", err)
	}
	return perCPU, nil
}

// put writes one word where a kill leaves it.
func (r *received) put(cpu, at int, v uint64) {
	r.pages[cpu][at] = v
	if r.memory != nil {
		binary.NativeEndian.PutUint64(r.memory[(cpu*pageWords+at)*8:], v)
	}
}

func (r *received) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	memory := r.memory
	if memory == nil {
		return nil
	}
	r.memory = nil
	r.unmap.Stop()
	return errors.Join(unix.Munmap(memory), r.m.Close())
}

// has tells whether a number is in a window: below its base all are. r.mu is held.
func (r *received) has(cpu, window int, n uint64) bool {
	base := r.pages[cpu][window]
	return n <= base || n-base <= windowSize && r.pages[cpu][window+1+int(n/64%windowWords)]&(1<<(n%64)) != 0
}

// add puts a number into a window, and moves its base over all that are in it. What is too far behind is given up. r.mu is held.
func (r *received) add(cpu, window int, n uint64) {
	if r.has(cpu, window, n) {
		return
	}
	if n-r.pages[cpu][window] > windowSize {
		r.advance(cpu, window, n-windowSize)
	}
	end := r.pages[cpu][window]
	if n == end+1 {
		end = n
	} else {
		at := window + 1 + int(n/64%windowWords)
		r.put(cpu, at, r.pages[cpu][at]|1<<(n%64))
	}
	for end-r.pages[cpu][window] < windowSize && r.has(cpu, window, end+1) {
		end++
	}
	r.advance(cpu, window, end)
}

// advance moves the base of a window up: first that, then the bits go, for in between a number was rather read.
func (r *received) advance(cpu, window int, end uint64) {
	base := r.pages[cpu][window]
	if end <= base {
		return
	}
	r.put(cpu, window, end)
	for n := max(base, end-min(end, windowSize)) + 1; n <= end; n++ {
		at := window + 1 + int(n/64%windowWords)
		if v := r.pages[cpu][at] &^ (1 << (n % 64)); v != r.pages[cpu][at] {
			r.put(cpu, at, v)
		}
	}
}

// read notes that a record was read from a ring.
func (r *received) read(ring int, e *bpf.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if int(e.Cpu) < len(r.pages)-1 {
		r.add(int(e.Cpu), atRead, e.Seq)
	}
	r.upTo[ring].Store(max(int64(e.BootNs), r.upTo[ring].Load()))
}

// Kept notes that a record of the kernel's rings will not be forgotten, or that it was counted as lost.
func (d *Datapath) Kept(recs ...flow.Record) {
	r := &d.received
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range recs {
		if rec.CPU >= 0 && rec.CPU < len(r.pages)-1 {
			r.add(rec.CPU, atKept, rec.Seq)
		}
	}
}

// Unkept are the records that were read and not kept. At the start of an agent these went with the one before.
func (d *Datapath) Unkept() (out []Range) {
	r := &d.received
	r.mu.Lock()
	defer r.mu.Unlock()
	for cpu := range len(r.pages) - 1 {
		out = append(out, r.missing(cpu, atKept, r.pages[cpu][atRead]+windowSize, func(n uint64) bool { return r.has(cpu, atRead, n) })...)
	}
	return out
}

// SetKept is for ranges that were told of.
func (d *Datapath) SetKept(ranges []Range) {
	r := &d.received
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range ranges {
		for n := g.First; n <= g.Last; n++ {
			r.add(g.CPU, atKept, n)
		}
	}
}

// missing are the numbers up to last that are not in a window, of those that are asked for. r.mu is held.
func (r *received) missing(cpu, window int, last uint64, asked func(uint64) bool) (out []Range) {
	base := r.pages[cpu][window]
	for n := base + 1; n <= min(last, base+windowSize); n++ {
		switch {
		case r.has(cpu, window, n) || !asked(n):
		case len(out) > 0 && out[len(out)-1].Last == n-1:
			out[len(out)-1].Last = n
		default:
			out = append(out, Range{cpu, n, n})
		}
	}
	return out
}

// Mark is how far the kernel's numbers are at a moment.
type Mark struct {
	at   time.Duration
	seqs []bpf.Sequence
}

// Losses are those that the kernel had counted then.
func (m Mark) Losses() (l Losses) {
	for _, s := range m.seqs {
		l.MustDeliver += s.MustDeliverLost
		l.BestEffort += s.BestEffortLost
	}
	return l
}

// Mark reads how far the numbers are now.
func (d *Datapath) Mark() (Mark, error) {
	seqs, err := d.sequences()
	return Mark{BootTime(), seqs}, err // records up to these numbers are older than that, or just being written
}

// markPasses is how much younger a record in each ring has to be for all up to a mark to have been read.
const markPasses = 50 * time.Millisecond

// Passed tells whether both rings were read beyond a mark.
func (d *Datapath) Passed(m Mark) bool {
	for i := range d.received.upTo {
		if time.Duration(d.received.upTo[i].Load()) < m.at+markPasses {
			return false
		}
	}
	return true
}

// Gaps are the numbers up to a mark that are in no ring.
type Gaps struct {
	// MustDeliver and BestEffort did not fit into their rings, Taken went with an agent that was killed with them in hand. Where the
	// kernel lost records of both rings on one CPU, or an agent some too, nobody knows which is which, and they are in none.
	MustDeliver, BestEffort, Taken []Range
	// Untold is how many of them the kernel did not count: they went with an agent.
	Untold uint64

	upTo []upTo // by CPU
}

// upTo is what to note of one CPU once its gaps were told of.
type upTo struct {
	missing    []Range
	must, best uint64 // losses that were told, of either ring
}

// Gaps finds what is missing up to a mark that the rings were read beyond, and was not told of. SetGaps notes that it was.
func (d *Datapath) Gaps(m Mark) (g Gaps, err error) {
	now, err := d.sequences() // what was lost since may be a number up to the mark, that was just being given out
	if err != nil {
		return g, err
	}
	r := &d.received
	r.mu.Lock()
	defer r.mu.Unlock()
	for cpu, s := range m.seqs {
		page := r.pages[cpu]
		must, best := now[cpu].MustDeliverLost-page[atTold], now[cpu].BestEffortLost-page[atTold+1]
		missing := r.missing(cpu, atRead, s.Produced, func(uint64) bool { return true })
		g.add(missing, must, best)
		g.upTo = append(g.upTo, upTo{missing, told(page[atTold], s.MustDeliverLost, now[cpu].MustDeliverLost, best == 0, missing),
			told(page[atTold+1], s.BestEffortLost, now[cpu].BestEffortLost, must == 0, missing)})
	}
	return g, nil
}

// SetGaps is for gaps up to a mark that were told of: whoever is killed before it tells twice rather than never.
func (d *Datapath) SetGaps(m Mark, g Gaps) {
	r := &d.received
	r.mu.Lock()
	defer r.mu.Unlock()
	for cpu, u := range g.upTo {
		r.done(cpu, m.seqs[cpu], u.missing)
		r.put(cpu, atTold, u.must)
		r.put(cpu, atTold+1, u.best)
	}
}

// told is how many losses of a ring were told, of those that were counted at a mark and until now: all of the mark, and one of since if
// it is known to be among what is missing.
func told(before, mark, now uint64, alone bool, missing []Range) uint64 {
	if alone {
		mark = max(mark, min(before+Count(missing), now))
	}
	return mark
}

// done takes everything up to a mark for read and told. r.mu is held.
func (r *received) done(cpu int, s bpf.Sequence, missing []Range) {
	if s.Produced > windowSize && r.pages[cpu][atRead] < s.Produced-windowSize { // so many that nobody can tell
		r.advance(cpu, atKept, s.Produced)
	}
	for _, gap := range missing {
		for n := gap.First; n <= gap.Last; n++ {
			r.add(cpu, atKept, n)
		}
	}
	r.advance(cpu, atRead, s.Produced)
}

// add sorts what is missing on one CPU, of which the kernel counted so many.
func (g *Gaps) add(missing []Range, must, best uint64) {
	n := Count(missing)
	switch {
	case n == 0:
	case n <= must && best == 0:
		g.MustDeliver = append(g.MustDeliver, missing...)
	case n <= best && must == 0:
		g.BestEffort = append(g.BestEffort, missing...)
	case must == 0 && best == 0:
		g.Taken = append(g.Taken, missing...)
	}
	g.Untold += n - min(n, must+best)
}
