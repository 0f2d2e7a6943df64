package agent

import (
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// modeOf is the kernel's word for a mode. One that is not known is enforced.
func modeOf(s policy.ProtectedService) datapath.Mode {
	switch s.Spec.Mode {
	case policy.ModeObserve:
		return datapath.Observe
	case policy.ModeShadow:
		return datapath.Shadow
	}
	return datapath.Enforce
}

// inForce leaves out the services that are not enforced.
func inForce(services []datapath.Service) []datapath.Service {
	return slices.DeleteFunc(slices.Clone(services), func(s datapath.Service) bool { return s.Mode != datapath.Enforce })
}

// notEnforced names the services that everybody reaches, with their modes.
func notEnforced(set *policy.Set) (names []string) {
	for _, s := range set.Services() {
		if !s.Enforced() {
			names = append(names, fmt.Sprintf("%s (%s)", s.Name, s.Spec.Mode))
		}
	}
	return names
}

// describeWatched is nil for a service that is enforced.
func describeWatched(w datapath.Watched, m datapath.Mode) *api.Watched {
	if m == datapath.Enforce {
		return nil
	}
	seen := func(s datapath.Seen) *api.Seen { return &api.Seen{Opens: s.Opens, Packets: s.Packets, Bytes: s.Bytes} }
	return &api.Watched{Seen: seen(w.Seen), Proxied: seen(w.Proxied), Bypassed: seen(w.Bypassed), Denied: seen(w.Denied)}
}

// watched tells how many services have which mode, and what was seen of those that are not enforced.
func (m *metrics) watched(ch chan<- prometheus.Metric) error {
	modes := map[policy.Mode]int{policy.ModeEnforce: 0, policy.ModeShadow: 0, policy.ModeObserve: 0}
	e := m.node.resources.current()
	if e == nil {
		return nil
	}
	for _, s := range e.set.Services() {
		modes[s.Spec.Mode]++
	}
	for mode, n := range modes {
		gauge(ch, m.modes, float64(n), string(mode))
	}
	seen, err := m.node.datapath.Watched()
	if err != nil {
		return err
	}
	m.unjudged.keep(seen)
	for _, s := range e.services {
		if w, ok := seen[s.ID]; ok && s.Mode != datapath.Enforce {
			m.seen(ch, s.Name, w, m.unjudged.of(s.ID, w))
		}
	}
	return nil
}

// seen tells of each packet once: by what Enforce would have made of it while the service was shadowed, and as NONE while it was
// observed.
func (m *metrics) seen(ch chan<- prometheus.Metric, service string, w datapath.Watched, none datapath.Seen) {
	for verdict, v := range map[flow.Verdict]datapath.Seen{
		flow.VerdictNone: none, flow.VerdictProxied: w.Proxied, flow.VerdictBypassed: w.Bypassed, flow.VerdictDenied: w.Denied,
	} {
		counter(ch, m.seenOpens, v.Opens, service, verdict.String())
		counter(ch, m.seenPackets, v.Packets, service, verdict.String())
		counter(ch, m.seenBytes, v.Bytes, service, verdict.String())
	}
}

// unjudged is what was seen without a verdict, by the id of the service. The kernel counts all and each verdict, and is read while it
// counts: the difference may go back by a packet, which a counter must not, so the highest is kept. Safe for concurrent use.
type unjudged struct {
	mu   sync.Mutex
	told map[uint32]unjudgedOf // guarded by mu
}

type unjudgedOf struct{ seen, none datapath.Seen }

// keep forgets services that are not watched any more, or are again: they begin anew.
func (u *unjudged) keep(seen map[uint32]datapath.Watched) {
	u.mu.Lock()
	defer u.mu.Unlock()
	maps.DeleteFunc(u.told, func(id uint32, told unjudgedOf) bool { return seen[id].Seen.Packets < told.seen.Packets })
}

func (u *unjudged) of(id uint32, w datapath.Watched) datapath.Seen {
	rest := func(all, a, b, c uint64) uint64 { return all - min(all, a+b+c) }
	none := datapath.Seen{
		Opens:   rest(w.Seen.Opens, w.Proxied.Opens, w.Bypassed.Opens, w.Denied.Opens),
		Packets: rest(w.Seen.Packets, w.Proxied.Packets, w.Bypassed.Packets, w.Denied.Packets),
		Bytes:   rest(w.Seen.Bytes, w.Proxied.Bytes, w.Bypassed.Bytes, w.Denied.Bytes),
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	before := u.told[id].none
	none = datapath.Seen{Opens: max(none.Opens, before.Opens), Packets: max(none.Packets, before.Packets), Bytes: max(none.Bytes, before.Bytes)}
	u.told[id] = unjudgedOf{w.Seen, none}
	return none
}
