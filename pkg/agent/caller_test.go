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
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	testPod       = "0c6f6a43-77c9-4b4e-9a4c-0f4a5bfb1d6e"
	otherPod      = "9d1f6a43-77c9-4b4e-9a4c-0f4a5bfb1d6e"
	testContainer = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
)

var (
	ofPodID     = spiffeid.RequireFromPath(testDomain, "/ns/shop/sa/web")
	ofProcessID = spiffeid.RequireFromPath(testDomain, "/host/cron")
	agentID     = spiffeid.RequireFromPath(testDomain, "/sallyport/agent/node-1")
	spireID     = spiffeid.RequireFromPath(testDomain, "/spire/agent/join_token/1")
)

// calling is a node whose kernel tells callers, and a broker that knows their identities.
type calling struct {
	*testbed
	t         *testing.T
	d         *datapath.Datapath
	authority *devauthority.Authority
	openers   *openers
	groups    map[string]*lab.Group
}

func newCalling(t *testing.T) *calling {
	t.Helper()
	c := &calling{testbed: newTestbedBeside(t, 16), t: t, groups: map[string]*lab.Group{}}
	l := c.begin()
	t.Cleanup(l.kill)
	c.d = l.datapath
	must(t, c.lab.Node.Do(func() error {
		for name, role := range map[string]datapath.Role{lab.Uplink: datapath.RoleUplink, lab.PodDevice(0): datapath.RolePod, "lo": datapath.RoleLo} {
			dev, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			if err := c.d.Attach(dev.Index, role); err != nil {
				return err
			}
		}
		if err := c.d.AttachPx(); err != nil {
			return err
		}
		_, err := c.d.AttachBackstop(c.lab.Cgroup())
		return err
	}))
	must(t, c.d.Renew(time.Minute))
	var err error
	c.authority, err = devauthority.New(testDomain, devauthority.Options{TTL: time.Hour})
	must(t, err)
	c.openers = &openers{opened: c.d.Caller, groups: newCgroups(c.lab.Cgroup()), broker: c.broker(), boot: datapath.BootTime,
		near: func(a netip.Addr) bool { return a != c.lab.Client.Addr(lab.IPv4) && a != c.lab.Client.Addr(lab.IPv6) }}
	runs(t, c.openers.groups.Run)
	runs(t, c.openers.Run)
	c.eventually("the watch to run", func() bool {
		c.openers.mu.Lock()
		defer c.openers.mu.Unlock()
		return c.openers.ctx != nil
	})
	return c
}

// runs has something run for as long as the test does.
func runs(t *testing.T, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() { cancel(); must(t, <-done) })
}

// broker is a real one over a socket.
func (c *calling) broker() identity.Broker {
	c.t.Helper()
	own, at := filepath.Join(c.lab.Dir, "workload.sock"), filepath.Join(c.lab.Dir, "broker.sock")
	source, err := identity.New(identity.Config{Address: "unix://" + own, MinRetry: 10 * time.Millisecond})
	must(c.t, err)
	runs(c.t, func(ctx context.Context) error { return c.authority.Serve(ctx, own, agentID) })
	runs(c.t, func(ctx context.Context) error { return c.authority.ServeBroker(ctx, at, spireID, agentID) })
	runs(c.t, source.Run)
	b, err := identity.NewSPIFFEBroker(identity.BrokerConfig{Address: "unix://" + at, MinRetry: time.Second, Confirm: identity.Confirm{Answers: 2, Window: 20 * time.Millisecond}}, source, testDomain)
	must(c.t, err)
	c.t.Cleanup(func() { must(c.t, b.Close()) })
	return b
}

func (c *calling) eventually(what string, ok func() bool) {
	c.t.Helper()
	(&installed{t: c.t}).eventually(what, ok)
}

// group is a control group, made with those above it.
func (c *calling) group(path string) *lab.Group {
	c.t.Helper()
	var at string
	for _, name := range strings.Split(path, "/") {
		at = filepath.Join(at, name)
		if c.groups[at] == nil {
			g, err := c.lab.NewGroup(at)
			must(c.t, err)
			c.groups[at] = g
		}
	}
	id, err := c.groups[path].ID()
	must(c.t, err)
	c.eventually("the group to be known", func() bool { _, known := c.openers.groups.path(id); return known })
	return c.groups[path]
}

// connects sends a SYN, of a socket that was made in one group by a thread of the other, and waits until a hook has decided on it. Nobody
// listens in px.
func (c *calling) connects(ns *lab.Namespace, made, by *lab.Group, from netip.Addr, port uint16) (client, server netip.AddrPort) {
	c.t.Helper()
	server = netip.AddrPortFrom(c.lab.Node.Addr(lab.IPv4), 5432)
	if from.Is6() {
		server = netip.AddrPortFrom(c.lab.Node.Addr(lab.IPv6), 5432)
	}
	client = netip.AddrPortFrom(from, port)
	fd, began := -1, datapath.BootTime()
	must(c.t, made.Do(ns, func() (err error) {
		fd, err = unix.Socket(addressFamily(from), unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	}))
	defer unix.Close(fd)
	must(c.t, by.Do(ns, func() error {
		if err := unix.Bind(fd, toSockaddr(client)); err != nil {
			return err
		}
		if err := unix.Connect(fd, toSockaddr(server)); !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		return nil
	}))
	c.eventually("the hook to take it", func() bool {
		got, err := c.d.Caller(client, server)
		return err == nil && got.Taken >= began
	})
	return client, server
}

// who tells whose a connection is.
func (c *calling) who(client, server netip.AddrPort) *flow.Workload {
	_, told := c.openers.who(c.t.Context(), client, server)
	return told
}

func addressFamily(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func toSockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// record is one as the proxy tells it.
func record(event flow.Event, id string, client, server netip.AddrPort) flow.Record {
	return flow.Record{Event: event, Boot: datapath.BootTime(), Verdict: flow.VerdictProxied, FlowID: id, Protocol: "tcp", Client: client, Server: server}
}

// TestCallers shares one node: what each part of it holds stands there.
func TestCallers(t *testing.T) {
	c := newCalling(t)
	for _, part := range []struct {
		name string
		run  func(*calling, *testing.T)
	}{
		{"proven", (*calling).testProven}, {"unproven", (*calling).testUnproven}, {"over", (*calling).testOver}, {"number given again", (*calling).testNumberGivenAgain}, {"watched again", (*calling).testWatchedAgain}, {"becomes another", (*calling).testBecomesAnother},
		{"asked for by the proxy", (*calling).testAsked},
		{"spoken for", (*calling).testSpokenFor}, {"signed for", (*calling).testSignedFor}, {"signed while", (*calling).testSignedWhile},
	} {
		t.Run(part.name, func(t *testing.T) {
			c.t = t
			part.run(c, t)
		})
	}
}

// testProven: the caller is the pod whose container made the socket, or the process of the node that connected it, with the identity
// that the broker attests; whatever is not proven is left out, and says why.
func (c *calling) testProven(t *testing.T) {
	web := c.group("kubepods/burstable/pod" + testPod + "/" + testContainer)
	other := c.group("kubepods/pod" + otherPod + "/" + testContainer)
	cron, at := c.group("system/cron"), c.group("system/at")
	infra := c.group("kubepods/pod" + otherPod)
	c.authority.SetEntries(devauthority.Entry{ID: ofPodID, PodUID: testPod}, devauthority.Entry{ID: ofProcessID, PID: int32(os.Getpid())})
	self, err := startOf(int32(os.Getpid()))
	must(t, err)
	number := func(g *lab.Group) uint64 { id, err := g.ID(); must(t, err); return id }
	process := flow.Workload{PID: int32(os.Getpid()), Started: self}
	port := uint16(41000)
	for _, f := range lab.Families() {
		for name, s := range map[string]struct {
			ns       *lab.Namespace
			made, by *lab.Group
			want     flow.Workload
		}{
			"pod":                          {c.lab.Pod, web, web, flow.Workload{Pod: testPod, Container: testContainer, Identity: ofPodID.String()}},
			"pod in the host's namespace":  {c.lab.Node, web, web, flow.Workload{Pod: testPod, Container: testContainer, Identity: ofPodID.String()}},
			"pod without an identity":      {c.lab.Pod, other, other, flow.Workload{Pod: otherPod, Container: testContainer, Why: "its identity is unissued"}},
			"process":                      {c.lab.Node, cron, cron, flow.Workload{PID: process.PID, Started: process.Started, Identity: ofProcessID.String()}},
			"socket of another process":    {c.lab.Node, cron, at, flow.Workload{PID: process.PID, Started: process.Started, Why: whyPassed}},
			"socket of another pod":        {c.lab.Pod, web, other, flow.Workload{Pod: testPod, Container: testContainer, Why: whyPassed}},
			"socket of a process in a pod": {c.lab.Node, cron, web, flow.Workload{PID: process.PID, Started: process.Started, Why: whyPassed}},
			"runtime of a pod":             {c.lab.Node, infra, infra, flow.Workload{Why: whyInfra}},
		} {
			t.Run(f.String()+"/"+name, func(t *testing.T) {
				c.t = t
				port++
				client, server := c.connects(s.ns, s.made, s.by, s.ns.Addr(f), port)
				s.want.Cgroup = number(s.made)
				got := c.who(client, server)
				if got == nil || !strings.HasPrefix(got.Why, s.want.Why) || s.want.Why == "" && got.Why != "" {
					t.Fatalf("%+v, want %+v", got, s.want)
				}
				s.want.Why = got.Why
				if *got != s.want {
					t.Errorf("%+v, want %+v", *got, s.want)
				}
				id := name + f.String()
				opened := c.openers.complete(sourceProxy, record(flow.EventOpen, id, client, server))
				if opened.Caller == nil || *opened.Caller != s.want {
					t.Errorf("OPEN: %+v, want %+v", opened.Caller, s.want)
				}
				// The next socket with the same port does not get what is of this one, nor this one what is of the next.
				late := record(flow.EventDeny, "", client, server)
				c.connects(s.ns, cron, cron, s.ns.Addr(f), port)
				if got := c.openers.complete(sourceProxy, late).Caller; got == nil || got.Why != whyLater || got.Cgroup != 0 {
					t.Errorf("record of before the next connection: %+v", got)
				}
				closed := c.openers.complete(sourceProxy, record(flow.EventClose, id, client, server))
				if closed.Caller == nil || *closed.Caller != s.want {
					t.Errorf("CLOSE: %+v, want %+v", closed.Caller, s.want)
				}
				if again := c.openers.complete(sourceProxy, record(flow.EventClose, id, client, server)); again.Caller == nil || again.Caller.Why != whyUnseen {
					t.Errorf("CLOSE of nothing: %+v", again.Caller)
				}
			})
		}
	}
	c.t = t
	if yes, no := c.openers.tallies(); yes != 6 || no != 42 {
		t.Errorf("%d attested and %d unattested connections, want 6 and 42", yes, no)
	}
}

// testUnproven: without a socket that is known nobody is guessed, and of clients elsewhere nothing is said.
func (c *calling) testUnproven(t *testing.T) {
	for _, f := range lab.Families() {
		server := netip.AddrPortFrom(c.lab.Node.Addr(f), 5432)
		here, away := netip.AddrPortFrom(c.lab.Pod.Addr(f), 4000), netip.AddrPortFrom(c.lab.Client.Addr(f), 4000)
		udp, kernel := record(flow.EventOpen, "u", here, server), record(flow.EventDeny, "", here, server)
		udp.Protocol = "udp"
		summed := record(flow.EventDeny, "", netip.AddrPortFrom(here.Addr(), 0), server)
		for _, s := range []struct {
			source string
			rec    flow.Record
			why    string // empty: nothing is said at all
		}{
			{sourceProxy, record(flow.EventOpen, "a", here, server), whyNoSocket},
			{sourceProxy, record(flow.EventOpen, "b", away, server), ""},
			{sourceProxy, record(flow.EventDeny, "", here, server), whyNoSocket},
			{sourceProxy, record(flow.EventRequest, "c", here, server), whyUnseen},
			{sourceKernel, record(flow.EventEnd, "d", here, server), whyUnseen},
			{sourceKernel, kernel, whyNoSYN},
			{sourceKernel, udp, whyDatagrams},
			{sourceKernel, summed, ""},
			{sourceKernel, record(flow.EventWatched, "", here, server), ""},
			{sourceKernel, record(flow.EventBackstop, "", here, server), ""},
		} {
			got := c.openers.complete(s.source, s.rec).Caller
			if (got == nil) != (s.why == "") || got != nil && *got != (flow.Workload{Why: s.why}) {
				t.Errorf("%s %s: %+v, want %q", s.source, s.rec.Event, got, s.why)
			}
		}
	}
}

// watches tells whether there is a watch of the pod that has this control group.
func (c *calling) watches(group uint64) bool {
	c.openers.mu.Lock()
	defer c.openers.mu.Unlock()
	for key := range c.openers.workloads {
		if key.group == group {
			return true
		}
	}
	return false
}

// testOver: what has ended has no identity any more, nor has a process or a group that came in its place; what was known of its
// connections stays.
func (c *calling) testOver(t *testing.T) {
	path := "kubepods/besteffort/pod" + testPod + "/" + testContainer
	web := c.group(path)
	c.authority.SetEntries(devauthority.Entry{ID: ofPodID, PodUID: testPod}, devauthority.Entry{ID: ofProcessID, PID: int32(os.Getpid())})
	from := c.lab.Pod.Addr(lab.IPv4)
	client, server := c.connects(c.lab.Pod, web, web, from, 42000)
	if w := c.who(client, server); w.Identity != ofPodID.String() {
		t.Fatalf("%+v", w)
	}
	opened := c.openers.complete(sourceProxy, record(flow.EventOpen, "1", client, server))

	t.Run("withdrawn", func(t *testing.T) {
		c.authority.Withdraw(ofPodID)
		c.t = t
		c.eventually("its identity to be gone", func() bool { return c.who(client, server).Identity == "" })
		c.authority.Restore(ofPodID)
		c.eventually("its identity to be back", func() bool { return c.who(client, server).Identity != "" })
	})
	t.Run("group made anew", func(t *testing.T) {
		before, err := web.ID()
		must(t, err)
		pod := c.openers.groups.number("/" + filepath.Dir(path))
		if !c.watches(pod) {
			t.Fatal("the pod is not watched")
		}
		for _, at := range []string{path, filepath.Dir(path)} {
			must(t, os.Remove(filepath.Join(c.lab.Cgroup(), at)))
		}
		for _, at := range []string{filepath.Dir(path), path} {
			must(t, os.Mkdir(filepath.Join(c.lab.Cgroup(), at), 0o755))
		}
		if after, err := web.ID(); err != nil || after == before {
			t.Fatalf("the kernel gave the number %d twice, %v", after, err)
		}
		if w := c.who(client, server); w.Pod != testPod || w.Cgroup != before {
			t.Errorf("%+v, want what it was", w)
		}
		c.t = t
		c.eventually("the end of what it was", func() bool { return !c.watches(pod) })
	})
	closed := c.openers.complete(sourceProxy, record(flow.EventClose, "1", client, server))
	if opened.Caller.Identity == "" || *closed.Caller != *opened.Caller {
		t.Errorf("OPEN %+v, CLOSE %+v", opened.Caller, closed.Caller)
	}

	t.Run("number of a process given again", func(t *testing.T) {
		started, err := startOf(int32(os.Getpid()))
		must(t, err)
		as, err := accountOf(int32(os.Getpid()))
		must(t, err)
		for _, other := range []account{{as.user + 1, as.group}, {as.user, as.group + 1}} { // it ran a program of theirs since
			if a, why := c.openers.attend(workloadKey{pid: int32(os.Getpid()), started: started, as: other}); a != nil || why != whyUser {
				t.Errorf("%+v: %v, %q", other, a, why)
			}
		}
		for _, key := range []workloadKey{{pid: int32(os.Getpid()), started: started - 1}, {pid: 1 << 22, started: 1}} {
			if a, why := c.openers.attend(key); a != nil || why != whyEnded {
				t.Errorf("%+v: %v, %q", key, a, why)
			}
		}
		if a, why := c.openers.attend(workloadKey{pid: int32(os.Getpid()), started: started, as: as}); a == nil {
			t.Errorf("itself: %q", why)
		}
	})
	t.Run("process killed", func(t *testing.T) {
		p, err := c.lab.Node.Start(exec.Command("sleep", "1h"))
		must(t, err)
		pid := int32(p.Pid())
		started, err := startOf(pid)
		must(t, err)
		as, err := accountOf(pid)
		must(t, err)
		c.authority.SetEntries(devauthority.Entry{ID: ofProcessID, PID: pid})
		a, why := c.openers.attend(workloadKey{pid: pid, started: started, as: as})
		if a == nil {
			t.Fatal(why)
		}
		c.t = t
		c.eventually("its identity", func() bool { id, _ := a.now(); return id == ofProcessID.String() })
		began := datapath.BootTime()
		must(t, p.Kill())
		c.eventually("its end", func() bool { id, why := a.now(); return id == "" && why == whyEnded })
		if id, _ := a.at(began); id != ofProcessID.String() {
			t.Errorf("its connections of before have lost their identity")
		}
		if id, _ := a.at(datapath.BootTime()); id != "" {
			t.Errorf("a connection after its end has the identity %q", id)
		}
	})
}

// stumbling is a broker whose first watches fail for a reason of this process, as when it has no descriptor left.
type stumbling struct {
	identity.Broker
	left atomic.Int32
}

// Watch implements identity.Broker.
func (s *stumbling) Watch(ctx context.Context, w identity.Workload, tell func(identity.Attested)) error {
	if s.left.Add(-1) >= 0 {
		return fmt.Errorf("pin process %d: %w", w.PID, unix.EMFILE)
	}
	return s.Broker.Watch(ctx, w, tell)
}

// testWatchedAgain: a workload whose watch fails says so, and has its identity when that has passed.
func (c *calling) testWatchedAgain(t *testing.T) {
	broker := &stumbling{Broker: c.openers.broker}
	broker.left.Store(1)
	c.openers.broker = broker
	t.Cleanup(func() { c.openers.broker = broker.Broker })
	a, _ := c.attendProcess(exec.Command("sleep", "1h"))
	c.eventually("what the watch failed of", func() bool { _, why := a.now(); return strings.Contains(why, unix.EMFILE.Error()) })
	c.eventually("its identity", func() bool { id, _ := a.now(); return id == ofProcessID.String() })
}

// attendProcess starts a process of the node that has an identity, and watches it.
func (c *calling) attendProcess(cmd *exec.Cmd) (*attended, *lab.Process) {
	c.t.Helper()
	p, err := c.lab.Node.Start(cmd)
	must(c.t, err)
	c.t.Cleanup(func() { must(c.t, p.Kill()) })
	key := workloadKey{pid: int32(p.Pid())}
	key.started, err = startOf(key.pid)
	must(c.t, err)
	key.as, err = accountOf(key.pid)
	must(c.t, err)
	c.authority.SetEntries(devauthority.Entry{ID: ofProcessID, PID: key.pid})
	a, why := c.openers.attend(key)
	if a == nil {
		c.t.Fatal(why)
	}
	return a, p
}

// startAs starts another process with a number that was given before, as the kernel does by itself when it has gone through all of them.
func (c *calling) startAs(pid int32, before uint64) (started uint64) {
	c.t.Helper()
	for range 1000 {
		must(c.t, os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Appendf(nil, "%d", pid-1), 0))
		cmd := exec.Command("sleep", "1h")
		must(c.t, cmd.Start())
		end := func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
		started, err := startOf(int32(cmd.Process.Pid))
		must(c.t, err)
		if int32(cmd.Process.Pid) == pid && started != before {
			c.t.Cleanup(end)
			return started
		}
		end()
	}
	c.t.Fatalf("the kernel does not give the number %d again", pid)
	return 0
}

// testNumberGivenAgain: another process that has the number of one that was attested is not it, whatever the broker says of the number.
func (c *calling) testNumberGivenAgain(t *testing.T) {
	first, p := c.attendProcess(exec.Command("sleep", "1h"))
	c.eventually("its identity", func() bool { id, _ := first.now(); return id != "" })
	must(t, p.Kill())
	key := first.key
	key.started = c.startAs(key.pid, key.started)
	c.eventually("the end of the first", func() bool { id, why := first.now(); return id == "" && why == whyEnded })
	if a, why := c.openers.attend(first.key); a != nil || why != whyEnded {
		t.Errorf("the first is found in the second: %v, %q", a, why)
	}
	second, why := c.openers.attend(key)
	if second == nil || second == first {
		t.Fatalf("the second is not watched for itself: %v, %q", second == first, why)
	}
	c.eventually("the second's identity", func() bool { id, _ := second.now(); return id == ofProcessID.String() })
	if id, _ := first.at(datapath.BootTime()); id != "" {
		t.Errorf("the first has the identity %q", id)
	}
}

// testBecomesAnother: what a process connects after it has begun another program is not what the first one was attested as, from that
// moment on.
func (c *calling) testBecomesAnother(t *testing.T) {
	in, tell, err := os.Pipe()
	must(t, err)
	defer in.Close()
	defer tell.Close()
	cmd := exec.Command("sh", "-c", "read word; exec sleep 1h")
	cmd.Stdin = in
	a, _ := c.attendProcess(cmd)
	c.eventually("its identity", func() bool { id, _ := a.now(); return id != "" })
	began := datapath.BootTime()
	program := fmt.Sprintf("/proc/%d/exe", a.key.pid)
	before, err := os.Readlink(program)
	must(t, err)
	_, err = tell.WriteString("go\n")
	must(t, err)
	c.eventually("its other program", func() bool { now, err := os.Readlink(program); return err == nil && now != before })
	next, why := c.openers.attend(a.key)
	if next == a || next == nil {
		t.Fatalf("a connection of the other program is the first one's: %v, %q", next == a, why)
	}
	if id, _ := a.at(began); id != ofProcessID.String() {
		t.Errorf("connections of the first program have lost their identity")
	}
	if id, _ := a.at(datapath.BootTime()); id != "" {
		t.Errorf("the first program still has the identity %q", id)
	}
	c.eventually("the other's identity", func() bool { id, _ := next.now(); return id == ofProcessID.String() })
}

// testAsked: the proxy asks whose a connection is.
func (c *calling) testAsked(t *testing.T) {
	c.authority.SetEntries(devauthority.Entry{ID: ofPodID, PodUID: testPod})
	web := c.group("kubepods/burstable/pod" + testPod + "/" + testContainer)
	nobody := newReporting(t)
	r := newReporting(t, func(s *sink) { s.callers = c.openers })
	ask := func(protocol, client, server string) (*api.Workload, error) {
		reply, err := r.client.Caller(t.Context(), &api.CallerRequest{Protocol: protocol, Client: client, Server: server})
		return reply.GetCaller(), err
	}
	client, server := c.connects(c.lab.Pod, web, web, c.lab.Pod.Addr(lab.IPv4), 43000)
	if _, err := nobody.client.Caller(t.Context(), &api.CallerRequest{Protocol: "tcp", Client: client.String(), Server: server.String()}); status.Code(err) != codes.Unavailable {
		t.Errorf("nobody looks at callers: %v", err)
	}
	for _, as := range []netip.AddrPort{client, netip.AddrPortFrom(netip.AddrFrom16(client.Addr().As16()), client.Port())} {
		got, err := ask("tcp", as.String(), server.String())
		if err != nil || got.GetIdentity() != ofPodID.String() || got.GetPod() != testPod || got.GetWhy() != "" {
			t.Errorf("%s: %v, %v", as, got, err)
		}
	}
	if got, err := ask("tcp", netip.AddrPortFrom(client.Addr(), 43001).String(), server.String()); err != nil || got.GetWhy() != whyNoSocket || got.GetIdentity() != "" {
		t.Errorf("another port: %v, %v", got, err)
	}
	if got, err := ask("tcp", netip.AddrPortFrom(c.lab.Client.Addr(lab.IPv4), 1).String(), server.String()); err != nil || got != nil {
		t.Errorf("a client elsewhere: %v, %v", got, err)
	}
	for _, bad := range [][3]string{{"udp", client.String(), server.String()}, {"tcp", "nonsense", server.String()}, {"tcp", client.String(), ""}} {
		if _, err := ask(bad[0], bad[1], bad[2]); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
