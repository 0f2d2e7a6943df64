package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

const askPort = 9470

var (
	testDomain = spiffeid.RequireTrustDomainFromString("example.org")
	backup     = spiffeid.RequireFromPath(testDomain, "/backup/nightly") // may ask
	intruder   = spiffeid.RequireFromPath(testDomain, "/app/web")        // may not
)

// automated is a node whose agent takes requests of workloads.
type automated struct {
	*installed
	authority *devauthority.Authority
	sources   map[spiffeid.ID]*identity.Source
}

func automate(t *testing.T, ttl time.Duration, config string) *automated {
	t.Helper()
	in := install(t)
	a := &automated{installed: in, sources: map[spiffeid.ID]*identity.Source{}}
	var err error
	a.authority, err = devauthority.New(testDomain, devauthority.Options{TTL: ttl})
	must(t, err)
	text, err := os.ReadFile(in.config)
	must(t, err)
	in.configure(t, string(text)+fmt.Sprintf("  automation: {listen: [\"[::]:%d\"]%s}\n", askPort, config))
	in.resources(strings.NewReplacer("requesters: [alice]", `requesters: [alice, "spiffe://example.org/backup/*"]`,
		"bindings: [address]", "bindings: [address, tuple, workload]", `"10.0.0.0/8", `, `"10.0.0.0/8", "127.0.0.0/8", "::1", `).Replace(in.signer.resources("15m")))
	a.serve(in.cfg.AgentID(), "workload.sock")
	return a
}

// serve gives an identity to whoever opens the socket, and a source of it.
func (a *automated) serve(id spiffeid.ID, socket string) {
	a.t.Helper()
	path := filepath.Join(a.lab.Dir, socket)
	source, err := identity.New(identity.Config{Address: "unix://" + path, MinRetry: 10 * time.Millisecond})
	must(a.t, err)
	a.sources[id] = source
	for _, run := range []func(context.Context) error{
		func(ctx context.Context) error { return a.authority.Serve(ctx, path, id) }, source.Run,
	} {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- run(ctx) }()
		a.t.Cleanup(func() { cancel(); must(a.t, <-done) })
	}
	ctx, cancel := context.WithTimeout(a.t.Context(), 10*time.Second)
	defer cancel()
	must(a.t, source.Wait(ctx))
}

// dial connects a workload in a namespace to the agent.
func (a *automated) dial(id spiffeid.ID, from *lab.Namespace, to netip.Addr) *asking {
	return a.dialBy(id, to, func(ctx context.Context, at netip.AddrPort) (net.Conn, error) {
		return from.Dial(ctx, netip.AddrPort{}, at)
	})
}

func (a *automated) dialBy(id spiffeid.ID, to netip.Addr, dial func(context.Context, netip.AddrPort) (net.Conn, error)) *asking {
	a.t.Helper()
	if a.sources[id] == nil {
		a.serve(id, strings.ReplaceAll(id.Path(), "/", "-")+".sock")
	}
	h := &asking{automated: a}
	s := a.sources[id]
	conn, err := grpc.NewClient("passthrough:///"+netip.AddrPortFrom(to, askPort).String(),
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(s, s, tlsconfig.AuthorizeID(a.cfg.AgentID())))),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			raw, err := dial(ctx, netip.AddrPortFrom(to, askPort))
			h.raw = raw
			return raw, err
		}))
	must(a.t, err)
	a.t.Cleanup(func() { conn.Close() })
	h.conn, h.rpc = conn, api.NewAutomationClient(conn)
	return h
}

// asking is a workload that asks.
type asking struct {
	*automated
	conn   *grpc.ClientConn
	rpc    api.AutomationClient
	raw    net.Conn
	stream api.Automation_HoldClient
}

// say begins a stream and gives the agent's first word.
func (h *asking) say(r *api.HoldRequest) (*api.PathOpened, error) {
	h.t.Helper()
	var err error
	h.stream, err = h.rpc.Hold(h.t.Context(), grpc.WaitForReady(true))
	must(h.t, err)
	must(h.t, h.stream.Send(r))
	reply, err := h.stream.Recv()
	return reply.GetOpened(), err
}

func (h *asking) ask(change func(*api.PathRequest)) (*api.PathOpened, error) {
	h.t.Helper()
	r := &api.PathRequest{Service: "postgres", Duration: durationpb.New(time.Minute), Reason: "nightly backup"}
	if change != nil {
		change(r)
	}
	return h.say(&api.HoldRequest{Want: &api.HoldRequest_Path{Path: r}})
}

func (h *asking) open(change func(*api.PathRequest)) *api.PathOpened {
	h.t.Helper()
	opened, err := h.ask(change)
	if err != nil {
		h.t.Fatalf("ask: %v", err)
	}
	return opened
}

// endedWhy waits for the end of a grant, and tells why.
func (a *automated) endedWhy(id string) (why string) {
	a.t.Helper()
	a.eventually("the end of "+id, func() bool {
		reply, err := a.agent().Grants(a.t.Context(), &api.GrantsRequest{})
		must(a.t, err)
		for _, g := range reply.Grants {
			if g.Id == id && g.State != stateActive {
				why = g.EndedWhy
				return true
			}
		}
		return false
	})
	return why
}

// openPaths are those of a grant that are open in the kernel.
func (a *automated) openPaths(id string) (n int) {
	a.t.Helper()
	reply, err := a.agent().Paths(a.t.Context(), &api.PathsRequest{})
	must(a.t, err)
	for _, p := range reply.Paths {
		if p.Grant == id && p.State == "active" {
			n++
		}
	}
	return n
}

// reaches tells whether a client gets to the service itself. Nobody else would answer: there is no proxy.
func (a *automated) reaches(from *lab.Namespace, local, to netip.AddrPort) bool {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), time.Second)
	defer cancel()
	_, _, err := from.Ask(ctx, local, to)
	return err == nil
}

func (a *automated) postgres(f lab.Family) netip.AddrPort {
	a.t.Helper()
	s, err := a.lab.Node.WhoAnswers(netip.AddrPortFrom(a.lab.Node.Addr(f), 5432))
	must(a.t, err)
	return s.Addr
}

// TestHold: a workload's path serves the address that it asked from, for as long as its stream lasts, and all of it is on
// record.
func TestHold(t *testing.T) {
	a := automate(t, time.Hour, "")
	agent := a.ready("run")
	for _, f := range lab.Families() {
		to := a.postgres(f)
		h := a.dial(backup, a.lab.Client, a.lab.Node.Addr(f))
		if a.reaches(a.lab.Client, netip.AddrPort{}, to) {
			t.Fatalf("%v: reached without a path", f)
		}
		g := h.open(nil)
		if g.Client != a.lab.Client.Addr(f).String() || g.Node != testNode || time.Until(g.Deadline.AsTime()) > time.Minute {
			t.Errorf("%v: opened %v", f, g)
		}
		if !a.reaches(a.lab.Client, netip.AddrPort{}, to) {
			t.Errorf("%v: not reached under the path", f)
		}
		if a.reaches(a.lab.Pod, netip.AddrPort{}, to) {
			t.Errorf("%v: another client reached it", f)
		}
		must(t, h.stream.CloseSend())
		if _, err := h.stream.Recv(); err == nil || a.openPaths(g.Grant) != 0 {
			t.Errorf("%v: given back, but %v and %d paths are open", f, err, a.openPaths(g.Grant))
		}
		if why := a.endedWhy(g.Grant); why != whyGivenBack {
			t.Errorf("%v: ended because %q", f, why)
		}
		if a.reaches(a.lab.Client, netip.AddrPort{}, to) {
			t.Errorf("%v: reached after its end", f)
		}

		g = h.open(nil)
		must(t, h.raw.Close())
		if why := a.endedWhy(g.Grant); why != whyHolderGone || a.openPaths(g.Grant) != 0 {
			t.Errorf("%v: the connection broke, and it ended because %q", f, why)
		}
	}
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}

// TestRefusedWorkloads: what policy or the agent does not allow is refused in words, and leaves no path.
func TestRefusedWorkloads(t *testing.T) {
	a := automate(t, time.Hour, `, sharedAddresses: ["10.2.0.2"], requestsPerMinute: 600`)
	agent := a.ready("run")
	to := a.lab.Node.Addr(lab.IPv4)
	tuple := func(r *api.PathRequest) {
		r.Binding, r.ClientPort, r.Ports = policy.BindingTuple, 40321, []uint32{5432}
	}
	for _, c := range []struct {
		name   string
		id     spiffeid.ID
		from   *lab.Namespace
		change func(*api.PathRequest)
		says   []string
	}{
		{"not a requester", intruder, a.lab.Client, nil, []string{"requester", "spiffe://example.org/app/web", "hint: "}},
		{"too long", backup, a.lab.Client, func(r *api.PathRequest) { r.Duration = durationpb.New(time.Hour) }, []string{"duration", "over the cap of 15m"}},
		{"for ever", backup, a.lab.Client, func(r *api.PathRequest) { r.Duration = nil }, []string{"duration", "every grant ends"}},
		{"unknown service", backup, a.lab.Client, func(r *api.PathRequest) { r.Service = "mysql" }, []string{"service", "mysql"}},
		{"no reason", backup, a.lab.Client, func(r *api.PathRequest) { r.Reason = "" }, []string{"reason"}},
		{"port beyond", backup, a.lab.Client, func(r *api.PathRequest) { r.Ports = []uint32{70000} }, []string{"ports", "70000"}},
		{"unknown binding", backup, a.lab.Client, func(r *api.PathRequest) { r.Binding = "host" }, []string{"binding"}},
		{"the node itself", backup, a.lab.Node, nil, []string{"an address of the node", "--binding workload"}},
		{"shared address", backup, a.lab.Pod, nil, []string{"10.2.0.2", "address of many hosts"}},
		{"a port of the node itself", backup, a.lab.Node, tuple, []string{"an address of the node", "--binding workload"}},
		{"a port of a shared address", backup, a.lab.Pod, tuple, []string{"10.2.0.2", "address of many hosts"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := a.dial(c.id, c.from, to)
			_, err := h.ask(c.change)
			if s := status.Convert(err); s.Code() != codes.InvalidArgument || !contains(s.Message(), c.says...) {
				t.Errorf("%v", err)
			}
		})
	}
	if reply, err := a.agent().Paths(t.Context(), &api.PathsRequest{}); err != nil || len(reply.Paths) != 0 {
		t.Errorf("paths: %v, %v", reply, err)
	}
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}

// TestIdentityBoundsPath: a path ends with the certificate that its holder showed, and at once when the trust in it ends.
func TestIdentityBoundsPath(t *testing.T) {
	a := automate(t, 40*time.Second, "")
	agent := a.ready("run")
	h := a.dial(backup, a.lab.Client, a.lab.Node.Addr(lab.IPv4))
	g := h.open(func(r *api.PathRequest) { r.Duration = durationpb.New(10 * time.Minute) })
	if left := time.Until(g.Deadline.AsTime()); left > 40*time.Second {
		t.Errorf("the path lasts %s, longer than the certificate", left)
	}
	must(t, a.authority.ReplaceRoot())
	reply, err := h.stream.Recv()
	if err != nil || !contains(reply.GetEnded().GetWhy(), "identity no longer holds") || a.openPaths(g.Grant) != 0 {
		t.Errorf("the trust bundle has changed: %v, %v", reply, err)
	}
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}

// TestNoIdentityNoListener: without an identity of its own the agent enforces, but takes no requests, and says why.
func TestNoIdentityNoListener(t *testing.T) {
	a := automate(t, time.Hour, "")
	a.authority.Withdraw(a.cfg.AgentID())
	agent := a.ready("run")
	a.eventually("the problem", func() bool {
		return contains(strings.Join(a.status().Problems, "\n"), "automation: not listening for workloads", "issues no identity")
	})
	if s := a.status(); !s.Ready {
		t.Errorf("status: %v", s)
	}
	if c, err := a.lab.Client.Dial(t.Context(), netip.AddrPort{}, netip.AddrPortFrom(a.lab.Node.Addr(lab.IPv4), askPort)); err == nil {
		c.Close()
		t.Error("it listens")
	}
	a.authority.Restore(a.cfg.AgentID())
	a.eventually("no problem", func() bool { return len(a.status().Problems) == 0 })
	a.dial(backup, a.lab.Client, a.lab.Node.Addr(lab.IPv4)).open(nil)
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}

// TestHolderComesBack: a path outlives a restart of the agent, for a holder that comes back; one that does not is gone.
func TestHolderComesBack(t *testing.T) {
	a := automate(t, time.Hour, "")
	agent := a.ready("run")
	node := a.lab.Node.Addr(lab.IPv4)
	first, second := a.dial(backup, a.lab.Client, node), a.dial(backup, a.lab.Pod, node)
	back, lost := first.open(nil), second.open(nil)
	if _, err := a.dial(backup, a.lab.Client, node).take(back.Grant); status.Code(err) != codes.Unavailable {
		t.Errorf("taken up while it is held: %v", err) // not NotFound: that says that it is closed
	}
	must(t, agent.Kill())
	agent = a.ready("run")
	for who, h := range map[string]*asking{"somebody else": a.dial(intruder, a.lab.Client, node), "another address": a.dial(backup, a.lab.Pod, node)} {
		if _, err := h.take(back.Grant); status.Code(err) != codes.NotFound {
			t.Errorf("taken up by %s: %v", who, err)
		}
	}
	h := a.dial(backup, a.lab.Client, node)
	if _, err := h.take(back.Grant); err != nil {
		t.Errorf("take up: %v", err)
	}
	in := time.Now()
	a.eventuallyWithin(2*holderGrace, "the end of what nobody took up", func() bool { return a.openPaths(lost.Grant) == 0 })
	if why := a.endedWhy(lost.Grant); !contains(why, whyHolderGone) || time.Since(in) > holderGrace+3*time.Second {
		t.Errorf("ended after %s because %q", time.Since(in), why)
	}
	if a.openPaths(back.Grant) != 1 {
		t.Error("what was taken up has ended")
	}
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}

func (h *asking) take(grant string) (*api.PathOpened, error) {
	h.t.Helper()
	return h.say(&api.HoldRequest{Want: &api.HoldRequest_Grant{Grant: grant}})
}

// eventuallyWithin is eventually for what takes longer.
func (in *installed) eventuallyWithin(d time.Duration, what string, ok func() bool) {
	in.t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(d); !ok(); {
		select {
		case <-tick.C:
		case <-deadline:
			in.t.Fatalf("not in time: %s", what)
		}
	}
}

// TestWorkloadsPath: a path that a workload of the node asked for serves its own control group, whose number it never says,
// and no other process with the same address; a tuple's serves one connection from the port that it named.
func TestWorkloadsPath(t *testing.T) {
	a := automate(t, time.Hour, "")
	agent := a.ready("run")
	group, err := a.lab.NewGroup("nightly")
	must(t, err)
	_, err = a.lab.Pod.Start(exec.Command("sleep", "1h")) // shows the pod's namespace
	must(t, err)
	for _, f := range lab.Families() {
		to := a.postgres(f)
		for where, ns := range map[string]*lab.Namespace{"node": a.lab.Node, "pod": a.lab.Pod} {
			h := a.dialIn(backup, group, ns, a.lab.Node.Addr(f))
			g := h.open(func(r *api.PathRequest) { r.Binding = policy.BindingWorkload })
			if !a.groupReaches(group, ns, netip.AddrPort{}, to) {
				t.Errorf("%s, %v: the workload does not reach it", where, f)
			}
			if a.reaches(ns, netip.AddrPort{}, to) {
				t.Errorf("%s, %v: another process reached it", where, f)
			}
			must(t, h.raw.Close())
			if why := a.endedWhy(g.Grant); why != whyHolderGone || a.groupReaches(group, ns, netip.AddrPort{}, to) || a.reaches(ns, netip.AddrPort{}, to) {
				t.Errorf("%s, %v: its holder is dead (%q), and somebody reaches it", where, f, why)
			}
		}

		h := a.dial(backup, a.lab.Client, a.lab.Node.Addr(f))
		const port = 40321
		local := netip.AddrPortFrom(a.lab.Client.Addr(f), port)
		g := h.open(func(r *api.PathRequest) {
			r.Binding, r.ClientPort, r.Ports = policy.BindingTuple, port, []uint32{5432}
		})
		if a.reaches(a.lab.Client, netip.AddrPort{}, to) {
			t.Errorf("tuple, %v: another port reached it", f)
		}
		if !a.reaches(a.lab.Client, local, to) {
			t.Errorf("tuple, %v: its port did not reach it", f)
		}
		must(t, h.stream.CloseSend())
		a.endedWhy(g.Grant)
	}

	outside := a.dial(backup, a.lab.Client, a.lab.Node.Addr(lab.IPv4))
	if _, err := outside.ask(func(r *api.PathRequest) { r.Binding = policy.BindingTuple }); !contains(fmt.Sprint(err), "clientPort", "ports") {
		t.Errorf("a tuple without its ports: %v", err)
	}
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}

// dialIn is dial from a control group.
func (a *automated) dialIn(id spiffeid.ID, g *lab.Group, from *lab.Namespace, to netip.Addr) *asking {
	return a.dialBy(id, to, func(ctx context.Context, at netip.AddrPort) (c net.Conn, err error) {
		err = g.Do(from, func() error {
			var d net.Dialer
			c, err = d.DialContext(ctx, "tcp", at.String())
			return err
		})
		return c, err
	})
}

// groupReaches is reaches for a socket of a control group.
func (a *automated) groupReaches(g *lab.Group, from *lab.Namespace, local, to netip.AddrPort) (reached bool) {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), time.Second)
	defer cancel()
	_ = g.Do(from, func() error {
		d := net.Dialer{}
		if local.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(local)
		}
		c, err := d.DialContext(ctx, "tcp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = lab.Ask(c)
		reached = err == nil
		return err
	})
	return reached
}

// TestAskingCostsLittle: a stream that asks for nothing ends, and what a refusal adds to the store has a bound.
func TestAskingCostsLittle(t *testing.T) {
	a := automate(t, time.Hour, "")
	agent := a.ready("run")
	h := a.dial(backup, a.lab.Client, a.lab.Node.Addr(lab.IPv4))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	silent, err := h.rpc.Hold(ctx, grpc.WaitForReady(true))
	must(t, err)
	if _, err := silent.Recv(); status.Code(err) != codes.DeadlineExceeded || !contains(err.Error(), "nothing was asked for") {
		t.Errorf("a silent stream ended with %v", err)
	}
	if _, err := h.ask(func(r *api.PathRequest) { r.Ports = make([]uint32, 1024) }); err == nil {
		t.Error("a thousand wrong ports are no fault")
	}
	must(t, agent.Stop(10*time.Second))
	kept, err := store.Open(storeFile(a.cfg))
	must(t, err)
	entries, err := kept.Entries(t.Context(), 0, 100)
	must(t, errors.Join(err, kept.Close()))
	for _, e := range entries {
		if len(e.Data) > 2*maxWhy {
			t.Errorf("entry %d holds %d bytes", e.Seq, len(e.Data))
		}
	}
	a.uninstall()
}

// TestConnectionsThatAskForNothing: one identity has a bound on them and they do not stay; meanwhile others ask, and people do.
func TestConnectionsThatAskForNothing(t *testing.T) {
	a := automate(t, time.Hour, ", pathsPerIdentity: 2")
	agent := a.ready("run")
	node := a.lab.Node.Addr(lab.IPv4)
	connect := func(id spiffeid.ID) *grpc.ClientConn {
		h := a.dial(id, a.lab.Client, node)
		h.conn.Connect()
		return h.conn
	}
	becomes := func(c *grpc.ClientConn, want connectivity.State) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 3*unusedFor)
		defer cancel()
		for s := c.GetState(); s != want; s = c.GetState() {
			if !c.WaitForStateChange(ctx, s) {
				t.Fatalf("a connection is %v, want %v", s, want)
			}
		}
	}
	var idle []*grpc.ClientConn
	for range 4 {
		idle = append(idle, connect(intruder))
	}
	for _, c := range idle {
		becomes(c, connectivity.Ready)
	}
	becomes(connect(intruder), connectivity.TransientFailure)
	g := a.dial(backup, a.lab.Client, node).open(nil)
	signed := a.signer.envelope(t, func(p *grant.Payload) { p.Addresses = []netip.Addr{netip.MustParseAddr("10.9.0.9")} })
	if _, err := a.activate(t.Context(), a.agent(), signed); err != nil {
		t.Errorf("a person is refused: %v", err)
	}
	for _, c := range idle {
		becomes(c, connectivity.Idle)
	}
	becomes(connect(intruder), connectivity.Ready)
	if a.openPaths(g.Grant) != 1 {
		t.Error("a connection that holds a path was closed")
	}
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}

// TestPeopleComeFirst: a path that a workload holds is in nobody's way who has a signed grant, and its holder is told.
func TestPeopleComeFirst(t *testing.T) {
	a := automate(t, time.Hour, "")
	agent := a.ready("run")
	h := a.dial(backup, a.lab.Client, a.lab.Node.Addr(lab.IPv4))
	g := h.open(nil)
	signed := a.signer.envelope(t, func(p *grant.Payload) { p.Addresses = []netip.Addr{a.lab.Client.Addr(lab.IPv4)} })
	reply, err := a.activate(t.Context(), a.agent(), signed)
	must(t, err)
	if why := a.endedWhy(g.Grant); !contains(why, reply.Grant.Id, "alice") {
		t.Errorf("ended because %q", why)
	}
	if _, err := h.stream.Recv(); err == nil {
		if _, err = h.stream.Recv(); err == nil {
			t.Error("the holder was not told")
		}
	}
	if _, err := a.dial(backup, a.lab.Client, a.lab.Node.Addr(lab.IPv4)).ask(nil); err == nil {
		t.Error("the workload took the place of a person's grant")
	}
	if a.openPaths(reply.Grant.Id) != 1 {
		t.Error("the person's path is not open")
	}
	must(t, agent.Stop(10*time.Second))
	a.uninstall()
}
