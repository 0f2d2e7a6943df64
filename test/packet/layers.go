package packet

import (
	"encoding/binary"
	"net/netip"
)

func (p Packet) link() []byte {
	b := append(append([]byte(nil), p.DstMAC[:]...), p.SrcMAC[:]...)
	for i, id := range p.VLANs {
		typ := uint16(etherVLAN)
		if p.QinQ && i == 0 {
			typ = etherQinQ
		}
		b = binary.BigEndian.AppendUint16(b, typ)
		b = binary.BigEndian.AppendUint16(b, id)
	}
	return binary.BigEndian.AppendUint16(b, p.etherType())
}

func (p Packet) etherType() uint16 {
	if p.ipv4() {
		return etherIPv4
	}
	return etherIPv6
}

// network is the IP header with its options or extension headers, for a payload of n bytes.
func (p Packet) network(ext []Extension, fragment uint16, n int) []byte {
	if p.ipv4() {
		return p.headerIPv4(fragment, n)
	}
	return p.headerIPv6(ext, n)
}

func (p Packet) ttl() uint8 {
	if p.TTL == 0 {
		return 64
	}
	return p.TTL
}

func (p Packet) headerIPv4(fragment uint16, n int) []byte {
	options := pad(p.Options, 4)
	length := 20 + len(options)
	b := []byte{4<<4 | byte(length/4), p.TOS}
	b = binary.BigEndian.AppendUint16(b, uint16(length+n))
	b = binary.BigEndian.AppendUint16(b, p.ID)
	b = binary.BigEndian.AppendUint16(b, fragment|flag(p.DF, 1<<14))
	b = append(b, p.ttl(), p.protocol(), 0, 0)
	src, dst := p.Src.Addr().Unmap().As4(), p.Dst.Addr().Unmap().As4()
	b = concat(b, src[:], dst[:], options)
	binary.BigEndian.PutUint16(b[10:], ^fold(sum(b)))
	return b
}

func (p Packet) headerIPv6(ext []Extension, n int) []byte {
	var chain []byte
	for i, e := range ext {
		next := p.protocol()
		if i+1 < len(ext) {
			next = ext[i+1].Type
		}
		chain = append(chain, e.bytes(next)...)
	}
	first := p.protocol()
	if len(ext) > 0 {
		first = ext[0].Type
	}
	b := binary.BigEndian.AppendUint32(nil, 6<<28|uint32(p.TOS)<<20)
	b = binary.BigEndian.AppendUint16(b, uint16(len(chain)+n))
	b = append(b, first, p.ttl())
	src, dst := p.Src.Addr().As16(), p.Dst.Addr().As16()
	return concat(b, src[:], dst[:], chain)
}

func (e Extension) bytes(next uint8) []byte {
	b := pad(append([]byte{next, 0}, e.Body...), 8)
	b[1] = byte(len(b)/8 - 1)
	if e.Type == AH { // the one that counts in words of four
		b[1] = byte(len(b)/4 - 2)
	}
	return b
}

func (p Packet) transport() []byte {
	var b []byte
	checksumAt := 0
	switch p.protocol() {
	case TCP:
		b, checksumAt = p.headerTCP(), 16
	case UDP:
		b, checksumAt = p.headerUDP(), 6
	}
	b = append(b, p.Payload...)
	if checksumAt > 0 {
		c := ^fold(pseudo(p.Src.Addr(), p.Dst.Addr(), p.protocol(), len(b)) + sum(b))
		if c == 0 && p.protocol() == UDP {
			c = 0xffff
		}
		binary.BigEndian.PutUint16(b[checksumAt:], c)
	}
	return b
}

func (p Packet) headerTCP() []byte {
	options := pad(p.TCPOptions, 4)
	b := binary.BigEndian.AppendUint16(nil, p.Src.Port())
	b = binary.BigEndian.AppendUint16(b, p.Dst.Port())
	b = binary.BigEndian.AppendUint32(b, p.Seq)
	b = binary.BigEndian.AppendUint32(b, p.Ack)
	b = append(b, byte(5+len(options)/4)<<4, p.Flags)
	b = binary.BigEndian.AppendUint16(b, p.Window)
	return concat(b, make([]byte, 4), options) // checksum and urgent pointer
}

func (p Packet) headerUDP() []byte {
	b := binary.BigEndian.AppendUint16(nil, p.Src.Port())
	b = binary.BigEndian.AppendUint16(b, p.Dst.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(p.Payload)))
	return append(b, 0, 0)
}

// pad appends zeros up to a multiple of n; it never writes into b's array.
func pad(b []byte, n int) []byte {
	return append(append([]byte(nil), b...), make([]byte, (n-len(b)%n)%n)...)
}

// pseudo is the sum of the pseudo header.
func pseudo(src, dst netip.Addr, protocol uint8, length int) uint32 {
	s, d := src.Unmap().AsSlice(), dst.Unmap().AsSlice()
	return sum(s) + sum(d) + uint32(protocol) + uint32(length)
}

// sum adds b up in words of 16 bits, an odd byte at its end being the high one.
func sum(b []byte) uint32 {
	var s uint32
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
