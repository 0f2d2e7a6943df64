package agent

import (
	"context"
	"fmt"
	"sync"

	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// Sources of flow records: a bounded metric label.
const (
	sourceKernel = "kernel"
	sourceProxy  = "proxy"
	sourceCanary = "canary" // the proxy's, of a connection that a canary made
)

// sink takes every flow record of the node and hands it to all who want it. Safe for concurrent use; it never keeps a
// giver waiting.
type sink struct {
	audit   *audit.Streamer
	recent  *recent
	counts  *flowCounter
	ports   *portUse
	lately  *lately // nil: nobody asks
	tides   *tides
	callers *openers // nil: nobody looks at them
	watch   *rolloutWatch
	isProbe func(grant string) bool // nil: none is
}

func (s *sink) take(source string, rec flow.Record) {
	rec = s.complete(source, rec)
	s.note(source, rec)
	s.audit.Flow(rec)
	if source == sourceKernel {
		s.tides.note(rec)
	}
}

// complete adds what the giver does not know: who called, and that a path is for probes.
func (s *sink) complete(source string, rec flow.Record) flow.Record {
	rec = s.callers.complete(source, rec)
	if rec.Reason == flow.ReasonPathOpen && s.isProbe != nil && s.isProbe(rec.Grant) {
		rec.Reason = flow.ReasonProbe
	}
	return rec
}

func (s *sink) note(source string, rec flow.Record) {
	s.counts.count(source, rec)
	s.recent.add(rec)
	s.ports.note(rec)
	if source != sourceCanary {
		s.lately.note(rec)
		s.watch.note(rec)
	}
}

// kernelEvents reads the kernel's rings.
type kernelEvents struct {
	datapath *datapath.Datapath
	sink     *sink
}

// Run reads until ctx ends. While the disk is behind, opens of bypassed flows wait in their ring, and a full ring admits no
// more (invariant 5). An error ends the agent: nobody would read the rings.
func (k *kernelEvents) Run(ctx context.Context) error {
	err := k.datapath.ReadEvents(ctx, func(rec flow.Record) {
		rec = k.sink.complete(sourceKernel, rec)
		k.sink.note(sourceKernel, rec)
		// The error is that of ctx, and the record is then counted as lost.
		if err := k.sink.audit.Critical(ctx, rec); err != nil || !audit.IsCritical(rec) {
			defer k.datapath.Kept(rec) // what is critical is kept once it is durable
		}
		k.sink.tides.note(rec)
	})
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("read events: %w", err)
	}
	return nil
}

// rebuild tells of the flows that were alive when the agent came: the record of their opening may be lost with the agent
// before.
func (k *kernelEvents) rebuild() error {
	flows, err := k.datapath.LiveFlows()
	if err != nil {
		return fmt.Errorf("read live flows: %w", err)
	}
	for _, rec := range flows {
		k.sink.take(sourceKernel, rec)
	}
	return nil
}

// flowCounter counts flow records by labels that are bounded.
type flowCounter struct {
	mu sync.Mutex
	n  map[flowLabels]uint64 // guarded by mu
}

type flowLabels struct{ source, event, verdict, reason string }

func newFlowCounter() *flowCounter { return &flowCounter{n: make(map[flowLabels]uint64)} }

func (c *flowCounter) count(source string, rec flow.Record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if rec.Event == flow.EventWatched {
		rec.Verdict = flow.VerdictNone // its own is what Enforce would have said
	}
	c.n[flowLabels{source, bounded(rec.Event), bounded(rec.Verdict), bounded(rec.Reason)}] += max(rec.Count, 1)
}

// bounded is the name of an enum's value, and "other" for a number that has none: a label takes no value from outside.
func bounded(v fmt.Stringer) string {
	s := v.String()
	if s == "" || s[0] >= '0' && s[0] <= '9' {
		return "other"
	}
	return s
}

func (c *flowCounter) each(f func(flowLabels, uint64)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for l, n := range c.n {
		f(l, n)
	}
}

// eventCounter counts grant events by step.
type eventCounter struct {
	mu sync.Mutex
	n  map[string]uint64 // guarded by mu
}

func newEventCounter() *eventCounter {
	c := &eventCounter{n: make(map[string]uint64)}
	for _, step := range []string{stepActivated, stepRevoked, stepExpired, stepSpent, stepIdle, stepWarned, stepSignalled, stepRefused, stepUninstalled, stepAlarm, stepPanic, stepLifted,
		stepAdvanced, stepHalted, stepResumed, stepFellBack, stepRolledOut} {
		c.n[step] = 0
	}
	return c
}

func (c *eventCounter) count(step string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n[step]++
}

func (c *eventCounter) each(f func(step string, n uint64)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s, n := range c.n {
		f(s, n)
	}
}
