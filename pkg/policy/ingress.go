package policy

import "slices"

// Ingress is the kind of device that clients of a path are reached by. Empty is any.
// +kubebuilder:validation:Enum="";uplink;pod;local
type Ingress string

// Kinds of devices that a grant may be for.
const (
	IngressUplink Ingress = "uplink"
	IngressPod    Ingress = "pod"
	IngressLocal  Ingress = "local" // the node itself
)

// CheckIngress tells whether the kind is known: nil for an empty one too.
func CheckIngress(i Ingress) error {
	if i != "" && !slices.Contains([]Ingress{IngressUplink, IngressPod, IngressLocal}, i) {
		return faultf("write uplink, pod or local, or leave it out to mean any", "%q is no kind of device", cut(string(i)))
	}
	return nil
}

// ingress refuses a grant that is for other devices than the policy is.
func (c *grantCheck) ingress(asked Ingress) {
	if want := c.policy.Spec.Ingress; want != "" && asked != want {
		c.refuse("ingress", "ask for "+string(want), "policy %q is for clients behind %s devices alone", c.policy.Name, want)
	}
}
