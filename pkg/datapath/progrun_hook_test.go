package datapath_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// otherCases: what is none of ours goes on, unchanged and uncounted.
func otherCases() []progCase {
	none := pass(flow.ReasonNone)
	toPort := func(flags uint8) func(scene) probe {
		return func(s scene) probe {
			s.server = netip.AddrPortFrom(s.server.Addr(), 9999)
			return at(s.towards, s.device, tcp(s.client, s.server, flags))
		}
	}
	etherType := func(hi, lo byte) func(scene) probe {
		return bent(func(b []byte, _ packet.Offsets) []byte { b[12], b[13] = hi, lo; return b })
	}
	return []progCase{
		{name: "other/unprotected port", packet: toPort(syn), want: none},
		{name: "other/unprotected port, mid-stream", packet: toPort(ack), want: none},
		{name: "other/unprotected port, live path", packet: toPort(syn), given: []given{path(datapath.PathActive)}, want: none},
		{name: "other/unprotected port, marked", packet: toPort(ack), given: []given{markedBy(5)}, want: none},
		{name: "other/unprotected port, no configuration", packet: toPort(syn), given: []given{noConfig}, want: none},
		{name: "other/ARP", packet: etherType(8, 6), want: none},
		{name: "other/VLAN in the payload", scenes: []string{"host", "lo"}, packet: shaped(func(p *packet.Packet) { p.VLANs = []uint16{5} }), want: none},
		{name: "other/VLAN in the payload", scenes: []string{"pod"}, packet: shaped(func(p *packet.Packet) { p.VLANs = []uint16{5} }), want: want{verdict: actDrop, counts: one(flow.ReasonMalformed), records: []string{"DENY MALFORMED of :::0 to :::0"}}},
		{name: "other/forwarded to a host port", scenes: []string{"host"}, want: none, packet: func(s scene) probe {
			return at(s.towards, s.device, tcp(s.client, netip.AddrPortFrom(foreign(s), hostPort), syn))
		}},
		{name: "other/forwarded to a host port, mid-stream", scenes: []string{"host"}, want: none, packet: func(s scene) probe {
			return at(s.towards, s.device, tcp(s.client, netip.AddrPortFrom(foreign(s), hostPort), ack))
		}},
		{name: "other/forwarded from a host port", scenes: []string{"host"}, want: none, packet: func(s scene) probe {
			return at(s.from, s.device, tcp(netip.AddrPortFrom(foreign(s), hostPort), s.client, ack))
		}},
		{name: "other/forwarded from a host port, syn", scenes: []string{"host"}, want: none, packet: func(s scene) probe {
			return at(s.from, s.device, tcp(netip.AddrPortFrom(foreign(s), hostPort), s.client, syn))
		}},
		{name: "other/pod port at another address", scenes: []string{"pod"}, want: none, given: []given{byAnotherPod}, packet: func(s scene) probe {
			return at(s.towards, s.device, tcp(s.client, netip.AddrPortFrom(foreign(s), podPort), syn))
		}},
		{name: "other/pod's address, by the way in", scenes: []string{"pod"}, want: none, packet: func(s scene) probe {
			return at(s.from, s.device, tcp(s.client, s.server, syn)) // its egress hook will see it
		}},
		{name: "other/host port on the way out", scenes: []string{"host"}, want: none, packet: func(s scene) probe {
			return at(s.from, s.device, tcp(s.client, s.server, syn))
		}},
		{name: "other/host's answer on the way in", scenes: []string{"host"}, want: none, packet: func(s scene) probe {
			return at(s.towards, s.device, tcp(s.server, s.client, syn|ack))
		}},
	}
}

// wrongDevice: a pod's service is behind one device. Other devices but those of pods let its packets
// go; a pod's device is the end of the way, and its path is not that of the instance behind another.
func wrongDevice(t *testing.T, r *rig) []progCase {
	other := r.device(t, lab.PodDevice(1))
	there := fmt.Sprintf(" at hook %d device %d", bpf.SallyportSpHookSP_HOOK_OUT, other)
	none := pass(flow.ReasonNone)
	return []progCase{
		{name: "other device/to the pod", scenes: []string{"pod"}, want: none, packet: func(s scene) probe {
			return at("sp_dev_out", other, tcp(s.client, s.server, syn))
		}},
		{name: "other pod's device/to the pod", scenes: []string{"pod"}, want: steer(flow.ReasonNoPath, "leg down"+there, "origin"+there),
			given: []given{path(datapath.PathActive)}, packet: func(s scene) probe {
				return at(s.towards, other, tcp(s.client, s.server, syn))
			}},
		{name: "other pod's device/live flow", scenes: []string{"pod"}, given: []given{path(datapath.PathActive), bypassed()},
			want: steer(flow.ReasonPathStale, "flow 0/0 ended=PATH_STALE", "stray down"+there).recorded("END PATH_STALE 0/0"), packet: func(s scene) probe {
				return at(s.towards, other, tcp(s.client, s.server, ack))
			}},
		{name: "other device/from the pod", scenes: []string{"pod"}, want: none, packet: func(s scene) probe {
			return at(s.from, other, tcp(s.server, s.client, ack))
		}},
	}
}

// configCases: a datapath that is not set up closes.
func configCases() []progCase {
	return []progCase{
		{name: "no configuration/to server", packet: towards(syn), given: []given{path(datapath.PathActive), noConfig}, want: drop(flow.ReasonNoConfig)},
		{name: "no configuration/live flow", packet: towards(ack), given: []given{path(datapath.PathActive), bypassed(), noConfig}, want: drop(flow.ReasonNoConfig, "flow 0/0")},
		{name: "no configuration/marked", packet: towards(ack), given: []given{leg(up), marked(up), noConfig}, want: drop(flow.ReasonNoConfig, "leg up")},
		{name: "other schema", packet: towards(syn), given: []given{path(datapath.PathActive), otherSchema}, want: drop(flow.ReasonNoConfig)},
		{name: "no configuration/to client", packet: from(ack), given: []given{noConfig},
			want: drop(flow.ReasonNoConfig).reversed()},
	}
}

// reversed is a denial whose record has the packet's own direction, server to client.
func (w want) reversed() want {
	w.records = []string{w.records[0] + " reversed"}
	return w
}

// reinjectCases: the second pass of what px0 put back. The mark alone opens nothing.
func reinjectCases() []progCase {
	clean := func(w want) want { w.mark = noMark; return w }
	again := clean(pass(flow.ReasonReinjected))
	with := func(w want, state ...string) want { w.state = state; return w }
	bad := func(state ...string) want { return drop(flow.ReasonNoLeg, state...) }
	send := func(name string, p func(scene) probe, w want, g ...given) progCase {
		return progCase{name: "reinjected/" + name, packet: p, given: g, want: w}
	}
	return []progCase{
		send("to server", towards(syn), with(again, "leg up"), leg(up), marked(up)),
		send("to server, mid-stream", towards(ack), with(again, "leg up"), leg(up), marked(up)),
		send("to client", from(syn|ack), with(again, "leg down"), leg(down), marked(down)),
		send("reset to server", towards(packet.RST), with(again, "stray up"), stray(up), marked(up)),
		send("reset to client", from(packet.RST), with(again, "stray down"), stray(down), marked(down)),
		send("to server, no leg", towards(syn), bad(), marked(up)),
		send("to server, leg of the other side", towards(ack), bad("leg down"), leg(down), marked(up)),
		send("to client, no leg", from(ack), bad().reversed(), marked(down)),
		send("live path, no leg", towards(syn), bad(), path(datapath.PathActive), marked(up)),
		send("live flow, no leg", towards(ack), bad("flow 0/0"), path(datapath.PathActive), bypassed(), marked(up)),
		send("mark of the other side", towards(ack), steer(flow.ReasonStray, "leg up", "stray down"), leg(up), marked(down)),
		send("mark of somebody else", towards(syn), steer(flow.ReasonNoPath, "leg down", "leg up", "origin"), leg(up), markedBy(0xdecafbad)),
		send("mark of the proxy's namespace", towards(ack), steer(flow.ReasonStray, "stray down"), markedBy(1)),
		send("mark of somebody else, live flow", towards(ack), pass(flow.ReasonPathLive, "flow 1/0"), path(datapath.PathActive), bypassed(), markedBy(0xdecafbad)),
	}
}

// volumeCases: what goes over the wire is counted, not what the stack passes around.
func volumeCases() []progCase {
	gso := func(payload, size int, change ...func(*skBuff)) func(scene) probe {
		return func(s scene) probe {
			p := tcp(s.client, s.server, ack)
			p.Payload = make([]byte, payload)
			p.TCPOptions = make([]byte, 12)
			frame, o := p.Build()
			segs := uint64((payload + size - 1) / size)
			headers := uint64(o.Payload - o.L3)
			ctx := skBuff{Ifindex: uint32(s.device), GSOSegs: uint32(segs), GSOSize: uint32(size)}
			for _, f := range change {
				f(&ctx)
			}
			return probe{program: s.towards, ctx: ctx, frame: frame, segs: segs, bytes: uint64(payload) + segs*headers}
		}
	}
	uncounted := func(ctx *skBuff) { ctx.GSOSegs = 0 }
	return []progCase{
		{name: "volume/segments of a live flow", packet: gso(3000, 1000), given: []given{path(datapath.PathActive), bypassed()},
			want: pass(flow.ReasonPathLive, "flow 3/0")},
		{name: "volume/segments that nobody counted", packet: gso(2400, 800, uncounted), given: []given{path(datapath.PathActive), bypassed()},
			want: pass(flow.ReasonPathLive, "flow 3/0")},
		{name: "volume/one segment that nobody counted", packet: gso(1000, 1000, uncounted), given: []given{path(datapath.PathActive), bypassed()},
			want: pass(flow.ReasonPathLive, "flow 1/0")},
		{name: "volume/segments that cannot be read", only: lab.IPv6, want: portless(drop(flow.ReasonExtHeaders)), packet: func(s scene) probe {
			p := shaped(ext(repeat(packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(8)}, 9)...))(s)
			p.ctx.GSOSegs, p.ctx.GSOSize, p.segs = 3, 100, 3
			return p
		}},
		{name: "volume/segments of a leg", packet: gso(2500, 1000), given: []given{leg(down)}, want: steer(flow.ReasonLeg, "leg down")},
	}
}

func TestHooks(t *testing.T) {
	r := newRig(t, 4096, 4096)
	for _, cases := range [][]progCase{otherCases(), wrongDevice(t, r), configCases(), reinjectCases(), volumeCases()} {
		runCases(t, r, cases)
	}
}

// TestForwardingOff: a node that routes for nobody takes every packet for its own.
func TestForwardingOff(t *testing.T) {
	r := newRig(t, 4096, 4096)
	check(t, r.Node.Sysctl("ipv4/ip_forward", "0"))
	check(t, r.Node.Sysctl("ipv6/conf/all/forwarding", "0"))
	runCases(t, r, []progCase{{name: "not forwarded", scenes: []string{"host"}, packet: func(s scene) probe {
		return at(s.towards, s.device, tcp(s.client, netip.AddrPortFrom(foreign(s), hostPort), syn))
	}, want: want{verdict: actRedirect, counts: one(flow.ReasonNoPath), state: []string{"leg down elsewhere", "origin elsewhere"}}}})
}

// TestNewAddress: an address that appears later is the node's own as soon as the kernel has its route.
func TestNewAddress(t *testing.T) {
	r := newRig(t, 4096, 4096)
	for _, f := range lab.Families() {
		s := r.scenes(t, f)["host"]
		probeIt := func() int32 {
			r.reset(t)
			verdict, _, _ := r.send(t, at(s.towards, s.device, tcp(s.client, netip.AddrPortFrom(foreign(s), hostPort), syn)))
			return verdict
		}
		if v := probeIt(); v != actNext {
			t.Errorf("%v: foreign address: verdict %d, want %d", f, v, actNext)
		}
		addAddress(t, r.Node, foreign(s))
		waitUntil(t, "the kernel to take the new address for its own", func() bool { return probeIt() == actRedirect })
	}
}
