// Package packet builds Ethernet frames for tests of the BPF programs: correct in every checksum and
// length, so that a test breaks exactly what it means to break.
package packet

import (
	"encoding/binary"
	"net/netip"
)

// TCP flags, as in the header's byte 13.
const (
	FIN uint8 = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// Protocol and extension header numbers.
const (
	HopByHop    uint8 = 0
	ICMP        uint8 = 1
	IPIP        uint8 = 4
	TCP         uint8 = 6
	UDP         uint8 = 17
	IPv6InIP    uint8 = 41
	Routing     uint8 = 43
	Fragment    uint8 = 44
	GRE         uint8 = 47
	ESP         uint8 = 50
	AH          uint8 = 51
	ICMPv6      uint8 = 58
	NoNext      uint8 = 59
	DestOptions uint8 = 60
)

// EtherTypes.
const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	etherVLAN = 0x8100 // 802.1Q
	etherQinQ = 0x88a8 // 802.1ad
)

// Packet describes one frame. The zero values of TTL and Protocol are 64 and TCP. Src decides the
// IP family; IPv4-mapped addresses are IPv4.
type Packet struct {
	SrcMAC, DstMAC [6]byte
	// VLANs are the tags' identifiers, the outermost first; QinQ makes the outermost a service tag.
	VLANs []uint16
	QinQ  bool

	Src, Dst netip.AddrPort
	TOS, TTL uint8
	ID       uint16 // IPv4 identification
	DF       bool   // IPv4 don't fragment
	// Options are IPv4 options; they are padded to a multiple of four with end-of-list.
	Options []byte
	// Extensions are IPv6 extension headers, in order.
	Extensions []Extension

	// Protocol is TCP, UDP, or any other, whose payload is then all that follows the IP header.
	Protocol uint8
	Flags    uint8 // TCP
	Seq, Ack uint32
	Window   uint16
	// TCPOptions are padded to a multiple of four with end-of-list.
	TCPOptions []byte
	Payload    []byte
}

// Extension is an IPv6 extension header: Body is what follows its first two bytes, padded with
// zeros to a multiple of eight bytes in all.
type Extension struct {
	Type uint8
	Body []byte
}

// FragmentHeader is the extension header of a fragment; offset is in bytes, a multiple of eight.
func FragmentHeader(offset int, more bool, id uint32) Extension {
	b := binary.BigEndian.AppendUint16(nil, uint16(offset)&^7|flag(more, 1))
	return Extension{Fragment, binary.BigEndian.AppendUint32(b, id)}
}

// SkippedOption is the body of an options header (HopByHop or DestOptions) of n bytes in all, a
// multiple of eight, with one experimental option that every receiver skips. Padding alone would not
// do: Linux drops more than seven bytes of it.
func SkippedOption(n int) []byte {
	b := make([]byte, n-2)
	b[0], b[1] = 0x1e, byte(len(b)-2)
	return b
}

// Offsets says where the layers of a frame begin.
type Offsets struct{ L3, L4, Payload int }

// Bytes is the frame.
func (p Packet) Bytes() []byte {
	b, _ := p.Build()
	return b
}

// Build gives the frame and where its layers begin, for tests that change bytes of it.
func (p Packet) Build() ([]byte, Offsets) {
	l2, l4 := p.link(), p.transport()
	l3 := p.network(p.Extensions, 0, len(l4))
	at := Offsets{L3: len(l2), L4: len(l2) + len(l3)}
	at.Payload = at.L4 + len(l4) - len(p.Payload)
	return concat(l2, l3, l4), at
}

// Fragments cuts the frame into fragments with at most size bytes of IP payload each, size being a
// multiple of eight. Reassembled they are the frame that Bytes gives, id being their identification.
func (p Packet) Fragments(size int, id uint32) [][]byte {
	l4 := p.transport()
	var all [][]byte
	for at := 0; at < len(l4); at += size {
		end := min(at+size, len(l4))
		all = append(all, p.Piece(l4[at:end], at, end < len(l4), id))
	}
	return all
}

// Piece is a fragment of an IP packet with p's headers: the given bytes of its payload, from an offset that
// is a multiple of eight.
func (p Packet) Piece(part []byte, offset int, more bool, id uint32) []byte {
	if p.ipv4() {
		p.ID = uint16(id)
		return concat(p.link(), p.network(nil, uint16(offset/8)|flag(more, 1<<13), len(part)), part)
	}
	ext := append(append([]Extension(nil), p.Extensions...), FragmentHeader(offset, more, id))
	return concat(p.link(), p.network(ext, 0, len(part)), part)
}

// Transport is what is behind the IP header and its extensions.
func (p Packet) Transport() []byte { return p.transport() }

// Reply is the packet back: addresses, ports and MACs change sides, everything else stays.
func (p Packet) Reply() Packet {
	p.Src, p.Dst = p.Dst, p.Src
	p.SrcMAC, p.DstMAC = p.DstMAC, p.SrcMAC
	return p
}

// ICMPError wraps the start of p's IP packet in an ICMP error of its family from src to p's sender.
// rest is the second word of the ICMP header: the MTU of "too big" messages.
func (p Packet) ICMPError(src netip.Addr, typ, code uint8, rest uint32) Packet {
	inner, at := p.Build()
	e := Packet{SrcMAC: p.DstMAC, DstMAC: p.SrcMAC, VLANs: p.VLANs}
	return e.quoting(src, p.Src.Addr(), typ, code, rest, inner[at.L3:min(len(inner), at.L4+64)])
}

// ICMPErrorQuoting is the frame of an ICMP error that quotes any bytes; p gives what is in front of it.
func (p Packet) ICMPErrorQuoting(src, dst netip.Addr, typ, code uint8, rest uint32, quote []byte) []byte {
	return p.quoting(src, dst, typ, code, rest, quote).Bytes()
}

func (p Packet) quoting(src, dst netip.Addr, typ, code uint8, rest uint32, quote []byte) Packet {
	b := binary.BigEndian.AppendUint32([]byte{typ, code, 0, 0}, rest)
	p.Src, p.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	p.Protocol, p.Payload = ICMP, append(b, quote...)
	start := uint32(0)
	if !p.ipv4() {
		p.Protocol = ICMPv6
		start = pseudo(src, dst, ICMPv6, len(p.Payload))
	}
	binary.BigEndian.PutUint16(p.Payload[2:], ^fold(start+sum(p.Payload)))
	return p
}

func (p Packet) ipv4() bool { return p.Src.Addr().Unmap().Is4() }

func (p Packet) protocol() uint8 {
	if p.Protocol == 0 {
		return TCP
	}
	return p.Protocol
}

func flag(on bool, bit uint16) uint16 {
	if on {
		return bit
	}
	return 0
}

func concat(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}
