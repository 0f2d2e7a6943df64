//go:build k8s

package scale

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/kube"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// agentsCommand makes the test binary the agents of many nodes, as far as the API server is concerned. Its argument is an order.
const agentsCommand = "simulate-agents"

// order is what that process is told. Its agents begin all at once, when they are told to.
type order struct {
	First, Count int
	Dir          string // of the agents' kubeconfigs
	Socket       string // where the process is asked
	Key          policy.PublicKey
	Witness      int // each so many agents, one verifies what it has
}

func nodeName(i int) string { return fmt.Sprintf("node-%05d", i) }

func kubeconfigOf(dir, node string) string { return filepath.Join(dir, node+".kubeconfig") }

// changing is the service whose port says of which version of the set it is.
const (
	changing   = "service-000"
	changeport = 20000
)

// agent is what a node has of the API server: the source of an agent, which follows its resources, its grants and its pods.
type agent struct {
	node    string
	witness bool // it verifies
	key     policy.PublicKey
	source  *kube.Source

	mu       sync.Mutex
	had      map[int]time.Time // when it had all of a version; guarded by mu, as is all below
	verified map[int]time.Time
	cost     time.Duration // CPU of the last verification
	grants   map[string]time.Time
	set      *policy.Set // the last that was verified
	stirs    int         // changes that the source told of
	pods     int
}

func newAgent(o order, i int) (*agent, error) {
	a := &agent{node: nodeName(i), witness: i%o.Witness == 0, key: o.Key, had: make(map[int]time.Time), verified: make(map[int]time.Time), grants: make(map[string]time.Time)}
	var err error
	a.source, err = kube.New(kube.Config{Node: a.node, Audience: a.node, Kubeconfig: kubeconfigOf(o.Dir, a.node)})
	if err == nil {
		a.source.Pods()
	}
	return a, err
}

// run follows the API server as an agent does, until ctx ends.
func (a *agent) run(ctx context.Context) {
	go func() { _ = a.source.Run(ctx) }()
	go func() {
		_ = a.source.FollowPods(ctx, func(all []policy.Pod) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.pods = len(all)
		})
	}()
	for {
		changed := a.source.Changed()
		a.look(ctx)
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// look takes what the source has. A node says of a set that it is right, and of a grant that it is open.
func (a *agent) look(ctx context.Context) {
	all, err := a.source.Resources()
	if err == nil {
		a.note(ctx, all)
	}
	grants, err := a.source.Grants()
	if err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stirs++
	for _, g := range grants {
		if _, known := a.grants[g.Name]; !known {
			a.grants[g.Name] = a.open(g)
		}
	}
}

// open tells when a grant has come, and, of one that is not for this node or not signed, never.
func (a *agent) open(g kube.Grant) time.Time {
	came := time.Now()
	p, err := grant.Peek(g.Envelope)
	if err == nil && a.set != nil {
		_, err = grant.Verify(g.Envelope, a.set.Keyrings(), came)
	}
	if err != nil || p.Audience != a.node {
		return time.Time{}
	}
	a.source.Tell(g.Name, kube.GrantWord{Generation: g.Generation, ID: p.ID, Service: p.Service, Requester: p.Requester, Until: came.Add(p.Duration),
		Verified: kube.Answer{Is: true, Reason: "Signed"}, Active: kube.Answer{Is: true, Reason: "Open"}})
	return came
}

// note looks at which version of the set is there, whole.
func (a *agent) note(ctx context.Context, all []kube.Resource) {
	version := wholeVersion(all)
	now := time.Now()
	a.mu.Lock()
	_, known := a.had[version]
	if version > 0 && !known {
		a.had[version] = now
	}
	a.mu.Unlock()
	if version == 0 || known {
		return
	}
	if a.witness {
		a.verify(version, all)
	}
	for _, r := range all {
		a.source.Judge(r.Kind, r.Name, kube.Verdict{Generation: r.Generation, Accepted: true, Reason: "Valid"})
	}
}

// wholeVersion is the version that the set says and its changing service has; 0: they do not agree.
func wholeVersion(all []kube.Resource) int {
	set, service := 0, -1
	for _, r := range all {
		spec, _ := r.Spec.(map[string]any)
		switch {
		case r.Kind == policy.KindResourceSet && r.Signatures != "":
			v, _ := spec["version"].(int64)
			set = int(v)
		case r.Kind == policy.KindProtectedService && r.Name == changing:
			if ports, _ := spec["ports"].([]any); len(ports) == 1 {
				v, _ := ports[0].(int64)
				service = int(v) - changeport
			}
		}
	}
	if set != service {
		return 0
	}
	return set
}

// verify does what an agent does with a set: one reader for all of it, and signatures over its digest.
func (a *agent) verify(version int, all []kube.Resource) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadCPU()
	var documents []policy.Document
	var signatures string
	for _, r := range all {
		d, err := r.Document()
		if err != nil {
			return
		}
		documents = append(documents, d)
		signatures += r.Signatures
	}
	set, err := policy.ParseDocuments(kube.Where, documents)
	if err == nil {
		_, err = grant.VerifyResources([]byte(signatures), set, set.Keyrings(), []policy.PublicKey{a.key}, 1, time.Now())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, a.node+":", err)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.set, a.verified[version], a.cost = set, time.Now(), threadCPU()-before
}

func threadCPU() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_THREAD, &u) // it has no other reason to fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Agents are those of a process. Its exported methods are what it is asked.
type Agents struct {
	order
	ctx context.Context
	all []*agent
}

// Begin has all of them begin.
func (p *Agents) Begin(struct{}, *struct{}) error {
	for i := range p.Count {
		a, err := newAgent(p.order, p.First+i)
		if err != nil {
			return err
		}
		p.all = append(p.all, a)
	}
	for _, a := range p.all {
		go a.run(p.ctx)
	}
	return nil
}

// Reached are those that have a version.
type Reached struct {
	Had, Verified []time.Time
	Cost          []time.Duration // CPU time of each verification
}

// Version tells who has it.
func (p *Agents) Version(version int, r *Reached) error {
	for _, a := range p.all {
		a.mu.Lock()
		if at, ok := a.had[version]; ok {
			r.Had = append(r.Had, at)
		}
		if at, ok := a.verified[version]; ok {
			r.Verified, r.Cost = append(r.Verified, at), append(r.Cost, a.cost)
		}
		a.mu.Unlock()
	}
	return nil
}

// Came is one grant at one node.
type Came struct {
	Name, Node string
	At         time.Time // zero: it is not for this node, or proves nothing
}

// Grants tells of all that came.
func (p *Agents) Grants(_ struct{}, all *[]Came) error {
	for _, a := range p.all {
		a.mu.Lock()
		for name, at := range a.grants {
			*all = append(*all, Came{name, a.node, at})
		}
		a.mu.Unlock()
	}
	return nil
}

// Cost is what the process has used, and what its agents have.
type Cost struct {
	CPU                time.Duration
	Resident           int64
	Stirs, Pods, Alone int // Alone: agents that cannot follow the API server now
}

// Cost tells it.
func (p *Agents) Cost(_ struct{}, c *Cost) error {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return err
	}
	c.CPU, c.Resident = time.Duration(u.Utime.Nano()+u.Stime.Nano()), residentOf(os.Getpid(), "VmRSS:")
	for _, a := range p.all {
		a.mu.Lock()
		c.Stirs, c.Pods = c.Stirs+a.stirs, c.Pods+a.pods
		a.mu.Unlock()
		if a.source.Trouble() != nil {
			c.Alone++
		}
	}
	return nil
}

// runAgents is what the test binary does as agents: it answers until it is killed.
func runAgents(text string) int {
	var o order
	err := json.Unmarshal([]byte(text), &o)
	var l net.Listener
	if err == nil {
		l, err = net.Listen("unix", o.Socket)
	}
	server := rpc.NewServer()
	if err == nil {
		err = server.Register(&Agents{order: o, ctx: context.Background()})
	}
	if err == nil {
		server.Accept(l)
		err = errors.New("nobody can ask any more")
	}
	fmt.Fprintln(os.Stderr, "agents:", err)
	return 1
}
