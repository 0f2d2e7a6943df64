package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
)

// DenyList names what is allowed nothing, whatever else allows it: neither the proxy's services nor grants, nor the paths
// of grants that are active.
type DenyList struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     DenyListSpec `json:"spec" yaml:"spec"`
	// Source is where it was read.
	Source Source `json:"-" yaml:"-"`
}

// DenyListSpec is what a DenyList says. Each entry denies by itself.
// +kubebuilder:validation:XValidation:rule="has(self.identities) && size(self.identities) > 0 || has(self.subjects) && size(self.subjects) > 0 || has(self.people) && size(self.people) > 0 || has(self.services) && size(self.services) > 0 || has(self.addresses) && size(self.addresses) > 0 || has(self.grants) && size(self.grants) > 0",message="denies nothing: list identities, subjects, people, services, addresses or grants"
type DenyListSpec struct {
	// Reason is told to whoever is refused.
	// +kubebuilder:validation:MinLength=1
	Reason Line `json:"reason" yaml:"reason"`
	// NotAfter ends the list, by the wall clock. Zero: it does not end.
	// +optional
	NotAfter time.Time `json:"notAfter,omitzero" yaml:"notAfter,omitempty"`
	// Identities are SPIFFE IDs, exact, or ending in /* for everything below, that the proxy lets in nowhere, and that may
	// not ask for grants.
	// +kubebuilder:validation:MaxItems=1024
	// +listType=atomic
	Identities []IdentityPattern `json:"identities,omitempty" yaml:"identities,omitempty"`
	// Subjects are those of tokens, PROVIDER/SUBJECT or PROVIDER/*, that the proxy lets in nowhere.
	// +kubebuilder:validation:MaxItems=1024
	// +listType=atomic
	Subjects []Text `json:"subjects,omitempty" yaml:"subjects,omitempty"`
	// People may neither ask for grants nor approve them. They need not be in a keyring.
	// +kubebuilder:validation:MaxItems=1024
	// +listType=atomic
	People []PersonName `json:"people,omitempty" yaml:"people,omitempty"`
	// Services get no grants.
	// +kubebuilder:validation:MaxItems=1024
	// +listType=atomic
	Services []Text `json:"services,omitempty" yaml:"services,omitempty"`
	// Addresses may be no client's of a grant.
	// +kubebuilder:validation:MaxItems=1024
	// +listType=atomic
	Addresses []AddressRange `json:"addresses,omitempty" yaml:"addresses,omitempty"`
	// Grants are ids.
	// +kubebuilder:validation:MaxItems=1024
	// +listType=atomic
	Grants []GrantID `json:"grants,omitempty" yaml:"grants,omitempty"`
}

func (l *DenyList) validate(d *document) {
	d.report("metadata.name", CheckName(l.Name))
	if l.Spec.Reason == "" {
		d.report("spec.reason", faultf("say why, for those who are refused", "is missing"))
	}
	d.report("spec.reason", checkOneLine(l.Spec.Reason))
	l.Spec.NotAfter = l.Spec.NotAfter.UTC()
	d.report("spec.notAfter", checkNotAfter(l.Spec.NotAfter))
	if l.entries() == 0 {
		d.report("spec", faultf("list identities, subjects, people, services, addresses or grants", "denies nothing"))
	}
	for i, id := range l.Spec.Identities {
		d.report(fmt.Sprintf("spec.identities[%d]", i), checkPattern(id))
	}
	for i, name := range l.Spec.People {
		d.report(fmt.Sprintf("spec.people[%d]", i), CheckPersonName(name))
	}
	for i, id := range l.Spec.Grants {
		if _, err := ulid.ParseStrict(id); err != nil {
			d.report(fmt.Sprintf("spec.grants[%d]", i), faultf("`sallyport grants` lists them", "%q is not the id of a grant", cut(id)))
		}
	}
}

func (l *DenyList) entries() int {
	s := l.Spec
	return len(s.Identities) + len(s.Subjects) + len(s.People) + len(s.Services) + len(s.Addresses) + len(s.Grants)
}

// holds tells whether the list counts at now. At a time that nobody knows every list does.
func (l DenyList) holds(now time.Time) bool {
	return now.IsZero() || l.Spec.NotAfter.IsZero() || now.Before(l.Spec.NotAfter)
}

// hasAddress reports whether the list has the address.
func (l DenyList) hasAddress(a netip.Addr) bool {
	return slices.ContainsFunc(l.Spec.Addresses, func(r AddressRange) bool { return r.Contains(a) })
}

// hasIdentity reports whether the list has the SPIFFE ID.
func (l DenyList) hasIdentity(id string) bool {
	return slices.ContainsFunc(l.Spec.Identities, func(p string) bool { return matches(p, id) })
}

// hasCaller reports whether the list has a caller, under any of its names.
func (l DenyList) hasCaller(who Caller) bool {
	if !who.ID.IsZero() && l.hasIdentity(who.ID.String()) {
		return true
	}
	subject := who.Provider + "/" + who.Subject
	return who.Provider != "" && slices.ContainsFunc(l.Spec.Subjects, func(p string) bool { return matches(p, subject) })
}

// deniedCaller is the list that keeps a caller out of everything.
func (s *Set) deniedCaller(who Caller, now time.Time) (DenyList, bool) {
	for _, l := range s.denials {
		if l.holds(now) && l.hasCaller(who) {
			return l, true
		}
	}
	return DenyList{}, false
}

// DeniedPerson is the list that has a person at now, if there is one.
func (s *Set) DeniedPerson(name string, now time.Time) (DenyList, bool) {
	for _, l := range s.DenyLists() {
		if l.holds(now) && slices.Contains(l.Spec.People, name) {
			return l, true
		}
	}
	return DenyList{}, false
}

// denied lists what deny lists have against a grant.
func (s *Set) denied(g GrantFacts) (errs []*Error) {
	for _, l := range s.denials {
		if !l.holds(g.Now) {
			continue
		}
		deny := func(field, what string) {
			errs = append(errs, &Error{File: l.Source.File, Line: l.Source.Line, Field: field,
				Msg: fmt.Sprintf("%s is denied by the list %q: %s", what, l.Name, l.Spec.Reason), Hint: "ask whoever keeps that list", Err: ErrRefused})
		}
		if slices.Contains(l.Spec.Grants, g.ID) {
			deny("id", "the grant "+g.ID)
		}
		if slices.Contains(l.Spec.Services, g.Service) {
			deny("service", "a way around "+g.Service)
		}
		if slices.Contains(l.Spec.People, g.Requester) || l.hasIdentity(g.Requester) {
			deny("requester", g.Requester)
		}
		for _, signer := range g.Signers {
			if signer.Person != g.Requester && slices.Contains(l.Spec.People, signer.Person) {
				deny("signatures", signer.Person)
			}
		}
		for i, a := range g.Addresses {
			if l.hasAddress(a) {
				deny(fmt.Sprintf("addresses[%d]", i), a.String())
			}
		}
	}
	return errs
}
