package datapath_test

import (
	"context"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// plant has the kernel give out numbers on a CPU, of which it counts so many as lost, and gives them as a range.
func (n *node) plant(t *testing.T, cpu int, numbers, must1, best uint64) datapath.Range {
	t.Helper()
	var seqs []bpf.Sequence
	must(t, n.d.Maps().SpSequence.Lookup(uint32(0), &seqs))
	s := &seqs[cpu]
	first := s.Produced + 1
	s.Produced, s.MustDeliverLost, s.BestEffortLost = s.Produced+numbers, s.MustDeliverLost+must1, s.BestEffortLost+best
	must(t, n.d.Maps().SpSequence.Put(uint32(0), seqs))
	return datapath.Range{CPU: cpu, First: first, Last: s.Produced}
}

// gaps reads the rings beyond now.
func (n *node) gaps(t *testing.T) datapath.Gaps {
	t.Helper()
	ctx, cancel := context.WithCancel(within(t))
	done := make(chan error, 1)
	go func() { done <- n.d.ReadEvents(ctx, func(rec flow.Record) { n.d.Kept(rec) }) }()
	m, err := n.d.Mark()
	must(t, err)
	for !n.d.Passed(m) && ctx.Err() == nil {
		select {
		case err := <-done:
			t.Fatal(err)
		default:
		}
	}
	cancel()
	must(t, <-done)
	first, err := n.d.Gaps(m)
	must(t, err)
	g, err := n.d.Gaps(m) // whoever was killed before these were told of
	must(t, err)
	if !reflect.DeepEqual(first, g) {
		t.Errorf("gaps that were not told of were %+v, and are %+v", first, g)
	}
	n.d.SetGaps(m, g)
	return g
}

// TestGapsByCPU: a gap that is planted on each CPU is found to the number, beside records that were read, once; over another agent too.
// Where nobody can know which number is whose, none is named.
func TestGapsByCPU(t *testing.T) {
	n := newNode(t, datapath.ProfileAuto)
	c := n.cells()[0]
	c.path(n, t, 60e9)
	var must3, best2, taken []datapath.Range
	for cpu := range ebpf.MustPossibleCPU() {
		must3 = append(must3, n.plant(t, cpu, 3, 3, 0))
	}
	for range 5 {
		if who, err := c.ask(within(t)); who != "service" {
			t.Fatal(who, err)
		}
	}
	if g := n.gaps(t); !slices.Equal(g.MustDeliver, must3) || len(g.BestEffort)+len(g.Taken) != 0 || g.Untold != 0 {
		t.Errorf("gaps are %+v, want %v of the must-deliver ring", g, must3)
	}
	if g := n.gaps(t); len(g.MustDeliver)+len(g.BestEffort)+len(g.Taken) != 0 || g.Untold != 0 {
		t.Errorf("told again: %+v", g)
	}
	for cpu := range ebpf.MustPossibleCPU() {
		best2 = append(best2, n.plant(t, cpu, 2, 0, 2))
	}
	must(t, n.d.Close())
	n.open(t)
	if g := n.gaps(t); !slices.Equal(g.BestEffort, best2) || len(g.MustDeliver)+len(g.Taken) != 0 || g.Untold != 0 {
		t.Errorf("gaps are %+v, want %v of the best-effort ring", g, best2)
	}
	for cpu := range ebpf.MustPossibleCPU() {
		taken = append(taken, n.plant(t, cpu, 4, 0, 0))
	}
	if g := n.gaps(t); !slices.Equal(g.Taken, taken) || len(g.MustDeliver)+len(g.BestEffort) != 0 || g.Untold != datapath.Count(taken) {
		t.Errorf("gaps are %+v, want %v that an agent had", g, taken)
	}
	n.plant(t, 0, 5, 2, 2)
	if g := n.gaps(t); len(g.MustDeliver)+len(g.BestEffort)+len(g.Taken) != 0 || g.Untold != 1 {
		t.Errorf("gaps are %+v, want one that the kernel did not count, and no numbers", g)
	}
	if left := n.d.Unkept(); len(left) != 0 {
		t.Errorf("not kept: %v", left)
	}
	n.plant(t, 0, 1<<20, 1<<20, 0) // more than anybody keeps account of
	if g := n.gaps(t); g.Untold != 0 || datapath.Count(g.MustDeliver) > 1<<20 || len(n.d.Unkept()) != 0 {
		t.Errorf("after a flood: %d named, %d untold, not kept %v", datapath.Count(g.MustDeliver), g.Untold, n.d.Unkept())
	}
}

// TestUnkept: what was read and not kept is named, in whatever order the rest was kept.
func TestUnkept(t *testing.T) {
	n := newNode(t, datapath.ProfileAuto)
	c := n.cells()[0]
	c.path(n, t, 60e9)
	for range 40 {
		if who, err := c.ask(within(t)); who != "service" {
			t.Fatal(who, err)
		}
	}
	ctx, cancel := context.WithCancel(within(t))
	got := make(chan flow.Record, 64)
	done := make(chan error, 1)
	go func() { done <- n.d.ReadEvents(ctx, func(rec flow.Record) { got <- rec }) }()
	var read []flow.Record
	for range 40 {
		read = append(read, <-got)
	}
	cancel()
	must(t, <-done)
	rand.Shuffle(len(read), func(i, j int) { read[i], read[j] = read[j], read[i] })
	n.d.Kept(read[:25]...)
	for range 2 {
		var unkept, want []datapath.Range
		for _, r := range n.d.Unkept() {
			for k := r.First; k <= r.Last; k++ {
				unkept = append(unkept, datapath.Range{CPU: r.CPU, First: k, Last: k})
			}
		}
		for _, rec := range read[25:] {
			want = append(want, datapath.Range{CPU: rec.CPU, First: rec.Seq, Last: rec.Seq})
		}
		slices.SortFunc(want, func(a, b datapath.Range) int { return (a.CPU-b.CPU)<<32 + int(a.First) - int(b.First) })
		if !slices.Equal(unkept, want) {
			t.Errorf("unkept are %v, want %v", unkept, want)
		}
		must(t, n.d.Close())
		n.open(t)
	}
	n.d.SetKept(n.d.Unkept())
	if left := n.d.Unkept(); len(left) != 0 {
		t.Errorf("not kept: %v", left)
	}
}
