package reference

import (
	"encoding/binary"
	"net/netip"
)

// dissectIPv6 reads RFC 8200, with what Linux refuses of addresses (RFC 4291). It takes IPv4-mapped sources,
// but for a SYN.
func dissectIPv6(b []byte, segmented bool) dissection {
	if len(b) < 40 {
		return refused(IPv6Header)
	}
	next, payload := b[6], int(binary.BigEndian.Uint16(b[4:]))
	if payload == 0 && (segmented || next == protoHopByHop) {
		payload = len(b) - 40 // a jumbogram (RFC 2675); Linux does not insist on the option
	}
	d := dissection{src: netip.AddrFrom16([16]byte(b[8:])), dst: netip.AddrFrom16([16]byte(b[24:]))}
	switch {
	case b[0]>>4 != 6:
		d.shape = IPv6Header
	case payload > len(b)-40:
		d.shape = IPv6Length
	case d.src.IsMulticast():
		d.shape = IPv6Multicast
	default:
		d.chain(next, b[40:40+payload])
	}
	return d
}

// chain walks the extension headers. There is no bound: RFC 8504 (section 5.3) lets hosts have one, and
// Linux has none that a test could rely on.
func (d *dissection) chain(next uint8, b []byte) {
	authenticated := false
	for at := 0; ; at++ {
		switch next {
		case protoHopByHop:
			if at > 0 {
				d.shape = HopByHopLate // first or never: RFC 8200, section 4.1
				return
			}
		case protoRouting, protoDestOptions: // a routing header may lead back to this node
		case protoAH:
			authenticated = true
		case protoFragment:
			if b, next = d.fragment(b); b == nil {
				return
			}
			continue
		default:
			d.end(next, b, at > 0, authenticated)
			return
		}
		length, ok := headerLength(next, b)
		if !ok {
			d.shape = ChainCut
			return
		}
		next, b = b[0], b[length:]
	}
}

func (d *dissection) end(next uint8, b []byte, extended, authenticated bool) {
	d.protocol = next
	if next == protoICMP {
		d.shape = OtherProtocol
		return
	}
	if d.upper(b, extended); authenticated && d.kind == ported {
		d.shape = Authenticated
	}
}

// headerLength is in units of eight bytes, not counting the first; AH alone counts words of four, less two
// (RFC 4302, section 2.2).
func headerLength(typ uint8, b []byte) (n int, ok bool) {
	if len(b) < 8 {
		return 0, false
	}
	if n = (int(b[1]) + 1) * 8; typ == protoAH {
		n = (int(b[1]) + 2) * 4
	}
	return n, n <= len(b)
}

// fragment reads a fragment header. A fragment that is the whole packet (RFC 6946) is read on; otherwise
// rest is nil. Only the next header of the first fragment counts for the packet, but a later one says
// here what it claims (RFC 8200, section 4.5).
func (d *dissection) fragment(b []byte) (rest []byte, next uint8) {
	if len(b) < 8 {
		d.shape = ChainCut
		return nil, 0
	}
	field := binary.BigEndian.Uint16(b[2:])
	d.id = binary.BigEndian.Uint32(b[4:])
	next, rest = b[0], b[8:]
	switch offset, more := field>>3, field&1 != 0; {
	case offset != 0:
		d.kind, d.shape, d.protocol = later, LaterFragment, next
	case more && (len(rest) == 0 || len(rest)%8 != 0): // Linux discards what a fragment adds nothing to
		d.shape = FragmentLength
	case more:
		d.opens = true
		d.opened(next, rest)
	default:
		return rest, next
	}
	return nil, 0
}

// opened reads the first fragment. RFC 7112 wants the whole chain and the ports in it; a receiver may take
// the packet without them, so that nobody knows what is inside.
func (d *dissection) opened(next uint8, b []byte) {
	for {
		switch next {
		case protoTCP, protoUDP:
			d.protocol = next
			if len(b) < 4 {
				d.kind, d.shape = later, FirstFragmentCut // of a known protocol, but of no known port
				return
			}
			d.kind, d.shape = opening, FirstFragment
			d.ports(b)
			return
		case protoRouting, protoDestOptions, protoAH:
		case protoESP:
			d.kind, d.shape = hidden, Encrypted
			return
		default:
			d.protocol, d.shape = next, OtherProtocol
			return
		}
		length, ok := headerLength(next, b)
		if !ok {
			d.kind, d.shape = hidden, FirstFragmentCut
			return
		}
		next, b = b[0], b[length:]
	}
}
