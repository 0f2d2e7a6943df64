package agent

import (
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/signal"
)

// maxSeen is how many pairs of a service and a client are remembered at least, and half of how many at most.
const maxSeen = 32768

// history is what the node remembers of grants, for the signals that it gives itself. Its owner holds the lock.
type history struct {
	seen, seenBefore map[serviceClient]bool // the newest, and those of before it was full
	recent           map[string][]time.Time // activations, by person
}

type serviceClient struct {
	service string
	client  netip.Addr
}

func newHistory() *history {
	return &history{seen: make(map[serviceClient]bool), recent: make(map[string][]time.Time)}
}

func (m *history) note(p grant.Payload, activated time.Time) {
	for _, a := range p.Addresses {
		if len(m.seen) >= maxSeen {
			m.seen, m.seenBefore = make(map[serviceClient]bool), m.seen
		}
		m.seen[serviceClient{p.Service, a}] = true
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
	return signal.History{Recent: len(recent), Seen: m.has}
}

func (m *history) has(service string, client netip.Addr) bool {
	pair := serviceClient{service, client}
	return m.seen[pair] || m.seenBefore[pair]
}
