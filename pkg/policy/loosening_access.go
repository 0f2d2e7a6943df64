package policy

import (
	"fmt"
	"slices"
	"strings"
)

// entry is one name that an access rule lets in, with the conditions of its rule. It does not matter which rule lets somebody in.
type entry struct {
	Names AccessRule `yaml:",inline"` // one name in all, and the conditions
}

// entries are those of all rules.
func entries(rules []AccessRule) (all []entry) {
	for _, r := range rules {
		conditions := r
		conditions.Identities, conditions.Subjects, conditions.Groups = nil, nil, nil
		add := func(set func(*AccessRule, []string), names []string) {
			for _, name := range names {
				e := entry{conditions}
				set(&e.Names, []string{name})
				all = append(all, e)
			}
		}
		add(func(r *AccessRule, n []string) { r.Identities = n }, r.Identities)
		add(func(r *AccessRule, n []string) { r.Subjects = n }, r.Subjects)
		add(func(r *AccessRule, n []string) { r.Groups = n }, r.Groups)
	}
	return all
}

// String is the name, and the conditions if there are any.
func (e entry) String() string {
	r := e.Names
	name := strings.Join(slices.Concat(r.Identities, r.Subjects, r.Groups), "")
	r.Identities, r.Subjects, r.Groups = nil, nil, nil
	if same(r, AccessRule{}) {
		return name
	}
	return fmt.Sprintf("%s (%s)", name, strings.Join(strings.Fields(string(written(r))), " "))
}

// covers says that whoever comes in by the other entry comes in by this one, too. In doubt it does not.
func (e entry) covers(of entry) bool {
	a, b := e.Names, of.Names
	switch {
	case len(beyond(a.Identities, b.Identities, coversPattern))+len(beyond(a.Subjects, b.Subjects, coversPattern))+len(beyond(a.Groups, b.Groups, equal)) > 0:
		return false
	case !oneCovers(a.From, b.From, AddressRange.covers), !oneCovers(a.During, b.During, func(a, b Window) bool { return same(a, b) }):
		return false
	case !oneCovers(a.Routes, b.Routes, Route.covers), a.When != "" && a.When != b.When:
		return false
	}
	return len(beyond(b.Signals, a.Signals, AccessSignal.asStrict)) == 0
}

// oneCovers compares lists of which one has to hold, and of which an empty one asks for nothing.
func oneCovers[T any](a, b []T, covers func(a, b T) bool) bool {
	return len(a) == 0 || len(b) > 0 && len(beyond(a, b, covers)) == 0
}

// covers says that each request of the other route is one of this, too.
func (r Route) covers(of Route) bool {
	for name, value := range r.Headers {
		if v, ok := of.Headers[name]; !ok || v != value {
			return false
		}
	}
	return oneCovers(r.Methods, of.Methods, equal) && oneCovers(r.Hosts, of.Hosts, equal) && oneCovers(r.Paths, of.Paths, coversPath)
}

// coversPath compares two paths of routes. An exact one covers itself alone: /a/ is one of /a/*.
func coversPath(a, b string) bool {
	return a == b || strings.HasSuffix(a, "*") && pathMatches(a, strings.TrimSuffix(b, "*"))
}

// asStrict says that a signal rule takes whatever the other one takes. Who may speak for a source can end what it requires, or begin it.
func (a AccessSignal) asStrict(as AccessSignal) bool {
	return a.Source == as.Source && same(a.UIDs, as.UIDs) && (a.Required || !as.Required)
}

// http compares what the proxy makes of requests.
func (c *comparison) http(old *HTTPSpec, next **HTTPSpec) {
	if old == nil || *next == nil {
		became(c, Looser, "spec.http", old, next)
		return
	}
	is := **next
	grows(c, "spec.http.authenticate", old.Authenticate, &is.Authenticate, equal)
	grows(c, "spec.http.audiences", old.Audiences, &is.Audiences, equal)
	grows(c, "spec.http.providers", old.Providers, &is.Providers, equal)
	settle(c, "spec.http.login", old.Login, &is.Login, is.Login != "" && is.Login != old.Login)
	oneOf(c, "spec.http.hosts", old.Hosts, &is.Hosts, equal)
	settle(c, "spec.http.upstream.tls", old.Upstream.TLS, &is.Upstream.TLS, old.Upstream.TLS != nil && !same(old.Upstream.TLS, is.Upstream.TLS))
	became(c, Neither, "spec.http.upstream.h2c", old.Upstream.H2C, &is.Upstream.H2C)
	c.httpLimits(old.Limits, &is.Limits)
	rest(c, "spec.http", *old, is)
	*next = old
}

func (c *comparison) httpLimits(old HTTPLimits, next *HTTPLimits) {
	const field = "spec.http.limits."
	settle(c, field+"headerBytes", old.HeaderBytes, &next.HeaderBytes, next.HeaderBytes > old.HeaderBytes)
	settle(c, field+"bodyBytes", old.BodyBytes, &next.BodyBytes, raised(uint64(old.BodyBytes), uint64(next.BodyBytes)))
	settle(c, field+"headerTimeout", old.HeaderTimeout, &next.HeaderTimeout, next.HeaderTimeout.Duration > old.HeaderTimeout.Duration)
	settle(c, field+"bodyTimeout", old.BodyTimeout, &next.BodyTimeout, next.BodyTimeout.Duration > old.BodyTimeout.Duration)
	settle(c, field+"bodyRate", old.BodyRate, &next.BodyRate, next.BodyRate < old.BodyRate)
	settle(c, field+"streams", old.Streams, &next.Streams, next.Streams > old.Streams)
	settle(c, field+"requestsPerMinute", old.RequestsPerMinute, &next.RequestsPerMinute, raised(uint64(old.RequestsPerMinute), uint64(next.RequestsPerMinute)))
}

func (c *comparison) provider(old, next IdentityProviderSpec) {
	grows(c, "spec.audiences", old.Audiences, &next.Audiences, equal)
	grows(c, "spec.algorithms", old.Algorithms, &next.Algorithms, equal)
	grows(c, "spec.endpoints", old.Endpoints, &next.Endpoints, equal)
	settle(c, "spec.skew", old.Skew, &next.Skew, next.Skew.Duration > old.Skew.Duration)
	settle(c, "spec.keep", old.Keep, &next.Keep, next.Keep.Duration > old.Keep.Duration)
	switch {
	case old.Login == nil:
		settle(c, "spec.login", old.Login, &next.Login, next.Login != nil)
	case next.Login == nil:
		settle(c, "spec.login", old.Login, &next.Login, false)
	default:
		is := *next.Login
		settle(c, "spec.login.session", old.Login.Session, &is.Session, is.Session.Duration > old.Login.Session.Duration)
		settle(c, "spec.login.idle", old.Login.Idle, &is.Idle, is.Idle.Duration > old.Login.Idle.Duration)
		rest(c, "spec.login", *old.Login, is)
		next.Login = old.Login
	}
	rest(c, "spec", old, next)
}
