package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/protobuf/proto"
)

// ringLosses counts what the kernel's rings did not take, and what an agent had read from them when it was killed, with the kernel's
// numbers of it. Which these are is known once the rings were read beyond them: losses are told a moment after the kernel counted them.
type ringLosses struct {
	datapath *datapath.Datapath
	ledger   *lossLedger
	lost     func(stage, cause string, n uint64, ranges ...*api.CPURange)
	allow    func(uint64) // what an agent had may have been final records

	mark   *datapath.Mark // owned by settle; what is waited for
	looked bool           // owned by settle; what an earlier agent left was looked for
}

func (r *ringLosses) settle() error {
	if r.mark == nil {
		m, err := r.datapath.Mark()
		if err != nil {
			return fmt.Errorf("read losses: %w", err)
		}
		if r.looked && r.ledger.told(m.Losses()) {
			return nil
		}
		r.mark = &m
	}
	if !r.datapath.Passed(*r.mark) {
		return nil
	}
	gaps, err := r.datapath.Gaps(*r.mark)
	if err != nil {
		return fmt.Errorf("read losses: %w", err)
	}
	if gaps.Untold > 0 {
		r.lost(audit.StageAgentMemory, audit.CauseAgentRestart, gaps.Untold, cpuRanges(gaps.Taken)...)
		r.allow(gaps.Untold)
	}
	err = r.ledger.settle(r.mark.Losses(), func(cause string, n uint64) {
		ranges := gaps.MustDeliver
		if cause == causeBestEffort {
			ranges = gaps.BestEffort
		}
		r.lost(audit.StageKernelRing, cause, n, cpuRanges(ranges)...) // no final record is among them: its flow stays (tides)
	})
	r.datapath.SetGaps(*r.mark, gaps)
	r.mark, r.looked = nil, true
	return err
}

func cpuRanges(ranges []datapath.Range) (out []*api.CPURange) {
	for _, r := range ranges {
		out = append(out, &api.CPURange{Cpu: int32(r.CPU), First: r.First, Last: r.Last})
	}
	return out
}

// lastDurable is how many of the last critical entries may have become durable without its being noted beside the rings.
const lastDurable = 4096

// unkept are the records that an earlier agent had read from the rings, and that are nowhere: a kill can come after a record became
// durable, and before that is noted.
func unkept(ctx context.Context, d *datapath.Datapath, s *store.Store) ([]datapath.Range, error) {
	if len(d.Unkept()) == 0 {
		return nil, nil
	}
	last, _, err := s.Seqs(ctx)
	if err != nil {
		return nil, err
	}
	entries, err := s.Entries(ctx, last-min(last, lastDurable), lastDurable)
	if err != nil {
		return nil, err
	}
	booted := time.Now().Add(-datapath.BootTime()).Add(-time.Second)
	for _, e := range entries {
		var entry api.Entry
		if proto.Unmarshal(e.Data, &entry) != nil {
			continue // who sends it counts it
		}
		if rec := entry.GetFlow(); rec != nil && rec.GetTime().AsTime().After(booted) {
			d.Kept(flow.Record{CPU: int(rec.GetCpu()), Seq: rec.GetSeq()})
		}
	}
	return d.Unkept(), nil
}
