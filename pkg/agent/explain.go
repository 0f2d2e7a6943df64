package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// question is what Explain is asked: what would a new connection meet?
type question struct {
	client   netip.Addr
	server   netip.AddrPort // zero: the first port of service
	service  string
	identity spiffeid.ID // zero: not asked
}

// Explain tells what a new connection would meet, step by step, with the evaluators that decide it.
func (o *operators) Explain(_ context.Context, req *api.ExplainRequest) (*api.ExplainReply, error) {
	q, err := parseQuestion(req)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	e := o.enforced()
	if e == nil {
		return nil, toStatus(ErrNoResources)
	}
	_, protected := e.set.Service(q.service)
	if _, remote := e.handed.RemoteService(q.service); q.service != "" && !protected && !remote {
		return nil, toStatus(fmt.Errorf("explain %q: %w", q.service, ErrNoService))
	}
	r := o.answer(q, e)
	if r.Verdict == flow.VerdictProxied.String() {
		return o.closed(r), nil
	}
	return r, nil
}

// closed says what keeps a steered packet from an answer, if anything does.
func (o *operators) closed(r *api.ExplainReply) *api.ExplainReply {
	listening, err := o.listening()
	switch {
	case err != nil:
		return say(r, "not known: whether the proxy listens: "+oneLine(err.Error()))
	case listening:
		return r
	}
	r.Verdict, r.Reason = flow.VerdictDenied.String(), flow.ReasonNoListener.String()
	return say(r, "but the proxy does not listen now: the packet is dropped (NO_LISTENER): look at sallyport-proxy")
}

// answer reads what the decision depends on, and says what could not be read.
func (o *operators) answer(q question, e *enforced) *api.ExplainReply {
	paths, err := o.datapath.Paths()
	own, ownErr := o.grants.own(slices.DeleteFunc([]netip.Addr{q.client, q.server.Addr()}, func(a netip.Addr) bool { return !a.IsValid() }))
	if ownErr != nil {
		own = append(own, q.server.Addr()) // in doubt it is the node's
	}
	r := decide(q, e, own, paths)
	if err != nil {
		say(r, "not known: whether a path is live: "+oneLine(err.Error()))
	}
	if ownErr != nil {
		say(r, "not known: which addresses are the node's: "+oneLine(ownErr.Error()))
	}
	if service, port, ok := find(q, e.handed, own); ok && service.Enforced() && r.Verdict != flow.VerdictBypassed.String() {
		around(r, e.set, policy.GrantFacts{Service: service.Name, Ports: []uint16{port}, Addresses: []netip.Addr{q.client},
			NodeAddresses: own, Now: o.clock.wall()})
	}
	return r
}

// decide says what a new connection would meet, where the node has these addresses and these paths.
func decide(q question, e *enforced, own []netip.Addr, paths []datapath.PathStatus) *api.ExplainReply {
	r := &api.ExplainReply{Verdict: flow.VerdictNone.String(), Reason: flow.ReasonNone.String()}
	if remote, ok := findRemote(q, e.handed); ok {
		return overRemote(r, q, remote, e.set)
	}
	service, port, ok := find(q, e.handed, own)
	if !ok {
		return say(r, "no protected service is there: the packet goes on untouched")
	}
	r.Service = service.Name
	say(r, fmt.Sprintf("protected service %s (%s), from %s", service.Name, service.Spec.Target, service.Source))
	row, _ := e.service(service.Name)
	p := latest(paths, q.client, row.ID, port)
	if !service.Enforced() {
		return open(r, service, overPath(&api.ExplainReply{}, q, service, e.set, p))
	}
	return overPath(r, q, service, e.set, p)
}

// open says that a service is not enforced, and what Enforce would do.
func open(r *api.ExplainReply, service policy.ProtectedService, enforced *api.ExplainReply) *api.ExplainReply {
	r.Grant = enforced.Grant
	say(r, service.Open()+"; the packet goes on untouched")
	for _, line := range enforced.Lines {
		say(r, "if it were enforced: "+line)
	}
	return r
}

// around says which policies a way around the proxy can be asked for under, and what the others have against it.
func around(r *api.ExplainReply, set *policy.Set, g policy.GrantFacts) {
	ways, denied := set.Ways(g)
	for _, e := range denied {
		say(r, "no way around: "+e.Msg)
	}
	for _, w := range ways {
		if len(denied) == 0 && len(w.Against) == 0 {
			say(r, "a way around may be asked for under "+w.Policy)
		}
		for _, e := range w.Against {
			say(r, "no way around: "+e.Msg)
		}
	}
}

// overPath tells what the client's path does with a new connection, or what happens without one (the zero value).
func overPath(r *api.ExplainReply, q question, service policy.ProtectedService, set *policy.Set, p datapath.PathStatus) *api.ExplainReply {
	r.Grant = p.Grant
	if p.State == datapath.PathActive && !used(p) {
		return bypassed(r, p)
	}
	return notBypassed(r, q, service, set, p)
}

// bypassed says what a live path means for a new connection.
func bypassed(r *api.ExplainReply, p datapath.PathStatus) *api.ExplainReply {
	r.Verdict, r.Reason = flow.VerdictBypassed.String(), flow.ReasonPathOpen.String()
	say(r, fmt.Sprintf("%s has a live path, by grant %s: straight to the service", p.Client, p.Grant))
	if p.Ingress != datapath.IngressAny {
		say(r, "but only behind the kind of device that the grant names; by another one it gets no path (PATH_INGRESS)")
	}
	if p.Cgroup != 0 {
		say(r, fmt.Sprintf("but only from sockets of control group %d on this node; others get no path (PATH_BOUND)", p.Cgroup))
	}
	if p.ClientPort != 0 {
		say(r, fmt.Sprintf("but only from its port %d; others get no path (PATH_BOUND)", p.ClientPort))
	}
	if rate := p.Budget.ConnectionsPerSecond; rate != 0 {
		say(r, fmt.Sprintf("but no more than %d new connections in a second; others get no path (PATH_RATE)", rate))
	}
	return r
}

// used tells whether a live path took all connections of its budget.
func used(p datapath.PathStatus) bool {
	return p.Budget.Connections != 0 && p.Flows >= p.Budget.Connections
}

// notBypassed tells of a connection that no path lets through. Only a proven identity gets it any further.
func notBypassed(r *api.ExplainReply, q question, service policy.ProtectedService, set *policy.Set, p datapath.PathStatus) *api.ExplainReply {
	reason, why := whyNot(p, service.Spec.Protocol == policy.ProtocolUDP)
	r.Reason = reason.String()
	if service.Spec.Protocol == policy.ProtocolUDP {
		r.Verdict = flow.VerdictDenied.String()
		return say(r, fmt.Sprintf("%s %s: the datagram is refused, for UDP has no way through the proxy; it takes a grant", q.client, why))
	}
	r.Verdict = flow.VerdictProxied.String()
	say(r, fmt.Sprintf("%s %s: the first packet is steered to the proxy", q.client, why))
	if q.identity.IsZero() {
		return say(r, "the proxy asks for an identity; without TLS it resets the connection (NO_TLS)")
	}
	authorised(r, set.Authorise(service.Name, policy.Caller{ID: q.identity, Address: q.client}, nil, time.Now()), q.identity)
	if service.Spec.HTTP != nil {
		say(r, "requests are judged one by one: `sallyport policy explain` tries one")
	}
	return r
}

// whyNot says why a path, or none (the zero value), does not let a new connection through.
func whyNot(p datapath.PathStatus, udp bool) (flow.Reason, string) {
	if p.State == datapath.PathActive {
		return flow.ReasonPathConnections, fmt.Sprintf("has a path, but it took all of its %d connections", p.Budget.Connections)
	}
	why := "has no live path"
	if p.Grant != "" {
		why += fmt.Sprintf(" (that of grant %s is %s)", p.Grant, stateName(p.State))
	}
	if udp {
		return flow.ReasonUDPNoPath, why
	}
	return flow.ReasonNoPath, why
}

// latest is the path of a client to a port of a service: the live one, rather of the whole address, or else the last of those that ended and are still
// in the kernel. The zero value: none.
func latest(paths []datapath.PathStatus, client netip.Addr, service uint32, port uint16) (last datapath.PathStatus) {
	for _, p := range paths {
		switch {
		case p.ServiceID != service || p.Client != client || !slices.Contains(p.Ports, port):
		case p.State == datapath.PathActive && p.Cgroup == 0 && p.ClientPort == 0:
			return p
		case p.State == datapath.PathActive:
			last = p
		case last.State == datapath.PathActive:
		case last.Grant == "" || p.Deadline > last.Deadline:
			last = p
		}
	}
	return last
}

// authorised adds what the proxy would decide.
func authorised(r *api.ExplainReply, d policy.Decision, id spiffeid.ID) *api.ExplainReply {
	if d.Allowed {
		r.Reason = flow.ReasonIdentity.String()
		return say(r, fmt.Sprintf("%s is let in by %s", id, d.Rule))
	}
	r.Verdict, r.Reason = flow.VerdictDenied.String(), flow.ReasonNotAuthorised.String()
	say(r, fmt.Sprintf("no access rule matches %s", id))
	for _, near := range d.Near {
		say(r, "nearest: "+near)
	}
	return r
}

func say(r *api.ExplainReply, line string) *api.ExplainReply {
	r.Lines = append(r.Lines, line)
	return r
}

// find looks the service up by its name or by the address that is asked for. A service of the node is at the node's own
// addresses only.
func find(q question, set *policy.Set, own []netip.Addr) (s policy.ProtectedService, port uint16, ok bool) {
	if q.service == "" {
		s, ok = serviceAt(set, q.server, isOwn(q.server.Addr(), own))
		return s, q.server.Port(), ok
	}
	s, ok = set.Service(q.service)
	if !ok {
		return s, 0, false
	}
	if q.server.IsValid() {
		return s, q.server.Port(), true
	}
	return s, s.Spec.Ports[0], true
}

// findRemote looks a remote service up in the same way.
func findRemote(q question, set *policy.Set) (policy.RemoteService, bool) {
	if q.service == "" {
		return set.RemoteServiceAt(q.server)
	}
	return set.RemoteService(q.service)
}

// overRemote tells of a workload of this node that asks for a remote service.
func overRemote(r *api.ExplainReply, q question, s policy.RemoteService, set *policy.Set) *api.ExplainReply {
	r.Service, r.Verdict, r.Reason = s.Name, flow.VerdictProxied.String(), flow.ReasonNoPath.String()
	say(r, fmt.Sprintf("remote service %s (%s), from %s", s.Name, s.Words(), s.Source))
	say(r, "of a client on this node the first packet is steered to the proxy; of any other one it goes on untouched")
	if q.identity.IsZero() {
		return say(r, "the proxy asks whose socket it is, and resets what nobody attests (UNATTESTED)")
	}
	d := set.AuthoriseCaller(s.Name, policy.Caller{ID: q.identity, Proof: policy.ProofLocal}, time.Now())
	if !d.Allowed {
		r.Verdict, r.Reason = flow.VerdictDenied.String(), flow.ReasonNotAuthorised.String()
		say(r, fmt.Sprintf("no caller that may ask is %s", q.identity))
		for _, near := range d.Near {
			say(r, "nearest: "+near)
		}
		return r
	}
	r.Reason = flow.ReasonOriginated.String()
	say(r, fmt.Sprintf("a workload that is attested as %s may ask by %s", q.identity, d.Rule))
	say(r, "whoever answers has to be one of "+strings.Join(s.Spec.Identities, ", ")+" (else PEER_REFUSED)")
	if s.Spec.Without == policy.WithoutPass {
		say(r, "but where nobody answers in TLS, it is sent on in the clear (IN_CLEAR)")
	}
	return r
}

func isOwn(a netip.Addr, own []netip.Addr) bool {
	a = a.Unmap().WithZone("")
	return a.IsLoopback() || slices.Contains(own, a)
}

// serviceAt takes TCP for what is asked where both protocols are protected. own says that the address is the node's.
func serviceAt(set *policy.Set, dst netip.AddrPort, own bool) (policy.ProtectedService, bool) {
	at := set.PodServiceAt
	if own {
		at = set.ServiceAt
	}
	if s, ok := at(policy.ProtocolTCP, dst); ok {
		return s, true
	}
	return at(policy.ProtocolUDP, dst)
}

func parseQuestion(req *api.ExplainRequest) (q question, err error) {
	q.service = req.GetService()
	if q.client, err = parseClient(req.GetClient()); err != nil {
		return q, err
	}
	if s := req.GetServer(); s != "" {
		if q.server, err = netip.ParseAddrPort(s); err != nil {
			return q, fmt.Errorf("server: %q is not an address with a port", s)
		}
	}
	if q.service == "" && !q.server.IsValid() {
		return q, fmt.Errorf("server: name a server or a service")
	}
	if s := req.GetIdentity(); s != "" {
		if q.identity, err = spiffeid.FromString(s); err != nil {
			return q, fmt.Errorf("identity: %w", err)
		}
	}
	return q, nil
}

func parseClient(s string) (netip.Addr, error) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr().Unmap(), nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("client: %q is not an address", s)
	}
	return a.Unmap(), nil
}
