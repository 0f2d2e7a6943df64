package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// leaseTick is how often the dead-man lease is renewed; the shortest lease is twice as long.
const leaseTick = time.Second

// keeper renews the dead-man lease: as long as it runs, the kernel admits new bypassed flows. Its ticks wait for nothing: what
// could is done behind them.
type keeper struct {
	datapath *datapath.Datapath
	grants   *grants
	lease    time.Duration
	clock    clock
	problems *problems
	alarm    func(alarmName, string)
	pulse    *pulse
	notify   notifier

	origin time.Time     // owned by Run; wall minus boot time at the last tick
	last   time.Duration // owned by Run; boot time of the last tick
	steady time.Duration // owned by Run; boot time of the last jump, or of the start

	mu   sync.Mutex
	left beat          // guarded by mu; for settle
	more chan struct{} // there is something left
}

// beat is what ticks leave to be done by who may wait for the disk, or for the log.
type beat struct {
	jump   string        // why every path ends; empty: none does
	wrong  error         // of the last tick
	seen   time.Time     // wall clock, as of the tick
	steady time.Duration // since the last jump of the clock, at the tick
}

// Run ticks until ctx ends. What a tick could not do is a problem and is tried again: the lease lapses by itself.
func (k *keeper) Run(ctx context.Context) error {
	ticker := time.NewTicker(leaseTick)
	defer ticker.Stop()
	k.begin()
	settled := make(chan struct{})
	go func() {
		defer close(settled)
		k.settleAll(ctx)
	}()
	for {
		k.tick()
		select {
		case <-ctx.Done():
			<-settled
			return nil
		case <-ticker.C:
		}
	}
}

func (k *keeper) begin() {
	k.origin, k.last = k.clock.origin(), k.clock.boot()
	k.steady, k.more = k.last, make(chan struct{}, 1)
}

// tick renews the lease. A wall clock that moved against boot time was stepped, or the node was restored from a snapshot:
// then nothing that was granted counts any more, and nothing new is admitted before all of it is closed.
func (k *keeper) tick() {
	jump, err := k.jumped()
	if err == nil {
		err = k.datapath.Renew(k.lease)
	}
	k.leave(beat{jump: jump, wrong: errors.Join(err, k.alive()), seen: k.origin.Add(k.last), steady: k.last - k.steady})
}

// alive tells the service manager that the agent moves, if it does: a tick alone proves nothing of the hooks.
func (k *keeper) alive() error {
	if stalled := k.pulse.stalled(k.clock.boot()); len(stalled) > 0 {
		return fmt.Errorf("%w: %s", errStalled, strings.Join(stalled, ", "))
	}
	return k.notify.alive()
}

// jumped closes every path after a jump of the clock, and tells of it. One that could not be carried out is found again.
func (k *keeper) jumped() (jump string, err error) {
	origin, boot := k.clock.origin(), k.clock.boot()
	if jumped(k.origin, origin, boot-k.last) {
		jump = fmt.Sprintf("the wall clock moved by %s against boot time", origin.Sub(k.origin).Round(time.Second))
		k.steady = boot
		if err := k.grants.closeAll(ending{}.revoked("agent", jump)); err != nil {
			return jump, fmt.Errorf("end paths after a jump of the clock: %w", err)
		}
	}
	k.origin, k.last = origin, boot
	return jump, nil
}

// leave adds to what is left to be done.
func (k *keeper) leave(b beat) {
	k.mu.Lock()
	if b.jump == "" {
		b.jump = k.left.jump
	}
	k.left = b
	k.mu.Unlock()
	select {
	case k.more <- struct{}{}:
	default: // it has not looked yet
	}
}

func (k *keeper) settleAll(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.more:
			k.settle(ctx, k.takeLeft())
		}
	}
}

func (k *keeper) takeLeft() beat {
	k.mu.Lock()
	defer k.mu.Unlock()
	b := k.left
	k.left.jump = ""
	return b
}

// settle does what ticks left. Ends that could not be recorded are recorded by the sweeper; else every path ends anew.
func (k *keeper) settle(ctx context.Context, b beat) {
	if b.jump != "" {
		k.alarm(alarmClockJump, b.jump+": every path ends")
		err := k.grants.endAll(ctx, stepRevoked, b.jump, "agent")
		if err != nil && !errors.Is(err, errNotRecorded) {
			b.wrong = errors.Join(b.wrong, fmt.Errorf("end paths after a jump of the clock: %w", err))
			k.mu.Lock()
			k.left.jump = b.jump // for the next tick
			k.mu.Unlock()
		}
	}
	k.problems.report(problemLease, "", b.wrong)
	k.grants.remember(ctx, b.seen, b.steady)
}

// sweeper brings kernel and records together: grants that are over end, flows that are over are told of with their final
// counters, losses are reported. Nothing is enforced by it.
type sweeper struct {
	datapath *datapath.Datapath
	grants   *grants
	sink     *sink
	losses   *ringLosses
	tides    *tides
	problems *problems
	wake     <-chan struct{} // a grant ended
}

// sweepShare is the part of the time that sweeps may take, and sweepPause the longest that one waits for it.
const (
	sweepShare = 20
	sweepPause = time.Second
)

// Run sweeps each second, when a grant ended, and at the deadline of the one that ends next, until ctx ends. With thousands of
// grants a sweep takes a while: what ends meanwhile is swept together.
func (s *sweeper) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-timer.C:
		}
		began := time.Now()
		next := s.sweep(ctx)
		pause := min(sweepShare*time.Since(began), sweepPause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		timer.Reset(max(next-pause, 0))
	}
}

func (s *sweeper) sweep(ctx context.Context) (next time.Duration) {
	next, err := s.grants.tick(ctx)
	s.problems.report(problemGrants, "", err)
	s.problems.report(problemMemory, "store", s.grants.store.CatchUp(ctx))
	s.problems.report(problemGrants, "use", s.grants.KeepUses(ctx))
	s.problems.report(problemGrants, "refusals", s.grants.tellRefusals(ctx, refusalsTold))
	s.problems.report(problemGrants, "forget", s.grants.Forget(ctx))
	s.problems.report(problemEvents, "sweep", s.flows())
	s.problems.report(problemEvents, "losses", s.losses.settle())
	s.problems.report(problemEvents, "tides", s.tides.Look(ctx))
	return next
}

func (s *sweeper) flows() error {
	closed, err := s.datapath.Sweep()
	for _, rec := range closed {
		s.sink.take(sourceKernel, rec)
	}
	if err != nil {
		return fmt.Errorf("sweep flows: %w", err)
	}
	return nil
}
