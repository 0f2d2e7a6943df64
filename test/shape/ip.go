package shape

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/sallyport-dev/sallyport/test/packet"
)

func ipv4Shapes() []Shape {
	option := func(b func(p packet.Packet) []byte) func(packet.Packet) [][]byte {
		return shaped(func(p *packet.Packet) { p.Options = b(*p) })
	}
	is := func(b []byte) func(packet.Packet) []byte { return func(packet.Packet) []byte { return b } }
	ihl := func(words byte) func(packet.Packet) [][]byte {
		return bent(func(b []byte, at packet.Offsets) []byte { b[at.L3] = 4<<4 | words; return b })
	}
	const noRoute = "source routing is off"
	return []Shape{
		{Name: "ipv4/options of one word", Family: 4, Frames: option(is([]byte{1, 1, 1, 0}))},
		{Name: "ipv4/options up to the bound", Family: 4, Frames: option(is(slices.Repeat([]byte{1}, 40)))},
		{Name: "ipv4/record route", Family: 4, Frames: option(is(packet.RecordRoute(9)))},
		{Name: "ipv4/router alert", Family: 4, Frames: option(is(packet.RouterAlert()))},
		{Name: "ipv4/loose source route", Family: 4, Refused: noRoute, Frames: option(func(p packet.Packet) []byte {
			return packet.SourceRoute(false, p.Dst.Addr())
		})},
		{Name: "ipv4/strict source route", Family: 4, Refused: noRoute, Frames: option(func(p packet.Packet) []byte {
			return packet.SourceRoute(true, p.Dst.Addr())
		})},
		{Name: "ipv4/option of length 0", Family: 4, Refused: "broken option", Frames: option(is([]byte{7, 0, 4, 0}))},
		{Name: "ipv4/IHL below five", Family: 4, Refused: "broken header", Frames: ihl(4)},
		{Name: "ipv4/IHL beyond the end", Family: 4, Refused: "broken header", Frames: ihl(15)},
		{Name: "ipv4/version 6", Family: 4, Refused: "wrong version", Frames: bent(func(b []byte, at packet.Offsets) []byte {
			b[at.L3] = 0x65
			return b
		})},
		{Name: "ipv4/reserved bit", Family: 4, Frames: bent(func(b []byte, at packet.Offsets) []byte { b[at.L3+6] |= 0x80; return b })},
		{Name: "ipv4/AH", Family: 4, Frames: authenticated},
		{Name: "ip/ESP", Frames: carried(packet.ESP)},
	}
}

// carried is the segment's bytes under another protocol number.
func carried(protocol uint8) func(packet.Packet) [][]byte {
	return shaped(func(p *packet.Packet) { p.Payload, p.Protocol = p.Transport(), protocol })
}

// authenticated puts AH before the segment (IPv4).
func authenticated(p packet.Packet) [][]byte {
	p.Payload = append(append([]byte{packet.TCP, 4, 0, 0}, make([]byte, 20)...), p.Transport()...)
	p.Protocol = packet.AH
	return [][]byte{p.Bytes()}
}

func ipv6Shapes() []Shape {
	hop := packet.Extension{Type: packet.HopByHop, Body: packet.SkippedOption(8)}
	dest := packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(24)}
	route := func(typ uint8, left int) func(packet.Packet) [][]byte {
		return shaped(func(p *packet.Packet) {
			p.Extensions = []packet.Extension{packet.RoutingHeader(typ, left, p.Dst.Addr())}
		})
	}
	length := func(n uint16) func(packet.Packet) [][]byte {
		return func(p packet.Packet) [][]byte {
			p.Extensions = []packet.Extension{hop}
			b, at := p.Build()
			binary.BigEndian.PutUint16(b[at.L3+4:], n)
			return [][]byte{b}
		}
	}
	return []Shape{
		{Name: "ipv6/hop-by-hop options", Family: 6, Frames: extended(hop)},
		{Name: "ipv6/destination options", Family: 6, Frames: extended(dest)},
		{Name: "ipv6/chain of three", Family: 6, Frames: extended(hop, dest, dest)},
		{Name: "ipv6/chain of eight", Family: 6, Frames: extended(options(8)...)},
		{Name: "ipv6/chain of nine", Family: 6, Frames: extended(options(9)...)},
		{Name: "ipv6/chain of thirty", Family: 6, Bounded: "Linux 7.3 follows nine, and not thirty", Frames: extended(options(30)...)},
		{Name: "ipv6/large options", Family: 6, Frames: extended(packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(256)})},
		{Name: "ipv6/routing header, nothing left", Family: 6, Frames: route(0, 0)},
		{Name: "ipv6/routing header of type 0", Family: 6, Frames: route(0, 1)},
		{Name: "ipv6/routing header of type 2", Family: 6, Frames: route(2, 1)},
		{Name: "ipv6/segment routing", Family: 6, Frames: route(4, 1)},
		{Name: "ipv6/AH", Family: 6, Frames: extended(packet.Extension{Type: packet.AH, Body: make([]byte, 22)})},
		{Name: "ipv6/no next header", Family: 6, Refused: "says that nothing follows", Frames: carried(packet.NoNext)},
		{Name: "ipv6/hop-by-hop options not first", Family: 6, Frames: extended(dest, hop)},
		{Name: "ipv6/payload length 0 behind hop-by-hop options", Family: 6, Frames: length(0)},
		{Name: "ipv6/chain beyond the payload length", Family: 6, Refused: "cut off", Frames: length(4)},
		{Name: "ipv6/mobility header", Family: 6, Refused: "no such protocol here", Frames: carried(135)},
		{Name: "ipv6/version 4", Family: 6, Refused: "wrong version", Frames: bent(func(b []byte, at packet.Offsets) []byte {
			b[at.L3] = 0x45
			return b
		})},
		{Name: "ipv6/mapped source", Family: 6, Frames: mapped(8)},
		{Name: "ipv6/mapped destination", Family: 6, Refused: "not on the wire", Frames: mapped(24)},
		{Name: "ipv6/multicast source", Family: 6, Refused: "no source", Frames: address(8, netip.MustParseAddr("ff02::1"))},
		{Name: "ipv6/multicast destination", Family: 6, Frames: address(24, netip.MustParseAddr("ff02::1"))},
	}
}

// mapped writes ::ffff:10.1.0.1 in the place of an address.
func mapped(at int) func(packet.Packet) [][]byte {
	return address(at, netip.MustParseAddr("::ffff:10.1.0.1"))
}

// address writes an address into the IPv6 header.
func address(offset int, a netip.Addr) func(packet.Packet) [][]byte {
	return bent(func(b []byte, at packet.Offsets) []byte {
		copy(b[at.L3+offset:], a.AsSlice())
		return b
	})
}
