package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// CheckNode tells what of the set a node of that configuration could never do, as errors.Join of *Error: let anybody in at a service
// that has rules for identities that nobody there can prove, or show a certificate that it does not have.
func (s *Set) CheckNode(c AgentConfig) error {
	trusted := append([]string{c.Spec.TrustDomain}, c.Spec.FederatesWith...)
	var errs []error
	for _, svc := range s.Services() {
		report := func(field, hint, format string, args ...any) {
			errs = append(errs, &Error{File: svc.Source.File, Line: svc.Source.Line, Field: field, Msg: fmt.Sprintf(format, args...), Hint: hint})
		}
		if svc.Enforced() && svc.nobodyFrom(trusted) {
			report("spec.access", "name identities of one of them, or add the trust domain to spec.federatesWith of the node's configuration",
				"nobody can ever come in at %s: its rules name identities of other trust domains than this node knows (%s)", svc.Name, strings.Join(trusted, ", "))
		}
		field, name := svc.Spec.certificate()
		if name != "" && !slices.ContainsFunc(c.Spec.Proxy.Certificates, func(w WebCertificate) bool { return w.Name == name }) {
			report(field, "add it there, or name one that is", "spec.proxy.certificates of the node's configuration has no %q", name)
		}
	}
	return errors.Join(errs...)
}

// nobodyFrom says that the service has rules, and none for anybody of these trust domains or of a provider.
func (s ProtectedService) nobodyFrom(trusted []string) bool {
	for _, r := range s.Spec.Access {
		if len(r.Subjects)+len(r.Groups) > 0 {
			return false
		}
		for _, p := range r.Identities {
			id, err := spiffeid.FromString(strings.TrimSuffix(p, "/*"))
			if err == nil && slices.Contains(trusted, id.TrustDomain().Name()) {
				return false
			}
		}
	}
	return len(s.Spec.Access) > 0
}

// certificate is the web certificate that callers without an X.509-SVID see, and the field that names it.
func (s ProtectedServiceSpec) certificate() (field, name string) {
	switch {
	case s.HTTP != nil:
		return "spec.http.certificate", s.HTTP.Certificate
	case s.Tokens != nil:
		return "spec.tokens.certificate", s.Tokens.Certificate
	}
	return "", ""
}
