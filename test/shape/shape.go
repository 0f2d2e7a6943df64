// Package shape is the one table of every shape that a packet towards a port can have. The generator
// mutates what it builds, the hostile suite sends it, and the architecture's table is held to its names.
package shape

import (
	"slices"

	"github.com/sallyport-dev/sallyport/test/packet"
)

// Shape is one form of packet.
type Shape struct {
	// Name begins with its group: "fragment/tiny first".
	Name string
	// Family is 4 or 6, or 0 for both.
	Family int
	// Refused says why Linux brings no part of it with the port to the input of its own stack; empty where
	// it does, whatever TCP or UDP make of it then.
	Refused string
	// Bounded says why newer kernels bring no part of it there either, where older ones do.
	Bounded string
	// Frames gives it the packet p, a TCP segment or UDP datagram towards the port. They are sent in order.
	Frames func(p packet.Packet) [][]byte
}

// Fits says whether the shape exists in the packet's family.
func (s Shape) Fits(p packet.Packet) bool {
	return s.Family == 0 || (s.Family == 4) == p.Src.Addr().Unmap().Is4()
}

// All lists them. Those of UDP make a datagram of what they are given.
func All() []Shape {
	return slices.Concat(tcpShapes(), lengthShapes(), linkShapes(), ipv4Shapes(), ipv6Shapes(), fragmentShapes(),
		fragment6Shapes(), tunnelShapes(), icmpShapes(), udpShapes())
}

// shaped builds the packet after a change of its description.
func shaped(change func(*packet.Packet)) func(packet.Packet) [][]byte {
	return func(p packet.Packet) [][]byte {
		change(&p)
		return [][]byte{p.Bytes()}
	}
}

// bent changes the bytes of the packet; at says where its layers are. An IPv4 header gets its checksum
// again, so that nothing but the change is wrong with it.
func bent(change func(b []byte, at packet.Offsets) []byte) func(packet.Packet) [][]byte {
	return func(p packet.Packet) [][]byte {
		b, at := p.Build()
		b = change(b, at)
		packet.FixIPv4(b, at.L3)
		return [][]byte{b}
	}
}

// flags is a segment with these flags.
func flags(bits uint8) func(packet.Packet) [][]byte {
	return shaped(func(p *packet.Packet) { p.Flags = bits })
}

// extended is a segment behind these extension headers.
func extended(chain ...packet.Extension) func(packet.Packet) [][]byte {
	return shaped(func(p *packet.Packet) { p.Extensions = chain })
}

// options is n destination options headers.
func options(n int) []packet.Extension {
	return slices.Repeat([]packet.Extension{{Type: packet.DestOptions, Body: packet.SkippedOption(8)}}, n)
}
