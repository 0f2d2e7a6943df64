package datapath_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const chosenPort = 9797

// chosen is a service of pods that are chosen by what they are.
func chosen(pods ...datapath.Place) datapath.Service {
	return datapath.Service{ID: 21, Name: "chosen", Target: datapath.TargetPod, Ports: []uint16{chosenPort}, DenyUDP: true, Selected: true, Pods: pods}
}

// TestUndecidedProgram: each branch by test runs, in a pod that nobody knows unless it is said.
func TestUndecidedProgram(t *testing.T) {
	needSocketRuns(t)
	t.Parallel()
	r := newRig(t, 0, 0)
	for _, c := range undecidedCases() {
		for _, f := range lab.Families() {
			t.Run(c.name+"/"+f.String(), func(t *testing.T) {
				s := r.socketScenes(t, f)["pod"]
				s.server = netip.AddrPortFrom(r.Pods[1].Addr(f), chosenPort)
				device := s.device
				build := func(s scene) probe {
					p := udp(s.client, s.server)
					if c.flags != 0 {
						p = tcp(s.client, s.server, c.flags)
					}
					made := at("sp_cg_in", device, p)
					made.in = r.Pods[1]
					return made
				}
				s.device = 0 // the device within a pod is no business of the node's
				if c.want.records != nil && strings.HasPrefix(c.want.records[0], "BACKSTOP") {
					s.device = device
				}
				progCase{name: c.name, packet: build, given: c.given, want: c.want}.run(t, r, s)
				if seen := all[bpf.BackstopKey, bpf.Backstop](t, r.m.SpBackstop); (len(seen) > 0) != (s.device != 0) {
					t.Errorf("counted as having come around: %v", seen)
				}
			})
		}
	}
}

// undecidedCase is a packet at a socket in a pod.
type undecidedCase struct {
	name  string
	flags uint8 // 0: a datagram
	want  want
	given []given
}

func undecidedCases() []undecidedCase {
	table := func(s datapath.Service) given {
		return func(t testing.TB, r *rig, _ scene, _ *probe) {
			_, err := r.d.SetServices([]datapath.Service{s})
			check(t, err)
			check(t, r.d.SetDecided(nil))
		}
	}
	decided := func(t testing.TB, r *rig, _ scene, p *probe) {
		var cookie uint64
		check(t, p.in.Do(func() (err error) { cookie, err = datapath.OwnNetns(); return err }))
		check(t, r.d.SetDecided(map[uint64]string{cookie: "shop/free", 1: "shop/other"}))
	}
	closed := want{verdict: cgDrop, counts: one(flow.ReasonUndecided), records: []string{"DENY UNDECIDED"}}
	free := admitted(flow.ReasonNone)
	watchedOnly := chosen()
	watchedOnly.Mode = datapath.Observe
	udpService := chosen()
	udpService.Protocol, udpService.Idle, udpService.DenyUDP = datapath.UDP, 30e9, false
	here := func(t testing.TB, r *rig, s scene, p *probe) {
		table(chosen(datapath.Place{Addresses: []netip.Addr{r.Pods[1].Addr(lab.IPv4), r.Pods[1].Addr(lab.IPv6)}, Ifindex: 7}))(t, r, s, p)
	}
	inHost := func(_ testing.TB, _ *rig, _ scene, p *probe) { p.in = nil }
	inPx := func(_ testing.TB, _ *rig, _ scene, p *probe) { p.in, p.px, p.ctx.Ifindex = nil, true, 1 }
	return []undecidedCase{
		{"SYN", syn, closed, []given{table(chosen())}},
		{"SYN, the pod is known", syn, free, []given{table(chosen()), decided}},
		{"SYN, another port", syn, free, []given{table(chosen()), func(_ testing.TB, _ *rig, s scene, p *probe) {
			p.frame = tcp(s.client, netip.AddrPortFrom(s.server.Addr(), 9999), syn).Bytes()
		}}},
		{"SYN, nothing is chosen", syn, free, []given{table(datapath.Service{ID: 1, Name: "host", Target: datapath.TargetHost, Ports: []uint16{chosenPort}})}},
		{"SYN, only watched", syn, free, []given{table(watchedOnly)}},
		{"SYN, of the pod itself", syn, free, []given{table(chosen()), onLoopback}},
		{"SYN, in the node", syn, free, []given{table(chosen()), inHost}},
		{"SYN, in px", syn, free, []given{table(chosen()), inPx}},
		{"SYN, the service is here", syn, turnedAway(flow.ReasonBackstop), []given{here}},
		{"SYN, the service is here and the pod is known", syn, turnedAway(flow.ReasonBackstop), []given{here, decided}},
		{"mid-stream", ack, closed, []given{table(chosen())}},
		{"datagram", 0, closed, []given{table(chosen())}},
		{"datagram, the pod is known", 0, free, []given{table(chosen()), decided}},
		{"datagram, of a UDP service", 0, closed, []given{table(udpService)}},
		{"SYN, of a UDP service", syn, free, []given{table(udpService)}},
		{"no configuration", syn, turnedAway(flow.ReasonNoConfig), []given{here, noConfig}},
	}
}

// TestUndecidedPodIsClosed: a pod that nobody has looked at, behind a device without hooks, is closed at the ports of chosen pods whichever
// way one comes, and at no other; it opens when it is decided, and closes with the next that is not.
func TestUndecidedPodIsClosed(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	base := n.d.Services()
	set := func(s ...datapath.Service) {
		t.Helper()
		_, err := n.d.SetServices(append(slices.Clone(base), s...))
		must(t, err)
	}
	set(chosen())
	p := n.latePod(t)
	for _, f := range lab.Families() {
		for _, port := range []uint16{chosenPort, chosenPort + 1} {
			_, err := p.WhoAnswers(netip.AddrPortFrom(unspecified(f), port))
			must(t, err)
		}
	}
	from := map[string]*lab.Namespace{"remote": n.Client, "pod": n.Pods[1], "node": n.Node}
	each := func(do func(from *lab.Namespace, at netip.Addr)) {
		for _, name := range slices.Sorted(maps.Keys(from)) {
			for _, f := range lab.Families() {
				do(from[name], p.Addr(f))
			}
		}
	}
	reach := func(from *lab.Namespace, to netip.AddrPort) {
		t.Helper()
		if _, _, err := from.Ask(within(t), netip.AddrPort{}, to); err != nil {
			t.Errorf("%s cannot be reached: %v; counters:%s", to, err, n.counters(t))
		}
	}
	closed := func() {
		t.Helper()
		before := n.counted(t, flow.ReasonUndecided)
		each(func(from *lab.Namespace, a netip.Addr) { cannotReach(t, from, netip.AddrPortFrom(a, chosenPort)) })
		if n.counted(t, flow.ReasonUndecided) < before+6 {
			t.Errorf("counters:%s", n.counters(t))
		}
	}
	closed()
	each(func(from *lab.Namespace, a netip.Addr) { reach(from, netip.AddrPortFrom(a, chosenPort+1)) })
	for _, f := range lab.Families() {
		reach(p.Namespace, netip.AddrPortFrom(p.Addr(f), chosenPort)) // its own
	}
	var ns datapath.Namespace
	must(t, n.Node.Do(func() (err error) {
		ns, err = datapath.OpenNamespace(p.Path())
		return err
	}))
	dev, err := n.Node.Netlink.LinkByName(p.device)
	must(t, err)
	if ns.ID != dev.Attrs().NetNsID || ns.Cookie == 0 {
		t.Errorf("namespace %+v, and the device names it %d", ns, dev.Attrs().NetNsID)
	}
	must(t, n.d.SetDecided(map[uint64]string{ns.Cookie: "shop/free"}))
	each(func(from *lab.Namespace, a netip.Addr) { reach(from, netip.AddrPortFrom(a, chosenPort)) })
	if got, err := n.d.Decided(); err != nil || got[ns.Cookie] != "shop/free" || len(got) != 1 {
		t.Errorf("decided are %v, %v", got, err)
	}
	must(t, n.d.SetDecided(nil))
	closed()
	must(t, n.d.SetDecided(map[uint64]string{ns.Cookie: "shop/chosen"}))
	set(chosen(datapath.Place{Addresses: []netip.Addr{p.Addr(lab.IPv4), p.Addr(lab.IPv6)}, Ifindex: p.ifindex}))
	before := n.counted(t, flow.ReasonUndecided)
	each(func(from *lab.Namespace, a netip.Addr) { cannotReach(t, from, netip.AddrPortFrom(a, chosenPort)) }) // and no proxy is there
	if n.counted(t, flow.ReasonUndecided) != before {
		t.Errorf("a pod that is known is told as undecided; counters:%s", n.counters(t))
	}
}

func (n *node) counted(t *testing.T, reason flow.Reason) uint64 {
	t.Helper()
	c, err := n.d.Counters()
	must(t, err)
	return c[reason].Packets
}

// TestChosenServicesAreAdopted: the next agent finds a service of several pods as the one before left it, and what was decided.
func TestChosenServicesAreAdopted(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	a, b := netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd00:9::2")
	want := []datapath.Service{
		chosen(datapath.Place{Addresses: []netip.Addr{a}, Ifindex: 41, Besides: []int{42}}, datapath.Place{Addresses: []netip.Addr{b}, Ifindex: 43}),
		{ID: 22, Name: "none yet", Target: datapath.TargetPod, Ports: []uint16{1, 2}, Selected: true},
		{ID: 23, Name: "listed", Target: datapath.TargetPod, Ports: []uint16{3}, Addresses: []netip.Addr{netip.MustParseAddr("10.9.0.9")}, Ifindex: 44, Besides: []int{45}},
		{ID: 24, Name: "host", Target: datapath.TargetHost, Ports: []uint16{4}},
	}
	_, err := n.d.SetServices(want)
	must(t, err)
	must(t, n.d.SetDecided(map[uint64]string{77: "shop/a"}))
	must(t, n.d.Close())
	n.open(t)
	got := n.d.Services()
	slices.SortFunc(got, func(x, y datapath.Service) int { return int(x.ID) - int(y.ID) })
	for i := range got {
		slices.Sort(got[i].Ports)
		slices.SortFunc(got[i].Pods, func(x, y datapath.Place) int { return x.Ifindex - y.Ifindex })
		want[i].Protocol = datapath.TCP
		if fmt.Sprintf("%+v", got[i]) != fmt.Sprintf("%+v", want[i]) {
			t.Errorf("got  %+v\nwant %+v", got[i], want[i])
		}
	}
	if decided, err := n.d.Decided(); err != nil || !maps.Equal(decided, map[uint64]string{77: "shop/a"}) {
		t.Errorf("decided are %v, %v", decided, err)
	}
}
