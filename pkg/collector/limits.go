package collector

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Limits of one node, so that it cannot take the disk from the others. Over them a batch waits, and so does its acknowledgement:
// nothing is dropped here. 0: none.
type Limits struct {
	RecordsPerSecond int
	BytesPerSecond   int
}

const (
	// silentAfter is how long a node may be away before it counts as silent.
	silentAfter = 5 * time.Minute
	// forgottenAfter is how long a node that is away is counted at all.
	forgottenAfter = 7 * 24 * time.Hour
)

// nodeState is what a node is for the collector now.
type nodeState string

const (
	nodeConnected nodeState = "connected"
	nodeAway      nodeState = "away"
	nodeSilent    nodeState = "silent"
)

// nodes are those that the collector has heard of: while it runs, and before it ran on the newest day that has records. Safe for
// concurrent use.
type nodes struct {
	limits Limits
	boot   func() time.Duration
	log    *slog.Logger

	mu    sync.Mutex
	known map[string]*presence // by node; guarded by mu
}

// presence is one node's.
type presence struct {
	streams        int
	told           bool          // that it is silent
	heard          time.Duration // boot time at which it was last connected
	records, bytes *rate.Limiter // nil: no limit
	entering       chan struct{} // of capacity 1: full while a stream of the node begins
}

func newNodes(limits Limits, boot func() time.Duration, log *slog.Logger) *nodes {
	return &nodes{limits: limits, boot: boot, log: log, known: map[string]*presence{}}
}

// remember notes the nodes of the newest day: those that do not come back are missed.
func (n *nodes) remember(ctx context.Context, e engine) error {
	days, err := e.days(ctx)
	if err != nil || len(days) == 0 {
		return err
	}
	_, err = days[len(days)-1].read(func(db tables) error {
		for _, t := range recordTables {
			q := fmt.Sprintf(`SELECT node FROM %s%s WHERE node > $1 ORDER BY node LIMIT 1`, t, db.suffix)
			for node := ""; ; { // each step goes down the index once, however many records a node has
				err := db.QueryRowContext(ctx, q, node).Scan(&node)
				if errors.Is(err, sql.ErrNoRows) {
					break
				}
				if err != nil {
					return err
				}
				n.heard(node, 0)
			}
		}
		return nil
	})
	return err
}

// heard notes that a node was there now, with so many streams more.
func (n *nodes) heard(node string, streams int) *presence {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.known[node]
	if !ok {
		p = &presence{records: limiter(n.limits.RecordsPerSecond), bytes: limiter(n.limits.BytesPerSecond), entering: make(chan struct{}, 1)}
		n.known[node] = p
	}
	p.heard, p.told = n.boot(), false
	p.streams += streams
	return p
}

// count tells how many nodes are in each state, and forgets those that are away for long. The log names each that has become silent.
func (n *nodes) count() map[nodeState]int {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := map[nodeState]int{nodeConnected: 0, nodeAway: 0, nodeSilent: 0}
	now := n.boot()
	for node, p := range n.known {
		switch away := now - p.heard; {
		case p.streams > 0:
			out[nodeConnected]++
		case away >= forgottenAfter:
			delete(n.known, node)
		case away >= silentAfter:
			out[nodeSilent]++
			if !p.told {
				p.told = true
				n.log.Warn("node is silent", "node", node, "away", away.Round(time.Second))
			}
		default:
			out[nodeAway]++
		}
	}
	return out
}

// limiter lets a second's worth through at once.
func limiter(perSecond int) *rate.Limiter {
	if perSecond <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(perSecond), perSecond)
}

// owes takes a batch off the node's share, and returns how long it has to wait for that.
func (p *presence) owes(b *api.Batch) time.Duration {
	return max(reserve(p.records, len(b.GetRaw())), reserve(p.bytes, proto.Size(b)))
}

// reserve may take more than a second's worth: what is over is paid off by those that follow.
func reserve(l *rate.Limiter, n int) (wait time.Duration) {
	if l == nil {
		return 0
	}
	now := time.Now()
	for ; n > 0; n -= l.Burst() {
		wait = l.ReserveN(now, min(n, l.Burst())).DelayFrom(now)
	}
	return wait
}

// hold keeps a batch until the node's share allows it.
func (g *ingest) hold(ctx context.Context, s *session, b *api.Batch) error {
	wait := s.presence.owes(b)
	if wait == 0 {
		return nil
	}
	began := time.Now()
	defer func() { g.meters.delayed.Add(time.Since(began).Seconds()) }()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-s.over:
		return status.Errorf(codes.Aborted, "node %q opened another stream", s.node)
	case <-g.stopping.Done():
		return status.Error(codes.Unavailable, errStopping.Error())
	}
}
