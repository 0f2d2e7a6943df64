package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// Seen is a flow that a node has decided on, as its record tells.
type Seen struct {
	Protocol string // tcp or udp, in letters of either size; empty: tcp
	Server   netip.AddrPort
	// Service is what the node found there: where that is one of the node itself, so is the address.
	Service string
	// Passed says that it got through, by the proxy or around it.
	Passed bool
	// Identity is what the client proved; zero: nothing, or it went around the proxy.
	Identity spiffeid.ID
	// Bypassed says that it went around the proxy, under Grant; nil where that is not at hand.
	Bypassed bool
	Grant    *GrantFacts
	// Unauthorised says that it was refused for the identity, not for what else was wrong with it.
	Unauthorised bool
	// Refusal is for what Enforce would have refused it, whoever it was, while it passed at a service that is not enforced.
	Refusal string
	At      time.Time // by the wall clock
}

// SeenOf is what a record of a flow says was decided, by the names in it; ok is false for one that decides nothing. What is only watched
// passed, whatever its verdict says of Enforce.
func SeenOf(event, verdict, reason string) (s Seen, ok bool) {
	s = Seen{Passed: verdict != flow.VerdictDenied.String(), Bypassed: verdict == flow.VerdictBypassed.String(),
		Unauthorised: reason == flow.ReasonNotAuthorised.String()}
	watched := event == flow.EventWatched.String()
	if watched && !s.Passed {
		s.Passed, s.Refusal = true, reason
	}
	return s, watched || event == flow.EventOpen.String() || event == flow.EventDeny.String()
}

// Fate is what becomes of a flow under another set.
type Fate string

// Fates of a flow.
const (
	FateSame    Fate = "same"
	FatePasses  Fate = "would pass"  // it was refused
	FateBreaks  Fate = "would break" // it had passed
	FateUnknown Fate = "not known"
)

// Replay says what would become of a flow under the set, and why. Whether a proxy listened, packets were in order and budgets
// held is taken to be as it was.
func (s *Set) Replay(f Seen) (Fate, string) {
	passes, known, why := s.would(f)
	switch {
	case !known:
		return FateUnknown, why
	case passes == f.Passed:
		return FateSame, why
	case passes:
		return FatePasses, why
	}
	return FateBreaks, why
}

// would is the decision by the evaluators that the node has.
func (s *Set) would(f Seen) (passes, known bool, why string) {
	svc, ok := s.ServiceSeen(f)
	switch {
	case !ok:
		return true, true, "no protected service is there"
	case !svc.Enforced():
		return true, true, svc.Open()
	case f.Refusal != "":
		return false, true, fmt.Sprintf("%s refuses it (%s)", svc.Name, f.Refusal)
	case f.udp() && svc.Spec.Protocol == ProtocolTCP:
		return false, true, fmt.Sprintf("%s refuses UDP at its ports", svc.Name)
	case f.Bypassed && f.Grant == nil:
		return false, false, "what its grant says is not at hand"
	case f.Bypassed:
		a := s.Evaluate(*f.Grant)
		if a.Allowed {
			return true, true, a.Rule
		}
		return false, true, Errors(a.Err())[0].Error()
	case !f.Identity.IsZero() && (f.Passed || f.Unauthorised) && svc.Spec.Protocol == ProtocolTCP:
		d := s.Authorise(svc.Name, Caller{ID: f.Identity}, nil, f.At)
		if d.Allowed {
			return true, true, d.Rule
		}
		return false, true, fmt.Sprintf("%s: %s", svc.Name, d.Near[0])
	case f.Passed && f.udp():
		return false, true, fmt.Sprintf("%s asks for a grant: UDP has no way through the proxy", svc.Name)
	case f.Passed:
		return false, true, fmt.Sprintf("%s asks for an identity", svc.Name)
	}
	return false, true, "it was refused for something else"
}

func (f Seen) udp() bool { return strings.EqualFold(f.Protocol, ProtocolUDP) }

// ServiceSeen is the service that the set has where the flow went; of UDP also the TCP service that refuses it there.
func (s *Set) ServiceSeen(f Seen) (ProtectedService, bool) {
	svc, ok := s.seenAt(cmp.Or(strings.ToUpper(f.Protocol), ProtocolTCP), f)
	if ok || !f.udp() {
		return svc, ok
	}
	if svc, ok = s.seenAt(ProtocolTCP, f); svc.Spec.UDP == UDPAllow {
		return ProtectedService{}, false
	}
	return svc, ok
}

// seenAt takes the address for a pod's, if one has it, unless the node found a service of its own there.
func (s *Set) seenAt(protocol string, f Seen) (ProtectedService, bool) {
	found, _ := s.Service(f.Service)
	if svc, ok := s.PodServiceAt(protocol, f.Server); ok && found.Spec.Target != TargetHost {
		return svc, true
	}
	return s.ServiceAt(protocol, f.Server)
}
