package shape

import "github.com/sallyport-dev/sallyport/test/packet"

const (
	noTunnel = "no such tunnel device"
	vni      = 5
)

// outer is the packet that carries p: between the same machines.
func outer(p packet.Packet) packet.Packet {
	return packet.Packet{SrcMAC: p.SrcMAC, DstMAC: p.DstMAC, Src: p.Src, Dst: p.Dst}
}

// tunnelShapes: the inner packet is judged where it appears, on the tunnel's device.
func tunnelShapes() []Shape {
	in := func(wrap func(p, o packet.Packet) packet.Packet) func(packet.Packet) [][]byte {
		return func(p packet.Packet) [][]byte { return [][]byte{wrap(p, outer(p)).Bytes()} }
	}
	return []Shape{
		{Name: "tunnel/IP in IP", Refused: noTunnel, Frames: in(packet.Packet.InIP)},
		{Name: "tunnel/GRE", Refused: noTunnel, Frames: in(packet.Packet.InGRE)},
		{Name: "tunnel/VXLAN", Refused: noTunnel, Frames: in(func(p, o packet.Packet) packet.Packet { return p.InVXLAN(o, vni) })},
		{Name: "tunnel/Geneve", Refused: noTunnel, Frames: in(func(p, o packet.Packet) packet.Packet { return p.InGeneve(o, vni) })},
	}
}

// icmpShapes: messages about the flow from the port back to the sender, as a router would send them.
func icmpShapes() []Shape {
	about := func(typ4, code4, typ6, code6 uint8, rest uint32) func(packet.Packet) [][]byte {
		return func(p packet.Packet) [][]byte {
			typ, code := typ4, code4
			if p.Src.Addr().Is6() {
				typ, code = typ6, code6
			}
			e := p.Reply().ICMPError(p.Src.Addr(), typ, code, rest)
			e.SrcMAC, e.DstMAC = p.SrcMAC, p.DstMAC
			return [][]byte{e.Bytes()}
		}
	}
	const noData = "brings no data to the port"
	return []Shape{
		{Name: "icmp/unreachable", Refused: noData, Frames: about(3, 1, 1, 0, 0)},
		{Name: "icmp/too big", Refused: noData, Frames: about(3, 4, 2, 0, 1300)},
		{Name: "icmp/time exceeded", Refused: noData, Frames: about(11, 0, 3, 0, 0)},
		{Name: "icmp/parameter problem", Refused: noData, Frames: about(12, 0, 4, 0, 0)},
		{Name: "icmp/source quench", Family: 4, Refused: noData, Frames: about(4, 0, 0, 0, 0)},
		{Name: "icmp/redirect", Family: 4, Frames: about(5, 1, 0, 0, 0x0a010009)},
	}
}
