package agent

import (
	"context"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// lately keeps for each service since when it has its mode, and when it was last seen, in the life of this agent. Safe for concurrent
// use.
type lately struct {
	mu  sync.Mutex
	all map[string]lastSeen // guarded by mu; of services in force alone: the proxy's records name what they like
}

type lastSeen struct {
	mode                      datapath.Mode
	since                     time.Time
	proxied, bypassed, denied time.Time
}

// note takes a flow record. What was only watched is no more than what Enforce would have said.
func (l *lately) note(rec flow.Record) {
	if l == nil || rec.Event == flow.EventWatched {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	seen, ok := l.all[rec.Service]
	if !ok {
		return
	}
	switch rec.Verdict {
	case flow.VerdictProxied:
		seen.proxied = later(seen.proxied, rec.Time)
	case flow.VerdictBypassed:
		seen.bypassed = later(seen.bypassed, rec.Time)
	case flow.VerdictDenied:
		seen.denied = later(seen.denied, rec.Time)
	}
	l.all[rec.Service] = seen
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// moved takes the services that are in force from now on. A mode that a service had before has held since then.
func (l *lately) moved(services []datapath.Service, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := make(map[string]lastSeen, len(services))
	for _, s := range services {
		seen, ok := l.all[s.Name]
		if !ok || seen.mode != s.Mode {
			seen.mode, seen.since = s.Mode, now
		}
		kept[s.Name] = seen
	}
	l.all = kept
}

func (l *lately) get(service string) lastSeen {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all[service]
}

// Coverage tells of each protected service how far it is protected, what was last made of its clients, and what canaries know.
func (o *operators) Coverage(context.Context, *api.CoverageRequest) (*api.CoverageReply, error) {
	canaries := o.canaries.coverage()
	reply := &api.CoverageReply{}
	for _, s := range o.enforced().set.Services() {
		seen, canary := o.lately.get(s.Name), canaries[s.Name]
		one := &api.Coverage{Service: s.Name, Mode: string(s.Spec.Mode), Since: timestamp(seen.since), Canary: canary.state, Why: canary.why,
			Proxied: timestamp(seen.proxied), Bypassed: timestamp(seen.bypassed), Denied: timestamp(seen.denied)}
		if canary.closed != 0 {
			one.Closed = timestamp(o.clock.wallAt(canary.closed))
		}
		reply.Services = append(reply.Services, one)
	}
	return reply, nil
}
