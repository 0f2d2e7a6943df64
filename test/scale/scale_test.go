//go:build k8s

package scale

import (
	"encoding/json"
	"fmt"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/test/apiserver"
	"github.com/sallyport-dev/sallyport/test/lab"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == agentsCommand {
		os.Exit(runAgents(os.Args[2]))
	}
	os.Exit(m.Run())
}

// plan is how much is measured.
type plan struct {
	nodes, processes int
	services         int // of the set
	pods             int // of each node
	changes, grants  int
	rest             time.Duration // for which all of it is left alone
	settle           time.Duration // in which nodes say what they make of a change
	witness          int
}

// short is what is enough to see that all of it works; `make bench-scale` says more.
var short = plan{nodes: 20, processes: 2, services: 10, pods: 2, changes: 2, grants: 4, rest: time.Second, settle: 12 * time.Second, witness: 5}

func newPlan(t *testing.T) plan {
	t.Helper()
	text := os.Getenv("BENCH_NODES")
	if text == "" {
		return short
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 20 {
		t.Fatalf("BENCH_NODES=%s: a number of nodes, 20 at least", text)
	}
	return plan{nodes: n, processes: max(2, n/250), services: 100, pods: 10, changes: 5, grants: 100, rest: 30 * time.Second, settle: 12 * time.Second,
		witness: 50}
}

// patience is for what may take long on a machine that is busy with all nodes at once.
const patience = 10 * time.Minute

// bench is an API server with its etcd, and the agents of many nodes.
type bench struct {
	t      *testing.T
	plan   plan
	lab    *lab.Lab
	server *apiserver.Server
	client dynamic.Interface // of an administrator
	key    grant.PrivateKey
	agents []*rpc.Client
	figures
}

// TestScale measures what a change takes to reach many nodes, and what they cost the API server. It prints Markdown, and writes it into the
// folder that BENCH_PUBLISH names.
func TestScale(t *testing.T) {
	b := newBench(t, newPlan(t))
	b.fill()
	b.alone = b.rest(b.plan.rest)
	b.start()
	for i := range b.plan.changes {
		b.measureChange(2 + i)
	}
	b.measureGrants()
	b.atRest()
	b.restart(2 + b.plan.changes)
	text := b.markdown()
	t.Log("\n\n" + text)
	if folder := os.Getenv("BENCH_PUBLISH"); folder != "" {
		b.must(os.WriteFile(filepath.Join(folder, "bench-scale.md"), []byte(text), 0o644))
	}
}

func newBench(t *testing.T, p plan) *bench {
	t.Helper()
	b := &bench{t: t, plan: p, lab: lab.New(t, lab.Options{}), figures: figures{load: loadNow()}}
	var err error
	b.key, err = grant.GenerateKey()
	b.must(err)
	b.server = apiserver.Start(t, b.lab.Node, b.file("apiserver"))
	b.server.Kubectl("", "apply", "-f", filepath.Join("..", "..", "deploy", "crds"))
	b.server.Kubectl("", "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
	b.server.Kubectl(rights, "apply", "-f", "-")
	how, err := clientcmd.BuildConfigFromFlags("", b.server.Kubeconfig(apiserver.Admin))
	b.must(err)
	how.Dial, how.QPS = b.dial, -1
	b.client, err = dynamic.NewForConfig(how)
	b.must(err)
	b.count()
	b.launch()
	return b
}

func (b *bench) file(name string) string { return filepath.Join(b.lab.Dir, name) }

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// rights are what docs/kubernetes-agent.md asks for, of a service account as a pod has it.
const rights = `apiVersion: v1
kind: Namespace
metadata: {name: sallyport-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: sallyport, namespace: sallyport-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: default, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: sallyport}
rules:
  - {apiGroups: [sallyport.dev], resources: [protectedservices, bypasspolicies, keyrings, denylists, granttemplates, resourcesets, identityproviders, remoteservices, bypassgrants], verbs: [list, watch]}
  - {apiGroups: [sallyport.dev], resources: [protectedservices/status, bypasspolicies/status, keyrings/status, denylists/status, granttemplates/status, resourcesets/status, identityproviders/status, remoteservices/status, bypassgrants/status], verbs: [patch]}
  - {apiGroups: [""], resources: [pods], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: sallyport}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: sallyport}
subjects: [{kind: ServiceAccount, name: sallyport, namespace: sallyport-system}]
`

const agentsKubeconfig = `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443", certificate-authority: %q}}]
users: [{name: u, user: {tokenFile: %q}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`

// launch starts the processes of the agents, which wait. Clients of one process share a connection where they trust the same bytes: each
// agent has a file of its own for what it trusts, and so a connection of its own, as on a node of its own.
func (b *bench) launch() {
	b.t.Helper()
	token := b.file("token")
	b.must(os.WriteFile(token, []byte(strings.TrimSpace(b.server.Kubectl("", "create", "token", "sallyport", "--namespace=sallyport-system", "--duration=24h"))), 0o600))
	ca, err := os.ReadFile(b.server.Certificate())
	b.must(err)
	b.must(os.Mkdir(b.file("agents"), 0o700))
	for i := range b.plan.nodes {
		node := nodeName(i)
		own := b.file("agents/" + node + ".crt")
		b.must(os.WriteFile(own, append([]byte("# "+node+"\n"), ca...), 0o600))
		b.must(os.WriteFile(kubeconfigOf(b.file("agents"), node), fmt.Appendf(nil, agentsKubeconfig, own, token), 0o600))
	}
	for i := range b.plan.processes {
		first := i * b.plan.nodes / b.plan.processes
		b.process(order{First: first, Count: (i+1)*b.plan.nodes/b.plan.processes - first, Dir: b.file("agents"), Socket: b.file(fmt.Sprintf("agents-%d.sock", i)),
			Key: b.key.Public(), Witness: b.plan.witness})
	}
}

func (b *bench) process(o order) {
	b.t.Helper()
	text, err := json.Marshal(o)
	b.must(err)
	self, err := os.Executable()
	b.must(err)
	p, err := b.lab.Node.Start(exec.Command(self, agentsCommand, string(text)))
	b.must(err)
	b.until("agents answer", func() bool {
		select {
		case <-p.Exited():
			b.t.Fatalf("agents have ended:\n%s", p.Output())
		default:
		}
		c, err := rpc.Dial("unix", o.Socket)
		if err == nil {
			b.agents = append(b.agents, c)
		}
		return err == nil
	})
	b.t.Cleanup(func() {
		if out := p.Output(); out != "" {
			b.t.Errorf("agents said:\n%.2000s", out)
		}
		b.must(p.Kill())
	})
}

// until polls, which is what there is.
func (b *bench) until(what string, ok func() bool) {
	b.t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(patience); !ok(); {
		select {
		case <-tick.C:
		case <-deadline:
			b.t.Fatalf("not in time: %s", what)
		}
	}
}

// pass lets the time pass that a figure is about.
func (b *bench) pass(d time.Duration) {
	if d > 0 {
		<-time.After(d)
	}
}

// fill makes the set and the pods.
func (b *bench) fill() {
	b.t.Helper()
	all := strings.Join(b.signed(1), "---\n")
	b.setBytes = len(all)
	b.server.Kubectl(all, "apply", "--server-side", "-f", "-")
	var pods errgroup.Group
	pods.SetLimit(16)
	for i := range b.plan.nodes {
		pods.Go(func() error { return b.makePods(b.t.Context(), nodeName(i)) })
	}
	b.must(pods.Wait())
}

func (b *bench) rest(d time.Duration) usage {
	b.t.Helper()
	before := b.usage()
	b.pass(d)
	return b.usage().since(before)
}

// start has all agents begin at once.
func (b *bench) start() {
	b.t.Helper()
	before, began := b.usage(), time.Now()
	var all errgroup.Group
	for _, a := range b.agents {
		all.Go(func() error { return a.Call("Agents.Begin", struct{}{}, nil) })
	}
	b.must(all.Wait())
	b.first = b.reach(1, began)
	b.until("each node has its pods", func() bool { return b.cost().Pods == b.plan.nodes*b.plan.pods })
	b.starting = b.usage().since(before)
	b.pass(b.plan.settle)
	b.settled = b.usage().since(before)
	b.agentsCost = b.cost()
}

// reach waits until all nodes have a version, and tells how long after a moment.
func (b *bench) reach(version int, after time.Time) (r reached) {
	b.t.Helper()
	var now Reached
	b.until(fmt.Sprintf("version %d is everywhere", version), func() bool {
		now = b.version(version)
		return len(now.Had) == b.plan.nodes && len(now.Verified) == b.witnesses()
	})
	for _, at := range now.Had {
		r.had = append(r.had, at.Sub(after))
	}
	for _, at := range now.Verified {
		r.verified = append(r.verified, at.Sub(after))
	}
	r.cost = now.Cost
	return r
}

func (b *bench) witnesses() int { return (b.plan.nodes + b.plan.witness - 1) / b.plan.witness }

func (b *bench) version(version int) (all Reached) {
	b.t.Helper()
	for _, a := range b.agents {
		var r Reached
		b.must(a.Call("Agents.Version", version, &r))
		all.Had, all.Verified, all.Cost = append(all.Had, r.Had...), append(all.Verified, r.Verified...), append(all.Cost, r.Cost...)
	}
	return all
}

func (b *bench) cost() (all Cost) {
	b.t.Helper()
	for _, a := range b.agents {
		var c Cost
		b.must(a.Call("Agents.Cost", struct{}{}, &c))
		all.CPU, all.Resident, all.Stirs, all.Pods, all.Alone = all.CPU+c.CPU, all.Resident+c.Resident, all.Stirs+c.Stirs, all.Pods+c.Pods, all.Alone+c.Alone
	}
	return all
}

// measureChange has one service change, with the set's version and signature.
func (b *bench) measureChange(version int) {
	b.t.Helper()
	before := b.usage()
	began, done := b.change(version)
	b.written = append(b.written, done.Sub(began))
	r := b.reach(version, began)
	b.changed.had, b.changed.verified, b.changed.cost = append(b.changed.had, r.had...), append(b.changed.verified, r.verified...), append(b.changed.cost, r.cost...)
	b.lasts = append(b.lasts, slices.Max(r.had))
	b.pass(b.plan.settle)
	b.changing = append(b.changing, b.usage().since(before))
}

// measureGrants has one grant after the other come to a node, and to that node alone.
func (b *bench) measureGrants() {
	b.t.Helper()
	before, stirs := b.usage(), b.cost().Stirs
	nodes, sent := make(map[string]string), make(map[string]time.Time)
	for i := range b.plan.grants {
		name, node := fmt.Sprintf("grant-%d", i), nodeName(i%b.witnesses()*b.plan.witness)
		nodes[name], sent[name] = node, time.Now()
		b.applyGrant(name, node)
		b.granted = append(b.granted, b.came(nodes)[name].Sub(sent[name]))
	}
	for name := range nodes {
		b.server.Eventually([]string{`"True"`, "reason: Open"}, "get", "bypassgrant", name, "-o", "yaml")
		break // of the others it is enough that they were counted
	}
	b.granting, b.strayed = b.usage().since(before), b.cost().Stirs-stirs-b.plan.grants
}

// came waits until each grant is at its node, and fails when one is at another, too.
func (b *bench) came(nodes map[string]string) (at map[string]time.Time) {
	b.t.Helper()
	b.until("the grants are at their nodes", func() bool {
		at = make(map[string]time.Time)
		for _, a := range b.agents {
			var all []Came
			b.must(a.Call("Agents.Grants", struct{}{}, &all))
			for _, c := range all {
				if nodes[c.Name] != c.Node || c.At.IsZero() {
					b.t.Fatalf("%s, which is for %s, came to %s, at %v", c.Name, nodes[c.Name], c.Node, c.At)
				}
				at[c.Name] = c.At
			}
		}
		return len(at) == len(nodes)
	})
	return at
}

// atRest is before watches are renewed, which each is after 5 to 10 minutes.
func (b *bench) atRest() {
	b.t.Helper()
	cost := b.cost()
	b.resting = b.rest(b.plan.rest)
	now := b.cost()
	b.agentsRest, b.agentsMemory = now.CPU-cost.CPU, now.Resident
}

// restart has the API server die, and a change wait for it.
func (b *bench) restart(version int) {
	b.t.Helper()
	b.peak = residentOf(b.server.Pid(), "VmHWM:")
	b.server.End()
	before := b.usageWithout()
	began := time.Now()
	b.server.Begin()
	b.answers = time.Since(began)
	_, done := b.change(version)
	b.again = b.reach(version, done)
	b.healed = time.Since(began)
	b.until("each node follows all kinds", func() bool { return b.cost().Alone == 0 && b.usage().watches >= float64(b.plan.nodes*kinds) })
	b.followed = time.Since(began)
	b.restarting = b.usage().since(before)
	b.restartPeak = residentOf(b.server.Pid(), "VmHWM:")
}
