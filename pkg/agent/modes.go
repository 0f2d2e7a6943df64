package agent

import (
	"fmt"
	"slices"

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

// watched tells how many services have which mode, and what was seen of those that are not enforced: of an observed one as NONE,
// of a shadowed one by the verdict that Enforce would have given.
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
	for _, s := range e.services {
		w, ok := seen[s.ID]
		would := map[flow.Verdict]datapath.Seen{flow.VerdictProxied: w.Proxied, flow.VerdictBypassed: w.Bypassed, flow.VerdictDenied: w.Denied}
		if s.Mode == datapath.Observe {
			would = map[flow.Verdict]datapath.Seen{flow.VerdictNone: w.Seen}
		}
		for verdict, v := range would {
			if ok && s.Mode != datapath.Enforce {
				counter(ch, m.seenOpens, v.Opens, s.Name, verdict.String())
				counter(ch, m.seenPackets, v.Packets, s.Name, verdict.String())
				counter(ch, m.seenBytes, v.Bytes, s.Name, verdict.String())
			}
		}
	}
	return nil
}
