package policy_test

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/loosen"
)

const carolKey = "ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCboQ1fHdyGZBJVMbg="

// TestLoosenings: each kind of loosening is found and told in words.
func TestLoosenings(t *testing.T) {
	inForce := loosen.InForce(carolKey)
	old := mustParse(t, inForce)
	for _, c := range loosen.Kinds() {
		text := c.Change(inForce)
		next, err := policy.Parse("resources.yaml", []byte(text))
		if text == inForce {
			t.Errorf("%s: nothing was changed", c.Name)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.Name, err)
			continue
		}
		var said []string
		for _, l := range policy.Loosenings(old, next) {
			said = append(said, l.String())
		}
		if !strings.Contains(strings.Join(said, "\n"), c.Says) {
			t.Errorf("%s: %q, want %q", c.Name, said, c.Says)
		}
		wantEveryChange(t, c.Name, old, next)
	}
	if got := policy.Loosenings(nil, old); len(got) != 1 || !strings.Contains(got[0].String(), "first one of this node") {
		t.Errorf("the first: %v", got)
	}
}

// wantEveryChange holds that two sets that differ have a change to tell, in both directions.
func wantEveryChange(t *testing.T, name string, old, next *policy.Set) {
	t.Helper()
	there, back := policy.Changes(old, next), policy.Changes(next, old)
	if differ := old.Digest() != next.Digest(); differ != (len(there) > 0) || differ != (len(back) > 0) {
		t.Errorf("%s: changes %v, and back %v", name, there, back)
	}
}

// TestChanges: each change is told once, with what it does to what is allowed.
func TestChanges(t *testing.T) {
	inForce := loosen.InForce(carolKey)
	old := mustParse(t, inForce)
	for _, c := range []struct {
		name   string
		change func(string) string
		want   string
	}{
		{"shorter", loosen.Swap("maxDuration: 15m", "maxDuration: 14m"), "tighter spec.maxDuration: 15m became 14m"},
		{"longer", loosen.Swap("maxDuration: 15m", "maxDuration: 16m"), "looser spec.maxDuration: 15m became 16m"},
		{"shut out", loosen.Swap(`"spiffe://example.org/app/web", `, ""), "tighter spec.access: spiffe://example.org/app/web was removed"},
		{"pattern narrower", loosen.Swap(`"spiffe://example.org/ops/*"`, `"spiffe://example.org/ops/a"`),
			"neither spec.access: spiffe://example.org/ops/a was added; tighter spec.access: spiffe://example.org/ops/* was removed"},
		{"another", loosen.Swap(`"spiffe://example.org/app/web", `, `"spiffe://example.org/app/api", `),
			"looser spec.access: spiffe://example.org/app/api was added; tighter spec.access: spiffe://example.org/app/web was removed"},
		{"more approvals", loosen.Swap("{from: [bob], min: 1}", "{from: [bob], min: 1}, {from: [carol], min: 1}"), "tighter spec.approvals: from: - carol min: 1 is asked for now"},
		{"tests", loosen.Swap("  notAfter: 2030-01-01T00:00:00Z\n---", "  notAfter: 2030-01-01T00:00:00Z\n  tests: [{name: n, expect: Refuse, service: postgres, requester: alice, addresses: [10.1.0.2], duration: 1m}]\n---"),
			"neither spec.tests: are not what they were"},
		{"mode left", loosen.Swap("target: Host, ports: [5432", "target: Host, mode: Shadow, ports: [5432"), "looser spec.mode: Enforce became Shadow"},
		{"watched service new", loosen.Plus("ProtectedService\nmetadata: {name: ssh}\nspec: {target: Host, mode: Observe, ports: [22]}\n"), "neither : is new"},
		{"service new", loosen.Plus("ProtectedService\nmetadata: {name: ssh}\nspec: {target: Host, ports: [22]}\n"), "tighter : is new"},
		{"budget", loosen.Swap("bytes: 10GiB", "bytes: 9GiB"), "tighter spec.maxBudget.bytes: 10GiB became 9GiB"},
		{"keyring newer", loosen.Swap("version: 3", "version: 4"), "neither spec.version: 3 became 4"},
		{"member gone", loosen.Swap("members: [alice, bob]", "members: [bob]"), "tighter spec.groups.dba: alice was removed"},
		{"deny list new", loosen.Plus("DenyList\nmetadata: {name: more}\nspec: {reason: r, people: [alice]}\n"), "tighter : is new"},
	} {
		var said []string
		for _, change := range policy.Changes(old, mustParse(t, c.change(inForce))) {
			said = append(said, fmt.Sprintf("%s %s: %s", change.Effect, change.Field, change.What))
		}
		if got := strings.Join(said, "; "); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// TestTightenings: who only takes away needs nobody's signature, and neither does who changes nothing.
func TestTightenings(t *testing.T) {
	inForce := loosen.InForce(carolKey)
	old := mustParse(t, inForce)
	for _, c := range []struct {
		name   string
		change func(string) string
	}{
		{"nothing", func(s string) string { return s }},
		{"order and comments", func(s string) string { return "# a comment\n" + s }},
		{"service new", loosen.Plus("ProtectedService\nmetadata: {name: ssh}\nspec: {target: Host, ports: [22], access: [{identities: [\"spiffe://example.org/ops/*\"]}]}\n")},
		{"service new, only watched", loosen.Plus("ProtectedService\nmetadata: {name: ssh}\nspec: {target: Host, mode: Observe, ports: [22]}\n")},
		{"service new, only watched, of UDP", loosen.Plus("ProtectedService\nmetadata: {name: ntp}\nspec: {target: Host, protocol: UDP, mode: Shadow, ports: [123]}\n")},
		{"service new, only watched, of UDP in a pod", loosen.Plus("ProtectedService\nmetadata: {name: quic}\nspec: {target: Pod, addresses: [10.2.0.9], protocol: UDP, mode: Shadow, ports: [5432]}\n")},
		{"mode in other words", loosen.Swap("target: Host, ports: [5432, 5433]", "target: Host, mode: Enforce, ports: [5432, 5433]")},
		{"port new", loosen.Swap("ports: [5432, 5433]", "ports: [5432, 5433, 5434]")},
		{"address new", loosen.Swap(`["10.2.0.2", "fd00:2::2"]`, `["10.2.0.2", "fd00:2::2", "10.2.0.3"]`)},
		{"UDP denied in other words", loosen.Swap("udp: Deny, ", "")},
		{"shorter idle", loosen.Swap("idle: 30s", "idle: 5s")},
		{"remote service new", loosen.Plus("RemoteService\nmetadata: {name: mine}\nspec: {addresses: [10.9.0.6], ports: [1], identities: [\"spiffe://example.org/me\"], callers: [\"spiffe://example.org/*\"]}\n")},
		{"remote address and port new", loosen.Swap(`["10.9.0.5", "fd00:9::5"], ports: [7000,`, `["10.9.0.5", "fd00:9::5", "10.9.0.6"], ports: [7000, 7002,`)},
		{"fewer callers", loosen.Swap(`"spiffe://example.org/shop/*"`, `"spiffe://example.org/shop/a"`)},
		{"refused in other words", loosen.Swap("ports: [7000, 7001]", "without: refuse, ports: [7000, 7001]")},
		{"identity shut out", loosen.Swap(`"spiffe://example.org/app/web", `, "")},
		{"pattern narrower", loosen.Swap(`"spiffe://example.org/ops/*"`, `"spiffe://example.org/ops/a", "spiffe://example.org/ops/b/*"`)},
		{"identities in two rules", loosen.Swap(`["spiffe://example.org/app/web", "spiffe://example.org/ops/*"]}`, `["spiffe://example.org/app/web"]}, {identities: ["spiffe://example.org/ops/*"]}`)},
		{"sources narrower", loosen.Swap(`sources: ["10.1.0.0/24"]`, `sources: ["10.1.0.0/25", "10.1.0.200"]`)},
		{"shorter", loosen.Swap("maxDuration: 15m", "maxDuration: 14m")},
		{"class", loosen.Swap("maxDuration: 15m, requesters: [alice]", `maxDuration: 15m, requesters: [alice], class: Sensitive, ticket: {required: true}, approvals: [{from: [bob]}]`)},
		{"one more source", loosen.Swap("required: true}]", "required: true}, {source: incident, may: [Shorten]}]")},
		{"idle for less", loosen.Swap("idleTimeout: 5m", "idleTimeout: 4m")},
		{"warned of otherwise", loosen.Swap("idleTimeout: 5m", "idleTimeout: 5m\n  warnBefore: [2m]")},
		{"idle for no longer", loosen.Swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], idleTimeout: 1m")},
		{"reach", loosen.Swap("maxReach: 8", "maxReach: 7")},
		{"template", loosen.Swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], templates: [nightly]")},
		{"device", loosen.Swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], ingress: pod")},
		{"budget", loosen.Swap("bytes: 10GiB", "bytes: 9GiB, packets: 5")},
		{"requester", loosen.Swap(`requesters: [alice, "group:dba"]`, `requesters: ["group:dba"]`)},
		{"more approvals", loosen.Swap("{from: [bob], min: 1}", "{from: [bob], min: 1}, {from: [carol], min: 1}")},
		{"approval by fewer", loosen.Swap(`{from: ["group:dba", carol], min: 2}`, "{from: [carol], min: 2}")},
		{"approval by three", loosen.Swap(`{from: ["group:dba", carol], min: 2}`, `{from: ["group:dba", carol], min: 3}`)},
		{"ticket", loosen.Swap("maxDuration: 15m, requesters: [alice]", `maxDuration: 15m, requesters: [alice], ticket: {required: true, pattern: "X-1"}`)},
		{"window", loosen.Swap("maxDuration: 15m, requesters: [alice]", `maxDuration: 15m, requesters: [alice], windows: [{from: "01:00", to: "02:00"}]`)},
		{"condition", loosen.Swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], when: 'false'")},
		{"earlier end", loosen.Swap("notAfter: 2030-01-01T00:00:00Z\n---", "notAfter: 2029-01-01T00:00:00Z\n---")},
		{"end", loosen.Swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], notAfter: 2029-01-01T00:00:00Z")},
		{"tests", loosen.Swap("  notAfter: 2030-01-01T00:00:00Z\n---", "  notAfter: 2030-01-01T00:00:00Z\n  tests: [{name: n, expect: Refuse, service: postgres, requester: alice, addresses: [10.1.0.2], duration: 1m}]\n---")},
		{"template new", loosen.Plus("GrantTemplate\nmetadata: {name: mine}\nspec: {service: dns, maxDuration: 1m}\n")},
		{"keyring newer", loosen.Swap("version: 3", "version: 4")},
		{"keyring ends sooner", loosen.Swap("notAfter: 2031-01-01T00:00:00Z", "notAfter: 2030-01-01T00:00:00Z")},
		{"key ends sooner", loosen.Swap("notAfter: 2030-01-01T00:00:00Z, uses", "notAfter: 2029-01-01T00:00:00Z, uses")},
		{"key for less", loosen.Swap(`{publicKey: "`+bobKey+`"}`, `{publicKey: "`+bobKey+`", uses: [approve]}`)},
		{"member gone", loosen.Swap("members: [alice, bob]", "members: [bob]")},
		{"key revoked", loosen.Swap(`revokedKeys: ["sp:0000000000000000"]`, `revokedKeys: ["sp:0000000000000000", "sp:1111111111111111"]`)},
		{"deny list new", loosen.Plus("DenyList\nmetadata: {name: more}\nspec: {reason: r, people: [alice]}\n")},
		{"deny list for longer", loosen.Swap("stolen laptop\n  notAfter: 2030", "stolen laptop\n  notAfter: 2031")},
		{"deny list for good", loosen.Swap("stolen laptop\n  notAfter: 2030-01-01T00:00:00Z", "stolen laptop")},
		{"denied for another reason", loosen.Swap("stolen laptop", "lost laptop")},
		{"more denied", loosen.Swap(`["spiffe://example.org/old/*"]`, `["spiffe://example.org/*"]`)},
		{"subject denied", loosen.Swap(`["corp/mallory"]`, `["corp/mallory", "corp/eve"]`)},
		{"every subject denied", loosen.Swap(`["corp/mallory"]`, `["corp/*"]`)},
		{"narrower path", loosen.Swap("/public/*", "/public/a/*, /public/b, /public/")},
		{"method", loosen.Swap("groups: [corp/admins]", "groups: [corp/admins]\n      routes: [{methods: [GET]}]")},
		{"one more header", loosen.Swap("{x-team: blue}", "{x-team: blue, x-b: c}")},
		{"a route in two", loosen.Swap("routes: [{methods: [GET], paths: [/public/*]", "routes: [{methods: [GET], paths: [/public/*], hosts: [web.example.org], headers: {x-team: blue, x-b: c}}, {methods: [GET], paths: [/public/x]")},
		{"from fewer addresses", loosen.Swap(`from: ["10.1.0.0/24"]`, `from: ["10.1.0.0/25", "10.1.0.200"]`)},
		{"condition of a rule", loosen.Swap("      routes: [{", "      when: 'method != \"PUT\"'\n      routes: [{")},
		{"times of a rule", loosen.Swap("      routes: [{", "      during: [{from: \"08:00\", to: \"09:00\"}]\n      routes: [{")},
		{"one more signal", loosen.Swap("{source: edr, required: true}", "{source: edr, required: true}, {source: siem}")},
		{"signal", loosen.Swap("      routes: [{", "      signals: [{source: siem}]\n      routes: [{")},
		{"rules in two", loosen.Swap("    - groups: [corp/admins]\n", "    - groups: [corp/admins]\n      from: [10.1.0.9]\n      during: [{days: [Fri], from: \"08:00\", to: \"18:00\"}]\n      when: 'claims.mfa == true'\n      signals: [{source: edr, required: true}]\n    - groups: [corp/admins]\n")},
		{"smaller limits", loosen.Swap("limits: {bodyBytes: 1MiB, bodyRate: 1KiB, requestsPerMinute: 600}",
			"limits: {headerBytes: 16KiB, bodyBytes: 1KiB, bodyRate: 2KiB, requestsPerMinute: 6, streams: 9, headerTimeout: 1s, bodyTimeout: 1s}")},
		{"stricter provider", loosen.Swap("session: 4h, idle: 30m}", "session: 3h, idle: 3m}\n  skew: 1s\n  keep: 1h")},
		{"no login", loosen.Swap("  login: {clientID: sallyport, session: 4h, idle: 30m}\n", "")},
		{"more addresses denied", loosen.Swap(`["10.9.0.0/24"]`, `["10.9.0.0/23"]`)},
	} {
		text := c.change(inForce)
		if text == inForce && c.name != "nothing" {
			t.Errorf("%s: nothing was changed", c.name)
		}
		next := mustParse(t, text)
		if got := policy.Loosenings(old, next); len(got) != 0 {
			t.Errorf("%s: %v", c.name, got)
		}
		wantEveryChange(t, c.name, old, next)
	}
}

// TestModesLoosen: only who leaves Enforce loosens.
func TestModesLoosen(t *testing.T) {
	set := func(m policy.Mode) *policy.Set {
		return mustParse(t, loosen.Swap("target: Host, protocol: UDP", "target: Host, mode: "+string(m)+", protocol: UDP")(loosen.InForce(carolKey)))
	}
	modes := []policy.Mode{policy.ModeObserve, policy.ModeShadow, policy.ModeEnforce}
	for _, from := range modes {
		for _, to := range modes {
			looser := from == policy.ModeEnforce && to != policy.ModeEnforce
			if got := policy.Loosenings(set(from), set(to)); (len(got) == 1) != looser || len(got) > 1 {
				t.Errorf("%s to %s: %v", from, to, got)
			}
			effect := map[bool]policy.Effect{true: policy.Tighter, false: policy.Neither}[to == policy.ModeEnforce && !looser]
			if got := policy.Changes(set(from), set(to)); !looser && from != to && (len(got) != 1 || got[0].Effect != effect) {
				t.Errorf("%s to %s: %v, want %s", from, to, got, effect)
			}
		}
	}
}

// TestWhatIsUnknownLoosens: a resource whose fields nobody compares is looser whenever it differs, also one that comes later.
func TestWhatIsUnknownLoosens(t *testing.T) {
	var names []string
	for _, typ := range []reflect.Type{reflect.TypeFor[policy.AccessRule](), reflect.TypeFor[policy.Route](), reflect.TypeFor[policy.AccessSignal](), reflect.TypeFor[policy.Approval](), reflect.TypeFor[policy.TicketRule]()} {
		for i := range typ.NumField() {
			names = append(names, fmt.Sprintf("%s.%s", typ.Name(), typ.Field(i).Name))
		}
	}
	// What is compared as a part of a list: who adds a field to these says in loosening.go what makes it tighter.
	want := []string{"AccessRule.Identities", "AccessRule.Subjects", "AccessRule.Groups", "AccessRule.From", "AccessRule.During", "AccessRule.Routes",
		"AccessRule.When", "AccessRule.Signals", "Route.Methods", "Route.Paths", "Route.Hosts", "Route.Headers", "AccessSignal.Source", "AccessSignal.UIDs", "AccessSignal.Required",
		"Approval.From", "Approval.Min", "TicketRule.Required", "TicketRule.Pattern"}
	if !slices.Equal(names, want) {
		t.Errorf("fields: %v", names)
	}
}
