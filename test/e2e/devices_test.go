package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

const (
	movingPod  = 7 // the pod whose device goes through all transitions, and the one after it
	otherPod   = 9 // whose namespace the device visits
	bridgeName = "br7"
	edgeName   = "edge7" // no name of a pod's device
	// assaultTick is between two raw packets of the moving pod; every eighth of them goes with a connect.
	assaultTick = 4 * time.Millisecond
)

// transition is one thing that happens to a device while an attacker behind it, and others, try without an identity.
type transition struct {
	name  string
	do    func(*mover, *testing.T)
	hooks []string // "device role" beyond those that the node had at first
}

var transitions = []transition{
	{"appears late", func(m *mover, t *testing.T) { m.plug(t, movingPod, 0) }, []string{pod(movingPod)}},
	{"renamed", func(m *mover, t *testing.T) { m.rename(t, edgeName) }, []string{edgeName + " uplink"}},
	{"becomes a port of a bridge", (*mover).enslave, []string{bridgeName + " bridge", edgeName + " port"}},
	{"leaves its bridge", (*mover).free, []string{edgeName + " uplink"}},
	{"renamed back", func(m *mover, t *testing.T) { m.rename(t, lab.StartedDevice(movingPod)) }, []string{pod(movingPod)}},
	{"becomes a pod's port of a bridge", (*mover).enslave, []string{bridgeName + " bridge", lab.StartedDevice(movingPod) + " pod-port"}},
	{"leaves its bridge as a pod", (*mover).free, []string{pod(movingPod)}},
	{"moved to another namespace", func(m *mover, t *testing.T) { m.moveAway(t, false) }, []string{pod(otherPod)}},
	{"moved back", (*mover).moveBack, []string{pod(movingPod), pod(otherPod)}},
	{"moved to where its number is taken", func(m *mover, t *testing.T) { m.moveAway(t, true) }, []string{pod(otherPod)}},
	{"moved back with another number", (*mover).moveBack, []string{pod(movingPod), pod(otherPod)}},
	{"up and down, fast", (*mover).flap, []string{pod(movingPod), pod(otherPod)}},
	{"made and deleted, fast", (*mover).recreate, []string{pod(movingPod), pod(otherPod)}},
	{"another device with its number", func(m *mover, t *testing.T) { m.takeNumber(t, movingPod+1) }, []string{pod(movingPod + 1), pod(otherPod)}},
	{"another device with its number, no agent", (*mover).takeNumberUnseen, []string{pod(movingPod), pod(otherPod)}},
	{"new addresses", (*mover).newAddresses, []string{pod(movingPod), pod(otherPod)}},
	{"gone", func(m *mover, t *testing.T) { m.unplug(t) }, []string{pod(otherPod)}},
}

func pod(number int) string { return lab.StartedDevice(number) + " pod" }

// TestDeviceTransitions: whatever a device goes through while the agent runs, nobody without an identity reaches a service
// for a single packet, by that device or by another; those with one are served when it is over; and status, metrics and
// the kernel agree on what is hooked.
func TestDeviceTransitions(t *testing.T) {
	leak.Check(t)
	for _, hooks := range []string{"tcx", "clsact"} {
		t.Run(hooks, func(t *testing.T) {
			m := newMover(t, hooks)
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { m.assault(ctx) })
			wg.Go(func() { m.prober.run(ctx, 1<<30, rand.New(rand.NewPCG(1, 2))) })
			for _, c := range transitions {
				t.Run(c.name, func(t *testing.T) { m.pass(t, c) })
			}
			cancel()
			wg.Wait()
			m.unplug(t)
			m.verdict(t)
		})
	}
}

// mover is a world with one device that changes.
type mover struct {
	*world
	prober *prober
	judge  *leakJudge
	dice   *rand.Rand
	base   []string // hooks of the node that stay
	device string   // the name of the moving one now
	away   bool     // it is in the other namespace
	other  *lab.Namespace

	mu      sync.RWMutex // read-locked by who uses the pod
	number  int
	pod     *started
	targets []netip.AddrPort
}

func newMover(t *testing.T, hooks string) *mover {
	t.Helper()
	m := &mover{world: newWorld(t, options{hooks: hooks}), dice: rand.New(rand.NewPCG(1, 3)), judge: newJudge(t)}
	must(t, m.Node.Sysctl("ipv6/conf/all/keep_addr_on_down", "1"))
	must(t, m.Node.Sysctl("ipv6/conf/default/keep_addr_on_down", "1"))
	// A service's half of a connection whose pod is gone is not to keep the namespace, and the filters on its lo, for minutes.
	must(t, m.Node.Sysctl("ipv4/tcp_orphan_retries", "1"))
	must(t, m.Node.Sysctl("ipv4/tcp_fin_timeout", "1"))
	for _, n := range []*lab.Namespace{m.Client, m.Node, m.Pods[1]} {
		must(t, n.Sysctl("ipv4/ip_local_port_range", clientPorts))
	}
	for _, s := range m.echoes {
		must(t, m.judge.witness.Watch(s))
	}
	var err error
	m.prober, err = m.newProber(m.judge, 100)
	must(t, err)
	t.Cleanup(func() { must(t, m.prober.close()) })
	for _, f := range lab.Families() {
		m.targets = append(m.targets, netip.AddrPortFrom(m.Node.Addr(f), hostPort))
	}
	m.control(t)
	for _, d := range []*daemon{m.collector, m.agent, m.guard, m.proxy} {
		d.start(t)
	}
	m.base = m.hooked(t)
	return m
}

// control: without enforcement what the pod sends is seen.
func (m *mover) control(t *testing.T) {
	t.Helper()
	m.plug(t, movingPod, 0)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); m.assault(ctx) }()
	waitUntil(t, "packets and answers without enforcement", func() bool {
		m.prober.mu.Lock()
		defer m.prober.mu.Unlock()
		m.judge.mu.Lock()
		defer m.judge.mu.Unlock()
		return m.prober.answers[direct] > 2 && m.judge.raw > 10
	})
	cancel()
	<-done
	m.unplug(t)
	m.judge.reset()
	clear(m.prober.answers)
}

// assault has the moving pod try every target, with raw packets and connects, until ctx ends.
func (m *mover) assault(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(assaultTick)
	defer tick.Stop()
	for n := 0; ctx.Err() == nil; n++ {
		m.withPod(func(s *started) {
			to := m.targets[n%len(m.targets)]
			m.prober.send(s.origin, s.ns.Addr(familyOf(to)), to)
		})
		if n%8 == 0 {
			wg.Go(func() {
				m.withPod(func(s *started) {
					to := m.targets[n/8%len(m.targets)]
					m.prober.connects.Add(1)
					m.prober.connect(way{name: "moving pod", client: s.ns, from: s.ns.Addr(familyOf(to)), to: to}, false)
				})
			})
		}
		<-tick.C
	}
}

// withPod runs f while the pod stays, if there is one.
func (m *mover) withPod(f func(*started)) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.pod != nil {
		f(m.pod)
	}
}

// pass goes through one transition and looks at the node after it.
func (m *mover) pass(t *testing.T, c transition) {
	m.judge.begin(c.name)
	c.do(m, t)
	began := time.Now()
	want := slices.Sorted(slices.Values(append(slices.Clone(m.base), c.hooks...)))
	var got []string
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if got = m.hooked(t); slices.Equal(got, want) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("status has the hooks %q, want %q", got, want)
		}
	}
	t.Logf("hooked after %v", time.Since(began).Round(time.Millisecond))
	m.truth(t, want)
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.pod == nil || m.away {
		return
	}
	for _, to := range m.targets {
		w := way{name: c.name, client: m.pod.ns, from: m.pod.ns.Addr(familyOf(to)), to: to}
		var o outcome
		waitUntil(t, "the proxy to serve "+to.String(), func() bool { // neighbours have to be found anew
			o = w.identified(within(t, silence), m.world, web)
			return o.who == proxied
		})
		if o := w.plain(within(t, silence)); o.who != cut {
			t.Errorf("plain client to %s answered by %s, want a reset by the proxy", to, o)
		}
	}
}

// hooked lists "device role" of what status says is hooked.
func (m *mover) hooked(t *testing.T) (all []string) {
	t.Helper()
	for _, h := range m.status(t).Hooks {
		if h.Role != "backstop" && !strings.HasPrefix(h.Role, "px") {
			all = append(all, h.Device+" "+h.Role)
		}
	}
	return slices.Sorted(slices.Values(all))
}

// placed are the programs of each role: in and out.
var placed = map[string][]string{
	"lo": {"sp_lo_in"}, "uplink": {"sp_dev_in", "sp_dev_out"}, "pod": {"sp_dev_in", "sp_pod_out"},
	"bridge": {"sp_bridge_in", "sp_bridge_out"}, "port": {"sp_port_in", "sp_port_out"}, "pod-port": {"sp_port_in", "sp_pod_port_out"},
}

// truth: the kernel and the metrics have what status has, each once; and no alarm but those of the backstop was raised.
func (m *mover) truth(t *testing.T, hooks []string) {
	t.Helper()
	var want []string
	roles := map[string]int{}
	for _, h := range hooks {
		device, role, _ := strings.Cut(h, " ")
		roles[role]++
		for _, p := range placed[role] {
			want = append(want, device+" "+p)
		}
	}
	slices.Sort(want)
	if got := attached(t, m.Node); !slices.Equal(got, want) {
		t.Errorf("the kernel has %q, want %q", got, want)
	}
	metrics := m.metrics(t)
	for role, n := range roles {
		if line := fmt.Sprintf("sallyport_hooked_devices{role=%q} %d\n", role, n); !strings.Contains(metrics, line) {
			t.Errorf("metrics lack %q", line)
		}
	}
	for _, p := range m.status(t).Problems {
		if !strings.HasPrefix(p, "alarm backstop: ") && !strings.HasPrefix(p, "backstop ") {
			t.Errorf("problem: %s", p)
		}
	}
}

// attached lists "device program" of ours in a namespace, by tcx or clsact, but for those of px0.
func attached(t *testing.T, ns *lab.Namespace) (all []string) {
	t.Helper()
	for _, p := range programsIn(t, ns) {
		all = append(all, p.device+" "+p.name)
	}
	return slices.Sorted(slices.Values(all))
}

// hookProgram is one program of ours on a device; the tag tells versions of it apart.
type hookProgram struct{ device, name, tag string }

// programsIn lists what is attached.
func programsIn(t *testing.T, ns *lab.Namespace) (all []hookProgram) {
	t.Helper()
	must(t, ns.Do(func() error {
		devices, err := net.Interfaces()
		for _, dev := range devices {
			there, listErr := programsOn(dev.Index)
			err = errors.Join(err, listErr)
			for _, p := range there {
				if p.device = dev.Name; strings.HasPrefix(p.name, "sp_") && dev.Name != "px0" {
					all = append(all, p)
				}
			}
		}
		return err
	}))
	return all
}

// programsOn lists the programs on a device of the current network namespace. A device that is gone has none.
func programsOn(ifindex int) (all []hookProgram, err error) {
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		chain, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: at})
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) { // EINVAL: a kernel before tcx
			return nil, fmt.Errorf("query device %d: %w", ifindex, err)
		}
		if err != nil {
			continue
		}
		for _, c := range chain.Programs {
			p, err := readProgram(c.ID)
			if err != nil {
				return nil, err
			}
			all = append(all, p)
		}
	}
	dev := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := netlink.FilterList(dev, parent)
		if err != nil {
			continue // it has no such qdisc
		}
		for _, f := range filters {
			if b, ok := f.(*netlink.BpfFilter); ok && b.Id != 0 {
				p, err := readProgram(ebpf.ProgramID(b.Id))
				if err != nil {
					return nil, err
				}
				all = append(all, p)
			}
		}
	}
	return all, nil
}

// readProgram is empty for a program that has just gone.
func readProgram(id ebpf.ProgramID) (hookProgram, error) {
	p, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, os.ErrNotExist) {
		return hookProgram{}, nil
	}
	if err != nil {
		return hookProgram{}, fmt.Errorf("open program: %w", err)
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return hookProgram{}, fmt.Errorf("read program: %w", err)
	}
	return hookProgram{name: info.Name, tag: info.Tag}, nil
}

func (w *world) metrics(t *testing.T) string {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
		return w.Node.Dial(ctx, netip.AddrPort{}, netip.MustParseAddrPort(address))
	}}}
	reply, err := client.Get("http://127.0.0.1:9469/metrics")
	must(t, err)
	defer reply.Body.Close()
	text, err := io.ReadAll(reply.Body)
	must(t, err)
	return string(text)
}

// plug starts the pod with that number. It tries from its first moment.
func (m *mover) plug(t *testing.T, number, ifindex int) {
	t.Helper()
	s := &started{number: number}
	var early, err error
	s.ns, err = m.StartPodAs(number, ifindex, func(ns *lab.Namespace) { early = m.prober.early(s, ns, m.dice) })
	must(t, errors.Join(err, early))
	m.mu.Lock()
	defer m.mu.Unlock()
	m.number, m.pod, m.device = number, s, lab.StartedDevice(number)
}

// unplug ends the pod, if there is one.
func (m *mover) unplug(t *testing.T) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pod == nil {
		return
	}
	must(t, m.pod.end())
	m.pod = nil
}

func (m *mover) find(t *testing.T, ns *lab.Namespace, name string) netlink.Link {
	t.Helper()
	dev, err := ns.Netlink.LinkByName(name)
	must(t, err)
	return dev
}

func (m *mover) rename(t *testing.T, name string) {
	t.Helper()
	dev := m.find(t, m.Node, m.device)
	must(t, m.Node.Netlink.LinkSetDown(dev))
	must(t, m.Node.Netlink.LinkSetName(dev, name))
	m.device = name
	must(t, m.Node.Netlink.LinkSetUp(dev))
}

// readdress gives a device the addresses that the pod's device has on the node, and takes them from another.
func (m *mover) readdress(t *testing.T, from, to netlink.Link) {
	t.Helper()
	for _, f := range lab.Families() {
		gateway := lab.StartedAddr(m.number, f).Prev()
		bits := map[lab.Family]int{lab.IPv4: 24, lab.IPv6: 64}[f]
		network := &net.IPNet{IP: gateway.AsSlice(), Mask: net.CIDRMask(bits, gateway.BitLen())}
		if from != nil {
			must(t, m.Node.Netlink.AddrDel(from, &netlink.Addr{IPNet: network}))
		}
		must(t, m.Node.Netlink.AddrAdd(to, &netlink.Addr{IPNet: network, Flags: unix.IFA_F_NODAD}))
	}
}

// enslave puts the device into a new bridge, as operators and container runtimes do: live, and the addresses go after it.
func (m *mover) enslave(t *testing.T) {
	t.Helper()
	must(t, m.Node.Netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}))
	bridge, dev := m.find(t, m.Node, bridgeName), m.find(t, m.Node, m.device)
	must(t, m.Node.Netlink.LinkSetUp(bridge))
	must(t, m.Node.Netlink.LinkSetMaster(dev, bridge))
	m.readdress(t, dev, bridge)
}

// free takes it out again, and the bridge away.
func (m *mover) free(t *testing.T) {
	t.Helper()
	bridge, dev := m.find(t, m.Node, bridgeName), m.find(t, m.Node, m.device)
	must(t, m.Node.Netlink.LinkSetNoMaster(dev))
	m.readdress(t, bridge, dev)
	must(t, m.Node.Netlink.LinkDel(bridge))
}

// moveAway puts the device into the namespace of another pod, and waits until nothing of ours is on it there.
func (m *mover) moveAway(t *testing.T, taken bool) {
	t.Helper()
	if m.other == nil {
		var err error
		m.other, err = m.StartPod(otherPod, nil)
		must(t, err)
		waitUntil(t, "the visited pod to be hooked", func() bool { return slices.Contains(m.hooked(t), pod(otherPod)) })
	}
	dev := m.find(t, m.Node, m.device)
	if taken {
		must(t, m.other.Netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "taken", Index: dev.Attrs().Index}}))
	}
	moveTo(t, m.Node, m.other, dev)
	m.away = true
	waitUntil(t, "the device to be free of hooks", func() bool { return len(attached(t, m.other)) == 0 })
}

func (m *mover) moveBack(t *testing.T) {
	t.Helper()
	moveTo(t, m.other, m.Node, m.find(t, m.other, m.device))
	dev := m.find(t, m.Node, m.device)
	must(t, m.Node.Netlink.LinkSetUp(dev))
	m.readdress(t, nil, dev)
	m.away = false
}

func moveTo(t *testing.T, from, to *lab.Namespace, dev netlink.Link) {
	t.Helper()
	ns, err := os.Open(to.Path())
	must(t, err)
	defer ns.Close()
	must(t, from.Netlink.LinkSetNsFd(dev, int(ns.Fd())))
}

// flap ends with the device up.
func (m *mover) flap(t *testing.T) {
	t.Helper()
	dev := m.find(t, m.Node, m.device)
	for range 30 {
		must(t, m.Node.Netlink.LinkSetDown(dev))
		must(t, m.Node.Netlink.LinkSetUp(dev))
	}
}

// recreate ends with a new device of the same name.
func (m *mover) recreate(t *testing.T) {
	t.Helper()
	for range 10 {
		m.unplug(t)
		m.plug(t, movingPod, 0)
	}
}

// takeNumber deletes the device and makes another one with its number, at once.
func (m *mover) takeNumber(t *testing.T, number int) {
	t.Helper()
	ifindex, err := m.Node.Ifindex(m.device)
	must(t, err)
	m.unplug(t)
	m.plug(t, number, ifindex)
}

// takeNumberUnseen does so while no agent runs.
func (m *mover) takeNumberUnseen(t *testing.T) {
	t.Helper()
	m.agent.kill(t)
	m.takeNumber(t, movingPod)
	m.agent.start(t)
}

// newAddresses appear on a device that is hooked, and are tried before they are there.
func (m *mover) newAddresses(t *testing.T) {
	t.Helper()
	uplink := m.find(t, m.Node, lab.Uplink)
	fresh := []netip.Prefix{netip.MustParsePrefix("10.177.0.1/32"), netip.MustParsePrefix("fd00:177::1/128")}
	m.mu.Lock()
	for _, p := range fresh {
		m.targets = append(m.targets, netip.AddrPortFrom(p.Addr(), hostPort))
	}
	m.mu.Unlock()
	for _, p := range fresh {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Bits())}, Flags: unix.IFA_F_NODAD}
		must(t, m.Node.Netlink.AddrAdd(uplink, a))
	}
}

// verdict is the judges' word on all of it.
func (m *mover) verdict(t *testing.T) {
	t.Helper()
	m.judge.blind(t)
	m.judge.mu.Lock()
	defer m.judge.mu.Unlock()
	m.prober.mu.Lock()
	defer m.prober.mu.Unlock()
	t.Logf("%d raw probes, %d connects answered by %v, %d packets by the proxy", m.prober.raw.Load(), m.prober.connects.Load(), m.prober.answers, m.judge.byProxy)
	for _, l := range m.judge.leaks {
		t.Errorf("leaked: %s", l)
	}
	if m.prober.failed != nil {
		t.Errorf("probes could not be sent: %v", m.prober.failed)
	}
	if m.prober.answers[cut] == 0 || m.judge.byProxy == 0 {
		t.Error("the services were not reached by the proxy either: this proves nothing")
	}
}
