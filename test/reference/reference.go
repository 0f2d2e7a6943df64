// Package reference says, from the RFCs and from what Linux does with a packet, whether it could reach
// a protected port. It knows nothing of the programs in bpf/: it was written apart from them, so that
// the two can be held against each other.
//
// It errs on one side only. A packet is Protect when some Linux receiver could deliver some part of it
// to a protected port, were its checksums right; what every receiver refuses, or what goes elsewhere, is
// Free. Checksums and the contents of options never free a packet: who sends it can repair them.
package reference

import (
	"encoding/binary"
	"net/netip"
)

// Hook is where a program sees a packet.
type Hook int

// The hooks of a node. In and Out of an L3 device see packets without an Ethernet header.
const (
	DeviceIn   Hook = iota // ingress of an uplink, or of the host's side of a pod's device
	DeviceOut              // egress of an uplink
	PodOut                 // egress of the host's side of a pod's device
	LoopbackIn             // ingress of lo
	L3In                   // ingress of a device without Ethernet header
	L3Out                  // egress of one
	SocketIn               // a socket of the host's namespace, whatever device the packet came by
)

func (h Hook) ingress() bool { return h == DeviceIn || h == LoopbackIn || h == L3In || h == SocketIn }

// routed says that nobody looks at the destination again: what is on lo has its route already, and a socket
// has its packet.
func (h Hook) routed() bool { return h == LoopbackIn || h == SocketIn }

// Frame is a packet as Linux has it at a hook.
type Frame struct {
	Hook    Hook
	Ifindex int
	// Protocol is the EtherType by which Linux chooses the receiver (skb->protocol).
	Protocol uint16
	// Tagged says that a VLAN tag was taken out of the packet and stands beside it, with this TCI.
	Tagged bool
	TCI    uint16
	// Segmented is a packet that stands for many on the wire (GSO): its IPv4 length may be zero.
	Segmented bool
	// Own says that a socket of the node has sent it.
	Own bool
	// Data begins at the Ethernet header, or at the IP header at an L3 hook.
	Data []byte
}

// Verdict is what the reference says of a packet.
type Verdict int

// Free may pass. Protect must not be passed on to a service, or to another node for a workload of this one: it is steered to
// the proxy or dropped.
const (
	Free Verdict = iota
	Protect
)

// String is the name of the verdict.
func (v Verdict) String() string {
	if v == Protect {
		return "protect"
	}
	return "free"
}

// Tuple is who speaks to whom, as far as the packet says. Ports are zero where it does not say.
type Tuple struct {
	Protocol uint8
	Src, Dst netip.AddrPort
}

// Judgement is a verdict with the shape of the packet that it is about.
type Judgement struct {
	Verdict Verdict
	Shape   Shape
	Tuple   Tuple
	// Readable says that the packet is one whole TCP segment or UDP datagram: only such a packet can be
	// let through by a live path or a leg.
	Readable bool
	// Fragment is the identification of a fragment; First says that others may follow it.
	Fragment uint32
	First    bool
	// Owned says that an address of the packet owns a protected port, or is of a kind that no router passes
	// on, or that it goes to a pod with a service: what is done to any other packet is done to somebody else's.
	Owned bool
}

// Service is one protected port.
type Service struct {
	Protocol  uint8
	Port      uint16
	Addresses []netip.Addr // of the pod; none: every local address of the node
	Device    int          // the pod's; 0 for services of the node
}

// World is what a node protects, and what is its own.
type World struct {
	Services []Service
	// Local are the node's own unicast addresses; loopback addresses always are.
	Local []netip.Addr
	// Shared are the broadcast and anycast addresses of the node's and the pods' subnets.
	Shared []netip.Addr
	// Remote are services on other nodes, which workloads of this one reach by the proxy alone: sockets of the node, and what comes
	// in by the devices of Workloads.
	Remote    []Service
	Workloads []int
}

// Judge says what must happen to the frame.
func (w *World) Judge(f Frame) Judgement {
	ip, typ, shape := untag(f)
	if shape != "" {
		return Judgement{Shape: shape, Owned: true} // nobody has read whose it is
	}
	var d dissection
	switch typ {
	case etherIPv4:
		d = dissectIPv4(ip, f.Segmented)
	case etherIPv6:
		d = dissectIPv6(ip, f.Segmented)
	default:
		d = refused(NotIP)
	}
	j := Judgement{Shape: d.shape, Tuple: Tuple{d.protocol, netip.AddrPortFrom(d.src, d.sport), netip.AddrPortFrom(d.dst, d.dport)}}
	j.Readable, j.Fragment, j.First = d.kind == ported, d.id, d.opens
	j.Owned = f.Hook.routed() || w.toPod(f) || w.owns(d.src) || w.owns(d.dst) || w.staysHere(d.src) || w.staysHere(d.dst)
	if w.reaches(f, d) || w.leaves(f, d) {
		j.Verdict = Protect
	} else if j.Readable && w.answers(d) {
		j.Shape = Answer
	}
	return j
}

// EtherTypes (IEEE 802).
const (
	etherIPv4  = 0x0800
	etherIPv6  = 0x86dd
	etherVLAN  = 0x8100 // 802.1Q
	etherQinQ  = 0x88a8 // 802.1ad
	etherBytes = 14
)

// otherVLAN says that a packet with this tag is not for the service's machine.
func (f Frame) otherVLAN(tci uint16) bool {
	return f.Hook == DeviceOut || f.Hook != PodOut && tci&0xfff != 0
}

// untag takes off what is before the IP header. Linux at ingress treats a tag of id 0 as no tag (802.1Q:
// priority-tagged), however often it is there; a tag of another id is for the VLAN device of that id,
// where the packet meets a hook again, and is refused when there is none. What leaves for a pod may
// meet a VLAN device there, whatever its tags are; what leaves for the network is the network's.
func untag(f Frame) (ip []byte, typ uint16, shape Shape) {
	if f.Hook == L3In || f.Hook == L3Out {
		return f.Data, f.Protocol, ""
	}
	if len(f.Data) < etherBytes {
		return nil, 0, NotIP
	}
	ip, typ = f.Data[etherBytes:], f.Protocol
	if f.Tagged && f.otherVLAN(f.TCI) {
		return nil, 0, OtherVLAN
	}
	for f.Hook != SocketIn && (typ == etherVLAN || typ == etherQinQ) { // no socket gets tags
		if len(ip) < 4 {
			return nil, 0, NotIP
		}
		if f.otherVLAN(binary.BigEndian.Uint16(ip)) {
			return nil, 0, OtherVLAN
		}
		typ, ip = binary.BigEndian.Uint16(ip[2:]), ip[4:]
	}
	return ip, typ, ""
}
