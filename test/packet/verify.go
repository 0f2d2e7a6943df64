package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

var errShort = errors.New("frame is too short")

// Verify checks lengths and checksums of an unfragmented frame, as one that a program gave out: the
// IP header's, and those of TCP, UDP and ICMP.
func Verify(frame []byte) error {
	if len(frame) < 14 {
		return errShort
	}
	typ, b := binary.BigEndian.Uint16(frame[12:]), frame[14:]
	for (typ == etherVLAN || typ == etherQinQ) && len(b) >= 4 {
		typ, b = binary.BigEndian.Uint16(b[2:]), b[4:]
	}
	switch typ {
	case etherIPv4:
		return verifyIPv4(b)
	case etherIPv6:
		return verifyIPv6(b)
	}
	return fmt.Errorf("ether type %#x is not IP", typ)
}

func verifyIPv4(b []byte) error {
	if len(b) < 20 || int(b[0]&15)*4 < 20 || len(b) < int(b[0]&15)*4 {
		return errShort
	}
	header, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if total != len(b) {
		return fmt.Errorf("total length is %d in a packet of %d bytes", total, len(b))
	}
	if c := fold(sum(b[:header])); c != 0xffff {
		return fmt.Errorf("IPv4 header checksum is off by %#x", ^c)
	}
	src, dst := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	return verifyTransport(src, dst, b[9], b[header:])
}

func verifyIPv6(b []byte) error {
	if len(b) < 40 {
		return errShort
	}
	if n := int(binary.BigEndian.Uint16(b[4:])); n != len(b)-40 {
		return fmt.Errorf("payload length is %d in a packet with %d bytes of payload", n, len(b)-40)
	}
	src, dst := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	next, rest := b[6], b[40:]
	for {
		var length int
		switch {
		case len(rest) < 8:
			return verifyTransport(src, dst, next, rest)
		case next == HopByHop, next == Routing, next == DestOptions:
			length = (int(rest[1]) + 1) * 8
		case next == AH:
			length = (int(rest[1]) + 2) * 4
		default:
			return verifyTransport(src, dst, next, rest)
		}
		if length > len(rest) {
			return errShort
		}
		next, rest = rest[0], rest[length:]
	}
}

func verifyTransport(src, dst netip.Addr, protocol uint8, b []byte) error {
	var start uint32
	switch protocol {
	case TCP, UDP, ICMPv6:
		start = pseudo(src, dst, protocol, len(b))
	case ICMP:
	default:
		return nil // no checksum that we know
	}
	if c := fold(start + sum(b)); c != 0xffff {
		return fmt.Errorf("checksum of protocol %d is off by %#x", protocol, ^c)
	}
	return nil
}

// FixIPv4 computes the checksum of the IPv4 header at an offset again, if there is one.
func FixIPv4(b []byte, at int) {
	if len(b) < at+20 || b[at]>>4 != 4 {
		return
	}
	n := min(max(20, int(b[at]&15)*4), len(b)-at)
	binary.BigEndian.PutUint16(b[at+10:], 0)
	binary.BigEndian.PutUint16(b[at+10:], ^fold(sum(b[at:at+n])))
}

// SetLength has the IP header say that n bytes follow it and its extensions, and returns the frame.
func SetLength(b []byte, at Offsets, n int) []byte {
	if n += at.L4 - at.L3; b[at.L3]>>4 == 6 {
		binary.BigEndian.PutUint16(b[at.L3+4:], uint16(n-40))
		return b
	}
	binary.BigEndian.PutUint16(b[at.L3+2:], uint16(n))
	FixIPv4(b, at.L3)
	return b
}
