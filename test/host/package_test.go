//go:build package

package host

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/test/leak"
)

const (
	service  = "10.9.0.1:5432"
	backup   = "10.9.0.2" // may get a path
	stranger = "10.9.0.3"
)

var (
	web     = spiffeid.RequireFromString("spiffe://example.org/app/web")
	proxyID = spiffeid.RequireFromString("spiffe://example.org/sallyport/proxy/node-1")
)

// The machine sees a part of the hierarchy of control groups, its own: its agent's backstop must not be that of the host.
const agentConfig = `apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: node-1}
spec: {trustDomain: example.org, resources: /etc/sallyport/resources.d, workloadAPI: "unix:///srv/shared/workload.sock", cgroup: /sys/fs/cgroup}
`

const resources = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec:
  target: Host
  ports: [5432]
  access: [{identities: ["spiffe://example.org/app/web"]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: nightly-backup}
spec: {services: [postgres], bindings: [address], sources: ["10.9.0.2"], maxDuration: 15m, requesters: [alice]}
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec: {version: 1, people: [{name: alice, keys: [{publicKey: %q}]}]}
`

// TestPackage: the life of the package on a bare Debian, as a user has it: installed, configured, the README's story by hand, upgraded
// under load, removed, purged.
func TestPackage(t *testing.T) {
	leak.Check(t)
	m := boot(t)
	authority := m.identities()
	m.wire()
	m.serve()
	m.release("v1.0.0")
	m.release("v1.1.0")

	out := m.run("sh", "-c", "dpkg -i /srv/shared/sallyport_1.0.0_*.deb")
	if !strings.Contains(out, "nothing is started: write /etc/sallyport/agent.yaml") {
		t.Errorf("installed on a bare machine, it says: %s", out)
	}
	if out, _ := m.try("systemctl", "list-units", "--plain", "--no-legend", "sallyport-*"); out != "" {
		t.Errorf("started unconfigured: %s", out)
	}
	m.configure()
	s := &story{machine: m, authority: authority}
	s.byHand()
	s.upgrade()
	s.remove()
}

// identities serves the proxy's, as SPIRE would.
func (m *machine) identities() *devauthority.Authority {
	m.t.Helper()
	a, err := devauthority.New(web.TrustDomain(), devauthority.Options{})
	must(m.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Serve(ctx, filepath.Join(m.shared, "workload.sock"), proxyID) }()
	m.t.Cleanup(func() {
		cancel()
		must(m.t, <-done)
	})
	return a
}

// serve echoes at the service's port on every address of the machine.
func (m *machine) serve() {
	m.t.Helper()
	var l net.Listener
	must(m.t, m.at("machine", func() (err error) {
		var c net.ListenConfig
		c.SetMultipathTCP(false)
		l, err = c.Listen(context.Background(), "tcp4", "0.0.0.0:5432")
		return err
	}))
	m.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
}

// release makes a package of what is in the repository.
func (m *machine) release(version string) {
	m.t.Helper()
	cmd := exec.Command("go", "run", "./tools/package", "-version", version, "-out", m.shared)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		m.t.Fatalf("make package %s: %v\n%s", version, err, out)
	}
}

// configure does what the README says.
func (m *machine) configure() {
	m.t.Helper()
	m.run("mkdir", "-p", "/sys/fs/bpf")
	m.run("mount", "-t", "bpf", "bpf", "/sys/fs/bpf") // systemd does that, but in containers
	public := regexp.MustCompile(`ed25519:[A-Za-z0-9+/=]+`).FindString(m.run("sallyport", "keygen", "--out", "/root/alice.key"))
	m.write("/etc/sallyport/resources.d/all.yaml", fmt.Sprintf(resources, public))
	m.write("/etc/sallyport/agent.yaml", agentConfig)
	m.run("sallyport-agent", "check")
	m.run("systemctl", "enable", "--now", "sallyport-agent", "sallyport-guard", "sallyport-proxy")
	m.eventually("readiness", func() bool { return m.status().Ready })
}

type status struct {
	Ready    bool   `json:"ready"`
	Version  string `json:"version"`
	Problems []any  `json:"problems"`
}

func (m *machine) status() (s status) {
	m.t.Helper()
	out, err := m.try("sallyport", "status", "-o", "json")
	if err == nil {
		must(m.t, json.Unmarshal([]byte(out), &s))
	}
	return s
}

// story is what happens to the machine that is configured.
type story struct {
	*machine
	authority *devauthority.Authority
}

func (s *story) asWeb() (*tls.Conn, error) {
	raw, err := s.dial(stranger)
	if err != nil {
		return nil, err
	}
	svid, err := s.authority.Issue(web)
	if err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return tls.Client(raw, tlsconfig.MTLSClientConfig(svid, s.authority.Bundle(), tlsconfig.AuthorizeID(proxyID))), nil
}

// echo says whether the service itself answered.
func echo(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "hello" {
		return fmt.Errorf("read %q: %w", buf, err)
	}
	return nil
}

// plain tells whether a client without an identity is answered by the service.
func (s *story) plain(from string) bool {
	c, err := s.dial(from)
	if err != nil {
		return false
	}
	defer c.Close()
	return echo(c) == nil
}

func (s *story) proxied() error {
	c, err := s.asWeb()
	if err != nil {
		return err
	}
	defer c.Close()
	return echo(c)
}

// grant opens a path for the backup.
func (s *story) grant(name, duration string) {
	s.t.Helper()
	s.run("sallyport", "grant", "issue", "--service", "postgres", "--client", backup, "--for", duration, "--node", "node-1", "--reason", "nightly backup",
		"--key", "/root/alice.key", "--policy", "/etc/sallyport/resources.d", "--out", "/root/"+name, "--yes")
	s.run("sallyport", "grant", "activate", "/root/"+name, "--key", "/root/alice.key", "--yes")
}

// byHand is the README's demo.
func (s *story) byHand() {
	s.t.Helper()
	if s.plain(stranger) || s.plain(backup) {
		s.t.Error("a plain client is answered by the service")
	}
	s.eventually("an identity is let in", func() bool { return s.proxied() == nil })
	s.grant("short.grant", "5s")
	live, err := s.dial(backup)
	must(s.t, err)
	defer live.Close()
	must(s.t, echo(live))
	if s.plain(stranger) {
		s.t.Error("the path serves somebody else")
	}
	s.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", "sallyport-agent.service")
	s.eventually("the deadline", func() bool { return errors.Is(echo(live), syscall.ECONNRESET) })
	if s.plain(backup) {
		s.t.Error("a plain client is answered after the deadline")
	}
	s.eventually("the agent is back", func() bool { return s.status().Ready })
	s.eventually("the grant is over", func() bool { // the kernel closes its path first, and the agent that is back finds it closed
		return !strings.Contains(s.run("sallyport", "grants", "-o", "json"), `"state":"active"`)
	})
	if out := s.run("sallyport", "flows"); !strings.Contains(out, "BYPASSED") || !strings.Contains(out, "PATH_EXPIRED") {
		s.t.Errorf("the log has not what happened: %s", out)
	}
}

// load is what goes on while the package is upgraded.
type load struct{ probes, leaked, clients, failed atomic.Int64 }

func (s *story) load(ctx context.Context, l *load) *sync.WaitGroup {
	var all sync.WaitGroup
	all.Go(func() {
		for ; ctx.Err() == nil; l.probes.Add(1) {
			if s.plain(stranger) {
				l.leaked.Add(1)
			}
		}
	})
	for range 2 {
		all.Go(func() {
			for ; ctx.Err() == nil; l.clients.Add(1) {
				if err := s.proxied(); err != nil {
					l.failed.Add(1)
					s.t.Errorf("client with an identity, while the package is upgraded: %v", err)
				}
			}
		})
	}
	return &all
}

// upgrade: connections of both kinds live on, every client with an identity is served, none without one.
func (s *story) upgrade() {
	s.t.Helper()
	s.grant("long.grant", "10m")
	bypassed, err := s.dial(backup)
	must(s.t, err)
	defer bypassed.Close()
	proxied, err := s.asWeb()
	must(s.t, err)
	defer proxied.Close()
	must(s.t, errors.Join(echo(bypassed), echo(proxied)))
	before := s.mainPID()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var l load
	all := s.load(ctx, &l)
	s.eventually("load", func() bool { return l.probes.Load() > 10 && l.clients.Load() > 10 })
	s.run("sh", "-c", "dpkg -i /srv/shared/sallyport_1.1.0_*.deb")
	s.eventually("another proxy", func() bool { return s.mainPID() != before })
	probes, clients := l.probes.Load(), l.clients.Load()
	s.eventually("load on the new proxy", func() bool { return l.probes.Load() > probes+20 && l.clients.Load() > clients+20 })
	for name, c := range map[string]net.Conn{"bypassed": bypassed, "proxied": proxied} {
		if err := echo(c); err != nil {
			s.t.Errorf("%s connection of before: %v", name, err)
		}
	}
	stop()
	all.Wait()
	s.t.Logf("upgraded under load: %d probes, %d leaked; %d clients, %d failed", l.probes.Load(), l.leaked.Load(), l.clients.Load(), l.failed.Load())
	if l.leaked.Load() > 0 {
		s.t.Errorf("%d probes were answered by the service", l.leaked.Load())
	}
	if now := s.status(); !now.Ready || now.Version != "v1.1.0" {
		s.t.Errorf("status %+v", now)
	}
	if exe := s.run("readlink", "/proc/"+s.mainPID()+"/exe"); strings.Contains(exe, "deleted") {
		s.t.Errorf("the proxy is still %s", exe)
	}
}

func (s *story) mainPID() string {
	s.t.Helper()
	return strings.TrimSpace(s.run("systemctl", "show", "--property=MainPID", "--value", "sallyport-proxy.service"))
}

// remove: nothing is removed while enforcement cannot be ended; then nothing but records and configuration is left, and then nothing.
func (s *story) remove() {
	s.t.Helper()
	s.run("mv", "/etc/sallyport/agent.yaml", "/root/agent.yaml")
	if out, err := s.try("dpkg", "-r", "sallyport"); err == nil || !strings.Contains(out, "nothing is removed") {
		s.t.Errorf("removed without ending enforcement: %v: %s", err, out)
	}
	if s.plain(stranger) {
		s.t.Error("a removal that was refused opened the service")
	}
	s.run("mv", "/root/agent.yaml", "/etc/sallyport/agent.yaml")
	s.t.Log(s.run("dpkg", "-r", "sallyport"))
	if !s.plain(stranger) {
		s.t.Error("the service is closed without Sallyport")
	}
	for _, gone := range []string{"/sys/fs/bpf/sallyport", "/sys/class/net/px0", "/run/sallyport/px", "/usr/bin/sallyport-agent", "/usr/lib/systemd/system/sallyport-agent.service"} {
		if out, err := s.try("ls", "-d", gone); err == nil {
			s.t.Errorf("left after the removal: %s", out)
		}
	}
	s.run("test", "-e", "/var/lib/sallyport")
	out := s.run("dpkg", "-P", "sallyport")
	if !strings.Contains(out, "records in it that are nowhere else are lost") {
		s.t.Errorf("the purge says %s", out)
	}
	left := s.run("find", "/", "-xdev", "-path", "/srv/shared", "-prune", "-o", "-name", "*sallyport*", "-print")
	left = regexp.MustCompile(`(?m)^/(proc|sys|var/log|var/lib/dpkg)/.*\n`).ReplaceAllString(left, "")
	if left != "" {
		s.t.Errorf("left after the purge:\n%s", left)
	}
	pins, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/sys/fs/bpf", s.leader))
	must(s.t, err)
	for _, p := range pins {
		if !strings.HasSuffix(p.Name(), ".debug") { // those are the kernel's own
			s.t.Errorf("left pinned: %s", p.Name())
		}
	}
}
