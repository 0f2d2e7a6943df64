package policy

import (
	"fmt"
	"slices"
	"strings"
)

// Probes are those of kubelet that go to the pods of a service directly. Nothing of a probe proves that it is one: what they let in is the
// sockets of one control group of the node, at these ports.
type Probes struct {
	// Ports of the service that are probed. At least one.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	Ports []Port `json:"ports" yaml:"ports"`
	// Cgroup is where kubelet is in the node's control groups of version 2, like /system.slice/kubelet.service. Groups below it do not count.
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:Pattern=`^(/[^/]+)+$`
	// +kubebuilder:validation:XValidation:rule="!self.split('/').exists(s, s == '.' || s == '..')",message="is not such a path"
	// +kubebuilder:validation:XValidation:rule="!self.split('/').exists(s, s.startsWith('kubepods'))",message="is of pods: kubelet is in none"
	Cgroup string `json:"cgroup" yaml:"cgroup"`
}

// maxCgroup bounds the path of a control group, in bytes, and maxProbed the ports of probes.
const (
	maxCgroup = 1024
	maxProbed = 64
)

func (s *ProtectedService) validateProbes(d *document) {
	p := s.Spec.Probes
	if p == nil {
		return
	}
	switch {
	case s.Spec.Target == TargetHost:
		d.report("spec.probes", faultf("remove it, or write target: Pod", "kubelet's probes of a Host service come from the node itself: they are for services in pods"))
	case s.Spec.Protocol == ProtocolUDP:
		d.report("spec.probes", faultf("remove it", "kubelet probes by TCP, and whose a datagram is cannot be told"))
	}
	d.checkPorts("spec.probes.ports", p.Ports)
	if len(p.Ports) > maxProbed {
		d.report("spec.probes.ports", faultf("list those that a probe names", "has %d ports, the most is %d", len(p.Ports), maxProbed))
	}
	for i, port := range p.Ports {
		if port != 0 && !slices.Contains(s.Spec.Ports, port) {
			d.report(fmt.Sprintf("spec.probes.ports[%d]", i), faultf("probe a port of spec.ports; others are reached without this", "%d is not one of the service's", port))
		}
	}
	d.report("spec.probes.cgroup", checkProbesCgroup(p.Cgroup))
}

// checkProbesCgroup refuses what cannot be kubelet's: every process that nobody has put anywhere is in the root, and pods are in kubepods.
func checkProbesCgroup(path string) error {
	const hint = "write where kubelet is, like /system.slice/kubelet.service: the node's /proc/PID/cgroup has it after 0::"
	if path == "" {
		return faultf(hint, "is missing")
	}
	if len(path) > maxCgroup || checkPath(path) != nil {
		return faultf(hint, "%q is not such a path", cut(path))
	}
	if slices.ContainsFunc(strings.Split(path, "/"), func(s string) bool { return strings.HasPrefix(s, "kubepods") }) {
		return faultf(hint, "%q is of pods: kubelet is in none", cut(path))
	}
	return nil
}

// probes compares two exceptions. Fewer ports are tighter, and none at all; another control group lets in others.
func (c *comparison) probes(old *Probes, next **Probes) {
	if old != nil && *next != nil && old.Cgroup == (*next).Cgroup {
		is := **next
		grows(c, "spec.probes.ports", old.Ports, &is.Ports, equal)
		*next = &is
		return
	}
	settle(c, "spec.probes", old, next, *next != nil)
}
