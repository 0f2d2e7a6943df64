package datapath_test

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// A second parser, in Go, from the rules at the head of bpf/parse.h and the RFCs: what the uplink's
// hook on the way in makes of a frame, where only whether its TCP goes to a protected host port counts.

// class is what a parser makes of a frame.
type class int

const (
	other class = iota
	isTCP
	isFragment
	isHidden
	isMalformed
	isUDP
	isMisplaced
	isRouted
	isRest  // a fragment but the first, whose fate hangs on what came before
	isError // an ICMP error or redirect: what it quotes is for other tests
)

// isICMPError knows errors and redirects by their type.
func isICMPError(v6 bool, b []byte) bool {
	if len(b) == 0 {
		return false
	}
	if v6 {
		return b[0] >= 1 && b[0] <= 4 || b[0] == 137
	}
	return b[0] >= 3 && b[0] <= 5 || b[0] == 11 || b[0] == 12
}

// view is what the reference knows of a frame.
type view struct {
	class        class
	dst          netip.Addr // invalid when the IP header is not there
	src          netip.Addr
	sport, dport uint16
	first        bool // of several fragments
	bad          bool // TCP flags
	lies         bool // about its lengths, which counts when a port is flagged
}

func parseReference(frame []byte) view {
	ip := frame[14:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case 0x0800:
		return referenceIPv4(ip)
	case 0x86dd:
		return referenceIPv6(ip)
	}
	return view{}
}

func referenceIPv4(ip []byte) view {
	if len(ip) < 20 {
		return view{class: isMalformed}
	}
	v := view{src: netip.AddrFrom4([4]byte(ip[12:])), dst: netip.AddrFrom4([4]byte(ip[16:]))}
	protocol, fragment := ip[9], binary.BigEndian.Uint16(ip[6:])
	header, total := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	least := map[uint8]int{packet.TCP: 20, packet.UDP: 8}[protocol]
	switch {
	case ip[0]>>4 != 4:
		v.class = isMisplaced
	case protocol == packet.ESP, protocol == packet.AH:
		v.class = isHidden
	case protocol == packet.ICMP && fragment&0x1fff == 0 && isICMPError(false, ip[min(header, len(ip)):]):
		v.class = isError
		if fragment&0x2000 != 0 {
			v.class = isFragment
		}
	case least == 0:
		v.class = other
	case header < 20, len(ip) < header:
		v.class = isMalformed
	case sourceRouted(ip[20:header]):
		v.class = isRouted
	case fragment&0x3fff != 0 && protocol == packet.TCP: // more fragments, or an offset
		v.class = isFragment
	case fragment&0x1fff != 0:
		v.class = isRest
	case len(ip) < header+least:
		v.class = isMalformed
	default:
		v.first = fragment&0x2000 != 0
		v.ports(protocol, ip[header:], header, total, len(ip))
	}
	return v
}

// sourceRouted looks for LSRR and SSRR (RFC 791, 3.1).
func sourceRouted(options []byte) bool {
	for len(options) > 0 && options[0] != 0 {
		switch {
		case options[0] == 131, options[0] == 137:
			return true
		case options[0] == 1:
			options = options[1:]
		case len(options) < 2, options[1] < 2:
			return false
		default:
			options = options[min(int(options[1]), len(options)):]
		}
	}
	return false
}

func referenceIPv6(ip []byte) view {
	if len(ip) < 40 {
		return view{class: isMalformed}
	}
	v := view{src: netip.AddrFrom16([16]byte(ip[8:])), dst: netip.AddrFrom16([16]byte(ip[24:]))}
	if ip[0]>>4 != 6 {
		v.class = isMisplaced
		return v
	}
	if v.src.Is4In6() || v.dst.Is4In6() {
		v.class = isMalformed
		return v
	}
	next, rest := ip[6], ip[40:]
	for headers := 0; ; headers++ {
		length := 0
		switch next {
		case packet.TCP, packet.UDP:
			v.ports(next, rest, len(ip)-len(rest), 40+int(binary.BigEndian.Uint16(ip[4:])), len(ip))
			return v
		case packet.ESP, packet.NoNext:
			v.class = isHidden
			return v
		case packet.ICMPv6:
			if isICMPError(true, rest) {
				v.class = isError
			}
			return v
		case packet.Fragment, packet.HopByHop, packet.Routing, packet.DestOptions, packet.AH:
		default:
			return v
		}
		if len(rest) < 2 {
			v.class = isMalformed
			return v
		}
		switch length = 8 + 8*int(rest[1]); next {
		case packet.Fragment:
			v.fragment6(ip, rest)
			return v
		case packet.Routing:
			if len(rest) < 4 || rest[3] > 0 {
				v.class = isRouted
				return v
			}
		case packet.AH:
			length = 8 + 4*int(rest[1])
		}
		// The ninth header is not walked to its end.
		if headers == 8 {
			v.class = isHidden
			return v
		}
		next, rest = rest[0], rest[min(length, len(rest)):]
	}
}

// fragment6 reads an IPv6 fragment header and, of the first fragment, what is behind it.
func (v *view) fragment6(ip, b []byte) {
	if len(b) < 8 {
		v.class = isMalformed
		return
	}
	at := binary.BigEndian.Uint16(b[2:])
	switch next := b[0]; {
	case slices.Contains([]uint8{packet.TCP, packet.HopByHop, packet.Routing, packet.Fragment, packet.ESP, packet.AH, packet.NoNext, packet.DestOptions}, next):
		v.class = isFragment
	case at&^7 != 0:
		v.class = isRest
	case next == packet.ICMPv6 && isICMPError(true, b[8:]):
		v.class = isError
		if at&1 != 0 {
			v.class = isFragment
		}
	case next == packet.UDP:
		v.first = at&1 != 0
		v.ports(next, b[8:], len(ip)-len(b)+8, 40+int(binary.BigEndian.Uint16(ip[4:])), len(ip))
	}
}

// ports reads the header behind `before` bytes of an IP packet that says it has `total` and has `there`.
func (v *view) ports(protocol uint8, b []byte, before, total, there int) {
	if protocol == packet.TCP && (len(b) < 20 || b[12]>>4 < 5) || len(b) < 8 {
		v.class = isMalformed
		return
	}
	v.class = map[uint8]class{packet.TCP: isTCP, packet.UDP: isUDP}[protocol]
	v.sport, v.dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	length := int(b[4])<<8 | int(b[5])
	if protocol == packet.TCP {
		length = int(b[12]>>4) * 4
	}
	jumbo := before >= 40 && total == 40 // payload length 0
	if v.first {
		length = min(length, 8)
	}
	v.lies = jumbo || total > there || before+length > total || length < 8
	if protocol == packet.TCP {
		f := b[13]
		v.bad = f&packet.SYN != 0 && f&(packet.FIN|packet.RST) != 0 || f&(packet.SYN|packet.RST|packet.ACK) == 0
	}
}

// anyRefusal is of a datagram that is dropped, or made into the answer to its sender.
const anyRefusal int32 = 100

// outcome is the verdict and what it is counted as; every reason of steering is NO_PATH here.
type outcome struct {
	verdict int32
	reason  flow.Reason
}

// judge is what the hook does, given the addresses of the node and of the pod.
func (v view) judge(node, pod func(netip.Addr) bool) outcome {
	next := outcome{actNext, flow.ReasonNone}
	if !v.dst.IsValid() {
		return next
	}
	// What comes from a link-local or multicast address is never forwarded: it is for the node.
	mine := node(v.dst) || v.src.Is6() && (v.src.IsLinkLocalUnicast() || v.src.IsMulticast())
	owned := mine || pod(v.dst)
	if v.class == isMisplaced {
		return outcome{actDrop, flow.ReasonMalformed}
	}
	flagged := func(port uint16) bool {
		return v.class == isTCP && (port == hostPort || port == podPort || port == podWebPort) ||
			port == hostUDPPort || port == hostWebPort || v.class == isUDP && (port == podUDPPort || port == podWebPort)
	}
	if (v.class == isTCP || v.class == isUDP) && v.lies && owned && (flagged(v.sport) || flagged(v.dport)) {
		return outcome{actDrop, flow.ReasonMalformed}
	}
	drops := map[class]flow.Reason{isFragment: flow.ReasonFragment, isHidden: flow.ReasonExtHeaders, isMalformed: flow.ReasonMalformed}
	switch reason, broken := drops[v.class]; {
	case broken && owned:
		return outcome{actDrop, reason}
	case v.class == isRouted && owned:
		return outcome{actDrop, flow.ReasonSourceRoute}
	case v.class == isTCP && v.bad && (v.dport == hostPort || v.dport == hostWebPort || v.dport == hostUDPPort) && mine:
		return outcome{actDrop, flow.ReasonBadFlags}
	case v.class == isTCP && v.dport == hostPort && mine:
		return outcome{actRedirect, flow.ReasonNoPath}
	case v.class == isUDP && v.dport == hostUDPPort && mine:
		return outcome{anyRefusal, flow.ReasonUDPNoPath}
	case v.class == isUDP && v.dport == hostWebPort && mine:
		return outcome{anyRefusal, flow.ReasonUDPDenied}
	case v.class == isTCP && (v.dport == hostWebPort || v.dport == hostUDPPort) && mine:
		return outcome{actRedirect, flow.ReasonNoPath}
	}
	return next
}
