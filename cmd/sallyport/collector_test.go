package main

import (
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// collector is a real server of the Audit service that holds what it was made with.
type collector struct {
	api.UnimplementedAuditServer
	flows  []*api.StoredFlow
	events []*api.StoredGrantEvent
	losses []*api.StoredLoss
}

func newCollector() *collector {
	c := &collector{
		events: []*api.StoredGrantEvent{{Node: "node-1", Epoch: "E", Seq: 1, Event: &api.GrantEvent{
			Grant: "01J8ZQ4X5M3T9V0Y2B7C6D1E4F", Step: "ACTIVATED", Time: timestamppb.New(began), Requester: "bob", Actor: "uid:0",
			Service: "postgres", Clients: []string{"10.1.0.2"}, Envelope: []byte("{}"),
		}}},
		losses: []*api.StoredLoss{{Node: "node-1", Epoch: "E", Class: api.Class_CLASS_FLOW, Seq: 9, Loss: &api.LossRecord{
			Stage: "agent_spool", Cause: "buffer full", Count: 41, From: timestamppb.New(began), To: timestamppb.New(began.Add(time.Minute)),
		}}},
	}
	for i, r := range someFlows() {
		c.flows = append(c.flows, &api.StoredFlow{Node: "node-1", Epoch: "E", Seq: uint64(i + 1), Received: timestamppb.New(began), Flow: r})
	}
	return c
}

func (c *collector) serve(t testing.TB, path string) func() {
	return serveUnix(t, path, func(s *grpc.Server) { api.RegisterAuditServer(s, c) })
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

func (c *collector) GrantEvents(_ *api.GrantQuery, stream grpc.ServerStreamingServer[api.StoredGrantEvent]) error {
	for _, e := range c.events {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) Losses(_ *api.LossQuery, stream grpc.ServerStreamingServer[api.StoredLoss]) error {
	for _, l := range c.losses {
		if err := stream.Send(l); err != nil {
			return err
		}
	}
	return nil
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
