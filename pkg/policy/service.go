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
// +kubebuilder:validation:Enum=Host;Pod
type Target string

// Targets of a protected service.
const (
	// TargetHost is a service in the node's host network namespace, on every local address.
	TargetHost Target = "Host"
	// TargetPod is a service behind one host-side device.
	TargetPod Target = "Pod"
)

// Mode says how far a service is protected.
// +kubebuilder:validation:Enum="";Enforce;Shadow;Observe
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
// +kubebuilder:validation:XValidation:rule="self.target != 'Host' || !has(self.addresses) || size(self.addresses) == 0",message="a Host service is protected on every local address and names none",fieldPath=".addresses"
// +kubebuilder:validation:XValidation:rule="self.target != 'Host' || !has(self.device) || size(self.device) == 0",message="a Host service has no device",fieldPath=".device"
// +kubebuilder:validation:XValidation:rule="self.target != 'Pod' || has(self.podSelector) || has(self.addresses) && size(self.addresses) > 0",message="a Pod service needs at least one address, or a podSelector",fieldPath=".addresses"
// +kubebuilder:validation:XValidation:rule="!has(self.podSelector) || !has(self.addresses) || size(self.addresses) == 0",message="the podSelector says which pods, and their addresses follow: remove one of the two",fieldPath=".addresses"
// +kubebuilder:validation:XValidation:rule="!has(self.podSelector) || !has(self.device) || size(self.device) == 0",message="the podSelector says which pods, and their devices follow",fieldPath=".device"
// +kubebuilder:validation:XValidation:rule="self.target != 'Host' || !has(self.podSelector)",message="a Host service is in no pod of its own",fieldPath=".podSelector"
// +kubebuilder:validation:XValidation:rule="self.target != 'Host' || !has(self.probes)",message="kubelet's probes of a Host service come from the node itself: they are for services in pods",fieldPath=".probes"
// +kubebuilder:validation:XValidation:rule="self.protocol != 'UDP' || !has(self.probes)",message="kubelet probes by TCP, and whose a datagram is cannot be told",fieldPath=".probes"
// +kubebuilder:validation:XValidation:rule="!has(self.probes) || self.probes.ports.all(p, p in self.ports)",message="names a port that is not one of the service's",fieldPath=".probes.ports"
// +kubebuilder:validation:XValidation:rule="self.protocol != 'UDP' || !has(self.access) || size(self.access) == 0",message="nothing proves who sent a datagram, so UDP has no way through the proxy",fieldPath=".access"
// +kubebuilder:validation:XValidation:rule="self.protocol != 'UDP' || !has(self.http)",message="a UDP service has no way through the proxy",fieldPath=".http"
// +kubebuilder:validation:XValidation:rule="self.protocol != 'UDP' || !has(self.tokens)",message="a UDP service has no way through the proxy",fieldPath=".tokens"
// +kubebuilder:validation:XValidation:rule="self.protocol != 'UDP' || !has(self.udp) || size(self.udp) == 0",message="it is for TCP services: this one is UDP itself",fieldPath=".udp"
// +kubebuilder:validation:XValidation:rule="self.protocol == 'UDP' || !has(self.idle)",message="a TCP service has no idle time",fieldPath=".idle"
// +kubebuilder:validation:XValidation:rule="!has(self.http) || !has(self.tokens)",message="a service with http takes tokens with its requests: write them in spec.http",fieldPath=".tokens"
// +kubebuilder:validation:XValidation:rule="has(self.http) || !has(self.access) || self.access.all(r, !has(r.routes) || size(r.routes) == 0)",message="only a service with http has requests: write http, or remove the routes",fieldPath=".access"
// +kubebuilder:validation:XValidation:rule="has(self.http) || has(self.tokens) || !has(self.access) || self.access.all(r, (!has(r.subjects) || size(r.subjects) == 0) && (!has(r.groups) || size(r.groups) == 0))",message="only a service with http or tokens takes tokens: remove subjects and groups",fieldPath=".access"
// +kubebuilder:validation:XValidation:rule="!has(self.http) || !has(self.http.authenticate) || size(self.http.authenticate) == 0 || self.http.authenticate.exists(a, a == 'spiffe' || a == 'jwt') || !has(self.access) || self.access.all(r, !has(r.identities) || size(r.identities) == 0)",message="nobody proves a SPIFFE ID to this service: add spiffe or jwt to spec.http.authenticate",fieldPath=".access"
// +kubebuilder:validation:XValidation:rule="!has(self.access) || self.access.all(r, (!has(r.subjects) || r.subjects.all(s, has(self.http) ? has(self.http.providers) && s.split('/')[0] in self.http.providers : !has(self.tokens) || has(self.tokens.providers) && s.split('/')[0] in self.tokens.providers)))",message="names a subject of a provider that the service does not list",fieldPath=".access"
// +kubebuilder:validation:XValidation:rule="!has(self.access) || self.access.all(r, (!has(r.groups) || r.groups.all(s, has(self.http) ? has(self.http.providers) && s.split('/')[0] in self.http.providers : !has(self.tokens) || has(self.tokens.providers) && s.split('/')[0] in self.tokens.providers)))",message="names a group of a provider that the service does not list",fieldPath=".access"
// +kubebuilder:validation:XValidation:rule="!has(self.http) || !has(self.http.hosts) || size(self.http.hosts) == 0 || !has(self.access) || self.access.all(r, !has(r.routes) || r.routes.all(o, !has(o.hosts) || o.hosts.all(h, h in self.http.hosts)))",message="a route names a host that is not in spec.http.hosts",fieldPath=".access"
// +kubebuilder:validation:XValidation:rule="has(self.http) || !has(self.tests) || self.tests.all(t, (!has(t.path) || size(t.path) == 0) && (!has(t.method) || size(t.method) == 0) && (!has(t.host) || size(t.host) == 0) && (!has(t.headers) || size(t.headers) == 0))",message="the service has no http: nobody looks at requests",fieldPath=".tests"
type ProtectedServiceSpec struct {
	// Target is Host or Pod.
	Target Target `json:"target" yaml:"target"`
	// Mode is Enforce, also when it is not written, Shadow or Observe.
	// +optional
	// +kubebuilder:default=Enforce
	Mode Mode `json:"mode,omitzero" yaml:"mode,omitempty"`
	// Protocol is TCP, also when it is not written, or UDP.
	// +kubebuilder:validation:Enum="";TCP;UDP
	// +kubebuilder:default=TCP
	Protocol string `json:"protocol,omitempty" yaml:"protocol,omitempty"`
	// UDP says what becomes of UDP at the ports of a TCP service: Deny, also when it is not written, so that
	// QUIC does not go around the proxy, or Allow. Ports that a UDP service has are that service's.
	// +kubebuilder:validation:Enum="";Deny;Allow
	UDP string `json:"udp,omitempty" yaml:"udp,omitempty"`
	// Idle is the silence that ends a flow of a UDP service: 1s to 1h in whole seconds, 30s when it is not written.
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('1s') && duration(self) <= duration('1h') && duration(self).getMilliseconds() % 1000 == 0",message="must be 1s to 1h in whole seconds"
	Idle *Duration `json:"idle,omitempty" yaml:"idle,omitempty"`
	// Ports are protected on every address of the service. At least one, no duplicates.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=1024
	// +listType=set
	Ports []Port `json:"ports" yaml:"ports"`
	// PodSelector chooses the pods of a service in a cluster. Pod: this or addresses.
	PodSelector *PodSelector `json:"podSelector,omitempty" yaml:"podSelector,omitempty"`
	// Addresses are those of the pod. Pod without a podSelector: at least one. Host: none, every local address counts.
	// +kubebuilder:validation:MaxItems=256
	// +listType=set
	// +kubebuilder:validation:items:XValidation:rule="!isIP(self) || ip(self).isGlobalUnicast()",message="is not the address of one host that can be routed: loopback, link-local, multicast and unspecified ones are not"
	Addresses []netip.Addr `json:"addresses,omitempty" yaml:"addresses,omitempty"`
	// Device is the pod's host-side device. Empty: the agent finds it by the route.
	// +kubebuilder:validation:Pattern=`^([!-.0-9;-~]{1,15})?$`
	// +kubebuilder:validation:XValidation:rule="self != '.' && self != '..'",message="is not the name of a network device"
	// +kubebuilder:validation:MaxLength=15
	Device string `json:"device,omitempty" yaml:"device,omitempty"`
	// Probes let kubelet's own probes reach the pods directly, by paths of their own. Left out: they go to the proxy, as everybody does.
	Probes *Probes `json:"probes,omitempty" yaml:"probes,omitempty"`
	// Access says who may come through the proxy. Empty: nobody. A UDP service has none.
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Access []AccessRule `json:"access,omitempty" yaml:"access,omitempty"`
	// HTTP makes the proxy speak HTTP with its clients. Left out: bytes are carried as they are.
	HTTP *HTTPSpec `json:"http,omitempty" yaml:"http,omitempty"`
	// Tokens let callers of a service without http prove themselves by a bearer token. Left out: by an X.509-SVID alone.
	Tokens *TokensSpec `json:"tokens,omitempty" yaml:"tokens,omitempty"`
	// Tests are callers and requests, and what the set must make of them: sallyport policy test.
	// +kubebuilder:validation:MaxItems=128
	// +listType=atomic
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
	s.validateProbes(d)
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
