package policy

import (
	"fmt"
	"net/netip"
	"strings"

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

// ProtocolTCP is the only protocol of this version.
const ProtocolTCP = "TCP"

// ProtectedService is ports that may be reached only through the proxy.
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
	// Protocol is TCP, also when it is not written.
	Protocol string `json:"protocol,omitempty" yaml:"protocol,omitempty"`
	// Ports are protected on every address of the service. At least one, no duplicates.
	Ports []uint16 `json:"ports" yaml:"ports"`
	// Addresses are those of the pod. Pod: at least one. Host: none, every local address counts.
	Addresses []netip.Addr `json:"addresses,omitempty" yaml:"addresses,omitempty"`
	// Device is the pod's host-side device. Empty: the agent finds it by the route.
	Device string `json:"device,omitempty" yaml:"device,omitempty"`
	// Access says who may come through the proxy. Empty: nobody.
	Access []AccessRule `json:"access,omitempty" yaml:"access,omitempty"`
}

// AccessRule lets identities through the proxy.
type AccessRule struct {
	// Identities are SPIFFE IDs, exact, or ending in /* for everything below.
	Identities []string `json:"identities" yaml:"identities"`
}

func (s *ProtectedService) validate(d *document) {
	if s.Spec.Protocol == "" {
		s.Spec.Protocol = ProtocolTCP
	}
	d.report("metadata.name", CheckName(s.Name))
	if s.Spec.Protocol != ProtocolTCP {
		d.report("spec.protocol", faultf("write TCP or leave it out", "protocol %q is not known", s.Spec.Protocol))
	}
	d.checkPorts("spec.ports", s.Spec.Ports)
	d.checkAccess(s.Spec.Access)
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

func (s *ProtectedService) validateHost(d *document) {
	if len(s.Spec.Addresses) > 0 {
		d.report("spec.addresses", faultf("remove the addresses, or write target: Pod",
			"a Host service is protected on every local address and names none"))
	}
	if s.Spec.Device != "" {
		d.report("spec.device", faultf("remove the device, or write target: Pod", "a Host service has no device"))
	}
}

func (s *ProtectedService) validatePod(d *document) {
	if len(s.Spec.Addresses) == 0 {
		d.report("spec.addresses", faultf("list the addresses of the pod", "a Pod service needs at least one address"))
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

func (d *document) checkAccess(rules []AccessRule) {
	for i, r := range rules {
		field := fmt.Sprintf("spec.access[%d].identities", i)
		if len(r.Identities) == 0 {
			d.report(field, faultf("list SPIFFE IDs, or remove the rule", "a rule without identities lets nobody in"))
		}
		for j, p := range r.Identities {
			d.report(fmt.Sprintf("%s[%d]", field, j), checkPattern(p))
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
