//go:build k8s

package k8s

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/grant"
)

const domain = "cluster.test"

// world is a cluster with a database in a pod of the first node, clients on both, and our chart.
type world struct {
	*cluster
	key     grant.PrivateKey
	keyFile string
	db, db6 string // addresses of the database's pod
}

func newWorld(t *testing.T) *world {
	w := &world{cluster: newCluster(t)}
	var err error
	w.key, err = grant.GenerateKey()
	must(t, err)
	w.keyFile = filepath.Join(w.dir, "alice.key")
	must(t, grant.WritePrivateKey(w.keyFile, w.key))
	w.authority()
	w.startDatabase()
	for _, n := range w.nodes {
		w.apply(w.clientPod(n))
		w.wait(2*time.Minute, "condition=Ready", "pod/client-"+n.name)
	}
	return w
}

// authority stands for SPIRE: a socket on each node for its proxy, and one for a client.
func (w *world) authority() {
	td := spiffeid.RequireTrustDomainFromString(domain)
	a, err := devauthority.New(td, devauthority.Options{})
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	w.t.Cleanup(cancel)
	for _, n := range w.nodes {
		for socket, path := range map[string]string{"sockets/agent.sock": "/sallyport/proxy/" + n.name, "app/app.sock": "/app/web"} {
			go func() {
				_ = a.Serve(ctx, filepath.Join(n.dir, "run/spire", socket), spiffeid.RequireFromPath(td, path)) // a failure shows as a proxy that is not ready
			}()
		}
	}
}

// addresses are those of a pod, of version 4 and of version 6.
func (w *world) addresses(pod string) (string, string) {
	w.t.Helper()
	all := strings.Fields(w.do("get", "pod", pod, "-o", "jsonpath={.status.podIPs[*].ip}"))
	if len(all) != 2 {
		w.t.Fatalf("pod %s has the addresses %v", pod, all)
	}
	return all[0], all[1]
}

func (w *world) startDatabase() {
	w.t.Helper()
	w.apply(w.databasePod())
	w.wait(3*time.Minute, "condition=Ready", "pod/db")
	w.db, w.db6 = w.addresses("db")
}

// databasePod is a real PostgreSQL that trusts whoever reaches it, on a port of the node, too.
func (w *world) databasePod() string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: db, labels: {app: db}}
spec:
  nodeName: %s
  automountServiceAccountToken: false
  securityContext: {runAsUser: 999, runAsGroup: 999}
  containers:
    - name: postgres
      image: localhost/postgres:1
      imagePullPolicy: Never
      command: [/bin/sh, -ec]
      args:
        - |
          initdb -D /data/db -U postgres -A trust --no-locale -E UTF8 --no-sync
          printf 'host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n' >> /data/db/pg_hba.conf
          exec postgres -D /data/db -c listen_addresses=* -c jit=off -c fsync=off -c unix_socket_directories=/tmp
      env: [{name: PATH, value: "%s:/bin"}]
      ports: [{containerPort: 5432, hostPort: 15432}]
      readinessProbe: {exec: {command: [psql, -h, /tmp, -U, postgres, -c, select 1]}, periodSeconds: 1, timeoutSeconds: 5}
      volumeMounts: [{name: data, mountPath: /data}, {name: tmp, mountPath: /tmp}]
  volumes: [{name: data, emptyDir: {}}, {name: tmp, emptyDir: {}}]
`, w.nodes[0].name, pgBin(w.t))
}

// clientPod has a psql, and beside it our command, which carries what comes to its port with the identity app/web.
func (w *world) clientPod(n *node) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: client-%s}
spec:
  nodeName: %s
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers:
    - name: psql
      image: localhost/postgres:1
      imagePullPolicy: Never
      command: [/bin/sleep, infinity]
      env: [{name: PATH, value: "%s:/bin"}]
    - name: forward
      image: %s
      imagePullPolicy: Never
      command: [/sallyport, forward, "--to=%s:5432", "--listen=127.0.0.1:5433"]
      env: [{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///run/spire/app/app.sock"}]
      volumeMounts: [{name: app, mountPath: /run/spire/app, readOnly: true}]
  volumes: [{name: app, hostPath: {path: /run/spire/app, type: Directory}}]
`, n.name, n.name, pgBin(w.t), ourImage, w.db)
}

func pgBin(t *testing.T) string {
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(bins) == 0 {
		t.Fatal("no PostgreSQL on this machine")
	}
	return bins[0]
}

// resources are those of the node with the database's pod.
func (w *world) resources() string {
	return fmt.Sprintf(hostService+`---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: db}
spec:
  target: Pod
  ports: [5432]
  addresses: ["%s", "%s"]
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
`, w.db, w.db6, domain, w.key.Public())
}

// hostService is all that the node without the pod protects.
const hostService = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: host}
spec: {target: Host, ports: [7000]}
`

// values are those of the lab. All nodes are on one kernel: the backstop of each watches its own part of the control groups.
const values = "trustDomain: " + domain + "\nimage: {pullPolicy: Never}\nhost: {cgroup: " + podGroups + "}\n"

// fileValues have each node read files of its own.
func (w *world) fileValues() string {
	var files strings.Builder
	for i, text := range []string{w.resources(), hostService} {
		fmt.Fprintf(&files, "  %s.yaml: |\n    %s\n", w.nodes[i].name, strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    "))
	}
	return values + "agentConfig: {cgroup: /host/cgroup}\nresourcesPerNode: true\nresources:\n  resources.yaml: null\n" + files.String()
}

func (w *world) install(values string) {
	w.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + namespace + "}\n")
	w.apply(w.chart(values))
	w.do("rollout", "status", "-n", namespace, "daemonset/sallyport", "--timeout=3m")
}

// asks a question of the database. The answer says who answered: nothing else knows the number.
func (w *world) ask(run func(args ...string) ([]byte, error), host string, port int) error {
	out, err := run("psql", "-X", "-A", "-t", "-U", "postgres", "-c", "select 6*7", fmt.Sprintf("host=%s port=%d dbname=postgres sslmode=disable connect_timeout=20", host, port))
	if err != nil || strings.TrimSpace(string(out)) != "42" {
		return fmt.Errorf("%w: %s", errors.Join(err, errNoAnswer), out)
	}
	return nil
}

var errNoAnswer = errors.New("the database did not answer")

func (w *world) inPod(n *node) func(args ...string) ([]byte, error) {
	return func(args ...string) ([]byte, error) {
		return w.kubectl(append([]string{"exec", "client-" + n.name, "-c", "psql", "--"}, args...)...).CombinedOutput()
	}
}

func (w *world) onNode(n *node) func(args ...string) ([]byte, error) {
	return func(args ...string) ([]byte, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		args[0] = filepath.Join(pgBin(w.t), args[0])
		return n.inside(ctx, args...).CombinedOutput()
	}
}

// way is how somebody gets to the database.
type way struct {
	name string
	run  func(args ...string) ([]byte, error)
	host string
	port int
}

// plainWays are all that have no identity.
func (w *world) plainWays() []way {
	first, second := w.nodes[0], w.nodes[1]
	var all []way
	for _, v := range []struct{ name, pod, node string }{{"", w.db, first.ip}, {", IPv6", w.db6, first.ip6}} {
		all = append(all,
			way{"pod of the same node" + v.name, w.inPod(first), v.pod, 5432},
			way{"pod of the other node" + v.name, w.inPod(second), v.pod, 5432},
			way{"the node itself" + v.name, w.onNode(first), v.pod, 5432},
			way{"the other node" + v.name, w.onNode(second), v.pod, 5432},
			way{"hostPort from the other node" + v.name, w.onNode(second), v.node, 15432},
			way{"hostPort from a pod of the other node" + v.name, w.inPod(second), v.node, 15432})
	}
	return all
}

// reached has all of them reach the database.
func (w *world) reached(when string, ways []way) {
	w.t.Helper()
	w.each(ways, func(p way) {
		if err := w.ask(p.run, p.host, p.port); err != nil {
			w.t.Errorf("%s, from %s: %v", when, p.name, err)
		}
	})
}

// refused has none of them reach it.
func (w *world) refused(when string, ways []way) {
	w.t.Helper()
	w.each(ways, func(p way) {
		if err := w.ask(p.run, p.host, p.port); !errors.Is(err, errNoAnswer) {
			w.t.Errorf("LEAKED: %s, from %s: %v", when, p.name, err)
		}
	})
	w.t.Logf("%s: %d ways refused", when, len(ways))
}

// each goes some ways at a time.
func (w *world) each(ways []way, do func(way)) {
	var all sync.WaitGroup
	places := make(chan struct{}, 4)
	for _, p := range ways {
		all.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			do(p)
		})
	}
	all.Wait()
}

// TestInstall: before the chart everybody reaches the database, with it only who proves an identity or has a path, and
// after the uninstall Jobs there is nothing of ours on the nodes.
func TestInstall(t *testing.T) {
	w := newWorld(t)
	w.reached("without us", w.plainWays())
	w.install(w.fileValues())
	w.refused("installed", w.plainWays())
	w.healthy()
	w.identified()
	w.granted()
	w.uninstalled(w.fileValues(), w.plainWays())
}

// healthy says what each agent thinks of its node.
func (w *world) healthy() {
	w.t.Helper()
	for _, n := range w.nodes {
		eventually(w.t, time.Minute, n.name+" has no problem", func() error {
			out, err := w.kubectl("exec", "-n", namespace, w.agentPod(n), "-c", "agent", "--", "/sallyport", "status").CombinedOutput()
			if err != nil || strings.Contains(string(out), "PROBLEM") {
				return fmt.Errorf("%w:\n%s", errors.Join(err, errors.New("status")), out)
			}
			w.t.Logf("status of %s:\n%s", n.name, out)
			return nil
		})
	}
}

func (w *world) identified() {
	for _, n := range w.nodes {
		eventually(w.t, 30*time.Second, "an identity comes in from "+n.name, func() error { return w.ask(w.inPod(n), "127.0.0.1", 5433) })
	}
}

// granted: a path opens for its client, and for nobody else, and is closed when it was revoked.
func (w *world) granted() {
	first, second := w.nodes[0], w.nodes[1]
	client, _ := w.addresses("client-" + second.name)
	id := w.activate(first, client)
	if err := w.ask(w.inPod(second), w.db, 5432); err != nil {
		w.t.Errorf("by a path: %v", err)
	}
	if err := w.ask(w.inPod(first), w.db, 5432); !errors.Is(err, errNoAnswer) {
		w.t.Errorf("LEAKED: by the path of another: %v", err)
	}
	w.rolled(second)
	first.run(w.cli(), "grant", "revoke", id, "--why", "done")
	if err := w.ask(w.inPod(second), w.db, 5432); !errors.Is(err, errNoAnswer) {
		w.t.Errorf("LEAKED: by a path that was revoked: %v", err)
	}
}

func (w *world) cli() string { return filepath.Join(w.dir, "bin/sallyport") }

// activate issues a grant, has the node's agent activate it, and gives its id.
func (w *world) activate(n *node, client string) string {
	policy, file := filepath.Join(w.dir, "policy"), filepath.Join(w.dir, client+".grant")
	must(w.t, os.MkdirAll(policy, 0o755))
	must(w.t, os.WriteFile(filepath.Join(policy, "resources.yaml"), []byte(w.resources()), 0o644))
	_ = os.Remove(file)
	issued := n.run(w.cli(), "grant", "issue", "--service", "db", "--client", client, "--for", "10m", "--node", n.name, "--reason", "backup",
		"--key", w.keyFile, "--policy", policy, "--out", file, "--yes")
	n.run(w.cli(), "grant", "activate", file, "--key", w.keyFile, "--yes")
	id := regexp.MustCompile(`\b01[0-9A-Z]{24}\b`).FindString(issued)
	if id == "" {
		w.t.Fatalf("no id of the grant: %s", issued)
	}
	return id
}

func (w *world) agentPod(n *node) string {
	return strings.TrimSpace(w.do("get", "pods", "-n", namespace, "-l", "app.kubernetes.io/name=sallyport", "--field-selector", "spec.nodeName="+n.name, "-o", "jsonpath={.items[0].metadata.name}"))
}

// uninstalled: the Jobs end well, everybody reaches the database again, and nothing of ours is on a node.
func (w *world) uninstalled(values string, ways []way) {
	rendered := w.chart(values + fmt.Sprintf("uninstall: {nodes: [%s, %s]}\n", w.nodes[0].name, w.nodes[1].name))
	w.do("delete", "daemonset", "-n", namespace, "sallyport", "--wait")
	w.apply(rendered)
	w.do("wait", "-n", namespace, "--for=condition=Complete", "job", "--all", "--timeout=5m")
	w.reached("after uninstall", ways)
	for _, n := range w.nodes {
		left := n.run("sh", "-c", "ls /sys/fs/bpf | grep sallyport; ip -o link show | grep -w px0; find /run/sallyport -type f -o -type s; grep -E ' /(run|var/lib|sys/fs/bpf)/sallyport' /proc/1/mounts || true")
		if left = strings.TrimSpace(left); left != "" {
			w.t.Errorf("left on %s:\n%s", n.name, left)
		}
		if hooks := n.run("sh", "-c", "for d in $(ls /proc/sys/net/ipv4/conf); do tc filter show dev $d ingress 2>/dev/null; done; bpftool net show | grep -w sp_ || true"); strings.Contains(hooks, "sp_") {
			w.t.Errorf("hooks left on %s:\n%s", n.name, hooks)
		}
	}
}

// rolled replaces the pods of all nodes under load: the path's connection lives on, identities come in throughout, and nobody else does.
func (w *world) rolled(client *node) {
	var load sync.WaitGroup
	done := make(chan struct{})
	var asked, refused, leaked, probes atomic.Int64
	until := func(f func()) {
		load.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					f()
				}
			}
		})
	}
	until(func() {
		asked.Add(1)
		// From the other pod: what the path's client sends does not come to the proxy.
		if err := w.ask(w.inPod(w.nodes[0]), "127.0.0.1", 5433); err != nil {
			refused.Add(1)
			w.t.Logf("by identity, while it rolls: %v", err)
		}
	})
	until(func() {
		probes.Add(1)
		if w.ask(w.onNode(client), w.db, 5432) == nil {
			leaked.Add(1)
		}
	})
	conn := w.talk(w.kubectl("exec", "-i", "client-"+client.name, "-c", "psql", "--", "psql", "-X", "-A", "-t", "-U", "postgres", w.at(w.db)))
	before := w.agentPod(w.nodes[0])
	w.do("rollout", "restart", "-n", namespace, "daemonset/sallyport")
	w.do("rollout", "status", "-n", namespace, "daemonset/sallyport", "--timeout=4m")
	close(done)
	load.Wait()
	if err := conn.hangUp(); err != nil {
		w.t.Errorf("RESET: the connection by the path, while pods were replaced: %v", err)
	}
	if after := w.agentPod(w.nodes[0]); after == before {
		w.t.Errorf("nothing was replaced: %s", after)
	}
	w.t.Logf("rolled: %d probes without identity, %d leaked; %d connections with one, %d failed; one by a path, %d answers", probes.Load(), leaked.Load(), asked.Load(), refused.Load(), conn.answers())
	if leaked.Load() > 0 || refused.Load() > 0 {
		w.t.Error("LEAKED or RESET while pods were replaced")
	}
}
