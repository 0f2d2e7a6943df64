package reference

import (
	"encoding/binary"
	"net/netip"
)

// Protocol numbers (IANA).
const (
	protoHopByHop    = 0
	protoICMP        = 1
	protoIPIP        = 4
	protoTCP         = 6
	protoUDP         = 17
	protoIPv6        = 41
	protoRouting     = 43
	protoFragment    = 44
	protoGRE         = 47
	protoESP         = 50
	protoAH          = 51
	protoICMPv6      = 58
	protoNoNext      = 59
	protoDestOptions = 60
)

// kind is how far the inside of a packet is known.
type kind int

const (
	nothing kind = iota // no part of it can reach a port
	ported              // a whole segment or datagram with its ports
	opening             // the first fragment of one, with its ports
	later               // a fragment without ports, of a known protocol
	hidden              // anything may be inside
	about               // an ICMP redirect with the tuple that it is about
)

// dissection is what a receiver finds in an IP packet.
type dissection struct {
	kind         kind
	shape        Shape
	src, dst     netip.Addr
	protocol     uint8
	sport, dport uint16
	id           uint32     // of a fragment
	opens        bool       // the first fragment
	sender       netip.Addr // of a quoted packet
	resets       bool       // an RST
}

func refused(s Shape) dissection { return dissection{shape: s} }

// dissectIPv4 reads RFC 791, as strictly as ip_rcv of Linux and no more.
func dissectIPv4(b []byte, segmented bool) dissection {
	if len(b) < 20 {
		return refused(IPv4Header)
	}
	d := dissection{src: netip.AddrFrom4([4]byte(b[12:])), dst: netip.AddrFrom4([4]byte(b[16:])), protocol: b[9]}
	d.id = uint32(binary.BigEndian.Uint16(b[4:]))
	header, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if total == 0 && segmented {
		total = len(b) // longer than the field can say ("BIG TCP")
	}
	switch {
	case b[0]>>4 != 4, header < 20, len(b) < header:
		d.shape = IPv4Header
	case total < header, total > len(b):
		d.shape = IPv4Length
	default:
		d.payload(b[header:total], binary.BigEndian.Uint16(b[6:]), header > 20)
	}
	return d
}

// payload reads what is behind an IPv4 header with that fragment field.
func (d *dissection) payload(b []byte, fragment uint16, options bool) {
	offset, more := fragment&0x1fff, fragment&0x2000 != 0
	switch {
	case offset != 0: // protocol is part of what fragments are matched by (section 3.2)
		d.kind, d.shape = later, LaterFragment
	case more:
		d.opens = true
		d.first(b)
	default:
		d.upper(b, options)
	}
}

// first reads the payload of a fragment at offset 0. All but the last are multiples of eight bytes, so the
// ports are always in it, unless something stands before them.
func (d *dissection) first(b []byte) {
	switch d.protocol {
	case protoTCP, protoUDP:
		d.kind, d.shape = opening, FirstFragment
		if len(b) < 8 {
			d.kind, d.shape = nothing, TransportCut // Linux keeps no first fragment of less
			return
		}
		d.ports(b)
	case protoESP, protoAH:
		d.kind, d.shape = hidden, Encrypted
	default:
		d.kind, d.shape = nothing, OtherProtocol
	}
}

// upper reads what is behind the IP header and its options, or behind the chain of extension headers.
func (d *dissection) upper(b []byte, extended bool) {
	switch d.protocol {
	case protoTCP:
		d.tcp(b, extended)
	case protoUDP:
		d.udp(b, extended)
	case protoICMP, protoICMPv6:
		d.icmp(b)
	case protoESP:
		d.kind, d.shape = hidden, Encrypted
	case protoAH:
		d.behindAH(b)
	case protoNoNext:
		d.shape = NoNextHeader
	case protoIPIP, protoIPv6, protoGRE: // the inner packet appears on the tunnel's device
		d.shape = Tunnel
	default:
		d.shape = OtherProtocol
	}
}

// behindAH reads IPv4's AH (RFC 4302): its length is in words of four, less two.
func (d *dissection) behindAH(b []byte) {
	if len(b) < 12 || len(b) < (int(b[1])+2)*4 {
		d.kind, d.shape = nothing, ChainCut
		return
	}
	d.protocol = b[0]
	if d.upper(b[(int(b[1])+2)*4:], true); d.kind == ported {
		d.shape = Authenticated
	}
}

// tcp reads RFC 9293: a receiver takes no segment whose data offset is below five or beyond its end.
func (d *dissection) tcp(b []byte, extended bool) {
	switch {
	case len(b) < 20, len(b) < int(b[12]>>4)*4:
		d.shape = TransportCut
		return
	case b[12]>>4 < 5:
		d.shape = TransportRefused
		return
	}
	d.ports(b)
	d.kind, d.shape, d.resets = ported, TCP, b[13]&4 != 0
	if extended && d.dst.Is4() {
		d.shape = TCPOptionsIP
	} else if extended {
		d.shape = TCPChain
	}
}

// udp reads RFC 768, and RFC 2675 for the length 0 that Linux takes with IPv6.
func (d *dissection) udp(b []byte, extended bool) {
	if len(b) < 8 {
		d.shape = TransportCut
		return
	}
	length := int(binary.BigEndian.Uint16(b[4:]))
	if length == 0 && d.dst.Is6() {
		length = len(b)
	}
	if length < 8 || length > len(b) {
		d.shape = TransportRefused
		return
	}
	d.ports(b)
	d.kind, d.shape = ported, UDP
	if extended && d.dst.Is4() {
		d.shape = UDPOptionsIP
	} else if extended {
		d.shape = UDPChain
	}
}

func (d *dissection) ports(b []byte) {
	d.sport, d.dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
}

// icmp tells errors from the rest (RFC 792, RFC 4443). A redirect changes the way of a connection that it
// quotes, so it reaches the service's socket; the quoted packet is one that the service has sent.
func (d *dissection) icmp(b []byte) {
	if len(b) < 8 {
		d.shape = TransportCut
		return
	}
	v6 := d.protocol == protoICMPv6
	switch typ := b[0]; {
	case !v6 && typ == 5:
		d.shape = ICMPRedirect
		d.quotes(b[8:])
	case v6 && typ == 137:
		d.shape = ICMPRedirect
		d.quotes6(b[8:])
	case !v6 && (typ == 3 || typ == 4 || typ == 11 || typ == 12), v6 && typ >= 1 && typ <= 4:
		d.shape = ICMPError
	default:
		d.shape = ICMPQuery
	}
}

// quotes reads the packet that an ICMP error is about: at least its header and eight bytes more.
func (d *dissection) quotes(b []byte) {
	if len(b) < 20 || b[0]>>4 != 4 || b[0]&15 < 5 {
		return
	}
	header := int(b[0]&15) * 4
	if len(b) < header+8 || b[9] != protoTCP && b[9] != protoUDP {
		return
	}
	d.quoted(b[9], netip.AddrFrom4([4]byte(b[12:])), b[header:])
}

// quotes6 finds the packet that a redirect of neighbour discovery is about, in its option 4 (RFC 4861,
// section 4.6.3).
func (d *dissection) quotes6(b []byte) {
	for b = b[min(32, len(b)):]; len(b) >= 8; b = b[int(b[1])*8:] {
		if b[1] == 0 || len(b) < int(b[1])*8 {
			return
		}
		if b[0] != 4 {
			continue
		}
		if q := b[8 : int(b[1])*8]; len(q) >= 48 && q[0]>>4 == 6 && (q[6] == protoTCP || q[6] == protoUDP) {
			d.quoted(q[6], netip.AddrFrom16([16]byte(q[8:])), q[40:])
		}
		return
	}
}

// quoted takes the ports of a quoted packet: the service is its source.
func (d *dissection) quoted(protocol uint8, src netip.Addr, b []byte) {
	d.kind, d.protocol, d.sender = about, protocol, src
	d.ports(b)
	d.sport, d.dport = d.dport, d.sport
}
