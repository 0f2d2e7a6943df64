package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Target says where a protected service's sockets live.
type Target string

// Targets of a protected service.
const (
	// TargetHost is a service in the node's host network namespace, on every local address.
	TargetHost Target = "Host"
	// TargetPod is a service behind one host-side device.
	TargetPod Target = "Pod"
)

// Mode says how far a service is protected.
type Mode string

// Modes of a protected service. Only an enforced one is closed to anybody.
const (
	// ModeEnforce steers what comes without a path to the proxy.
	ModeEnforce Mode = "Enforce"
	// ModeShadow lets everything pass, and counts and tells of what Enforce would make of it.
	ModeShadow Mode = "Shadow"
	// ModeObserve lets everything pass, and counts and tells of who comes.
	ModeObserve Mode = "Observe"
)

// IsZero leaves Enforce out of what is encoded: it is the default, and whoever knows of no modes reads the rest.
func (m Mode) IsZero() bool { return m == "" || m == ModeEnforce }

// Protocols of a protected service.
const (
	// ProtocolTCP goes through the proxy, or around it under a path.
	ProtocolTCP = "TCP"
	// ProtocolUDP goes under a path or not at all: nothing proves who sent a datagram.
	ProtocolUDP = "UDP"
)

// Answers to UDP at the ports of a TCP service.
const (
	UDPDeny  = "Deny"
	UDPAllow = "Allow"
)

// DefaultIdle is the silence that ends a UDP flow unless a service says otherwise.
const DefaultIdle = 30 * time.Second

// minFlowIdle and maxFlowIdle bound what a service may say.
const (
	minFlowIdle = time.Second
	maxFlowIdle = time.Hour
)

// ProtectedService is ports that may be reached only through the proxy, once it is enforced.
type ProtectedService struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     ProtectedServiceSpec `json:"spec" yaml:"spec"`
	// Source is where it was read.
	Source Source `json:"-" yaml:"-"`
}

// ProtectedServiceSpec is what a ProtectedService says.
type ProtectedServiceSpec struct {
	// Target is Host or Pod.
	Target Target `json:"target" yaml:"target"`
	// Mode is Enforce, also when it is not written, Shadow or Observe.
	Mode Mode `json:"mode,omitzero" yaml:"mode,omitempty"`
	// Protocol is TCP, also when it is not written, or UDP.
	Protocol string `json:"protocol,omitempty" yaml:"protocol,omitempty"`
	// UDP says what becomes of UDP at the ports of a TCP service: Deny, also when it is not written, so that
	// QUIC does not go around the proxy, or Allow. Ports that a UDP service has are that service's.
	UDP string `json:"udp,omitempty" yaml:"udp,omitempty"`
	// Idle is the silence that ends a flow of a UDP service: 1s to 1h in whole seconds, 30s when it is not written.
	Idle *Duration `json:"idle,omitempty" yaml:"idle,omitempty"`
	// Ports are protected on every address of the service. At least one, no duplicates.
	Ports []uint16 `json:"ports" yaml:"ports"`
	// PodSelector chooses the pods of a service in a cluster. Pod: this or addresses.
	PodSelector *PodSelector `json:"podSelector,omitempty" yaml:"podSelector,omitempty"`
	// Addresses are those of the pod. Pod without a podSelector: at least one. Host: none, every local address counts.
	Addresses []netip.Addr `json:"addresses,omitempty" yaml:"addresses,omitempty"`
	// Device is the pod's host-side device. Empty: the agent finds it by the route.
	Device string `json:"device,omitempty" yaml:"device,omitempty"`
	// Access says who may come through the proxy. Empty: nobody. A UDP service has none.
	Access []AccessRule `json:"access,omitempty" yaml:"access,omitempty"`
	// HTTP makes the proxy speak HTTP with its clients. Left out: bytes are carried as they are.
	HTTP *HTTPSpec `json:"http,omitempty" yaml:"http,omitempty"`
	// Tokens let callers of a service without http prove themselves by a bearer token. Left out: by an X.509-SVID alone.
	Tokens *TokensSpec `json:"tokens,omitempty" yaml:"tokens,omitempty"`
	// Tests are callers and requests, and what the set must make of them: sallyport policy test.
	Tests []AccessTest `json:"tests,omitempty" yaml:"tests,omitempty"`
}

// Enforced says whether anything of the service is closed. One whose mode is not written is.
func (s ProtectedService) Enforced() bool {
	return s.Spec.Mode.IsZero()
}

// Open says in words that nothing of the service is closed; empty: it is enforced.
func (s ProtectedService) Open() string {
	if s.Enforced() {
		return ""
	}
	return fmt.Sprintf("%s is not enforced (mode: %s): everybody reaches it, with or without a grant", s.Name, s.Spec.Mode)
}

func (s *ProtectedService) validate(d *document) {
	if s.Spec.Protocol == "" {
		s.Spec.Protocol = ProtocolTCP
	}
	if s.Spec.Mode == "" {
		s.Spec.Mode = ModeEnforce
	}
	if !slices.Contains([]Mode{ModeEnforce, ModeShadow, ModeObserve}, s.Spec.Mode) {
		d.report("spec.mode", faultf("write Observe, Shadow or Enforce, or leave it out for Enforce", "mode %q is not known", s.Spec.Mode))
	}
	d.report("metadata.name", CheckName(s.Name))
	s.validateProtocol(d)
	d.checkPorts("spec.ports", s.Spec.Ports)
	s.validateHTTP(d)
	s.validateTokens(d)
	s.validateAccess(d)
	for i, t := range s.Spec.Tests {
		t.validate(d, fmt.Sprintf("spec.tests[%d]", i), s.Spec)
	}
	switch s.Spec.Target {
	case TargetHost:
		s.validateHost(d)
	case TargetPod:
		s.validatePod(d)
	case "":
		d.report("spec.target", faultf("write target: Host or target: Pod", "is missing"))
	default:
		d.report("spec.target", faultf("write Host or Pod", "target %q is not known", s.Spec.Target))
	}
}

func (s *ProtectedService) validateProtocol(d *document) {
	switch s.Spec.Protocol {
	case ProtocolTCP:
		s.validateTCP(d)
	case ProtocolUDP:
		s.validateUDP(d)
	default:
		d.report("spec.protocol", faultf("write TCP or UDP, or leave it out for TCP", "protocol %q is not known", s.Spec.Protocol))
	}
}

func (s *ProtectedService) validateTCP(d *document) {
	if s.Spec.UDP != "" && s.Spec.UDP != UDPDeny && s.Spec.UDP != UDPAllow {
		d.report("spec.udp", faultf("write Deny or Allow", "%q is not known", s.Spec.UDP))
	}
	if s.Spec.Idle != nil {
		d.report("spec.idle", faultf("remove it, or write protocol: UDP", "a TCP service has no idle time"))
	}
}

func (s *ProtectedService) validateUDP(d *document) {
	if s.Spec.UDP != "" {
		d.report("spec.udp", faultf("remove it", "it is for TCP services: this one is UDP itself"))
	}
	if len(s.Spec.Access) > 0 {
		d.report("spec.access", faultf("remove it: a UDP service is reached under a grant's path only",
			"nothing proves who sent a datagram, so UDP has no way through the proxy"))
	}
	if s.Spec.Idle == nil {
		s.Spec.Idle = &Duration{DefaultIdle}
	}
	if v := s.Spec.Idle.Duration; v < minFlowIdle || v > maxFlowIdle || v%time.Second != 0 {
		d.report("spec.idle", faultf("write 1s to 1h in whole seconds, like 30s", "%s is not allowed", Duration{v}))
	}
}

func (s *ProtectedService) validateHost(d *document) {
	if len(s.Spec.Addresses) > 0 {
		d.report("spec.addresses", faultf("remove the addresses, or write target: Pod",
			"a Host service is protected on every local address and names none"))
	}
	if s.Spec.Device != "" {
		d.report("spec.device", faultf("remove the device, or write target: Pod", "a Host service has no device"))
	}
	if s.Spec.PodSelector != nil {
		d.report("spec.podSelector", faultf("remove the podSelector, or write target: Pod", "a Host service is in no pod of its own; "+
			"pods with hostNetwork are protected by target: Host"))
	}
}

// validateSelected checks a service whose pods are chosen by what they are.
func (s *ProtectedService) validateSelected(d *document) {
	if len(s.Spec.Addresses) > 0 {
		d.report("spec.addresses", faultf("remove the addresses or the podSelector", "the podSelector says which pods, and their addresses follow"))
	}
	if s.Spec.Device != "" {
		d.report("spec.device", faultf("remove the device", "the podSelector says which pods, and their devices follow"))
	}
	s.Spec.PodSelector.validate(d)
}

func (s *ProtectedService) validatePod(d *document) {
	if s.Spec.PodSelector != nil {
		s.validateSelected(d)
		return
	}
	if len(s.Spec.Addresses) == 0 {
		d.report("spec.addresses", faultf("list the addresses of the pod, or write a podSelector", "a Pod service needs at least one address"))
	}
	seen := map[netip.Addr]int{}
	for i, a := range s.Spec.Addresses {
		field := fmt.Sprintf("spec.addresses[%d]", i)
		d.report(field, checkPodAddress(a))
		if at, dup := first(seen, a, i); dup {
			d.report(field, faultf("remove one of them", "%s is already spec.addresses[%d]", a, at))
		}
	}
	if s.Spec.Device != "" {
		d.report("spec.device", checkDevice(s.Spec.Device))
	}
}

func checkPodAddress(a netip.Addr) error {
	if a.IsLoopback() {
		return faultf("name an address that the node routes to the pod", "%s is a loopback address", a)
	}
	return CheckAddress(a)
}

func (d *document) checkPorts(field string, ports []uint16) {
	if len(ports) == 0 {
		d.report(field, faultf("list the ports to protect, like [5432]", "needs at least one port"))
	}
	seen := map[uint16]int{}
	for i, p := range ports {
		at := fmt.Sprintf("%s[%d]", field, i)
		if p == 0 {
			d.report(at, faultf("write a port from 1 to 65535", "0 is not a port"))
		}
		if before, dup := first(seen, p, i); dup {
			d.report(at, faultf("remove one of them", "port %d is already %s[%d]", p, field, before))
		}
	}
}

// checkPattern tells why p is neither a SPIFFE ID of a workload nor a prefix of such, or gives nil.
func checkPattern(p string) error {
	prefix, below := strings.CutSuffix(p, "/*")
	if strings.Contains(prefix, "*") {
		return faultf("end it in /* to mean everything below, like spiffe://example.org/ops/*",
			"%q has a * that is not a last segment of its own", p)
	}
	id, err := spiffeid.FromString(prefix)
	if err != nil {
		return faultf("write it like spiffe://example.org/app/web", "%q is not a SPIFFE ID: %v", p, err)
	}
	if !below && id.Path() == "" {
		return faultf("add the path of a workload, or /* for every workload of the trust domain",
			"%q is a trust domain, not a workload", p)
	}
	return nil
}
