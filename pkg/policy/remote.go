package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Without says what becomes of a connection to a remote service that speaks no TLS.
// +kubebuilder:validation:Enum="";refuse;pass
type Without string

// Answers to a destination without Sallyport.
const (
	// WithoutRefuse resets the client's connection.
	WithoutRefuse Without = "refuse"
	// WithoutPass carries the connection in the clear, for callers that were attested, and says so in the log.
	WithoutPass Without = "pass"
)

// RemoteService is a service on another node that workloads of this one reach as themselves: the proxy takes their connections, and
// speaks mTLS with the X.509-SVID of the workload to whoever answers.
type RemoteService struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     RemoteServiceSpec `json:"spec" yaml:"spec"`
	// Source is where it was read.
	Source Source `json:"-" yaml:"-"`
}

// RemoteServiceSpec is what a RemoteService says.
type RemoteServiceSpec struct {
	// Addresses are those of other nodes, or of what is behind them. At least one.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +listType=set
	// +kubebuilder:validation:items:XValidation:rule="!isIP(self) || ip(self).isGlobalUnicast()",message="is not the address of one host that can be routed: loopback, link-local, multicast and unspecified ones are not"
	Addresses []netip.Addr `json:"addresses" yaml:"addresses"`
	// Ports of each address, of TCP. At least one.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=1024
	// +listType=set
	Ports []Port `json:"ports" yaml:"ports"`
	// Identities are the SPIFFE IDs of those who may answer, exact, or ending in /* for everything below. At least one.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=128
	// +listType=atomic
	Identities []IdentityPattern `json:"identities" yaml:"identities"`
	// Callers are the SPIFFE IDs of the workloads that may ask, written in the same way. At least one.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=128
	// +listType=atomic
	Callers []IdentityPattern `json:"callers" yaml:"callers"`
	// Without says what becomes of a destination that speaks no TLS: refuse, also when it is not written, or pass.
	Without Without `json:"without,omitempty" yaml:"without,omitempty"`
}

func (r *RemoteService) from(at Source) { r.Source = at }

func (r *RemoteService) validate(d *document) {
	if r.Spec.Without == "" {
		r.Spec.Without = WithoutRefuse
	}
	d.report("metadata.name", CheckName(r.Name))
	d.checkRemoteAddresses(r.Spec.Addresses)
	d.checkPorts("spec.ports", r.Spec.Ports)
	d.checkPatterns("spec.identities", r.Spec.Identities, "name who may answer, like spiffe://example.org/sallyport/proxy/node-b")
	d.checkPatterns("spec.callers", r.Spec.Callers, "name the workloads that may ask, like spiffe://example.org/ns/shop/*")
	if r.Spec.Without != WithoutRefuse && r.Spec.Without != WithoutPass {
		d.report("spec.without", faultf("write refuse or pass, or leave it out for refuse", "%q is not known", cut(string(r.Spec.Without))))
	}
}

func (d *document) checkRemoteAddresses(addresses []netip.Addr) {
	if len(addresses) == 0 {
		d.report("spec.addresses", faultf("list the addresses at which the service is reached", "needs at least one address"))
	}
	seen := map[netip.Addr]int{}
	for i, a := range addresses {
		field := fmt.Sprintf("spec.addresses[%d]", i)
		if a.IsLoopback() {
			d.report(field, faultf("name an address of another node", "%s is a loopback address", a))
		}
		d.report(field, CheckAddress(a))
		if at, dup := first(seen, a, i); dup {
			d.report(field, faultf("remove one of them", "%s is already spec.addresses[%d]", a, at))
		}
	}
}

// checkPatterns reports what is no pattern of identities, and a list that names nobody.
func (d *document) checkPatterns(field string, patterns []string, hint string) {
	if len(patterns) == 0 {
		d.report(field, faultf(hint, "needs at least one identity"))
	}
	for i, p := range patterns {
		d.report(fmt.Sprintf("%s[%d]", field, i), checkPattern(p))
	}
}

// checkRemotes reports a place that two remote services claim, and a name that a protected service has: records name a service by it alone.
func (p *parser) checkRemotes() {
	services := map[string]string{}
	for _, l := range p.services {
		services[l.value.Name] = l.source().String()
	}
	seen := map[netip.AddrPort]int{}
	for i, l := range p.remotes {
		if at, taken := services[l.value.Name]; taken {
			l.report("metadata.name", faultf("rename one of them", "the name %q is that of the ProtectedService at %s", l.value.Name, at))
		}
		for _, place := range l.value.Places() {
			if at, taken := first(seen, place, i); taken && at != i {
				other := p.remotes[at]
				l.report("spec.addresses", faultf("give it to one of them", "%s is already one of %q at %s", place, other.value.Name, other.source()))
			}
		}
	}
}

// Places are its addresses with its ports.
func (r RemoteService) Places() (all []netip.AddrPort) {
	for _, a := range r.Spec.Addresses {
		for _, port := range r.Spec.Ports {
			all = append(all, netip.AddrPortFrom(a, port))
		}
	}
	return all
}

// Answers says whether who proved that SPIFFE ID may answer for the service.
func (r RemoteService) Answers(id string) bool {
	return slices.ContainsFunc(r.Spec.Identities, func(p string) bool { return matches(p, id) })
}

// RemoteServices lists the remote services by name.
func (s *Set) RemoteServices() []RemoteService {
	if s == nil {
		return nil
	}
	return slices.Clone(s.remotes)
}

// RemoteService finds a remote service by its name.
func (s *Set) RemoteService(name string) (RemoteService, bool) {
	for _, r := range s.RemoteServices() {
		if r.Name == name {
			return r, true
		}
	}
	return RemoteService{}, false
}

// RemoteServiceAt finds the remote service that a connection to dst is for.
func (s *Set) RemoteServiceAt(dst netip.AddrPort) (RemoteService, bool) {
	if s == nil {
		return RemoteService{}, false
	}
	i, ok := s.byRemote[netip.AddrPortFrom(plainAddress(dst.Addr()), dst.Port())]
	if !ok {
		return RemoteService{}, false
	}
	return s.remotes[i], true
}

// AuthoriseCaller decides whether a workload of this node that was attested may ask the remote service of that name. What a deny list
// names is refused. now is by the wall clock. It is the one evaluator, for proxy, agent and explain.
func (s *Set) AuthoriseCaller(service string, who Caller, now time.Time) Decision {
	r, ok := s.RemoteService(service)
	if !ok {
		return Decision{Near: []string{fmt.Sprintf("no RemoteService is named %q", service)}}
	}
	if who.ID.IsZero() {
		return Decision{Near: []string{"no identity was proven"}}
	}
	if l, denied := s.deniedCaller(who, now); denied {
		return Decision{Near: []string{fmt.Sprintf("%s is denied by the list %q: %s", who, l.Name, l.Spec.Reason)}}
	}
	var misses []miss
	for i, p := range r.Spec.Callers {
		if matches(p, who.ID.String()) {
			return Decision{Allowed: true, Rule: fmt.Sprintf("callers[%d]: %s", i, p)}
		}
		score, why := compare(p, who.ID)
		misses = append(misses, miss{fmt.Sprintf("callers[%d]: %s: %s", i, p, why), score})
	}
	return Decision{Near: nearest(misses)}
}

// LeaveOut is the set without those addresses of remote services; it is the set itself where there are none such.
func (s *Set) LeaveOut(isOut func(service string, a netip.Addr) bool) *Set {
	if s == nil {
		return nil
	}
	var kept []RemoteService
	changed := false
	for _, r := range s.remotes {
		in := slices.DeleteFunc(slices.Clone(r.Spec.Addresses), func(a netip.Addr) bool { return isOut(r.Name, a) })
		changed = changed || len(in) != len(r.Spec.Addresses)
		if r.Spec.Addresses = in; len(in) > 0 {
			kept = append(kept, r)
		}
	}
	if !changed {
		return s
	}
	rest := *s
	return rest.withRemotes(kept)
}

// remote compares two versions of a remote service. An address or port that goes is one to which everything goes in the clear again.
func (c *comparison) remote(old, next RemoteServiceSpec) {
	shrinks(c, "spec.addresses", old.Addresses, &next.Addresses, equal)
	shrinks(c, "spec.ports", old.Ports, &next.Ports, equal)
	grows(c, "spec.identities", old.Identities, &next.Identities, coversPattern)
	grows(c, "spec.callers", old.Callers, &next.Callers, coversPattern)
	settle(c, "spec.without", old.Without, &next.Without, next.Without != WithoutRefuse)
	rest(c, "spec", old, next)
}

// Words says in one line what a remote service is.
func (r RemoteService) Words() string {
	places := make([]string, 0, len(r.Spec.Addresses)*len(r.Spec.Ports))
	for _, p := range r.Places() {
		places = append(places, p.String())
	}
	return "TCP " + strings.Join(places, " ") + " elsewhere"
}
