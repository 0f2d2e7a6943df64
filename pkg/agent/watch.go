package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Bounds of what watchers get.
const (
	minWatch = time.Second // between two frames
	maxPeers = 64          // of one grant that a frame names
)

// watched is an active grant for those who look on.
type watched struct {
	row     store.GrantRow
	payload grant.Payload
	limits  limits
	ends    time.Duration // CLOCK_BOOTTIME
	moved   time.Duration
	idle    time.Duration
	warned  []warning
}

// watched are the active grants, by their deadline.
func (g *grants) watched() (out []watched) {
	_ = inTurns(&g.mu, g.every(), func(h *held) error {
		if g.holds(h) && h.over == nil {
			out = append(out, watched{row: h.row, limits: h.limits, ends: h.ends(), payload: h.payload, moved: h.use.moved, idle: g.policyOf(h).Idle(h.payload.IdleTimeout),
				warned: slices.Clone(h.warned)})
		}
		return nil
	})
	slices.SortFunc(out, func(a, b watched) int { return a.row.Deadline.Compare(b.row.Deadline) })
	return out
}

// WatchGrants sends what the active grants do, and those that ended since the frame before, until the caller leaves.
func (o *operators) WatchGrants(req *api.WatchGrantsRequest, stream grpc.ServerStreamingServer[api.WatchFrame]) error {
	every := time.NewTicker(max(req.GetEvery().AsDuration(), minWatch))
	defer every.Stop()
	var before *api.WatchFrame
	for {
		frame, err := o.frame(stream.Context(), before)
		if err != nil {
			return toStatus(err)
		}
		if err := stream.Send(frame); err != nil {
			return err
		}
		before = frame
		select {
		case <-every.C:
		case <-stream.Context().Done():
			return nil
		case <-o.stopping:
			return status.Error(codes.Unavailable, "agent stops")
		}
	}
}

func (o *operators) frame(ctx context.Context, before *api.WatchFrame) (*api.WatchFrame, error) {
	paths, err := o.datapath.Paths()
	if err != nil {
		return nil, fmt.Errorf("read paths: %w", err)
	}
	flows, err := o.datapath.LiveFlows()
	if err != nil {
		return nil, fmt.Errorf("read live flows: %w", err)
	}
	peers := make(map[string][]string)
	for _, f := range flows {
		peers[f.Grant] = append(peers[f.Grant], f.Client.String())
	}
	carried := byGrant(paths)
	wall, boot := o.clock.read()
	frame := &api.WatchFrame{Time: timestamppb.New(wall), Panic: o.grants.standing()}
	for _, w := range o.grants.watched() {
		frame.Active = append(frame.Active, o.watched(w, carried[w.row.ID], peers[w.row.ID], boot))
	}
	frame.Ended, err = o.endedSince(ctx, before, frame)
	return frame, err
}

func (o *operators) watched(w watched, paths []datapath.PathStatus, peers []string, now time.Duration) *api.WatchedGrant {
	slices.Sort(peers)
	out := &api.WatchedGrant{Grant: describeRow(w.row, w.payload), Left: durationpb.New(max(w.ends-now, 0)),
		Silent: durationpb.New(max(now-w.moved, 0)), LiveFlows: uint32(len(peers)), Peers: peers[:min(len(peers), maxPeers)]}
	out.Grant.IdleTimeout = span(w.idle)
	showLimits(out.Grant, w.limits)
	for _, p := range paths {
		out.Paths = append(out.Paths, describePath(p, o.clock))
	}
	for _, one := range w.warned {
		out.Warnings = append(out.Warnings, &api.Warning{Time: timestamppb.New(one.at), Text: one.text})
	}
	return out
}

// endedSince are the grants of the frame before that are active no more.
func (o *operators) endedSince(ctx context.Context, before, now *api.WatchFrame) ([]*api.Grant, error) {
	gone := make(map[string]bool)
	for _, w := range before.GetActive() {
		gone[w.GetGrant().GetId()] = true
	}
	for _, w := range now.GetActive() {
		delete(gone, w.GetGrant().GetId())
	}
	if len(gone) == 0 {
		return nil, nil
	}
	rows, err := o.grants.all(ctx)
	if err != nil {
		return nil, err
	}
	var ended []*api.Grant
	for _, row := range rows {
		if gone[row.ID] {
			ended = append(ended, o.describe(row))
		}
	}
	return ended, nil
}
