package e2e_test

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	nodeName  = "node-1"
	otherNode = "node-2" // of a world that is beside another
	hostPort  = 8080     // of host-echo
	podPort   = 8081     // of pod-echo
	sinkPort  = 8090     // a second port of both, where tests serve what they need
)

var (
	domain  = spiffeid.RequireTrustDomainFromString("example.org")
	web     = spiffeid.RequireFromPath(domain, "/app/web")     // may come through the proxy
	mallory = spiffeid.RequireFromPath(domain, "/app/mallory") // may not
	proxyID = spiffeid.RequireFromPath(domain, "/sallyport/proxy/"+nodeName)
)

// options shape a world. The zero value has the race detector's programs and the default lease.
type options struct {
	plain    bool   // the programs as they are shipped
	lease    string // of the agent; empty: the default of 15s
	hooks    string // how programs are held; empty: auto
	resource string // more YAML documents, after the world's own
	booting  bool   // a node that is just starting: no device but lo, no identity provider

	web        bool          // the proxy has a web certificate, db, of the files web.pem and web.key
	config     string        // more lines of the agent's configuration
	identities []spiffeid.ID // that are served, beside the world's own
	workloads  bool          // a broker tells the agent the identities of workloads, by the authority's entries

	// beside is a world that this one shares the client and the authority with: the client forwards between their nodes.
	beside *world

	// provider serves identities in the embedded authority's place, all of them at the socket that it gives.
	provider func(*testing.T, *world) string
}

// world is a lab whose node has a Sallyport of real programs, and two services that say whom they saw: host-echo on
// the node and pod-echo in the first pod. The second pod is a client.
type world struct {
	*lab.Lab
	name      string // of the node
	bin       string
	authority *devauthority.Authority
	provider  string // socket of all identities; empty: each has its own
	bpffs     string
	key       string // file of alice's key
	files     files
	echoes    []*lab.Service // host-echo and pod-echo, in each family

	collector, agent, guard, proxy *daemon
}

// files are where the programs find what they need.
type files struct{ agent, proxy, collector, resources, run, state, records, recordsSocket string }

// newWorld prepares everything and starts nothing but the services.
func newWorld(t *testing.T, o options) *world {
	t.Helper()
	w := &world{name: nodeName, bin: programs(t, o.plain)}
	shape := lab.Options{Pods: 2, Unplugged: o.booting}
	if o.beside != nil {
		w.name, w.authority, shape.Beside = otherNode, o.beside.authority, o.beside.Lab
	}
	w.Lab = lab.New(t, shape)
	t.Cleanup(func() { w.checkRaces(t) })
	must(t, os.Chmod(w.Dir, 0o755)) // the proxy's user goes through it
	var err error
	w.bpffs, err = w.MountBPFFS()
	must(t, err)
	dir := w.Dir
	w.files = files{
		agent: dir + "/agent.yaml", proxy: dir + "/proxy.yaml", collector: dir + "/collector.yaml", resources: dir + "/resources.d",
		run: dir + "/run", state: dir + "/state", records: dir + "/records", recordsSocket: dir + "/records.sock",
	}
	if o.provider != nil {
		w.provider = o.provider(t, w)
	} else if !o.booting {
		w.serveIdentities(t, o)
	}
	w.writeConfig(t, o)
	w.makeKey(t)
	w.writeResources(t, "10-world.yaml", w.resources(t)+o.resource)
	w.collector = w.daemon("sallyport-collector", "--config", w.files.collector)
	w.agent = w.daemon("sallyport-agent", "run", "--config", w.files.agent)
	w.guard = w.daemon("sallyport-agent", "guard", "--config", w.files.agent)
	w.proxy = w.daemon("sallyport-proxy", "--config", w.files.proxy)
	for _, f := range lab.Families() {
		onNode, err := w.Node.WhoAnswers(netip.AddrPortFrom(unspecified(f), hostPort))
		must(t, err)
		inPod, err := w.Pod.WhoAnswers(netip.AddrPortFrom(unspecified(f), podPort))
		must(t, err)
		w.echoes = append(w.echoes, onNode, inPod)
	}
	return w
}

// startWorld has all programs ready.
func startWorld(t *testing.T, o options) *world {
	t.Helper()
	w := newWorld(t, o)
	for _, d := range []*daemon{w.collector, w.agent, w.guard, w.proxy} {
		d.start(t)
	}
	return w
}

func (w *world) daemon(program string, args ...string) *daemon {
	return &daemon{dir: w.Dir, ns: w.Node, name: filepath.Join(w.bin, program), args: args}
}

func (w *world) socket(id spiffeid.ID) string {
	if w.provider != "" {
		return w.provider
	}
	return filepath.Join(w.Dir, "id", strings.ReplaceAll(strings.Trim(id.Path(), "/"), "/", "-"))
}

// serveIdentities has a Workload API for each identity, on a socket of its own.
func (w *world) serveIdentities(t *testing.T, o options) {
	t.Helper()
	if w.authority == nil {
		var err error
		w.authority, err = devauthority.New(domain, devauthority.Options{})
		must(t, err)
	}
	ids := slices.Concat(o.identities, []spiffeid.ID{w.own("agent"), w.own("proxy"), spiffeid.RequireFromPath(domain, "/sallyport/collector"), web, mallory})
	for _, id := range ids {
		background(t, func(ctx context.Context) error { return w.authority.Serve(ctx, w.socket(id), id) })
	}
	if o.workloads {
		spire := spiffeid.RequireFromPath(domain, "/spire/agent/"+w.name)
		background(t, func(ctx context.Context) error {
			return w.authority.ServeBroker(ctx, w.brokerSocket(), spire, w.own("agent"))
		})
	}
}

// own is the identity of a program of the node.
func (w *world) own(who string) spiffeid.ID {
	return spiffeid.RequireFromPath(domain, "/sallyport/"+who+"/"+w.name)
}

func (w *world) brokerSocket() string { return filepath.Join(w.Dir, "broker", "broker.sock") }

// background runs f until the test ends.
func background(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// writeConfig writes one AgentConfig for the agent and one for the proxy: they differ in the socket that gives them
// their identity.
func (w *world) writeConfig(t *testing.T, o options) {
	t.Helper()
	lease := o.lease
	if lease == "" {
		lease = "15s"
	}
	hooks, certificates := cmp.Or(o.hooks, "auto"), ""
	if o.web {
		certificates = fmt.Sprintf(", certificates: [{name: db, certFile: %[1]s/web.pem, keyFile: %[1]s/web.key}]", w.Dir)
	}
	if o.workloads {
		o.config += fmt.Sprintf("  workloads: {api: broker, address: \"unix://%s\"}\n", w.brokerSocket())
	}
	for file, who := range map[string]string{w.files.agent: "agent", w.files.proxy: "proxy"} {
		write(t, file, fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: %[1]s}
spec:
  trustDomain: example.org
  resources: %[2]s
  stateDir: %[3]s
  runDir: %[4]s
  bpffs: %[5]s
  cgroup: %[8]q
  workloadAPI: unix://%[6]s
  devices: {pods: ["vethpod*"]}
  lease: %[7]s
  hooks: %[9]s
  collector: {address: "127.0.0.1:9443", id: "spiffe://example.org/sallyport/collector"}
  metrics: "127.0.0.1:9469"
  proxy: {maxConnections: 4000, handshakeTimeout: 2s, drainTimeout: 2s%[10]s}
`, w.name, w.files.resources, w.files.state, w.files.run, w.bpffs, w.socket(w.own(who)), lease, w.Cgroup(), hooks, certificates)+o.config)
	}
	write(t, w.files.collector, fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: CollectorConfig
metadata: {name: collector}
spec:
  trustDomain: example.org
  listen: "127.0.0.1:9443"
  workloadAPI: unix://%s
  dataDir: %s
  socket: %s
`, w.socket(spiffeid.RequireFromPath(domain, "/sallyport/collector")), w.files.records, w.files.recordsSocket))
}

// makeKey makes alice's key as an operator does.
func (w *world) makeKey(t *testing.T) {
	t.Helper()
	w.key = filepath.Join(w.Dir, "alice.key")
	w.cli(t, "keygen", "--out", w.key)
}

// resources protect the two services; alice may open a path to them for anybody.
func (w *world) resources(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: host-echo}
spec:
  target: Host
  ports: [%d, %d]
  access: [{identities: [%q]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: pod-echo}
spec:
  target: Pod
  ports: [%d, %d]
  addresses: [%q, %q]
  access: [{identities: [%q]}]
---
`, hostPort, sinkPort, web, podPort, sinkPort, w.Pod.Addr(lab.IPv4), w.Pod.Addr(lab.IPv6), web) + bypassPolicy("lab", "host-echo, pod-echo") + w.keyring(t)
}

func bypassPolicy(name, services string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: %s}
spec:
  services: [%s]
  bindings: [address]
  sources: ["10.0.0.0/8", "fd00::/16", "127.0.0.0/8", "::1"]
  nodeAddresses: true
  maxDuration: 10m
  requesters: [alice]
---
`, name, services)
}

func (w *world) keyring(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people: [{name: alice, keys: [{publicKey: %q}]}]
---
`, publicKey(t, w.key))
}

// writeResources puts one file into the agent's directory, by rename.
func (w *world) writeResources(t *testing.T, name, yaml string) {
	t.Helper()
	must(t, os.MkdirAll(w.files.resources, 0o755))
	write(t, filepath.Join(w.files.resources, "."+name), yaml)
	must(t, os.Rename(filepath.Join(w.files.resources, "."+name), filepath.Join(w.files.resources, name)))
}

// checkRaces fails the test when a program's race detector spoke.
func (w *world) checkRaces(t *testing.T) {
	for _, d := range []*daemon{w.collector, w.agent, w.guard, w.proxy} {
		if d != nil && slices.ContainsFunc(d.runs, func(p *lab.Process) bool { return strings.Contains(p.Output(), "WARNING: DATA RACE") }) {
			t.Errorf("%s has a data race", filepath.Base(d.name))
		}
	}
}

func unspecified(f lab.Family) netip.Addr {
	if f == lab.IPv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func write(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(text), 0o600))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience bounds every wait for another process.
var patience = bound(20 * time.Second)

// waitUntil polls: what is waited for is a clock or the state of another process.
func waitUntil(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
