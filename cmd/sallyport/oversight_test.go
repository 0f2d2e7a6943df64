package main

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

func (n *node) Panic(_ context.Context, r *api.PanicRequest) (*api.PanicReply, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	reply := &api.PanicReply{}
	for _, g := range n.grants {
		if g.State == "active" {
			g.State, g.EndedWhy = "revoked", "panic: "+r.Why
			reply.Ended++
		}
	}
	if n.panicked == "" {
		n.panicked = "since 2026-07-01T22:00:00Z, by uid:0: " + r.Why
	}
	return reply, nil
}

func (n *node) LiftPanic(context.Context, *api.LiftPanicRequest) (*api.LiftPanicReply, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.panicked == "" {
		return nil, status.Error(codes.NotFound, "no panic stands on this node\nhint: `sallyport status` tells of one that stands")
	}
	n.panicked = ""
	return &api.LiftPanicReply{}, nil
}

// watchStory is one grant that is warned of and ends.
func watchStory() []*api.WatchFrame {
	g := &api.Grant{Id: "01KAMXQ5T8W2J4N6R8V0Y2A4C6", State: "active", Service: "postgres", Clients: []string{"10.1.0.2"},
		IdleTimeout: durationpb.New(10 * time.Minute)}
	w := &api.WatchedGrant{Grant: g, Left: durationpb.New(301 * time.Second), Silent: durationpb.New(2 * time.Second), LiveFlows: 5,
		Peers: []string{"10.1.0.2:4001", "10.1.0.2:4002", "10.1.0.2:4003", "10.1.0.2:4004", "10.1.0.2:4005"},
		Paths: []*api.Path{{Client: "10.1.0.2", State: "active", BytesToServer: 700, BytesToClient: 200, Budget: &api.Budget{Bytes: 1024}}}}
	at := func(s int) *timestamppb.Timestamp { return timestamppb.New(began.Add(time.Duration(s) * time.Second)) }
	warned := []*api.Warning{{Time: at(1), Text: "ends in 5m"}}
	return []*api.WatchFrame{
		{Time: at(0), Active: []*api.WatchedGrant{w}},
		{Time: at(1), Active: []*api.WatchedGrant{{Grant: g, Left: durationpb.New(300 * time.Second), Warnings: warned}}},
		{Time: at(2), Active: []*api.WatchedGrant{{Grant: g, Left: durationpb.New(299 * time.Second), Warnings: warned}}},
		{Time: at(3), Ended: []*api.Grant{{Id: g.Id, State: "spent", EndedWhy: "budget is \x1b[2Jused up"}}},
	}
}

// WatchGrants sends the story and leaves.
func (n *node) WatchGrants(_ *api.WatchGrantsRequest, stream grpc.ServerStreamingServer[api.WatchFrame]) error {
	for _, f := range watchStory() {
		if err := stream.Send(f); err != nil {
			return err
		}
	}
	return nil
}

// TestWatchInPlace: each frame is drawn over the one before, what happened stays below, and foreign text does nothing.
func TestWatchInPlace(t *testing.T) {
	var out bytes.Buffer
	c := &cli{env: env{stdout: &out}}
	h := &happenings{seen: map[string]bool{}}
	var frames []string
	for _, f := range watchStory() {
		out.Reset()
		if err := c.inPlace(f, h); err != nil {
			t.Fatal(err)
		}
		text, inPlace := strings.CutPrefix(out.String(), home)
		text, cleared := strings.CutSuffix(text, clearDown)
		if text = strings.ReplaceAll(text, clearLine+"\n", "\n"); !inPlace || !cleared || strings.Contains(text, "\x1b") {
			t.Fatalf("drawn as %q", out.String())
		}
		frames = append(frames, text)
	}
	want := []string{`2026-07-01T22:00:00.000Z  1 active grant
GRANT                       SERVICE   LEFT  SILENT       USED           FLOWS  PEERS
01KAMXQ5T8W2J4N6R8V0Y2A4C6  postgres  5m1s  2s of 10m0s  900 B of 1KiB  5      10.1.0.2:4001, 10.1.0.2:4002, 10.1.0.2:4003 and 2 more

2026-07-01T22:00:00.000Z  01KAMXQ5T8W2J4N6R8V0Y2A4C6  active   postgres for 10.1.0.2, ends in 5m1s
`, `2026-07-01T22:00:03.000Z  0 active grants
GRANT  SERVICE  LEFT  SILENT  USED  FLOWS  PEERS

2026-07-01T22:00:00.000Z  01KAMXQ5T8W2J4N6R8V0Y2A4C6  active   postgres for 10.1.0.2, ends in 5m1s
2026-07-01T22:00:01.000Z  01KAMXQ5T8W2J4N6R8V0Y2A4C6  warning  ends in 5m
2026-07-01T22:00:03.000Z  01KAMXQ5T8W2J4N6R8V0Y2A4C6  spent    budget is \x1b[2Jused up
`}
	if got := []string{frames[0], frames[3]}; !slices.Equal(got, want) {
		t.Errorf("drawn\n%s", strings.Join(got, "\n---\n"))
	}
}

func (n *node) UsedGrants(context.Context, *api.UsedGrantsRequest) (*api.UsedGrantsReply, error) {
	g := func(id, state string) *api.Grant {
		return &api.Grant{Id: id, State: state, Service: "postgres", Requester: "alice"}
	}
	return &api.UsedGrantsReply{Grants: []*api.UsedGrant{
		{Grant: g("G1", "expired"), Granted: durationpb.New(time.Hour), Known: true, Open: durationpb.New(time.Hour), Busy: durationpb.New(42 * time.Second),
			Last: durationpb.New(9 * time.Minute), Bytes: 5200, Packets: 13, Flows: 2, Clients: []string{"10.1.0.2"}, GrantedPorts: []uint32{5432}, Ports: []uint32{5432},
			Suggestions: []*api.Suggestion{{Field: "duration", Granted: "1h", Suggested: "15m", Words: "the last packet went 9m after its activation"}}},
		{Grant: g("G2", "revoked"), Granted: durationpb.New(time.Hour), Known: true, Open: durationpb.New(time.Minute),
			Suggestions: []*api.Suggestion{{Words: "nothing was sent: is it needed?"}}},
		{Grant: g("G3", "ended"), Granted: durationpb.New(time.Hour)},
	}}, nil
}

// Signal believes posture alone.
func (n *node) Signal(_ context.Context, r *api.SignalRequest) (*api.SignalReply, error) {
	if r.Source != "posture" {
		return nil, status.Error(codes.PermissionDenied, "no policy believes this user for this source\nhint: name the source in `signals` of a BypassPolicy")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	reply := &api.SignalReply{}
	for _, g := range n.grants {
		if g.State == "active" && (r.Service == "" || r.Service == g.Service) {
			g.Signals = append(g.Signals, r.Source+": "+r.Reason)
			reply.Grants = append(reply.Grants, g.Id)
		}
	}
	return reply, nil
}
