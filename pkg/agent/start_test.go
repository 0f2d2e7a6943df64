package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestWrongStarts: each wrong input names itself and the next step, and leaves nothing behind.
func TestWrongStarts(t *testing.T) {
	in := install(t)
	good, err := os.ReadFile(in.config)
	must(t, err)
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T)
		says  []string
	}{
		{"unknown key", func(t *testing.T) { in.configure(t, string(good)+"  leese: 3s\n") }, []string{in.config + ":14", "leese", "hint: "}},
		{"configuration that others can write", func(t *testing.T) { must(t, os.Chmod(in.config, 0o622)) }, []string{in.config, "0622", "hint: "}},
		{"no configuration", func(t *testing.T) { must(t, os.Remove(in.config)) }, []string{in.config, "hint: "}},
		{"no bpffs", func(t *testing.T) {
			in.configure(t, strings.Replace(string(good), in.cfg.Spec.BPFFS, in.lab.Dir, 1))
		}, []string{"bpffs", in.lab.Dir, "hint: "}},
		{"no control group", func(t *testing.T) {
			in.configure(t, strings.Replace(string(good), in.cfg.Spec.Cgroup, in.lab.Dir, 1))
		}, []string{"no cgroup v2", "nothing is enforced", in.lab.Dir, "hint: "}},
		{"bad resources on the first start", func(t *testing.T) {
			in.resources(strings.Replace(in.signer.resources("15m"), "ports: [5432, 5433]", "ports: [0]", 1))
		}, []string{"all.yaml:6", "ports", "hint: "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in.configure(t, string(good))
			in.resources(in.signer.resources("15m"))
			c.spoil(t)
			p := in.start("run")
			if err := p.Wait(t.Context()); err == nil || !contains(p.Output(), c.says...) {
				t.Errorf("%v\n%s", err, p.Output())
			}
			if _, err := in.lab.Node.Ifindex(px.HostDevice); err == nil && !strings.Contains(c.name, "resources") {
				t.Error("px0 was left behind")
			}
		})
	}
	in.configure(t, string(good))
	in.resources(in.signer.resources("15m"))
	in.uninstall()
}

func (in *installed) configure(t *testing.T, yaml string) {
	t.Helper()
	must(t, replaceFile(in.config, []byte(yaml), 0o600))
}

// TestPrivateBPFFS: pins that only this mount namespace sees would vanish with it.
func TestPrivateBPFFS(t *testing.T) {
	in := install(t)
	private := filepath.Join(in.lab.Dir, "private")
	must(t, os.Mkdir(private, 0o700))
	good, err := os.ReadFile(in.config)
	must(t, err)
	in.configure(t, strings.Replace(string(good), in.cfg.Spec.BPFFS, private, 1))
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", `mount -t bpf bpf "$1" && exec "$2"`, "sh", private, self)
	cmd.Env = append(os.Environ(), agentEnv+"=run", configEnv+"="+in.config)
	p, err := in.lab.Node.Start(cmd)
	must(t, err)
	if err := p.Wait(t.Context()); err == nil || !contains(p.Output(), "private to this mount namespace", "hint: ") {
		t.Errorf("%v\n%s", err, p.Output())
	}
	if _, err := in.lab.Node.Ifindex(px.HostDevice); err == nil {
		t.Error("px0 was left behind")
	}
}

// TestNoCgroup: without control groups of version 2 there is no backstop, and nothing is enforced or changed.
func TestNoCgroup(t *testing.T) {
	in := install(t)
	good, err := os.ReadFile(in.config)
	must(t, err)
	in.configure(t, strings.Replace(string(good), fmt.Sprintf("  cgroup: %q\n", in.cfg.Spec.Cgroup), "", 1))
	self, err := os.Executable()
	must(t, err)
	root, err := datapath.FindCgroup()
	must(t, err)
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", `umount -l "$1" && exec "$2"`, "sh", root, self)
	cmd.Env = append(os.Environ(), agentEnv+"=run", configEnv+"="+in.config)
	p, err := in.lab.Node.Start(cmd)
	must(t, err)
	if err := p.Wait(t.Context()); err == nil || !contains(p.Output(), "no cgroup v2 is mounted", "hint: mount it") {
		t.Errorf("%v\n%s", err, p.Output())
	}
	if _, err := in.lab.Node.Ifindex(px.HostDevice); err == nil {
		t.Error("px0 was left behind")
	}
}

// TestRestartWithBadResources: the last verified set is enforced, and what is wrong stands in the status.
func TestRestartWithBadResources(t *testing.T) {
	in := install(t)
	agent := in.ready("run")
	must(t, agent.Kill())
	in.resources("nonsense")
	agent = in.ready("run")
	if s := in.status(); !s.Ready || s.Services != 1 || !contains(strings.Join(s.Problems, "\n"), "all.yaml") {
		t.Errorf("status: %v", s)
	}
	must(t, agent.Stop(10*time.Second))
	in.uninstall()
}

func TestCheck(t *testing.T) {
	in := install(t)
	must(t, Check(Options{ConfigFile: in.config}))
	file := filepath.Join(in.cfg.Spec.Resources, "all.yaml")
	in.resources(strings.Replace(in.signer.resources("15m"), "ports: [5432, 5433]", "ports: [0]", 1))
	must(t, os.Chmod(file, 0o602))
	if err := Check(Options{ConfigFile: in.config}); err == nil || !contains(err.Error(), file+":6", "0602") {
		t.Errorf("%v", err)
	}
}

// What the agent refuses of a good set, and what the proxy will miss, is no "ok".
func TestCheckHoldsTheSetToTheNode(t *testing.T) {
	in := install(t)
	in.resources(strings.Replace(in.signer.resources("15m"), "ports: [5432, 5433]", "ports: [5432, 5433]\n  access: [{identities: [\"spiffe://exmaple.org/app/*\"]}]", 1))
	text, err := os.ReadFile(in.config)
	must(t, err)
	with := strings.Replace(string(text), "spec:", "spec:\n  proxy: {certificates: [{name: web, certFile: /nowhere/web.crt, keyFile: /nowhere/web.key}]}", 1)
	must(t, os.WriteFile(in.config, []byte(with), 0o600))
	if err := Check(Options{ConfigFile: in.config}); err == nil || !contains(err.Error(), "nobody can ever come in", "spec.proxy.certificates[0]", "/nowhere/web.crt") {
		t.Errorf("%v", err)
	}
}

// TestFlows: what the agent keeps, and each record after it; followers leave when the agent stops.
func TestFlows(t *testing.T) {
	stopping := make(chan struct{})
	o := &operators{recent: newRecent(8), stopping: stopping}
	ep, err := newEndpoint(filepath.Join(t.TempDir(), "agent.sock"), callers{uids: []uint32{0}},
		func(r grpc.ServiceRegistrar) { api.RegisterAgentServer(r, o) })
	must(t, err)
	done := make(chan error, 1)
	go func() { done <- ep.Run(t.Context()) }()
	in := &installed{t: t}
	in.cfg.Spec.RunDir = filepath.Dir(ep.path)
	for i := range 3 {
		o.recent.add(flow.Record{Seq: uint64(i), Event: flow.EventOpen})
	}
	stream, err := in.agent().Flows(t.Context(), &api.AgentFlowsRequest{Follow: true, Limit: 2})
	must(t, err)
	var got []string
	for i := range 4 {
		rec, err := stream.Recv()
		must(t, err)
		got = append(got, fmt.Sprint(rec.Seq))
		if i == 1 {
			o.recent.add(flow.Record{Seq: 3, Event: flow.EventOpen})
			o.recent.add(flow.Record{Seq: 4, Event: flow.EventOpen})
		}
	}
	if strings.Join(got, " ") != "1 2 3 4" {
		t.Errorf("followed: %v", got)
	}
	close(stopping)
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("after the stop: %v", err)
	}
}
