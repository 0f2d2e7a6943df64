package agent

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/rollout"
)

const (
	// foreseenFor is how long a client that Enforce would refuse is remembered: a job of each night is among them.
	foreseenFor = 24 * time.Hour
	// maxForeseen bounds the clients that are remembered of one service; the rest is counted together.
	maxForeseen = 512
	// maxToldClients bounds those of which it is kept that Shadow has told.
	maxToldClients = 256
)

// rolloutWatch counts what is refused at services of roll-outs, and foresees what Enforce would refuse while they are shadowed. It
// takes flow records, keeps no giver waiting, and forgets everything with the agent.
type rolloutWatch struct {
	clock clock
	state func(rollout string) rollout.State
	kick  func() // a budget is spent

	mu       sync.Mutex
	strict   *policy.Set                // guarded by mu; with every service of a roll-out enforced
	services map[string]*watchedService // guarded by mu; by name
}

// watchedService is one service of a roll-out. Times are CLOCK_BOOTTIME.
type watchedService struct {
	rollout  policy.Rollout
	began    time.Duration
	tally    rollout.Tally
	foreseen map[netip.Addr]*foreseen
	seen     uint64 // connections
	beyond   uint64 // of clients that were too many to remember
}

// foreseen is a client that Enforce would refuse.
type foreseen struct {
	opens uint64
	last  time.Duration
	why   string
	known bool // whatever it would prove
}

// follow looks at the services of the roll-outs in force.
func (w *rolloutWatch) follow(e *enforced) {
	now, strict, all := w.clock.boot(), map[string]policy.Mode{}, map[string]*watchedService{}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range e.verified.Rollouts() {
		for _, name := range r.Spec.Services {
			strict[name] = policy.ModeEnforce
			s := w.services[name]
			if s == nil || s.rollout.Spec.Budget.Window != r.Spec.Budget.Window {
				s = &watchedService{began: now, foreseen: map[netip.Addr]*foreseen{}}
			}
			s.rollout = r
			all[name] = s
		}
	}
	if set := e.verified.AtModes(strict); set.Digest() != w.strict.Digest() {
		for _, s := range all { // what was foreseen was foreseen by other rules
			s.began, s.foreseen, s.seen, s.beyond = now, map[netip.Addr]*foreseen{}, 0, 0
		}
		w.strict = set
	}
	w.services = all
}

// note takes a flow record.
func (w *rolloutWatch) note(rec flow.Record) {
	if w == nil || rec.Service == "" {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.services[rec.Service]
	if s == nil {
		return
	}
	switch rec.Event {
	case flow.EventWatched:
		w.foresee(s, rec)
	case flow.EventOpen:
		s.tally.Add(s.rollout.Spec.Budget, w.clock.boot(), max(rec.Count, 1), 0)
	case flow.EventDeny:
		w.refused(s, rec)
	}
}

// refused counts a refusal, unless Shadow has told of it. A client that only knocked, as the agent's own probes do, was refused nothing.
// w.mu is held.
func (w *rolloutWatch) refused(s *watchedService, rec flow.Record) {
	b, state := s.rollout.Spec.Budget, w.state(s.rollout.Name)
	if strings.Contains(rec.Detail, flow.DetailLeft) || !b.Counts(rec.Client.Addr(), rec.Reason) || state.Modes[rec.Service] != policy.ModeEnforce || isTold(state, rec.Service, rec.Client.Addr()) {
		return
	}
	now := w.clock.boot()
	s.tally.Add(b, now, 0, max(rec.Count, 1))
	if served, refused := s.tally.Within(b, now); rollout.Spent(b, served, refused) != "" {
		w.kick()
	}
}

// foresee notes what Enforce would make of a connection, by the evaluator that replays records. w.mu is held.
func (w *rolloutWatch) foresee(s *watchedService, rec flow.Record) {
	seen, ok := policy.SeenOf(rec.Event.String(), rec.Verdict.String(), rec.Reason.String())
	if !ok {
		return
	}
	seen.Protocol, seen.Server, seen.Service, seen.At = rec.Protocol, rec.Server, rec.Service, rec.Time
	s.seen += max(rec.Count, 1)
	fate, why := w.strict.Replay(seen)
	if fate != policy.FateBreaks {
		return
	}
	client := rec.Client.Addr().Unmap()
	f := s.foreseen[client]
	if f == nil {
		if len(s.foreseen) >= maxForeseen && !w.makeRoom(s) {
			s.beyond += max(rec.Count, 1)
			return
		}
		f = &foreseen{known: true}
		s.foreseen[client] = f
	}
	f.opens += max(rec.Count, 1)
	f.last, f.why, f.known = w.clock.boot(), why, f.known && seen.Refusal != ""
}

// makeRoom forgets clients that have not come for long.
func (w *rolloutWatch) makeRoom(s *watchedService) bool {
	for client, f := range s.foreseen {
		if w.clock.boot()-f.last > foreseenFor {
			delete(s.foreseen, client)
		}
	}
	return len(s.foreseen) < maxForeseen
}

// spent tells how the budget is spent at a service; empty: it is not.
func (w *rolloutWatch) spent(r policy.Rollout, service string) string {
	served, refused := w.within(r, service)
	return rollout.Spent(r.Spec.Budget, served, refused)
}

func (w *rolloutWatch) within(r policy.Rollout, service string) (served, refused uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.services[service]; s != nil {
		return s.tally.Within(r.Spec.Budget, w.clock.boot())
	}
	return 0, 0
}

// anew begins the windows of services that go over to Enforce.
func (w *rolloutWatch) anew(services []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range services {
		if s := w.services[name]; s != nil {
			s.tally = rollout.Tally{}
		}
	}
}

// told are the clients that Enforce would refuse whatever they prove, and of which Shadow has told.
func (w *rolloutWatch) told(r policy.Rollout) map[string][]netip.Addr {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := make(map[string][]netip.Addr)
	for _, name := range r.Spec.Services {
		s := w.services[name]
		if s == nil {
			continue
		}
		for client, f := range s.foreseen {
			if f.known && len(all[name]) < maxToldClients {
				all[name] = append(all[name], client)
			}
		}
		slices.SortFunc(all[name], netip.Addr.Compare)
	}
	return all
}

// forecast is what Enforce would refuse at a service, the most connections first.
type forecast struct {
	since   time.Duration // CLOCK_BOOTTIME
	seen    uint64
	refused uint64 // of clients that the budget is for
	clients []foreseenClient
}

type foreseenClient struct {
	addr netip.Addr
	foreseen
}

func (w *rolloutWatch) forecast(r policy.Rollout, service string) (out forecast) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.services[service]
	if s == nil {
		return out
	}
	out.since, out.seen, out.refused = s.began, s.seen, s.beyond
	b := policy.ErrorBudget{Clients: r.Spec.Budget.Clients, Except: r.Spec.Budget.Except}
	for addr, f := range s.foreseen {
		if w.clock.boot()-f.last > foreseenFor {
			continue
		}
		out.clients = append(out.clients, foreseenClient{addr, *f})
		if b.Counts(addr, flow.ReasonNoTLS) { // a reason that counts: it is the client that is asked for
			out.refused += f.opens
		}
	}
	slices.SortFunc(out.clients, func(a, b foreseenClient) int { return cmp.Or(cmp.Compare(b.opens, a.opens), a.addr.Compare(b.addr)) })
	return out
}
