package policy

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"
)

// What a path can be bound to. Each has to be named by the policy.
const (
	// BindingAddress serves whoever has one of the addresses that the grant lists: those that people name, or the one
	// that a workload asked from. An address proves nothing of who is behind it.
	BindingAddress = "address"
	// BindingTuple serves one connection, from a port of the client that a workload holds while it asks.
	BindingTuple = "tuple"
	// BindingWorkload serves the sockets of the control group, on this node, from which a workload asked.
	BindingWorkload = "workload"
)

var bindings = []string{BindingAddress, BindingTuple, BindingWorkload}

// MaxGrantDuration is the longest duration that any policy may allow.
const MaxGrantDuration = 24 * time.Hour

// BypassPolicy says who may ask for what bypass.
type BypassPolicy struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     BypassPolicySpec `json:"spec" yaml:"spec"`
	// Source is where it was read.
	Source Source `json:"-" yaml:"-"`
}

// BypassPolicySpec is what a BypassPolicy says.
// +kubebuilder:validation:XValidation:rule="self.bindings.exists(b, b != 'address') || has(self.nodeAddresses) && self.nodeAddresses || self.sources.all(s, !(isIP(s) && ip(s).isLoopback() || isCIDR(s) && cidr(s).ip().isLoopback()))",message="a loopback address needs nodeAddresses: true",fieldPath=".sources"
// +kubebuilder:validation:XValidation:rule="!has(self.class) || !(self.class in ['Sensitive', 'Critical']) || has(self.ticket) && has(self.ticket.required) && self.ticket.required",message="a Sensitive or Critical policy requires a ticket: write ticket: {required: true}",fieldPath=".ticket"
// +kubebuilder:validation:XValidation:rule="!has(self.class) || self.class != 'Sensitive' || duration(self.maxDuration) <= duration('4h')",message="a Sensitive policy allows at most 4h",fieldPath=".maxDuration"
// +kubebuilder:validation:XValidation:rule="!has(self.class) || self.class != 'Critical' || duration(self.maxDuration) <= duration('1h')",message="a Critical policy allows at most 1h",fieldPath=".maxDuration"
// +kubebuilder:validation:XValidation:rule="!has(self.class) || self.class != 'Sensitive' || (has(self.approvals) ? self.approvals.map(a, has(a.min) && a.min > 0 ? a.min : 1).sum() : 0) >= 1",message="a Sensitive policy wants the approval of others, at least 1",fieldPath=".approvals"
// +kubebuilder:validation:XValidation:rule="!has(self.class) || self.class != 'Critical' || (has(self.approvals) ? self.approvals.map(a, has(a.min) && a.min > 0 ? a.min : 1).sum() : 0) >= 2",message="a Critical policy wants the approval of others, at least 2",fieldPath=".approvals"
// +kubebuilder:validation:XValidation:rule="(has(self.approvals) ? self.approvals.map(a, has(a.min) && a.min > 0 ? a.min : 1).sum() : 0) <= 15",message="asks for more people than the 15 whose signatures a grant can have",fieldPath=".approvals"
// +kubebuilder:validation:XValidation:rule="!has(self.breakGlass) || !self.breakGlass || (has(self.approvals) ? self.approvals.map(a, has(a.min) && a.min > 0 ? a.min : 1).sum() : 0) >= 2",message="break-glass wants the approval of others, at least 2",fieldPath=".approvals"
// +kubebuilder:validation:XValidation:rule="!has(self.breakGlass) || !self.breakGlass || has(self.reviewers) && size(self.reviewers) > 0",message="a policy for break-glass needs reviewers",fieldPath=".reviewers"
// +kubebuilder:validation:XValidation:rule="!has(self.breakGlass) || !self.breakGlass || duration(self.maxDuration) <= duration('1h')",message="is over the cap of 1h for break-glass",fieldPath=".maxDuration"
type BypassPolicySpec struct {
	// Services are the protected services that a grant may name. Each must exist.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=128
	// +listType=set
	Services []Name `json:"services" yaml:"services"`
	// Bindings are what a path may be bound to: address, tuple, workload.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=3
	// +listType=set
	Bindings []Binding `json:"bindings" yaml:"bindings"`
	// Sources are the client addresses that a grant may name.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +listType=set
	// +kubebuilder:validation:items:XValidation:rule="!isCIDR(self) || cidr(self).prefixLength() > 0",message="means every address: list the networks that clients are in"
	// +kubebuilder:validation:items:XValidation:rule="!isIP(self) || ip(self).isLoopback() || ip(self).isGlobalUnicast()",message="is not the address of one host that can be routed"
	// +kubebuilder:validation:items:XValidation:rule="!isCIDR(self) || cidr(self).ip().isUnspecified() && cidr(self).prefixLength() < 32 || cidr(self).ip().isLoopback() || cidr(self).ip().isGlobalUnicast()",message="is not a network of single hosts that can be routed"
	Sources []AddressRange `json:"sources" yaml:"sources"`
	// NodeAddresses lets a grant that is bound to an address name one of the node's own, loopback included. Such a
	// path serves every process in the host namespace. The address must be in Sources as well.
	NodeAddresses bool `json:"nodeAddresses,omitempty" yaml:"nodeAddresses,omitempty"`
	// MaxDuration caps the duration of a grant. More than 0, at most 24h.
	// +kubebuilder:validation:XValidation:rule="duration(self) > duration('0s') && duration(self) <= duration('24h')",message="must be more than 0s and at most 24h: every grant ends"
	MaxDuration Duration `json:"maxDuration" yaml:"maxDuration"`
	// Class says how much care its grants get: Routine, also when it is not written, Sensitive or Critical.
	Class Class `json:"class,omitempty" yaml:"class,omitempty"`
	// MaxReach is how many ways in one grant may open: its clients times its ports. 0: what the class has.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=4294967295
	// +kubebuilder:validation:Format=int64
	MaxReach uint32 `json:"maxReach,omitempty" yaml:"maxReach,omitempty"`
	// Templates are those by which its grants must be asked for. None: a grant may do without.
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	Templates []Name `json:"templates,omitempty" yaml:"templates,omitempty"`
	// Ingress is the kind of device that clients must come by; a grant must name it. Empty is any.
	Ingress Ingress `json:"ingress,omitempty" yaml:"ingress,omitempty"`
	// MaxBudget caps what each path of a grant may carry. A grant must name every limit that is given here, and none above
	// it.
	// +optional
	MaxBudget Budget `json:"maxBudget,omitzero" yaml:"maxBudget,omitempty"`
	// Requesters are people of the keyrings, and groups as group:NAME, who may ask for a grant and sign it; and workloads,
	// as SPIFFE IDs, exact, or ending in /* for everything below, which ask the agent themselves.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +listType=set
	Requesters []Requester `json:"requesters" yaml:"requesters"`
	// Approvals must all be met by other people's signatures. None: the requester's is enough.
	// +kubebuilder:validation:MaxItems=15
	// +listType=atomic
	Approvals []Approval `json:"approvals,omitempty" yaml:"approvals,omitempty"`
	// BreakGlass makes it a policy for break-glass grants, and for no others.
	BreakGlass bool `json:"breakGlass,omitempty" yaml:"breakGlass,omitempty"`
	// Reviewers are people, and groups as group:NAME, who may say that a grant under this policy was looked at, if they had no
	// part in it. Empty: those who may approve. A policy for break-glass grants must name them.
	// +kubebuilder:validation:MaxItems=128
	// +listType=set
	Reviewers []PersonOrGroup `json:"reviewers,omitempty" yaml:"reviewers,omitempty"`
	// Ticket says what the grant's ticket has to be like.
	// +optional
	Ticket TicketRule `json:"ticket,omitzero" yaml:"ticket,omitempty"`
	// Windows are the times at which a grant may be activated; its paths end with the window. None: always.
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Windows []Window `json:"windows,omitempty" yaml:"windows,omitempty"`
	// When is a condition in CEL that a grant has to meet, beside all else. Empty: none.
	When Condition `json:"when,omitempty" yaml:"when,omitempty"`
	// NotAfter ends the policy and the paths under it, by the wall clock. Zero: it does not end.
	// +optional
	NotAfter time.Time `json:"notAfter,omitzero" yaml:"notAfter,omitempty"`
	// IdleTimeout ends a grant whose paths carried nothing for so long; a grant may ask for less. Zero: they may.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) == duration('0s') || duration(self) >= duration('5s') && duration(self) <= duration('24h')",message="must be 0s or from 5s to 24h"
	IdleTimeout Duration `json:"idleTimeout,omitzero" yaml:"idleTimeout,omitempty"`
	// WarnBefore are the times before a grant's end at which its end is warned of: 5m and 1m.
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	// +kubebuilder:validation:items:XValidation:rule="duration(self) > duration('0s') && duration(self) <= duration('24h')",message="must be more than 0s and at most 24h"
	WarnBefore []Duration `json:"warnBefore,omitempty" yaml:"warnBefore,omitempty"`
	// Signals are the sources that may take from its grants, and what. None: no source may.
	// +kubebuilder:validation:MaxItems=32
	// +listType=map
	// +listMapKey=source
	Signals []SignalRule `json:"signals,omitempty" yaml:"signals,omitempty"`
	// Tests are grants, and what the set must make of them: sallyport policy test.
	// +kubebuilder:validation:MaxItems=128
	// +listType=atomic
	Tests []GrantTest `json:"tests,omitempty" yaml:"tests,omitempty"`
}

// TicketRule is what a ticket has to be like.
type TicketRule struct {
	// Required refuses a grant without a ticket.
	Required bool `json:"required,omitempty" yaml:"required,omitempty"`
	// Pattern is a regular expression (RE2) that the whole of a ticket has to match. Empty: any will do.
	// +kubebuilder:validation:MaxLength=256
	// +kubebuilder:validation:XValidation:rule="'OPS-1'.matches('^(?:' + self + ')$') in [true, false]",message="is no regular expression: write one like OPS-[0-9]+"
	Pattern string `json:"pattern,omitempty" yaml:"pattern,omitempty"`
}

// matches reports whether a ticket that is there will do. The pattern must be valid.
func (r TicketRule) matches(ticket string) bool {
	p, err := r.compile()
	return err == nil && p.MatchString(ticket)
}

func (r TicketRule) compile() (*regexp.Regexp, error) {
	return regexp.Compile(`^(?:` + r.Pattern + `)$`)
}

func (p *BypassPolicy) validate(d *document) {
	d.report("metadata.name", CheckName(p.Name))
	d.checkList("spec.services", p.Spec.Services, "list the protected services that it is for")
	d.checkList("spec.requesters", p.Spec.Requesters, "list the people who may ask for its grants")
	p.validateApprovals(d)
	p.validateConditions(d)
	p.validateBreakGlass(d)
	p.validateOversight(d)
	d.checkList("spec.bindings", p.Spec.Bindings, "write bindings: [address], for an address alone proves nothing")
	for i, b := range p.Spec.Bindings {
		d.report(fmt.Sprintf("spec.bindings[%d]", i), CheckBinding(b))
	}
	p.validateSources(d)
	d.report("spec.ingress", CheckIngress(p.Spec.Ingress))
	d.report("spec.maxBudget", CheckBudget(p.Spec.MaxBudget))
	d.report("spec.maxDuration", checkMaxDuration(p.Spec.MaxDuration.Duration))
	if len(p.Spec.Templates) > 0 {
		d.checkList("spec.templates", p.Spec.Templates, "list the templates, or leave it out")
	}
	p.validateClass(d)
}

// CheckBinding refuses what a path cannot be bound to.
func CheckBinding(b string) error {
	if !slices.Contains(bindings, b) {
		return faultf("write one of: "+strings.Join(bindings, ", "), "binding %q is not known", cut(b))
	}
	return nil
}

func (p *BypassPolicy) validateConditions(d *document) {
	if _, err := p.Spec.Ticket.compile(); err != nil {
		d.report("spec.ticket.pattern", faultf("write a regular expression like OPS-[0-9]+", "is no regular expression: %v", err))
	}
	for i, w := range p.Spec.Windows {
		w.validate(d, fmt.Sprintf("spec.windows[%d]", i))
	}
	if p.Spec.When != "" {
		_, err := compileWhen(p.Spec.When)
		d.report("spec.when", err)
	}
	p.Spec.NotAfter = p.Spec.NotAfter.UTC()
	d.report("spec.notAfter", checkNotAfter(p.Spec.NotAfter))
	for i, t := range p.Spec.Tests {
		t.validate(d, fmt.Sprintf("spec.tests[%d]", i))
	}
}

// maxApprovals is the most signatures that a policy can ask for, the requester's aside: an envelope has no room for more.
const maxApprovals = 15

func (p *BypassPolicy) validateApprovals(d *document) {
	total := 0
	for i := range p.Spec.Approvals {
		a := &p.Spec.Approvals[i]
		field := fmt.Sprintf("spec.approvals[%d]", i)
		d.checkList(field+".from", a.From, "list the people and groups who may approve")
		if a.Min == 0 {
			a.Min = 1
		}
		total += int(a.Min)
	}
	if total > maxApprovals {
		d.report("spec.approvals", faultf("ask for fewer", "%d people are more than the %d whose signatures a grant can have", total, maxApprovals))
	}
}

func checkMaxDuration(v time.Duration) error {
	const hint = "write a duration such as 15m"
	switch {
	case v <= 0:
		return faultf(hint, "must be more than 0: every grant ends")
	case v > MaxGrantDuration:
		return faultf(hint, "%s is over the cap of %s", Duration{v}, Duration{MaxGrantDuration})
	}
	return nil
}

// checkList refuses an empty list, an empty entry and an entry given twice.
func (d *document) checkList(field string, list []string, hint string) {
	if len(list) == 0 {
		d.report(field, faultf(hint, "needs at least one entry"))
	}
	seen := map[string]int{}
	for i, s := range list {
		at := fmt.Sprintf("%s[%d]", field, i)
		if s == "" {
			d.report(at, faultf(hint, "is empty"))
		}
		if before, dup := first(seen, s, i); dup {
			d.report(at, faultf("remove one of them", "%q is already %s[%d]", s, field, before))
		}
	}
}

// ownsSockets tells whether a binding serves certain sockets, and not whoever has an address.
func ownsSockets(binding string) bool { return binding == BindingTuple || binding == BindingWorkload }

func (p *BypassPolicy) validateSources(d *document) {
	if len(p.Spec.Sources) == 0 {
		d.report("spec.sources", faultf("list the client addresses that a grant may name", "needs at least one entry"))
	}
	seen := map[netip.Prefix]int{}
	for i, r := range p.Spec.Sources {
		field := fmt.Sprintf("spec.sources[%d]", i)
		d.report(field, p.checkSource(r))
		if at, dup := first(seen, r.Prefix, i); dup {
			d.report(field, faultf("remove one of them", "%s is already spec.sources[%d]", r, at))
		}
	}
}

func (p *BypassPolicy) checkSource(r AddressRange) error {
	if !r.IsValid() {
		return nil // already reported by the decoder
	}
	if r.Bits() == 0 {
		return faultf("list the networks that clients are in", "%s means every address", r)
	}
	if r.IsSingleIP() || !r.Addr().IsUnspecified() {
		if err := CheckAddress(r.Addr()); err != nil {
			return err
		}
	}
	if r.Addr().IsLoopback() && !p.Spec.NodeAddresses && !slices.ContainsFunc(p.Spec.Bindings, ownsSockets) {
		return faultf("remove it, or write nodeAddresses: true", "%s is loopback, which only nodeAddresses: true allows", r)
	}
	return nil
}
