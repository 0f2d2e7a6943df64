package shape

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/sallyport-dev/sallyport/test/packet"
)

// datagram has a shape of segments built for a datagram.
func datagram(frames func(packet.Packet) [][]byte) func(packet.Packet) [][]byte {
	return func(p packet.Packet) [][]byte {
		p.Protocol, p.Flags, p.TCPOptions = packet.UDP, 0, nil
		if p.Payload == nil {
			p.Payload = []byte("datagram")
		}
		return frames(p)
	}
}

func whole(p packet.Packet) [][]byte { return [][]byte{p.Bytes()} }

// udpLength writes the datagram's own length.
func udpLength(n uint16) func(packet.Packet) [][]byte {
	return bent(func(b []byte, at packet.Offsets) []byte {
		binary.BigEndian.PutUint16(b[at.L4+4:], n)
		return b
	})
}

func udpShapes() []Shape {
	list := []Shape{
		{Name: "udp/datagram", Frames: whole},
		{Name: "udp/no payload", Frames: shaped(func(p *packet.Packet) { p.Payload = []byte{} })},
		{Name: "udp/no checksum", Frames: bent(func(b []byte, at packet.Offsets) []byte { b[at.L4+6], b[at.L4+7] = 0, 0; return b })},
		{Name: "udp/length of 7", Frames: udpLength(7)},
		{Name: "udp/length beyond the end", Frames: udpLength(2000)},
		{Name: "udp/length 0", Frames: udpLength(0)},
		{Name: "udp/QUIC initial", Frames: shaped(func(p *packet.Packet) {
			p.Payload = append([]byte{0xc3, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0}, make([]byte, 1184)...)
		})},
		{Name: "udp/options", Family: 4, Frames: shaped(func(p *packet.Packet) { p.Options = []byte{1, 1, 1, 0} })},
		{Name: "udp/chain of three", Family: 6, Frames: extended(options(3)...)},
		{Name: "udp/chain of nine", Family: 6, Frames: extended(options(9)...)},
		{Name: "udp/jumbo frame", Frames: shaped(func(p *packet.Packet) { p.Payload = make([]byte, 8000) })},
		{Name: "udp/limited broadcast", Family: 4, Frames: address4(netip.MustParseAddr("255.255.255.255"))},
		{Name: "udp/subnet broadcast", Family: 4, Frames: func(p packet.Packet) [][]byte {
			a := p.Dst.Addr().As4()
			a[3] = 255
			return address4(netip.AddrFrom4(a))(p)
		}},
		{Name: "udp/old broadcast", Family: 4, Frames: func(p packet.Packet) [][]byte {
			p.Src = netip.AddrPortFrom(netip.IPv4Unspecified(), p.Src.Port())
			return address4(netip.IPv4Unspecified())(p)
		}},
		{Name: "udp/multicast", Family: 4, Frames: address4(netip.MustParseAddr("224.0.0.1"))},
		{Name: "udp/multicast to all nodes", Family: 6, Frames: shaped(func(p *packet.Packet) {
			p.Dst = netip.AddrPortFrom(netip.MustParseAddr("ff02::1"), p.Dst.Port())
		})},
		{Name: "udp/fragments", Family: 4, Frames: pieces(24, inOrder)},
		{Name: "udp/tiny fragments", Family: 4, Frames: pieces(8, inOrder)},
		{Name: "udp/fragments reversed", Family: 4, Frames: pieces(16, reversed)},
		{Name: "udp/fragments without the first", Family: 4, Refused: incomplete, Frames: pieces(24, withoutFirst)},
		{Name: "udp/fragments overlapping", Family: 4, Refused: overlaps, Frames: overlapping},
		{Name: "udp/identification used again", Family: 4, Frames: reused},
		{Name: "udp/fragments6", Family: 6, Frames: pieces(24, inOrder)},
		{Name: "udp/fragments6 reversed", Family: 6, Frames: pieces(16, reversed)},
		{Name: "udp/fragments6 overlapping", Family: 6, Frames: overlapping},
		{Name: "udp/fragments6, chain inside", Family: 6, Frames: chainInside(24, packet.ICMPv6)},
		{Name: "udp/fragment6 that is whole", Family: 6, Frames: extended(packet.FragmentHeader(0, false, 1))},
	}
	for i, s := range slices.Clone(list) {
		list[i].Frames = datagram(s.Frames)
	}
	return list
}

// address4 sends the packet to another IPv4 address; the frame's MAC address stays.
func address4(a netip.Addr) func(packet.Packet) [][]byte {
	return shaped(func(p *packet.Packet) { p.Dst = netip.AddrPortFrom(a, p.Dst.Port()) })
}
