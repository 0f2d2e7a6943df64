package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// CheckNode tells what of the set a node of that configuration could never do, as errors.Join of *Error: let anybody in at a service
// that has rules for identities that nobody there can prove, show a certificate that it does not have, or let anybody ask a remote service
// because of what this one says. What that node alone lacks is told by Closed.
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
	for _, r := range s.RemoteServices() {
		if why, hint := r.nobodyAt(trusted); why != "" {
			errs = append(errs, &Error{File: r.Source.File, Line: r.Source.Line, Field: "spec.callers", Msg: why, Hint: hint})
		}
	}
	return errors.Join(errs...)
}

// Closed tells why a node of that configuration refuses everybody who asks the remote service, though other nodes with the same set may
// serve it; nil: it does not.
func (r RemoteService) Closed(c AgentConfig) *Error {
	if api := c.Spec.Workloads.API; api != WorkloadsNone && api != "" {
		return nil
	}
	return &Error{File: r.Source.File, Line: r.Source.Line, Field: "spec.callers", Hint: "write spec.workloads of the node's configuration",
		Msg: fmt.Sprintf("%s is closed on this node: nobody tells it the identities of its workloads (spec.workloads.api: none)", r.Name)}
}

// nobodyAt says why nobody could ever be served by the remote service at a node that knows these trust domains, and what to do.
func (r RemoteService) nobodyAt(trusted []string) (why, hint string) {
	own := trusted[:1]
	switch {
	case !anyFrom(r.Spec.Callers, own):
		return fmt.Sprintf("%s can serve nobody: its callers are of other trust domains than this node's workloads (%s)", r.Name, own[0]),
			"name callers of that trust domain"
	case !anyFrom(r.Spec.Identities, trusted):
		return fmt.Sprintf("nobody can ever answer for %s: its identities are of other trust domains than this node knows (%s)", r.Name, strings.Join(trusted, ", ")),
			"name identities of one of them, or add the trust domain to spec.federatesWith of the node's configuration"
	}
	return "", ""
}

// anyFrom says whether one of the patterns is of one of these trust domains.
func anyFrom(patterns, trusted []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		id, err := spiffeid.FromString(strings.TrimSuffix(p, "/*"))
		return err == nil && slices.Contains(trusted, id.TrustDomain().Name())
	})
}

// nobodyFrom says that the service has rules, and none for anybody of these trust domains or of a provider.
func (s ProtectedService) nobodyFrom(trusted []string) bool {
	for _, r := range s.Spec.Access {
		if len(r.Subjects)+len(r.Groups) > 0 {
			return false
		}
		if anyFrom(r.Identities, trusted) {
			return false
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
