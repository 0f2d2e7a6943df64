package policy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// webVariants are what stands in the places of a set with requests: @a, @b and so on.
var webVariants = [][]string{
	{`groups: [corp/admins]`, `groups: [corp/admins, corp/staff]`, `subjects: [corp/carol]`, `subjects: ["corp/*"]`, `identities: ["spiffe://example.org/app/web"]`, `identities: ["spiffe://example.org/*"], groups: [corp/staff]`},
	{"", `, from: ["10.1.0.0/24"]`, `, from: ["10.1.0.2", "fd00::/8"]`, `, from: ["10.0.0.0/8"]`},
	{"", `, during: [{from: "08:00", to: "18:00"}]`, `, during: [{days: [Tue], from: "08:00", to: "18:00"}]`, `, during: [{from: "08:00", to: "18:00"}, {days: [Tue], from: "08:00", to: "18:00"}]`},
	{"", `, routes: [{methods: [GET]}]`, `, routes: [{methods: [GET, POST], paths: [/a/*]}]`, `, routes: [{paths: [/a/b/*, /c]}]`, `, routes: [{paths: [/*], headers: {x-t: b}}, {hosts: [h.example.org], methods: [POST]}]`, `, routes: [{paths: [/a/*]}]`, `, routes: [{paths: [/a/]}]`},
	{"", `, when: 'path != "/c"'`, `, when: 'claims.mfa == true'`, `, when: 'now < timestamp("2026-11-23T12:00:00Z")'`},
	{"", `, signals: [{source: edr}]`, `, signals: [{source: edr, required: true}]`, `, signals: [{source: edr, uids: [0, 7], required: true}]`, `, signals: [{source: edr, uids: [7]}, {source: siem}]`},
	{"", `- {groups: [corp/staff], routes: [{methods: [GET]}]}`, `- {subjects: [corp/dave], from: [10.2.0.1]}`},
	{"authenticate: [spiffe, oidc], providers: [corp]", "authenticate: [spiffe, jwt, oidc], audiences: [a], providers: [corp]", "authenticate: [jwt, oidc], audiences: [a, b], providers: [corp, other]", "authenticate: [spiffe, oidc], providers: [corp], login: corp"},
	{"", ", hosts: [h.example.org]", ", hosts: [h.example.org, i.example.org]"},
	{"", ", subjects: [corp/carol]", `, subjects: ["corp/*"]`, `, identities: ["spiffe://example.org/app/web"]`},
	{"", ", limits: {streams: 3}", ", upstream: {h2c: true}"},
}

const variableWeb = head + `ProtectedService
metadata: {name: web}
spec:
  target: Host
  ports: [80]
  http: {@h@i@k}
  access:
  - {@a@b@c@d@e@f}
  @g
---
` + head + `IdentityProvider
metadata: {name: corp}
spec: {issuer: "https://a.example.org", audiences: [a], login: {clientID: c}}
---
` + head + `IdentityProvider
metadata: {name: other}
spec: {issuer: "https://b.example.org", audiences: [a]}
---
` + head + `DenyList
metadata: {name: stop}
spec: {reason: r, people: [nobody]@j}
`

func filledWeb(choice []int) *policy.Set {
	var pairs []string
	for i, v := range webVariants {
		pairs = append(pairs, "@"+string(rune('a'+i)), v[choice[i]])
	}
	set, err := policy.Parse("resources.yaml", []byte(strings.NewReplacer(pairs...).Replace(variableWeb)))
	if err != nil {
		return nil
	}
	return set
}

// TestNoLooseningOfRequestsIsOverlooked: between two sets at random, where none is found, who comes in now came in before.
func TestNoLooseningOfRequestsIsOverlooked(t *testing.T) {
	r := rand.New(rand.NewPCG(13, 14))
	found, none, allowed := 0, 0, 0
	for range 300 {
		choice := make([]int, len(webVariants))
		for i := range choice {
			if r.IntN(2) == 0 {
				choice[i] = r.IntN(len(webVariants[i]))
			}
		}
		old := filledWeb(choice)
		for range 1 + r.IntN(2) {
			i := r.IntN(len(choice))
			choice[i] = r.IntN(len(webVariants[i]))
		}
		next := filledWeb(choice)
		if old == nil || next == nil {
			continue
		}
		if len(policy.Loosenings(old, next)) > 0 {
			found++
			continue
		}
		none++
		for range 40 {
			allowed += noLooserRequest(t, r, old, next)
		}
	}
	t.Logf("%d looser, %d not, and %d requests were allowed in the new one", found, none, allowed)
	if found < 50 || none < 50 || allowed < 200 {
		t.Error("that shows little")
	}
}

// noLooserRequest tries a request at both, and counts it where the new one allows it.
func noLooserRequest(t *testing.T, r *rand.Rand, old, next *policy.Set) int {
	t.Helper()
	who := pick(r, person("carol", "admins"), person("dave", "staff"), person("eve"), workload(appWeb), workload("spiffe://example.org/x"))
	who.Address = pick(r, netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.1.0.9"), netip.MustParseAddr("10.2.0.1"))
	who.Proof = map[bool]string{true: policy.ProofOIDC, false: pick(r, policy.ProofSPIFFE, policy.ProofJWT)}[who.Provider != ""]
	who.Claims = pick(r, map[string]any{"mfa": true}, nil)
	q := &policy.Request{Method: pick(r, "GET", "POST", "PUT"), Host: pick(r, "h.example.org", "i.example.org"), Path: pick(r, "/", "/a/", "/a/b/c", "/c"),
		Headers: pick(r, nil, map[string][]string{"x-t": {"b"}})}
	if r.IntN(4) == 0 {
		q = nil
	}
	now := pick(r, at(t, "2026-11-23T09:30:00Z"), at(t, "2026-11-24T09:00:00Z"), at(t, "2026-11-24T20:00:00Z"), time.Time{})
	var said []policy.Said
	for range r.IntN(3) {
		said = append(said, policy.Said{Source: pick(r, "edr", "siem"), UID: pick(r, uint32(0), 7), Against: r.IntN(4) == 0, Until: at(t, "2027-01-01T00:00:00Z")})
	}
	signals := policy.NewSignals(said)
	is, was := next.Heeding(signals).Authorise("web", who, q, now), old.Heeding(signals).Authorise("web", who, q, now)
	if is.Allowed && !was.Allowed {
		t.Fatalf("%s is let in with %s at %s, said %+v:\n%s\n--- became ---\n%s", who, fmt.Sprintf("%+v", q), now, said, old.YAML(), next.YAML())
	}
	if is.Allowed {
		return 1
	}
	return 0
}

// TestLooserPaths: a path covers another of a route only if all that the other one has is its own.
func TestLooserPaths(t *testing.T) {
	for _, c := range []struct {
		old, next string
		looser    bool
	}{
		{"/", "/*", true}, {"/a/", "/a/*", true}, {"/a/b", "/a/*", true}, {"/a/*", "/*", true}, {"/a/*", "/a", true}, {"/a/*", "/ab/*", true},
		{"/*", "/", false}, {"/a/*", "/a/", false}, {"/a/*", "/a/b/*", false}, {"/*", "/*", false}, {"/a/", "/a/", false},
	} {
		set := func(path string) *policy.Set {
			return mustParse(t, head+`ProtectedService
metadata: {name: web}
spec: {target: Host, ports: [80], http: {}, access: [{identities: ["spiffe://example.org/app/web"], routes: [{paths: ["`+path+`"]}]}]}
`)
		}
		if got := policy.Loosenings(set(c.old), set(c.next)); (len(got) > 0) != c.looser {
			t.Errorf("%s became %s: %v", c.old, c.next, got)
		}
	}
}
