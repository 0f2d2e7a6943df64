package policy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// ErrTestFailed is in every error of Set.Test.
var ErrTestFailed = errors.New("policy does not do what its test expects")

// Expectation is what a test says of a grant.
// +kubebuilder:validation:Enum=Allow;Refuse
type Expectation string

// Expectations of a test.
const (
	ExpectAllow  Expectation = "Allow"
	ExpectRefuse Expectation = "Refuse"
)

// GrantTest is a grant, and what the whole set must make of it. It stands in the policy that it is about.
// +kubebuilder:validation:XValidation:rule="self.expect != 'Allow' || !has(self.field) || size(self.field) == 0",message="what is allowed is refused for nothing: expect Refuse, or remove it",fieldPath=".field"
type GrantTest struct {
	// Name says what is tested.
	// +kubebuilder:validation:MinLength=1
	Name Line `json:"name" yaml:"name"`
	// Expect is Allow or Refuse.
	Expect Expectation `json:"expect" yaml:"expect"`
	// Field must be among what is refused: duration, ticket, when. Empty: any will do.
	Field Line `json:"field,omitempty" yaml:"field,omitempty"`
	// Service and Requester are those of the grant; the requester has signed it, and so have the Approvers.
	// +optional
	Service Line `json:"service" yaml:"service"`
	// +optional
	Requester Text `json:"requester" yaml:"requester"`
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Approvers []Text `json:"approvers,omitempty" yaml:"approvers,omitempty"`
	// Addresses are its clients.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Addresses []netip.Addr `json:"addresses" yaml:"addresses"`
	// +kubebuilder:validation:MaxItems=1024
	// +listType=atomic
	Ports []uint16 `json:"ports,omitempty" yaml:"ports,omitempty"`
	// +optional
	Duration Duration `json:"duration" yaml:"duration"`
	// +optional
	Budget   Budget  `json:"budget,omitzero" yaml:"budget,omitempty"`
	Ingress  Ingress `json:"ingress,omitempty" yaml:"ingress,omitempty"`
	Ticket   Text    `json:"ticket,omitempty" yaml:"ticket,omitempty"`
	Template Line    `json:"template,omitempty" yaml:"template,omitempty"`
	// Reason is the name of the test where it is not written.
	Reason Text `json:"reason,omitempty" yaml:"reason,omitempty"`
	// Binding is what its paths are bound to: address.
	// +kubebuilder:validation:Enum="";address;tuple;workload
	Binding string `json:"binding,omitempty" yaml:"binding,omitempty"`
	// BreakGlass makes it a break-glass grant.
	BreakGlass bool `json:"breakGlass,omitempty" yaml:"breakGlass,omitempty"`
	// At is the time of activation. Zero: what depends on it is left out.
	// +optional
	At time.Time `json:"at,omitzero" yaml:"at,omitempty"`
}

func (t GrantTest) validate(d *document, field string) {
	if t.Name == "" {
		d.report(field+".name", faultf("say what it tests", "is missing"))
	}
	d.report(field+".name", checkOneLine(t.Name))
	if t.Binding != "" {
		d.report(field+".binding", CheckBinding(t.Binding))
	}
	switch {
	case t.Expect != ExpectAllow && t.Expect != ExpectRefuse:
		d.report(field+".expect", faultf("write Allow or Refuse", "%q is neither", t.Expect))
	case t.Expect == ExpectAllow && t.Field != "":
		d.report(field+".field", faultf("remove it, or expect Refuse", "what is allowed is refused for nothing"))
	}
}

// facts are those of a grant that says why, whose signatures were verified.
func (t GrantTest) facts() GrantFacts {
	every := []Use{UseRequest, UseApprove, UseBreakGlass}
	signers := []Signer{{Person: t.Requester, Uses: every}}
	for _, p := range t.Approvers {
		signers = append(signers, Signer{Person: p, Uses: every})
	}
	return GrantFacts{Service: t.Service, Ports: t.Ports, Addresses: t.Addresses, Duration: t.Duration.Duration, Budget: t.Budget, Ingress: t.Ingress, BreakGlass: t.BreakGlass,
		Binding: cmp.Or(t.Binding, BindingAddress), Ticket: t.Ticket, Reason: cmp.Or(t.Reason, t.Name), Template: t.Template, Requester: t.Requester, Signers: signers, Now: t.At}
}

// Tests is how many tests the set has.
func (s *Set) Tests() (n int) {
	for _, p := range s.BypassPolicies() {
		n += len(p.Spec.Tests)
	}
	for _, svc := range s.Services() {
		n += len(svc.Spec.Tests)
	}
	return n
}

// Test runs the tests of every service and policy against the whole set, and gives what does not come out as expected, as errors.Join of
// *Error with ErrTestFailed.
func (s *Set) Test() error {
	var errs []error
	fail := func(at Source, i int, name, why string) {
		if why != "" {
			errs = append(errs, &Error{File: at.File, Line: at.Line, Field: fmt.Sprintf("spec.tests[%d]", i),
				Msg: fmt.Sprintf("%s: %s", name, why), Hint: "correct the policy, or what the test expects of it", Err: ErrTestFailed})
		}
	}
	for _, svc := range s.Services() {
		for i, t := range svc.Spec.Tests {
			fail(svc.Source, i, t.Name, s.wrongAccess(svc.Name, t))
		}
	}
	for _, p := range s.BypassPolicies() {
		for i, t := range p.Spec.Tests {
			fail(p.Source, i, t.Name, s.wrong(t))
		}
	}
	return errors.Join(errs...)
}

// wrong says how a test does not come out, or nothing.
func (s *Set) wrong(t GrantTest) string {
	may, err := s.CheckGrant(t.facts())
	refusals := Errors(err)
	switch {
	case err == nil && t.Expect == ExpectRefuse:
		return fmt.Sprintf("policy %q allows it", may.Policy)
	case err != nil && t.Expect == ExpectAllow:
		return "it is refused: " + refusals[0].Field + ": " + refusals[0].Msg
	case err == nil || t.Field == "":
		return ""
	}
	for _, e := range refusals {
		if e.Field == t.Field || within(e.Field, t.Field) {
			return ""
		}
	}
	return fmt.Sprintf("it is refused for %s, not for %s", refusals[0].Field, t.Field)
}
