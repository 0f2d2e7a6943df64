package datapath_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// cleanCases: what is well made passes, whomever it is for.
func cleanCases() []filterCase {
	pass := func(name string, frame func(scene) []byte) filterCase {
		return filterCase{name: "clean/" + name, frame: frame}
	}
	tags := func(ids ...uint16) func(scene) []byte {
		return made(func(_ scene, p *packet.Packet) { p.VLANs = ids })
	}
	return []filterCase{
		pass("SYN", segment(syn)), pass("ACK", segment(ack)), pass("RST", segment(packet.RST)), pass("every flag", segment(0xff)),
		pass("unprotected", made(unprotected(none))), pass("another machine's", made(abroad(none))),
		pass("one tag", tags(5)), pass("two tags", tags(5, 6)), pass("three tags", tags(5, 6, 7)),
		pass("payload", made(func(_ scene, p *packet.Packet) { p.Payload = make([]byte, 1400) })),
		pass("trailer", warped(func(b []byte, _ packet.Offsets) []byte { return append(b, 0, 0, 0, 0) })),
		pass("ARP", warped(func(b []byte, _ packet.Offsets) []byte { b[12], b[13] = 8, 6; return b })),
		pass("no IP header", warped(func(b []byte, _ packet.Offsets) []byte { return b[:20] })),
		pass("no Ethernet type", warped(func(b []byte, _ packet.Offsets) []byte { return append(b[:12], 8, 0) })),
		pass("ICMP", made(func(s scene, p *packet.Packet) { p.Protocol, p.Payload = packet.ICMP, make([]byte, 8) })),
		pass("ESP", made(func(s scene, p *packet.Packet) { p.Protocol, p.Payload = packet.ESP, make([]byte, 40) })),
		pass("UDP", made(func(s scene, p *packet.Packet) {
			p.Protocol, p.Dst = packet.UDP, netip.AddrPortFrom(p.Dst.Addr(), udpPort)
		})),
		pass("UDP to a TCP port", made(func(s scene, p *packet.Packet) { p.Protocol = packet.UDP; claimsOwn(s, p) })),
		pass("fragment", fragment(0, none)), pass("later fragment", fragment(1, none)),
		{name: "clean/total length 0", only: lab.IPv4, frame: warped(func(b []byte, _ packet.Offsets) []byte { b[16], b[17] = 0, 0; return b })},
		{name: "clean/nine headers", only: lab.IPv6, frame: made(func(_ scene, p *packet.Packet) {
			p.Extensions = repeat(packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(8)}, 9)
		})},
	}
}

func claimsOwn(s scene, p *packet.Packet) {
	p.Src = netip.AddrPortFrom(ownAddress(s.family), p.Src.Port())
}

func ownAddress(f lab.Family) netip.Addr {
	if f == lab.IPv4 {
		return netip.MustParseAddr("10.1.0.1")
	}
	return netip.MustParseAddr("fd00:1::1")
}

// fragment is the n-th fragment of the packet.
func fragment(n int, f func(scene, *packet.Packet)) func(scene) []byte {
	return func(s scene) []byte {
		p := tcp(s.client, s.server, syn)
		p.Payload = make([]byte, 100)
		f(s, &p)
		return p.Fragments(24, 7)[n]
	}
}

// sourceCases: addresses that nobody outside has.
func sourceCases() []filterCase {
	var out []filterCase
	add := func(name string, only lab.Family, want flow.Reason, f func(scene, *packet.Packet)) {
		out = append(out,
			filterCase{name: name, only: only, frame: made(f), want: want},
			filterCase{name: name + "/mid-stream", only: only, frame: made(func(s scene, p *packet.Packet) { f(s, p); p.Flags = ack }), want: want},
			filterCase{name: name + "/tagged twice", only: only, frame: made(func(s scene, p *packet.Packet) { f(s, p); p.VLANs = []uint16{5, 6} }), want: want},
			filterCase{name: name + "/three tags", only: only, frame: made(func(s scene, p *packet.Packet) { f(s, p); p.VLANs = []uint16{5, 6, 7} })},
			filterCase{name: name + "/unprotected", only: only, frame: made(unprotected(f))},
			filterCase{name: name + "/another machine's", only: only, frame: made(abroad(f))},
			filterCase{name: name + "/first fragment", only: only, frame: fragment(0, f), want: want, blind: true},
			filterCase{name: name + "/later fragment", only: only, frame: fragment(1, f), want: want, blind: true},
			filterCase{name: name + "/fragment for another machine", only: only, frame: fragment(1, abroad(f))},
			filterCase{name: name + "/UDP", only: only, want: want, frame: made(func(s scene, p *packet.Packet) {
				s.name = "host"
				f(s, p)
				p.Protocol, p.Dst = packet.UDP, netip.AddrPortFrom(ownAddress(s.family), udpPort)
			})},
		)
	}
	for _, a := range []string{"127.0.0.1", "127.9.9.9", "224.0.0.1", "239.255.255.255", "0.0.0.0", "255.255.255.255"} {
		add("martian/"+a, lab.IPv4, flow.ReasonXDPMartian, claims(a))
	}
	for _, a := range []string{"::1", "ff02::1", "ff0e::9", "::"} {
		add("martian/"+a, lab.IPv6, flow.ReasonXDPMartian, claims(a))
	}
	add("own", 0, flow.ReasonXDPOwnSource, claimsOwnOrPod)
	add("pods' network", lab.IPv4, flow.ReasonXDPOwnSource, claims("10.2.0.200"))
	add("pods' network", lab.IPv6, flow.ReasonXDPOwnSource, claims("fd00:2::200"))
	for _, a := range []string{"198.51.100.0", "198.51.100.255", "203.0.113.7", "10.2.0.9"} {
		add("denied/"+a, lab.IPv4, flow.ReasonXDPDenied, claims(a))
	}
	for _, a := range []string{"2001:db8:bad::1", "2001:db8:bad:ffff::1", "2001:db8::7"} {
		add("denied/"+a, lab.IPv6, flow.ReasonXDPDenied, claims(a))
	}
	for _, a := range []string{"198.51.101.1", "203.0.113.6", "126.255.255.255", "128.0.0.1", "223.255.255.255", "240.0.0.1"} {
		out = append(out, filterCase{name: "neighbour/" + a, only: lab.IPv4, frame: made(claims(a))})
	}
	for _, a := range []string{"2001:db8:bae::1", "2001:db8::6", "::2", "fe80::9"} {
		out = append(out, filterCase{name: "neighbour/" + a, only: lab.IPv6, frame: made(claims(a))})
	}
	return out
}

// claimsOwnOrPod takes the address that is not the destination: that would be LAND.
func claimsOwnOrPod(s scene, p *packet.Packet) {
	if claimsOwn(s, p); s.name == "host" {
		claims(map[lab.Family]string{lab.IPv4: "10.2.0.2", lab.IPv6: "fd00:2::2"}[s.family])(s, p)
	}
}

// answerCases: packets that claim to come from a protected service.
func answerCases() []filterCase {
	reply := func(f func(scene, *packet.Packet)) func(scene) []byte {
		return func(s scene) []byte {
			p := tcp(s.server, netip.AddrPortFrom(foreign(s), clientPort), syn|ack)
			f(s, &p)
			return p.Bytes()
		}
	}
	return []filterCase{
		{name: "answer/own", frame: reply(none), want: flow.ReasonXDPOwnSource},
		{name: "answer/another machine's", frame: reply(func(s scene, p *packet.Packet) {
			p.Src = netip.AddrPortFrom(s.client.Addr(), p.Src.Port())
		})},
		{name: "answer/unprotected", frame: reply(func(_ scene, p *packet.Packet) { p.Src = netip.AddrPortFrom(p.Src.Addr(), 9999) })},
	}
}

// lieCases: headers that cannot be.
func lieCases() []filterCase {
	bad := flow.ReasonXDPMalformed
	set := func(i int, v ...byte) func(scene) []byte {
		return warped(func(b []byte, o packet.Offsets) []byte { copy(b[o.L3+i:], v); return b })
	}
	length := func(at, less int, more uint16) func(scene) []byte {
		return warped(func(b []byte, o packet.Offsets) []byte {
			binary.BigEndian.PutUint16(b[o.L3+at:], uint16(len(b)-o.L3-less)+more)
			return b
		})
	}
	cutAt := func(n int) func(scene) []byte {
		return warped(func(b []byte, o packet.Offsets) []byte { return b[:o.L3+n] })
	}
	at := func(only lab.Family, name string, want flow.Reason, blind bool, frame func(scene) []byte) filterCase {
		return filterCase{name: "lie/" + name, only: only, frame: frame, want: want, blind: blind}
	}
	mapped := func(i int) func(scene) []byte {
		return func(s scene) []byte {
			b, o := tcp(s.client, s.server, syn).Build()
			a := netip.MustParseAddr("::ffff:10.9.9.9").As16()
			if i == 24 { // of the service
				a = netip.AddrFrom16([16]byte{10: 0xff, 11: 0xff, 12: 10, 13: 2, 15: 2}).As16()
			}
			copy(b[o.L3+i:], a[:])
			return b
		}
	}
	return []filterCase{
		at(lab.IPv4, "version 5", bad, true, set(0, 0x55)), at(lab.IPv6, "version 4 in IPv6", bad, true, set(0, 0x45)),
		at(lab.IPv4, "header length 4", bad, true, set(0, 0x44)), at(lab.IPv4, "header length 0", bad, true, set(0, 0x40)),
		at(lab.IPv4, "header beyond the total", bad, true, set(0, 0x45, 0, 0, 19)),
		at(lab.IPv4, "options beyond the frame", bad, true, set(0, 0x4f, 0, 0, 60)),
		at(lab.IPv4, "total length is the frame", flow.ReasonNone, false, length(2, 0, 0)),
		at(lab.IPv4, "total length one beyond", bad, false, length(2, 0, 1)),
		at(lab.IPv4, "total length at its most", bad, false, set(2, 0xff, 0xff)),
		at(lab.IPv6, "payload length is the frame", flow.ReasonNone, false, length(4, 40, 0)),
		at(lab.IPv6, "payload length one beyond", bad, false, length(4, 40, 1)),
		at(lab.IPv6, "payload length at its most", bad, false, set(4, 0xff, 0xff)),
		at(lab.IPv4, "TCP header cut", bad, true, cutAt(39)), at(lab.IPv6, "TCP header cut", bad, true, cutAt(59)),
		at(lab.IPv4, "no TCP header", bad, true, cutAt(20)), at(lab.IPv6, "no TCP header", bad, true, cutAt(40)),
		at(lab.IPv4, "IP header cut", flow.ReasonNone, true, cutAt(19)), at(lab.IPv6, "IP header cut", flow.ReasonNone, true, cutAt(39)),
		at(0, "data offset 4", bad, false, warped(func(b []byte, o packet.Offsets) []byte { b[o.L4+12] = 4 << 4; return b })),
		at(0, "data offset 4/unprotected", flow.ReasonNone, false, func(s scene) []byte {
			s.server = netip.AddrPortFrom(foreign(s), 9999)
			b, o := tcp(s.client, s.server, syn).Build()
			b[o.L4+12] = 4 << 4
			return b
		}),
		at(lab.IPv6, "extension header cut", bad, true, func(s scene) []byte {
			p := tcp(s.client, s.server, syn)
			p.Extensions = []packet.Extension{{Type: packet.DestOptions, Body: packet.SkippedOption(8)}}
			b, o := p.Build()
			return b[:o.L3+41]
		}),
		at(lab.IPv6, "mapped source", flow.ReasonXDPMapped, false, mapped(8)),
	}
}

// landCases: a packet from where it goes to.
func landCases() []filterCase {
	land := func(_ scene, p *packet.Packet) { p.Src = p.Dst }
	otherPort := func(_ scene, p *packet.Packet) { p.Src = netip.AddrPortFrom(p.Dst.Addr(), 1234) }
	return []filterCase{
		{name: "land", frame: made(land), want: flow.ReasonXDPLand},
		{name: "land/another port", frame: made(otherPort), want: flow.ReasonXDPLand},
		{name: "land/unprotected", frame: made(func(s scene, p *packet.Packet) {
			p.Dst = netip.AddrPortFrom(p.Dst.Addr(), 9999)
			p.Src = p.Dst
		})},
		{name: "land/fragment", frame: fragment(1, land), want: flow.ReasonXDPLand, blind: true},
	}
}

// headerCases: ports behind options and extension headers are found.
func headerCases() []filterCase {
	dest := packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(24)}
	auth := packet.Extension{Type: packet.AH, Body: make([]byte, 22)}
	chain := func(c ...packet.Extension) func(scene) []byte {
		return made(func(s scene, p *packet.Packet) { claimsOwnOrPod(s, p); p.Extensions = c })
	}
	own := flow.ReasonXDPOwnSource
	out := []filterCase{
		{name: "headers/one", only: lab.IPv6, frame: chain(dest), want: own},
		{name: "headers/authentication", only: lab.IPv6, frame: chain(auth, dest), want: own},
		{name: "headers/eight", only: lab.IPv6, frame: chain(repeat(dest, 8)...), want: own},
		{name: "headers/nine", only: lab.IPv6, frame: chain(repeat(dest, 9)...)},
	}
	for words := 1; words <= 10; words++ {
		out = append(out, filterCase{name: fmt.Sprintf("headers/%d words", words), only: lab.IPv4, want: own,
			frame: made(func(s scene, p *packet.Packet) { claimsOwnOrPod(s, p); p.Options = bytes.Repeat([]byte{1}, 4*words) })})
	}
	return out
}
