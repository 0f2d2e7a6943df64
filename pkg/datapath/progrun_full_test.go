package datapath_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

const small = 4 // entries of the tables of a rig that is to be full

// somebody is another client, so that entries of a filled table are none of the scene's.
func somebody(n int) bpf.Addr {
	a := datapath.ToAddr(netip.MustParseAddr("192.0.2.1"))
	binary.BigEndian.PutUint16(a.Bytes[14:], uint16(n))
	return a
}

func fullFlows(t testing.TB, r *rig, _ scene, _ *probe) {
	for n := range small {
		check(t, r.m.SpFlows.Put(&bpf.FlowKey{Client: somebody(n)}, &bpf.Flow{}))
	}
}

func fullLegs(t testing.TB, r *rig, _ scene, _ *probe) {
	for n := range small {
		check(t, r.m.SpLegs.Put(&bpf.LegKey{Client: somebody(n)}, &bpf.Leg{}))
	}
}

// tableCases need a rig with small tables. Entries of the filled table are left out of the state.
func tableCases(px0 int) []progCase {
	active := path(datapath.PathActive)
	return []progCase{
		{name: "full/flows", packet: towards(syn), given: []given{active, fullFlows}, want: steer(flow.ReasonFlowsFull, "leg down", "origin")},
		{name: "full/legs, syn", packet: towards(syn), given: []given{fullLegs}, want: drop(flow.ReasonLegsFull)},
		{name: "full/legs, live path", packet: towards(syn), given: []given{active, fullLegs}, want: pass(flow.ReasonPathOpen, "flow 1/0").recorded("OPEN PATH_OPEN 1/0")},
		{name: "full/flows and legs", packet: towards(syn), given: []given{active, fullFlows, fullLegs}, want: drop(flow.ReasonLegsFull)},
		{name: "full/legs, dial", given: []given{origin, fullLegs}, want: want{verdict: actDrop, counts: one(flow.ReasonLegsFull), state: []string{"origin"}},
			packet: func(s scene) probe { return at("sp_px0_in", px0, tcp(s.client, s.server, syn)) }},
	}
}

func TestFullTables(t *testing.T) {
	r := newRig(t, small, small)
	runCases(t, r, tableCases(r.px.Px0()))
}

// fillMustDeliver opens bypassed flows of other ports until there is no room for a record.
func fillMustDeliver(t testing.TB, r *rig, s scene, _ *probe) {
	t.Helper()
	for port := uint16(1); port < clientPort; port++ {
		one := s
		one.client = netip.AddrPortFrom(s.client.Addr(), port)
		if verdict, _, _ := r.send(t, towards(syn)(one)); verdict != actNext {
			break
		}
	}
	empty[bpf.FlowKey, bpf.Flow](t, r.m.SpFlows)
	empty[bpf.LegKey, bpf.Leg](t, r.m.SpLegs)
	empty[bpf.OriginKey, bpf.Origin](t, r.m.SpOrigins)
}

// ringCases: no room for a record means no bypass.
func ringCases() []progCase {
	active := path(datapath.PathActive)
	full := func(name string, send func(scene) probe, w want, g ...given) progCase {
		return progCase{name: "ring full/" + name, scenes: []string{"host", "pod"}, packet: send, want: w,
			given: append([]given{active, fillMustDeliver}, g...)}
	}
	toProxy := steer(flow.ReasonRingFull, "leg down", "origin")
	keeps := func(flow string) want {
		w := toProxy
		w.state = append([]string{flow}, w.state...)
		return w
	}
	return []progCase{
		full("syn", towards(syn), toProxy),
		full("live flow", towards(ack), pass(flow.ReasonPathLive, "flow 1/0"), bypassed()),
		full("end", towards(ack), cuts(flow.ReasonPathRevoked, towards(packet.RST|ack), "flow 0/0 ended=PATH_REVOKED CUT_SERVER", "stray down"),
			path(datapath.PathRevoked), bypassed()),
		full("syn of an ended flow", towards(syn), keeps("flow 0/0 ended=PATH_EXPIRED"), bypassed(ended(flow.ReasonPathExpired))),
		full("syn of a closed flow", towards(syn), keeps("flow 0/0 ended=CLOSED FIN_CLIENT FIN_SERVER"), bypassed(flags(bothFins))),
		// what follows such a SYN belongs to the proxy, though the old flow is still there
		full("after the syn of a closed flow", towards(ack), steer(flow.ReasonLeg, "flow 0/0 ended=CLOSED FIN_CLIENT FIN_SERVER", "leg down", "origin"),
			bypassed(flags(bothFins)), sent(towards(syn))),
		full("after the syn of an ended flow", towards(ack), steer(flow.ReasonLeg, "flow 0/0 ended=PATH_EXPIRED", "leg down", "origin"),
			bypassed(ended(flow.ReasonPathExpired)), sent(towards(syn))),
	}
}

// sent is a packet that was there before the case's.
func sent(send func(scene) probe) given {
	return func(t testing.TB, r *rig, s scene, _ *probe) { r.send(t, send(s)) }
}

func TestFullMustDeliver(t *testing.T) {
	r := newRig(t, 4096, 4096)
	for _, c := range ringCases() {
		c.unread = true
		runCases(t, r, []progCase{c})
	}
}

// TestLossesAreCounted: produced records are in the ring or counted as lost, to the unit.
func TestLossesAreCounted(t *testing.T) {
	r := newRig(t, 4096, 4096)
	for _, f := range lab.Families() {
		s := r.scenes(t, f)["host"]
		r.reset(t)
		r.drain(t)
		path(datapath.PathActive)(t, r, s, nil)
		fillMustDeliver(t, r, s, nil)
		path(datapath.PathRevoked)(t, r, s, nil)
		const lost = 3
		for range lost {
			bypassed()(t, r, s, nil)
			r.send(t, towards(ack)(s))
		}
		r.compareLosses(t, datapath.Losses{MustDeliver: lost})
	}
}

// TestLostDenialsAreCounted fills the best-effort ring.
func TestLostDenialsAreCounted(t *testing.T) {
	r := newRig(t, 4096, 4096)
	s := r.scenes(t, lab.IPv4)["host"]
	r.reset(t)
	r.drain(t)
	var l datapath.Losses
	for l == (datapath.Losses{}) {
		empty[bpf.DenyKey, bpf.Deny](t, r.m.SpDenies)
		for n := range 4096 {
			one := s
			one.client = netip.AddrPortFrom(datapath.FromAddr(somebody(n)), clientPort)
			r.send(t, towards(ack)(one))
		}
		var err error
		l, err = r.d.Losses()
		check(t, err)
	}
	r.compareLosses(t, l)
}

func (r *rig) compareLosses(t *testing.T, l datapath.Losses) {
	t.Helper()
	have, err := r.d.Losses()
	check(t, err)
	if have != l {
		t.Errorf("losses are %+v, want %+v", have, l)
	}
	var perCPU []bpf.Sequence
	check(t, r.m.SpSequence.Lookup(uint32(0), &perCPU))
	produced := uint64(0)
	for _, s := range perCPU {
		produced += s.Produced
	}
	if got := uint64(len(r.drain(t))); got+l.MustDeliver+l.BestEffort != produced {
		t.Errorf("%d records were produced, %d delivered, %+v lost", produced, got, l)
	}
}

// TestDenialsAreJoined: one record a second for equal denials. When their table is full each is a loss.
func TestDenialsAreJoined(t *testing.T) {
	r := newRig(t, 4096, 4096)
	for _, f := range lab.Families() {
		s := r.scenes(t, f)["host"]
		r.reset(t)
		r.drain(t)
		for range 5 {
			r.send(t, towards(ack)(s))
		}
		compareLines(t, "records", r.renderEvents(t, r.drain(t), s), []string{"DENY STRAY"})
		for k, d := range all[bpf.DenyKey, bpf.Deny](t, r.m.SpDenies) {
			if d.Pending != 4 {
				t.Errorf("%d denials are pending, want 4", d.Pending)
			}
			d.ReportedNs -= 1e9
			check(t, r.m.SpDenies.Put(&k, &d))
		}
		r.send(t, towards(ack)(s))
		compareLines(t, "records", r.renderEvents(t, r.drain(t), s), []string{"DENY STRAY x5"})

		r.reset(t)
		r.drain(t)
		for n := range r.m.SpDenies.MaxEntries() {
			check(t, r.m.SpDenies.Put(&bpf.DenyKey{Client: somebody(int(n))}, &bpf.Deny{}))
		}
		r.send(t, towards(ack)(s))
		r.compareLosses(t, datapath.Losses{BestEffort: 1})
		if c := r.counters(t)[flow.ReasonStray]; c.Packets != 1 {
			t.Errorf("counted %d strays, want 1", c.Packets)
		}
	}
}
