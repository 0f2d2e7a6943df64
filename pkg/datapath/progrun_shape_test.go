package datapath_test

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

const fragmentID = 99

// pieceOf is a fragment of a datagram; change bends its bytes.
func pieceOf(n int, program func(scene) string, datagram func(scene) packet.Packet, change ...func([]byte)) func(scene) probe {
	return func(s scene) probe {
		p := datagram(s)
		p.Payload = make([]byte, 64)
		b := p.Fragments(24, fragmentID)[n]
		for _, f := range change {
			f(b)
		}
		return probe{program: program(s), ctx: skBuff{Ifindex: uint32(s.device)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
	}
}

func inTowards(s scene) string { return s.towards }
func inFrom(s scene) string    { return s.from }

func question(s scene) packet.Packet { return udp(s.client, s.server) }
func answer(s scene) packet.Packet   { return udp(s.server, s.client) }

// free is a datagram to a port that nobody protects.
func free(s scene) packet.Packet {
	return udp(s.client, netip.AddrPortFrom(s.server.Addr(), 9999))
}

// fragmentHook is the hook that a direction's fragments are kept for.
func fragmentHook(s scene, from bool) bpf.SallyportSpHook {
	switch {
	case !from || s.hook == bpf.SallyportSpHookSP_HOOK_LO:
		return s.hook
	case s.hook == bpf.SallyportSpHookSP_HOOK_OUT:
		return bpf.SallyportSpHookSP_HOOK_IN
	}
	return bpf.SallyportSpHookSP_HOOK_OUT
}

// kept is what a first fragment left, so long ago.
func kept(kind bpf.SallyportSpFragmentKind, age time.Duration, change ...func(*bpf.FragmentKey)) given {
	return func(t testing.TB, r *rig, s scene, _ *probe) {
		src, dst, from := s.client, s.server, kind == bpf.SallyportSpFragmentKindSP_FRAGMENT_TO_CLIENT
		if from {
			src, dst = dst, src
		}
		k := bpf.FragmentKey{Src: datapath.ToAddr(src.Addr()), Dst: datapath.ToAddr(dst.Addr()), Id: fragmentID, Hook: fragmentHook(s, from)}
		if k.Hook == bpf.SallyportSpHookSP_HOOK_OUT {
			k.Ifindex = uint32(s.device)
		}
		for _, f := range change {
			f(&k)
		}
		check(t, r.m.SpFragments.Put(&k, &bpf.Fragment{SeenNs: uint64(datapath.BootTime() - age), Kind: kind,
			ClientPort: s.client.Port(), ServerPort: s.server.Port()}))
	}
}

const (
	asFree   = bpf.SallyportSpFragmentKindSP_FRAGMENT_FREE
	toServer = bpf.SallyportSpFragmentKindSP_FRAGMENT_TO_SERVER
	toClient = bpf.SallyportSpFragmentKindSP_FRAGMENT_TO_CLIENT
)

// firstCases: the first fragment is decided like a datagram, and what it was is kept if it passes.
func firstCases() []progCase {
	active := path(datapath.PathActive)
	first := func(name string, w want, g ...given) progCase {
		return progCase{name: "first/" + name, scenes: udpScenes, packet: pieceOf(0, inTowards, question), given: g, want: w}
	}
	none := pass(flow.ReasonNone)
	whole := func(s scene) probe {
		p := udp(s.client, s.server)
		p.Extensions = []packet.Extension{packet.FragmentHeader(0, false, fragmentID)}
		return at(s.towards, s.device, p)
	}
	short := func(b []byte) { // four bytes behind the IP header
		at := 16
		if b[14]>>4 == 6 {
			at = 18
		}
		binary.BigEndian.PutUint16(b[at:], binary.BigEndian.Uint16(b[at:])-20)
	}
	return []progCase{
		first("live path", pass(flow.ReasonPathOpen, "flow 1/0", "fragment to server").recorded("OPEN PATH_OPEN 1/0"), active),
		first("live flow", pass(flow.ReasonPathLive, "flow 1/0", "fragment to server"), active, bypassed()),
		first("no path", told(flow.ReasonUDPNoPath)).family(lab.IPv4),
		first("no path", drop(flow.ReasonUDPNoPath)).family(lab.IPv6),
		first("no path, id of a datagram that passed", drop(flow.ReasonUDPNoPath), kept(asFree, 0)).family(lab.IPv6),
		first("id of a datagram that passed, live flow", pass(flow.ReasonPathLive, "flow 1/0", "fragment to server"), active, bypassed(), kept(asFree, 0)),
		{name: "first/unprotected port", scenes: udpScenes, packet: pieceOf(0, inTowards, free), want: pass(flow.ReasonNone, "fragment free")},
		{name: "first/unprotected port, no configuration", scenes: udpScenes, packet: pieceOf(0, inTowards, free), given: []given{noConfig}, want: pass(flow.ReasonNone, "fragment free")},
		{name: "first/to another machine", scenes: []string{"udp host", "udp pod"}, want: none, given: []given{byAnotherPod}, packet: pieceOf(0, inTowards, func(s scene) packet.Packet {
			return udp(s.client, netip.AddrPortFrom(foreign(s), 9999))
		})},
		{name: "first/answer, live flow", scenes: udpScenes, packet: pieceOf(0, inFrom, answer), given: []given{active, bypassed()},
			want: pass(flow.ReasonPathLive, "flow 0/1 ANSWERED", "fragment to client")},
		{name: "first/answer, no flow", scenes: udpScenes, packet: pieceOf(0, inFrom, answer), want: drop(flow.ReasonUDPNoFlow)},
		{name: "first/and the only one", only: lab.IPv6, scenes: udpScenes, packet: whole, given: []given{active, bypassed()}, want: pass(flow.ReasonPathLive, "flow 1/0")},
		{name: "first/and the only one, no path", only: lab.IPv6, scenes: udpScenes, packet: whole, want: drop(flow.ReasonUDPNoPath)},
		{name: "first/half a header", scenes: udpScenes, packet: pieceOf(0, inTowards, question, short), want: drop(flow.ReasonMalformed)},
		{name: "first/header cut off", scenes: udpScenes, want: portless(drop(flow.ReasonMalformed)), packet: func(s scene) probe {
			p := pieceOf(0, inTowards, question)(s)
			p.frame = p.frame[:len(p.frame)-20]
			p.bytes -= 20
			return p
		}},
		{name: "first/of GRE", only: lab.IPv6, scenes: udpScenes, want: pass(flow.ReasonNone, "fragment free"), packet: pieceOf(0, inTowards, func(s scene) packet.Packet {
			p := udp(s.client, s.server)
			p.Protocol = packet.GRE
			return p
		})},
	}
}

// restCases: later fragments share the fate of the first.
func restCases() []progCase {
	active := path(datapath.PathActive)
	rest := func(name string, w want, g ...given) progCase {
		return progCase{name: "rest/" + name, scenes: udpScenes, packet: pieceOf(1, inTowards, question), given: g, want: w}
	}
	orphan := func(state ...string) want { return portless(drop(flow.ReasonOrphan, state...)) }
	otherHook := func(k *bpf.FragmentKey) { k.Hook = 7 - k.Hook - 2 }
	otherID := func(k *bpf.FragmentKey) { k.Id++ }
	return []progCase{
		rest("of nothing", orphan()),
		rest("last, of nothing", orphan()).sending(pieceOf(2, inTowards, question)),
		rest("of a free datagram", pass(flow.ReasonNone, "fragment free"), kept(asFree, 0)),
		rest("of a free datagram of long ago", orphan("fragment free"), kept(asFree, 11*time.Second)),
		rest("of another identification", orphan("fragment free"), kept(asFree, 0, otherID)),
		rest("of a live flow", pass(flow.ReasonPathLive, "flow 1/0", "fragment to server"), active, bypassed(), kept(toServer, 0)),
		rest("of a flow that is gone", drop(flow.ReasonOrphan, "fragment to server"), active, kept(toServer, 0)),
		rest("of a flow that was revoked", drop(flow.ReasonPathRevoked, "flow 0/0 ended=PATH_REVOKED", "fragment to server").recorded("END PATH_REVOKED 0/0"),
			path(datapath.PathRevoked), bypassed(), kept(toServer, 0)),
		rest("passed another hook", orphan("fragment free"), kept(asFree, 0, otherHook)).in("udp host", "udp pod"),
		rest("to another machine", pass(flow.ReasonNone), byAnotherPod).in("udp host", "udp pod").sending(pieceOf(1, inTowards, func(s scene) packet.Packet {
			return udp(s.client, netip.AddrPortFrom(foreign(s), 9999))
		})),
		rest("of an answer", pass(flow.ReasonPathLive, "flow 0/1 ANSWERED", "fragment to client"), active, bypassed(), kept(toClient, 0)).sending(pieceOf(1, inFrom, answer)),
		rest("of GRE, of nothing", orphan()).family(lab.IPv6).sending(pieceOf(1, inTowards, func(s scene) packet.Packet {
			p := udp(s.client, s.server)
			p.Protocol = packet.GRE
			return p
		})),
	}
}

// sending replaces the packet of a case.
func (c progCase) sending(f func(scene) probe) progCase {
	c.packet = f
	return c
}

// flagCases: flags that no connection has.
func flagCases() []progCase {
	var out []progCase
	const fin, rst, psh, urg = packet.FIN, packet.RST, packet.PSH, packet.URG
	for name, flags := range map[string]uint8{
		"none": 0, "FIN": fin, "SYN FIN": syn | fin, "SYN RST": syn | rst, "SYN FIN ACK": syn | fin | ack, "SYN RST ACK": syn | rst | ack,
		"FIN PSH URG": fin | psh | urg, "all": 0x3f, "PSH": psh,
	} {
		bad := drop(flow.ReasonBadFlags)
		out = append(out,
			progCase{name: "flags/" + name, packet: towards(flags), want: bad},
			progCase{name: "flags/" + name + ", live path", packet: towards(flags), given: []given{path(datapath.PathActive)}, want: bad},
			progCase{name: "flags/" + name + ", live flow", packet: towards(flags), given: []given{path(datapath.PathActive), bypassed()},
				want: drop(flow.ReasonBadFlags, "flow 0/0")},
			progCase{name: "flags/" + name + ", of the service", packet: from(flags), want: bad},
			progCase{name: "flags/" + name + ", to another machine", scenes: []string{"host"}, want: pass(flow.ReasonNone), packet: func(s scene) probe {
				return at(s.towards, s.device, tcp(s.client, netip.AddrPortFrom(foreign(s), hostPort), flags))
			}})
	}
	return out
}

// routeCases: a sender may not choose the way to, nor from, a protected address.
func routeCases() []progCase {
	withPorts := drop(flow.ReasonSourceRoute) // of IPv4: a routing header of IPv6 is not walked past
	routed := portless(withPorts)
	reversed := routed
	reversed.records = []string{"DENY SOURCE_ROUTE of the service"}
	read := steer(flow.ReasonNoPath, "leg down", "origin")
	v4 := func(name string, w want, options ...byte) progCase {
		return progCase{name: "route/" + name, only: lab.IPv4, want: w, packet: shaped(func(p *packet.Packet) { p.Options = options })}
	}
	v6 := func(name string, w want, typ, left byte) progCase {
		return progCase{name: "route/" + name, only: lab.IPv6, want: w, packet: shaped(func(p *packet.Packet) {
			p.Extensions = []packet.Extension{{Type: packet.Routing, Body: append([]byte{typ, left, 0, 0, 0, 0}, make([]byte, 16)...)}}
		})}
	}
	lsrr, ssrr := []byte{131, 7, 4, 10, 9, 9, 9}, []byte{137, 7, 4, 10, 9, 9, 9}
	udpRouted := func(only lab.Family, send func(scene) packet.Packet, of func(scene) string, w want) progCase {
		return progCase{name: "route/of a datagram", scenes: udpScenes, only: only, want: w, packet: func(s scene) probe {
			p := send(s)
			p.Options = lsrr
			p.Extensions = []packet.Extension{{Type: packet.Routing, Body: append([]byte{4, 1, 0, 0, 0, 0}, make([]byte, 16)...)}}
			return at(of(s), s.device, p)
		}}
	}
	return []progCase{
		v4("loose", withPorts, lsrr...), v4("strict", withPorts, ssrr...),
		v4("behind other options", withPorts, slices.Concat([]byte{1, 7, 7, 4, 0, 0, 0, 0, 1}, lsrr)...),
		v4("behind the end of the list", read, slices.Concat([]byte{0}, lsrr)...),
		v4("record route", read, 7, 7, 4, 0, 0, 0, 0), v4("timestamp", read, 68, 8, 5, 0, 0, 0, 0, 0),
		v4("inside of another option", read, slices.Concat([]byte{7, 11, 4}, lsrr[:7], []byte{0})...),
		v6("type 0", routed, 0, 1), v6("type 0, at its end", read, 0, 0), v6("type 2", routed, 2, 1), v6("segment routing", routed, 4, 1),
		v6("segment routing, at its end", read, 4, 0),
		udpRouted(lab.IPv4, question, inTowards, withPorts), udpRouted(lab.IPv6, question, inTowards, routed),
		udpRouted(lab.IPv4, answer, inFrom, withPorts.reversed()).in("udp host", "udp pod"), udpRouted(lab.IPv6, answer, inFrom, reversed).in("udp host", "udp pod"),
	}
}

// lengthCases: lengths of datagrams that lie, padding, and packets that were put together.
func lengthCases() []progCase {
	lies := drop(flow.ReasonMalformed)
	says := func(name string, w want, n int) progCase {
		return progCase{name: "length/" + name, scenes: udpScenes, want: w, packet: func(s scene) probe {
			b, o := udp(s.client, s.server).Build()
			binary.BigEndian.PutUint16(b[o.L4+4:], uint16(n))
			return probe{program: s.towards, ctx: skBuff{Ifindex: uint32(s.device)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
		}}
	}
	return []progCase{
		says("of a datagram, beyond the packet", lies, 19), says("of a datagram, no header", lies, 7), says("of a datagram, zero", lies, 0),
		says("of a datagram, less than there is", told(flow.ReasonUDPNoPath), 9),
		{name: "length/padded frame", want: steer(flow.ReasonNoPath, "leg down", "origin"), packet: func(s scene) probe {
			b := append(tcp(s.client, s.server, syn).Bytes(), make([]byte, 6)...)
			return probe{program: s.towards, ctx: skBuff{Ifindex: uint32(s.device)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
		}},
		{name: "length/jumbogram", only: lab.IPv6, want: lies, packet: func(s scene) probe {
			p := tcp(s.client, s.server, ack)
			p.Extensions = []packet.Extension{{Type: packet.HopByHop, Body: []byte{0xc2, 4, 0, 1, 0, 0}}}
			b := p.Bytes()
			b[14+4], b[14+5] = 0, 0
			return probe{program: s.towards, ctx: skBuff{Ifindex: uint32(s.device)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
		}},
	}
}

func newShapeCases() []progCase {
	return slices.Concat(firstCases(), restCases(), flagCases(), routeCases(), lengthCases())
}

func TestShapes(t *testing.T) {
	r := newRig(t, 4096, 4096)
	runCases(t, r, newShapeCases())
}
