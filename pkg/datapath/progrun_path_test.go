package datapath_test

import (
	"math"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/packet"
)

const unknownState datapath.PathState = 99

func towards(flags uint8) func(s scene) probe {
	return func(s scene) probe { return at(s.towards, s.device, tcp(s.client, s.server, flags)) }
}

func from(flags uint8) func(s scene) probe {
	return func(s scene) probe { return at(s.from, s.device, tcp(s.server, s.client, flags)) }
}

const (
	syn = packet.SYN
	ack = packet.ACK
)

// synCases: the route of a flow is chosen at its SYN.
func synCases() []progCase {
	toProxy := func(r flow.Reason) want { return steer(r, "leg down", "origin") }
	key := func(f func(*bpf.PathKey)) func(*bpf.PathKey, *bpf.PathRef, *bpf.Path) {
		return func(k *bpf.PathKey, _ *bpf.PathRef, _ *bpf.Path) { f(k) }
	}
	ref := func(f func(*bpf.PathRef)) func(*bpf.PathKey, *bpf.PathRef, *bpf.Path) {
		return func(_ *bpf.PathKey, r *bpf.PathRef, _ *bpf.Path) { f(r) }
	}
	syns := func(name string, w want, g ...given) progCase {
		return progCase{name: "syn/" + name, packet: towards(syn), given: g, want: w}
	}
	opened := pass(flow.ReasonPathOpen, "flow 1/0").recorded("OPEN PATH_OPEN 1/0")
	active := datapath.PathActive
	return []progCase{
		syns("no path", toProxy(flow.ReasonNoPath)),
		syns("live path", opened, path(active)),
		syns("last moment", opened, path(active, deadline(int64(time.Minute)))),
		syns("furthest deadline", opened, path(active, deadline(int64(time.Hour)))),
		syns("past deadline", toProxy(flow.ReasonPathExpired), path(active, deadline(-1))),
		syns("deadline zero", toProxy(flow.ReasonPathExpired), path(active, func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) { v.DeadlineNs = 0 })),
		syns("deadline beyond the maximum", toProxy(flow.ReasonPathExpired), path(active, deadline(int64(time.Hour+time.Minute)))),
		syns("infinite deadline", toProxy(flow.ReasonPathExpired), path(active, func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) { v.DeadlineNs = math.MaxUint64 })),
		syns("free slot", toProxy(flow.ReasonPathStale), path(datapath.PathFree)),
		syns("pending", toProxy(flow.ReasonPathStale), path(datapath.PathPending)),
		syns("revoked", toProxy(flow.ReasonPathRevoked), path(datapath.PathRevoked)),
		syns("expired", toProxy(flow.ReasonPathExpired), path(datapath.PathExpired)),
		syns("spent", toProxy(flow.ReasonPathSpent), path(datapath.PathSpent)),
		syns("unknown state", toProxy(flow.ReasonPathStale), path(unknownState)),
		syns("another path in the slot", toProxy(flow.ReasonPathStale), path(active, ref(func(r *bpf.PathRef) { r.Epoch = 2 }))),
		syns("slot out of range", toProxy(flow.ReasonPathStale), path(active, ref(func(r *bpf.PathRef) { r.Slot = 1 << 20 }))),
		syns("slot of another client", toProxy(flow.ReasonPathStale), path(active, func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) { v.Client.Bytes[15]++ })),
		syns("slot of another service", toProxy(flow.ReasonPathStale), path(active, func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) { v.ServiceId++ })),
		syns("path of another client", toProxy(flow.ReasonNoPath), path(active, key(func(k *bpf.PathKey) { k.Client.Bytes[15]++ }))),
		syns("path of another service", toProxy(flow.ReasonNoPath), path(active, key(func(k *bpf.PathKey) { k.ServiceId++ }))),
		syns("path of another port", toProxy(flow.ReasonNoPath), path(active, key(func(k *bpf.PathKey) { k.Port++ }))),
		syns("port of the client", opened, path(active, boundTo(40000, 0))),
		syns("another port of the client", toProxy(flow.ReasonPathBound), path(active, boundTo(40001, 0))),
		syns("control group", opened, path(active, boundTo(0, 7)), spoken(7, 0)),
		syns("another control group", toProxy(flow.ReasonPathBound), path(active, boundTo(0, 7)), spoken(8, 0)),
		syns("nobody said which control group", toProxy(flow.ReasonPathBound), path(active, boundTo(0, 7))),
		syns("control group, said too long ago", toProxy(flow.ReasonPathBound), path(active, boundTo(0, 7)), spoken(7, 2*time.Second)),
		syns("control group, of a slot for another one", toProxy(flow.ReasonPathStale),
			path(active, boundTo(0, 7), func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) { v.Cgroup = 9 }), spoken(7, 0)),
		syns("port of the client, of a slot for another one", toProxy(flow.ReasonPathStale),
			path(active, boundTo(40000, 0), func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) { v.ClientPort = 1 })),
		syns("address, beside other sockets of it", opened, path(active), besideBound(0)),
		syns("lease lapsed", toProxy(flow.ReasonLeaseLapsed), path(active), lapsed),
		syns("lease lapsed, no path", toProxy(flow.ReasonNoPath), lapsed),
		syns("tuple held", steer(flow.ReasonTupleHeld, "leg down", "leg up", "origin"), path(active), leg(up)),
		{name: "syn/with ECN", packet: towards(syn | 0xc0), given: []given{path(active)}, want: opened},
		{name: "syn/with data", packet: func(s scene) probe {
			p := tcp(s.client, s.server, syn)
			p.Payload = []byte("fast open")
			return at(s.towards, s.device, p)
		}, given: []given{path(active)}, want: opened},
		{name: "syn/with ACK", packet: towards(syn | ack), given: []given{path(active)}, want: steer(flow.ReasonStray, "stray down")},
	}
}

// liveCases: a flow keeps its route while its path serves it.
func liveCases() []progCase {
	active := path(datapath.PathActive)
	live := func(name string, send func(scene) probe, state string, g ...given) progCase {
		return progCase{name: "live/" + name, packet: send, given: append([]given{active, bypassed()}, g...), want: pass(flow.ReasonPathLive, state)}
	}
	return []progCase{
		live("to server", towards(ack), "flow 1/0"),
		live("to client", from(ack), "flow 0/1 ANSWERED"),
		live("syn again", towards(syn), "flow 1/0"),
		live("syn-ack", from(syn|ack), "flow 0/1"),
		live("fin of the client", towards(ack|packet.FIN), "flow 1/0 FIN_CLIENT"),
		live("fin of the server", from(ack|packet.FIN), "flow 0/1 FIN_SERVER ANSWERED"),
		live("reset by the client", towards(packet.RST), "flow 1/0 RST"),
		live("reset by the server", from(packet.RST|ack), "flow 0/1 RST ANSWERED"),
		live("lease lapsed", towards(ack), "flow 1/0", lapsed),
		live("syn after the handshake", towards(syn), "flow 1/0 ANSWERED AGAIN", bypassed(flags(shaken))),
		live("syn-ack of the handshake, late", from(syn|ack), "flow 0/1 ANSWERED", bypassed(flags(shaken))),
		live("challenge to a syn", from(ack), "flow 0/1 ANSWERED AGAIN", bypassed(flags(shaken|bpf.SallyportSpFlagsSP_AGAIN))),
		{name: "live/second connection", packet: from(syn | ack), given: []given{active, bypassed(flags(shaken | bpf.SallyportSpFlagsSP_AGAIN))},
			want: steer(flow.ReasonStray, "flow 0/0 RST ANSWERED AGAIN", "stray up")},
		{name: "live/after both FINs", packet: towards(ack), given: []given{active, bypassed(flags(bothFins))},
			want: pass(flow.ReasonPathLive, "flow 1/0 FIN_CLIENT FIN_SERVER")},
		{name: "live/old client leg", packet: towards(ack), given: []given{active, bypassed(), leg(down)},
			want: pass(flow.ReasonPathLive, "flow 1/0", "leg down")},
		{name: "live/half closed, syn", packet: towards(syn), given: []given{active, bypassed(flags(bpf.SallyportSpFlagsSP_FIN_CLIENT))},
			want: pass(flow.ReasonPathLive, "flow 1/0 FIN_CLIENT")},
	}
}

// endCases: a path that no longer serves ends the flow at its next packet, in either direction.
func endCases() []progCase {
	type end struct {
		name   string
		reason flow.Reason
		path   given
		flow   given
	}
	moved := func(f *bpf.Flow) { f.Epoch = 2 }
	other := func(f *bpf.Flow) { f.ServiceId = 99 }
	ends := []end{
		{"past deadline", flow.ReasonPathExpired, path(datapath.PathActive, deadline(-1)), bypassed()},
		{"deadline moved beyond the maximum", flow.ReasonPathExpired, path(datapath.PathActive, deadline(int64(2*time.Hour))), bypassed()},
		{"revoked", flow.ReasonPathRevoked, path(datapath.PathRevoked), bypassed()},
		{"expired", flow.ReasonPathExpired, path(datapath.PathExpired), bypassed()},
		{"spent", flow.ReasonPathSpent, path(datapath.PathSpent), bypassed()},
		{"freed", flow.ReasonPathStale, path(datapath.PathFree), bypassed()},
		{"pending again", flow.ReasonPathStale, path(datapath.PathPending), bypassed()},
		{"unknown state", flow.ReasonPathStale, path(unknownState), bypassed()},
	}
	var out []progCase
	for _, e := range ends {
		gone, name := " ended="+e.reason.String(), e.reason.String()
		record := "END " + name + " 0/0"
		out = append(out,
			progCase{name: "end/" + e.name + "/to server", packet: towards(ack), given: []given{e.path, e.flow},
				want: cuts(e.reason, towards(packet.RST|ack), "flow 0/0"+gone+" CUT_SERVER", "stray down").recorded(record)},
			progCase{name: "end/" + e.name + "/to client", packet: from(ack), given: []given{e.path, e.flow},
				want: cuts(e.reason, from(packet.RST|ack), "flow 0/0"+gone+" CUT_CLIENT", "stray up").recorded(record)},
			progCase{name: "end/" + e.name + "/reset by the server", packet: from(packet.RST), given: []given{e.path, e.flow},
				want: cuts(e.reason, from(packet.RST), "flow 0/0"+gone+" CUT_CLIENT", "stray up").recorded(record)},
			progCase{name: "end/" + e.name + "/syn", packet: towards(syn), given: []given{e.path, e.flow},
				want: steer(e.reason, "leg down", "origin").recorded(record, "CLOSE "+name+" 0/0")},
		)
	}
	stale := []progCase{
		{name: "end/slot reused", packet: towards(ack), given: []given{path(datapath.PathActive), bypassed(moved)},
			want: cuts(flow.ReasonPathStale, towards(packet.RST|ack), "flow 0/0 slot=0 epoch=2 ended=PATH_STALE CUT_SERVER", "stray down").
				recorded(`END PATH_STALE 0/0 grant ""`)},
		{name: "end/address serves another service", packet: towards(ack), given: []given{path(datapath.PathActive), bypassed(other)},
			want: cuts(flow.ReasonPathStale, towards(packet.RST|ack), "flow 0/0 service=99 ended=PATH_STALE CUT_SERVER", "stray down").
				recorded("END PATH_STALE 0/0 service=99")},
		{name: "end/told once", packet: towards(ack), given: []given{path(datapath.PathRevoked), bypassed(ended(flow.ReasonPathRevoked))},
			want: cuts(flow.ReasonPathRevoked, towards(packet.RST|ack), "flow 0/0 ended=PATH_REVOKED CUT_SERVER", "stray down")},
		{name: "end/never again", packet: towards(ack), given: []given{path(datapath.PathActive), bypassed(ended(flow.ReasonPathRevoked))},
			want: cuts(flow.ReasonPathRevoked, towards(packet.RST|ack), "flow 0/0 ended=PATH_REVOKED CUT_SERVER", "stray down")},
		{name: "end/client leg of an earlier connection", packet: towards(ack), given: []given{path(datapath.PathRevoked), leg(down), bypassed()},
			want: cuts(flow.ReasonPathRevoked, towards(packet.RST|ack), "flow 0/0 ended=PATH_REVOKED CUT_SERVER", "leg down", "stray down").recorded("END PATH_REVOKED 0/0")},
		{name: "end/syn of the server", packet: from(syn), given: []given{path(datapath.PathActive), bypassed(ended(flow.ReasonPathRevoked))},
			want: drop(flow.ReasonReverseOpen, "flow 0/0 ended=PATH_REVOKED")},
	}
	return append(out, stale...)
}

// reuseCases: a SYN with the tuple of a flow that is over.
func reuseCases() []progCase {
	active := path(datapath.PathActive)
	return []progCase{
		{name: "reuse/reset, path lives", packet: towards(syn), given: []given{active, bypassed(flags(reset))},
			want: pass(flow.ReasonPathOpen, "flow 1/0").recorded("CLOSE CLOSED 0/0", "OPEN PATH_OPEN 1/0")},
		{name: "reuse/closed, path lives", packet: towards(syn), given: []given{active, bypassed(flags(bothFins))},
			want: pass(flow.ReasonPathOpen, "flow 1/0").recorded("CLOSE CLOSED 0/0", "OPEN PATH_OPEN 1/0")},
		{name: "reuse/ended, path of its successor lives", packet: towards(syn), given: []given{active, bypassed(ended(flow.ReasonPathExpired))},
			want: pass(flow.ReasonPathOpen, "flow 1/0").recorded("CLOSE PATH_EXPIRED 0/0", "OPEN PATH_OPEN 1/0")},
		{name: "reuse/closed, path over", packet: towards(syn), given: []given{path(datapath.PathRevoked), bypassed(flags(bothFins))},
			want: steer(flow.ReasonPathRevoked, "leg down", "origin").recorded("CLOSE CLOSED 0/0")},
		{name: "reuse/closed, lease lapsed", packet: towards(syn), given: []given{active, bypassed(flags(bothFins)), lapsed},
			want: steer(flow.ReasonLeaseLapsed, "leg down", "origin").recorded("CLOSE CLOSED 0/0")},
	}
}

// legCases: later packets of proxied flows, and packets that belong to nothing.
func legCases() []progCase {
	return []progCase{
		{name: "leg/to server", packet: towards(ack), given: []given{leg(down)}, want: steer(flow.ReasonLeg, "leg down")},
		{name: "leg/to server, fin", packet: towards(ack | packet.FIN), given: []given{leg(down)}, want: steer(flow.ReasonLeg, "leg down FIN_CLIENT")},
		{name: "leg/to server, reset", packet: towards(packet.RST), given: []given{leg(down)}, want: steer(flow.ReasonLeg, "leg down RST")},
		{name: "leg/to client", packet: from(ack), given: []given{leg(up)}, want: steer(flow.ReasonLeg, "leg up ANSWERED")},
		{name: "leg/to client, syn-ack", packet: from(syn | ack), given: []given{leg(up)}, want: steer(flow.ReasonLeg, "leg up")},
		{name: "leg/to client, fin", packet: from(ack | packet.FIN), given: []given{leg(up)}, want: steer(flow.ReasonLeg, "leg up FIN_SERVER ANSWERED")},
		{name: "leg/of the other side", packet: towards(ack), given: []given{leg(up)}, want: steer(flow.ReasonStray, "leg up", "stray down")},
		{name: "leg/service answers the client itself", packet: from(ack), given: []given{leg(down)}, want: steer(flow.ReasonStray, "leg down", "stray up")},
		{name: "stray/to server", packet: towards(ack), want: steer(flow.ReasonStray, "stray down")},
		{name: "stray/to server, live path", packet: towards(ack), given: []given{path(datapath.PathActive)}, want: steer(flow.ReasonStray, "stray down")},
		{name: "stray/to client", packet: from(ack), want: steer(flow.ReasonStray, "stray up")},
		{name: "stray/to client, syn-ack", packet: from(syn | ack), want: steer(flow.ReasonStray, "stray up")},
		{name: "reverse open", packet: from(syn), want: drop(flow.ReasonReverseOpen)},
		{name: "reverse open, live path", packet: from(syn), given: []given{path(datapath.PathActive)}, want: drop(flow.ReasonReverseOpen)},
	}
}

// deviceCases are all cases of the hooks of the host namespace that need no special rig.
func deviceCases() []progCase {
	var out []progCase
	for _, c := range [][]progCase{synCases(), liveCases(), endCases(), reuseCases(), legCases()} {
		out = append(out, c...)
	}
	return out
}

func TestDevicePrograms(t *testing.T) {
	r := newRig(t, 0, 0)
	runCases(t, r, deviceCases())
}
