package agent

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
	"github.com/vishvananda/netlink"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
)

// installed is a node of a lab with a configuration, on which agents run as processes.
type installed struct {
	t      *testing.T
	lab    *lab.Lab
	signer signer
	config string
	cfg    policy.AgentConfig
	notify *net.UnixConn
	heard  chan struct{} // closed: nobody reads notify; nil: nobody did yet
}

func install(t *testing.T) *installed {
	t.Helper()
	leak.Check(t)
	in := &installed{t: t, lab: lab.New(t, lab.Options{}), signer: newSigner(t)}
	bpffs, err := in.lab.MountBPFFS()
	must(t, err)
	dir := in.lab.Dir
	in.config = filepath.Join(dir, "agent.yaml")
	must(t, os.Mkdir(filepath.Join(dir, "resources.d"), 0o755))
	must(t, os.WriteFile(in.config, fmt.Appendf(nil, `apiVersion: sallyport.dev/v1alpha1
kind: AgentConfig
metadata: {name: %s}
spec:
  trustDomain: example.org
  resources: %[2]s/resources.d
  stateDir: %[2]s/state
  runDir: %[2]s/run
  bpffs: %[3]s
  cgroup: %[4]q
  workloadAPI: unix://%[2]s/workload.sock
  devices: {pods: ["vethpod*"]}
  metrics: "127.0.0.1:9469"
`, testNode, dir, bpffs, in.lab.Cgroup()), 0o600))
	in.cfg, err = loadConfig(in.config)
	must(t, err)
	in.resources(in.signer.resources("15m"))
	in.notify, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	must(t, err)
	t.Cleanup(func() { in.deafen(); in.notify.Close() })
	return in
}

// resources replaces the only file of the directory.
func (in *installed) resources(yaml string) {
	in.t.Helper()
	must(in.t, replaceFile(filepath.Join(in.cfg.Spec.Resources, "all.yaml"), []byte(yaml), 0o644))
}

// start runs the test binary as the agent's command, on the node.
func (in *installed) start(command string) *lab.Process {
	in.t.Helper()
	self, err := os.Executable()
	must(in.t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), agentEnv+"="+command, configEnv+"="+in.config, notifyEnv+"="+in.notify.LocalAddr().String())
	p, err := in.lab.Node.Start(cmd)
	must(in.t, err)
	return p
}

// ready starts a command, waits until it says that it is ready, and then reads its signs of life: no more than ten fit into the socket.
func (in *installed) ready(command string) *lab.Process {
	in.t.Helper()
	in.deafen()
	p := in.start(command)
	buf := make([]byte, 4096)
	must(in.t, in.notify.SetReadDeadline(time.Now().Add(time.Minute)))
	for {
		n, err := in.notify.Read(buf)
		if err != nil {
			in.t.Fatalf("%s is not ready: %v\n%s", command, err, p.Output())
		}
		if strings.HasPrefix(string(buf[:n]), "READY=1") {
			break
		}
	}
	must(in.t, in.notify.SetReadDeadline(time.Time{}))
	heard := make(chan struct{})
	in.heard = heard
	go func() {
		defer close(heard)
		for err := error(nil); err == nil; {
			_, err = in.notify.Read(buf)
		}
	}()
	return p
}

// deafen ends the reading.
func (in *installed) deafen() {
	if in.heard != nil {
		_ = in.notify.SetReadDeadline(time.Now()) // closed: it has ended
		<-in.heard
	}
}

func (in *installed) agent() api.AgentClient {
	in.t.Helper()
	conn, err := grpc.NewClient("unix:"+in.cfg.AgentSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(in.t, err)
	in.t.Cleanup(func() { conn.Close() })
	return api.NewAgentClient(conn)
}

// eventually polls a condition on the agent.
func (in *installed) eventually(what string, ok func() bool) {
	in.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			in.t.Fatalf("not in time: %s", what)
		}
	}
}

// activate has alice answer a challenge of the agent, and begins the grant.
func (in *installed) activate(ctx context.Context, agent api.AgentClient, envelope []byte) (*api.ActivateReply, error) {
	c, err := agent.Challenge(ctx, &api.ChallengeRequest{})
	if err != nil {
		return nil, err
	}
	answer, err := grant.Answer(ctx, envelope, c.Challenge, in.signer.key, time.Now())
	if err != nil {
		return nil, err
	}
	return agent.Activate(ctx, &api.ActivateRequest{Envelope: envelope, Answer: answer})
}

func (in *installed) status() *api.StatusReply {
	in.t.Helper()
	s, err := in.agent().Status(in.t.Context(), &api.StatusRequest{}, grpc.WaitForReady(true))
	must(in.t, err)
	return s
}

// uninstall takes everything away and proves it with the leak check.
func (in *installed) uninstall() string {
	in.t.Helper()
	p := in.start("uninstall")
	if err := p.Wait(in.t.Context()); err != nil {
		in.t.Fatalf("uninstall: %v\n%s", err, p.Output())
	}
	return p.Output()
}

func hookedDevices(s *api.StatusReply) (out []string) {
	for _, h := range s.Hooks {
		out = append(out, h.Device+"="+h.Role)
	}
	return out
}

func TestAgentLife(t *testing.T) {
	in := install(t)
	agent := in.ready("run")
	s := in.status()
	if !s.Ready || s.Services != 1 || len(s.Problems) != 0 || s.ProxyListening || s.Node != testNode {
		t.Errorf("status: %v", s)
	}
	if got := strings.Join(hookedDevices(s), " "); !contains(got, "up0=uplink", "vethpod=pod", "lo=lo", "px0=px0", "px1=px1") {
		t.Errorf("hooks: %v", got)
	}
	if got, err := os.ReadFile(in.cfg.PolicyFile()); err != nil || !contains(string(got), "kind: ProtectedService") {
		t.Errorf("file for the proxy: %v, %q", err, got)
	}

	t.Run("devices", func(t *testing.T) { in.t = t; in.testDevices() })
	t.Run("resources", func(t *testing.T) { in.t = t; in.testResources() })
	t.Run("grants", func(t *testing.T) { in.t = t; in.testGrants() })
	t.Run("relay", func(t *testing.T) { in.t = t; in.testRelay() })
	t.Run("metrics", func(t *testing.T) { in.t = t; in.testMetrics() })
	t.Run("callers", func(t *testing.T) { in.t = t; in.testCallers() })
	t.Run("second agent", func(t *testing.T) {
		in.t = t
		p := in.start("run")
		if err := p.Wait(t.Context()); err == nil || !contains(p.Output(), ErrRunning.Error(), "hint: stop it first") {
			t.Errorf("%v\n%s", err, p.Output())
		}
	})
	t.Run("uninstall while it runs", func(t *testing.T) {
		in.t = t
		p := in.start("uninstall")
		if err := p.Wait(t.Context()); err == nil || !contains(p.Output(), ErrRunning.Error(), "hint: stop it first") {
			t.Errorf("%v\n%s", err, p.Output())
		}
	})

	in.t = t
	guard := in.ready("guard")
	must(t, agent.Stop(10*time.Second))
	if !contains(agent.Output(), "enforcement stays on") {
		t.Errorf("output: %s", agent.Output())
	}
	again := in.ready("run")
	if !contains(again.Output(), "adopted=true") {
		t.Errorf("the second start did not adopt: %s", again.Output())
	}
	must(t, again.Stop(10*time.Second))
	if out := in.uninstall(); !contains(out, "detached", "unpinned") {
		t.Errorf("uninstall: %s", out)
	}
	must(t, guard.Stop(5*time.Second))
}

func (in *installed) testDevices() {
	t := in.t
	must(t, in.lab.Node.Netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "late0"}, PeerName: "vethpodlate"}))
	in.eventually("a device that appears is hooked", func() bool {
		return contains(strings.Join(hookedDevices(in.status()), " "), "late0=uplink", "vethpodlate=pod")
	})
	link, err := in.lab.Node.Netlink.LinkByName("late0")
	must(t, err)
	must(t, in.lab.Node.Netlink.LinkDel(link))
	in.eventually("a device that is gone is forgotten", func() bool {
		return !contains(strings.Join(hookedDevices(in.status()), " "), "late0")
	})
}

func (in *installed) testResources() {
	t := in.t
	good := in.signer.resources("15m")
	before := in.status().Generation
	file := filepath.Join(in.cfg.Spec.Resources, "all.yaml")

	in.resources(strings.Replace(good, "ports: [5432, 5433]", "ports: [0]", 1))
	in.eventually("a bad file is a problem", func() bool {
		return contains(strings.Join(in.status().Problems, "\n"), file+":6", "ports")
	})
	must(t, os.Rename(in.cfg.Spec.Resources, in.cfg.Spec.Resources+".away"))
	in.eventually("a vanished directory is a problem", func() bool {
		return contains(strings.Join(in.status().Problems, "\n"), in.cfg.Spec.Resources, "no such file")
	})
	if s := in.status(); s.Generation != before || s.Services != 1 {
		t.Errorf("bad resources changed something: generation %d, was %d", s.Generation, before)
	}
	must(t, os.Rename(in.cfg.Spec.Resources+".away", in.cfg.Spec.Resources))
	in.resources(good)
	in.eventually("the problem is over", func() bool { return len(in.status().Problems) == 0 })

	must(t, os.Chmod(file, 0o666))
	in.eventually("a file that others can write is a problem", func() bool {
		return contains(strings.Join(in.status().Problems, "\n"), file, "0666")
	})
	in.resources(strings.Replace(good, "ports: [5432, 5433]", "ports: [5432, 5434]", 1))
	in.eventually("a change is put to work", func() bool { s := in.status(); return s.Generation > before && len(s.Problems) == 0 })
	in.resources(good)
	in.eventually("and back", func() bool { return in.status().Generation > before+1 })
}

func (in *installed) testGrants() {
	t := in.t
	ctx := t.Context()
	agent := in.agent()
	envelope := in.signer.envelope(t, two)
	reply, err := in.activate(ctx, agent, envelope)
	must(t, err)
	g := reply.Grant
	if g.State != stateActive || len(g.Slots) != 2 || g.Requester != "alice" || len(g.Signers) != 1 {
		t.Errorf("activated: %v", g)
	}
	paths, err := agent.Paths(ctx, &api.PathsRequest{})
	must(t, err)
	if len(paths.Paths) != 2 || paths.Paths[0].State != "active" || paths.Paths[0].Grant != g.Id || paths.Paths[0].Left.AsDuration() <= 0 {
		t.Errorf("paths: %v", paths)
	}
	server := in.lab.Node.Addr(lab.IPv4).String()
	for _, c := range []struct{ client, identity, verdict, reason string }{
		{clientA.String(), "", "BYPASSED", "PATH_OPEN"},
		{"10.1.0.77", "", "DENIED", "NO_LISTENER"}, // no proxy runs here
		{"10.1.0.77", "spiffe://example.org/a", "DENIED", "NOT_AUTHORISED"},
	} {
		e, err := agent.Explain(ctx, &api.ExplainRequest{Client: c.client, Server: server + ":5433", Identity: c.identity})
		must(t, err)
		if e.Verdict != c.verdict || e.Reason != c.reason || e.Service != "postgres" || len(e.Lines) < 2 {
			t.Errorf("explain %s %s: %v", c.client, c.identity, e)
		}
	}
	if e, err := agent.Explain(ctx, &api.ExplainRequest{Client: "10.1.0.2", Server: server + ":80"}); err != nil || e.Verdict != "NONE" {
		t.Errorf("explain an unprotected port: %v, %v", e, err)
	}
	_, err = agent.Explain(ctx, &api.ExplainRequest{Client: "10.1.0.2", Service: "postgers"})
	if err == nil || !contains(err.Error(), `"postgers": no such protected service`, "hint: ") {
		t.Errorf("explain a service that is not there: %v", err)
	}
	own := in.signer.envelope(t, func(p *grant.Payload) { p.Addresses = []netip.Addr{in.lab.Node.Addr(lab.IPv4)} })
	if _, err := in.activate(ctx, agent, own); err == nil || !contains(err.Error(), "addresses[0]", "hint: ") {
		t.Errorf("the node's own address: %v", err)
	}
	revoked, err := agent.Revoke(ctx, &api.RevokeRequest{Grant: g.Id, Why: "done"})
	must(t, err)
	if revoked.Grant.State != "revoked" || revoked.Grant.EndedWhy != "done" {
		t.Errorf("revoked: %v", revoked)
	}
	if paths, err = agent.Paths(ctx, &api.PathsRequest{}); err != nil || len(paths.Paths) != 2 || paths.Paths[0].Left.AsDuration() != 0 {
		t.Errorf("time left after the end: %v, %v", paths, err)
	}
	short, err := in.activate(ctx, agent, in.signer.envelope(t, func(p *grant.Payload) { p.Duration = time.Second }))
	must(t, err)
	in.eventually("a grant expires", func() bool {
		grants, err := agent.Grants(ctx, &api.GrantsRequest{})
		must(t, err)
		last := grants.Grants[len(grants.Grants)-1]
		return last.Id == short.Grant.Id && last.State == "expired"
	})
}

// testCallers: the records of bypassed flows say whose socket it was: a pod's, by the container that made it. Nobody attests it here.
func (in *installed) testCallers() {
	t := in.t
	agent := in.agent()
	web := in.container(testPod, testContainer)
	number, err := web.ID()
	must(t, err)
	want := &api.Workload{Pod: testPod, Container: testContainer, Cgroup: number, Why: whyNoBroker}
	for _, f := range lab.Families() {
		_, err := in.activate(t.Context(), agent, in.signer.envelope(t, func(p *grant.Payload) { p.Addresses = []netip.Addr{in.lab.Pod.Addr(f)} }))
		must(t, err)
		service, err := in.lab.Node.WhoAnswers(netip.AddrPortFrom(in.lab.Node.Addr(f), 5432))
		must(t, err)
		client := in.asksAs(web, service.Addr)
		for _, event := range []flow.Event{flow.EventOpen, flow.EventClose} {
			rec := in.recordOf(agent, client, event)
			if rec.Verdict != flow.VerdictBypassed.String() || !proto.Equal(rec.Caller, want) {
				t.Errorf("%v", rec)
			}
		}
	}
}

// container is the control group of a pod's container.
func (in *installed) container(pod, id string) (g *lab.Group) {
	in.t.Helper()
	for _, at := range []string{"kubepods", "kubepods/pod" + pod, "kubepods/pod" + pod + "/" + id} {
		var err error
		g, err = in.lab.NewGroup(at)
		must(in.t, err)
	}
	return g
}

// asksAs has a process of a group, in the pod, be answered once.
func (in *installed) asksAs(g *lab.Group, server netip.AddrPort) (client netip.AddrPort) {
	in.t.Helper()
	must(in.t, g.Do(in.lab.Pod, func() error {
		conn, err := net.Dial("tcp", server.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		client = conn.LocalAddr().(*net.TCPAddr).AddrPort()
		_, err = lab.Ask(conn)
		return err
	}))
	return client
}

// recordOf waits for the record of a client's flow.
func (in *installed) recordOf(agent api.AgentClient, client netip.AddrPort, event flow.Event) (found *api.FlowRecord) {
	in.t.Helper()
	in.eventually(event.String()+" of "+client.String(), func() bool {
		stream, err := agent.Flows(in.t.Context(), &api.AgentFlowsRequest{Limit: 50})
		must(in.t, err)
		for found = nil; ; {
			rec, err := stream.Recv()
			if err != nil {
				return found != nil
			}
			if rec.Client == client.String() && rec.Event == event.String() {
				found = rec
			}
		}
	})
	return found
}

func (in *installed) testMetrics() {
	t := in.t
	body := in.scrape()
	for _, want := range []string{
		"sallyport_ready 1", "sallyport_scrape_failed 0", `sallyport_grant_events_total{step="ACTIVATED"} 2`,
		`sallyport_grant_events_total{step="EXPIRED"} 1`, `sallyport_grant_events_total{step="REVOKED"} 1`,
		`sallyport_grant_events_total{step="REFUSED"} 1`, `sallyport_hooked_devices{role="uplink"} 1`, `sallyport_problems{class="resources"} 0`,
		`sallyport_packets_total{reason="NO_LISTENER"}`, `sallyport_audit_pending_records{class="critical"}`, `sallyport_paths{state="active"} 0`,
		"sallyport_grant_longest_seconds 0", "sallyport_grant_widest_paths 0", "sallyport_grant_unused_seconds 0",
	} {
		if !contains(body, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
}

// scrape gives the metrics.
func (in *installed) scrape() string {
	in.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
		return in.lab.Node.Dial(ctx, netip.AddrPort{}, netip.MustParseAddrPort(address))
	}}}
	reply, err := client.Get("http://" + in.cfg.Spec.Metrics + "/metrics")
	must(in.t, err)
	defer reply.Body.Close()
	return readAll(in.t, reply)
}
