package policy

import (
	"fmt"
	"math"
	"time"
)

// Class says how much harm a bypass policy can do, and so how much care its grants get.
// +kubebuilder:validation:Enum="";Routine;Sensitive;Critical
type Class string

// Classes of bypass policies. What follows from each is in classRules.
const (
	ClassRoutine   Class = "Routine" // also when it is not written
	ClassSensitive Class = "Sensitive"
	ClassCritical  Class = "Critical"
)

// classRule is what a policy of a class has to say, at least.
type classRule struct {
	class       Class
	maxDuration time.Duration // the most that it may allow
	ticket      bool          // it must be required
	approvals   int           // people beside the requester, at least
	maxReach    uint32        // where the policy does not say less or more
}

// classRules are from the least careful to the most.
var classRules = []classRule{
	{class: ClassRoutine, maxDuration: MaxGrantDuration, maxReach: math.MaxUint32},
	{class: ClassSensitive, maxDuration: 4 * time.Hour, ticket: true, approvals: 1, maxReach: 64},
	{class: ClassCritical, maxDuration: time.Hour, ticket: true, approvals: 2, maxReach: 16},
}

// rank is the place of a class in classRules; ok says whether there is such a class.
func (c Class) rank() (place int, ok bool) {
	if c == "" {
		return 0, true
	}
	for i, r := range classRules {
		if r.class == c {
			return i, true
		}
	}
	return 0, false
}

// validateClass holds the policy to what its class demands.
func (p *BypassPolicy) validateClass(d *document) {
	rank, ok := p.Spec.Class.rank()
	if !ok {
		d.report("spec.class", faultf("write Routine, Sensitive or Critical", "class %q is not known", p.Spec.Class))
		return
	}
	rule := classRules[rank]
	demand := func(holds bool, field, hint, format string, args ...any) {
		if !holds {
			d.report(field, faultf(hint, "a "+string(rule.class)+" policy "+format, args...))
		}
	}
	approvals := 0
	for _, a := range p.Spec.Approvals {
		approvals += int(a.Min)
	}
	demand(p.Spec.MaxDuration.Duration <= rule.maxDuration, "spec.maxDuration", "write a shorter one, or another class",
		"allows at most %s", Duration{rule.maxDuration})
	demand(!rule.ticket || p.Spec.Ticket.Required, "spec.ticket", "write ticket: {required: true}", "requires a ticket")
	demand(approvals >= rule.approvals, "spec.approvals", "add who has to agree", "wants the approval of others, at least %d", rule.approvals)
}

// reach is the most ways in that one grant may open: the policy's, or else its class's.
func (p BypassPolicy) reach() uint32 {
	rank, _ := p.Spec.Class.rank()
	if p.Spec.MaxReach != 0 {
		return p.Spec.MaxReach
	}
	return classRules[rank].maxReach
}

// Reach is how far a grant goes: each of its clients may use each of its ports.
type Reach struct{ Clients, Ports int }

// Ways is how many ways in that are.
func (r Reach) Ways() uint64 { return uint64(r.Clients) * uint64(r.Ports) }

// String says it in words.
func (r Reach) String() string {
	return fmt.Sprintf("%d (%s to %s)", r.Ways(), count(r.Clients, "client"), count(r.Ports, "port"))
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// reach refuses a grant that opens more ways in than the policy allows at once.
func (c *grantCheck) reach(svc ProtectedService, g GrantFacts) {
	r := Reach{Clients: len(g.Addresses), Ports: len(portsOr(g.Ports, svc.Spec.Ports))}
	if most := c.policy.reach(); r.Ways() > uint64(most) {
		c.refuse("reach", "ask for fewer clients or ports, or for several grants",
			"%s are more ways in than the %d of policy %q", r, most, c.policy.Name)
	}
}
