package packet

import (
	"encoding/binary"
	"net/netip"
)

// SourceRoute is an IPv4 option that sends the packet over hops: loose, or strict (RFC 791, section 3.1).
func SourceRoute(strict bool, hops ...netip.Addr) []byte {
	b := []byte{0x83, byte(3 + 4*len(hops)), 4}
	if strict {
		b[0] = 0x89
	}
	for _, h := range hops {
		b = append(b, h.AsSlice()...)
	}
	return b
}

// RecordRoute is an IPv4 option with room for n addresses.
func RecordRoute(n int) []byte { return append([]byte{7, byte(3 + 4*n), 4}, make([]byte, 4*n)...) }

// RouterAlert is the IPv4 option of RFC 2113.
func RouterAlert() []byte { return []byte{0x94, 4, 0, 0} }

// FastOpen is the TCP option that carries a cookie, or asks for one when it is empty (RFC 7413).
func FastOpen(cookie []byte) []byte { return append([]byte{34, byte(2 + len(cookie))}, cookie...) }

// MPTCPCapable is the option of a SYN that opens a multipath connection (RFC 8684, section 3.1).
func MPTCPCapable() []byte { return []byte{30, 4, 0x01, 0x81} }

// MPTCPJoin is the option of a SYN that adds a subflow to the connection with that token (section 3.2).
func MPTCPJoin(token uint32) []byte {
	b := binary.BigEndian.AppendUint32([]byte{30, 12, 0x10, 1}, token)
	return append(b, 1, 2, 3, 4)
}

// RoutingHeader is an extension header of that type (RFC 8200, section 4.4; RFC 8754 for type 4) over hops, with
// left of them still to be visited.
func RoutingHeader(typ uint8, left int, hops ...netip.Addr) Extension {
	b := []byte{typ, byte(left), 0, 0, 0, 0}
	if typ == 4 {
		b[2] = byte(max(0, len(hops)-1)) // last entry
	}
	for _, h := range hops {
		b = append(b, h.AsSlice()...)
	}
	return Extension{Routing, b}
}
