package agent

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/net/netutil"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// A holder that gives no sign of life for heartbeat is asked for one, and is gone when none has come within patience.
const (
	heartbeat = 5 * time.Second
	patience  = 10 * time.Second
)

// unusedFor is how long a connection may be without a stream: who asks for nothing does not stay.
const unusedFor = 10 * time.Second

// sayWithin bounds how long a stream may be silent before it asks for something.
const sayWithin = 5 * time.Second

// What a workload is refused for, beside policy.
var (
	// ErrTooMany says that the identity has asked too often, or holds too much.
	ErrTooMany = errors.New("too many requests")
	// ErrKept says that what is left of the slots is for people.
	ErrKept = errors.New("the last free paths are kept for people")
)

// automation serves workloads that ask for paths themselves. Who asks, from where and until when is what the connection
// proves; what may be asked for is for policy to say.
type automation struct {
	api.UnimplementedAutomationServer
	config      policy.AutomationConfig
	node        string
	trustDomain spiffeid.TrustDomain
	source      *identity.Source
	grants      *grants
	shared      func(netip.Addr) (what string, err error) // whose the address is, beside a workload
	device      func(netip.Addr) int                      // of the pod that has the address; 0: none
	free        func() int                                // slots, those of ended paths included
	clock       clock
	limits      *askLimits
	problems    *problems
	stopping    <-chan struct{}
	// turn lets one workload at a time wait for the grants, so that a person waits for one at most.
	turn chan struct{}
}

func (n *node) makeAutomation(context.Context) error {
	if n.cfg.Spec.Automation == nil {
		return nil
	}
	cfg := *n.cfg.Spec.Automation
	n.automation = &automation{
		config: cfg, node: n.cfg.Name, trustDomain: n.cfg.AgentID().TrustDomain(), source: n.identity, grants: n.grants,
		shared: addressOwners{cfg.SharedAddresses, n.around}.of, device: func(a netip.Addr) int { return podDevice(a, n.datapath.Devices()) }, free: n.grants.freeSlots, clock: n.clock,
		limits: newAskLimits(cfg), problems: n.problems, stopping: n.stopping, turn: make(chan struct{}, 1),
	}
	return nil
}

func (n *node) runAutomation(ctx context.Context) error {
	if n.automation == nil {
		<-ctx.Done()
		return nil
	}
	return n.automation.Run(ctx)
}

// Run serves from when the agent has an identity until ctx ends. What keeps it from serving is a problem, and is tried
// again: enforcement does not depend on it.
func (a *automation) Run(ctx context.Context) error {
	for {
		err := a.serve(ctx)
		if ctx.Err() != nil {
			return nil
		}
		a.problems.report(problemAsking, "", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

func (a *automation) serve(ctx context.Context) error {
	if err := a.awaitIdentity(ctx); err != nil {
		return err
	}
	server := a.server()
	defer server.Stop()
	failed, all := make(chan error, len(a.config.Listen)), askConnections()
	pace, most := rate.NewLimiter(handshakesPerSecond, all), all/len(a.config.Listen)
	for _, address := range a.config.Listen {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("listen for workloads: %w", err)
		}
		go func() { failed <- server.Serve(netutil.LimitListener(paced(l, pace), most)) }()
	}
	a.problems.report(problemAsking, "", nil)
	select {
	case err := <-failed:
		return fmt.Errorf("serve workloads: %w", err)
	case <-ctx.Done():
	}
	cut := time.AfterFunc(stopGrace, server.Stop)
	defer cut.Stop()
	server.GracefulStop() // streams end by stopping
	return nil
}

// awaitIdentity says what is missing for as long as it is.
func (a *automation) awaitIdentity(ctx context.Context) error {
	for {
		changed := a.source.Changed()
		_, err := a.source.GetX509SVID()
		if err == nil {
			return nil
		}
		if cause := a.source.Status().Err; cause != nil {
			err = fmt.Errorf("%w: %w", err, cause)
		}
		a.problems.report(problemAsking, "", fmt.Errorf("not listening for workloads: %w", err))
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// server takes connections of workloads of the trust domain. Sessions are not resumed: who comes back proves anew who it is.
func (a *automation) server() *grpc.Server {
	tls := tlsconfig.MTLSServerConfig(a.source, a.source, tlsconfig.AuthorizeMemberOf(a.trustDomain))
	tls.SessionTicketsDisabled = true
	s := grpc.NewServer(
		grpc.Creds(askTransport{credentials.NewTLS(tls), a.limits, a.clock}), grpc.MaxRecvMsgSize(64<<10), grpc.MaxConcurrentStreams(a.config.PathsPerIdentity), grpc.ConnectionTimeout(5*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: heartbeat, Timeout: patience, MaxConnectionIdle: unusedFor}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: heartbeat}),
		grpc.ReadBufferSize(0), grpc.WriteBufferSize(4<<10), // there may be thousands, and they say little
	)
	api.RegisterAutomationServer(s, a)
	return s
}

// workload is who asks, as the connection proves it.
type workload struct {
	id    spiffeid.ID
	proof string    // names the certificate
	until time.Time // wall clock: the end of what it showed
	chain []*x509.Certificate
	from  netip.AddrPort
	to    netip.AddrPort // where it was answered
}

// caller reads who asks from the connection, and holds it against the bundle as it is now.
func (a *automation) caller(ctx context.Context) (workload, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return workload{}, errors.New("no connection")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return workload{}, errors.New("no certificate was shown")
	}
	w := workload{chain: info.State.PeerCertificates, from: tcpAddr(p.Addr), to: tcpAddr(p.LocalAddr)}
	id, _, err := x509svid.Verify(w.chain, a.source)
	if err != nil {
		return workload{}, err
	}
	sum := sha256.Sum256(w.chain[0].Raw)
	w.id, w.proof, w.until = id, "svid:"+hex.EncodeToString(sum[:16]), w.chain[0].NotAfter
	for _, c := range w.chain {
		if c.NotAfter.Before(w.until) {
			w.until = c.NotAfter
		}
	}
	return w, nil
}

func tcpAddr(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Hold opens a path, or takes one up again, and keeps it for as long as the stream lasts.
func (a *automation) Hold(stream grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) error {
	ctx := stream.Context()
	w, err := a.caller(ctx)
	if err != nil {
		return status.Errorf(codes.Unauthenticated, "prove identity: %v", err)
	}
	if err := a.limits.hear(w.id, a.clock.boot()); err != nil {
		return toStatus(err)
	}
	defer a.limits.heard(w.id)
	request, err := firstRequest(stream)
	if err != nil {
		return err
	}
	count := a.limits.take
	if request.GetGrant() != "" {
		count = a.limits.takeUp
	}
	if err := count(w.id, a.clock.boot()); err != nil {
		return toStatus(err)
	}
	defer a.limits.give(w.id)
	h, err := a.grip(ctx, w, request)
	if err != nil {
		return toStatus(err)
	}
	return a.hold(stream, w, h)
}

// firstRequest does not wait for whoever opens a stream and says nothing. The stream ends with the handler, and the wait with
// the stream.
func firstRequest(stream grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) (*api.HoldRequest, error) {
	type word struct {
		request *api.HoldRequest
		err     error
	}
	said := make(chan word, 1)
	go func() {
		request, err := stream.Recv()
		said <- word{request, err}
	}()
	select {
	case w := <-said:
		return w.request, w.err
	case <-time.After(sayWithin):
		return nil, status.Errorf(codes.DeadlineExceeded, "nothing was asked for within %v", sayWithin)
	}
}

func (a *automation) grip(ctx context.Context, w workload, r *api.HoldRequest) (*held, error) {
	if id := r.GetGrant(); id != "" {
		return a.grants.TakeUp(id, w.id.String(), w.from.Addr())
	}
	want, err := a.want(w, r.GetPath())
	if err != nil {
		return nil, err
	}
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if a.free() <= slotsKept {
		return nil, fmt.Errorf("open path: %w", ErrKept)
	}
	return a.grants.ActivateFor(ctx, want)
}

// slotsKept are the path slots that no workload gets, so that people still do.
const slotsKept = 256

// want makes the payload of what the workload asks for: from its own address, no longer than it is proven.
func (a *automation) want(w workload, r *api.PathRequest) (wanted, error) {
	now := a.clock.wall().UTC()
	p := grant.Payload{
		Requester: w.id.String(), Service: plain(r.GetService()), Binding: r.GetBinding(), Addresses: []netip.Addr{w.from.Addr()},
		NotBefore: now, NotAfter: earlierOf(w.until.UTC(), now.Add(grant.MaxWindow)), Duration: r.GetDuration().AsDuration(),
		Budget: budgetFrom(r.GetBudget()), Ingress: policy.Ingress(r.GetIngress()), Reason: r.GetReason(), Ticket: r.GetTicket(), Audience: a.node,
		Device: uint32(a.device(w.from.Addr())),
	}
	for _, port := range r.GetPorts() {
		if port > 65535 {
			return wanted{}, &policy.Error{Field: "ports", Msg: fmt.Sprintf("%d is not a port", port), Hint: "name ports of the service"}
		}
		p.Ports = append(p.Ports, uint16(port))
	}
	if err := a.bind(w, r, &p); err != nil {
		return wanted{}, err
	}
	p, err := p.Named(now)
	return wanted{p, w.proof}, err
}

// bind fills in what the path is bound to.
func (a *automation) bind(w workload, r *api.PathRequest, p *grant.Payload) (err error) {
	switch p.Binding {
	case "":
		p.Binding = policy.BindingAddress
		return a.bindAddress(w)
	case policy.BindingAddress:
		return a.bindAddress(w)
	case policy.BindingTuple: // behind a shared address the port is not the client's own
		p.ClientPort, p.Budget.Connections = uint16(min(r.GetClientPort(), 65536)), 1 // what is no port becomes none
		return a.bindAddress(w)
	case policy.BindingWorkload:
		p.Cgroup, err = a.cgroup(w, p.Service)
	}
	return err
}

func (a *automation) bindAddress(w workload) error {
	what, err := a.shared(w.from.Addr())
	if err == nil && what != "" {
		err = &policy.Error{Field: "binding", Msg: fmt.Sprintf("%s is %s: whoever has it could use the path", w.from.Addr(), what),
			Hint: "on the service's own node ask with --binding workload"}
	}
	return err
}

// cgroup is the control group that the asking socket is of.
func (a *automation) cgroup(w workload, service string) (uint64, error) {
	if e := a.grants.enforced(); e != nil {
		if s, ok := e.service(service); ok && s.Protocol == datapath.UDP {
			return 0, &policy.Error{Field: "binding", Msg: "whose a datagram is cannot be told", Hint: "ask for another binding"}
		}
	}
	id, err := datapath.CgroupOf(w.from, w.to)
	if errors.Is(err, datapath.ErrNotLocal) {
		err = &policy.Error{Field: "binding", Msg: fmt.Sprintf("no workload of this node asks from %s: %s", w.from, oneLine(err.Error())),
			Hint: "a workload elsewhere asks with --binding address; one on the node runs in a control group of its own", Err: err}
	}
	return id, err
}

func earlierOf(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func budgetFrom(b *api.Budget) policy.Budget {
	return policy.Budget{Bytes: policy.Size(b.GetBytes()), Packets: b.GetPackets(), Connections: b.GetConnections(), ConnectionsPerSecond: b.GetConnectionsPerSecond()}
}

// hold says that the path is open and keeps it, until the stream ends or the grant does. When the agent stops, the
// grant stays: its holder can take it up again.
func (a *automation) hold(stream grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply], w workload, h *held) error {
	closed := make(chan string, 1)
	go func() { closed <- untilClosed(stream) }() // ends with this call
	err := stream.Send(&api.HoldReply{Is: &api.HoldReply_Opened{Opened: &api.PathOpened{Grant: h.row.ID, Node: a.node,
		Client: h.payload.Addresses[0].String(), Deadline: timestamppb.New(h.row.Deadline)}}})
	for err == nil {
		changed := a.source.Changed()
		if _, _, wrong := x509svid.Verify(w.chain, a.source); wrong != nil && a.clock.wall().Before(w.until) {
			if err = a.letGo(stream.Context(), h, "its holder's identity no longer holds: "+oneLine(wrong.Error())); err != nil {
				return err
			}
		}
		select {
		case <-a.stopping:
			return errStopping
		case <-h.holding.ended:
			return stream.Send(&api.HoldReply{Is: &api.HoldReply_Ended{Ended: &api.PathEnded{Why: h.over.why}}})
		case why := <-closed:
			return a.letGo(stream.Context(), h, why)
		case <-changed:
		}
	}
	return errors.Join(err, a.letGo(stream.Context(), h, whyHolderGone))
}

// errStopping tells a holder that it can take its path up again.
var errStopping = status.Error(codes.Unavailable, "agent stops; the path stays for a while: ask for its grant again")

// untilClosed waits for the end of what the holder has to say.
func untilClosed(stream grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) (why string) {
	for {
		switch _, err := stream.Recv(); {
		case errors.Is(err, io.EOF):
			return whyGivenBack
		case err != nil:
			return whyHolderGone
		}
	}
}

// letGo ends what nobody holds any more. The stream's own context is over by then. Without an error the path is closed; the grants
// try again what went wrong.
func (a *automation) letGo(ctx context.Context, h *held, why string) error {
	if a.stops() {
		return errStopping
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err := a.grants.LetGo(ctx, h, why)
	a.problems.report(problemGrants, "holder", err)
	if errors.Is(err, errNotRecorded) {
		return nil // it is closed
	}
	return toStatus(err)
}

// stops tells whether streams end because the agent does.
func (a *automation) stops() bool {
	select {
	case <-a.stopping:
		return true
	default:
		return false
	}
}

// addressOwners knows addresses that stand for more than one workload.
type addressOwners struct {
	listed []policy.AddressRange
	around *surroundings
}

// of says what an address is, beside a workload's, or nothing.
func (o addressOwners) of(a netip.Addr) (string, error) {
	if slices.ContainsFunc(o.listed, func(r policy.AddressRange) bool { return r.Contains(a) }) {
		return "an address of many hosts (sharedAddresses)", nil
	}
	own, err := o.around.own([]netip.Addr{a})
	if err != nil {
		return "", err
	}
	if a.IsLoopback() || slices.Contains(own, a) {
		return "an address of the node", nil
	}
	_, gateways, err := o.around.look()
	if err != nil {
		return "", err
	}
	if slices.Contains(gateways, a) {
		return "a gateway of the node", nil
	}
	return "", nil
}
