package shape

import (
	"encoding/binary"

	"github.com/sallyport-dev/sallyport/test/packet"
)

func tcpShapes() []Shape {
	const all = packet.FIN | packet.SYN | packet.RST | packet.PSH | packet.ACK | packet.URG
	option := func(b []byte) func(packet.Packet) [][]byte {
		return shaped(func(p *packet.Packet) { p.TCPOptions = b })
	}
	return []Shape{
		{Name: "tcp/SYN", Frames: flags(packet.SYN)},
		{Name: "tcp/SYN with data", Frames: shaped(func(p *packet.Packet) { p.Payload = []byte("early data") })},
		{Name: "tcp/fast open, cookie asked", Frames: option(packet.FastOpen(nil))},
		{Name: "tcp/fast open, cookie and data", Frames: shaped(func(p *packet.Packet) {
			p.TCPOptions, p.Payload = packet.FastOpen([]byte("cookie!!")), []byte("early data")
		})},
		{Name: "tcp/MPTCP open", Frames: option(packet.MPTCPCapable())},
		{Name: "tcp/MPTCP join", Frames: option(packet.MPTCPJoin(0x01020304))},
		{Name: "tcp/SYN-ACK out of nothing", Frames: flags(packet.SYN | packet.ACK)},
		{Name: "tcp/mid-stream", Frames: flags(packet.ACK | packet.PSH)},
		{Name: "tcp/RST", Frames: flags(packet.RST)},
		{Name: "tcp/RST-ACK", Frames: flags(packet.RST | packet.ACK)},
		{Name: "tcp/FIN", Frames: flags(packet.FIN)},
		{Name: "tcp/no flags", Frames: flags(0)},
		{Name: "tcp/all flags", Frames: flags(all)},
		{Name: "tcp/SYN and FIN", Frames: flags(packet.SYN | packet.FIN)},
		{Name: "tcp/SYN and RST", Frames: flags(packet.SYN | packet.RST)},
		{Name: "tcp/SYN with ECN", Frames: flags(packet.SYN | packet.ECE | packet.CWR)},
		{Name: "tcp/urgent", Frames: flags(packet.URG | packet.ACK)},
		{Name: "tcp/options up to the bound", Frames: option(make([]byte, 40))},
		{Name: "tcp/the same tuple again", Frames: func(p packet.Packet) [][]byte {
			again := p
			again.Seq += 1 << 20
			return [][]byte{p.Bytes(), again.Bytes()}
		}},
		{Name: "tcp/jumbo frame", Frames: shaped(func(p *packet.Packet) { p.Flags, p.Payload = packet.ACK, make([]byte, 8000) })},
	}
}

// lengthShapes: headers that lie about lengths, or are cut off.
func lengthShapes() []Shape {
	offset := func(words byte) func(packet.Packet) [][]byte {
		return bent(func(b []byte, at packet.Offsets) []byte { b[at.L4+12] = words << 4; return b })
	}
	cut := func(n int) func(packet.Packet) [][]byte {
		return func(p packet.Packet) [][]byte {
			p.Payload = nil
			b, at := p.Build()
			b = b[:at.L4+n]
			packet.SetLength(b, at, n)
			return [][]byte{b}
		}
	}
	const notTCP = "no TCP header"
	return []Shape{
		{Name: "length/data offset of four words", Refused: "", Frames: offset(4)},
		{Name: "length/data offset of none", Frames: offset(0)},
		{Name: "length/data offset beyond the end", Frames: offset(15)},
		{Name: "length/segment of 19 bytes", Frames: cut(19)},
		{Name: "length/segment of 4 bytes", Frames: cut(4)},
		{Name: "length/segment of 2 bytes", Refused: notTCP, Frames: cut(2)},
		{Name: "length/no segment", Refused: notTCP, Frames: cut(0)},
		{Name: "length/IP longer than the frame", Refused: "cut off", Frames: bent(func(b []byte, at packet.Offsets) []byte {
			return packet.SetLength(b, at, len(b)-at.L4+8)
		})},
		{Name: "length/IP shorter than the segment", Refused: notTCP, Frames: bent(func(b []byte, at packet.Offsets) []byte {
			return packet.SetLength(b, at, 0)
		})},
		{Name: "length/trailing bytes", Frames: bent(func(b []byte, _ packet.Offsets) []byte { return append(b, make([]byte, 40)...) })},
	}
}

// linkShapes: what is before the IP header.
func linkShapes() []Shape {
	tags := func(qinq bool, ids ...uint16) func(packet.Packet) [][]byte {
		return shaped(func(p *packet.Packet) { p.QinQ, p.VLANs = qinq, ids })
	}
	const noDevice = "no VLAN device with that id"
	return []Shape{
		{Name: "vlan/priority tag", Frames: tags(false, 0xe000)},
		{Name: "vlan/two priority tags", Frames: tags(false, 0, 0xe000)},
		{Name: "vlan/three priority tags", Frames: tags(false, 0, 0, 0)},
		{Name: "vlan/service tag of id 0", Frames: tags(true, 0)},
		{Name: "vlan/service and priority tag", Frames: tags(true, 0, 0)},
		{Name: "vlan/tag", Refused: noDevice, Frames: tags(false, 5)},
		{Name: "vlan/QinQ", Refused: noDevice, Frames: tags(true, 5, 6)},
		{Name: "vlan/priority tag before a tag", Refused: noDevice, Frames: tags(false, 0, 5)},
		{Name: "vlan/tag before a priority tag", Refused: noDevice, Frames: tags(false, 5, 0)},
		{Name: "link/padded to 60 bytes", Frames: bent(func(b []byte, _ packet.Offsets) []byte {
			return append(b, make([]byte, max(0, 60-len(b)))...)
		})},
		{Name: "link/other ether type", Refused: "not IP", Frames: bent(func(b []byte, _ packet.Offsets) []byte {
			binary.BigEndian.PutUint16(b[12:], 0x88b5)
			return b
		})},
		{Name: "link/ether type of the other family", Refused: "wrong version", Frames: bent(func(b []byte, _ packet.Offsets) []byte {
			b[12], b[13] = b[12]^(0x08^0x86), b[13]^(0x00^0xdd)
			return b
		})},
	}
}
