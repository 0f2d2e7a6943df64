package policy

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

var (
	methodPattern = regexp.MustCompile(`^[A-Z][-A-Z]{0,31}$`)
	headerPattern = regexp.MustCompile(`^[a-z0-9!#$%&'*+.^_|~-]{1,128}$`)
)

func (s *ProtectedService) validateAccess(d *document) {
	for i := range s.Spec.Access {
		r, field := &s.Spec.Access[i], fmt.Sprintf("spec.access[%d]", i)
		if len(r.Identities)+len(r.Subjects)+len(r.Groups) == 0 {
			d.report(field+".identities", faultf("list SPIFFE IDs, or remove the rule", "a rule without identities lets nobody in"))
		}
		s.validateNames(d, field, r)
		for j, w := range r.During {
			w.validate(d, fmt.Sprintf("%s.during[%d]", field, j))
		}
		for j, route := range r.Routes {
			route.validate(d, fmt.Sprintf("%s.routes[%d]", field, j), s.Spec.HTTP)
		}
		if len(r.Routes) > 0 && s.Spec.HTTP == nil {
			d.report(field+".routes", faultf("write http: {} at the service, or remove the routes", "only a service with http has requests"))
		}
		if r.When != "" {
			_, err := compileCondition(r.When, s.Spec.HTTP != nil)
			d.report(field+".when", err)
		}
		validateAccessSignals(d, field, r.Signals)
	}
}

// validateNames holds whom a rule names to what the service can prove.
func (s *ProtectedService) validateNames(d *document, field string, r *AccessRule) {
	for j, p := range r.Identities {
		d.report(fmt.Sprintf("%s.identities[%d]", field, j), checkPattern(p))
	}
	h := s.Spec.HTTP
	if h != nil && len(r.Identities) > 0 && !h.authenticates(AuthenticateSPIFFE) && !h.authenticates(AuthenticateJWT) {
		d.report(field+".identities", faultf("add spiffe or jwt to spec.http.authenticate, or remove them", "nobody proves a SPIFFE ID to this service"))
	}
	for _, list := range []struct {
		name    string
		entries []string
	}{{"subjects", r.Subjects}, {"groups", r.Groups}} {
		for j, entry := range list.entries {
			at := fmt.Sprintf("%s.%s[%d]", field, list.name, j)
			d.report(at, checkTokenName(entry, list.name == "subjects"))
			provider, _, _ := strings.Cut(entry, "/")
			switch {
			case h == nil && s.Spec.Tokens == nil:
				d.report(at, faultf("write http at the service, with authenticate: [oidc] and providers, or tokens with providers",
					"only a service with http or tokens takes tokens"))
			case !slices.Contains(s.Spec.Proofs().Providers, provider):
				d.report(at, faultf("add it there, or name one that is", "the provider %q is not in %s", cut(provider), s.Spec.providersField()))
			}
		}
	}
}

// checkTokenName tells why s does not name a subject or group of a provider, or gives nil.
func checkTokenName(s string, all bool) error {
	provider, name, ok := strings.Cut(s, "/")
	switch {
	case !ok || name == "":
		return faultf("write the name of an IdentityProvider, / and the name there, like corp/alice", "%q names nobody of a provider", cut(s))
	case all && name == "*":
	case strings.Contains(name, "*"):
		return faultf("write the whole name; corp/* means every subject of corp", "%q has a * that means nothing", cut(s))
	}
	if err := CheckName(provider); err != nil {
		return faultf("begin it with the name of an IdentityProvider, like corp/alice", "%q is not the name of a provider", cut(provider))
	}
	return checkOneLine(name)
}

func (r Route) validate(d *document, field string, h *HTTPSpec) {
	if len(r.Methods)+len(r.Paths)+len(r.Hosts)+len(r.Headers) == 0 {
		d.report(field, faultf("write methods, paths, hosts or headers, or remove all routes", "says nothing of a request"))
	}
	for i, m := range r.Methods {
		if !methodPattern.MatchString(m) || m == "CONNECT" {
			d.report(fmt.Sprintf("%s.methods[%d]", field, i), faultf("write one like GET, in capitals", "%q is no method that is passed on", cut(m)))
		}
	}
	for i, p := range r.Paths {
		d.report(fmt.Sprintf("%s.paths[%d]", field, i), checkRoutePath(p))
	}
	for i, host := range r.Hosts {
		at := fmt.Sprintf("%s.hosts[%d]", field, i)
		d.report(at, checkHost(host))
		if h != nil && len(h.Hosts) > 0 && !slices.Contains(h.Hosts, host) {
			d.report(at, faultf("add it there, or name one that is", "%q is not in spec.http.hosts", cut(host)))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Headers)) {
		d.report(field+".headers", checkHeader(name, r.Headers[name]))
	}
}

// checkRoutePath refuses a path that no request can have when it is judged.
func checkRoutePath(p string) error {
	base, below := strings.CutSuffix(p, "/*")
	if below {
		base += "/"
	}
	if strings.Contains(base, "*") {
		return faultf("end it in /* to mean everything below, like /public/*; a * of the path itself is written %2A", "%q has a * that is not a last segment of its own", cut(p))
	}
	canonical, err := CanonicalPath(base)
	if err != nil {
		return faultf("write it like /public/* or /health", "%v", err)
	}
	if canonical != base {
		if below {
			canonical = strings.TrimSuffix(canonical, "/") + "/*"
		}
		return faultf("write "+canonical, "%q is not as requests are judged", cut(p))
	}
	return nil
}

func checkHost(s string) error {
	if s != strings.ToLower(s) || !hostPattern.MatchString(s) && checkBareAddress(s) != nil {
		return faultf("write a name in lower case, or an address, without a port", "%q is not the name of a host", cut(s))
	}
	return nil
}

func checkBareAddress(s string) error {
	var r AddressRange
	if err := r.UnmarshalText([]byte(s)); err != nil || strings.Contains(s, "/") {
		return faultf("write an address", "%q is not an address", cut(s))
	}
	return nil
}

func checkHeader(name, value string) error {
	switch {
	case name != strings.ToLower(name) || !headerPattern.MatchString(name):
		return faultf("write it in lower case, like x-team", "%q is not the name of a header", cut(name))
	case name == "host":
		return faultf("use hosts", "host is no header to compare")
	case value != strings.TrimSpace(value) || checkOneLine(value) != nil:
		return faultf("write it as it is sent, without spaces at its ends", "the value of %s is none that a request can have", name)
	}
	return nil
}

func validateAccessSignals(d *document, field string, signals []AccessSignal) {
	seen := map[string]int{}
	for i, a := range signals {
		at := fmt.Sprintf("%s.signals[%d].source", field, i)
		d.report(at, CheckPersonName(a.Source))
		if IsBuiltInSignal(a.Source) {
			d.report(at, faultf("name a source of your own", "%s is about grants", a.Source))
		}
		if before, dup := first(seen, a.Source, i); dup {
			d.report(at, faultf("remove one of them", "%q is already %s.signals[%d]", a.Source, field, before))
		}
	}
}
