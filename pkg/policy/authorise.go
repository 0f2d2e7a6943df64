package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxNear bounds how many near misses a refusal names.
const maxNear = 3

// Decision is the answer to whether an identity may come through the proxy to a service.
type Decision struct {
	Allowed bool
	// Rule is the rule that allowed it: "access[0]: spiffe://example.org/ops/*".
	Rule string
	// Near explains a refusal: the rules that came nearest, or what is missing.
	Near []string
}

// Authorise decides whether a proven caller may come through the proxy to the service of that name, and of a service with
// http, whether with that request; r nil asks whether any request of the caller could be allowed. What a deny list names is
// refused, and what no rule allows. now is by the wall clock. It is the one evaluator, for proxy, check and explain.
func (s *Set) Authorise(service string, who Caller, r *Request, now time.Time) Decision {
	svc, ok := s.Service(service)
	if !ok {
		return Decision{Near: []string{fmt.Sprintf("no ProtectedService is named %q", service)}}
	}
	if who.String() == "" {
		return Decision{Near: []string{"no identity was proven"}}
	}
	if l, denied := s.deniedCaller(who, now); denied {
		return Decision{Near: []string{fmt.Sprintf("%s is denied by the list %q: %s", who, l.Name, l.Spec.Reason)}}
	}
	for i, rule := range svc.Spec.Access {
		if by, ok := rule.names(who); ok {
			return Decision{Allowed: true, Rule: fmt.Sprintf("access[%d]: %s", i, by)}
		}
	}
	return Decision{Near: nearMisses(svc, who.ID)}
}

// names says by which of its entries the rule is for a caller.
func (r AccessRule) names(who Caller) (by string, ok bool) {
	if !who.ID.IsZero() {
		id := who.ID.String()
		if i := slices.IndexFunc(r.Identities, func(p string) bool { return matches(p, id) }); i >= 0 {
			return r.Identities[i], true
		}
	}
	if who.Provider == "" {
		return "", false
	}
	if who.Subject != "" {
		subject := who.Provider + "/" + who.Subject
		if i := slices.IndexFunc(r.Subjects, func(p string) bool { return matches(p, subject) }); i >= 0 {
			return "subject " + r.Subjects[i], true
		}
	}
	for _, g := range who.Groups {
		if group := who.Provider + "/" + g; slices.Contains(r.Groups, group) {
			return "group " + group, true
		}
	}
	return "", false
}

// matches compares an identity with an exact SPIFFE ID, or with a prefix that ends in /*. The
// segment-safe prefix covers what is below it, not itself.
func matches(pattern, subject string) bool {
	prefix, below := strings.CutSuffix(pattern, "*")
	if !below {
		return pattern == subject
	}
	return len(subject) > len(prefix) && strings.HasPrefix(subject, prefix)
}

// nearMisses names the rules that share most with the identity.
func nearMisses(svc ProtectedService, id spiffeid.ID) []string {
	if len(svc.Spec.Access) == 0 {
		return []string{fmt.Sprintf("%s has no access rule: nobody may come through the proxy", svc.Name)}
	}
	type miss struct {
		text  string
		score int
	}
	var misses []miss
	for i, rule := range svc.Spec.Access {
		for _, pattern := range rule.Identities {
			score, why := compare(pattern, id)
			misses = append(misses, miss{fmt.Sprintf("access[%d]: %s: %s", i, pattern, why), score})
		}
	}
	slices.SortStableFunc(misses, func(a, b miss) int { return cmp.Compare(b.score, a.score) })
	out := make([]string, 0, maxNear)
	for _, m := range misses[:min(len(misses), maxNear)] {
		out = append(out, m.text)
	}
	return out
}

// compare scores how near an identity came to a pattern that does not match it, and says why not.
func compare(pattern string, id spiffeid.ID) (score int, why string) {
	base, below := strings.CutSuffix(pattern, "/*")
	want, err := spiffeid.FromString(base)
	if err != nil {
		return 0, "is not a SPIFFE ID"
	}
	if want.TrustDomain() != id.TrustDomain() {
		return 0, fmt.Sprintf("is of the trust domain %s, not %s", want.TrustDomain(), id.TrustDomain())
	}
	if want.Path() == id.Path() && below {
		return len(id.Path()) + 1, "covers what is below it, not itself"
	}
	wanted, given := segments(want.Path()), segments(id.Path())
	shared := 0
	for shared < len(wanted) && shared < len(given) && wanted[shared] == given[shared] {
		shared++
	}
	switch {
	case shared == len(wanted):
		return 1 + shared, fmt.Sprintf("ends before %q", given[shared])
	case shared == len(given):
		return 1 + shared, fmt.Sprintf("goes on with %q", wanted[shared])
	}
	return 1 + shared, fmt.Sprintf("has %q where the identity has %q", wanted[shared], given[shared])
}

func segments(path string) []string {
	if path == "" {
		return nil
	}
	return strings.Split(strings.TrimPrefix(path, "/"), "/")
}
