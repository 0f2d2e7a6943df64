package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// operators is the operators' interface. Callers were admitted by their credentials.
type operators struct {
	api.UnimplementedAgentServer
	grants   *grants
	rollouts *rollouts
	datapath *datapath.Datapath
	enforced func() *enforced
	status   func(context.Context) *api.StatusReply
	// listening tells whether the proxy does.
	listening func() (bool, error)
	recent    *recent
	canaries  *canaries
	lately    *lately
	clock     clock
	stopping  <-chan struct{} // followers leave when it closes
}

// Status tells how the agent and its enforcement are.
func (o *operators) Status(ctx context.Context, _ *api.StatusRequest) (*api.StatusReply, error) {
	return o.status(ctx), nil
}

// Services lists what is protected, and what was seen of those services that are not enforced.
func (o *operators) Services(context.Context, *api.ServicesRequest) (*api.ServicesReply, error) {
	e := o.enforced()
	if e == nil {
		return &api.ServicesReply{}, nil
	}
	reply := &api.ServicesReply{}
	devices := make(map[int]string)
	for _, d := range o.datapath.Devices() {
		if ours(d.Role) {
			devices[d.Ifindex] = d.Name
		}
	}
	seen, err := o.datapath.Watched()
	if err != nil {
		return nil, toStatus(fmt.Errorf("read what was seen of services: %w", err))
	}
	for _, s := range e.handed.Services() {
		row, _ := e.service(s.Name)
		described := describeService(s, row, devicesOf(row, devices))
		described.Watched = describeWatched(seen[row.ID], row.Mode)
		reply.Services = append(reply.Services, described)
	}
	for _, s := range e.set.RemoteServices() {
		row, _ := e.service(s.Name)
		reply.Services = append(reply.Services, describeRemote(s, row))
	}
	return reply, nil
}

// devicesOf names the devices of a service's pods.
func devicesOf(row datapath.Service, names map[int]string) string {
	var all []string
	for _, p := range row.Places() {
		if name := names[p.Ifindex]; name != "" {
			all = append(all, name)
		}
	}
	return strings.Join(all, ", ")
}

func describeService(s policy.ProtectedService, row datapath.Service, device string) *api.Service {
	out := &api.Service{Name: s.Name, Id: row.ID, Target: string(s.Spec.Target), Addresses: texts(s.Spec.Addresses),
		Protocol: s.Spec.Protocol, Device: device, Source: s.Source.String(), Mode: string(s.Spec.Mode)}
	for _, p := range s.Spec.Ports {
		out.Ports = append(out.Ports, uint32(p))
	}
	for _, rule := range s.Spec.Access {
		out.Allow = append(out.Allow, rule.Identities...)
	}
	return out
}

// Canaries tells what canaries saw of each enforced port, at the latest round or now.
func (o *operators) Canaries(ctx context.Context, q *api.CanariesRequest) (*api.CanariesReply, error) {
	if q.GetNow() {
		if err := o.canaries.round(ctx); err != nil {
			return nil, toStatus(err)
		}
	}
	reply := &api.CanariesReply{}
	for t, r := range o.canaries.latest() {
		one := &api.Canary{Service: t.service, Address: t.at.String(), State: r.state, Why: r.why}
		if r.closed != 0 {
			one.Closed = timestamp(o.clock.wallAt(r.closed))
		}
		reply.Canaries = append(reply.Canaries, one)
	}
	return reply, nil
}

// Paths lists the kernel's paths, live and just ended.
func (o *operators) Paths(context.Context, *api.PathsRequest) (*api.PathsReply, error) {
	paths, err := o.datapath.Paths()
	if err != nil {
		return nil, toStatus(fmt.Errorf("read paths: %w", err))
	}
	reply := &api.PathsReply{}
	for _, p := range paths {
		reply.Paths = append(reply.Paths, describePath(p, o.clock))
	}
	return reply, nil
}

func describePath(p datapath.PathStatus, c clock) *api.Path {
	left := max(p.Deadline-c.boot(), 0)
	if !isOpen(p) { // it ended before its deadline
		left = 0
	}
	return &api.Path{
		Slot: p.Slot, State: stateName(p.State), Grant: p.Grant, Client: p.Client.String(), Service: p.Service,
		Deadline: timestamp(c.wallAt(p.Deadline)), Left: durationpb.New(left),
		Flows: p.Flows, BytesToServer: p.BytesToServer, BytesToClient: p.BytesToClient,
		PacketsToServer: p.PacketsToServer, PacketsToClient: p.PacketsToClient, Budget: describeBudget(p.Budget),
	}
}

// describeBudget leaves out one without a limit.
func describeBudget(b datapath.Budget) *api.Budget {
	if b == (datapath.Budget{}) {
		return nil
	}
	return &api.Budget{Bytes: b.Bytes, Packets: b.Packets, Connections: b.Connections, ConnectionsPerSecond: b.ConnectionsPerSecond}
}

// stateName is the word for a path's state in status, metrics and documents.
func stateName(s datapath.PathState) string {
	names := map[datapath.PathState]string{
		datapath.PathFree: "free", datapath.PathPending: "pending", datapath.PathActive: "active",
		datapath.PathRevoked: "revoked", datapath.PathExpired: "expired", datapath.PathSpent: "spent",
	}
	if name, ok := names[s]; ok {
		return name
	}
	return "unknown"
}

// Grants lists every grant that the node ever activated.
func (o *operators) Grants(ctx context.Context, _ *api.GrantsRequest) (*api.GrantsReply, error) {
	rows, err := o.grants.all(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	left, err := o.grants.left(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	reviewed, err := o.grants.reviewed(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	reply := &api.GrantsReply{}
	for _, row := range rows {
		g := o.describe(row)
		g.Review = reviewWords(row, reviewed)
		showLimits(g, left[row.ID])
		reply.Grants = append(reply.Grants, g)
	}
	return reply, nil
}

// describe reads a row's payload; one that cannot be read is still listed.
func (o *operators) describe(row store.GrantRow) *api.Grant {
	p, _ := readPayload(row)
	return describeRow(row, p)
}

// readPayload gives a payload that says so in the place of one that cannot be read.
func readPayload(row store.GrantRow) (p grant.Payload, ok bool) {
	if err := json.Unmarshal(row.Payload, &p); err != nil {
		return grant.Payload{Reason: "payload cannot be read: " + err.Error()}, false
	}
	return p, true
}

// Activate opens the paths of a signed grant.
func (o *operators) Activate(ctx context.Context, req *api.ActivateRequest) (*api.ActivateReply, error) {
	row, err := o.grants.Activate(ctx, req.GetEnvelope(), req.GetAnswer(), caller(ctx))
	if err != nil {
		return nil, toStatus(err)
	}
	return &api.ActivateReply{Grant: o.describe(row)}, nil
}

// Revoke ends an active grant.
func (o *operators) Revoke(ctx context.Context, req *api.RevokeRequest) (*api.RevokeReply, error) {
	row, err := o.grants.Revoke(ctx, req.GetGrant(), plain(req.GetWhy()), caller(ctx))
	if err != nil {
		return nil, toStatus(err)
	}
	return &api.RevokeReply{Grant: o.describe(row)}, nil
}

// Flows gives the latest records and, if asked, each one after them until the caller leaves.
func (o *operators) Flows(req *api.AgentFlowsRequest, stream grpc.ServerStreamingServer[api.FlowRecord]) error {
	if !req.GetFollow() {
		return sendAll(stream, o.recent.last(int(req.GetLimit())))
	}
	before, follower, leave := o.recent.follow(int(req.GetLimit()))
	defer leave()
	if err := sendAll(stream, before); err != nil {
		return err
	}
	for {
		select {
		case rec, ok := <-follower.records:
			if !ok {
				return status.Error(codes.ResourceExhausted, errBehind.Error())
			}
			if err := stream.Send(audit.FlowToAPI(rec)); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		case <-o.stopping:
			return status.Error(codes.Unavailable, "agent stops")
		}
	}
}

func sendAll(stream grpc.ServerStreamingServer[api.FlowRecord], records []flow.Record) error {
	for _, rec := range records {
		if err := stream.Send(audit.FlowToAPI(rec)); err != nil {
			return err
		}
	}
	return nil
}

// bootClock reads the node's clocks.
func bootClock() clock { return clock{wall: time.Now, boot: datapath.BootTime} }
