package agent

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/sallyport-dev/sallyport/pkg/api"
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
	if _, ok := e.set.Service(q.service); q.service != "" && !ok {
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
	return say(r, "but the proxy does not listen now: the packet is dropped (NO_LISTENER)")
}

func (o *operators) answer(q question, e *enforced) *api.ExplainReply {
	r := &api.ExplainReply{Verdict: flow.VerdictNone.String(), Reason: flow.ReasonNone.String()}
	service, port, ok := find(q, e.set)
	if !ok {
		return say(r, "no protected service is there: the packet goes on untouched")
	}
	r.Service = service.Name
	say(r, fmt.Sprintf("protected service %s (%s), from %s", service.Name, service.Spec.Target, service.Source))
	if id, live := o.grants.serving(q.client, service.Name, port); live {
		r.Verdict, r.Reason, r.Grant = flow.VerdictBypassed.String(), flow.ReasonPathOpen.String(), id
		return say(r, fmt.Sprintf("%s has a live path, by grant %s: straight to the service", q.client, id))
	}
	if service.Spec.Protocol == policy.ProtocolUDP {
		r.Verdict, r.Reason = flow.VerdictDenied.String(), flow.ReasonUDPNoPath.String()
		return say(r, fmt.Sprintf("%s has no live path: the datagram is refused, for UDP has no way through the proxy", q.client))
	}
	r.Verdict, r.Reason = flow.VerdictProxied.String(), flow.ReasonNoPath.String()
	say(r, fmt.Sprintf("%s has no live path: the first packet is steered to the proxy", q.client))
	if q.identity.IsZero() {
		return say(r, "the proxy asks for an identity; without TLS it resets the connection (NO_TLS)")
	}
	return authorised(r, e.set.Authorise(service.Name, q.identity), q.identity)
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

// find looks the service up by its name or by the address that is asked for.
func find(q question, set *policy.Set) (s policy.ProtectedService, port uint16, ok bool) {
	if q.service == "" {
		s, ok = serviceAt(set, q.server)
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

// serviceAt takes TCP for what is asked where both protocols are protected.
func serviceAt(set *policy.Set, dst netip.AddrPort) (policy.ProtectedService, bool) {
	if s, ok := set.ServiceAt(policy.ProtocolTCP, dst); ok {
		return s, true
	}
	return set.ServiceAt(policy.ProtocolUDP, dst)
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
