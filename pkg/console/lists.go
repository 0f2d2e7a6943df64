package console

import (
	"context"
	"net/http"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// watchedFor is how far back a service that is not enforced was seen.
const watchedFor = 24 * time.Hour

type nodesPage struct {
	Nodes     []*node
	Connected int
}

func (c *console) nodes(r *http.Request) (answer, error) {
	now := c.cfg.Now()
	nodes, err := c.coverage(r.Context(), now)
	if err != nil {
		return answer{}, err
	}
	if err := c.addWatched(r.Context(), nodes, now); err != nil {
		return answer{}, err
	}
	p := nodesPage{Nodes: nodes}
	for _, n := range nodes {
		if n.Connected {
			p.Connected++
		}
	}
	return answer{name: "nodes", title: "Nodes", data: p, refresh: true}, nil
}

// addWatched names the services that nodes told that they only watch.
func (c *console) addWatched(ctx context.Context, nodes []*node, now time.Time) error {
	q := &api.FlowQuery{Event: flow.EventWatched.String(), Since: timestamppb.New(now.Add(-watchedFor)), Limit: 2000}
	stream, err := c.cfg.Audit.Flows(ctx, q)
	watched, _, err := collect(q.GetLimit(), stream, err)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		for _, w := range watched {
			if w.GetNode() == n.Name {
				n.NotEnforced = append(n.NotEnforced, w.GetFlow().GetService())
			}
		}
		slices.Sort(n.NotEnforced)
		n.NotEnforced = slices.Compact(n.NotEnforced)
	}
	return nil
}

// reviewPeriods are how far back one looks for break-glass grants, in days.
var reviewPeriods = map[string]int{"": 30, "7": 7, "30": 30, "90": 90}

type reviewsPage struct {
	Open []openReview
	Days int
	Full bool
}

func (c *console) reviews(r *http.Request) (answer, error) {
	days, ok := reviewPeriods[r.FormValue("days")]
	if !ok {
		return answer{}, wrongInput("The page looks back 7, 30 or 90 days.", "Choose one of these.")
	}
	now := c.cfg.Now()
	since := now.AddDate(0, 0, -days)
	broke, full, err := c.events(r.Context(), since, activated)
	if err != nil {
		return answer{}, err
	}
	done, fullDone, err := c.events(r.Context(), since, reviewed)
	if err != nil {
		return answer{}, err
	}
	return answer{name: "reviews", title: "Reviews", data: reviewsPage{openReviews(broke, done, now), days, full || fullDone}, refresh: true}, nil
}

// maxLosses is how many losses a page shows.
const maxLosses = 500

type loss struct {
	Node, Class, Stage, Cause string
	Count                     uint64
	AtMost                    bool
	From, To, Received        time.Time
	First, Last               uint64 // numbers of its sequence
	Ranges                    []*api.CPURange
}

type lossesPage struct {
	Node   string
	Losses []loss // newest first
	Full   bool
	Total  uint64
}

func (c *console) losses(r *http.Request) (answer, error) {
	q := &api.LossQuery{Node: r.FormValue("node"), Limit: maxLosses}
	stream, err := c.cfg.Audit.Losses(r.Context(), q)
	stored, full, err := collect(q.GetLimit(), stream, err)
	if err != nil {
		return answer{}, err
	}
	p := lossesPage{Node: q.GetNode(), Full: full}
	for _, s := range slices.Backward(stored) {
		l := s.GetLoss()
		p.Losses = append(p.Losses, loss{Node: s.GetNode(), Class: className(s.GetClass()), Stage: l.GetStage(), Cause: l.GetCause(), Count: l.GetCount(), AtMost: l.GetAtMost(),
			From: at(l.GetFrom()), To: at(l.GetTo()), Received: at(s.GetReceived()), First: s.GetSeq() - l.GetCount() + 1, Last: s.GetSeq(), Ranges: l.GetRanges()})
		p.Total += l.GetCount()
	}
	return answer{name: "losses", title: "Losses", data: p}, nil
}

func className(c api.Class) string {
	if c == api.Class_CLASS_CRITICAL {
		return "critical"
	}
	return "flow"
}
