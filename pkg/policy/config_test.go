package policy_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const goodConfig = `apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: node-1}
spec:
  trustDomain: example.org
  resources: /etc/sallyport/resources.d
  policySignatures: off
  policyKeys: []
  stateDir: /var/lib/sallyport
  runDir: /run/sallyport
  bpffs: /sys/fs/bpf
  workloadAPI: unix:///run/spire/sockets/agent.sock
  workloads: {api: none}
  devices: {pods: ["veth*", "cali*"], ignore: []}
  hooks: auto
  xdp: {mode: auto, denySources: [], synsPerSource: {rate: 0, burst: 0}, synsPerService: {rate: 0, burst: 0}}
  lease: 15s
  collector: {address: "10.9.0.1:9443", id: "spiffe://example.org/sallyport/collector"}
  flowBuffer: 65536
  flowSpool: 512MiB
  metrics: "127.0.0.1:9469"
  operators: {uids: [0], gids: []}
  proxy: {uid: 65532, gid: 65532, listenPort: 15001, maxConnections: 10000, handshakeTimeout: 5s, idleTimeout: 1h, expiryGrace: 30s, dialTimeout: 5s, drainTimeout: 10s}
`

const shortConfig = `apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: node-1}
spec: {trustDomain: example.org}
`

func TestParseAgentConfig(t *testing.T) {
	full, err := policy.ParseAgentConfig("agent.yaml", []byte(goodConfig))
	if err != nil {
		t.Fatal(err)
	}
	short, err := policy.ParseAgentConfig("agent.yaml", []byte(shortConfig))
	if err != nil {
		t.Fatal(err)
	}
	// The full one writes the defaults out, but for what has none.
	want := full
	want.Spec.Collector, want.Spec.Metrics = nil, ""
	want.Spec.PolicyKeys = nil
	want.Spec.Devices.Ignore, want.Spec.Operators.GIDs, want.Spec.XDP.DenySources = nil, nil, nil
	if !reflect.DeepEqual(short, want) {
		t.Errorf("defaults are\n%+v\nwant\n%+v", short, want)
	}
	if full.Spec.Lease.Duration != 15*time.Second || full.Spec.Metrics != "127.0.0.1:9469" || full.Spec.Collector.Address != "10.9.0.1:9443" {
		t.Errorf("full configuration is %+v", full)
	}
}

func TestAgentConfigDefaultsAreFresh(t *testing.T) {
	a := policy.DefaultAgentConfig()
	a.Spec.Devices.Pods[0] = "changed"
	if b := policy.DefaultAgentConfig(); b.Spec.Devices.Pods[0] == "changed" {
		t.Error("two defaults share memory")
	}
}

func TestAgentConfigNames(t *testing.T) {
	c, err := policy.ParseAgentConfig("agent.yaml", []byte(shortConfig))
	if err != nil {
		t.Fatal(err)
	}
	for got, want := range map[string]string{
		c.AgentSocket():          "/run/sallyport/agent.sock",
		c.ProxySocket():          "/run/sallyport/proxy.sock",
		c.PxPath():               "/run/sallyport/px",
		c.PolicyFile():           "/run/sallyport/policy.yaml",
		c.LockFile():             "/run/sallyport/agent.pid",
		c.GuardFile():            "/run/sallyport/guard.lock",
		c.PinDir():               "/sys/fs/bpf/sallyport",
		c.AgentID().String():     "spiffe://example.org/sallyport/agent/node-1",
		c.ProxyID().String():     "spiffe://example.org/sallyport/proxy/node-1",
		c.CollectorID().String(): "spiffe://example.org/sallyport/collector",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// TestAgentConfigForANode: one file is that of many nodes, and each has a name and identities of its own.
func TestAgentConfigForANode(t *testing.T) {
	c, err := policy.ParseAgentConfig("agent.yaml", []byte(shortConfig))
	if err != nil {
		t.Fatal(err)
	}
	other, err := c.For("ip-10-0-0-1.example.org")
	if err != nil || other.Name != "ip-10-0-0-1.example.org" || other.ProxyID().Path() != "/sallyport/proxy/ip-10-0-0-1.example.org" {
		t.Errorf("%s, %v", other.Name, err)
	}
	if same, err := c.For(""); err != nil || same.Name != c.Name {
		t.Errorf("without a name: %s, %v", same.Name, err)
	}
	for _, wrong := range []string{"no node", "../x", "Node"} {
		if _, err := c.For(wrong); err == nil || !strings.Contains(err.Error(), "is not the name of a node") {
			t.Errorf("%q: %v", wrong, err)
		}
	}
}

func TestAgentConfigTakes(t *testing.T) {
	for _, c := range []struct{ old, new string }{
		{"ignore: []", `ignore: ["docker0", "br-*"]`},
		{"pods: [\"veth*\", \"cali*\"]", "pods: []"},
		{"10.9.0.1:9443", "collector.example.org:9443"},
		{"10.9.0.1:9443", "localhost:9443"},
		{"10.9.0.1:9443", "[fd00:9::1]:9443"},
		{"127.0.0.1:9469", "[::]:9469"},
		{"name: node-1", "name: ip-10-0-0-1.eu-west-1.compute.internal"},
		{"workloads: {api: none}", "workloads: {api: broker, address: \"unix:///run/spire/broker/broker.sock\"}"},
		{"workloads: {api: none}", "workloads: {api: delegated, address: \"unix:///run/spire/admin/admin.sock\"}"},
		{"drainTimeout: 10s", "drainTimeout: 0s"},
		{"expiryGrace: 30s", "expiryGrace: 0s"},
		{"uids: [0]", "uids: [0, 1000, 4294967295]"},
		{"spiffe://example.org/sallyport/collector", "spiffe://other.org/collector"},
	} {
		text := strings.Replace(goodConfig, c.old, c.new, 1)
		got, err := policy.ParseAgentConfig("agent.yaml", []byte(text))
		if err != nil || text == goodConfig {
			t.Errorf("%s: %v", c.new, err)
			continue
		}
		if got.CollectorID().String() != got.Spec.Collector.ID {
			t.Errorf("%s: collector is %s", c.new, got.CollectorID())
		}
	}
}

func TestAgentConfigBurstHasADefault(t *testing.T) {
	text := strings.Replace(goodConfig, "synsPerSource: {rate: 0, burst: 0}", "synsPerSource: {rate: 50}", 1)
	c, err := policy.ParseAgentConfig("agent.yaml", []byte(text))
	if err != nil || c.Spec.XDP.SYNsPerSource != (policy.SYNLimit{Rate: 50, Burst: 50}) || c.Spec.XDP.SYNsPerService != (policy.SYNLimit{}) {
		t.Errorf("got %+v, %v", c.Spec.XDP, err)
	}
}

func TestAgentConfigCollectorIDHasADefault(t *testing.T) {
	text := strings.Replace(goodConfig, `, id: "spiffe://example.org/sallyport/collector"`, "", 1)
	c, err := policy.ParseAgentConfig("agent.yaml", []byte(text))
	if err != nil || c.Spec.Collector.ID != "spiffe://example.org/sallyport/collector" {
		t.Errorf("got %+v, %v", c.Spec.Collector, err)
	}
}

var wrongConfigs = []wrong{
	{"syntax", "name: node-1}", "name: node-1", "name: node-1", "", "not valid YAML"},
	{"unknown key", "lease: 15s", "leese: 15s", "leese", "spec.leese", "unknown key"},
	{"unknown key of the proxy", "listenPort: 15001", "port: 15001", "proxy:", "spec.proxy.port", "unknown key"},
	{"key twice", "lease: 15s", "lease: 15s\n  lease: 20s", "lease: 20s", "spec.lease", "given twice"},
	{"another kind", "kind: AgentConfig", "kind: Keyring", "kind:", "kind", `want AgentConfig, got "Keyring"`},
	{"no name", "metadata: {name: node-1}", "metadata: {}", "metadata", "metadata.name", "is missing"},
	{"bad node name", "name: node-1", "name: Node_1", "Node_1", "metadata.name", "not the name of a node"},
	{"no trust domain", "  trustDomain: example.org\n", "", "spec:", "spec.trustDomain", "is missing"},
	{"trust domain as URI", "trustDomain: example.org", "trustDomain: spiffe://example.org", "spiffe", "spec.trustDomain", "not a trust domain"},
	{"federation as URI", "trustDomain: example.org", "trustDomain: example.org\n  federatesWith: [\"spiffe://partner.org\"]", "federatesWith", "spec.federatesWith[0]", "not a trust domain"},
	{"relative path", "stateDir: /var/lib/sallyport", "stateDir: var/lib", "stateDir", "spec.stateDir", "not such a path"},
	{"path with dots", "runDir: /run/sallyport", "runDir: /run/../sallyport", "runDir", "spec.runDir", "not such a path"},
	{"root as a path", "bpffs: /sys/fs/bpf", "bpffs: /", "bpffs", "spec.bpffs", "not such a path"},
	{"socket without scheme", "unix:///run/spire", "/run/spire", "workloadAPI", "spec.workloadAPI", "not the address of a Unix socket"},
	{"socket over TCP", "unix:///run/spire/sockets/agent.sock", "tcp://127.0.0.1:8081", "workloadAPI", "spec.workloadAPI", "not the address of a Unix socket"},
	{"unknown source of workloads", "api: none", "api: selectors", "workloads", "spec.workloads.api", "not a way to learn"},
	{"workloads of no address", "api: none", "api: broker", "workloads", "spec.workloads.address", "not the address of a Unix socket"},
	{"workloads over TCP", "api: none", "api: broker, address: \"tcp://10.0.0.1:8443\"", "workloads", "spec.workloads.address", "not the address of a Unix socket"},
	{"address of no workloads", "api: none", "api: none, address: \"unix:///run/x\"", "workloads", "spec.workloads.address", "of no use"},
	{"bad device pattern", `"veth*"`, `"veth["`, "veth[", "spec.devices.pods[0]", "not a pattern"},
	{"everything ignored", "ignore: []", `ignore: ["*"]`, "ignore", "spec.devices.ignore[0]", "always hooked"},
	{"loopback ignored", "ignore: []", `ignore: ["l?"]`, "ignore", "spec.devices.ignore[0]", "matches lo"},
	{"empty pattern ignored", "ignore: []", `ignore: [""]`, "ignore", "spec.devices.ignore[0]", "not a pattern"},
	{"unknown hooks", "hooks: auto", "hooks: xdp", "hooks", "spec.hooks", "\"xdp\" is not a way"},
	{"candidate in force", "policySignatures: off", "candidate: /etc/sallyport/resources.d", "candidate", "spec.candidate", "is that of the resources in force"},
	{"signatures of nobody", "policySignatures: off", "policySignatures: required\n  policySet: all", "policyKeys", "spec.policyKeys", "policySignatures is required"},
	{"signatures for any node", "policySignatures: off\n  policyKeys: []", "policySignatures: required\n  policyKeys: [\"ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik=\"]", "spec:", "spec.policySet", "policySignatures is required"},
	{"a set of no name", "policySignatures: off", "policySet: Some Nodes", "policySet", "spec.policySet", "Some Nodes"},
	{"signatures perhaps", "policySignatures: off", "policySignatures: maybe", "policySignatures", "spec.policySignatures", "says not whether"},
	{"unknown XDP mode", "mode: auto", "mode: fast", "xdp", "spec.xdp.mode", "not a mode"},
	{"everybody denied", "denySources: []", "denySources: [\"0.0.0.0/0\"]", "xdp", "spec.xdp.denySources[0]", "is everybody"},
	{"denied prefix with host bits", "denySources: []", "denySources: [10.1.2.3/8]", "xdp", "spec.xdp.denySources[0]", "beyond its prefix length"},
	{"denied name", "denySources: []", "denySources: [example.org]", "xdp", "spec.xdp.denySources[0]", "neither an IP address nor a prefix"},
	{"too many SYNs", "synsPerSource: {rate: 0", "synsPerSource: {rate: 1000001", "xdp", "spec.xdp.synsPerSource.rate", "is not from 1"},
	{"too many SYNs at a time", "synsPerService: {rate: 0, burst: 0", "synsPerService: {rate: 1, burst: 1000001", "xdp", "spec.xdp.synsPerService.burst", "is not from 1"},
	{"burst without rate", "synsPerSource: {rate: 0, burst: 0", "synsPerSource: {rate: 0, burst: 5", "xdp", "spec.xdp.synsPerSource.burst", "without a rate"},
	{"short lease", "lease: 15s", "lease: 1s", "lease", "spec.lease", "1s is not from 2s to 1m"},
	{"long lease", "lease: 15s", "lease: 61s", "lease", "spec.lease", "1m1s is not from 2s to 1m"},
	{"lease 0", "lease: 15s", "lease: 0s", "lease", "spec.lease", "0s is not from 2s"},
	{"collector without port", "10.9.0.1:9443", "10.9.0.1", "collector", "spec.collector.address", "address to connect to"},
	{"collector at port 0", "10.9.0.1:9443", "10.9.0.1:0", "collector", "spec.collector.address", "address to connect to"},
	{"collector at a bad address", "10.9.0.1:9443", "10.9.0.256:9443", "collector", "spec.collector.address", "address to connect to"},
	{"collector at a bare IPv6 address", "10.9.0.1:9443", "fd00:9::1", "collector", "spec.collector.address", "address to connect to"},
	{"collector at a big port", "10.9.0.1:9443", "collector:65536", "collector", "spec.collector.address", "address to connect to"},
	{"collector without host", "10.9.0.1:9443", ":9443", "collector", "spec.collector.address", "address to connect to"},
	{"collector without address", `address: "10.9.0.1:9443", `, "", "collector", "spec.collector.address", "address to connect to"},
	{"collector with a bad id", "spiffe://example.org/sallyport/collector", "collector", "collector", "spec.collector.id", "not a SPIFFE ID"},
	{"collector that is a trust domain", "spiffe://example.org/sallyport/collector", "spiffe://example.org", "collector", "spec.collector.id", "not a SPIFFE ID"},
	{"collector's log without a key", `sallyport/collector"}`, `sallyport/collector", logKey: "example.org/log+00000000+AAAA"}`, "collector", "spec.collector.logKey", "is no key of a log"},
	{"no flow buffer", "flowBuffer: 65536", "flowBuffer: 0", "flowBuffer", "spec.flowBuffer", "0 is not from 1"},
	{"huge flow buffer", "flowBuffer: 65536", "flowBuffer: 99999999", "flowBuffer", "spec.flowBuffer", "is not from 1"},
	{"negative flow buffer", "flowBuffer: 65536", "flowBuffer: -1", "flowBuffer", "spec.flowBuffer", "got -1"},
	{"small flow spool", "flowSpool: 512MiB", "flowSpool: 1023KiB", "flowSpool", "spec.flowSpool", "1023KiB is neither 0B nor from 1MiB to 1TiB"},
	{"huge flow spool", "flowSpool: 512MiB", "flowSpool: 2TiB", "flowSpool", "spec.flowSpool", "2TiB is neither"},
	{"flow spool without unit", "flowSpool: 512MiB", "flowSpool: 256", "flowSpool", "spec.flowSpool", "is not a size"},
	{"metrics without address", "127.0.0.1:9469", ":9469", "metrics", "spec.metrics", "address to listen on"},
	{"metrics at port 0", "127.0.0.1:9469", "127.0.0.1:0", "metrics", "spec.metrics", "address to listen on"},
	{"operator by name", "uids: [0]", "uids: [root]", "operators", "spec.operators.uids[0]", "want a whole number"},
	{"proxy as root", "uid: 65532", "uid: 0", "proxy:", "spec.proxy.uid", "does not run as root"},
	{"proxy in root's group", "gid: 65532", "gid: 0", "proxy:", "spec.proxy.gid", "root's group"},
	{"proxy at port 0", "listenPort: 15001", "listenPort: 0", "proxy:", "spec.proxy.listenPort", "0 is not a port"},
	{"no connections", "maxConnections: 10000", "maxConnections: 0", "proxy:", "spec.proxy.maxConnections", "0 is not from 1"},
	{"no handshake time", "handshakeTimeout: 5s", "handshakeTimeout: 0s", "proxy:", "spec.proxy.handshakeTimeout", "0s is not from"},
	{"no idle time", "idleTimeout: 1h", "idleTimeout: 0s", "proxy:", "spec.proxy.idleTimeout", "0s is not from"},
	{"endless dial", "dialTimeout: 5s", "dialTimeout: 1h", "proxy:", "spec.proxy.dialTimeout", "1h is not from"},
	{"grace of more than a day", "expiryGrace: 30s", "expiryGrace: 25h", "proxy:", "spec.proxy.expiryGrace", "25h is not from"},
	{"negative drain", "drainTimeout: 10s", "drainTimeout: -1s", "proxy:", "spec.proxy.drainTimeout", "-1s is not from"},
	{"certificate of no name", "drainTimeout: 10s}", "drainTimeout: 10s, certificates: [{certFile: /a, keyFile: /b}]}", "proxy:", "spec.proxy.certificates[0].name", "is missing"},
	{"certificate without key", "drainTimeout: 10s}", "drainTimeout: 10s, certificates: [{name: a, certFile: /a}]}", "proxy:", "spec.proxy.certificates[0].keyFile", "not such a path"},
	{"authz for nobody", "drainTimeout: 10s}", "drainTimeout: 10s, authz: {}}", "proxy:", "spec.proxy.authz", "nobody could ask"},
	{"authz at no path", "drainTimeout: 10s}", "drainTimeout: 10s, authz: {socket: authz.sock}}", "proxy:", "spec.proxy.authz.socket", "not such a path"},
	{"authz for whoever comes", "drainTimeout: 10s}", "drainTimeout: 10s, authz: {listen: [\"[::]:1\"]}}", "proxy:", "spec.proxy.authz.gateways", "who may ask"},
	{"authz for no identity", "drainTimeout: 10s}", "drainTimeout: 10s, authz: {listen: [\"[::]:1\"], gateways: [\"spiffe://example.org\"]}}", "proxy:", "spec.proxy.authz.gateways[0]", "not a SPIFFE ID"},
	{"login keys elsewhere", "drainTimeout: 10s}", "drainTimeout: 10s, loginKeys: keys}", "proxy:", "spec.proxy.loginKeys", "not such a path"},
	{"certificate twice", "drainTimeout: 10s}", "drainTimeout: 10s, certificates: [{name: a, certFile: /a, keyFile: /b}, {name: a, certFile: /c, keyFile: /d}]}", "proxy:", "spec.proxy.certificates[1].name", "already"},
	{"second document", "drainTimeout: 10s}\n", "drainTimeout: 10s}\n---\nkind: Keyring\n", "kind: Keyring", "", "alone in its file"},
}

func TestParseAgentConfigWrong(t *testing.T) {
	for _, w := range wrongConfigs {
		t.Run(w.name, func(t *testing.T) {
			if !strings.Contains(goodConfig, w.old) {
				t.Fatalf("the good configuration does not have %q", w.old)
			}
			text := strings.Replace(goodConfig, w.old, w.new, 1)
			c, err := policy.ParseAgentConfig("agent.yaml", []byte(text))
			if !reflect.DeepEqual(c, policy.AgentConfig{}) {
				t.Error("a configuration came with the error")
			}
			checkOne(t, text, err, w)
		})
	}
}

func TestParseAgentConfigGivesAllErrors(t *testing.T) {
	text := strings.NewReplacer("lease: 15s", "lease: 0s", "node-1", "", "flowBuffer: 65536", "buffer: 1").Replace(goodConfig)
	_, err := policy.ParseAgentConfig("agent.yaml", []byte(text))
	var fields []string
	for _, e := range policy.Errors(err) {
		fields = append(fields, e.Field)
	}
	if want := []string{"metadata.name", "spec.lease", "spec.buffer"}; !slices.Equal(fields, want) {
		t.Errorf("got errors about %v, want %v", fields, want)
	}
}

func TestParseAgentConfigEmpty(t *testing.T) {
	for _, text := range []string{"", "# nothing\n", "---\n"} {
		if _, err := policy.ParseAgentConfig("agent.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), "is empty") {
			t.Errorf("%q: got %v", text, err)
		}
	}
}
