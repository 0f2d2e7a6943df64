package agent

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// candidate computes beside what is in force what another set of resources would make of the node's flows. It decides
// nothing, and keeps nobody waiting: when records come faster than it reads, some are not counted, and the log says so.
type candidate struct {
	dir      string // empty: there is none
	recent   *recent
	facts    func(id string, keys map[string]policy.KnownKey) (policy.GrantFacts, bool) // of an active grant
	problems *problems
	log      *slog.Logger

	mu     sync.Mutex
	set    *policy.Set                 // guarded by mu; nil until one could be read
	counts map[candidateLabels]float64 // guarded by mu; of this set
}

type candidateLabels struct {
	service string // of the candidate; empty where it protects nothing
	fate    policy.Fate
}

// runCandidate follows the node's records until ctx ends.
func (n *node) runCandidate(ctx context.Context) error {
	n.candidate.facts = n.grants.factsOf
	return n.candidate.Run(ctx)
}

// Run reads the directory every resyncEvery and counts the fate of each flow, until ctx ends.
func (c *candidate) Run(ctx context.Context) error {
	if c.dir == "" {
		<-ctx.Done()
		return nil
	}
	c.read()
	again := time.NewTicker(resyncEvery)
	defer again.Stop()
	for {
		_, follower, leave := c.recent.follow(0)
		behind := c.follow(ctx, follower, again.C)
		leave()
		if !behind {
			return nil
		}
		c.log.Warn("candidate fell behind the node's records: some are not counted")
	}
}

// follow counts until ctx ends, or until it fell behind.
func (c *candidate) follow(ctx context.Context, f *follower, again <-chan time.Time) (behind bool) {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-again:
			c.read()
		case rec, ok := <-f.records:
			if !ok {
				return true
			}
			c.take(rec)
		}
	}
}

// read looks at the directory again. A candidate that is wrong leaves the one before; another begins its counts anew.
func (c *candidate) read() {
	err := checkTrustedDir(c.dir)
	var set *policy.Set
	if err == nil {
		set, err = policy.LoadDir(c.dir)
	}
	c.problems.report(problemCandidate, "", err)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && c.set.Digest() != set.Digest() {
		c.set, c.counts = set, make(map[candidateLabels]float64)
		c.log.Info("candidate is computed", "digest", set.Digest(), "directory", c.dir)
	}
}

func (c *candidate) current() *policy.Set {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.set
}

// take counts what would become of a flow. A record that stands for several of what was refused or watched counts as so many.
func (c *candidate) take(rec flow.Record) {
	set := c.current()
	seen, ok := policy.SeenOf(rec.Event.String(), rec.Verdict.String(), rec.Reason.String())
	if set == nil || !ok {
		return
	}
	seen.Protocol, seen.Server, seen.Service, seen.At = rec.Protocol, rec.Server, rec.Service, rec.Time
	if id, err := spiffeid.FromString(rec.Identity); err == nil {
		seen.Identity = id
	}
	if seen.Bypassed {
		if facts, ok := c.facts(rec.Grant, policy.KnownKeys(set.Keyrings())); ok {
			seen.Grant = &facts
		}
	}
	fate, _ := set.Replay(seen)
	service, _ := set.ServiceSeen(seen)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[candidateLabels{service.Name, fate}] += float64(max(rec.Count, 1))
}

// factsOf is what policy looks at in an active grant of people, by the keys as another set has them.
func (g *grants) factsOf(id string, keys map[string]policy.KnownKey) (policy.GrantFacts, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	h, ok := g.active[id]
	if !ok || h.holding != nil {
		return policy.GrantFacts{}, false
	}
	v := grant.Verified{Payload: h.payload}
	for _, id := range h.row.Signers {
		if k, ok := keys[id]; ok && !k.Revoked && !k.Ended(h.row.Activated) {
			v.Signers = append(v.Signers, policy.Signer{Person: k.Person, KeyID: id, Uses: k.Uses})
		}
	}
	return v.Facts(nil, h.row.Activated), true
}

func (c *candidate) desc() *prometheus.Desc {
	return desc("candidate_flows_total", "Flows by what the candidate resources would make of them, since they were last changed; of what was refused or watched each SYN or datagram.", "service", "fate")
}

// Describe implements prometheus.Collector.
func (c *candidate) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc() }

// Collect implements prometheus.Collector.
func (c *candidate) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for l, n := range c.counts {
		ch <- prometheus.MustNewConstMetric(c.desc(), prometheus.CounterValue, n, l.service, string(l.fate))
	}
}
