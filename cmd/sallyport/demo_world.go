package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// What the demo is made of. The addresses exist in its namespaces only.
const (
	demoDomain = "demo.sallyport.dev"
	demoName   = "node-1"
	demoNode   = "10.97.0.1"
	demoClient = "10.97.0.2"
	demoPort   = 7000
)

// demoWorld is everything that exists for the demo. close removes it.
type demoWorld struct {
	dir, bin string
	cgroup   string // of all that the demo starts
	keep     bool
	node     *space
	client   *space
	key      grant.PrivateKey
	service  *demoService
	agent    *client.Agent
	audit    *client.Audit

	spire         *devauthority.SPIRE // nil: the embedded authority
	stopAuthority context.CancelFunc
	authority     sync.WaitGroup
	processes     []*demoProcess
	logs          []demoLog
}

// newDemoWorld makes namespaces, authority, configuration and service; the processes are started by
// the story. It leaves nothing behind when it fails.
func (c *cli) newDemoWorld(ctx context.Context, provider demoProvider, keep bool) (w *demoWorld, err error) {
	w = &demoWorld{keep: keep, stopAuthority: func() {}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	self, err := c.executable()
	if err != nil {
		return w, fmt.Errorf("find own binary: %w", err)
	}
	w.bin = filepath.Dir(self)
	authority := func() error { return w.makeAuthority(ctx) }
	if provider == demoSPIRE {
		authority = func() error { return w.makeSPIRE(c.getenv(devauthority.SPIREVariable)) }
	}
	for _, step := range []func() error{w.makeDir, w.makeCgroup, w.makeSpaces, authority, w.writeConfig} {
		if err := step(); err != nil {
			return w, err
		}
	}
	w.service, err = w.serve()
	return w, err
}

// makeDir is below /run, where every parent is root's: the agent asks for that.
func (w *demoWorld) makeDir() (err error) {
	if w.dir, err = os.MkdirTemp("/run", "sallyport-demo-"); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if err := os.Chmod(w.dir, 0o755); err != nil { // the proxy, which is not root, passes through
		return fmt.Errorf("open directory: %w", err)
	}
	for _, d := range []string{"bpf", "resources", "workload"} {
		if err := os.Mkdir(w.path(d), 0o755); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
	}
	if err := unix.Mount("bpf", w.path("bpf"), "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount bpffs: %w", err)
	}
	return nil
}

func (w *demoWorld) path(name string) string { return filepath.Join(w.dir, name) }

func (w *demoWorld) makeSpaces() (err error) {
	if w.node, err = newSpace(w.cgroup); err != nil {
		return err
	}
	if w.client, err = newSpace(w.cgroup); err != nil {
		return err
	}
	if err := errors.Join(w.node.loopback(), w.client.loopback()); err != nil {
		return err
	}
	return connect(w.node, w.client)
}

// demoIdentities are all that the demo knows; the embedded authority has a Workload API socket for each.
var demoIdentities = map[string]string{
	"agent": "/sallyport/agent/" + demoName, "proxy": "/sallyport/proxy/" + demoName,
	"collector": "/sallyport/collector", "app": "/app/web",
}

func (w *demoWorld) makeAuthority(ctx context.Context) error {
	td, err := spiffeid.TrustDomainFromString(demoDomain)
	if err != nil {
		return err
	}
	authority, err := devauthority.New(td, devauthority.Options{TTL: time.Hour})
	if err != nil {
		return fmt.Errorf("make authority: %w", err)
	}
	ctx, w.stopAuthority = context.WithCancel(ctx)
	for name, path := range demoIdentities {
		id, err := spiffeid.FromPath(td, path)
		if err != nil {
			return err
		}
		w.authority.Go(func() {
			_ = authority.Serve(ctx, w.path("workload/"+name), id) // a failure shows as a process that is not ready
		})
	}
	return nil
}

func (w *demoWorld) workloadAPI(name string) string {
	if w.spire != nil {
		return w.spire.Address() // which tells them apart itself
	}
	return "unix://" + w.path("workload/"+name)
}

func (w *demoWorld) writeConfig() (err error) {
	if w.key, err = grant.GenerateKey(); err != nil {
		return err
	}
	files := map[string]string{
		"agent.yaml": w.agentConfig("agent"), "proxy.yaml": w.agentConfig("proxy"), "collector.yaml": w.collectorConfig(),
		"resources/demo.yaml": w.resources(),
	}
	for name, text := range files {
		if err := os.WriteFile(w.path(name), []byte(text), 0o644); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
	}
	return nil
}

// agentConfig is for the agent and the proxy: each may have its identity from a socket of its own.
func (w *demoWorld) agentConfig(who string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: %s}
spec:
  trustDomain: %s
  resources: %s
  stateDir: %s
  runDir: %s
  bpffs: %s
  cgroup: %s
  workloadAPI: %s
  collector: {address: "127.0.0.1:9443"}
`, demoName, demoDomain, w.path("resources"), w.path("state"), w.path("run"), w.path("bpf"), w.cgroup, w.workloadAPI(who))
}

func (w *demoWorld) collectorConfig() string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: CollectorConfig
metadata: {name: collector}
spec:
  trustDomain: %s
  listen: 127.0.0.1:9443
  workloadAPI: %s
  dataDir: %s
  socket: %s
`, demoDomain, w.workloadAPI("collector"), w.path("records"), w.path("collector.sock"))
}

func (w *demoWorld) resources() string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: demo}
spec:
  target: Host
  ports: [%d]
  access:
    - identities: ["spiffe://%s/app/web"]
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: demo}
spec:
  services: [demo]
  bindings: [address]
  sources: ["%s"]
  maxDuration: 1m
  requesters: [alice]
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people:
    - name: alice
      keys:
        - publicKey: "%s"
`, demoPort, demoDomain, demoClient, w.key.Public())
}

// close removes everything, in the reverse order, and goes on after an error. Hooks go with their
// devices and pins even when uninstall was never reached.
func (w *demoWorld) close() error {
	var errs []error
	for _, p := range slices.Backward(w.processes) {
		errs = append(errs, p.kill())
		w.logs = append(w.logs, p.log())
		errs = append(errs, p.output.Close())
	}
	if w.agent != nil {
		errs = append(errs, w.agent.Close(), w.audit.Close())
	}
	if w.service != nil {
		errs = append(errs, w.service.listener.Close())
	}
	w.stopAuthority()
	w.authority.Wait()
	for _, s := range []*space{w.client, w.node} {
		if s != nil {
			errs = append(errs, s.close())
		}
	}
	return errors.Join(append(errs, w.removeCgroup(), w.removeDir())...)
}

// removeDir unmounts the bpffs, and the px namespace if it is still pinned.
func (w *demoWorld) removeDir() error {
	if w.dir == "" {
		return nil
	}
	var errs []error
	for _, mount := range []string{"run/px", "bpf"} {
		err := unix.Unmount(w.path(mount), unix.MNT_DETACH)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", mount, err))
		}
	}
	if w.keep {
		return errors.Join(errs...)
	}
	return errors.Join(append(errs, os.RemoveAll(w.dir))...)
}
