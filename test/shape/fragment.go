package shape

import (
	"encoding/binary"
	"slices"

	"github.com/sallyport-dev/sallyport/test/packet"
)

// harmless is the transport header towards a port that nobody protects.
func harmless(p packet.Packet) []byte {
	b := p.Transport()
	binary.BigEndian.PutUint16(b[2:], 9)
	return b
}

// pieces cuts the packet into pieces of size bytes, with enough payload for three.
func pieces(size int, order func([][]byte) [][]byte) func(packet.Packet) [][]byte {
	return func(p packet.Packet) [][]byte {
		p.Payload = make([]byte, 40)
		return order(p.Fragments(size, uint32(p.ID)))
	}
}

func inOrder(all [][]byte) [][]byte   { return all }
func firstOnly(all [][]byte) [][]byte { return all[:1] }
func withoutFirst(all [][]byte) [][]byte {
	return all[1:]
}

func reversed(all [][]byte) [][]byte {
	slices.Reverse(all)
	return all
}

// overlapping sends a first fragment for a harmless port, then one over the same bytes with the real one,
// then the rest.
func overlapping(p packet.Packet) [][]byte {
	p.Payload = make([]byte, 40)
	real := p.Transport()
	return [][]byte{
		p.Piece(harmless(p)[:16], 0, true, uint32(p.ID)),
		p.Piece(real[:24], 0, true, uint32(p.ID)),
		p.Piece(real[24:], 24, false, uint32(p.ID)),
	}
}

// overlappingFlags sends a harmless first fragment of eight bytes more than the second one begins at.
func overlappingFlags(p packet.Packet) [][]byte {
	p.Payload = make([]byte, 40)
	real := p.Transport()
	return [][]byte{
		p.Piece(real[:16], 0, true, uint32(p.ID)),
		p.Piece(real[8:], 8, false, uint32(p.ID)),
	}
}

// reused sends a whole harmless datagram in fragments, then the real one with the same identification.
func reused(p packet.Packet) [][]byte {
	p.Payload = make([]byte, 40)
	other := harmless(p)
	first := [][]byte{p.Piece(other[:24], 0, true, uint32(p.ID)), p.Piece(other[24:], 24, false, uint32(p.ID))}
	return append(first, p.Fragments(24, uint32(p.ID))...)
}

const (
	overlaps   = "overlapping fragments are discarded"
	incomplete = "never complete"
)

func fragmentShapes() []Shape {
	return []Shape{
		{Name: "fragment/in order", Family: 4, Frames: pieces(24, inOrder)},
		{Name: "fragment/tiny", Family: 4, Frames: pieces(8, inOrder)},
		{Name: "fragment/reversed", Family: 4, Frames: pieces(16, reversed)},
		{Name: "fragment/first alone", Family: 4, Refused: incomplete, Frames: pieces(24, firstOnly)},
		{Name: "fragment/without the first", Family: 4, Refused: incomplete, Frames: pieces(24, withoutFirst)},
		{Name: "fragment/overlapping ports", Family: 4, Refused: overlaps, Frames: overlapping},
		{Name: "fragment/overlapping at offset 8", Family: 4, Refused: overlaps, Frames: overlappingFlags},
		{Name: "fragment/identification used again", Family: 4, Frames: reused},
		{Name: "fragment/beyond 64 KiB", Family: 4, Refused: "too long", Frames: func(p packet.Packet) [][]byte {
			b := p.Transport()
			return [][]byte{p.Piece(b[:8], 0, true, uint32(p.ID)), p.Piece(make([]byte, 64), 65528, false, uint32(p.ID))}
		}},
	}
}

func fragment6Shapes() []Shape {
	return []Shape{
		{Name: "fragment6/in order", Family: 6, Frames: pieces(24, inOrder)},
		{Name: "fragment6/tiny", Family: 6, Frames: pieces(8, inOrder)},
		{Name: "fragment6/reversed", Family: 6, Frames: pieces(16, reversed)},
		{Name: "fragment6/first alone", Family: 6, Frames: pieces(24, firstOnly)},
		{Name: "fragment6/without the first", Family: 6, Refused: incomplete, Frames: pieces(24, withoutFirst)},
		{Name: "fragment6/overlapping ports", Family: 6, Frames: overlapping},
		{Name: "fragment6/whole packet", Family: 6, Frames: extended(packet.FragmentHeader(0, false, 1))},
		{Name: "fragment6/whole packet, twice over", Family: 6, Frames: extended(packet.FragmentHeader(0, false, 1), packet.FragmentHeader(0, false, 2))},
		{Name: "fragment6/behind options", Family: 6, Frames: shapedPieces(options(1), 24)},
		{Name: "fragment6/of options and segment", Family: 6, Frames: chainInside(24, packet.DestOptions)},
		{Name: "fragment6/ports in the second", Family: 6, Refused: "the first must hold the chain (RFC 7112)", Frames: chainInside(8, packet.DestOptions)},
		{Name: "fragment6/next header lies in the second", Family: 6, Frames: chainInside(24, packet.ICMPv6)},
	}
}

// shapedPieces cuts the packet behind extension headers of its own.
func shapedPieces(chain []packet.Extension, size int) func(packet.Packet) [][]byte {
	return func(p packet.Packet) [][]byte {
		p.Extensions = chain
		return pieces(size, inOrder)(p)
	}
}

// chainInside cuts destination options and the segment behind them together into two fragments. The second
// one claims to be of another protocol, which no receiver looks at.
func chainInside(first int, claim uint8) func(packet.Packet) [][]byte {
	return func(p packet.Packet) [][]byte {
		next := p.Protocol
		if next == 0 {
			next = packet.TCP
		}
		p.Payload = make([]byte, 40)
		body := append([]byte{next, 0, 0x1e, 4, 0, 0, 0, 0}, p.Transport()...)
		a, b := p, p
		a.Protocol, b.Protocol = packet.DestOptions, claim
		return [][]byte{a.Piece(body[:first], 0, true, uint32(p.ID)), b.Piece(body[first:], first, false, uint32(p.ID))}
	}
}
