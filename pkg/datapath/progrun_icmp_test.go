package datapath_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// quoted is a packet of the scene from one side to the other, as an ICMP error quotes it.
func quoted(s scene, src, dst netip.AddrPort) packet.Packet {
	p := tcp(src, dst, ack)
	p.Protocol, p.Payload = s.protocol, []byte("some payload")
	return p
}

// kind is an ICMP error.
type kind struct {
	typ, code uint8
	rest      uint32
}

var tooBig = map[lab.Family]kind{lab.IPv4: {3, 4, 1280}, lab.IPv6: {2, 0, 1280}}

func kinds(f lab.Family) []kind {
	if f == lab.IPv4 {
		return []kind{{3, 4, 1280}, {3, 1, 0}, {4, 0, 0}, {11, 0, 0}, {12, 0, 0}}
	}
	return []kind{{1, 4, 0}, {2, 0, 1280}, {3, 0, 0}, {4, 0, 0}}
}

// errorTowards is an error, by a machine elsewhere, about a packet of the service; errorFrom one by the service about a packet to it.
func errorTowards(k func(lab.Family) kind) func(scene) probe {
	return func(s scene) probe {
		e := k(s.family)
		return at(s.towards, s.device, quoted(s, s.server, s.client).ICMPError(s.client.Addr(), e.typ, e.code, e.rest))
	}
}

func errorFrom(k func(lab.Family) kind) func(scene) probe {
	return func(s scene) probe {
		e := k(s.family)
		return at(s.from, s.device, quoted(s, s.client, s.server).ICMPError(s.server.Addr(), e.typ, e.code, e.rest))
	}
}

func size(f lab.Family) kind { return tooBig[f] }

// icmpCases: an error goes where the packet that it quotes came from, if it may.
func icmpCases() []progCase {
	active := path(datapath.PathActive)
	to := func(name string, w want, g ...given) progCase {
		return progCase{name: "icmp/to the service, " + name, packet: errorTowards(size), given: g, want: w}
	}
	back := func(name string, w want, g ...given) progCase {
		return progCase{name: "icmp/to the client, " + name, packet: errorFrom(size), given: g, want: w}
	}
	none := pass(flow.ReasonNone)
	out := []progCase{
		to("leg", steer(flow.ReasonICMPLeg, "leg down"), leg(down)),
		to("leg of the other side", drop(flow.ReasonICMPStray, "leg up"), leg(up)),
		to("live flow", pass(flow.ReasonICMPLive, "flow 1/0"), active, bypassed()),
		to("flow of a revoked path", drop(flow.ReasonICMPStray, "flow 0/0 ended=PATH_REVOKED").recorded("END PATH_REVOKED 0/0"), path(datapath.PathRevoked), bypassed()),
		to("nothing", drop(flow.ReasonICMPStray)),
		to("live path, no flow", drop(flow.ReasonICMPStray), active),
		back("leg", steer(flow.ReasonICMPLeg, "leg up"), leg(up)),
		back("leg of the other side", pass(flow.ReasonNone, "leg down"), leg(down)),
		back("live flow", pass(flow.ReasonICMPLive, "flow 0/1 ANSWERED"), active, bypassed()),
		back("nothing", none),
	}
	for _, f := range lab.Families() {
		for i, k := range kinds(f) {
			this := func(lab.Family) kind { return k }
			name := fmt.Sprintf("icmp/type %d/%d", k.typ, i)
			out = append(out,
				progCase{name: name + "/leg", only: f, packet: errorTowards(this), given: []given{leg(down)}, want: steer(flow.ReasonICMPLeg, "leg down")},
				progCase{name: name + "/nothing", only: f, packet: errorTowards(this), want: drop(flow.ReasonICMPStray)},
				progCase{name: name + "/leg of the service", only: f, packet: errorFrom(this), given: []given{leg(up)}, want: steer(flow.ReasonICMPLeg, "leg up")})
		}
	}
	return slices.Concat(out, redirectCases(), quoteCases(), udpErrorCases())
}

// redirect is an ICMP redirect that quotes a packet.
func redirect(s scene, p packet.Packet, dst netip.Addr) packet.Packet {
	if s.family == lab.IPv4 {
		return p.ICMPError(s.client.Addr(), 5, 1, 0x0a010009)
	}
	inner, o := p.Build()
	ip := inner[o.L3:]
	ip = ip[:len(ip)/8*8]
	body := make([]byte, 32)                                    // target and destination
	body = append(body, 2, 1, 2, 0, 0, 0, 0, 1)                 // the target's link address
	body = append(body, 4, byte(1+len(ip)/8), 0, 0, 0, 0, 0, 0) // redirected header
	e := packet.Packet{Src: netip.AddrPortFrom(s.client.Addr(), 0), Dst: netip.AddrPortFrom(dst, 0), Protocol: packet.ICMPv6, TTL: 255}
	e.Payload = slices.Concat([]byte{137, 0, 0, 0, 0, 0, 0, 0}, body, ip)
	return e
}

// redirectCases: redirects of protected flows are ignored, whoever sends them.
func redirectCases() []progCase {
	active := path(datapath.PathActive)
	to := func(name string, w want, g ...given) progCase {
		return progCase{name: "redirect/to the service, " + name, given: g, want: w, packet: func(s scene) probe {
			return at(s.towards, s.device, redirect(s, quoted(s, s.server, s.client), s.server.Addr()))
		}}
	}
	return []progCase{
		to("leg", drop(flow.ReasonICMPStray, "leg down"), leg(down)),
		to("live flow", drop(flow.ReasonICMPStray, "flow 0/0"), active, bypassed()),
		to("nothing", drop(flow.ReasonICMPStray)),
		{name: "redirect/to the client, leg", given: []given{leg(up)}, want: drop(flow.ReasonICMPStray, "leg up"), packet: func(s scene) probe {
			return at(s.from, s.device, redirect(s, quoted(s, s.client, s.server), s.client.Addr()))
		}},
		{name: "redirect/to the client, nothing", want: pass(flow.ReasonNone), packet: func(s scene) probe {
			return at(s.from, s.device, redirect(s, quoted(s, s.client, s.server), s.client.Addr()))
		}},
		{name: "redirect/without a quote", only: lab.IPv6, want: pass(flow.ReasonNone), packet: func(s scene) probe {
			e := redirect(s, quoted(s, s.server, s.client), s.server.Addr())
			e.Payload = e.Payload[:40]
			return at(s.towards, s.device, e)
		}},
		{name: "redirect/option of no length", only: lab.IPv6, want: pass(flow.ReasonNone), packet: func(s scene) probe {
			e := redirect(s, quoted(s, s.server, s.client), s.server.Addr())
			e.Payload[41] = 0
			return at(s.towards, s.device, e)
		}},
	}
}

// quoteCases: what an error quotes in other shapes.
func quoteCases() []progCase {
	none := pass(flow.ReasonNone)
	unread := portless(drop(flow.ReasonICMPStray))
	cutQuote := func(n int) func(scene) probe {
		return func(s scene) probe {
			e := quoted(s, s.server, s.client).ICMPError(s.client.Addr(), tooBig[s.family].typ, 0, 0)
			e.Payload = e.Payload[:8+n]
			return at(s.towards, s.device, e)
		}
	}
	change := func(name string, only lab.Family, w want, f func(*packet.Packet), g ...given) progCase {
		return progCase{name: "quote/" + name, only: only, want: w, given: g, packet: func(s scene) probe {
			p := quoted(s, s.server, s.client)
			f(&p)
			return at(s.towards, s.device, p.ICMPError(s.client.Addr(), tooBig[s.family].typ, tooBig[s.family].code, 0))
		}}
	}
	echo := func(f lab.Family, typ uint8) progCase {
		return progCase{name: "icmp/echo", only: f, want: none, packet: func(s scene) probe {
			p := tcp(s.client, s.server, 0)
			p.Protocol, p.Payload = map[lab.Family]uint8{lab.IPv4: packet.ICMP, lab.IPv6: packet.ICMPv6}[f], make([]byte, 64)
			p.Payload[0] = typ
			return at(s.towards, s.device, p)
		}}
	}
	inPieces := func(name string, typ uint8, only lab.Family, n int, w want) progCase {
		return progCase{name: "icmp/fragment of " + name, only: only, want: w, packet: func(s scene) probe {
			p := tcp(s.client, s.server, 0)
			p.Protocol, p.Payload = map[lab.Family]uint8{lab.IPv4: packet.ICMP, lab.IPv6: packet.ICMPv6}[only], make([]byte, 64)
			p.Payload[0] = typ
			b := p.Fragments(40, 9)[n]
			return probe{program: s.towards, ctx: skBuff{Ifindex: uint32(s.device)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
		}}
	}
	steered := steer(flow.ReasonICMPLeg, "leg down")
	return []progCase{
		{name: "quote/of the least length", packet: func(s scene) probe {
			n := map[lab.Family]int{lab.IPv4: 28, lab.IPv6: 48}[s.family]
			return cutQuote(n)(s)
		}, given: []given{leg(down)}, want: steered},
		{name: "quote/cut in its ports", packet: func(s scene) probe {
			n := map[lab.Family]int{lab.IPv4: 23, lab.IPv6: 43}[s.family]
			return cutQuote(n)(s)
		}, given: []given{leg(down)}, want: portless(drop(flow.ReasonICMPStray, "leg down"))},
		{name: "quote/cut in its IP header", packet: cutQuote(19), want: unread},
		{name: "quote/of nothing", packet: cutQuote(0), want: unread},
		{name: "quote/of another version", want: unread, packet: func(s scene) probe {
			e := quoted(s, s.server, s.client).ICMPError(s.client.Addr(), tooBig[s.family].typ, 0, 0)
			e.Payload[8] = 0x25
			return at(s.towards, s.device, e)
		}},
		change("with IPv4 options", lab.IPv4, steered, func(p *packet.Packet) { p.Options = []byte{1, 1, 1, 1} }, leg(down)),
		change("with extension headers", lab.IPv6, steered, ext(packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(8)}), leg(down)),
		change("with too many headers", lab.IPv6, unread, ext(repeat(packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(8)}, 9)...)),
		change("of a fragment", lab.IPv6, unread, ext(packet.FragmentHeader(0, true, 9))),
		change("of ICMP", lab.IPv4, none, func(p *packet.Packet) { p.Protocol = packet.ICMP }),
		change("of ICMPv6", lab.IPv6, none, func(p *packet.Packet) { p.Protocol = packet.ICMPv6 }),
		change("of an unprotected port", 0, none, func(p *packet.Packet) { p.Src = netip.AddrPortFrom(p.Src.Addr(), 9999) }),
		change("to another machine", 0, none, func(p *packet.Packet) { p.Src = netip.MustParseAddrPort("[fd00:1::77]:8080") }).in("host").family(lab.IPv6),
		echo(lab.IPv4, 8), echo(lab.IPv4, 0), echo(lab.IPv6, 128), echo(lab.IPv6, 129),
		inPieces("an error, first", 3, lab.IPv4, 0, portless(drop(flow.ReasonFragment))),
		inPieces("an error, last", 3, lab.IPv4, 1, none),
		inPieces("an error, first", 2, lab.IPv6, 0, portless(drop(flow.ReasonFragment))),
		inPieces("an error, last", 2, lab.IPv6, 1, portless(drop(flow.ReasonOrphan))),
		inPieces("an echo, first", 8, lab.IPv4, 0, none),
		inPieces("an echo, first", 128, lab.IPv6, 0, pass(flow.ReasonNone, "fragment free")),
		{name: "icmp/no configuration", packet: errorTowards(size), given: []given{leg(down), noConfig}, want: want{verdict: actDrop, counts: one(flow.ReasonICMPLeg), state: []string{"leg down"}}},
		{name: "icmp/no configuration, live flow", packet: errorTowards(size), given: []given{path(datapath.PathActive), bypassed(), noConfig}, want: drop(flow.ReasonICMPStray, "flow 0/0")},
	}
}

// udpErrorCases: errors of datagrams.
func udpErrorCases() []progCase {
	to := func(name string, w want, g ...given) progCase {
		return progCase{name: "icmp/udp, " + name, scenes: udpScenes, packet: errorTowards(size), given: g, want: w}
	}
	dropAtWeb := drop(flow.ReasonICMPStray)
	dropAtWeb.records = []string{"DENY ICMP_STRAY web"}
	return []progCase{
		to("live flow", pass(flow.ReasonICMPLive, "flow 1/0"), path(datapath.PathActive), bypassed()),
		to("nothing", drop(flow.ReasonICMPStray)),
		to("leg of TCP", drop(flow.ReasonICMPStray, "leg down"), leg(down)),
		{name: "icmp/udp, port of TCP", scenes: []string{"udp host", "udp lo"}, want: pass(flow.ReasonNone), packet: func(s scene) probe {
			s.server = netip.AddrPortFrom(s.server.Addr(), hostWebPort)
			return errorTowards(size)(s)
		}},
		{name: "redirect/udp, port of TCP", scenes: []string{"udp host", "udp lo"}, want: dropAtWeb, packet: func(s scene) probe {
			s.server = netip.AddrPortFrom(s.server.Addr(), hostWebPort)
			return at(s.towards, s.device, redirect(s, quoted(s, s.server, s.client), s.server.Addr()))
		}},
		{name: "icmp/udp, to the client", scenes: udpScenes, want: pass(flow.ReasonNone), packet: errorFrom(size)},
		{name: "icmp/udp, to the client, live flow", scenes: udpScenes, packet: errorFrom(size), given: []given{path(datapath.PathActive), bypassed()},
			want: pass(flow.ReasonICMPLive, "flow 0/1 ANSWERED")},
	}
}

// pxErrorCases: the proxy gets the errors that the hooks send it, and no others.
func pxErrorCases(r *rig) []progCase {
	send := func(stamped bool) func(scene) probe {
		return func(s scene) probe {
			e := quoted(s, s.server, s.client).ICMPError(s.client.Addr(), tooBig[s.family].typ, tooBig[s.family].code, 1280)
			if stamped {
				e.SrcMAC = r.cfg.Stamp
			}
			p := at("sp_px1_in", r.px1, e)
			p.px = true
			return p
		}
	}
	unstamped := refused(flow.ReasonNoStamp)
	unstamped.records = []string{"DENY NO_STAMP * device 0"}
	own := []string{"host", "pod"}
	return []progCase{
		{name: "px1/icmp error", scenes: own, packet: send(true), want: pass(flow.ReasonPxAccept)},
		{name: "px1/icmp error, not stamped", scenes: own, packet: send(false), want: unstamped},
		{name: "px1/echo", scenes: own, want: refusedPortless(flow.ReasonPxUnexpected), packet: func(s scene) probe {
			p := tcp(s.client, s.server, 0)
			p.SrcMAC, p.Protocol, p.Payload = r.cfg.Stamp, packet.GRE, make([]byte, 40)
			out := at("sp_px1_in", r.px1, p)
			out.px = true
			return out
		}},
	}
}

func refusedPortless(reason flow.Reason) want {
	w := refused(reason)
	w.records = []string{"DENY " + reason.String() + " * device 0"}
	return w
}

func TestICMP(t *testing.T) {
	r := newRig(t, 4096, 4096)
	runCases(t, r, icmpCases())
	runCases(t, r, pxErrorCases(r))
}
