//go:build k8s

package k8s

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// inCluster is a world whose nodes take their resources from its API server, where they are signed.
type inCluster struct {
	*world
	officer     grant.PrivateKey
	officerFile string
	service     []string // addresses of the database's Service, of version 4 and 6
	forwards    int      // that were begun
}

func newInCluster(t *testing.T) *inCluster {
	c := &inCluster{world: newWorld(t)}
	var err error
	c.officer, err = grant.GenerateKey()
	must(t, err)
	c.officerFile = filepath.Join(c.dir, "carol.key")
	must(t, grant.WritePrivateKey(c.officerFile, c.officer))
	return c
}

// TestResources: what is protected, and who may go around it, comes by kubectl alone. The database is reached by who proves an identity or has
// a path and by nobody else, whichever way they come, also where its pod is another one; paths open by apply and end by delete, and on
// time with nobody there to end them.
func TestResources(t *testing.T) {
	c := newInCluster(t)
	c.expose()
	c.define()
	c.install(c.values())
	c.do("wait", "--for=condition=Accepted", "--timeout=1m", "psvc/db", "bpol/backup", "kring/operators", "rset/all")
	c.refused("installed", c.ways())
	c.healthy()
	c.identified()
	c.proven()
	c.translatedByNftables()
	c.refused("with nftables", c.ways())
	c.proven()
	c.replaced()
	c.applied()
	c.alone()
	c.uninstalled(c.values(), c.ways())
}

const (
	nodePort     = 30432
	nodePortKept = 30433 // that keeps the client's address
)

// expose gives the database a Service in the cluster, and ports on all nodes, by which everybody reaches it.
func (c *inCluster) expose() {
	for name, spec := range map[string]string{
		"db":      fmt.Sprintf("ports: [{port: 5432, nodePort: %d}]", nodePort),
		"db-kept": fmt.Sprintf("ports: [{port: 5432, nodePort: %d}], externalTrafficPolicy: Local", nodePortKept),
	} {
		c.apply("apiVersion: v1\nkind: Service\nmetadata: {name: " + name + "}\nspec: {type: NodePort, ipFamilyPolicy: RequireDualStack, selector: {app: db}, " + spec + "}\n")
	}
	c.service = strings.Fields(c.do("get", "service", "db", "-o", "jsonpath={.spec.clusterIPs[*]}"))
	if len(c.service) != 2 {
		c.t.Fatalf("the Service has the addresses %v", c.service)
	}
	c.each(c.ways(), func(p way) { // kube-proxy of a node learns of it when it does
		if err := patiently(30*time.Second, func() error { return c.ask(p.run, p.host, p.port) }); err != nil {
			c.t.Errorf("exposed, from %s: %v", p.name, err)
		}
	})
}

// ways are all that have no identity, by what kube-proxy makes, too.
func (c *inCluster) ways() []way {
	first, second := c.nodes[0], c.nodes[1]
	all := c.plainWays()
	for _, v := range []struct{ name, first, second, service string }{{"", first.ip, second.ip, c.service[0]}, {", IPv6", first.ip6, second.ip6, c.service[1]}} {
		all = append(all,
			way{"NodePort from the node itself" + v.name, c.onNode(first), v.first, nodePort},
			way{"NodePort from the other node" + v.name, c.onNode(second), v.first, nodePort},
			way{"NodePort of the other node from there" + v.name, c.onNode(second), v.second, nodePort},
			way{"NodePort from a pod of the other node" + v.name, c.inPod(second), v.first, nodePort},
			way{"NodePort that keeps the source from the other node" + v.name, c.onNode(second), v.first, nodePortKept},
			way{"the Service from the node itself" + v.name, c.onNode(first), v.service, 5432},
			way{"the Service from a pod of the same node" + v.name, c.inPod(first), v.service, 5432},
			way{"the Service from a pod of the other node" + v.name, c.inPod(second), v.service, 5432})
	}
	return all
}

const clusterResources = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: db}
spec:
  target: Pod
  ports: [5432]
  podSelector: {namespace: default, matchLabels: {app: db}}
  access: [{identities: ["spiffe://%s/app/web"]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: backup}
spec: {services: [db], bindings: [address], sources: ["10.96.0.0/16", "fd96::/48"], maxDuration: 15m, requesters: [alice]}
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people: [{name: alice, keys: [{publicKey: "%s"}]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: ResourceSet
metadata: {name: all}
spec: {version: 1}
`

func (c *inCluster) policy() string { return filepath.Join(c.dir, "resources.d") }

// define does what docs/kubernetes-agent.md says, word for word, with more resources behind ours.
func (c *inCluster) define(more ...string) {
	crds, err := filepath.Abs(filepath.Join(repository, "deploy/crds"))
	must(c.t, err)
	c.do("apply", "-f", crds)
	c.do("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
	must(c.t, os.MkdirAll(c.policy(), 0o755))
	must(c.t, os.WriteFile(filepath.Join(c.policy(), "resources.yaml"), fmt.Appendf(nil, clusterResources+strings.Join(more, ""), domain, c.key.Public()), 0o644))
	c.nodes[0].run(c.cli(), "policy", "sign", c.policy(), "--key", c.officerFile, "--yes")
	c.do("apply", "-f", c.policy())
	signatures, err := os.ReadFile(filepath.Join(c.policy(), "resources.dsse"))
	must(c.t, err)
	c.do("annotate", "--overwrite", "resourceset", "all", "sallyport.dev/signatures="+string(signatures))
}

func (c *inCluster) values() string {
	return values + fmt.Sprintf("cluster: {enabled: true, apiServer: {host: %s}}\nagentConfig: {cgroup: /host/cgroup, policySet: all, policyKeys: [%q]}\n", c.nodes[0].ip, c.officer.Public())
}

// proven: an identity comes in by each way that leads to the pod, also by one on which its address is lost.
func (c *inCluster) proven() {
	first, second := c.nodes[0], c.nodes[1]
	var all []way
	for _, v := range []struct{ name, pod, node, service string }{{"", c.db, first.ip, c.service[0]}, {", IPv6", c.db6, first.ip6, c.service[1]}} {
		all = append(all, c.forward(first, "the node itself"+v.name, v.pod, 5432), c.forward(second, "the other node"+v.name, v.pod, 5432),
			c.forward(second, "the Service from the other node"+v.name, v.service, 5432), c.forward(second, "NodePort"+v.name, v.node, nodePort),
			c.forward(second, "NodePort that keeps the source"+v.name, v.node, nodePortKept), c.forward(second, "hostPort"+v.name, v.node, 15432))
	}
	c.each(all, func(p way) {
		if err := patiently(30*time.Second, func() error { return c.ask(p.run, p.host, p.port) }); err != nil {
			c.t.Errorf("no identity comes in by %s: %v", p.name, err)
		}
	})
	c.t.Logf("an identity came in by %d ways", len(all))
}

// translatedByNftables has kube-proxy of all nodes translate in its other mode from now on, and nothing of the first left.
func (c *inCluster) translatedByNftables() {
	for _, n := range c.nodes {
		n.kill(filepath.Join(c.bin, "kube-proxy"))
		c.kubeProxy(n, "nftables")
		eventually(c.t, time.Minute, "kube-proxy of "+n.name+" translates by nftables alone", func() error {
			for _, family := range []string{"ip", "ip6"} {
				out, err := n.inside(context.Background(), "nft", "list", "map", family, "kube-proxy", "service-nodeports").CombinedOutput()
				if err != nil || !strings.Contains(string(out), strconv.Itoa(nodePortKept)) {
					return fmt.Errorf("%w: %s\n%s", errors.Join(err, errors.New("no map with the NodePort")), out, n.log("kube-proxy"))
				}
			}
			if left := n.run("sh", "-c", "iptables-save; ip6tables-save"); strings.Contains(left, "KUBE-SERVICES") {
				return fmt.Errorf("chains of iptables are left:\n%s", left)
			}
			return nil
		})
	}
}

// forward is a way with the identity of a process on the node.
func (c *inCluster) forward(n *node, name, host string, port int) way {
	c.forwards++
	local := 20000 + c.forwards
	to := fmt.Sprintf("%s:%d", host, port)
	if strings.Contains(host, ":") {
		to = fmt.Sprintf("[%s]:%d", host, port)
	}
	n.daemon(fmt.Sprintf("forward-%d", local), "env", "SPIFFE_ENDPOINT_SOCKET=unix:///run/spire/app/app.sock", c.cli(), "forward", "--to="+to, fmt.Sprintf("--listen=127.0.0.1:%d", local))
	return way{name, c.onNode(n), "127.0.0.1", local}
}

// replaced: another pod of that name is protected at its address, and nobody gets in while it comes.
func (c *inCluster) replaced() {
	before := c.db
	done, ended := make(chan struct{}), make(chan struct{})
	var probes, leaked atomic.Int64
	go func() {
		defer close(ended)
		for {
			for _, service := range c.service {
				select {
				case <-done:
					return
				default:
				}
				probes.Add(1)
				if c.ask(c.onNode(c.nodes[1]), service, 5432) == nil {
					leaked.Add(1)
				}
			}
		}
	}()
	c.do("delete", "pod", "db", "--grace-period=1")
	c.startDatabase()
	if c.db == before {
		c.t.Errorf("the other pod has the address of the first: %s", before)
	}
	c.refused("replaced", c.ways())
	close(done)
	<-ended
	if c.t.Logf("replaced: %d probes without identity, %d leaked", probes.Load(), leaked.Load()); leaked.Load() > 0 {
		c.t.Error("LEAKED while the pod was replaced")
	}
	c.proven()
}

// bypass is a BypassGrant that begins when it is applied, for the client's pod on a node.
func (c *inCluster) bypass(name, duration string, of *node) string {
	first := c.nodes[0]
	client, client6 := c.addresses("client-" + of.name)
	file := filepath.Join(c.dir, name+".grant")
	first.run(c.cli(), "grant", "issue", "--on-apply", "--service", "db", "--client", client, "--client", client6, "--for", duration, "--node", first.name, "--reason", "backup",
		"--key", c.keyFile, "--not-before", time.Now().UTC().Format(time.RFC3339), "--policy", c.policy(), "--out", file, "--yes")
	envelope, err := os.ReadFile(file)
	must(c.t, err)
	text, err := json.Marshal(string(envelope))
	must(c.t, err)
	return fmt.Sprintf("apiVersion: sallyport.dev/v1alpha1\nkind: BypassGrant\nmetadata: {name: %s}\nspec: {node: %s, envelope: %s}\n", name, first.name, text)
}

// beside is in the network of the client's pod on the node, for what is faster than kubectl and outlives the API server.
func (c *inCluster) beside(n *node) func(args ...string) *exec.Cmd {
	address, _ := c.addresses("client-" + n.name)
	file := c.network(n, address)
	return func(args ...string) *exec.Cmd {
		args[0] = filepath.Join(pgBin(c.t), args[0])
		return n.inside(context.Background(), append([]string{"nsenter", "--net=" + file}, args...)...)
	}
}

// network is the network namespace of the pod of a node with the address, as a file there.
func (w *world) network(n *node, address string) string {
	w.t.Helper()
	file := strings.TrimSpace(n.run("sh", "-c", `for f in /run/netns/*; do nsenter --net=$f ip -o addr show | grep -qF " $1/" && echo $f; done; true`, "sh", address))
	if file == "" || strings.Contains(file, "\n") {
		w.t.Fatalf("namespaces with %s: %q", address, file)
	}
	return file
}

func outputOf(command func(args ...string) *exec.Cmd) func(args ...string) ([]byte, error) {
	return func(args ...string) ([]byte, error) { return command(args...).CombinedOutput() }
}

// open has a grant applied while its client asks all the time, and says how long it took.
func (c *inCluster) open(what string, ask func(args ...string) ([]byte, error)) {
	c.t.Helper()
	answered := make(chan time.Time, 1)
	go func() {
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
			if c.ask(ask, c.db, 5432) == nil {
				answered <- time.Now()
				return
			}
		}
		close(answered)
	}()
	file := filepath.Join(c.dir, "bypassgrant.yaml")
	must(c.t, os.WriteFile(file, []byte(what), 0o600))
	begun := time.Now()
	said := c.do("apply", "-v=6", "-f", file)
	returned := time.Now()
	at, ok := <-answered
	if !ok {
		c.t.Fatalf("no path was opened:\n%s", c.do("get", "bgrant", "-o", "yaml"))
	}
	c.t.Logf("kubectl apply took %s; the client was answered %s after it began, %s after it asked the API server to create the grant",
		returned.Sub(begun).Round(time.Millisecond), at.Sub(begun).Round(time.Millisecond), at.Sub(c.asked(said, "POST")).Round(time.Millisecond))
}

var response = regexp.MustCompile(`(?m)^I(\d{4} \d\d:\d\d:\d\d\.\d{6}) .*verb="(\w+)" url="\S*/bypassgrants.* milliseconds=(\d+)`)

// asked is when kubectl, which has a start of its own, sent its request, by what it says of the answer.
func (c *inCluster) asked(said, verb string) time.Time {
	c.t.Helper()
	for _, m := range response.FindAllStringSubmatch(said, -1) {
		at, err := time.ParseInLocation("20060102 15:04:05.000000", strconv.Itoa(time.Now().Year())+m[1], time.Local)
		took, err2 := strconv.Atoi(m[3])
		if m[2] == verb && err == nil && err2 == nil {
			return at.Add(-time.Duration(took) * time.Millisecond)
		}
	}
	c.t.Fatalf("kubectl says nothing of a %s:\n%s", verb, said)
	return time.Time{}
}

// applied: a grant that is applied opens a path for its client, at each way on which its address is kept, and for nobody else; delete ends it.
func (c *inCluster) applied() {
	first, second := c.nodes[0], c.nodes[1]
	client, other := c.inPod(second), c.inPod(first)
	var own, another []way
	for _, v := range []struct{ name, pod, node string }{{"", c.db, first.ip}, {", IPv6", c.db6, first.ip6}} {
		another = append(another, way{"the client by a NodePort that does not keep its address" + v.name, client, v.node, nodePort}, way{"another pod" + v.name, other, v.pod, 5432},
			way{"the client's node" + v.name, c.onNode(second), v.pod, 5432}, way{"the node itself" + v.name, c.onNode(first), v.pod, 5432})
		own = append(own, way{"NodePort that keeps the source" + v.name, client, v.node, nodePortKept}, way{"hostPort" + v.name, client, v.node, 15432}, way{"the client" + v.name, client, v.pod, 5432})
	}
	beside := c.beside(second)
	c.open(c.bypass("nightly", "10m", second), outputOf(beside))
	c.reached("by the path", own)
	c.refused("beside the path", another)
	conn := c.talk(beside("psql", "-X", "-A", "-t", "-U", "postgres", c.at(c.db)))
	begun := time.Now()
	said := c.do("delete", "-v=6", "bgrant", "nightly")
	returned := time.Now()
	select {
	case <-conn.ended:
	case <-time.After(time.Minute):
		c.t.Fatal("the connection lives on without its grant")
	}
	c.t.Logf("kubectl delete took %s; the last answer by the path was %s after it began, %s after it asked the API server",
		returned.Sub(begun).Round(time.Millisecond), conn.last().Sub(begun).Round(time.Millisecond), conn.last().Sub(c.asked(said, "DELETE")).Round(time.Millisecond))
	c.refused("deleted", slices.Concat(own, another))
}

// alone: a path ends on time with nobody to end it: kubelet, API server and agent of its node are killed and stay so. Its connection goes on until
// then, and nothing of the cluster is lost with them.
func (c *inCluster) alone() {
	first, second := c.nodes[0], c.nodes[1]
	command := c.beside(second)
	beside := outputOf(command)
	c.open(c.bypass("short", "40s", second), beside)
	c.do("wait", "--for=jsonpath={.status.until}", "bgrant/short", "--timeout=20s")
	until, err := time.Parse(time.RFC3339, c.do("get", "bgrant", "short", "-o", "jsonpath={.status.until}"))
	must(c.t, err)
	conn := c.talk(command("psql", "-X", "-A", "-t", "-U", "postgres", c.at(c.db)))
	for _, command := range []string{filepath.Join(c.bin, "kubelet"), filepath.Join(c.bin, "kube-apiserver"), "/sallyport-agent run"} {
		first.kill(command)
	}
	killed := time.Now()
	select {
	case <-conn.ended:
	case <-time.After(2 * time.Minute):
		c.t.Fatalf("LEAKED: the connection lives on, %s after its deadline", time.Since(until))
	}
	// What the resource says is cut to seconds.
	if last := conn.last(); last.Before(killed) || last.After(until.Add(time.Second)) {
		c.t.Errorf("the last answer came %s after the deadline, everything was killed %s before it: %v", last.Sub(until), until.Sub(killed), conn.err)
	} else {
		c.t.Logf("killed %s before the deadline; %d answers until the last, %s before the deadline and a second", until.Sub(killed).Round(time.Millisecond), conn.answers(), until.Add(time.Second).Sub(last).Round(time.Millisecond))
	}
	plain := []way{{"the client", beside, c.db, 5432}, {"the client, IPv6", beside, c.db6, 5432}, {"the client by hostPort", beside, first.ip, 15432},
		{"the other node by NodePort", c.onNode(second), first.ip, nodePort}, {"the node itself", c.onNode(first), c.db, 5432}}
	c.refused("without agent and API server", plain)
	c.apiServer()
	c.kubelet(first)
	c.do("wait", "--for=condition=Ended", "bgrant/short", "--timeout=2m")
	c.t.Logf("kubectl get bgrant -o wide:\n%s", c.do("get", "bgrant", "-o", "wide"))
	c.do("rollout", "status", "-n", namespace, "daemonset/sallyport", "--timeout=2m")
	c.refused("with both of them back", c.ways())
	c.healthy()
	c.proven()
}
