package policy_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// good is a set with every field of every kind of resource.
const good = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec:
  target: Host
  ports: [5432]
  access:
    - identities: ["spiffe://example.org/app/web", "spiffe://example.org/ops/*"]
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata:
  name: cache
spec:
  target: Pod
  protocol: TCP
  ports: [6379, 6380]
  addresses: ["10.2.0.2", "fd00:2::2"]
  device: veth1a2b
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: nightly-backup}
spec:
  services: [postgres]
  bindings: [address]
  sources: ["10.1.0.2", "10.1.0.0/24", "fd00:1::/64"]
  nodeAddresses: false
  maxDuration: 15m
  requesters: [alice]
  ticket: {required: false}
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people:
    - name: alice
      keys:
        - publicKey: "` + aliceKey + `"
          notAfter: 2027-01-01T00:00:00Z
`

const (
	aliceKey = "ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik="
	bobKey   = "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
	head     = "apiVersion: sallyport.dev/v1alpha1\nkind: "
)

func mustParse(t testing.TB, text string) *policy.Set {
	t.Helper()
	s, err := policy.Parse("resources.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestParseKeepsEveryField(t *testing.T) {
	s := mustParse(t, good)
	pg, ok := s.Service("postgres")
	if !ok || pg.Spec.Protocol != policy.ProtocolTCP || pg.Spec.Target != policy.TargetHost {
		t.Errorf("postgres is %+v", pg)
	}
	if got := pg.Source.String(); got != "resources.yaml:1" {
		t.Errorf("postgres was read at %s", got)
	}
	if c, _ := s.Service("cache"); c.Source.Line != 10 || c.Spec.Device != "veth1a2b" || len(c.Spec.Addresses) != 2 {
		t.Errorf("cache is %+v", c)
	}
	b := s.BypassPolicies()[0]
	if b.Spec.MaxDuration.String() != "15m" || len(b.Spec.Sources) != 3 || b.Spec.Requesters[0] != "alice" {
		t.Errorf("bypass policy is %+v", b)
	}
	k := s.Keyrings()[0].Spec.People[0]
	if k.Keys[0].PublicKey.String() != aliceKey || k.Keys[0].NotAfter.Year() != 2027 {
		t.Errorf("person is %+v", k)
	}
}

// wrong is one change to the good set that must give exactly one error.
type wrong struct {
	name     string
	old, new string
	at       string // text of the line that the error must name
	field    string
	msg      string
}

var wrongs = []wrong{
	// syntax and shape
	{"bracket left open", "[5432]", "[5432", "ports: [5432", "", "not valid YAML"},
	{"tab for indentation", "  target: Host", "\ttarget: Host", "\ttarget: Host", "", "not valid YAML"},
	{"unknown key", "  target: Host", "  target: Host\n  prots: [1]", "prots: [1]", "spec.prots", "unknown key"},
	{"unknown key at the top", "metadata: {name: postgres}", "metadata: {name: postgres}\nspce: {}", "spce", "spce", "unknown key"},
	{"unknown key in metadata", "{name: postgres}", "{name: postgres, lables: {}}", "lables", "metadata.lables", "unknown key"},
	{"unknown key deep down", "- identities: [", "- ids: []\n      identities: [", "ids: []", "spec.access[0].ids", "unknown key"},
	{"key twice", "  target: Host", "  target: Host\n  target: Host", "target: Host\n  ports", "spec.target", "is given twice, first on line 5"},
	{"key without value", "ports: [5432]", "ports:", "ports:\n", "spec.ports", "has no value"},
	{"list for a text", "target: Host", "target: [Host]", "target: [Host]", "spec.target", "want text, got a list"},
	{"number for a text", "name: postgres}", "name: 5432}", "name: 5432", "metadata.name", "want text, got the number 5432"},
	{"truth value for a text", "target: Host", "target: true", "target: true", "spec.target", "want text, got the truth value true"},
	{"time for a text", "target: Host", "target: 2027-01-01", "target: 2027", "spec.target", "want text, got the time 2027-01-01"},
	{"text for a list", "ports: [5432]", "ports: 5432", "ports: 5432", "spec.ports", "want a list, got the number 5432"},
	{"text for a mapping", "metadata: {name: postgres}", "metadata: postgres", "metadata: postgres", "metadata", "want a mapping"},
	{"text for a truth value", "nodeAddresses: false", "nodeAddresses: \"no\"", "nodeAddresses", "spec.nodeAddresses", "want true or false"},
	{"anchor", "ports: [5432]", "ports: &p [5432]", "&p", "spec.ports", "anchors and aliases"},
	{"tag", "target: Host", "target: !!str Host", "!!str", "spec.target", "tag"},
	{"merge key", "  target: Host", "  target: Host\n  <<: {device: a}", "<<", `spec."<<"`, "unknown key"},
	{"key that is a list", "  target: Host", "  target: Host\n  ? [a]\n  : b", "? [a]", "spec.", "a key is not plain text"},
	{"no resource", "T00:00:00Z\n", "T00:00:00Z\n---\njust text\n", "just text", "", "want a resource"},
	{"unknown version", "apiVersion: sallyport.dev/v1alpha1\nkind: Keyring", "apiVersion: sallyport.dev/v2\nkind: Keyring", "dev/v2", "apiVersion", `"sallyport.dev/v2"`},
	{"no kind", "kind: BypassPolicy\n", "", "apiVersion: sallyport.dev/v1alpha1\nmetadata: {name: nightly", "kind", "is missing"},
	{"unknown kind", "kind: BypassPolicy", "kind: BypassPolicies", "BypassPolicies", "kind", `"BypassPolicies" is not known`},
	{"configuration among resources", "kind: BypassPolicy", "kind: AgentConfig", "AgentConfig", "kind", "no part of a set"},

	// names
	{"no name", "metadata: {name: postgres}", "metadata: {}", "metadata: {}", "metadata.name", "is missing"},
	{"name in capitals", "name: cache", "name: Cache", "name: Cache", "metadata.name", "not a DNS label"},
	{"long name", "name: cache", "name: c" + strings.Repeat("a", 31), "name: caaa", "metadata.name", "the most is 31"},
	{"same name twice", "name: cache", "name: postgres", "name: postgres\nspec:\n  target: Pod", "metadata.name", "already taken at resources.yaml:1"},

	// services
	{"no target", "  target: Host\n", "", "spec:\n  ports: [5432]", "spec.target", "is missing"},
	{"unknown target", "target: Host", "target: Cluster", "Cluster", "spec.target", `"Cluster" is not known`},
	{"unknown mode", "protocol: TCP", "protocol: TCP\n  mode: shadow", "mode: shadow", "spec.mode", `mode "shadow" is not known`},
	{"mode that is no text", "protocol: TCP", "protocol: TCP\n  mode: [Observe]", "mode: [Observe]", "spec.mode", ""},
	{"unknown protocol", "protocol: TCP", "protocol: SCTP", "SCTP", "spec.protocol", `"SCTP" is not known`},
	{"UDP with access", "  target: Host\n", "  target: Host\n  protocol: UDP\n", "access:", "spec.access", "nothing proves who sent a datagram"},
	{"UDP with udp", "protocol: TCP", "protocol: UDP\n  udp: Deny", "udp: Deny", "spec.udp", "it is for TCP services"},
	{"unknown answer to UDP", "protocol: TCP", "protocol: TCP\n  udp: Drop", "udp: Drop", "spec.udp", `"Drop" is not known`},
	{"TCP with an idle time", "protocol: TCP", "protocol: TCP\n  idle: 30s", "idle: 30s", "spec.idle", "a TCP service has no idle time"},
	{"idle time too short", "protocol: TCP", "protocol: UDP\n  idle: 500ms", "idle: 500ms", "spec.idle", "500ms is not allowed"},
	{"idle time too long", "protocol: TCP", "protocol: UDP\n  idle: 61m", "idle: 61m", "spec.idle", "1h1m is not allowed"},
	{"idle time with a fraction", "protocol: TCP", "protocol: UDP\n  idle: 1500ms", "idle: 1500ms", "spec.idle", "1.5s is not allowed"},
	{"no ports", "  ports: [5432]\n", "", "spec:\n  target: Host", "spec.ports", "at least one port"},
	{"empty ports", "ports: [5432]", "ports: []", "ports: []", "spec.ports", "at least one port"},
	{"port 0", "[6379, 6380]", "\n    - 6379\n    - 0", "- 0", "spec.ports[1]", "0 is not a port"},
	{"port 65536", "[6379, 6380]", "[65536]", "65536", "spec.ports[0]", "from 0 to 65535, got 65536"},
	{"port -1", "[6379, 6380]", "[-1]", "[-1]", "spec.ports[0]", "got -1"},
	{"port in hex", "[6379, 6380]", "[0x10]", "0x10", "spec.ports[0]", "got 0x10"},
	{"port in octal", "[6379, 6380]", "[0010]", "0010", "spec.ports[0]", "got 0010"},
	{"port in words", "[6379, 6380]", "[redis]", "redis", "spec.ports[0]", `got the text "redis"`},
	{"port twice", "[6379, 6380]", "[6379, 6379]", "6379, 6379", "spec.ports[1]", "port 6379 is already spec.ports[0]"},
	{"host service with addresses", "  ports: [5432]", "  ports: [5432]\n  addresses: [10.0.0.1]", "[10.0.0.1]", "spec.addresses", "every local address"},
	{"host service with a device", "  ports: [5432]", "  ports: [5432]\n  device: eth0", "eth0", "spec.device", "has no device"},
	{"pod service without addresses", "  addresses: [\"10.2.0.2\", \"fd00:2::2\"]\n", "", "spec:\n  target: Pod", "spec.addresses", "at least one address"},
	{"bad address", `"fd00:2::2"`, `"fd00:2::g"`, "fd00:2::g", "spec.addresses[1]", "not an IP address"},
	{"prefix for an address", `"fd00:2::2"`, `"fd00:2::2/64"`, "/64", "spec.addresses[1]", "not an IP address"},
	{"v4-mapped address", `"fd00:2::2"`, `"::ffff:10.2.0.3"`, "::ffff", "spec.addresses[1]", "mapped into IPv6"},
	{"address with a zone", `"fd00:2::2"`, `"fe80::1%eth0"`, "%eth0", "spec.addresses[1]", "has a zone"},
	{"loopback pod address", `"fd00:2::2"`, `"::1"`, "::1", "spec.addresses[1]", "loopback"},
	{"unspecified pod address", `"fd00:2::2"`, `"::"`, `"::"`, "spec.addresses[1]", "every address"},
	{"multicast pod address", `"fd00:2::2"`, `"ff02::1"`, "ff02", "spec.addresses[1]", "one host"},
	{"broadcast pod address", `"fd00:2::2"`, `"255.255.255.255"`, "255.", "spec.addresses[1]", "one host"},
	{"link-local pod address", `"fd00:2::2"`, `"169.254.1.1"`, "169.", "spec.addresses[1]", "link-local"},
	{"address twice", `"fd00:2::2"`, `"10.2.0.2"`, `"10.2.0.2", "10.2.0.2"`, "spec.addresses[1]", "already spec.addresses[0]"},
	{"device with a slash", "device: veth1a2b", "device: a/b", "a/b", "spec.device", "network device"},
	{"device too long", "device: veth1a2b", "device: veth123456789012", "veth123456789012", "spec.device", "network device"},
	{"port of another host service", head + "BypassPolicy", head + "ProtectedService\nmetadata: {name: other}\nspec:\n  target: Host\n  ports: [5432]\n---\n" + head + "BypassPolicy",
		"ports: [5432]\n---", "spec.ports[0]", `port 5432 is already protected by "postgres" at resources.yaml:1`},
	{"port of another pod service", head + "BypassPolicy", head + "ProtectedService\nmetadata: {name: other}\nspec:\n  target: Pod\n  addresses: [fd00:2::2]\n  ports: [6380]\n---\n" + head + "BypassPolicy",
		"ports: [6380]\n---", "spec.ports[0]", `port 6380 is already protected by "cache" at resources.yaml:10`},

	// access
	{"rule without identities", `identities: ["spiffe://example.org/app/web", "spiffe://example.org/ops/*"]`, "identities: []", "identities: []", "spec.access[0].identities", "lets nobody in"},
	{"no SPIFFE ID", "spiffe://example.org/app/web", "example.org/app/web", "identities", "spec.access[0].identities[0]", "not a SPIFFE ID"},
	{"trust domain alone", "spiffe://example.org/app/web", "spiffe://example.org", "identities", "spec.access[0].identities[0]", "not a workload"},
	{"star within a segment", "spiffe://example.org/ops/*", "spiffe://example.org/ops*", "identities", "spec.access[0].identities[1]", "has a * that is not"},
	{"star in the middle", "spiffe://example.org/ops/*", "spiffe://example.org/*/ops", "identities", "spec.access[0].identities[1]", "has a * that is not"},
	{"star alone", "spiffe://example.org/ops/*", "*", "identities", "spec.access[0].identities[1]", "has a * that is not"},
	{"star for the trust domain", "spiffe://example.org/ops/*", "spiffe://*/*", "identities", "spec.access[0].identities[1]", "has a * that is not"},
	{"slash at the end", "spiffe://example.org/ops/*", "spiffe://example.org/ops/", "identities", "spec.access[0].identities[1]", "not a SPIFFE ID"},
	{"dot segment", "spiffe://example.org/ops/*", "spiffe://example.org/../*", "identities", "spec.access[0].identities[1]", "not a SPIFFE ID"},
	{"trust domain in capitals", "spiffe://example.org/ops/*", "spiffe://Example.org/ops/*", "identities", "spec.access[0].identities[1]", "not a SPIFFE ID"},

	// bypass policies
	{"missing service reference", "services: [postgres]", "services: [postgers]", "postgers", "spec.services[0]", `no ProtectedService is named "postgers"`},
	{"no services", "services: [postgres]", "services: []", "services: []", "spec.services", "at least one"},
	{"service twice", "services: [postgres]", "services: [postgres, postgres]", "postgres, postgres", "spec.services[1]", "already spec.services[0]"},
	{"no binding", "  bindings: [address]\n", "", "spec:\n  services", "spec.bindings", "at least one"},
	{"unknown binding", "bindings: [address]", "bindings: [host]", "host", "spec.bindings[0]", `"host" is not known`},
	{"requester that is no pattern", "requesters: [alice]", `requesters: ["spiffe://example.org/*/web"]`, "requesters", "spec.requesters[0]", "not a last segment"},
	{"requester that is a trust domain", "requesters: [alice]", `requesters: ["spiffe://example.org"]`, "requesters", "spec.requesters[0]", "not a workload"},
	{"no sources", `sources: ["10.1.0.2", "10.1.0.0/24", "fd00:1::/64"]`, "sources: []", "sources: []", "spec.sources", "at least one"},
	{"bad CIDR", `"10.1.0.0/24"`, `"10.1.0.0/33"`, "/33", "spec.sources[1]", "neither an IP address nor a prefix"},
	{"mapping for a source", `"10.1.0.0/24"`, "{a: b}", "{a: b}", "spec.sources[1]", "want one value, got a mapping"},
	{"CIDR with host bits", `"10.1.0.0/24"`, `"10.1.0.9/24"`, "/24", "spec.sources[1]", "bits set beyond"},
	{"v4-mapped source", `"10.1.0.2"`, `"::ffff:10.1.0.2"`, "::ffff", "spec.sources[0]", "mapped into IPv6"},
	{"v4-mapped CIDR", `"10.1.0.2"`, `"::ffff:10.1.0.0/120"`, "::ffff", "spec.sources[0]", "mapped into IPv6"},
	{"source with a zone", `"10.1.0.2"`, `"fe80::1%eth0"`, "%eth0", "spec.sources[0]", "has a zone"},
	{"every address", `"10.1.0.2"`, `"0.0.0.0/0"`, "0.0.0.0/0", "spec.sources[0]", "means every address"},
	{"multicast source", `"10.1.0.2"`, `"224.0.0.0/4"`, "224", "spec.sources[0]", "one host"},
	{"loopback without nodeAddresses", `"10.1.0.2"`, `"127.0.0.1"`, "127.0.0.1", "spec.sources[0]", "is loopback"},
	{"source twice", `"10.1.0.0/24"`, `"10.1.0.2/32"`, "/32", "spec.sources[1]", "already spec.sources[0]"},
	{"duration 0", "maxDuration: 15m", "maxDuration: 0s", "maxDuration", "spec.maxDuration", "must be more than 0"},
	{"no duration", "  maxDuration: 15m\n", "", "spec:\n  services", "spec.maxDuration", "must be more than 0"},
	{"negative duration", "maxDuration: 15m", "maxDuration: -5m", "maxDuration", "spec.maxDuration", "must be more than 0"},
	{"idle too short", "maxDuration: 15m", "maxDuration: 15m\n  idleTimeout: 1s", "idleTimeout", "spec.idleTimeout", "less than 5s"},
	{"warning at the end", "maxDuration: 15m", "maxDuration: 15m\n  warnBefore: [0s]", "warnBefore", "spec.warnBefore[0]", "is not between 0 and 24h"},
	{"source that may nothing", "maxDuration: 15m", "maxDuration: 15m\n  signals: [{source: posture}]", "signals: [{", "spec.signals[0].may", "needs at least one entry"},
	{"source that may widen", "maxDuration: 15m", "maxDuration: 15m\n  signals: [{source: posture, may: [Widen]}]", "signals: [{", "spec.signals[0].may[0]", "nothing that a signal may do"},
	{"required source that cannot revoke", "maxDuration: 15m", "maxDuration: 15m\n  signals: [{source: posture, may: [Lower], required: true}]", "signals: [{", "spec.signals[0].required", "revokes by its silence"},
	{"source twice", "maxDuration: 15m", "maxDuration: 15m\n  signals: [{source: breadth}, {source: breadth}]", "signals: [{", "spec.signals[1].source", "is already spec.signals[0]"},
	{"built-in source with users", "maxDuration: 15m", "maxDuration: 15m\n  signals: [{source: breadth, may: [Revoke]}]", "signals: [{", "spec.signals[0].source", "is built in"},
	{"source with a threshold", "maxDuration: 15m", "maxDuration: 15m\n  signals: [{source: posture, may: [Revoke], above: 3}]", "signals: [{", "spec.signals[0].source", "are for what is built in"},
	{"out of no hours", "maxDuration: 15m", "maxDuration: 15m\n  signals: [{source: outOfHours, revoke: true}]", "signals: [{", "spec.signals[0].hours", "which needs them"},
	{"more than all of a budget", "maxDuration: 15m", "maxDuration: 15m\n  signals: [{source: nearBudget, above: 101}]", "signals: [{", "spec.signals[0].above", "cannot be used"},
	{"duration over the cap", "maxDuration: 15m", "maxDuration: 24h0m1s", "maxDuration", "spec.maxDuration", "over the cap of 24h"},
	{"duration without unit", "maxDuration: 15m", "maxDuration: 15", "maxDuration", "spec.maxDuration", "not a duration"},
	{"no signers", "requesters: [alice]", "requesters: []", "requesters", "spec.requesters", "at least one"},
	{"ticket pattern", "ticket: {required: false}", "ticket: {pattern: \"OPS-[\"}", "ticket:", "spec.ticket.pattern", "no regular expression"},
	{"window of no time", "requesters: [alice]", "requesters: [alice]\n  windows: [{from: \"22:00\", to: \"22:00\"}]", "windows", "spec.windows[0].to", "is none"},
	{"window without an end", "requesters: [alice]", "requesters: [alice]\n  windows: [{from: \"00:00\"}]", "windows", "spec.windows[0].to", "is none"},
	{"window from the end of a day", "requesters: [alice]", "requesters: [alice]\n  windows: [{from: \"24:00\", to: \"01:00\"}]", "windows", "spec.windows[0].from", "end of a day"},
	{"time of day", "requesters: [alice]", "requesters: [alice]\n  windows: [{from: \"9:00\", to: \"22:00\"}]", "windows", "spec.windows[0].from", "is not a time of day"},
	{"day", "requesters: [alice]", "requesters: [alice]\n  windows: [{days: [Monday], from: \"09:00\", to: \"22:00\"}]", "Monday", "spec.windows[0].days[0]", "not a day of the week"},
	{"time zone", "requesters: [alice]", "requesters: [alice]\n  windows: [{timezone: Berlin, from: \"09:00\", to: \"22:00\"}]", "Berlin", "spec.windows[0].timezone", "not a time zone"},
	{"time zone of the machine", "requesters: [alice]", "requesters: [alice]\n  windows: [{timezone: Local, from: \"09:00\", to: \"22:00\"}]", "Local", "spec.windows[0].timezone", "not a time zone"},
	{"condition", "requesters: [alice]", "requesters: [alice]\n  when: tiket == \"\"", "when", "spec.when", "undeclared reference to 'tiket'"},
	{"condition of two lines", "requesters: [alice]", "requesters: [alice]\n  when: \"ticket == 'a\\n\"", "when", "spec.when", "token recognition error"},
	{"pattern of two lines", "ticket: {required: false}", "ticket: {pattern: \"(a\\n\"}", "pattern", "spec.ticket.pattern", "missing closing )"},
	{"condition that is none", "requesters: [alice]", "requesters: [alice]\n  when: ticket", "when", "spec.when", "gives string"},
	{"deny list of nothing", "kind: Keyring\n", "kind: DenyList\nmetadata: {name: d}\nspec: {reason: r}\n---\napiVersion: sallyport.dev/v1alpha1\nkind: Keyring\n", "spec: {reason: r}", "spec", "denies nothing"},
	{"deny list without a reason", "kind: Keyring\n", "kind: DenyList\nmetadata: {name: d}\nspec: {people: [bob]}\n---\napiVersion: sallyport.dev/v1alpha1\nkind: Keyring\n", "spec: {people: [bob]}", "spec.reason", "is missing"},
	{"deny list of no grant", "kind: Keyring\n", "kind: DenyList\nmetadata: {name: d}\nspec: {reason: r, grants: [x]}\n---\napiVersion: sallyport.dev/v1alpha1\nkind: Keyring\n", "spec: {reason: r", "spec.grants[0]", "not the id of a grant"},
	{"test of nothing", "requesters: [alice]", "requesters: [alice]\n  tests: [{name: t, expect: Maybe}]", "Maybe", "spec.tests[0].expect", "is neither"},
	{"test of what is refused for nothing", "requesters: [alice]", "requesters: [alice]\n  tests: [{name: t, expect: Allow, field: ticket}]", "field: ticket", "spec.tests[0].field", "refused for nothing"},
	{"test without a name", "requesters: [alice]", "requesters: [alice]\n  tests: [{expect: Allow}]", "tests:", "spec.tests[0].name", "is missing"},
	{"unknown group", "requesters: [alice]", "requesters: [\"group:dba\"]", "group:dba", "spec.requesters[0]", `no Keyring has a group "dba"`},
	{"unknown approver", "requesters: [alice]", "requesters: [alice]\n  approvals: [{from: [bob]}]", "bob", "spec.approvals[0].from[0]", `no Keyring has a person "bob"`},
	{"nobody to approve", "requesters: [alice]", "requesters: [alice]\n  approvals: [{min: 1}]", "approvals", "spec.approvals[0].from", "at least one"},
	{"more approvals than fit", "requesters: [alice]", "requesters: [alice]\n  approvals: [{from: [alice], min: 16}]", "approvals", "spec.approvals", "16 people are more than the 15"},
	{"keyring without a version", "  version: 1\n  people", "  people", "spec:\n  people", "spec.version", "is missing"},
	{"group of nobody", "  version: 1\n", "  version: 1\n  groups: [{name: dba, members: []}]\n", "groups", "spec.groups[0].members", "at least one"},
	{"group of strangers", "  version: 1\n", "  version: 1\n  groups: [{name: dba, members: [bob]}]\n", "groups", "spec.groups[0].members[0]", `no Keyring has a person "bob"`},
	{"group twice", "  version: 1\n", "  version: 1\n  groups: [{name: dba, members: [alice]}, {name: dba, members: [alice]}]\n", "groups", "spec.groups[1].name", "already at resources.yaml:38"},
	{"no id of a key", "  version: 1\n", "  version: 1\n  revokedKeys: [alice]\n", "revokedKeys", "spec.revokedKeys[0]", "not the id of a key"},
	{"unknown use", "          notAfter: 2027", "          uses: [aprove]\n          notAfter: 2027", "aprove", "spec.people[0].keys[0].uses[0]", `keys have no use "aprove"`},
	{"unknown signer", "requesters: [alice]", "requesters: [alcie]", "alcie", "spec.requesters[0]", `no Keyring has a person "alcie"`},
	{"empty signer", "requesters: [alice]", "requesters: [\"\"]", "requesters", "spec.requesters[0]", "is empty"},
	{"signer twice", "requesters: [alice]", "requesters: [alice, alice]", "alice, alice", "spec.requesters[1]", "already spec.requesters[0]"},

	// keyrings
	{"person without key", "      keys:\n        - publicKey: \"" + aliceKey + "\"\n          notAfter: 2027-01-01T00:00:00Z\n", "      keys: []\n", "keys: []", "spec.people[0].keys", "at least one key"},
	{"no people", good[strings.Index(good, "  people:"):], "  people: []\n", "people: []", "spec.people", "is empty"},
	{"person without name", "- name: alice\n      keys", "- keys", "- keys", "spec.people[0].name", "is missing"},
	{"bad person name", "- name: alice\n", "- name: \"alice \"\n", "alice \"", "spec.people[0].name", "not the name of a person"},
	{"key of another kind", aliceKey, "rsa:AAAA", "rsa:AAAA", "spec.people[0].keys[0].publicKey", "does not begin with ed25519:"},
	{"key cut off", aliceKey, "ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ", "ed25519:", "spec.people[0].keys[0].publicKey", "has 30 bytes instead of 32"},
	{"key not base64", aliceKey, "ed25519:????", "????", "spec.people[0].keys[0].publicKey", "not base64"},
	{"key with spare bits", aliceKey, strings.Replace(aliceKey, "ik=", "il=", 1), "ed25519:", "spec.people[0].keys[0].publicKey", "not base64"},
	{"key that anybody can use", aliceKey, "ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "ed25519:AAAA", "spec.people[0].keys[0].publicKey", "anybody can sign"},
	{"no key", `publicKey: "` + aliceKey + "\"\n          notAfter", "notAfter", "- notAfter", "spec.people[0].keys[0].publicKey", "is missing"},
	{"date for a time", "2027-01-01T00:00:00Z", "2027-01-01", "notAfter", "spec.people[0].keys[0].notAfter", "not a time"},
	{"year 0", "2027-01-01T00:00:00Z", "0000-01-01T00:00:00Z", "notAfter", "spec.people[0].keys[0].notAfter", "out of range"},
	{"person twice", "          notAfter: 2027-01-01T00:00:00Z\n", "    - name: alice\n      keys: [{publicKey: \"" + bobKey + "\"}]\n", "- name: alice\n      keys: [{", "spec.people[1].name", "already at resources.yaml:39"},
	{"key of two people", "          notAfter: 2027-01-01T00:00:00Z\n", "    - name: bob\n      keys: [{publicKey: \"" + aliceKey + "\"}]\n", "keys: [{", "spec.people[1].keys[0].publicKey", "is already at resources.yaml:41"},
}

func TestParseWrong(t *testing.T) {
	for _, w := range wrongs {
		t.Run(w.name, func(t *testing.T) {
			if !strings.Contains(good, w.old) {
				t.Fatalf("the good set does not have %q", w.old)
			}
			text := strings.Replace(good, w.old, w.new, 1)
			_, err := policy.Parse("resources.yaml", []byte(text))
			checkOne(t, text, err, w)
		})
	}
}

// checkOne holds an error to what is expected, and to what every error must have.
func checkOne(t *testing.T, text string, err error, w wrong) {
	t.Helper()
	errs := policy.Errors(err)
	if len(errs) != 1 {
		t.Fatalf("want one error, got %d:\n%v", len(errs), err)
	}
	e := errs[0]
	if at := strings.Index(text, w.at); at < 0 {
		t.Errorf("the text does not have %q", w.at)
	} else if line := 1 + strings.Count(text[:at], "\n"); e.Line != line && !strings.HasPrefix(w.msg, "not valid YAML") {
		t.Errorf("error is at line %d, want %d: %v", e.Line, line, e)
	}
	if !strings.HasPrefix(e.Field, w.field) || w.field == "" && e.Field != "" {
		t.Errorf("error names the field %q, want %q: %v", e.Field, w.field, e)
	}
	if !strings.Contains(e.Msg, w.msg) {
		t.Errorf("error says %q, want %q", e.Msg, w.msg)
	}
	if e.Hint == "" || e.File == "" || e.Line == 0 {
		t.Errorf("error lacks hint, file or line: %+v", e)
	}
	if strings.ContainsAny(e.Error(), "\n\t") {
		t.Errorf("error is not one line: %q", e.Error())
	}
}

func TestParseGivesAllErrorsInOrder(t *testing.T) {
	text := strings.NewReplacer(
		"target: Host", "target: Hsot",
		"[6379, 6380]", "[0, 70000]",
		"maxDuration: 15m", "maxDuration: 48h\n  colour: red",
		"services: [postgres]", "services: [mysql]",
	).Replace(good)
	_, err := policy.Parse("r.yaml", []byte(text))
	want := []string{
		`r.yaml:5: spec.target: target "Hsot" is not known`,
		`r.yaml:17: spec.ports[0]: 0 is not a port`,
		`r.yaml:17: spec.ports[1]: want a whole number from 0 to 65535, got 70000`,
		`r.yaml:25: spec.services[0]: no ProtectedService is named "mysql"`,
		`r.yaml:29: spec.maxDuration: 48h is over the cap of 24h`,
		`r.yaml:30: spec.colour: unknown key`,
	}
	var got []string
	for _, e := range policy.Errors(err) {
		got = append(got, e.Error())
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestParseBoundsErrors(t *testing.T) {
	var b strings.Builder
	b.WriteString(good + "---\n" + head + "ProtectedService\nmetadata: {name: x}\nspec:\n")
	for range 1000 {
		b.WriteString("  " + strings.Repeat("k", 500) + ": 1\n")
	}
	_, err := policy.Parse("r.yaml", []byte(b.String()))
	errs := policy.Errors(err)
	if len(errs) != 101 || !strings.Contains(errs[100].Msg, "more problems are not shown") {
		t.Errorf("got %d errors, the last %v", len(errs), errs[len(errs)-1])
	}
	for _, e := range errs {
		if len(e.Error()) > 1000 {
			t.Errorf("error has %d bytes", len(e.Error()))
		}
	}
}

func TestParseRefusesHugeText(t *testing.T) {
	_, err := policy.Parse("r.yaml", []byte(good+strings.Repeat("#", 16<<20)))
	if errs := policy.Errors(err); len(errs) != 1 || !strings.Contains(errs[0].Msg, "has more than 16777216 bytes") || errs[0].Hint == "" {
		t.Errorf("got %v", err)
	}
}

func TestParseEmptySetIsAnError(t *testing.T) {
	keyring := good[strings.LastIndex(good, "---"):]
	for name, text := range map[string]string{
		"nothing":          "",
		"comment":          "# nothing here\n",
		"document marks":   "---\n---\n",
		"only a keyring":   keyring,
		"byte order marks": "\ufeff",
	} {
		t.Run(name, func(t *testing.T) {
			s, err := policy.Parse("r.yaml", []byte(text))
			errs := policy.Errors(err)
			if s != nil || len(errs) != 1 || !strings.Contains(errs[0].Msg, "no ProtectedService") || errs[0].Hint == "" {
				t.Errorf("got %v, %v", s, err)
			}
		})
	}
}

func TestSuggestions(t *testing.T) {
	for _, c := range []struct{ old, new, hint string }{
		{"  target: Host", "  taget: Host", "did you mean target?"},
		{"  target: Host", "  target: Host\n  somethingElse: 1", "known here: access, addresses, device, http, idle, mode, podSelector, ports, probes, protocol, target, tests, tokens, udp"},
		{"services: [postgres]", "services: [Postgres]", "did you mean postgres?"},
		{"requesters: [alice]", "requesters: [bob]", "known here: alice"},
		{`"10.1.0.0/24"`, `"10.1.0.9/24"`, "write 10.1.0.0/24, or the address alone"},
		{`"10.1.0.0/24"`, `"::ffff:10.1.0.0/120"`, "write 10.1.0.0/24"},
		{`"10.1.0.2"`, `"::ffff:10.1.0.2"`, "write 10.1.0.2"},
	} {
		_, err := policy.Parse("r.yaml", []byte(strings.Replace(good, c.old, c.new, 1)))
		if e, ok := errors.AsType[*policy.Error](err); !ok || !hasHint(err, c.hint) {
			t.Errorf("%s: want the hint %q, got %q (%v)", c.new, c.hint, e.Hint, err)
		}
	}
}

func hasHint(err error, hint string) bool {
	for _, e := range policy.Errors(err) {
		if e.Hint == hint {
			return true
		}
	}
	return false
}
