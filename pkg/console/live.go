package console

import (
	"context"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

type livePage struct {
	Paths []*livePath
	Full  bool // there may be more than was looked at
	Open  int  // reviews
}

func (c *console) live(r *http.Request) (answer, error) {
	now := c.cfg.Now()
	events, full, err := c.events(r.Context(), now.Add(-longest), "")
	if err != nil {
		return answer{}, err
	}
	p := livePage{Paths: livePaths(events, now), Full: full}
	if err := c.addNodes(r.Context(), p.Paths, now); err != nil {
		return answer{}, err
	}
	return answer{name: "live", title: "Live paths", data: p, refresh: true}, c.addUsage(r.Context(), p.Paths)
}

// addNodes says of which paths the end may not have been told.
func (c *console) addNodes(ctx context.Context, paths []*livePath, now time.Time) error {
	nodes, err := c.coverage(ctx, now)
	if err != nil {
		return err
	}
	for _, p := range paths {
		p.Silent = "the node is not known"
		for _, n := range nodes {
			if n.Name == p.Node && n.Connected {
				p.Silent = ""
			} else if n.Name == p.Node {
				p.Silent = "the node is not connected, last heard " + n.Heard
			}
		}
	}
	return nil
}

// tidesOfNode is how many tides of a node are looked at: each has all its live paths, or one that ended.
const tidesOfNode = 20

// addUsage takes what the latest tides of the nodes say.
func (c *console) addUsage(ctx context.Context, paths []*livePath) error {
	byNode := map[string]map[string]*usage{}
	for _, p := range paths {
		byNode[p.Node] = nil
	}
	for _, node := range slices.Sorted(maps.Keys(byNode)) {
		q := &api.TideQuery{Node: node, Limit: tidesOfNode}
		stream, err := c.cfg.Audit.Tides(ctx, q)
		tides, _, err := collect(q.GetLimit(), stream, err)
		if err != nil {
			return err
		}
		byNode[node] = usages(tides)
	}
	for _, p := range paths {
		p.Used = byNode[p.Node][p.Grant]
	}
	return nil
}

// usages sums what the kernel counted for each grant, by the latest tide that names it. Tides are oldest first.
func usages(tides []*api.StoredTide) map[string]*usage {
	all := map[string]*usage{}
	for _, t := range tides {
		told := at(t.GetTide().GetTime())
		for _, p := range t.GetTide().GetPaths() {
			u := all[p.GetGrant()]
			if u == nil || !u.At.Equal(told) {
				u = &usage{At: told}
				all[p.GetGrant()] = u
			}
			u.Flows += p.GetKernel().GetFlows()
			u.ToServer += p.GetKernel().GetBytesToServer()
			u.ToClient += p.GetKernel().GetBytesToClient()
		}
	}
	return all
}

// node is what the collector has of one node.
type node struct {
	Name        string
	Connected   bool
	Last        time.Time
	Heard       string
	Records     uint64
	Lost        uint64
	Breaks      uint64
	Seals       uint64
	Epochs      int
	NotEnforced []string // services of which something was watched of late
}

// coverage is what each node delivered, by name.
func (c *console) coverage(ctx context.Context, now time.Time) ([]*node, error) {
	reply, err := c.cfg.Audit.Nodes(ctx, &api.NodesRequest{})
	if err != nil {
		return nil, err
	}
	byName, epochs := map[string]*node{}, map[[2]string]bool{}
	for _, s := range reply.GetNodes() {
		n := byName[s.GetNode()]
		if n == nil {
			n = &node{Name: s.GetNode()}
			byName[n.Name] = n
		}
		if epoch := [2]string{s.GetNode(), s.GetEpoch()}; !epochs[epoch] {
			epochs[epoch] = true
			n.Epochs++
		}
		n.Connected = n.Connected || s.GetConnected()
		n.Records, n.Lost = n.Records+s.GetSeq()-s.GetLost(), n.Lost+s.GetLost()
		n.Breaks, n.Seals = n.Breaks+s.GetChainBreaks(), n.Seals+s.GetSeals()
		if heard := at(s.GetReceived()); heard.After(n.Last) {
			n.Last = heard
		}
	}
	nodes := slices.Collect(maps.Values(byName))
	for _, n := range nodes {
		n.Heard = ago(now, n.Last)
	}
	slices.SortFunc(nodes, func(a, b *node) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return nodes, nil
}
