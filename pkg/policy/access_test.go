package policy_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// web is an HTTP service with every field, and a provider of its tokens.
const web = head + `ProtectedService
metadata: {name: web}
spec:
  target: Host
  ports: [8080]
  http:
    authenticate: [spiffe, jwt, oidc]
    audiences: ["https://web.example.org"]
    providers: [corp]
    login: corp
    certificate: web
    hosts: [web.example.org, "fd00::1"]
    upstream: {tls: {serverName: backend.example.org}}
    limits: {headerBytes: 16KiB, bodyBytes: 1MiB, headerTimeout: 5s, bodyTimeout: 10s, bodyRate: 1KiB, streams: 50, requestsPerMinute: 600}
  access:
    - identities: ["spiffe://example.org/app/web"]
      routes:
        - {methods: [GET, HEAD], paths: [/public/*, /health]}
        - {methods: [POST], paths: [/orders], hosts: [web.example.org], headers: {x-team: blue}}
    - groups: [corp/admins]
      from: ["10.1.0.0/24", "fd00:1::/64"]
      during: [{days: [Mon], from: "08:00", to: "18:00"}]
      when: 'claims.mfa == true && path.startsWith("/admin/")'
      signals: [{source: posture, required: true}, {source: incident, uids: [7]}]
    - subjects: ["corp/alice", "corp/ops/bob"]
---
` + head + `IdentityProvider
metadata: {name: corp}
spec:
  issuer: https://login.example.org
  audiences: ["https://web.example.org"]
  login: {clientID: sallyport, clientSecretFile: /etc/sallyport/corp.secret, scopes: [email], session: 4h, idle: 30m}
`

// with is the set with one text changed for another.
func with(t testing.TB, from, to string) *policy.Set {
	t.Helper()
	if !strings.Contains(web, from) {
		t.Fatalf("the set does not have %q", from)
	}
	return mustParse(t, strings.Replace(web, from, to, 1))
}

func workload(id string) policy.Caller {
	return policy.Caller{ID: spiffeid.RequireFromString(id), Proof: policy.ProofSPIFFE, Address: netip.MustParseAddr("10.1.0.2")}
}

func person(subject string, groups ...string) policy.Caller {
	return policy.Caller{Provider: "corp", Subject: subject, Groups: groups, Proof: policy.ProofOIDC, Address: netip.MustParseAddr("10.1.0.2"),
		Claims: map[string]any{"mfa": true}}
}

func get(path string) *policy.Request {
	return &policy.Request{Method: "GET", Host: "web.example.org", Path: path}
}

const appWeb = "spiffe://example.org/app/web"

// TestAuthoriseRequests: what each condition of a rule refuses, and why.
func TestAuthoriseRequests(t *testing.T) {
	monday := at(t, "2026-11-23T09:00:00Z")
	order := &policy.Request{Method: "POST", Host: "web.example.org", Path: "/orders", Headers: map[string][]string{"x-team": {"blue"}}}
	changed := func(f func(*policy.Request)) *policy.Request {
		r := *order
		f(&r)
		return &r
	}
	admin := person("carol", "staff", "admins")
	but := func(f func(*policy.Caller)) policy.Caller {
		c := admin
		f(&c)
		return c
	}
	said := []policy.Said{{Source: "posture", Until: monday.Add(time.Hour)}}
	for _, c := range []struct {
		name    string
		who     policy.Caller
		request *policy.Request
		now     time.Time
		rule    string // empty: refused
		near    string // what comes first
	}{
		{"path below", workload(appWeb), get("/public/a/b"), monday, "access[0]: " + appWeb, ""},
		{"path itself with slash", workload(appWeb), get("/public/"), monday, "access[0]", ""},
		{"path itself", workload(appWeb), get("/public"), monday, "", `access[0]: ` + appWeb + `: routes[0]: path "/public" is none of /public/*, /health`},
		{"path that begins alike", workload(appWeb), get("/publicity"), monday, "", "is none of"},
		{"exact path", workload(appWeb), get("/health"), monday, "access[0]", ""},
		{"below an exact path", workload(appWeb), get("/health/x"), monday, "", "is none of"},
		{"method", workload(appWeb), &policy.Request{Method: "DELETE", Host: "web.example.org", Path: "/health"}, monday, "", `routes[0]: method "DELETE" is none of GET, HEAD`},
		{"order", workload(appWeb), order, monday, "access[0]", ""},
		{"order elsewhere", workload(appWeb), changed(func(r *policy.Request) { r.Host = "fd00::1" }), monday, "", `routes[1]: host "fd00::1"`},
		{"order without header", workload(appWeb), changed(func(r *policy.Request) { r.Headers = nil }), monday, "", "routes[1]: header x-team is not"},
		{"order with a header twice", workload(appWeb), changed(func(r *policy.Request) { r.Headers = map[string][]string{"x-team": {"blue", "blue"}} }), monday, "", "routes[1]: header x-team is not"},
		{"unknown host", workload(appWeb), changed(func(r *policy.Request) { r.Host = "evil.example.org" }), monday, "", "not served as"},
		{"no request yet", workload(appWeb), nil, monday, "access[0]", ""},
		{"no request of anybody else", workload("spiffe://example.org/app/x"), nil, monday, "", `has "web" where the identity has "x"`},
		{"same name by a JWT-SVID", policy.Caller{ID: spiffeid.RequireFromString(appWeb), Proof: policy.ProofJWT}, get("/health"), monday, "access[0]", ""},
		{"same name by its socket", policy.Caller{ID: spiffeid.RequireFromString(appWeb), Proof: policy.ProofLocal}, get("/health"), monday, "access[0]", ""},

		{"group", admin, get("/admin/x"), monday, "access[1]: group corp/admins", ""},
		{"other group", person("carol", "staff"), get("/admin/x"), monday, "", "corp/admins: is not corp/carol, nor a group of it"},
		{"group of another provider", but(func(c *policy.Caller) { c.Provider = "other" }), get("/admin/x"), monday, "", "takes no tokens of other"},
		{"elsewhere", but(func(c *policy.Caller) { c.Address = netip.MustParseAddr("10.2.0.1") }), get("/admin/x"), monday, "", "from: 10.2.0.1 is in none of 10.1.0.0/24; fd00:1::/64"},
		{"from a mapped address", but(func(c *policy.Caller) { c.Address = netip.MustParseAddr("::ffff:10.1.0.9") }), get("/admin/x"), monday, "access[1]", ""},
		{"from nowhere", but(func(c *policy.Caller) { c.Address = netip.Addr{} }), get("/admin/x"), monday, "", "from: nobody knows"},
		{"too late", admin, get("/admin/x"), monday.Add(9 * time.Hour), "", "during: 2026-11-23T18:00:00Z is in none of 08:00 to 18:00 UTC on Mon"},
		{"at no time", admin, get("/admin/x"), time.Time{}, "", "during: nobody knows the time"},
		{"not as the condition wants", admin, get("/public/x"), monday, "", "when: it is not met"},
		{"condition that may be met", admin, nil, monday, "access[1]", ""},
		{"condition that cannot be met", but(func(c *policy.Caller) { c.Claims = map[string]any{"mfa": false} }), nil, monday, "", "when: it is not met"},
		{"condition on what is not there", but(func(c *policy.Caller) { c.Claims = nil }), get("/admin/x"), monday, "", "when: it cannot be worked out"},

		{"subject", person("alice"), get("/anything"), monday, "access[2]: subject corp/alice", ""},
		{"subject with a slash", person("ops/bob"), get("/anything"), monday, "access[2]: subject corp/ops/bob", ""},
		{"part of a subject", person("ops"), get("/anything"), monday, "", "is not corp/ops"},
		{"subject of nobody", person(""), get("/anything"), monday, "", "no identity was proven"},
		{"subject without its proof", policy.Caller{Provider: "corp", Subject: "alice", Proof: policy.ProofSPIFFE}, get("/x"), monday, "", "has not such names"},
		{"token with a SPIFFE ID", policy.Caller{ID: spiffeid.RequireFromString(appWeb), Proof: policy.ProofOIDC, Provider: "corp", Subject: "alice"}, get("/health"), monday, "", "has not such names"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := mustParse(t, web).Heeding(policy.NewSignals(said)).Authorise("web", c.who, c.request, c.now)
			if d.Allowed != (c.rule != "") || !strings.HasPrefix(d.Rule, c.rule) {
				t.Errorf("got %+v, want rule %q", d, c.rule)
			}
			if !d.Allowed && !strings.Contains(d.Near[0], c.near) {
				t.Errorf("near misses are %q, want %q first", d.Near, c.near)
			}
		})
	}
}

// TestProofs: a service takes no caller that was proven in another way than it asks for.
func TestProofs(t *testing.T) {
	now := at(t, "2026-11-23T09:00:00Z")
	callers := map[string]policy.Caller{
		policy.ProofSPIFFE: workload(appWeb), policy.ProofJWT: {ID: spiffeid.RequireFromString(appWeb), Proof: policy.ProofJWT},
		policy.ProofLocal: {ID: spiffeid.RequireFromString(appWeb), Proof: policy.ProofLocal}, policy.ProofOIDC: person("alice"),
	}
	all := "    authenticate: [spiffe, jwt, oidc]\n    audiences: [\"https://web.example.org\"]\n    providers: [corp]\n    login: corp\n"
	people := "    - subjects: [\"corp/alice\", \"corp/ops/bob\"]\n"
	admins := web[strings.Index(web, "    - groups"):strings.Index(web, "    - subjects")]
	for spec, takes := range map[string][]string{
		"    authenticate: [spiffe]\n": {policy.ProofSPIFFE, policy.ProofLocal},
		"":                             {policy.ProofSPIFFE, policy.ProofLocal},
		"    authenticate: [jwt]\n    audiences: [a]\n": {policy.ProofJWT},
		all: {policy.ProofSPIFFE, policy.ProofJWT, policy.ProofLocal, policy.ProofOIDC},
	} {
		text := web
		if spec != all {
			text = strings.NewReplacer(all, spec, people, "", admins, "").Replace(web)
		}
		set := mustParse(t, text)
		for proof, who := range callers {
			if d := set.Authorise("web", who, get("/health"), now); d.Allowed != slices.Contains(takes, proof) {
				t.Errorf("%q and a caller proven by %s: %+v", spec, proof, d)
			}
		}
	}
	plain := mustParse(t, good)
	for proof, who := range callers {
		if d := plain.Authorise("postgres", who, nil, now); d.Allowed != (proof == policy.ProofSPIFFE || proof == policy.ProofLocal) {
			t.Errorf("a service without http and a caller proven by %s: %+v", proof, d)
		}
	}
}

// TestDeniedSubject: no rule helps whom a deny list names, by whichever of the names.
func TestDeniedSubject(t *testing.T) {
	now := at(t, "2026-11-23T09:00:00Z")
	for entries, allowed := range map[string]bool{
		"subjects: [corp/alice]": false, "subjects: [\"corp/*\"]": false, "subjects: [corp/alic]": true, "subjects: [other/alice]": true,
		"subjects: [corp/alice], notAfter: 2026-11-23T09:00:00Z": true,
	} {
		set := mustParse(t, web+"---\n"+head+"DenyList\nmetadata: {name: incident}\nspec: {reason: stolen laptop, "+entries+"}\n")
		d := set.Authorise("web", person("alice"), get("/x"), now)
		if d.Allowed != allowed || !allowed && !strings.Contains(d.Near[0], "stolen laptop") {
			t.Errorf("%s: %+v", entries, d)
		}
	}
}

// TestAccessSignals: a source speaks against callers, or is silent about them, and never for them.
func TestAccessSignals(t *testing.T) {
	now := at(t, "2026-11-23T09:00:00Z")
	later := now.Add(time.Hour)
	well := policy.Said{Source: "posture", Until: later}
	against := func(f func(*policy.Said)) policy.Said {
		s := policy.Said{Source: "incident", UID: 7, Against: true, Until: later, Reason: "laptop stolen"}
		f(&s)
		return s
	}
	as := func(*policy.Said) {}
	for name, c := range map[string]struct {
		said    []policy.Said
		allowed bool
	}{
		"nothing":              {nil, false},
		"all is well":          {[]policy.Said{well}, true},
		"long ago":             {[]policy.Said{{Source: "posture", Until: now}}, false},
		"of another":           {[]policy.Said{{Source: "posture", Until: later, Caller: "corp/bob"}}, false},
		"of another service":   {[]policy.Said{{Source: "posture", Until: later, Service: "db"}}, false},
		"of the caller":        {[]policy.Said{{Source: "posture", Until: later, Caller: "corp/carol", Service: "web", Clients: netip.MustParsePrefix("10.1.0.0/16")}}, true},
		"of other addresses":   {[]policy.Said{{Source: "posture", Until: later, Clients: netip.MustParsePrefix("10.2.0.0/16")}}, false},
		"by somebody else":     {[]policy.Said{{Source: "posture", UID: 1, Until: later}}, false},
		"of no such source":    {[]policy.Said{{Source: "posters", Until: later}}, false},
		"against":              {[]policy.Said{well, against(as)}, false},
		"against everybody":    {[]policy.Said{{Source: "posture", Until: later, Against: true}}, false},
		"against, not yet":     {[]policy.Said{well, against(func(s *policy.Said) { s.From = now.Add(time.Minute) })}, true},
		"against, from now on": {[]policy.Said{well, against(func(s *policy.Said) { s.From = now })}, false},
		"against, no longer":   {[]policy.Said{well, against(func(s *policy.Said) { s.Until = now })}, true},
		"against by root":      {[]policy.Said{well, against(func(s *policy.Said) { s.UID = 0 })}, true}, // who may not speak for it
		"against another":      {[]policy.Said{well, against(func(s *policy.Said) { s.Caller = "corp/bob" })}, true},
	} {
		data, err := policy.WriteSignals(c.said)
		if err != nil {
			t.Fatal(err)
		}
		signals, err := policy.ParseSignals(data)
		if err != nil {
			t.Fatal(err)
		}
		d := mustParse(t, web).Heeding(signals).Authorise("web", person("carol", "admins"), get("/admin/x"), now)
		if d.Allowed != c.allowed || !d.Allowed && !strings.Contains(d.Near[0], "signals: ") {
			t.Errorf("%s: %+v", name, d)
		}
	}
	if d := mustParse(t, web).Authorise("web", person("carol", "admins"), get("/admin/x"), now); d.Allowed {
		t.Error("a required source was never heard of, and the rule holds")
	}
	if d := mustParse(t, web).Authorise("web", person("alice"), get("/admin/x"), now); !d.Allowed {
		t.Errorf("a rule without signals asks for one: %+v", d)
	}
	for _, bad := range []string{"", "{", `{"a":1}`, `[{"clients":"10.0.0.0/33"}]`, `[{"uid":-1}]`} {
		if _, err := policy.ParseSignals([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

// TestSignalsOnlyTake: whatever is said, nobody comes in who would not come in without any rule about signals.
func TestSignalsOnlyTake(t *testing.T) {
	now := at(t, "2026-11-23T09:00:00Z")
	r := rand.New(rand.NewPCG(5, 6))
	deaf := with(t, "      signals: [{source: posture, required: true}, {source: incident, uids: [7]}]\n", "")
	set, let := mustParse(t, web), 0
	for range 1500 {
		var said []policy.Said
		for range r.IntN(4) {
			said = append(said, policy.Said{Source: pick(r, "posture", "incident", "x", ""), UID: pick(r, uint32(0), 7), Caller: pick(r, "", "", "corp/carol", appWeb),
				Service: pick(r, "", "web", "db"), Against: r.IntN(3) == 0, From: pick(r, time.Time{}, now.Add(time.Minute)), Until: pick(r, now, now.Add(time.Hour))})
		}
		set := set.Heeding(policy.NewSignals(said))
		for _, who := range []policy.Caller{workload(appWeb), person("carol", "admins"), person("dave", "staff"), workload("spiffe://example.org/x")} {
			for _, path := range []string{"/admin/x", "/health"} {
				d := set.Authorise("web", who, get(path), now)
				if d.Allowed && !deaf.Authorise("web", who, get(path), now).Allowed {
					t.Fatalf("%s is let in by %+v", who, said)
				}
				if d.Allowed && who.Subject == "carol" {
					let++
				}
			}
		}
	}
	if let < 20 {
		t.Errorf("let in %d times only: that shows little", let)
	}
}

// TestNextChange: between two times of it, nothing changes by the time alone.
func TestNextChange(t *testing.T) {
	for _, c := range []struct{ spec, now, next string }{
		{`during: [{from: "08:00", to: "18:00"}]`, "2026-11-23T07:00:00Z", "2026-11-23T08:00:00Z"},
		{`during: [{from: "08:00", to: "18:00"}]`, "2026-11-23T08:00:00Z", "2026-11-23T18:00:00Z"},
		{`during: [{from: "22:00", to: "06:00"}]`, "2026-11-23T05:00:00Z", "2026-11-23T06:00:00Z"},
		{`during: [{days: [Sun], from: "22:00", to: "06:00"}]`, "2026-11-23T06:00:00Z", "2026-11-29T22:00:00Z"},
		{`during: [{days: [Mon], from: "08:00", to: "09:00"}]`, "2026-11-23T09:00:00Z", "2026-11-30T08:00:00Z"},
		{`during: [{from: "02:30", to: "04:00", timezone: Europe/Berlin}]`, "2026-03-28T23:30:00Z", "2026-03-29T01:30:00Z"}, // the hour that is not there
		{`when: 'now < timestamp("2027-01-01T00:00:00Z")'`, "2026-11-23T07:00:00Z", "2026-11-23T07:01:00Z"},
		{`when: 'subject == "x"'`, "2026-11-23T07:00:00Z", ""},
		{`from: [10.1.0.2]`, "2026-11-23T07:00:00Z", ""},
	} {
		set := with(t, web[strings.Index(web, "      from: ["):strings.Index(web, "    - subjects")], "      "+c.spec+"\n")
		if got := set.NextChange(at(t, c.now)); c.next == "" && !got.IsZero() || c.next != "" && !got.Equal(at(t, c.next)) {
			t.Errorf("%s at %s: %s, want %s", c.spec, c.now, got, c.next)
		}
	}
	now := at(t, "2026-11-23T09:00:00Z")
	set := denying(t, "people: [bob], notAfter: 2026-11-23T09:30:00Z")
	if got := set.NextChange(now); !got.Equal(now.Add(30 * time.Minute)) {
		t.Errorf("a deny list ends: %s", got)
	}
	set = set.Heeding(policy.NewSignals([]policy.Said{{Source: "a", From: now.Add(time.Minute), Until: now.Add(time.Hour)}, {Source: "b", Until: now.Add(2 * time.Minute)}}))
	for _, after := range []time.Duration{time.Minute, 2 * time.Minute, 30 * time.Minute, time.Hour} {
		next := set.NextChange(now)
		if want := at(t, "2026-11-23T09:00:00Z").Add(after); !next.Equal(want) {
			t.Errorf("after %s: %s, want %s", now, next, want)
		}
		now = next
	}
	if got := set.NextChange(now); !got.IsZero() {
		t.Errorf("when all is over: %s", got)
	}
	if got := (*policy.Set)(nil).NextChange(now); !got.IsZero() {
		t.Errorf("of no set: %s", got)
	}
}

// TestNothingChangesBetween tries windows at random: while NextChange has not come, the answer is the same.
func TestNothingChangesBetween(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	begin := at(t, "2026-03-26T00:00:00Z")
	changes := 0
	for range 60 {
		from, to := r.IntN(24), r.IntN(24)
		if from == to {
			continue
		}
		window := fmt.Sprintf(`{days: [%s], from: "%02d:30", to: "%02d:30", timezone: %s}`, pick(r, "Mon", "Sat, Sun", "Tue, Wed"), from, to, pick(r, "Europe/Berlin", "America/New_York", "UTC"))
		set := mustParse(t, strings.Replace(good, `spiffe://example.org/ops/*"]`, `spiffe://example.org/ops/*"]`+"\n      during: ["+window+"]", 1))
		now := begin.Add(time.Duration(r.IntN(7*24*60)) * time.Minute)
		answer := func(t time.Time) bool {
			return set.Authorise("postgres", policy.Caller{ID: workload(appWeb).ID}, nil, t).Allowed
		}
		next := set.NextChange(now)
		if next.IsZero() {
			t.Fatalf("%s never changes", window)
		}
		for m := now; m.Before(next); m = m.Add(17 * time.Minute) {
			if answer(m) != answer(now) {
				t.Fatalf("%s: another answer at %s than at %s, before %s", window, m, now, next)
			}
		}
		if answer(next) != answer(now) {
			changes++
		}
	}
	if changes < 40 {
		t.Errorf("%d changes only: that shows little", changes)
	}
}

// FuzzAuthorise: whatever a condition says and a request has, there is an answer, and it is no for whom no rule names.
func FuzzAuthorise(f *testing.F) {
	f.Add(`claims.mfa == true && path.startsWith("/admin/")`, "/admin/x", `{"mfa":true}`, "GET", "x-team", "blue")
	f.Add(`groups.all(a, groups.all(b, groups.all(c, a + b + c != path)))`, "/a/../b", `{"a":[1,{"b":null}]}`, "", "", "")
	f.Add(`headers["x"].exists(v, v.matches("(a+)+$"))`, "/%2e", `{}`, "POST", "x", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")
	f.Add(`ip(client).isLoopback() || claims.a.b.c > 1.5`, "", `{"a":{"b":{"c":2}}}`, "GET", "", "")
	f.Add(`dyn(claims) == dyn(path)`, "/", `[]`, "GET", "", "")
	f.Add("\"000000\n", "/", `{}`, "GET", "", "")
	now := time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, when, path, claims, method, header, value string) {
		quoted, _ := json.Marshal(when)
		set, err := policy.Parse("fuzz.yaml", []byte(strings.Replace(web, `'claims.mfa == true && path.startsWith("/admin/")'`, string(quoted), 1)))
		if err != nil {
			checkErrors(t, err)
			return
		}
		admin, other := person("carol", "admins"), person("dave", "admin")
		if json.Unmarshal([]byte(claims), &admin.Claims) != nil {
			return
		}
		other.Claims = admin.Claims
		r := &policy.Request{Method: method, Host: "web.example.org", Path: path, Headers: map[string][]string{header: {value}}}
		set = set.Heeding(policy.NewSignals([]policy.Said{{Source: "posture", Until: now.Add(time.Hour)}}))
		for _, r := range []*policy.Request{r, nil} {
			for _, who := range []policy.Caller{admin, other} {
				if d := set.Authorise("web", who, r, now); d.Allowed == (len(d.Near) > 0) || d.Allowed && who.Subject == "dave" {
					t.Fatalf("%q of %q by %q with %q: %+v", when, path, who, claims, d)
				}
			}
		}
	})
}

// TestCostOfConditions: what would take long is refused instead, with a request and before.
func TestCostOfConditions(t *testing.T) {
	for _, when := range []string{
		"groups.all(a, groups.all(b, groups.all(c, groups.all(d, a + b + c + d != path))))",
		`headers["x"].exists(a, headers["x"].exists(b, headers["x"].exists(c, a + b + c == "")))`,
	} {
		set := with(t, `'claims.mfa == true && path.startsWith("/admin/")'`, "'"+when+"'").Heeding(policy.NewSignals([]policy.Said{{Source: "posture", Until: at(t, "2027-01-01T00:00:00Z")}}))
		admin, r := person("carol", slices.Repeat([]string{"admins"}, 100)...), get("/admin/x")
		r.Headers = map[string][]string{"x": slices.Repeat([]string{"y"}, 100)}
		if d := set.Authorise("web", admin, r, at(t, "2026-11-23T09:00:00Z")); d.Allowed || !strings.Contains(d.Near[0], "cost") {
			t.Errorf("%s: %+v", when, d)
		}
	}
}

// TestCanonicalPath: paths that servers read alike have one spelling, and what they read in different ways has none.
func TestCanonicalPath(t *testing.T) {
	for path, want := range map[string]string{
		"/": "/", "/a": "/a", "/a/": "/a/", "/a//b": "/a/b", "//a": "/a", "/a/./b": "/a/b", "/a/../b": "/b", "/a/b/..": "/a/", "/a/.": "/a/",
		"/%61": "/a", "/a%2eb": "/a.b", "/%2e%2E/b": "", "/a/%2e%2e/b": "/b", "/a%3ab": "/a%3Ab", "/a:b": "/a:b", "/~a": "/~a", "/%7ea": "/~a",
		"/a%2fb": "", "/a%5cb": "", `/a\b`: "", "/a%00": "", "/a%0d": "", "/a b": "", "/a%": "", "/a%2": "", "/a%zz": "", "/é": "", "/%c3%a9": "/%C3%A9",
		"/%252e": "", "/%25%32%65": "", "/100%25": "/100%25", "/a;b=c": "/a;b=c", "/a/..;/b": "", "/a/.;x": "", "/;a/b": "", "/..": "", "/a/../../b": "",
		"": "", "a": "", "*": "", "http://a/b": "", "/a?b": "", "/a#b": "", "/...": "/...", "/a/...": "/a/...",
	} {
		got, err := policy.CanonicalPath(path)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v, want %q", path, got, err, want)
		}
		if again, err := policy.CanonicalPath(got); want != "" && (again != got || err != nil) {
			t.Errorf("%q is not what it is itself: %q, %v", got, again, err)
		}
	}
}
