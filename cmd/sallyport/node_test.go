package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// node is an agent without a kernel: a real server of the Agent service with a real policy.
type node struct {
	api.UnimplementedAgentServer
	name   string
	policy *policy.Set

	mu       sync.Mutex
	panicked string
	grants   []*api.Grant
	begun    map[string][]byte // envelopes of grants, by their ids
	asked    []grant.Challenge // that nobody answered yet
	said     []grant.Statement
	records  []*api.FlowRecord
	changed  chan struct{} // closed when records grow
}

// began is when everything in the tests' records happened.
var began = time.Date(2026, 7, 1, 22, 0, 0, 0, time.UTC)

func newNode(t testing.TB, resources string) *node {
	t.Helper()
	set, err := policy.Parse("resources.yaml", []byte(resources))
	if err != nil {
		t.Fatal(err)
	}
	return &node{name: "node-1", policy: set, changed: make(chan struct{}), begun: map[string][]byte{}}
}

// serveUnix serves on a Unix socket until the function that it gives is called.
func serveUnix(t testing.TB, path string, register func(*grpc.Server)) func() {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	register(s)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	return func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func (n *node) serve(t testing.TB, path string) func() {
	return serveUnix(t, path, func(s *grpc.Server) { api.RegisterAgentServer(s, n) })
}

// storyKey makes a private key in a file and gives its public half.
func storyKey(t testing.TB, path string) string {
	t.Helper()
	key, err := grant.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := grant.WritePrivateKey(path, key); err != nil {
		t.Fatal(err)
	}
	return key.Public().String()
}

// record adds flow records, for those who follow too.
func (n *node) record(records ...*api.FlowRecord) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.records = append(n.records, records...)
	close(n.changed)
	n.changed = make(chan struct{})
}

func (n *node) Status(context.Context, *api.StatusRequest) (*api.StatusReply, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return &api.StatusReply{
		Node: n.name, Version: "v0.1.0", Ready: true, Started: timestamppb.New(began), Bpffs: "/sys/fs/bpf/sallyport",
		Generation: 7, ProxyListening: true, LeaseLeft: durationpb.New(14500 * time.Millisecond),
		Services: uint32(len(n.policy.Services())), LivePaths: uint32(len(n.grants)),
		Hooks:     []*api.HookStatus{{Device: "eth0", Ifindex: 2, Role: "uplink", Programs: []string{"sp_up_in", "sp_up_out"}, Xdp: "native: the driver takes it"}},
		Reasons:   map[string]uint64{"NO_PATH": 12, "PATH_LIVE": 3},
		Problems:  []string{"resources.d/new.yaml:3: spec.ports[0]: \x1b[2Jmust be 1 to 65535"},
		Collector: "connected", IdentityState: "fresh", SpoolFlow: 1, Panic: n.panicked, NotEnforced: []string{"ssh (Shadow)"},
		WebCertificates: []*api.WebCertificate{{Name: "public", Until: timestamppb.New(began)}, {Name: "old"}},
		Providers:       []*api.Provider{{Name: "corp", Keys: 2, Fetched: timestamppb.New(began)}, {Name: "new"}},
	}, nil
}

func (n *node) Services(context.Context, *api.ServicesRequest) (*api.ServicesReply, error) {
	reply := &api.ServicesReply{}
	for i, s := range n.policy.Services() {
		service := &api.Service{Name: s.Name, Id: uint32(i + 1), Target: string(s.Spec.Target), Protocol: "TCP", Device: s.Spec.Device, Source: s.Source.String(), Mode: string(s.Spec.Mode)}
		if !s.Enforced() {
			service.Watched = &api.Watched{Seen: &api.Seen{Opens: 3, Packets: 30, Bytes: 4000}, Proxied: &api.Seen{Opens: 2, Packets: 29, Bytes: 3960}, Denied: &api.Seen{Opens: 1, Packets: 1, Bytes: 40}}
		}
		for _, p := range s.Spec.Ports {
			service.Ports = append(service.Ports, uint32(p))
		}
		for _, a := range s.Spec.Addresses {
			service.Addresses = append(service.Addresses, a.String())
		}
		for _, rule := range s.Spec.Access {
			service.Allow = append(service.Allow, rule.Identities...)
		}
		reply.Services = append(reply.Services, service)
	}
	return reply, nil
}

func (n *node) Rollouts(context.Context, *api.RolloutsRequest) (*api.RolloutsReply, error) {
	return &api.RolloutsReply{Node: n.name}, nil
}

func (n *node) Grants(context.Context, *api.GrantsRequest) (*api.GrantsReply, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return &api.GrantsReply{Grants: slices.Clone(n.grants)}, nil
}

func (n *node) Paths(context.Context, *api.PathsRequest) (*api.PathsReply, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	reply := &api.PathsReply{}
	for i, g := range n.grants {
		reply.Paths = append(reply.Paths, &api.Path{
			Slot: uint32(i), State: choose(g.State == "active", "LIVE", "REVOKED"), Grant: g.Id, Client: g.Clients[0], Service: g.Service,
			Deadline: g.Deadline, Left: durationpb.New(time.Minute), Flows: 1, BytesToServer: 5200, PacketsToServer: 13,
		})
	}
	return reply, nil
}

// Challenge makes one and remembers it.
func (n *node) Challenge(context.Context, *api.ChallengeRequest) (*api.ChallengeReply, error) {
	c := grant.NewChallenge(n.name, "0d8ccf0b-97a2-4ff8-a2ac-0d4b1ebbd5a9", time.Now().Add(time.Minute))
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, c)
	text, err := json.Marshal(c)
	return &api.ChallengeReply{Challenge: text}, err
}

// hear verifies a statement, and a challenge's answer once.
func (n *node) hear(data []byte) (grant.Statement, error) {
	s, _, err := grant.VerifyStatement(data, n.policy.Keyrings(), time.Now())
	if err != nil {
		return s, refusal(codes.InvalidArgument, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.said = append(n.said, s)
	if s.Challenge == (grant.Challenge{}) {
		return s, nil
	}
	i := slices.Index(n.asked, s.Challenge)
	if i < 0 {
		return s, refusal(codes.InvalidArgument, &policy.Error{Field: "challenge", Msg: "it was answered before", Hint: "ask for a new one"})
	}
	n.asked = slices.Delete(n.asked, i, i+1)
	return s, nil
}

// State takes what an agent takes, but asks nobody who may say it.
func (n *node) State(_ context.Context, r *api.StateRequest) (*api.StateReply, error) {
	s, err := n.hear(r.Statement)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, g := range n.grants {
		if g.Id != s.Grant {
			continue
		}
		if s.Step != grant.StepReviewed {
			g.State, g.EndedWhy = "revoked", string(s.Step)+" by "+s.By
		}
		return &api.StateReply{Grant: g}, nil
	}
	return &api.StateReply{}, nil
}

// Vouch takes everybody's word.
func (n *node) Vouch(_ context.Context, r *api.VouchRequest) (*api.VouchReply, error) {
	_, err := n.hear(r.Statement)
	return &api.VouchReply{}, err
}

// Activate does what an agent does, but for the durable record and the kernel.
func (n *node) Activate(_ context.Context, r *api.ActivateRequest) (*api.ActivateReply, error) {
	now := time.Now()
	v, err := grant.Verify(r.Envelope, n.policy.Keyrings(), now)
	if err != nil {
		return nil, refusal(codes.InvalidArgument, err)
	}
	p := v.Payload
	_, refused := n.policy.CheckGrant(v.Facts(nil, now))
	if err := errors.Join(p.CheckTime(now), p.CheckAudience(n.name), refused); err != nil {
		return nil, refusal(codes.FailedPrecondition, err)
	}
	if s, err := n.hear(r.Answer); err != nil || s.Step != grant.StepActivated || s.Grant != p.ID {
		return nil, cmp.Or(err, status.Error(codes.InvalidArgument, "it answers something else"))
	}
	digest, _ := grant.Digest(r.Envelope)
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.said {
		if s.Digest == digest && (s.Step == grant.StepDenied || s.Step == grant.StepWithdrawn) {
			return nil, status.Errorf(codes.FailedPrecondition, "grant is not to be: %s by %s", s.Step, s.By)
		}
	}
	g := &api.Grant{
		Id: p.ID, State: "active", Digest: digest, Kind: string(p.Kind), Requester: p.Requester, Reason: p.Reason, Ticket: p.Ticket, Service: p.Service,
		Activated: timestamppb.New(now), Deadline: timestamppb.New(p.Deadline(now)), Slots: []uint32{0}, Signers: keyIDs(v.Signers),
	}
	for _, a := range p.Addresses {
		g.Clients = append(g.Clients, a.String())
	}
	if slices.ContainsFunc(n.grants, func(o *api.Grant) bool { return o.Id == g.Id }) {
		return nil, status.Errorf(codes.AlreadyExists, "grant %s was activated before", g.Id)
	}
	for _, o := range n.grants {
		if o.State == "active" && o.Service == g.Service && o.Clients[0] == g.Clients[0] {
			return nil, status.Errorf(codes.AlreadyExists, "another grant serves this client: %s to %s, by grant %s until %s\nhint: wait for its end, or revoke it first",
				g.Clients[0], g.Service, o.Id, o.Deadline.AsTime().UTC().Format(time.RFC3339))
		}
	}
	n.grants, n.begun[g.Id] = append(n.grants, g), r.Envelope
	return &api.ActivateReply{Grant: g}, nil
}

// refusal has a line for each problem and each hint, as the agent's has.
func refusal(code codes.Code, err error) error {
	var lines []string
	for _, e := range policy.Errors(err) {
		lines = append(lines, e.Error(), "hint: "+e.Hint)
	}
	return status.Error(code, strings.Join(lines, "\n"))
}

func (n *node) Revoke(_ context.Context, r *api.RevokeRequest) (*api.RevokeReply, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, g := range n.grants {
		if g.Id == r.Grant {
			g.State, g.EndedWhy = "revoked", r.Why
			return &api.RevokeReply{Grant: g}, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "no grant %q on this node", r.Grant)
}

func (n *node) Explain(_ context.Context, q *api.ExplainRequest) (*api.ExplainReply, error) {
	name := q.Service
	if name == "" {
		s, ok := n.policy.ServiceAt(policy.ProtocolTCP, netip.MustParseAddrPort(q.Server))
		if !ok {
			return &api.ExplainReply{Verdict: "NONE", Reason: "NONE", Lines: []string{q.Server + " is no protected service"}}, nil
		}
		name = s.Name
	}
	if q.Identity == "" {
		return &api.ExplainReply{Verdict: "DENIED", Reason: "NO_TLS", Service: name, Lines: []string{"no path is live", "steered to the proxy"}}, nil
	}
	id, err := spiffeid.FromString(q.Identity)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "identity: %v", err)
	}
	if d := n.policy.Authorise(name, policy.Caller{ID: id}, nil, time.Now()); !d.Allowed {
		return &api.ExplainReply{Verdict: "DENIED", Reason: "NOT_AUTHORISED", Service: name, Lines: d.Near}, nil
	}
	return &api.ExplainReply{Verdict: "PROXIED", Reason: "IDENTITY", Service: name, Lines: []string{"no path is live", "steered to the proxy"}}, nil
}

func (n *node) Flows(r *api.AgentFlowsRequest, stream grpc.ServerStreamingServer[api.FlowRecord]) error {
	for sent := 0; ; {
		n.mu.Lock()
		records, changed := n.records[sent:], n.changed
		n.mu.Unlock()
		for _, record := range records {
			if err := stream.Send(record); err != nil {
				return err
			}
			sent++
		}
		if !r.Follow {
			return nil
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func keyIDs(signers []policy.Signer) (ids []string) {
	for _, s := range signers {
		ids = append(ids, s.KeyID)
	}
	return ids
}
