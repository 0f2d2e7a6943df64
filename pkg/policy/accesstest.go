package policy

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// AccessTest is a caller, of a service with http also a request, and what the whole set must make of it. It stands in the service that
// it is about.
// +kubebuilder:validation:XValidation:rule="(has(self.identity) && size(self.identity) > 0) != (has(self.subject) && size(self.subject) > 0)",message="write identity or subject, and not both",fieldPath=".identity"
// +kubebuilder:validation:XValidation:rule="!has(self.groups) || self.groups.all(g, has(self.subject) && g.startsWith(self.subject.split('/')[0] + '/'))",message="write groups of the subject's provider",fieldPath=".groups"
type AccessTest struct {
	// Name says what is tested.
	// +kubebuilder:validation:MinLength=1
	Name Line `json:"name" yaml:"name"`
	// Expect is Allow or Refuse.
	Expect Expectation `json:"expect" yaml:"expect"`
	// AccessQuestion is what is asked.
	AccessQuestion `json:",inline" yaml:",inline"`
}

// AccessQuestion is a caller and a request as people write them.
type AccessQuestion struct {
	// Identity is a SPIFFE ID. Empty: Subject is who comes.
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:Pattern=`^(spiffe://[a-z0-9._-]+(/([A-Za-z0-9_-]|\.[A-Za-z0-9_-]|\.\.[A-Za-z0-9._-])[A-Za-z0-9._-]*)*)?$`
	Identity string `json:"identity,omitempty" yaml:"identity,omitempty"`
	// Subject and Groups of a token, as rules write them: PROVIDER/SUBJECT and PROVIDER/GROUP.
	// +kubebuilder:validation:MaxLength=512
	// +kubebuilder:validation:Pattern=`^([a-z0-9]([-a-z0-9]{0,29}[a-z0-9])?/[\pL\pM\pN\pP\pS ]+)?$`
	// +kubebuilder:validation:XValidation:rule="!self.contains('*')",message="* is nobody's name"
	Subject string `json:"subject,omitempty" yaml:"subject,omitempty"`
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	Groups []TokenGroup `json:"groups,omitempty" yaml:"groups,omitempty"`
	// Claims of the token. A value is JSON, like true or [1,2], or else text.
	// +kubebuilder:validation:MaxProperties=64
	Claims map[string]Text `json:"claims,omitempty" yaml:"claims,omitempty"`
	// Proof is spiffe, jwt, oidc or local. Empty: oidc of a Subject, spiffe of an Identity.
	// +kubebuilder:validation:Enum="";spiffe;jwt;oidc;local
	Proof string `json:"proof,omitempty" yaml:"proof,omitempty"`
	// From is the caller's address.
	From *netip.Addr `json:"from,omitempty" yaml:"from,omitempty"`
	// At is the time by the wall clock. Zero: nobody knows it.
	// +optional
	At time.Time `json:"at,omitzero" yaml:"at,omitempty"`
	// Signals are sources, with ok or against: what they say about the caller.
	// +kubebuilder:validation:MaxProperties=32
	Signals map[string]SignalWord `json:"signals,omitempty" yaml:"signals,omitempty"`
	// Method and Path of the request: GET where there is a path. Neither: before there is a request.
	Method Line        `json:"method,omitempty" yaml:"method,omitempty"`
	Path   RequestPath `json:"path,omitempty" yaml:"path,omitempty"`
	// Host of the request: the first of the service's.
	Host Line `json:"host,omitempty" yaml:"host,omitempty"`
	// Headers of the request, by names in lower case.
	// +kubebuilder:validation:MaxProperties=32
	// +kubebuilder:validation:XValidation:rule="!('host' in self)",message="host is no header to compare: use hosts"
	Headers map[string]HeaderValue `json:"headers,omitempty" yaml:"headers,omitempty"`
}

func (t AccessTest) validate(d *document, field string, svc ProtectedServiceSpec) {
	if t.Name == "" {
		d.report(field+".name", faultf("say what it tests", "is missing"))
	}
	d.report(field+".name", checkOneLine(t.Name))
	if t.Expect != ExpectAllow && t.Expect != ExpectRefuse {
		d.report(field+".expect", faultf("write Allow or Refuse", "%q is neither", t.Expect))
	}
	if err := t.check(svc.HTTP != nil); err != nil {
		for _, e := range Errors(err) {
			d.report(join(field, e.Field), e)
		}
	}
}

// check tells what cannot be asked, as errors.Join of *Error.
func (q AccessQuestion) check(http bool) error {
	var errs []error
	report := func(field string, err error) {
		if e, ok := errors.AsType[*Error](err); ok {
			errs = append(errs, &Error{Field: field, Msg: e.Msg, Hint: e.Hint})
		}
	}
	switch {
	case (q.Identity == "") == (q.Subject == ""):
		report("identity", faultf("write identity or subject, and not both", "nobody, or two, would come"))
	case q.Identity != "":
		if _, err := spiffeid.FromString(q.Identity); err != nil {
			report("identity", faultf("write it like spiffe://example.org/app/web", "%q is not a SPIFFE ID: %v", cut(q.Identity), err))
		}
	default:
		report("subject", checkTokenName(q.Subject, false))
	}
	provider, _, _ := strings.Cut(q.Subject, "/")
	for _, g := range q.Groups {
		report("groups", checkTokenName(g, false))
		if !strings.HasPrefix(g, provider+"/") {
			report("groups", faultf("write groups of the subject's provider", "%q is not of the provider %q", cut(g), provider))
		}
	}
	if q.Proof != "" && !slices.Contains([]string{ProofSPIFFE, ProofJWT, ProofOIDC, ProofLocal}, q.Proof) {
		report("proof", faultf("write spiffe, jwt, oidc or local", "%q proves nobody", cut(q.Proof)))
	}
	for source, says := range q.Signals {
		if says != "ok" && says != "against" {
			report("signals", faultf("write ok or against", "%s says %q", cut(source), cut(says)))
		}
	}
	q.checkRequest(http, report)
	return errors.Join(errs...)
}

func (q AccessQuestion) checkRequest(http bool, report func(string, error)) {
	if q.Method+q.Host+q.Path == "" && len(q.Headers) == 0 {
		return
	}
	if !http {
		report("path", faultf("ask without a request", "the service has no http: nobody looks at requests"))
		return
	}
	canonical, err := CanonicalPath(q.Path)
	switch {
	case err != nil:
		report("path", faultf("write it like /orders/7; no such request is passed on", "%v", err))
	case canonical != q.Path:
		report("path", faultf("write "+canonical, "%q is not as requests are judged", cut(q.Path)))
	}
	for _, name := range slices.Sorted(maps.Keys(q.Headers)) {
		report("headers", checkHeader(name, q.Headers[name]))
	}
}

// Ask is Authorise for a question as people write it, and of a remote service AuthoriseCaller.
func (s *Set) Ask(service string, q AccessQuestion) (Decision, error) {
	if _, remote := s.RemoteService(service); remote {
		if err := q.check(false); err != nil {
			return Decision{}, err
		}
		return s.AuthoriseCaller(service, q.caller(), q.At), nil
	}
	svc, ok := s.Service(service)
	if !ok {
		return Decision{}, &Error{Field: "service", Msg: fmt.Sprintf("no ProtectedService is named %q", cut(service)), Hint: suggest(service, s.serviceNames())}
	}
	if err := q.check(svc.Spec.HTTP != nil); err != nil {
		return Decision{}, err
	}
	return s.Heeding(q.signals(s)).Authorise(service, q.caller(), q.request(svc), q.At), nil
}

func (s *Set) serviceNames() map[string]bool {
	names := map[string]bool{}
	for _, svc := range s.Services() {
		names[svc.Name] = true
	}
	for _, r := range s.RemoteServices() {
		names[r.Name] = true
	}
	return names
}

func (q AccessQuestion) caller() Caller {
	who := Caller{Proof: q.Proof, Claims: map[string]any{}}
	if q.From != nil {
		who.Address = *q.From
	}
	if q.Identity != "" {
		who.ID = spiffeid.RequireFromString(q.Identity) // it was checked
	}
	who.Provider, who.Subject, _ = strings.Cut(q.Subject, "/")
	for _, g := range q.Groups {
		who.Groups = append(who.Groups, strings.TrimPrefix(g, who.Provider+"/"))
	}
	for name, text := range q.Claims {
		var value any
		if json.Unmarshal([]byte(text), &value) != nil {
			value = text
		}
		who.Claims[name] = value
	}
	return who
}

func (q AccessQuestion) request(svc ProtectedService) *Request {
	if q.Path == "" {
		return nil
	}
	r := &Request{Method: cmp.Or(q.Method, "GET"), Host: q.Host, Path: q.Path, Headers: map[string][]string{}}
	if hosts := svc.Spec.HTTP.Hosts; r.Host == "" && len(hosts) > 0 {
		r.Host = hosts[0]
	}
	for name, value := range q.Headers {
		r.Headers[name] = []string{value}
	}
	return r
}

// signals are said by whoever may speak for the source.
func (q AccessQuestion) signals(s *Set) *Signals {
	var all []Said
	for _, svc := range s.Services() {
		for _, r := range svc.Spec.Access {
			for _, a := range r.Signals {
				says, ok := q.Signals[a.Source]
				if !ok {
					continue
				}
				for _, uid := range append([]uint32{0}, a.UIDs...) {
					all = append(all, Said{Source: a.Source, UID: uid, Against: says == "against", Until: q.At.Add(time.Minute), Reason: "says the question"})
				}
			}
		}
	}
	return NewSignals(all)
}

// wrongAccess says how a test does not come out, or nothing.
func (s *Set) wrongAccess(service string, t AccessTest) string {
	d, err := s.Ask(service, t.AccessQuestion)
	switch {
	case err != nil:
		return err.Error()
	case d.Allowed && t.Expect == ExpectRefuse:
		return d.Rule + " allows it"
	case !d.Allowed && t.Expect == ExpectAllow:
		return "it is refused: " + strings.Join(d.Near, "; ")
	}
	return ""
}
