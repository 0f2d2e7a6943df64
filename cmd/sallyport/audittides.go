package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// Causes of a difference, as nodes name them.
const (
	tideUnexplained = "unexplained"
	tideCountedLoss = "counted_loss"
)

// difference is a path of which the kernel counted another volume than its records say, as of the last comparison that a node sent.
type difference struct {
	Node    string `json:"node"`
	Grant   string `json:"grant"`
	Service string `json:"service"`
	Client  string `json:"client"`
	Ended   bool   `json:"ended"`
	Cause   string `json:"cause"`
	// What the kernel counted more, or less.
	Flows           int64  `json:"flows"`
	BytesToServer   int64  `json:"bytes_to_server"`
	BytesToClient   int64  `json:"bytes_to_client"`
	PacketsToServer int64  `json:"packets_to_server"`
	PacketsToClient int64  `json:"packets_to_client"`
	Time            string `json:"time"`

	at tidePath
}

// tidePath is one path of one boot of a node.
type tidePath struct {
	node, boot, grant string
	slot              uint32
}

func pathOf(s *api.StoredTide, p *api.PathTide) tidePath {
	return tidePath{s.GetNode(), s.GetTide().GetBootId(), p.GetGrant(), p.GetSlot()}
}

// findDifferences gives the paths that counted losses or nothing explain. One that agreed later is none of them.
func findDifferences(ctx context.Context, a *client.Audit, node string) ([]*difference, error) {
	var found []*difference
	for s, err := range a.Tides(ctx, &api.TideQuery{Node: node, Differing: true, Limit: math.MaxInt32}) {
		if errors.Is(err, client.ErrUnknownCall) {
			return []*difference{}, nil // the note about an older collector says so
		}
		if err != nil {
			return nil, err
		}
		for _, p := range s.GetTide().GetPaths() {
			found = latest(found, s, p)
		}
	}
	out := []*difference{}
	for _, d := range found {
		if d.Cause == tideUnexplained && !d.Ended {
			if err := d.update(ctx, a); err != nil {
				return nil, err
			}
		}
		if d.Cause == tideUnexplained || d.Cause == tideCountedLoss {
			out = append(out, d)
		}
	}
	return out, nil
}

// latest puts a path in the place of what an earlier tide said of it.
func latest(found []*difference, s *api.StoredTide, p *api.PathTide) []*difference {
	i := slices.IndexFunc(found, func(d *difference) bool { return d.at == pathOf(s, p) })
	if i >= 0 {
		found[i] = newDifference(s, p)
		return found
	}
	return append(found, newDifference(s, p))
}

// update looks for a later tide that has the path, and agrees.
func (d *difference) update(ctx context.Context, a *client.Audit) error {
	for s, err := range a.Tides(ctx, &api.TideQuery{Node: d.Node, Grant: d.Grant, Limit: math.MaxInt32}) {
		if err != nil {
			return err
		}
		for _, p := range s.GetTide().GetPaths() {
			if pathOf(s, p) == d.at {
				*d = *newDifference(s, p)
			}
		}
	}
	return nil
}

func newDifference(s *api.StoredTide, p *api.PathTide) *difference {
	more := func(of func(*api.Volume) uint64) int64 {
		return int64(of(p.GetKernel()) - of(p.GetRecorded()) - of(p.GetLive()))
	}
	return &difference{at: pathOf(s, p), Node: s.GetNode(), Grant: p.GetGrant(), Service: p.GetService(), Client: p.GetClient(), Ended: p.GetEnded(),
		Cause: p.GetCause(), Flows: more((*api.Volume).GetFlows), BytesToServer: more((*api.Volume).GetBytesToServer),
		BytesToClient: more((*api.Volume).GetBytesToClient), PacketsToServer: more((*api.Volume).GetPacketsToServer),
		PacketsToClient: more((*api.Volume).GetPacketsToClient), Time: stamp(s.GetTide().GetTime())}
}

func differencesTable(t *table, all []*difference) {
	if len(all) == 0 {
		return
	}
	t.line("")
	t.line("the kernel counted other volumes of these paths than their records say:")
	t.row("NODE", "GRANT", "SERVICE", "CLIENT", "FLOWS", "TO SERVER", "TO CLIENT", "CAUSE", "AS OF")
	for _, d := range all {
		t.row(d.Node, d.Grant, d.Service, d.Client, fmt.Sprintf("%+d", d.Flows), fmt.Sprintf("%+d B/%+d", d.BytesToServer, d.PacketsToServer),
			fmt.Sprintf("%+d B/%+d", d.BytesToClient, d.PacketsToClient), d.Cause, d.Time)
	}
}
