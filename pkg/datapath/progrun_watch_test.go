package datapath_test

import (
	"encoding/binary"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// mode puts every service of the rig into a mode.
func (r *rig) mode(t testing.TB, m datapath.Mode) {
	t.Helper()
	services := r.d.Services()
	for i := range services {
		services[i].Mode = m
	}
	_, err := r.d.SetServices(services)
	check(t, err)
}

// sighting is what was told of a packet of a service that is not enforced.
type sighting struct {
	verdict flow.Verdict
	reason  flow.Reason
	service uint32
	name    string
	count   uint64
}

func (r *rig) sightings(t testing.TB) (all []sighting) {
	t.Helper()
	for _, e := range r.drain(t) {
		if flow.Event(e.Kind) != flow.EventWatched {
			t.Errorf("a record of another kind: %v %v", flow.Event(e.Kind), flow.Reason(e.Reason))
		}
		name := make([]byte, 0, len(e.Service))
		for _, c := range e.Service {
			if c != 0 {
				name = append(name, byte(c))
			}
		}
		all = append(all, sighting{flow.Verdict(e.Verdict), flow.Reason(e.Reason), e.ServiceId, string(name), e.Count})
	}
	return all
}

// ofPx says that the packet is for a program that decides about the proxy, or for a socket's.
func (p probe) ofPx() bool {
	return strings.HasPrefix(p.program, "sp_px") || strings.HasPrefix(p.program, "sp_cg")
}

// watch runs the case where no service is enforced: the packet goes on as it is, and nothing but what was seen is left.
func (c progCase) watch(t *testing.T, r *rig, s scene) []sighting {
	t.Helper()
	r.reset(t)
	r.drain(t)
	p := c.packet(s)
	for _, g := range c.given {
		g(t, r, s, &p)
	}
	r.drain(t)
	counted, state := r.counters(t), r.renderState(t, s, p)
	verdict, out, mark := r.send(t, p)
	if verdict != actNext {
		t.Errorf("verdict %d", verdict)
	}
	r.compareBytes(t, p, s, verdict, out, nil)
	if mark != p.ctx.Mark {
		t.Errorf("mark %#x, want %#x", mark, p.ctx.Mark)
	}
	if have := r.counters(t); !maps.Equal(have, counted) {
		t.Errorf("counters %v, want %v", have, counted)
	}
	compareLines(t, "state", r.renderState(t, s, p), state)
	return r.sightings(t)
}

// stateless are the reasons that do not depend on earlier packets, nor on how full a table is.
var stateless = []flow.Reason{
	flow.ReasonNoPath, flow.ReasonPathExpired, flow.ReasonPathRevoked, flow.ReasonPathStale, flow.ReasonLeaseLapsed, flow.ReasonTupleHeld,
	flow.ReasonPathIngress, flow.ReasonPathConnections, flow.ReasonPathBound, flow.ReasonPathOpen,
	flow.ReasonMalformed, flow.ReasonFragment, flow.ReasonExtHeaders, flow.ReasonSourceRoute, flow.ReasonBadFlags, flow.ReasonSourceForeign,
	flow.ReasonSourceOwn, flow.ReasonReverseOpen, flow.ReasonLinkLocal, flow.ReasonUnlisted, flow.ReasonUDPNoPath, flow.ReasonUDPDenied,
}

// notTold are the cases, by the beginning of their names, that a look at this packet alone does not tell, and why.
var notTold = map[string]string{
	"other/VLAN in the payload": "whose it is cannot be read",
	"udp/answer, revoked":       "answers are of a flow",
	"another address/fragment":  "whose it is shows in its port alone",
	"source/":                   "where a packet comes in, the services of pods are not seen; see ownTruthCases",
}

func (c progCase) told() bool {
	for name := range notTold {
		if strings.HasPrefix(c.name, name) {
			return false
		}
	}
	// What a service sends is of a flow, but for a SYN.
	return !strings.HasSuffix(c.name, ", of the service") && !slices.ContainsFunc(c.want.records, func(r string) bool {
		return strings.HasSuffix(r, "of the service") || strings.HasPrefix(r, "DENY SOURCE_ROUTE reversed")
	})
}

// TestShadowSaysWhatEnforceDoes runs the cases of the devices' programs with all services shadowed. Nothing happens to the
// packet, and what is told of it is what Enforce makes of it, as far as that depends on this packet alone. A case of Enforce is
// one of Shadow, too: a reason that it learns to give is asked for here.
func TestShadowSaysWhatEnforceDoes(t *testing.T) {
	r := newRig(t, 4096, 4096)
	r.mode(t, datapath.Shadow)
	told := map[flow.Reason]bool{}
	cases := slices.Concat(deviceCases(), shapeCases(), brokenCases(), fragmentCases(), unownedCases(), otherCases(), udpCases(), icmpCases(), optionCases(),
		newShapeCases(), reinjectCases(), budgetCases(), truthCases(r), ownTruthCases(r), ingressCases(), linkCases(), anotherCases())
	for _, c := range cases {
		if strings.HasPrefix(c.name, "rest/") {
			continue // it follows a flow from before, as that says
		}
		c.eachScene(t, r, func(t *testing.T, s scene) {
			if c.packet(s).ofPx() {
				return
			}
			got := c.watch(t, r, s)
			if len(c.want.counts) == 0 && slices.ContainsFunc(got, func(g sighting) bool { return g.verdict == flow.VerdictDenied }) {
				t.Errorf("told %v of what Enforce has nothing to do with", got)
			}
			for reason := range c.want.counts {
				if !c.told() || len(c.want.counts) > 1 || !slices.Contains(stateless, reason) {
					continue
				}
				if told[reason] = true; len(got) != 1 || got[0].reason != reason {
					t.Errorf("told %v, want %v", got, reason)
				}
			}
		})
	}
	for _, reason := range stateless {
		if !told[reason] {
			t.Errorf("no case is told with %v", reason)
		}
	}
}

// seenOf is what was counted of the scene's service.
func (r *rig) seenOf(t testing.TB, s scene) datapath.Watched {
	t.Helper()
	all, err := r.d.Watched()
	check(t, err)
	return all[s.service]
}

// TestWatched: each packet counts once, for what Enforce would make of it; who begins a flow, or would be denied, is told of.
func TestWatched(t *testing.T) {
	r := newRig(t, 4096, 4096)
	type one struct {
		name   string
		packet func(scene) probe
		given  []given
		scenes []string
		count  func(w *datapath.Watched) *datapath.Seen // what it is beside Seen; nil: nothing
		told   *sighting                                // but for the service
	}
	proxied := func(w *datapath.Watched) *datapath.Seen { return &w.Proxied }
	bypassed := func(w *datapath.Watched) *datapath.Seen { return &w.Bypassed }
	denied := func(w *datapath.Watched) *datapath.Seen { return &w.Denied }
	active := []given{path(datapath.PathActive)}
	said := func(v flow.Verdict, reason flow.Reason) *sighting {
		return &sighting{verdict: v, reason: reason, count: 1}
	}
	merged := func(s scene) probe {
		p := towards(ack)(s)
		p.ctx.GSOSegs, p.ctx.GSOSize = 3, 100
		headers := uint64(len(p.frame) - 14)
		p.segs, p.bytes = 3, headers+2*headers
		return p
	}
	some := func(s scene) probe { return towards(ack)(s) }
	for mode, cases := range map[datapath.Mode][]one{
		datapath.Observe: {
			{name: "SYN", packet: towards(syn), told: said(flow.VerdictNone, flow.ReasonNone)},
			{name: "SYN, live path", packet: towards(syn), given: active, told: said(flow.VerdictNone, flow.ReasonNone)},
			{name: "mid-stream", packet: some},
			{name: "no flags", packet: towards(0)},
			{name: "datagram", packet: udpTowards, scenes: udpScenes, told: said(flow.VerdictNone, flow.ReasonNone)},
		},
		datapath.Shadow: {
			{name: "SYN", packet: towards(syn), count: proxied, told: said(flow.VerdictProxied, flow.ReasonNoPath)},
			{name: "SYN, live path", packet: towards(syn), given: active, count: bypassed, told: said(flow.VerdictBypassed, flow.ReasonPathOpen)},
			{name: "SYN, all connections taken", packet: towards(syn), count: proxied, told: said(flow.VerdictProxied, flow.ReasonPathConnections),
				given: []given{path(datapath.PathActive, func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) { v.ConnectionsLimit, v.ConnectionsTaken = 1, 1 })}},
			{name: "mid-stream", packet: some, count: proxied},
			{name: "mid-stream, live path", packet: some, given: active, count: bypassed},
			{name: "segments", packet: merged, given: active, count: bypassed},
			{name: "no flags", packet: towards(0), count: denied, told: said(flow.VerdictDenied, flow.ReasonBadFlags)},
			{name: "datagram", packet: udpTowards, scenes: udpScenes, count: denied, told: said(flow.VerdictDenied, flow.ReasonUDPNoPath)},
			{name: "datagram, live path", packet: udpTowards, scenes: udpScenes, given: active, count: bypassed, told: said(flow.VerdictBypassed, flow.ReasonPathOpen)},
			{name: "datagram, path revoked", packet: udpTowards, scenes: udpScenes, given: []given{path(datapath.PathRevoked)}, count: denied,
				told: said(flow.VerdictDenied, flow.ReasonPathRevoked)},
		},
	} {
		r.mode(t, mode)
		for _, c := range cases {
			pc := progCase{name: c.name, packet: c.packet, given: c.given, scenes: c.scenes}
			pc.eachScene(t, r, func(t *testing.T, s scene) {
				got := pc.watch(t, r, s)
				p := c.packet(s)
				one := datapath.Seen{Packets: p.segs, Bytes: p.bytes}
				if strings.HasPrefix(c.name, "SYN") {
					one.Opens = 1
				}
				want := datapath.Watched{Seen: one}
				if c.count != nil {
					*c.count(&want) = one
				}
				if have := r.seenOf(t, s); have != want {
					t.Errorf("counted %+v, want %+v", have, want)
				}
				var told []sighting
				if c.told != nil {
					line := *c.told
					line.service, line.name = s.service, serviceNames[s.service]
					told = []sighting{line}
				}
				if !slices.Equal(got, told) {
					t.Errorf("told %+v, want %+v", got, told)
				}
			})
		}
	}
}

var serviceNames = map[uint32]string{hostID: "host-echo", podID: "pod-echo", hostUDPID: "host-udp", podUDPID: "pod-udp"}

// TestSightingsAreBounded: equal sightings of a second are one record, a full table loses records and counts them, and
// denials have room all the same.
func TestSightingsAreBounded(t *testing.T) {
	r := newRig(t, 4096, 4096)
	r.mode(t, datapath.Shadow)
	s := r.scenes(t, lab.IPv4)["host"]
	r.reset(t)
	r.drain(t)
	for range 5 {
		r.send(t, towards(syn)(s))
	}
	if got := r.sightings(t); len(got) != 1 {
		t.Errorf("told %+v, want one record", got)
	}
	for _, v := range all[bpf.DenyKey, bpf.Deny](t, r.m.SpSightings) {
		if v.Pending != 4 {
			t.Errorf("%d are pending, want 4", v.Pending)
		}
	}
	fillSightings(t, r)
	before, err := r.d.Losses()
	check(t, err)
	s.client = netip.AddrPortFrom(r.Client.Other(lab.IPv4), clientPort)
	if verdict, _, _ := r.send(t, towards(syn)(s)); verdict != actNext {
		t.Errorf("verdict %d with a full table", verdict)
	}
	after, err := r.d.Losses()
	check(t, err)
	if got := r.sightings(t); len(got) != 0 || after.BestEffort != before.BestEffort+1 {
		t.Errorf("told %+v, %d lost, want one lost", got, after.BestEffort-before.BestEffort)
	}
	if w := r.seenOf(t, s); w.Proxied.Opens != 6 {
		t.Errorf("counted %+v, want 6 SYNs", w)
	}
	r.mode(t, datapath.Enforce)
	r.send(t, towards(0)(s))
	if e := r.drain(t); len(e) != 1 || flow.Event(e[0].Kind) != flow.EventDeny {
		t.Errorf("a denial left %d records", len(e))
	}
}

func fillSightings(t testing.TB, r *rig) {
	t.Helper()
	for i := uint32(0); ; i++ {
		k := bpf.DenyKey{ServerPort: 1, Reason: 1}
		binary.NativeEndian.PutUint32(k.Client.Bytes[:], i)
		if err := r.m.SpSightings.Put(&k, &bpf.Deny{ReportedNs: uint64(datapath.BootTime())}); errors.Is(err, unix.E2BIG) {
			return
		} else {
			check(t, err)
		}
	}
}

// TestSweepTellsOfSightings: what came after the record of a second is told when it is over.
func TestSweepTellsOfSightings(t *testing.T) {
	r := newRig(t, 4096, 4096)
	r.mode(t, datapath.Shadow)
	s := r.scenes(t, lab.IPv6)["pod"]
	k := bpf.DenyKey{Client: datapath.ToAddr(s.client.Addr()), Server: datapath.ToAddr(s.server.Addr()), ServerPort: s.server.Port(),
		Protocol: uint16(s.protocol), Reason: bpf.SallyportSpReason(flow.ReasonNoPath)}
	check(t, r.m.SpSightings.Put(&k, &bpf.Deny{ReportedNs: uint64(datapath.BootTime() - time.Minute), Pending: 4}))
	records, err := r.d.Sweep()
	check(t, err)
	if len(records) != 1 {
		t.Fatalf("records %+v, want one", records)
	}
	rec := records[0]
	if rec.Event != flow.EventWatched || rec.Verdict != flow.VerdictProxied || rec.Service != "pod-echo" || rec.Count != 4 || rec.Client.Addr() != s.client.Addr() {
		t.Errorf("record %+v", rec)
	}
}

// TestModesSideBySide: services of all modes at one port, of the node and of a pod, each get what their own mode says.
func TestModesSideBySide(t *testing.T) {
	r := newRig(t, 4096, 4096)
	for _, m := range []struct{ host, pod, webUDP datapath.Mode }{
		{datapath.Enforce, datapath.Shadow, datapath.Observe},
		{datapath.Shadow, datapath.Enforce, datapath.Shadow},
		{datapath.Observe, datapath.Enforce, datapath.Enforce},
	} {
		services := slices.DeleteFunc(r.d.Services(), func(s datapath.Service) bool { return s.ID == hostWebID || s.ID == podWebID || s.ID == hostUDPID })
		for i := range services {
			switch services[i].ID {
			case hostID:
				services[i].Mode, services[i].Ports, services[i].DenyUDP = m.host, []uint16{hostPort}, true
			case podID:
				services[i].Mode, services[i].Ports = m.pod, []uint16{hostPort}
			}
		}
		services = append(services, datapath.Service{ID: hostUDPID, Name: "host-udp", Target: datapath.TargetHost, Protocol: datapath.UDP,
			Ports: []uint16{hostPort}, Idle: udpIdle * time.Second, Mode: m.webUDP})
		_, err := r.d.SetServices(services)
		check(t, err)
		for _, f := range lab.Families() {
			scenes := r.scenes(t, f)
			host, pod, datagram := scenes["host"], scenes["pod"], scenes["udp host"]
			pod.server = netip.AddrPortFrom(pod.server.Addr(), hostPort)
			datagram.server = netip.AddrPortFrom(datagram.server.Addr(), hostPort)
			for _, c := range []struct {
				scene  scene
				mode   datapath.Mode
				packet func(scene) probe
			}{{host, m.host, towards(syn)}, {pod, m.pod, towards(syn)}, {datagram, m.webUDP, udpTowards}} {
				r.reset(t)
				r.drain(t)
				verdict, _, _ := r.send(t, c.packet(c.scene))
				w := r.seenOf(t, c.scene)
				if c.mode == datapath.Enforce {
					if verdict != actRedirect || w != (datapath.Watched{}) {
						t.Errorf("%+v %v %s: verdict %d, counted %+v", m, f, c.scene.name, verdict, w)
					}
				} else if verdict != actNext || w.Seen.Packets != 1 || (w.Proxied.Packets+w.Denied.Packets == 1) != (c.mode == datapath.Shadow) {
					t.Errorf("%+v %v %s: verdict %d, counted %+v", m, f, c.scene.name, verdict, w)
				}
			}
		}
	}
}

// TestModesAreRestored: another agent finds the services as they were, and counts that go on.
func TestModesAreRestored(t *testing.T) {
	r := newRig(t, 4096, 4096)
	services := r.d.Services()
	for i := range services {
		services[i].Mode = datapath.Mode(i % 3)
	}
	_, err := r.d.SetServices(services)
	check(t, err)
	var again *datapath.Datapath
	check(t, r.Node.Do(func() (err error) { again, err = datapath.Open(r.where); return err }))
	defer again.Close()
	have := again.Services()
	byID := func(a, b datapath.Service) int { return int(a.ID) - int(b.ID) }
	slices.SortFunc(have, byID)
	for i := range have {
		slices.Sort(have[i].Ports)
		slices.Sort(services[i].Ports)
		if !slices.Equal(have[i].Ports, services[i].Ports) || have[i].Mode != services[i].Mode || have[i].DenyUDP != services[i].DenyUDP ||
			have[i].Idle != services[i].Idle || have[i].Protocol != max(services[i].Protocol, datapath.TCP) {
			t.Errorf("restored %+v, was %+v", have[i], services[i])
		}
	}
	if len(have) != len(services) {
		t.Errorf("%d services, want %d", len(have), len(services))
	}
}
