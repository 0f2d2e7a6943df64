package main

import (
	"context"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/proof"
	"github.com/sallyport-dev/sallyport/test/evidence"
)

// collector is a real server of the Audit service that holds what it was made with.
type collector struct {
	api.UnimplementedAuditServer
	flows  []*api.StoredFlow
	events []*api.StoredGrantEvent
	losses []*api.StoredLoss
	nodes  []*api.NodeState
	tides  []*api.StoredTide
	log    *evidence.Log
	node   *node // that is connected; nil: none is
}

func newCollector(t testing.TB) *collector {
	c := &collector{log: someLog(t),
		events: []*api.StoredGrantEvent{{Node: "node-1", Epoch: "E", Seq: 1, Event: &api.GrantEvent{
			Grant: "01J8ZQ4X5M3T9V0Y2B7C6D1E4F", Step: "ACTIVATED", Time: timestamppb.New(began), Requester: "bob", Actor: "uid:0",
			Service: "postgres", Clients: []string{"10.1.0.2"}, Envelope: []byte("{}"),
		}}},
		losses: []*api.StoredLoss{{Node: "node-1", Epoch: "E", Class: api.Class_CLASS_FLOW, Seq: 9, Loss: &api.LossRecord{
			Stage: "agent_spool", Cause: "buffer full", Count: 41, From: timestamppb.New(began), To: timestamppb.New(began.Add(time.Minute)),
		}}},
	}
	c.nodes = []*api.NodeState{
		{Node: "node-1", Epoch: evidence.Epoch, Class: api.Class_CLASS_CRITICAL, Seq: 1, Seals: 1, Received: timestamppb.New(began), Connected: true},
		{Node: "node-1", Epoch: evidence.Epoch, Class: api.Class_CLASS_FLOW, Seq: 43, Lost: 41, Seals: 2, Received: timestamppb.New(began), Connected: true},
	}
	for i, r := range someFlows() {
		c.flows = append(c.flows, &api.StoredFlow{Node: "node-1", Epoch: "E", Seq: uint64(i + 1), Received: timestamppb.New(began), Flow: r})
	}
	return c
}

func (c *collector) serve(t testing.TB, path string) func() {
	return serveUnix(t, path, func(s *grpc.Server) { api.RegisterAuditServer(s, c) })
}

func (c *collector) Tides(q *api.TideQuery, stream grpc.ServerStreamingServer[api.StoredTide]) error {
	for _, s := range c.tides {
		names := func(p *api.PathTide) bool { return p.Grant == q.Grant }
		differs := func(p *api.PathTide) bool { return p.Cause != "" }
		if q.Node != "" && q.Node != s.Node || q.Grant != "" && !slices.ContainsFunc(s.Tide.Paths, names) || q.Differing && !slices.ContainsFunc(s.Tide.Paths, differs) {
			continue
		}
		if err := stream.Send(s); err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) Flows(q *api.FlowQuery, stream grpc.ServerStreamingServer[api.StoredFlow]) error {
	for _, f := range c.flows {
		if (q.Node != "" && q.Node != f.Node) || !client.MatchFlow(q, f.Flow) {
			continue
		}
		if err := stream.Send(f); err != nil {
			return err
		}
	}
	if q.Follow {
		<-stream.Context().Done()
	}
	return nil
}

func (c *collector) GrantEvents(q *api.GrantQuery, stream grpc.ServerStreamingServer[api.StoredGrantEvent]) error {
	events := c.events
	if envelope := c.envelope(q.GetGrant()); envelope != nil {
		events = []*api.StoredGrantEvent{{Node: c.node.name, Event: &api.GrantEvent{Grant: q.GetGrant(), Step: "ACTIVATED", Envelope: envelope}}}
	}
	for _, e := range events {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	return nil
}

// envelope is that of a grant that the connected node has begun.
func (c *collector) envelope(grant string) []byte {
	if c.node == nil {
		return nil
	}
	c.node.mu.Lock()
	defer c.node.mu.Unlock()
	return c.node.begun[grant]
}

// Act hands on what is for the node, in the words of a collector.
func (c *collector) Act(ctx context.Context, r *api.ActRequest) (*api.ActReply, error) {
	if c.node == nil || r.GetNode() != c.node.name {
		return nil, status.Errorf(codes.FailedPrecondition, "node %q is not connected to this collector\nhint: log in to the node", r.GetNode())
	}
	if v := r.GetRevoke(); v != nil {
		reply, err := c.node.Revoke(ctx, &api.RevokeRequest{Grant: v.GetGrant(), Why: v.GetWhy()})
		return &api.ActReply{Grant: reply.GetGrant()}, err
	}
	reply, err := c.node.State(ctx, &api.StateRequest{Statement: r.GetStatement(), Envelope: r.GetEnvelope()})
	return &api.ActReply{Grant: reply.GetGrant()}, err
}

func (c *collector) Losses(q *api.LossQuery, stream grpc.ServerStreamingServer[api.StoredLoss]) error {
	for _, l := range c.losses {
		if q.GetNode() != "" && q.GetNode() != l.GetNode() {
			continue
		}
		if err := stream.Send(l); err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) Nodes(context.Context, *api.NodesRequest) (*api.NodesReply, error) {
	return &api.NodesReply{Nodes: c.nodes}, nil
}

func (c *collector) Log(_ context.Context, r *api.LogRequest) (*api.LogReply, error) {
	grown := &api.Grown{Checkpoint: c.log.Checkpoint(c.log.Size()), From: r.GetFrom()}
	for _, h := range c.log.Grown(c.log.Size(), int64(r.GetFrom())) {
		grown.Proof = append(grown.Proof, h[:])
	}
	return &api.LogReply{Grown: grown, Key: c.log.VKey}, nil
}

// Evidence gives all that there is, but for a grant its events, in pieces that end anywhere.
func (c *collector) Evidence(r *api.EvidenceRequest, stream grpc.ServerStreamingServer[api.EvidenceChunk]) error {
	lines := c.log.Bundle(nil)
	if r.GetGrant() != "" {
		lines = c.log.Bundle(func(l proof.Line) bool { return l.Kind == proof.LineEvent })
	}
	for piece := range slices.Chunk(evidence.Write(c.log.T(), lines), 100) {
		if err := stream.Send(&api.EvidenceChunk{Data: piece}); err != nil {
			return err
		}
	}
	return nil
}

// someLog is a log of two nodes.
func someLog(t testing.TB) *evidence.Log {
	l := evidence.NewLog(t, "")
	n := l.Node("node-1")
	n.Batch(proof.ClassCritical, evidence.Grant("01J8ZQ4X5M3T9V0Y2B7C6D1E4F", "ACTIVATED"))
	n.Batch(proof.ClassFlow, evidence.Flow("f1"), evidence.Loss("agent_spool", "buffer full", 41))
	n.Batch(proof.ClassFlow, evidence.Flow("f2"))
	l.Node("node-2").Batch(proof.ClassFlow, evidence.Flow("f3"))
	return l
}

// someFlows are one denied, one proxied and one bypassed flow, and one to a service that is not enforced.
func someFlows() []*api.FlowRecord {
	return []*api.FlowRecord{
		{
			Event: "DENY", Time: timestamppb.New(began), Cpu: -1, Seq: 1, FlowId: "f1", Verdict: "DENIED", Reason: "NO_TLS", Protocol: "tcp",
			Client: "10.1.0.2:40000", Server: "10.2.0.2:5432", Service: "postgres", Count: 3, Detail: "first byte \x1b[31m0x00",
		},
		{
			Event: "WATCHED", Time: timestamppb.New(began.Add(time.Second / 2)), Cpu: -1, Seq: 1, Verdict: "BYPASSED", Reason: "PATH_OPEN", Protocol: "tcp",
			Client: "10.1.0.9:0", Server: "10.2.0.9:22", Service: "ssh", Count: 6,
		},
		{
			Event: "OPEN", Time: timestamppb.New(began.Add(time.Second)), Cpu: -1, Seq: 2, FlowId: "f2", Verdict: "PROXIED", Reason: "IDENTITY", Protocol: "tcp",
			Client: "10.1.0.3:40001", Server: "10.2.0.2:5432", Service: "postgres", Identity: "spiffe://example.org/app/web", Count: 1,
		},
		{
			Event: "CLOSE", Time: timestamppb.New(began.Add(2 * time.Second)), Cpu: 1, Seq: 7, FlowId: "f3", Verdict: "BYPASSED", Reason: "PATH_EXPIRED", Protocol: "tcp",
			Client: "[fd00:1::2]:40002", Server: "[fd00:2::2]:5432", Service: "postgres", Grant: "01J8ZQ4X5M3T9V0Y2B7C6D1E4F", Count: 1,
			BytesToServer: 5200, PacketsToServer: 13, BytesToClient: 1 << 60, PacketsToClient: 9,
		},
	}
}
