package policy

import (
	"fmt"
	"slices"
	"time"
)

// What a signal may do to a grant.
const (
	SignalShorten = "Shorten" // let it end sooner
	SignalLower   = "Lower"   // its budget
	SignalRevoke  = "Revoke"  // or refuse it
)

// Signals that agents give themselves.
const (
	SignalFirstSeen  = "firstSeen"  // a client that had no grant for the service on the node
	SignalOutOfHours = "outOfHours" // an activation outside of hours
	SignalBreadth    = "breadth"    // clients times ports times minutes are many
	SignalFrequency  = "frequency"  // a person's grants on the node within 7 days are many
	SignalNearBudget = "nearBudget" // a path has used so many per cent of a limit
)

var builtInSignals = []string{SignalFirstSeen, SignalOutOfHours, SignalBreadth, SignalFrequency, SignalNearBudget}

// IsBuiltInSignal tells the names of signals that agents give themselves, which nobody else may use.
func IsBuiltInSignal(source string) bool { return slices.Contains(builtInSignals, source) }

// SignalRule names a source of signals and what it may take from the grants of a policy. No signal gives anything.
// +kubebuilder:validation:XValidation:rule="self.source in ['firstSeen', 'outOfHours', 'breadth', 'frequency', 'nearBudget'] || has(self.may) && size(self.may) > 0",message="write what it may do: Shorten, Lower, Revoke",fieldPath=".may"
// +kubebuilder:validation:XValidation:rule="self.source in ['firstSeen', 'outOfHours', 'breadth', 'frequency', 'nearBudget'] || !has(self.required) || !self.required || has(self.may) && 'Revoke' in self.may",message="a required source revokes by its silence: add Revoke to may",fieldPath=".required"
// +kubebuilder:validation:XValidation:rule="self.source in ['firstSeen', 'outOfHours', 'breadth', 'frequency', 'nearBudget'] || (!has(self.shortenTo) || duration(self.shortenTo) == duration('0s')) && (!has(self.revoke) || !self.revoke) && (!has(self.above) || self.above == 0) && (!has(self.hours) || size(self.hours) == 0)",message="shortenTo, revoke, above and hours are for what is built in",fieldPath=".source"
// +kubebuilder:validation:XValidation:rule="!(self.source in ['firstSeen', 'outOfHours', 'breadth', 'frequency', 'nearBudget']) || (!has(self.uids) || size(self.uids) == 0) && (!has(self.may) || size(self.may) == 0) && (!has(self.required) || !self.required)",message="is built in: it has no uids, may or required",fieldPath=".source"
// +kubebuilder:validation:XValidation:rule="!(self.source in ['firstSeen', 'breadth', 'frequency', 'nearBudget']) || !has(self.hours) || size(self.hours) == 0",message="hours are for outOfHours",fieldPath=".hours"
// +kubebuilder:validation:XValidation:rule="self.source != 'outOfHours' || has(self.hours) && size(self.hours) > 0",message="outOfHours needs hours",fieldPath=".hours"
// +kubebuilder:validation:XValidation:rule="self.source != 'nearBudget' || !has(self.above) || self.above <= 100",message="more than 100 % of a budget cannot be used",fieldPath=".above"
type SignalRule struct {
	// Source is a name, or one of firstSeen, outOfHours, breadth, frequency and nearBudget.
	// +kubebuilder:validation:MinLength=1
	Source PersonName `json:"source" yaml:"source"`
	// UIDs are the users who may speak for it on the agent's socket: root alone. Not of what is built in.
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	UIDs []uint32 `json:"uids,omitempty" yaml:"uids,omitempty"`
	// May is what it may do: Shorten, Lower, Revoke. Not of what is built in.
	// +kubebuilder:validation:MaxItems=3
	// +listType=set
	May []SignalEffect `json:"may,omitempty" yaml:"may,omitempty"`
	// Required revokes grants about which the source says nothing. It needs Revoke. Not of what is built in.
	Required bool `json:"required,omitempty" yaml:"required,omitempty"`
	// ShortenTo lets the paths end so long after the signal at the latest. Only of what is built in.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('0s') && duration(self) <= duration('24h')",message="must be from 0s to 24h"
	ShortenTo Duration `json:"shortenTo,omitzero" yaml:"shortenTo,omitempty"`
	// Revoke refuses the grant, or revokes it. Only of what is built in.
	Revoke bool `json:"revoke,omitempty" yaml:"revoke,omitempty"`
	// Above is what breadth, frequency and nearBudget count as much: 10000, 5, and 80 per cent.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000000000000
	Above uint64 `json:"above,omitempty" yaml:"above,omitempty"`
	// Hours are the times outside of which outOfHours speaks.
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	Hours []Window `json:"hours,omitempty" yaml:"hours,omitempty"`
}

// Believes tells whether the rule is for what the user said for the source.
func (r SignalRule) Believes(source string, uid uint32) bool {
	switch {
	case r.Source != source:
		return false
	case IsBuiltInSignal(source):
		return true
	case len(r.UIDs) == 0:
		return uid == 0
	}
	return slices.Contains(r.UIDs, uid)
}

// MayDo tells whether the source may do so. What is built in does what its rule says.
func (r SignalRule) MayDo(what string) bool {
	return IsBuiltInSignal(r.Source) || slices.Contains(r.May, what)
}

// OutOfHours tells whether now is outside of the hours. The rule must be valid.
func (r SignalRule) OutOfHours(now time.Time) bool {
	return !slices.ContainsFunc(r.Hours, func(w Window) bool {
		_, within := w.until(now)
		return within
	})
}

// Hears tells whether a source may take from the policy's grants, when the user speaks for it.
func (p BypassPolicy) Hears(source string, uid uint32) bool {
	return slices.ContainsFunc(p.Spec.Signals, func(r SignalRule) bool { return r.Believes(source, uid) })
}

func (p *BypassPolicy) validateSignals(d *document) {
	seen := map[string]int{}
	for i, r := range p.Spec.Signals {
		field := fmt.Sprintf("spec.signals[%d]", i)
		d.report(field+".source", CheckPersonName(r.Source))
		if at, dup := first(seen, r.Source, i); dup {
			d.report(field+".source", faultf("remove one of them", "%q is already spec.signals[%d]", r.Source, at))
		}
		if IsBuiltInSignal(r.Source) {
			r.validateBuiltIn(d, field)
		} else {
			r.validateSource(d, field)
		}
	}
}

func (r SignalRule) validateSource(d *document, field string) {
	d.checkList(field+".may", r.May, "write what it may do: Shorten, Lower, Revoke")
	for i, what := range r.May {
		if !slices.Contains([]string{SignalShorten, SignalLower, SignalRevoke}, what) {
			d.report(fmt.Sprintf("%s.may[%d]", field, i), faultf("write Shorten, Lower or Revoke", "%q is nothing that a signal may do", cut(what)))
		}
	}
	if r.Required && !slices.Contains(r.May, SignalRevoke) {
		d.report(field+".required", faultf("add Revoke to may", "a required source revokes by its silence"))
	}
	if r.ShortenTo.Duration != 0 || r.Revoke || r.Above != 0 || len(r.Hours) > 0 {
		d.report(field+".source", faultf("known are firstSeen, outOfHours, breadth, frequency, nearBudget",
			"shortenTo, revoke, above and hours are for what is built in, and %q is not", cut(r.Source)))
	}
}

func (r SignalRule) validateBuiltIn(d *document, field string) {
	if len(r.UIDs) > 0 || len(r.May) > 0 || r.Required {
		d.report(field+".source", faultf("say what it does by shortenTo or revoke", "%s is built in: it has no uids, may or required", r.Source))
	}
	if v := r.ShortenTo.Duration; v < 0 || v > MaxGrantDuration {
		d.report(field+".shortenTo", faultf("write a duration such as 5m", "%s is not between 0 and %s", r.ShortenTo, Duration{MaxGrantDuration}))
	}
	if (r.Source == SignalOutOfHours) != (len(r.Hours) > 0) {
		d.report(field+".hours", faultf("write the hours of outOfHours, and of nothing else", "hours are for outOfHours, which needs them"))
	}
	for i, w := range r.Hours {
		w.validate(d, fmt.Sprintf("%s.hours[%d]", field, i))
	}
	if r.Source == SignalNearBudget && r.Above > 100 {
		d.report(field+".above", faultf("write per cent", "%d %% of a budget cannot be used", r.Above))
	}
}
