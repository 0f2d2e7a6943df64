package agent

import (
	"context"
	"errors"
	"sync"
	"time"
)

// notReadyRetry is how often an agent that is not ready looks again.
const notReadyRetry = time.Second

// errNotProbed is the state before the first probe.
var errNotProbed = errors.New("hooks are not probed yet")

// readiness says that the node is ready once probes crossed the hooks, while no canary saw a port open, and asks again after every
// change of devices or resources. It does not depend on the proxy: without one, what is steered is closed, and that is enforcement too.
type readiness struct {
	probe    probe
	enforced func() *enforced
	problems *problems
	notify   notifier
	open     func() error // what canaries saw open; nil: nobody asks them
	kick     chan struct{}

	mu  sync.Mutex
	why error // guarded by mu; nil: ready
}

func newReadiness(p probe, current func() *enforced, problems *problems, n notifier) *readiness {
	return &readiness{probe: p, enforced: current, problems: problems, notify: n, kick: make(chan struct{}, 1), why: errNotProbed}
}

// state tells why the node is not ready; nil if it is.
func (r *readiness) state() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.why
}

// poke asks for another probe.
func (r *readiness) poke() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Run probes until ctx ends.
func (r *readiness) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.kick:
		case <-timer.C:
		}
		if err := r.check(ctx); err != nil && ctx.Err() == nil {
			timer.Reset(notReadyRetry)
		}
	}
}

func (r *readiness) check(ctx context.Context) error {
	err := r.probe.all(ctx, probeTargets(inForce(r.enforced().services)))
	r.problems.report(problemProbe, "", err)
	if r.open != nil {
		err = errors.Join(err, r.open()) // canaries have problems of their own
	}
	r.mu.Lock()
	was := r.why
	r.why = err
	r.mu.Unlock()
	switch {
	case err == nil && was != nil:
		r.report(r.notify.ready())
	case err != nil && was == nil:
		r.report(r.notify.status("not ready: " + err.Error()))
	}
	return err
}

func (r *readiness) report(err error) { r.problems.report(problemProbe, "service manager", err) }
