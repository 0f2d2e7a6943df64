package agent

import (
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/signal"
)

// history is what the node remembers of grants, for the signals that it gives itself. Its owner holds the lock.
type history struct {
	seen   map[string]bool
	recent map[string][]time.Time // activations, by person
}

func newHistory() *history {
	return &history{seen: make(map[string]bool), recent: make(map[string][]time.Time)}
}

func (m *history) note(p grant.Payload, activated time.Time) {
	for _, a := range p.Addresses {
		m.seen[p.Service+" "+a.String()] = true
	}
	if !policy.IsWorkload(p.Requester) { // whose requests are bounded by rates
		m.recent[p.Requester] = append(m.recent[p.Requester], activated)
	}
}

// of forgets the person's grants that are too long ago.
func (m *history) of(f signal.Facts, now time.Time) signal.History {
	recent := slices.DeleteFunc(m.recent[f.Requester], func(t time.Time) bool { return now.Sub(t) > signal.LookBack })
	if m.recent[f.Requester] = recent; len(recent) == 0 {
		delete(m.recent, f.Requester)
	}
	return signal.History{Recent: len(recent),
		Seen: func(service string, client netip.Addr) bool { return m.seen[service+" "+client.String()] }}
}
