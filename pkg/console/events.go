package console

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// Steps in the life of a grant, as nodes tell them.
const (
	activated = "ACTIVATED"
	reviewed  = "REVIEWED"
)

// ends are the steps after which nothing of a grant is open on the node.
var ends = []string{"REVOKED", "EXPIRED", "SPENT", "IDLE", "ROLLED_BACK", "UNINSTALLED", "PANIC", "WITHDRAWN", "DENIED"}

const (
	// longest is how long the longest grant lasts (policy caps it at a day), and room for clocks.
	longest = 25 * time.Hour
	// maxEvents is how many grant events one page looks at.
	maxEvents = 10000
)

// place is a grant on a node: each node has a life of its own of it.
type place struct{ grant, node string }

func placeOf(e *api.StoredGrantEvent) place { return place{e.GetEvent().GetGrant(), e.GetNode()} }

// events reads the newest grant events since a time; with a step, those alone. full says that older ones were left out.
func (c *console) events(ctx context.Context, since time.Time, step string) (all []*api.StoredGrantEvent, full bool, err error) {
	q := &api.GrantQuery{Since: timestamppb.New(since), Limit: maxEvents, Step: step}
	stream, err := c.cfg.Audit.GrantEvents(ctx, q)
	all, full, err = collect(q.GetLimit(), light{stream}, err)
	all = slices.DeleteFunc(all, func(e *api.StoredGrantEvent) bool { return step != "" && e.GetEvent().GetStep() != step })
	return all, full, err
}

// livePath is a grant that is active on a node, as far as the collector was told.
type livePath struct {
	Grant, Node, Service, Requester, Why string
	Clients, Signals                     []string
	BreakGlass                           bool
	Since, Deadline                      time.Time
	Left                                 time.Duration
	Used                                 *usage // nil: no tide told yet
	Silent                               string // why the node may know more; empty: it is connected
}

// usage is what the kernel counted.
type usage struct {
	Flows, ToServer, ToClient uint64
	At                        time.Time
}

// livePaths are those that were activated and have no end, by deadline.
func livePaths(events []*api.StoredGrantEvent, now time.Time) []*livePath {
	open := map[place]*livePath{}
	for _, s := range events {
		e, at := s.GetEvent(), placeOf(s)
		switch path := open[at]; {
		case e.GetGrant() == "":
		case e.GetStep() == activated:
			open[at] = newLivePath(s, now)
		case slices.Contains(ends, e.GetStep()):
			delete(open, at)
		case path != nil && len(e.GetSignals()) > 0:
			path.Signals = e.GetSignals()
		}
	}
	var live []*livePath
	for _, p := range open {
		if p.Left > 0 {
			live = append(live, p)
		}
	}
	slices.SortFunc(live, func(a, b *livePath) int {
		if c := a.Deadline.Compare(b.Deadline); c != 0 {
			return c
		}
		return slices.Compare([]string{a.Grant, a.Node}, []string{b.Grant, b.Node})
	})
	return live
}

func newLivePath(s *api.StoredGrantEvent, now time.Time) *livePath {
	e := s.GetEvent()
	p := &livePath{Grant: e.GetGrant(), Node: s.GetNode(), Service: e.GetService(), Requester: e.GetRequester(), Why: e.GetWhy(), Clients: e.GetClients(),
		Signals: e.GetSignals(), BreakGlass: isBreakGlass(e), Since: at(e.GetTime()), Deadline: at(e.GetDeadline())}
	p.Left = p.Deadline.Sub(now)
	return p
}

func isBreakGlass(e *api.GrantEvent) bool { return e.GetKind() == string(grant.BreakGlass) }

// openReview is a break-glass grant that nobody has reviewed on a node where it was active.
type openReview struct {
	Grant, Node, Service, Requester, Why string
	Clients                              []string
	Since, Deadline                      time.Time
	Waiting                              string // since its end; empty: it is still live
}

// openReviews are oldest first.
func openReviews(broke, done []*api.StoredGrantEvent, now time.Time) (open []openReview) {
	closed := map[place]bool{}
	for _, e := range done {
		closed[placeOf(e)] = true
	}
	for _, s := range broke {
		e := s.GetEvent()
		if !isBreakGlass(e) || closed[placeOf(s)] {
			continue
		}
		closed[placeOf(s)] = true // a record that is there twice asks for one review
		r := openReview{Grant: e.GetGrant(), Node: s.GetNode(), Service: e.GetService(), Requester: e.GetRequester(), Why: e.GetWhy(), Clients: e.GetClients(),
			Since: at(e.GetTime()), Deadline: at(e.GetDeadline())}
		if !r.Deadline.After(now) {
			r.Waiting = ago(now, r.Deadline)
		}
		open = append(open, r)
	}
	slices.SortStableFunc(open, func(a, b openReview) int { return a.Since.Compare(b.Since) })
	return open
}
