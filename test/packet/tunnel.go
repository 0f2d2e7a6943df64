package packet

import (
	"encoding/binary"
	"net/netip"
)

// Ports of the tunnels over UDP (RFC 7348, RFC 8926).
const (
	VXLANPort  = 4789
	GenevePort = 6081
)

// InIP puts p's IP packet into outer, as IPIP, 6in4, 4in6 or IPv6 in IPv6.
func (p Packet) InIP(outer Packet) Packet {
	outer.Protocol, outer.Payload = IPv6InIP, p.ip()
	if p.ipv4() {
		outer.Protocol = IPIP
	}
	return outer
}

// InGRE puts p's IP packet into outer behind a GRE header (RFC 2784).
func (p Packet) InGRE(outer Packet) Packet {
	outer.Protocol = GRE
	outer.Payload = append(binary.BigEndian.AppendUint16([]byte{0, 0}, p.etherType()), p.ip()...)
	return outer
}

// InVXLAN puts p's frame into outer (RFC 7348).
func (p Packet) InVXLAN(outer Packet, id uint32) Packet {
	outer.Payload = append(binary.BigEndian.AppendUint32([]byte{8, 0, 0, 0}, id<<8), p.Bytes()...)
	return outer.toUDP(VXLANPort)
}

// InGeneve puts p's frame into outer (RFC 8926).
func (p Packet) InGeneve(outer Packet, id uint32) Packet {
	outer.Payload = append(binary.BigEndian.AppendUint32([]byte{0, 0, 0x65, 0x58}, id<<8), p.Bytes()...)
	return outer.toUDP(GenevePort)
}

func (p Packet) toUDP(port uint16) Packet {
	p.Protocol, p.Dst = UDP, netip.AddrPortFrom(p.Dst.Addr(), port)
	return p
}

// ip is the packet from its IP header on.
func (p Packet) ip() []byte {
	b, at := p.Build()
	return b[at.L3:]
}
