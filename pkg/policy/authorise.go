package policy

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
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
	if why := svc.refuses(who, r); why != "" {
		return Decision{Near: []string{why}}
	}
	a := asked{set: s, svc: svc, who: who, request: r, now: now}
	var failed []miss
	for i, rule := range svc.Spec.Access {
		by, ok := rule.names(who)
		if !ok {
			continue
		}
		text := fmt.Sprintf("access[%d]: %s", i, by)
		why, score := a.against(rule, s.rules[service][i])
		if why == "" {
			return Decision{Allowed: true, Rule: text}
		}
		failed = append(failed, miss{text + ": " + why, named + score})
	}
	return Decision{Near: nearMisses(svc, who, failed)}
}

// refuses says why a service takes no such caller or request, whatever its rules say; empty: it does.
func (s ProtectedService) refuses(who Caller, r *Request) string {
	h, proofs, proof := s.Spec.HTTP, s.Spec.Proofs(), who.proof()
	how := proof
	if proof == ProofLocal { // proven by the same authority as an SVID
		how = AuthenticateSPIFFE
	}
	switch {
	case (proof == ProofOIDC) == (who.Provider == "") || (proof == ProofOIDC) == !who.ID.IsZero():
		return fmt.Sprintf("a caller that was proven by %s has not such names", proof)
	case h == nil && s.Spec.Tokens == nil && how != AuthenticateSPIFFE:
		return fmt.Sprintf("%s has neither http nor tokens, and takes no tokens", s.Name)
	case !proofs.Take(how):
		return fmt.Sprintf("%s takes %s, and the caller was proven by %s", s.Name, strings.Join(proofs.Authenticate, ", "), proof)
	case proof == ProofOIDC && !slices.Contains(proofs.Providers, who.Provider):
		return fmt.Sprintf("%s takes no tokens of %s", s.Name, who.Provider)
	case h != nil && r != nil && len(h.Hosts) > 0 && !slices.Contains(h.Hosts, r.Host):
		return fmt.Sprintf("%s is not served as %q", s.Name, cut(r.Host))
	}
	return ""
}

// asked is one question to the rules of a service.
type asked struct {
	set     *Set
	svc     ProtectedService
	who     Caller
	request *Request // nil: of none yet
	now     time.Time
}

// against says what keeps a rule that names the caller from holding, and how many of its conditions held before; empty: nothing.
func (a asked) against(rule AccessRule, c condition) (why string, held int) {
	for i, part := range []func(AccessRule) string{a.from, a.during, a.routes, a.signals} {
		if why := part(rule); why != "" {
			return why, i
		}
	}
	if c.now && a.now.IsZero() {
		return "when: nobody knows the time", 4
	}
	if err := c.holds(a.who, a.request, a.now); err != nil {
		return "when: " + err.Error(), 4
	}
	return "", 5
}

func (a asked) from(rule AccessRule) string {
	client := plainAddress(a.who.Address)
	if len(rule.From) == 0 || slices.ContainsFunc(rule.From, func(r AddressRange) bool { return r.Contains(client) }) {
		return ""
	}
	if !client.IsValid() {
		return "from: nobody knows the caller's address"
	}
	return fmt.Sprintf("from: %s is in none of %s", client, inWords(rule.From))
}

func (a asked) during(rule AccessRule) string {
	if len(rule.During) == 0 {
		return ""
	}
	if a.now.IsZero() {
		return "during: nobody knows the time"
	}
	for _, w := range rule.During {
		if _, in := w.until(a.now); in {
			return ""
		}
	}
	return fmt.Sprintf("during: %s is in none of %s", a.now.UTC().Format(time.RFC3339), inWords(rule.During))
}

func (a asked) routes(rule AccessRule) string {
	if len(rule.Routes) == 0 || a.svc.Spec.HTTP == nil || a.request == nil {
		return ""
	}
	best, depth := "", -1
	for i, route := range rule.Routes {
		why, held := route.against(a.request)
		if why == "" {
			return ""
		}
		if held > depth {
			best, depth = fmt.Sprintf("routes[%d]: %s", i, why), held
		}
	}
	return best
}

func (a asked) signals(rule AccessRule) string {
	for _, signal := range rule.Signals {
		if why := signal.objection(a.set.signals, a.svc.Name, a.who, a.now); why != "" {
			return "signals: " + why
		}
	}
	return ""
}

// against says why a route is not for a request, and how much of it was; empty: it is.
func (r Route) against(q *Request) (why string, held int) {
	switch {
	case len(r.Paths) > 0 && !slices.ContainsFunc(r.Paths, func(p string) bool { return pathMatches(p, q.Path) }):
		return fmt.Sprintf("path %q is none of %s", cut(q.Path), strings.Join(r.Paths, ", ")), 0
	case len(r.Hosts) > 0 && !slices.Contains(r.Hosts, q.Host):
		return fmt.Sprintf("host %q is none of %s", cut(q.Host), strings.Join(r.Hosts, ", ")), 1
	case len(r.Methods) > 0 && !slices.Contains(r.Methods, q.Method):
		return fmt.Sprintf("method %q is none of %s", cut(q.Method), strings.Join(r.Methods, ", ")), 2
	}
	for _, name := range slices.Sorted(maps.Keys(r.Headers)) {
		if got := q.Headers[name]; len(got) != 1 || got[0] != r.Headers[name] {
			return fmt.Sprintf("header %s is not %q once", name, r.Headers[name]), 3
		}
	}
	return "", 4
}

// pathMatches compares a canonical path with one of a rule. /a/* has /a/ and what is below it, and not /a.
func pathMatches(pattern, path string) bool {
	prefix, below := strings.CutSuffix(pattern, "*")
	if !below {
		return pattern == path
	}
	return strings.HasPrefix(path, prefix)
}

// plainAddress is an address in the one form that ranges have.
func plainAddress(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

func inWords[T fmt.Stringer](list []T) string {
	texts := make([]string, 0, len(list))
	for _, v := range list {
		texts = append(texts, v.String())
	}
	return strings.Join(texts, "; ")
}

// names says by which of its entries the rule is for a caller.
func (r AccessRule) names(who Caller) (by string, ok bool) {
	if !who.ID.IsZero() {
		id := who.ID.String()
		if i := slices.IndexFunc(r.Identities, func(p string) bool { return matches(p, id) }); i >= 0 {
			return r.Identities[i], true
		}
	}
	if who.Provider == "" || who.Subject == "" {
		return "", false
	}
	subject := who.Provider + "/" + who.Subject
	if i := slices.IndexFunc(r.Subjects, func(p string) bool { return matches(p, subject) }); i >= 0 {
		return "subject " + r.Subjects[i], true
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

// miss is a rule that did not let a caller in, with why, and how near it came.
type miss struct {
	text  string
	score int
}

// named is more than what any rule scores that does not name the caller.
const named = 1 << 20

// nearMisses names the rules that share most with the caller, after those that name it and do not hold.
func nearMisses(svc ProtectedService, who Caller, misses []miss) []string {
	if len(svc.Spec.Access) == 0 {
		return []string{fmt.Sprintf("%s has no access rule: nobody may come through the proxy", svc.Name)}
	}
	for i, rule := range svc.Spec.Access {
		if _, named := rule.names(who); named {
			continue
		}
		for _, m := range rule.unlike(who) {
			misses = append(misses, miss{fmt.Sprintf("access[%d]: %s", i, m.text), m.score})
		}
	}
	return nearest(misses)
}

// nearest gives the first of the misses in words.
func nearest(misses []miss) []string {
	slices.SortStableFunc(misses, func(a, b miss) int { return cmp.Compare(b.score, a.score) })
	out := make([]string, 0, maxNear)
	for _, m := range misses[:min(len(misses), maxNear)] {
		out = append(out, m.text)
	}
	return out
}

// unlike says of each entry of a rule why it is not the caller's.
func (r AccessRule) unlike(who Caller) (misses []miss) {
	for _, pattern := range r.Identities {
		score, why := 0, "is a SPIFFE ID, and the caller came with a token of "+who.Provider
		if !who.ID.IsZero() {
			score, why = compare(pattern, who.ID)
		}
		misses = append(misses, miss{pattern + ": " + why, score})
	}
	for _, entry := range slices.Concat(r.Subjects, r.Groups) {
		provider, _, _ := strings.Cut(entry, "/")
		switch {
		case who.Provider == "":
			misses = append(misses, miss{entry + ": is of a token, and the caller came with a SPIFFE ID", 0})
		case provider != who.Provider:
			misses = append(misses, miss{fmt.Sprintf("%s: is of the provider %s, not %s", entry, provider, who.Provider), 0})
		default:
			misses = append(misses, miss{fmt.Sprintf("%s: is not %s, nor a group of it", entry, who), 1})
		}
	}
	return misses
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
