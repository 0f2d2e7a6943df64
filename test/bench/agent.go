package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const groupAgent = "the real agent"

// What is measured of the agent.
const (
	agentActivate = "grant accepted: signed grant sent to reply, its path open"
	agentRevoke   = "revoke: request sent to reply"
	agentEmpty    = "resident memory, no path"
	agentFull     = "resident memory, all paths"
	agentLate     = "packets behind enforcement after the reply to a revoke"
)

const (
	agentNode  = "node-1"
	agentReady = 30 * time.Second
)

// agentRig is a node with the real agent, as it is built, and a client of it.
type agentRig struct {
	*world
	caller caller
	key    grant.PrivateKey
	bin    string
	config string
	proc   *lab.Process
	rpc    *client.Agent
}

// measureAgent activates many grants, each with a path of its own, and weighs the agent before and after.
func measureAgent(ctx context.Context, p plan, r *results) (err error) {
	bin, err := filepath.Abs(filepath.Join(p.bin, "sallyport-agent"))
	if err != nil {
		return err
	}
	if _, err := os.Stat(bin); err != nil {
		r.note("the agent is left out: %v (make build)", err)
		return nil
	}
	rig, err := startAgent(ctx, bin)
	if err != nil {
		return err
	}
	defer func() { err = joinClose(err, rig.stop) }()
	if err := rig.weigh(r, agentEmpty); err != nil {
		return err
	}
	n := pick(p, 10000, 100)
	for i := range n {
		if _, err := rig.activate(ctx, r, numbered(many(lab.IPv4), i)); err != nil {
			return err
		}
	}
	if err := rig.weighFull(ctx, p, r, n); err != nil {
		return err
	}
	for range pick(p, 50, 3) {
		if err := rig.revoke(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

func (rig *agentRig) weighFull(ctx context.Context, p plan, r *results, n int) error {
	status, err := rig.rpc.Status(ctx)
	if err != nil {
		return err
	}
	if int(status.GetLivePaths()) != n {
		return fmt.Errorf("agent has %d live paths, want %d", status.GetLivePaths(), n)
	}
	r.note("resident memory is measured with %s", counted(n, "active path"))
	return rig.weigh(r, pick(p, agentFull, "resident memory, all paths of a short run"))
}

func startAgent(ctx context.Context, bin string) (rig *agentRig, err error) {
	w, err := newWorld("agent", 1)
	if err != nil {
		return nil, err
	}
	rig = &agentRig{world: w, bin: bin}
	defer func() {
		if err != nil {
			err = joinClose(err, rig.stop)
		}
	}()
	if rig.caller, err = newCaller(w); err != nil {
		return rig, err
	}
	if err := rig.configure(); err != nil {
		return rig, err
	}
	if rig.proc, err = w.Node.Start(exec.Command(bin, "run", "--config", rig.config)); err != nil {
		return rig, err
	}
	if rig.rpc, err = client.NewAgent(filepath.Join(w.Dir, "run", "agent.sock")); err != nil {
		return rig, err
	}
	if err := rig.await(ctx); err != nil {
		return rig, err
	}
	return rig, w.start(ctx, w.Pod, "service", w.target(lab.IPv4).String())
}

// configure protects the service in the pod; one key may open it for anybody.
func (rig *agentRig) configure() (err error) {
	if rig.key, err = grant.GenerateKey(); err != nil {
		return err
	}
	bpffs, err := rig.MountBPFFS()
	if err != nil {
		return err
	}
	rig.config = filepath.Join(rig.Dir, "agent.yaml")
	resources := filepath.Join(rig.Dir, "resources.d")
	if err := os.Mkdir(resources, 0o755); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	agent := fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: %[1]s}
spec:
  trustDomain: example.org
  resources: %[2]s
  stateDir: %[3]s/state
  runDir: %[3]s/run
  bpffs: %[4]s
  cgroup: %[5]q
  workloadAPI: unix://%[3]s/none.sock
  devices: {pods: ["vethpod*"]}
`, agentNode, resources, rig.Dir, bpffs, rig.Cgroup())
	return errors.Join(os.WriteFile(rig.config, []byte(agent), 0o600),
		os.WriteFile(filepath.Join(resources, "bench.yaml"), []byte(rig.resources()), 0o600))
}

func (rig *agentRig) resources() string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: measured}
spec:
  target: Pod
  ports: [%d]
  addresses: [%q]
  access: [{identities: ["spiffe://example.org/app/web"]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: bench}
spec:
  services: [measured]
  bindings: [address]
  sources: ["10.0.0.0/8"]
  maxDuration: 1h
  requesters: [alice]
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people: [{name: alice, keys: [{publicKey: %q}]}]
`, servicePort, rig.Pod.Addr(lab.IPv4), rig.key.Public().String())
}

// await waits until the agent says that it enforces. Without a proxy it is never ready.
func (rig *agentRig) await(ctx context.Context) error {
	var last error
	for end := time.Now().Add(agentReady); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		status, err := rig.rpc.Status(ctx)
		if err == nil && status.GetServices() > 0 {
			return nil
		}
		last = err
	}
	return fmt.Errorf("agent does not enforce after %v: %w: %s", agentReady, last, rig.proc.Output())
}

// activate signs a grant for the client and has the agent open its path.
func (rig *agentRig) activate(ctx context.Context, r *results, a netip.Addr) (id string, err error) {
	envelope, err := rig.sign(ctx, a)
	if err != nil {
		return "", err
	}
	challenge, err := rig.rpc.Challenge(ctx)
	if err != nil {
		return "", err
	}
	answer, err := grant.Answer(ctx, envelope, challenge, rig.key, time.Now())
	if err != nil {
		return "", err
	}
	began := time.Now()
	g, err := rig.rpc.Activate(ctx, envelope, answer)
	if err != nil {
		return "", err
	}
	r.add(groupAgent, agentActivate, "ms", ms(time.Since(began)))
	if len(g.GetSlots()) != 1 {
		return "", fmt.Errorf("grant %s has %d paths, want 1", g.GetId(), len(g.GetSlots()))
	}
	return g.GetId(), nil
}

// revoke ends a grant while its path carries packets. There is no proxy: what arrives came by the path.
func (rig *agentRig) revoke(ctx context.Context, r *results) error {
	id, err := rig.activate(ctx, r, rig.caller.from)
	if err != nil {
		return err
	}
	late, err := rig.caller.flood(func() (time.Duration, error) {
		time.Sleep(revokeAfter) // while packets flow
		began := time.Now()
		_, err := rig.rpc.Revoke(ctx, id, "benchmark")
		r.add(groupAgent, agentRevoke, "ms", ms(time.Since(began)))
		return datapath.BootTime(), err
	})
	if err != nil {
		return err
	}
	r.add(groupAgent, agentLate, "packets", float64(late.packets))
	return nil
}

func (rig *agentRig) sign(ctx context.Context, a netip.Addr) ([]byte, error) {
	now := time.Now().UTC()
	p, err := grant.Payload{
		Requester: "alice", Service: "measured", Binding: policy.BindingAddress, Addresses: []netip.Addr{a},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(2 * time.Hour), Duration: 50 * time.Minute,
		Reason: "benchmark", Audience: agentNode,
	}.Named(now)
	if err != nil {
		return nil, err
	}
	return grant.Sign(ctx, p, rig.key)
}

var residentLine = regexp.MustCompile(`(?m)^VmRSS:\s+(\d+) kB$`)

// weigh reads what of the agent is in memory.
func (rig *agentRig) weigh(r *results, name string) error {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", rig.proc.Pid()))
	if err != nil {
		return fmt.Errorf("weigh agent: %w", err)
	}
	m := residentLine.FindSubmatch(status)
	if m == nil {
		return errors.New("weigh agent: no VmRSS in its status")
	}
	kb, err := strconv.ParseFloat(string(m[1]), 64)
	r.add(groupAgent, name, "MiB", kb/1024)
	return err
}

// stop ends the agent and what it leaves on purpose: hooks, tables and px.
func (rig *agentRig) stop() error {
	var errs []error
	if rig.rpc != nil {
		errs = append(errs, rig.rpc.Close())
	}
	if rig.proc != nil {
		errs = append(errs, rig.proc.Stop(agentReady))
		ctx, cancel := context.WithTimeout(context.Background(), agentReady)
		defer cancel()
		_, err := rig.Node.Run(ctx, rig.bin, "uninstall", "--config", rig.config)
		errs = append(errs, err)
	}
	return errors.Join(append(errs, rig.Close())...)
}
