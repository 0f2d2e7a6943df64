// Package loosen has a set of resources in which something of every kind can be loosened, and a change for each kind.
package loosen

import "strings"

// Public keys of nobody in particular.
const (
	aliceKey = "ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik="
	bobKey   = "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
	daveKey  = "ed25519:pUCbBgBoYDpMiZAdIuHk2jBPVqJQRL4m4BsqxL4R4JI="
	grantID  = "01J8ZQ4X5M3T9V0Y2B7C6D1E4F"
)

// Kind is one kind of loosening.
type Kind struct {
	Name string
	// Change makes a looser set of InForce.
	Change func(set string) string
	// Says is a part of what is said of it.
	Says string
}

// InForce has something of everything that can be loosened. Carol, whose key it is, may sign resources; two people have to.
func InForce(carolKey string) string {
	return strings.ReplaceAll(inForce, "CAROL", carolKey)
}

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
  idleTimeout: 5m
  signals: [{source: posture, may: [Revoke], required: true}]
  reviewers: [bob]
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
    - {name: carol, keys: [{publicKey: "CAROL", uses: [resources]}]}
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
  subjects: ["corp/mallory"]
  people: [mallory]
  services: [dns]
  addresses: ["10.9.0.0/24"]
  grants: ["` + grantID + `"]
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: web}
spec:
  target: Host
  ports: [8080]
  http:
    authenticate: [spiffe, jwt, oidc]
    audiences: ["https://web.example.org"]
    providers: [corp]
    certificate: web
    hosts: [web.example.org]
    upstream: {tls: {serverName: backend.example.org}}
    limits: {bodyBytes: 1MiB, bodyRate: 1KiB, requestsPerMinute: 600}
  access:
    - identities: ["spiffe://example.org/app/web"]
      routes: [{methods: [GET], paths: [/public/*], hosts: [web.example.org], headers: {x-team: blue}}]
    - groups: [corp/admins]
      from: ["10.1.0.0/24"]
      during: [{days: [Fri], from: "08:00", to: "18:00"}]
      when: 'claims.mfa == true'
      signals: [{source: edr, required: true}]
---
apiVersion: sallyport.dev/v1alpha1
kind: IdentityProvider
metadata: {name: corp}
spec:
  issuer: https://login.example.org
  audiences: ["https://web.example.org"]
  algorithms: [ES256]
  login: {clientID: sallyport, session: 4h, idle: 30m}
---
apiVersion: sallyport.dev/v1alpha1
kind: RemoteService
metadata: {name: orders}
spec: {addresses: ["10.9.0.5", "fd00:9::5"], ports: [7000, 7001], identities: ["spiffe://example.org/node-b"], callers: ["spiffe://example.org/shop/*"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: Rollout
metadata: {name: later}
spec: {services: [dns], operators: [carol], waves: [{name: all, percent: 100, mode: Enforce, bake: 1h}], budget: {refusals: 5, window: 1m}}
---
apiVersion: sallyport.dev/v1alpha1
kind: ResourceSet
metadata: {name: all}
spec: {version: 4, signers: 2}
`

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

// Swap changes one text for another.
func Swap(from, to string) func(string) string {
	return func(s string) string { return strings.Replace(s, from, to, 1) }
}

// Plus adds a resource, from its kind on.
func Plus(text string) func(string) string {
	return func(s string) string { return s + doc + text }
}

// Kinds are all of them.
func Kinds() []Kind {
	return []Kind{
		{"roll-out gone", without("Rollout", "later"), "Rollout later: is gone"},
		{"roll-out of more services", Swap("{services: [dns], operators: [carol]", "{services: [dns, web], operators: [carol]"), "Rollout later: spec.services: "},
		{"roll-out by others", Swap("operators: [carol]", "operators: [bob]"), "Rollout later: spec.operators: "},
		{"roll-out that falls back sooner", Swap("{refusals: 5, window: 1m}", "{refusals: 1, window: 1m}"), "Rollout later: spec.budget: "},
		{"service gone", without("ProtectedService", "cache", "services: [cache]", "services: [postgres]"), "ProtectedService cache: is gone"},
		{"port gone", Swap("ports: [5432, 5433]", "ports: [5432]"), "ProtectedService postgres: spec.ports: 5433 was removed"},
		{"address gone", Swap(`["10.2.0.2", "fd00:2::2"]`, `["10.2.0.2"]`), "spec.addresses: fd00:2::2 was removed"},
		{"mode left", Swap("target: Pod, ports: [6379]", "target: Pod, mode: Shadow, ports: [6379]"), "ProtectedService cache: spec.mode: Enforce became Shadow"},
		{"mode left for less", Swap("target: Pod, ports: [6379]", "target: Pod, mode: Observe, ports: [6379]"), "ProtectedService cache: spec.mode: Enforce became Observe"},
		{"probes let in", Swap("device: veth1}", "device: veth1, probes: {ports: [6379], cgroup: /system.slice/kubelet.service}}"), "ProtectedService cache: spec.probes: none became"},
		{"UDP of nobody's", Plus("ProtectedService\nmetadata: {name: quic}\nspec: {target: Host, protocol: UDP, mode: Observe, ports: [5432]}\n"),
			"ProtectedService quic: spec.ports: UDP to 5432 was refused by postgres, and is not any more"},
		{"another device", Swap("device: veth1", "device: veth2"), "spec.device: veth1 became veth2"},
		{"another target", Swap(`target: Pod, ports: [6379], addresses: ["10.2.0.2", "fd00:2::2"], device: veth1`, "target: Host, ports: [6379]"), "spec.target: Pod became Host"},
		{"another protocol", Swap("ports: [6379],", "ports: [6379], protocol: UDP,"), "spec.protocol: TCP became UDP"},
		{"UDP allowed", Swap("udp: Deny", "udp: Allow"), "spec.udp: Deny became Allow"},
		{"longer idle", Swap("idle: 30s", "idle: 31s"), "spec.idle: 30s became 31s"},
		{"identity let in", Swap(`"spiffe://example.org/app/web"`, `"spiffe://example.org/app/web", "spiffe://example.org/app/x"`), "spec.access: spiffe://example.org/app/x was added"},
		{"pattern wider", Swap(`"spiffe://example.org/ops/*"`, `"spiffe://example.org/*"`), "spec.access: spiffe://example.org/* was added"},
		{"port taken by another service", Plus("ProtectedService\nmetadata: {name: mine}\nspec: {target: Pod, ports: [5432], addresses: [10.1.0.1], access: [{identities: [\"spiffe://example.org/me\"]}]}\n"),
			"ProtectedService mine: spec.ports: 5432 is taken at a place that postgres may have"},
		{"port taken by a service that is there", Swap("ports: [6379]", "ports: [6379, 5433]"), "ProtectedService cache: spec.ports: 5433 is taken"},

		{"bytes instead of requests", func(s string) string {
			i, j := strings.Index(s, "  http:\n"), strings.Index(s, "---\napiVersion: sallyport.dev/v1alpha1\nkind: IdentityProvider")
			return s[:i] + s[j:]
		}, "ProtectedService web: spec.http: "},
		{"requests instead of bytes", Swap("target: Host, ports: [5432, 5433]", "target: Host, http: {}, ports: [5432, 5433]"), "ProtectedService postgres: spec.http: none became"},
		{"another audience", Swap(`    audiences: ["https://web.example.org"]`, `    audiences: ["https://web.example.org", other]`), "spec.http.audiences: other was added"},
		{"another provider", func(s string) string {
			return Swap("providers: [corp]", "providers: [corp, mine]")(s) + doc + "IdentityProvider\nmetadata: {name: mine}\nspec: {issuer: \"https://mine.example.org\", audiences: [a]}\n"
		}, "spec.http.providers: mine was added"},
		{"login", Swap("    certificate: web", "    login: corp\n    certificate: web"), "spec.http.login: none became corp"},
		{"another certificate", Swap("    certificate: web", "    certificate: other"), "spec.http.certificate: web became other"},
		{"another host", Swap("    hosts: [web.example.org]", "    hosts: [web.example.org, a.example.org]"), "spec.http.hosts: a.example.org was added"},
		{"any host", Swap("    hosts: [web.example.org]\n", ""), "spec.http.hosts: - web.example.org became none"},
		{"upstream in plaintext", Swap("    upstream: {tls: {serverName: backend.example.org}}\n", ""), "spec.http.upstream.tls: "},
		{"another upstream", Swap("serverName: backend.example.org", "serverName: other.example.org"), "spec.http.upstream.tls: "},
		{"larger header", Swap("limits: {", "limits: {headerBytes: 64KiB, "), "spec.http.limits.headerBytes: 32KiB became 64KiB"},
		{"larger body", Swap("bodyBytes: 1MiB", "bodyBytes: 2MiB"), "spec.http.limits.bodyBytes: 1MiB became 2MiB"},
		{"any body", Swap("bodyBytes: 1MiB, ", ""), "spec.http.limits.bodyBytes: 1MiB became 0B"},
		{"slower header", Swap("limits: {", "limits: {headerTimeout: 11s, "), "spec.http.limits.headerTimeout: 10s became 11s"},
		{"slower body", Swap("limits: {", "limits: {bodyTimeout: 31s, "), "spec.http.limits.bodyTimeout: 30s became 31s"},
		{"fewer bytes a second", Swap("bodyRate: 1KiB, ", ""), "spec.http.limits.bodyRate: 1KiB became 0B"},
		{"more streams", Swap("limits: {", "limits: {streams: 101, "), "spec.http.limits.streams: 100 became 101"},
		{"more requests", Swap("requestsPerMinute: 600", "requestsPerMinute: 601"), "spec.http.limits.requestsPerMinute: 600 became 601"},
		{"any number of requests", Swap(", requestsPerMinute: 600", ""), "spec.http.limits.requestsPerMinute: 600 became 0"},
		{"a rule more", Swap("  access:\n    - identities", "  access:\n    - subjects: [corp/alice]\n    - identities"), "spec.access: corp/alice was added"},
		{"a group more", Swap("groups: [corp/admins]", "groups: [corp/admins, corp/staff]"), "spec.access: corp/staff ("},
		{"every subject", Swap("groups: [corp/admins]", "groups: [corp/admins]\n      subjects: [\"corp/*\"]"), "spec.access: corp/* ("},
		{"another method", Swap("methods: [GET]", "methods: [GET, POST]"), "spec.access: spiffe://example.org/app/web ("},
		{"any method", Swap("methods: [GET], ", ""), "spec.access: spiffe://example.org/app/web ("},
		{"wider path", Swap("paths: [/public/*]", "paths: [/*]"), "spec.access: spiffe://example.org/app/web ("},
		{"another path", Swap("paths: [/public/*]", "paths: [/public/*, /private]"), "spec.access: spiffe://example.org/app/web ("},
		{"any path", Swap("paths: [/public/*], ", ""), "spec.access: spiffe://example.org/app/web ("},
		{"any host of a route", Swap(", hosts: [web.example.org], headers", ", headers"), "spec.access: spiffe://example.org/app/web ("},
		{"any header", Swap(", headers: {x-team: blue}", ""), "spec.access: spiffe://example.org/app/web ("},
		{"another header", Swap("x-team: blue", "x-team: red"), "spec.access: spiffe://example.org/app/web ("},
		{"another route", Swap("routes: [{", "routes: [{methods: [PUT]}, {"), "spec.access: spiffe://example.org/app/web ("},
		{"every request", Swap("      routes: [{methods: [GET], paths: [/public/*], hosts: [web.example.org], headers: {x-team: blue}}]\n", ""), "spec.access: spiffe://example.org/app/web was added"},
		{"from more addresses", Swap(`from: ["10.1.0.0/24"]`, `from: ["10.1.0.0/23"]`), "spec.access: corp/admins ("},
		{"from anywhere", Swap("      from: [\"10.1.0.0/24\"]\n", ""), "spec.access: corp/admins ("},
		{"at other times", Swap("days: [Fri]", "days: [Fri, Sat]"), "spec.access: corp/admins ("},
		{"at any time", Swap("      during: [{days: [Fri], from: \"08:00\", to: \"18:00\"}]\n", ""), "spec.access: corp/admins ("},
		{"another condition of access", Swap("claims.mfa == true", "claims.mfa != false"), "spec.access: corp/admins ("},
		{"no condition of access", Swap("      when: 'claims.mfa == true'\n", ""), "spec.access: corp/admins ("},
		{"signal that is not required", Swap("source: edr, required: true", "source: edr"), "spec.access: corp/admins ("},
		{"signals by others", Swap("source: edr,", "source: edr, uids: [0, 7],"), "spec.access: corp/admins ("},
		{"no signal", Swap("      signals: [{source: edr, required: true}]\n", ""), "spec.access: corp/admins ("},

		{"provider new", Plus("IdentityProvider\nmetadata: {name: mine}\nspec: {issuer: \"https://mine.example.org\", audiences: [a]}\n"), "IdentityProvider mine: is new"},
		{"another issuer", Swap("https://login.example.org", "https://mine.example.org"), "spec.issuer: https://login.example.org became https://mine.example.org"},
		{"tokens for others", Swap("  audiences: [\"https://web.example.org\"]\n  algorithms", "  audiences: [\"https://web.example.org\", a]\n  algorithms"), "IdentityProvider corp: spec.audiences: a was added"},
		{"another algorithm", Swap("algorithms: [ES256]", "algorithms: [ES256, RS256]"), "spec.algorithms: RS256 was added"},
		{"another endpoint", Swap("algorithms: [ES256]", "algorithms: [ES256]\n  endpoints: [\"login.example.org:443\", \"10.0.0.1:443\"]"), "spec.endpoints: 10.0.0.1:443 was added"},
		{"another claim", Swap("algorithms: [ES256]", "algorithms: [ES256]\n  subjectClaim: email"), "spec.subjectClaim: sub became email"},
		{"another claim of groups", Swap("algorithms: [ES256]", "algorithms: [ES256]\n  groupsClaim: roles"), "spec.groupsClaim: groups became roles"},
		{"more skew", Swap("algorithms: [ES256]", "algorithms: [ES256]\n  skew: 31s"), "spec.skew: 30s became 31s"},
		{"keys for longer", Swap("algorithms: [ES256]", "algorithms: [ES256]\n  keep: 25h"), "spec.keep: 24h became 25h"},
		{"longer session", Swap("session: 4h", "session: 5h"), "spec.login.session: 4h became 5h"},
		{"longer silence", Swap("idle: 30m", "idle: 31m"), "spec.login.idle: 30m became 31m"},
		{"another client", Swap("clientID: sallyport", "clientID: other"), "spec.login.clientID: sallyport became other"},
		{"another secret", Swap("clientID: sallyport", "clientID: sallyport, clientSecretFile: /s"), "spec.login.clientSecretFile: none became /s"},
		{"more scopes", Swap("clientID: sallyport", "clientID: sallyport, scopes: [groups]"), "spec.login.scopes: none became - groups"},
		{"subject not denied", Swap("  subjects: [\"corp/mallory\"]\n", ""), "spec.subjects: corp/mallory was removed"},

		{"bypass policy new", Plus("BypassPolicy\nmetadata: {name: mine}\nspec: {services: [dns], bindings: [address], sources: [10.1.0.1], maxDuration: 1m, requesters: [alice]}\n"), "BypassPolicy mine: is new"},
		{"bypass policy gone", without("BypassPolicy", "plain"), "BypassPolicy plain: is gone"},
		{"for another service", Swap("services: [cache]", "services: [cache, dns]"), "spec.services: dns was added"},
		{"sources wider", Swap(`sources: ["10.1.0.0/24"]`, `sources: ["10.1.0.0/23"]`), "spec.sources: 10.1.0.0/23 was added"},
		{"the node's addresses", Swap("maxDuration: 15m, requesters", "maxDuration: 15m, nodeAddresses: true, requesters"), "spec.nodeAddresses: false became true"},
		{"longer", Swap("maxDuration: 15m", "maxDuration: 16m"), "spec.maxDuration: 15m became 16m"},
		{"class", Swap("class: Sensitive", "class: Routine"), "spec.class: Sensitive became Routine"},
		{"reach", Swap("maxReach: 8", "maxReach: 9"), "spec.maxReach: 8 became 9"},
		{"reach of the class", Swap("maxReach: 8", "maxReach: 0"), "spec.maxReach: 8 became 0"},
		{"another template", func(s string) string {
			return Swap("templates: [nightly]", "templates: [nightly, other]")(s) + doc + "GrantTemplate\nmetadata: {name: other}\nspec: {service: postgres, maxDuration: 1m}\n"
		}, "spec.templates: other was added"},
		{"no template", Swap("templates: [nightly]", "templates: []"), "spec.templates: - nightly became none"},
		{"any device", Swap("ingress: uplink", `ingress: ""`), "spec.ingress: uplink became none"},
		{"another device's kind", Swap("ingress: uplink", "ingress: pod"), "spec.ingress: uplink became pod"},
		{"budget", Swap("bytes: 10GiB", "bytes: 11GiB"), "spec.maxBudget.bytes: 10GiB became 11GiB"},
		{"no budget", Swap(", connections: 5", ""), "spec.maxBudget.connections: 5 became no limit"},
		{"another requester", Swap(`requesters: [alice, "group:dba"]`, `requesters: [alice, "group:dba", carol]`), "spec.requesters: carol was added"},
		{"requests by more workloads", Swap(`requesters: [alice, "group:dba"]`, `requesters: [alice, "group:dba", "spiffe://example.org/batch/*"]`), "spec.requesters: spiffe://example.org/batch/* was added"},
		{"idle for longer", Swap("idleTimeout: 5m", "idleTimeout: 6m"), "spec.idleTimeout: 5m became 6m"},
		{"source that is not required", Swap("may: [Revoke], required: true", "may: [Revoke]"), "spec.signals: "},
		{"source gone", Swap("  signals: [{source: posture, may: [Revoke], required: true}]\n", ""), "spec.signals: "},
		{"idle for ever", Swap("  idleTimeout: 5m\n", ""), "spec.idleTimeout: 5m became 0s"},
		{"other reviewers", Swap("reviewers: [bob]", "reviewers: [carol]"), "spec.reviewers"},
		{"another binding", Swap("bindings: [address]", "bindings: [address, workload]"), "spec.bindings: workload was added"},
		{"approval gone", Swap(", {from: [bob], min: 1}]", "]"), "spec.approvals: from: - bob min: 1 is not asked for any more"},
		{"approval by one less", Swap("carol], min: 2}", "carol], min: 1}"), "is not asked for any more"},
		{"approval by others", Swap("{from: [bob], min: 1}", "{from: [bob, carol], min: 1}"), "is not asked for any more"},
		{"no ticket", func(s string) string {
			return strings.NewReplacer("required: true", "required: false", "class: Sensitive", "class: Routine").Replace(s)
		}, "spec.ticket.required: true became false"},
		{"another ticket", Swap("OPS-[0-9]+", "[A-Z]+-[0-9]+"), "spec.ticket.pattern: OPS-[0-9]+ became [A-Z]+-[0-9]+"},
		{"no pattern", Swap(`, pattern: "OPS-[0-9]+"`, ""), "spec.ticket.pattern: OPS-[0-9]+ became none"},
		{"another window", Swap("days: [Mon]", "days: [Mon, Tue]"), "spec.windows"},
		{"no window", Swap(`windows: [{days: [Mon], from: "22:00", to: "06:00"}]`, "windows: []"), "became none"},
		{"another condition", Swap(`when: 'ticket != ""'`, "when: 'true'"), "spec.when"},
		{"no condition", Swap(`when: 'ticket != ""'`, `when: ""`), "spec.when"},
		{"later end", Swap("notAfter: 2030-01-01T00:00:00Z\n---", "notAfter: 2030-01-01T00:00:01Z\n---"), "BypassPolicy backup: spec.notAfter"},
		{"no end", Swap("  notAfter: 2030-01-01T00:00:00Z\n---", "---"), "spec.notAfter: 2030-01-01T00:00:00Z became never"},

		{"template longer", Swap("maxDuration: 10m", "maxDuration: 11m"), "GrantTemplate nightly: is not what it was"},
		{"template gone", without("GrantTemplate", "nightly", "templates: [nightly]", "templates: []"), "GrantTemplate nightly: is gone"},

		{"keyring new", Plus("Keyring\nmetadata: {name: mine}\nspec: {version: 1, people: [{name: me, keys: [{publicKey: \"" + daveKey + "\"}]}]}\n"), "Keyring mine: is new"},
		{"keyring gone", func(s string) string {
			s = without("Keyring", "operators")(s)
			s = without("BypassPolicy", "plain")(s)
			s = without("Rollout", "later")(s)
			return without("BypassPolicy", "backup")(s)
		}, "Keyring operators: is gone"},
		{"keyring older", Swap("version: 3", "version: 2"), "spec.version: 3 became 2"},
		{"keyring for longer", Swap("notAfter: 2031-01-01T00:00:00Z", "notAfter: 2032-01-01T00:00:00Z"), "Keyring operators: spec.notAfter"},
		{"person new", Swap("  groups:", "    - {name: dave, keys: [{publicKey: \""+daveKey+"\"}]}\n  groups:"), "spec.people: dave was added"},
		{"key new", Swap("{name: bob, keys: [", "{name: bob, keys: [{publicKey: \""+daveKey+"\"}, "), "spec.people.bob: the key sp:"},
		{"key of somebody else", func(s string) string { return strings.NewReplacer(bobKey, aliceKey, aliceKey, bobKey).Replace(s) }, "spec.people.bob: the key sp:"},
		{"key for longer", Swap("notAfter: 2030-01-01T00:00:00Z, uses", "notAfter: 2030-01-02T00:00:00Z, uses"), "spec.people.alice.sp:"},
		{"key for good", Swap("notAfter: 2030-01-01T00:00:00Z, uses", "uses"), "became never"},
		{"key for more", Swap("uses: [request]", "uses: [request, resources]"), ".uses"},
		{"key for requests and approvals", Swap(", uses: [request]", ""), ".uses"},
		{"group new", Swap("groups: [", "groups: [{name: all, members: [carol]}, "), "spec.groups: all was added"},
		{"member new", Swap("members: [alice, bob]", "members: [alice, bob, carol]"), "spec.groups.dba: carol was added"},
		{"key counts again", Swap(`revokedKeys: ["sp:0000000000000000"]`, "revokedKeys: []"), "spec.revokedKeys: sp:0000000000000000 was removed"},

		{"deny list gone", without("DenyList", "incident"), "DenyList incident: is gone"},
		{"deny list ends sooner", Swap("stolen laptop\n  notAfter: 2030", "stolen laptop\n  notAfter: 2029"), "DenyList incident: spec.notAfter"},
		{"identity not denied", Swap(`["spiffe://example.org/old/*"]`, `["spiffe://example.org/old/a"]`), "spec.identities: spiffe://example.org/old/* was removed"},
		{"person not denied", Swap("people: [mallory]", "people: []"), "spec.people: mallory was removed"},
		{"service not denied", Swap("services: [dns]", "services: []"), "spec.services: dns was removed"},
		{"address not denied", Swap(`["10.9.0.0/24"]`, `["10.9.0.0/25"]`), "spec.addresses: 10.9.0.0/24 was removed"},
		{"grant not denied", Swap(`grants: ["`+grantID+`"]`, "grants: []"), "spec.grants: " + grantID + " was removed"},

		{"remote service gone", without("RemoteService", "orders"), "RemoteService orders: is gone"},
		{"remote address gone", Swap(`["10.9.0.5", "fd00:9::5"]`, `["10.9.0.5"]`), "RemoteService orders: spec.addresses: fd00:9::5 was removed"},
		{"remote port gone", Swap("ports: [7000, 7001]", "ports: [7001]"), "RemoteService orders: spec.ports: 7000 was removed"},
		{"remote address of another service", func(s string) string {
			return Swap(`["10.9.0.5", "fd00:9::5"]`, `["10.9.0.5"]`)(s) + doc +
				"RemoteService\nmetadata: {name: mine}\nspec: {addresses: [\"fd00:9::5\"], ports: [7000, 7001], identities: [\"spiffe://example.org/me\"], callers: [\"spiffe://example.org/*\"]}\n"
		}, "RemoteService orders: spec.addresses: fd00:9::5 was removed"},
		{"others may answer", Swap(`"spiffe://example.org/node-b"`, `"spiffe://example.org/node-b", "spiffe://example.org/me"`), "RemoteService orders: spec.identities: spiffe://example.org/me was added"},
		{"others may ask", Swap(`"spiffe://example.org/shop/*"`, `"spiffe://example.org/*"`), "RemoteService orders: spec.callers: spiffe://example.org/* was added"},
		{"in the clear", Swap("ports: [7000, 7001]", "without: pass, ports: [7000, 7001]"), "RemoteService orders: spec.without: refuse became pass"},

		{"version", Swap("version: 4", "version: 5"), "ResourceSet all: is not what it was"},
		{"signers", Swap("signers: 2", "signers: 1"), "ResourceSet all: is not what it was"},
		{"no version", without("ResourceSet", "all"), "ResourceSet all: is gone"},
		{"another name of the set", Swap("{name: all}", "{name: other}"), "ResourceSet other: is new"},
	}
}
