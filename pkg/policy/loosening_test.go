package policy_test

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// inForce has something of everything that can be loosened.
const inForce = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, ports: [5432, 5433], udp: Deny, access: [{identities: ["spiffe://example.org/app/web", "spiffe://example.org/ops/*"]}]}
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: cache}
spec: {target: Pod, ports: [6379], addresses: ["10.2.0.2", "fd00:2::2"], device: veth1}
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: dns}
spec: {target: Host, protocol: UDP, ports: [53], idle: 30s}
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: backup}
spec:
  services: [postgres]
  bindings: [address]
  sources: ["10.1.0.0/24"]
  maxDuration: 15m
  class: Sensitive
  maxReach: 8
  idleTimeout: 10m
  warnBefore: [5m]
  signals: [{source: posture, may: [Revoke], required: true}]
  templates: [nightly]
  ingress: uplink
  maxBudget: {bytes: 10GiB, connections: 5}
  requesters: [alice, "group:dba"]
  approvals: [{from: ["group:dba", carol], min: 2}, {from: [bob], min: 1}]
  ticket: {required: true, pattern: "OPS-[0-9]+"}
  windows: [{days: [Mon], from: "22:00", to: "06:00"}]
  when: 'ticket != ""'
  notAfter: 2030-01-01T00:00:00Z
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: plain}
spec: {services: [cache], bindings: [address], sources: ["10.1.0.0/24"], maxDuration: 15m, requesters: [alice]}
---
apiVersion: sallyport.dev/v1alpha1
kind: GrantTemplate
metadata: {name: nightly}
spec: {service: postgres, maxDuration: 10m}
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 3
  notAfter: 2031-01-01T00:00:00Z
  people:
    - {name: alice, keys: [{publicKey: "` + aliceKey + `", notAfter: 2030-01-01T00:00:00Z, uses: [request]}]}
    - {name: bob, keys: [{publicKey: "` + bobKey + `"}]}
    - {name: carol, keys: [{publicKey: "` + carolKey + `", uses: [resources]}]}
  groups: [{name: dba, members: [alice, bob]}]
  revokedKeys: ["sp:0000000000000000"]
---
apiVersion: sallyport.dev/v1alpha1
kind: DenyList
metadata: {name: incident}
spec:
  reason: stolen laptop
  notAfter: 2030-01-01T00:00:00Z
  identities: ["spiffe://example.org/old/*"]
  people: [mallory]
  services: [dns]
  addresses: ["10.9.0.0/24"]
  grants: ["` + grantID + `"]
---
apiVersion: sallyport.dev/v1alpha1
kind: ResourceSet
metadata: {name: all}
spec: {version: 4, signers: 2}
`

const (
	carolKey = "ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCboQ1fHdyGZBJVMbg="
	daveKey  = "ed25519:pUCbBgBoYDpMiZAdIuHk2jBPVqJQRL4m4BsqxL4R4JI="
)

const doc = "---\napiVersion: sallyport.dev/v1alpha1\nkind: "

// without leaves out a resource, and what is said of it elsewhere.
func without(kind, name string, also ...string) func(string) string {
	return func(s string) string {
		var kept []string
		for part := range strings.SplitSeq(s, "---\n") {
			if !strings.Contains(part, "kind: "+kind+"\nmetadata: {name: "+name+"}") {
				kept = append(kept, part)
			}
		}
		return strings.NewReplacer(also...).Replace(strings.Join(kept, "---\n"))
	}
}

func swap(from, to string) func(string) string {
	return func(s string) string { return strings.Replace(s, from, to, 1) }
}

func plus(text string) func(string) string {
	return func(s string) string { return s + doc + text }
}

// loosenings are all kinds of them: the change, and what is said of it.
var loosenings = []struct {
	name   string
	change func(string) string
	says   string
}{
	{"service gone", without("ProtectedService", "cache", "services: [cache]", "services: [postgres]"), "ProtectedService cache: is gone"},
	{"port gone", swap("ports: [5432, 5433]", "ports: [5432]"), "ProtectedService postgres: spec.ports: 5433 was removed"},
	{"address gone", swap(`["10.2.0.2", "fd00:2::2"]`, `["10.2.0.2"]`), "spec.addresses: fd00:2::2 was removed"},
	{"another device", swap("device: veth1", "device: veth2"), "spec.device: veth1 became veth2"},
	{"another target", swap(`target: Pod, ports: [6379], addresses: ["10.2.0.2", "fd00:2::2"], device: veth1`, "target: Host, ports: [6379]"), "spec.target: Pod became Host"},
	{"another protocol", swap("ports: [6379],", "ports: [6379], protocol: UDP,"), "spec.protocol: TCP became UDP"},
	{"UDP allowed", swap("udp: Deny", "udp: Allow"), "spec.udp: Deny became Allow"},
	{"idle for longer", swap("idleTimeout: 10m", "idleTimeout: 11m"), "spec.idleTimeout: 10m became 11m"},
	{"idle for ever", swap("idleTimeout: 10m", "idleTimeout: 0s"), "spec.idleTimeout: 10m became 0s"},
	{"source that is not required", swap("may: [Revoke], required: true", "may: [Revoke]"), "spec.signals: "},
	{"source gone", swap("  signals: [{source: posture, may: [Revoke], required: true}]\n", ""), "spec.signals: "},
	{"longer idle", swap("idle: 30s", "idle: 31s"), "spec.idle: 30s became 31s"},
	{"identity let in", swap(`"spiffe://example.org/app/web"`, `"spiffe://example.org/app/web", "spiffe://example.org/app/x"`), "spec.access: spiffe://example.org/app/x was added"},
	{"pattern wider", swap(`"spiffe://example.org/ops/*"`, `"spiffe://example.org/*"`), "spec.access: spiffe://example.org/* was added"},
	{"port taken by another service", plus("ProtectedService\nmetadata: {name: mine}\nspec: {target: Pod, ports: [5432], addresses: [10.1.0.1], access: [{identities: [\"spiffe://example.org/me\"]}]}\n"),
		"ProtectedService mine: spec.ports: 5432 is taken at a place that postgres may have"},
	{"port taken by a service that is there", swap("ports: [6379]", "ports: [6379, 5433]"), "ProtectedService cache: spec.ports: 5433 is taken"},

	{"bypass policy new", plus("BypassPolicy\nmetadata: {name: mine}\nspec: {services: [dns], bindings: [address], sources: [10.1.0.1], maxDuration: 1m, requesters: [alice]}\n"), "BypassPolicy mine: is new"},
	{"bypass policy gone", without("BypassPolicy", "plain"), "BypassPolicy plain: is gone"},
	{"for another service", swap("services: [cache]", "services: [cache, dns]"), "spec.services: dns was added"},
	{"sources wider", swap(`sources: ["10.1.0.0/24"]`, `sources: ["10.1.0.0/23"]`), "spec.sources: 10.1.0.0/23 was added"},
	{"the node's addresses", swap("maxDuration: 15m, requesters", "maxDuration: 15m, nodeAddresses: true, requesters"), "spec.nodeAddresses: false became true"},
	{"longer", swap("maxDuration: 15m", "maxDuration: 16m"), "spec.maxDuration: 15m became 16m"},
	{"class", swap("class: Sensitive", "class: Routine"), "spec.class: Sensitive became Routine"},
	{"reach", swap("maxReach: 8", "maxReach: 9"), "spec.maxReach: 8 became 9"},
	{"reach of the class", swap("maxReach: 8", "maxReach: 0"), "spec.maxReach: 8 became 0"},
	{"another template", func(s string) string {
		return swap("templates: [nightly]", "templates: [nightly, other]")(s) + doc + "GrantTemplate\nmetadata: {name: other}\nspec: {service: postgres, maxDuration: 1m}\n"
	}, "spec.templates: other was added"},
	{"no template", swap("templates: [nightly]", "templates: []"), "spec.templates: - nightly became none"},
	{"any device", swap("ingress: uplink", `ingress: ""`), "spec.ingress: uplink became none"},
	{"another device's kind", swap("ingress: uplink", "ingress: pod"), "spec.ingress: uplink became pod"},
	{"budget", swap("bytes: 10GiB", "bytes: 11GiB"), "spec.maxBudget.bytes: 10GiB became 11GiB"},
	{"no budget", swap(", connections: 5", ""), "spec.maxBudget.connections: 5 became no limit"},
	{"another requester", swap(`requesters: [alice, "group:dba"]`, `requesters: [alice, "group:dba", carol]`), "spec.requesters: carol was added"},
	{"approval gone", swap(", {from: [bob], min: 1}]", "]"), "spec.approvals: from: - bob min: 1 is not asked for any more"},
	{"approval by one less", swap("carol], min: 2}", "carol], min: 1}"), "is not asked for any more"},
	{"approval by others", swap("{from: [bob], min: 1}", "{from: [bob, carol], min: 1}"), "is not asked for any more"},
	{"no ticket", func(s string) string {
		return strings.NewReplacer("required: true", "required: false", "class: Sensitive", "class: Routine").Replace(s)
	}, "spec.ticket.required: true became false"},
	{"another ticket", swap("OPS-[0-9]+", "[A-Z]+-[0-9]+"), "spec.ticket.pattern: OPS-[0-9]+ became [A-Z]+-[0-9]+"},
	{"no pattern", swap(`, pattern: "OPS-[0-9]+"`, ""), "spec.ticket.pattern: OPS-[0-9]+ became none"},
	{"another window", swap("days: [Mon]", "days: [Mon, Tue]"), "spec.windows"},
	{"no window", swap(`windows: [{days: [Mon], from: "22:00", to: "06:00"}]`, "windows: []"), "became none"},
	{"another condition", swap(`when: 'ticket != ""'`, "when: 'true'"), "spec.when"},
	{"no condition", swap(`when: 'ticket != ""'`, `when: ""`), "spec.when"},
	{"later end", swap("notAfter: 2030-01-01T00:00:00Z\n---", "notAfter: 2030-01-01T00:00:01Z\n---"), "BypassPolicy backup: spec.notAfter"},
	{"no end", swap("  notAfter: 2030-01-01T00:00:00Z\n---", "---"), "spec.notAfter: 2030-01-01T00:00:00Z became never"},

	{"template longer", swap("maxDuration: 10m", "maxDuration: 11m"), "GrantTemplate nightly: is not what it was"},
	{"template gone", without("GrantTemplate", "nightly", "templates: [nightly]", "templates: []"), "GrantTemplate nightly: is gone"},

	{"keyring new", plus("Keyring\nmetadata: {name: mine}\nspec: {version: 1, people: [{name: me, keys: [{publicKey: \"" + daveKey + "\"}]}]}\n"), "Keyring mine: is new"},
	{"keyring gone", func(s string) string {
		s = without("Keyring", "operators")(s)
		s = without("BypassPolicy", "plain")(s)
		return without("BypassPolicy", "backup")(s)
	}, "Keyring operators: is gone"},
	{"keyring older", swap("version: 3", "version: 2"), "spec.version: 3 became 2"},
	{"keyring for longer", swap("notAfter: 2031-01-01T00:00:00Z", "notAfter: 2032-01-01T00:00:00Z"), "Keyring operators: spec.notAfter"},
	{"person new", swap("  groups:", "    - {name: dave, keys: [{publicKey: \""+daveKey+"\"}]}\n  groups:"), "spec.people: dave was added"},
	{"key new", swap("{name: bob, keys: [", "{name: bob, keys: [{publicKey: \""+daveKey+"\"}, "), "spec.people.bob: the key sp:"},
	{"key of somebody else", func(s string) string { return strings.NewReplacer(bobKey, carolKey, carolKey, bobKey).Replace(s) }, "spec.people.bob: the key sp:"},
	{"key for longer", swap("notAfter: 2030-01-01T00:00:00Z, uses", "notAfter: 2030-01-02T00:00:00Z, uses"), "spec.people.alice.sp:"},
	{"key for good", swap("notAfter: 2030-01-01T00:00:00Z, uses", "uses"), "became never"},
	{"key for more", swap("uses: [request]", "uses: [request, resources]"), ".uses"},
	{"key for requests and approvals", swap(", uses: [request]", ""), ".uses"},
	{"group new", swap("groups: [", "groups: [{name: all, members: [carol]}, "), "spec.groups: all was added"},
	{"member new", swap("members: [alice, bob]", "members: [alice, bob, carol]"), "spec.groups.dba: carol was added"},
	{"key counts again", swap(`revokedKeys: ["sp:0000000000000000"]`, "revokedKeys: []"), "spec.revokedKeys: sp:0000000000000000 was removed"},

	{"deny list gone", without("DenyList", "incident"), "DenyList incident: is gone"},
	{"deny list ends sooner", swap("stolen laptop\n  notAfter: 2030", "stolen laptop\n  notAfter: 2029"), "DenyList incident: spec.notAfter"},
	{"identity not denied", swap(`["spiffe://example.org/old/*"]`, `["spiffe://example.org/old/a"]`), "spec.identities: spiffe://example.org/old/* was removed"},
	{"person not denied", swap("people: [mallory]", "people: []"), "spec.people: mallory was removed"},
	{"service not denied", swap("services: [dns]", "services: []"), "spec.services: dns was removed"},
	{"address not denied", swap(`["10.9.0.0/24"]`, `["10.9.0.0/25"]`), "spec.addresses: 10.9.0.0/24 was removed"},
	{"grant not denied", swap(`grants: ["`+grantID+`"]`, "grants: []"), "spec.grants: " + grantID + " was removed"},

	{"version", swap("version: 4", "version: 5"), "ResourceSet all: is not what it was"},
	{"signers", swap("signers: 2", "signers: 1"), "ResourceSet all: is not what it was"},
	{"no version", without("ResourceSet", "all"), "ResourceSet all: is gone"},
	{"another name of the set", swap("{name: all}", "{name: other}"), "ResourceSet other: is new"},
}

// TestLoosenings: each kind of loosening is found and told in words.
func TestLoosenings(t *testing.T) {
	old := mustParse(t, inForce)
	for _, c := range loosenings {
		text := c.change(inForce)
		next, err := policy.Parse("resources.yaml", []byte(text))
		if text == inForce {
			t.Errorf("%s: nothing was changed", c.name)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var said []string
		for _, l := range policy.Loosenings(old, next) {
			said = append(said, l.String())
		}
		if !strings.Contains(strings.Join(said, "\n"), c.says) {
			t.Errorf("%s: %q, want %q", c.name, said, c.says)
		}
	}
	if got := policy.Loosenings(nil, old); len(got) != 1 || !strings.Contains(got[0].String(), "first one of this node") {
		t.Errorf("the first: %v", got)
	}
}

// TestTightenings: who only takes away needs nobody's signature, and neither does who changes nothing.
func TestTightenings(t *testing.T) {
	old := mustParse(t, inForce)
	for _, c := range []struct {
		name   string
		change func(string) string
	}{
		{"nothing", func(s string) string { return s }},
		{"order and comments", func(s string) string { return "# a comment\n" + s }},
		{"service new", plus("ProtectedService\nmetadata: {name: ssh}\nspec: {target: Host, ports: [22], access: [{identities: [\"spiffe://example.org/ops/*\"]}]}\n")},
		{"port new", swap("ports: [5432, 5433]", "ports: [5432, 5433, 5434]")},
		{"address new", swap(`["10.2.0.2", "fd00:2::2"]`, `["10.2.0.2", "fd00:2::2", "10.2.0.3"]`)},
		{"UDP denied in other words", swap("udp: Deny, ", "")},
		{"idle for less", swap("idleTimeout: 10m", "idleTimeout: 9m")},
		{"idle at all", swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], idleTimeout: 5m")},
		{"another warning", swap("warnBefore: [5m]", "warnBefore: [2m]")},
		{"one more source", swap("required: true}]", "required: true}, {source: incident, may: [Shorten]}]")},
		{"shorter idle", swap("idle: 30s", "idle: 5s")},
		{"identity shut out", swap(`"spiffe://example.org/app/web", `, "")},
		{"pattern narrower", swap(`"spiffe://example.org/ops/*"`, `"spiffe://example.org/ops/a", "spiffe://example.org/ops/b/*"`)},
		{"identities in two rules", swap(`["spiffe://example.org/app/web", "spiffe://example.org/ops/*"]}`, `["spiffe://example.org/app/web"]}, {identities: ["spiffe://example.org/ops/*"]}`)},
		{"sources narrower", swap(`sources: ["10.1.0.0/24"]`, `sources: ["10.1.0.0/25", "10.1.0.200"]`)},
		{"shorter", swap("maxDuration: 15m", "maxDuration: 14m")},
		{"class", swap("maxDuration: 15m, requesters: [alice]", `maxDuration: 15m, requesters: [alice], class: Sensitive, ticket: {required: true}, approvals: [{from: [bob]}]`)},
		{"reach", swap("maxReach: 8", "maxReach: 7")},
		{"template", swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], templates: [nightly]")},
		{"device", swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], ingress: pod")},
		{"budget", swap("bytes: 10GiB", "bytes: 9GiB, packets: 5")},
		{"requester", swap(`requesters: [alice, "group:dba"]`, `requesters: ["group:dba"]`)},
		{"more approvals", swap("{from: [bob], min: 1}", "{from: [bob], min: 1}, {from: [carol], min: 1}")},
		{"approval by fewer", swap(`{from: ["group:dba", carol], min: 2}`, "{from: [carol], min: 2}")},
		{"approval by three", swap(`{from: ["group:dba", carol], min: 2}`, `{from: ["group:dba", carol], min: 3}`)},
		{"ticket", swap("maxDuration: 15m, requesters: [alice]", `maxDuration: 15m, requesters: [alice], ticket: {required: true, pattern: "X-1"}`)},
		{"window", swap("maxDuration: 15m, requesters: [alice]", `maxDuration: 15m, requesters: [alice], windows: [{from: "01:00", to: "02:00"}]`)},
		{"condition", swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], when: 'false'")},
		{"earlier end", swap("notAfter: 2030-01-01T00:00:00Z\n---", "notAfter: 2029-01-01T00:00:00Z\n---")},
		{"end", swap("maxDuration: 15m, requesters: [alice]", "maxDuration: 15m, requesters: [alice], notAfter: 2029-01-01T00:00:00Z")},
		{"tests", swap("  notAfter: 2030-01-01T00:00:00Z\n---", "  notAfter: 2030-01-01T00:00:00Z\n  tests: [{name: n, expect: Refuse, service: postgres, requester: alice, addresses: [10.1.0.2], duration: 1m}]\n---")},
		{"template new", plus("GrantTemplate\nmetadata: {name: mine}\nspec: {service: dns, maxDuration: 1m}\n")},
		{"keyring newer", swap("version: 3", "version: 4")},
		{"keyring ends sooner", swap("notAfter: 2031-01-01T00:00:00Z", "notAfter: 2030-01-01T00:00:00Z")},
		{"key ends sooner", swap("notAfter: 2030-01-01T00:00:00Z, uses", "notAfter: 2029-01-01T00:00:00Z, uses")},
		{"key for less", swap(`{publicKey: "`+bobKey+`"}`, `{publicKey: "`+bobKey+`", uses: [approve]}`)},
		{"member gone", swap("members: [alice, bob]", "members: [bob]")},
		{"key revoked", swap(`revokedKeys: ["sp:0000000000000000"]`, `revokedKeys: ["sp:0000000000000000", "sp:1111111111111111"]`)},
		{"deny list new", plus("DenyList\nmetadata: {name: more}\nspec: {reason: r, people: [alice]}\n")},
		{"deny list for longer", swap("stolen laptop\n  notAfter: 2030", "stolen laptop\n  notAfter: 2031")},
		{"deny list for good", swap("stolen laptop\n  notAfter: 2030-01-01T00:00:00Z", "stolen laptop")},
		{"denied for another reason", swap("stolen laptop", "lost laptop")},
		{"more denied", swap(`["spiffe://example.org/old/*"]`, `["spiffe://example.org/*"]`)},
		{"more addresses denied", swap(`["10.9.0.0/24"]`, `["10.9.0.0/23"]`)},
	} {
		text := c.change(inForce)
		if text == inForce && c.name != "nothing" {
			t.Errorf("%s: nothing was changed", c.name)
		}
		if got := policy.Loosenings(old, mustParse(t, text)); len(got) != 0 {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// TestWhatIsUnknownLoosens: a resource whose fields nobody compares is looser whenever it differs, also one that comes later.
func TestWhatIsUnknownLoosens(t *testing.T) {
	var names []string
	for _, typ := range []reflect.Type{reflect.TypeFor[policy.AccessRule](), reflect.TypeFor[policy.Approval](), reflect.TypeFor[policy.TicketRule]()} {
		for i := range typ.NumField() {
			names = append(names, fmt.Sprintf("%s.%s", typ.Name(), typ.Field(i).Name))
		}
	}
	// What is compared as a part of a list: who adds a field to these says in loosening.go what makes it tighter.
	want := []string{"AccessRule.Identities", "Approval.From", "Approval.Min", "TicketRule.Required", "TicketRule.Pattern"}
	if !slices.Equal(names, want) {
		t.Errorf("fields: %v", names)
	}
}
