package shape

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"

	"github.com/sallyport-dev/sallyport/test/packet"
)

// Ends are what packets are made between, in one family, where they are to be seen at one place.
type Ends struct {
	Src, Dst []netip.Addr
	// Ports are drawn for both sides, Wanted half the time for the destination.
	Ports, Wanted  []uint16
	SrcMAC, DstMAC [6]byte
}

// Generator makes packets of every shape and bends them. Case n of a seed is always the same.
type Generator struct {
	Seed   uint64
	shapes [2][]Shape // IPv4, IPv6
	places [][2]Ends
	pcg    rand.PCG
	// Rand continues the draws of the last case, for what the caller has to choose.
	Rand *rand.Rand
}

// Case is one generated packet.
type Case struct {
	Index uint64
	Shape string
	Place int
	V6    bool
	Frame []byte
}

// NewGenerator makes a generator over every shape, for places with their ends in IPv4 and IPv6.
func NewGenerator(seed uint64, places [][2]Ends) *Generator {
	g := &Generator{Seed: seed, places: places}
	g.Rand = rand.New(&g.pcg)
	for _, s := range All() {
		if s.Family != 6 {
			g.shapes[0] = append(g.shapes[0], s)
		}
		if s.Family != 4 {
			g.shapes[1] = append(g.shapes[1], s)
		}
	}
	return g
}

// Case makes the packet of that index.
func (g *Generator) Case(index uint64) Case {
	g.pcg.Seed(g.Seed, index)
	r := g.Rand
	family := r.IntN(2)
	s := g.shapes[family][r.IntN(len(g.shapes[family]))]
	c := Case{Index: index, Shape: s.Name, Place: r.IntN(len(g.places)), V6: family == 1}
	frames := s.Frames(base(r, g.places[c.Place][family]))
	c.Frame = frames[r.IntN(len(frames))]
	if r.IntN(3) == 0 {
		c.Frame = bend(r, c.Frame)
	}
	return c
}

func pick[T any](r *rand.Rand, of []T) T { return of[r.IntN(len(of))] }

// base is the packet that a shape is given.
func base(r *rand.Rand, e Ends) packet.Packet {
	p := packet.Packet{
		SrcMAC: e.SrcMAC, DstMAC: e.DstMAC,
		Src: netip.AddrPortFrom(pick(r, e.Src), pick(r, e.Ports)), Dst: netip.AddrPortFrom(pick(r, e.Dst), pick(r, e.Ports)),
		Flags: packet.SYN, Seq: r.Uint32(), Ack: r.Uint32(), Window: uint16(r.Uint32()),
		TOS: uint8(r.Uint32()), TTL: uint8(r.IntN(255)) + 1, DF: r.IntN(2) == 0, ID: uint16(r.IntN(8)),
	}
	if r.IntN(2) == 0 {
		p.Dst = netip.AddrPortFrom(p.Dst.Addr(), pick(r, e.Wanted))
	}
	if r.IntN(2) == 0 {
		p.Flags = uint8(r.Uint32())
	}
	if r.IntN(2) == 0 {
		p.Payload = make([]byte, payloadSize(r))
	}
	embellish(r, &p)
	return p
}

// payloadSize is mostly small.
func payloadSize(r *rand.Rand) int {
	switch r.IntN(64) {
	case 0:
		return r.IntN(3000)
	case 1:
		return 1400 + r.IntN(120)
	}
	return r.IntN(64)
}

// embellish adds what can stand before and in a transport header; a shape may take it away again.
func embellish(r *rand.Rand, p *packet.Packet) {
	if r.IntN(4) == 0 {
		p.TCPOptions = tcpOptions(r)
	}
	if r.IntN(6) == 0 {
		p.VLANs, p.QinQ = []uint16{0, 0xe000, 5}[:1+r.IntN(3)], r.IntN(2) == 0
	}
	if p.Src.Addr().Is4() {
		if r.IntN(4) == 0 {
			p.Options = ipv4Options(r)
		}
	} else if r.IntN(3) == 0 {
		p.Extensions = chain(r, p.Dst.Addr())
	}
}

func tcpOptions(r *rand.Rand) []byte {
	switch r.IntN(5) {
	case 0:
		return packet.FastOpen(make([]byte, 2*r.IntN(9)))
	case 1:
		return packet.MPTCPCapable()
	case 2:
		return packet.MPTCPJoin(r.Uint32())
	}
	return noise(r, 4*r.IntN(11))
}

func ipv4Options(r *rand.Rand) []byte {
	switch r.IntN(5) {
	case 0:
		return packet.RecordRoute(r.IntN(10))
	case 1:
		return packet.SourceRoute(r.IntN(2) == 0, netip.AddrFrom4([4]byte{10, 1, 0, byte(r.IntN(4))}))
	case 2:
		return packet.RouterAlert()
	}
	return noise(r, 4*r.IntN(11))
}

func noise(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func chain(r *rand.Rand, dst netip.Addr) []packet.Extension {
	var all []packet.Extension
	types := [...]uint8{packet.HopByHop, packet.DestOptions, packet.Routing, packet.AH, packet.Fragment, packet.DestOptions}
	for range 1 + r.IntN(1+r.IntN(12)) {
		switch typ := types[r.IntN(len(types))]; typ {
		case packet.Fragment:
			all = append(all, packet.FragmentHeader(8*max(0, r.IntN(6)-3), r.IntN(4) == 0, uint32(r.IntN(4))))
		case packet.Routing:
			all = append(all, packet.RoutingHeader(uint8(r.IntN(5)), r.IntN(3), dst))
		default:
			all = append(all, packet.Extension{Type: typ, Body: make([]byte, r.IntN(40))})
		}
	}
	return all
}

// bend changes some bytes of a frame, mostly of its headers, and its length. Half the time the
// destination address is put back, so that the packet still goes where it hurts.
func bend(r *rand.Rand, b []byte) []byte {
	dst := destination(b)
	kept := append([]byte(nil), dst...)
	for range 1 + r.IntN(4) {
		b = bendOnce(r, b)
	}
	if d := destination(b); r.IntN(4) != 0 && len(d) == len(kept) {
		copy(d, kept)
	}
	return b
}

func bendOnce(r *rand.Rand, b []byte) []byte {
	if len(b) < 20 {
		return b
	}
	i := r.IntN(min(len(b), 110))
	if r.IntN(8) != 0 && i < 14 {
		i = 14 + r.IntN(min(len(b)-14, 96))
	}
	switch r.IntN(10) {
	case 0, 1, 2:
		b[i] ^= 1 << r.IntN(8)
	case 3, 4:
		b[i] = pick(r, []byte{0, 1, 4, 5, 6, 17, 41, 43, 44, 50, 51, 58, 59, 60, 0x45, 0x60, 0xff})
	case 5:
		b[i] = byte(r.Uint32())
	case 6:
		b = b[:14+r.IntN(len(b)-13)]
	case 7:
		b = append(b, make([]byte, r.IntN(64))...)
	case 8: // one of the words that say lengths and offsets
		at := 14 + pick(r, []int{0, 2, 4, 6, 12, 32, 40, 44, 52})
		if at+2 <= len(b) {
			binary.BigEndian.PutUint16(b[at:], uint16(int(binary.BigEndian.Uint16(b[at:]))+r.IntN(33)-16))
		}
	case 9: // what is behind moves by a few bytes
		if n := pick(r, []int{1, 2, 4, 8}); r.IntN(2) == 0 && i+n < len(b) {
			b = append(b[:i], b[i+n:]...)
		} else {
			b = append(b[:i:i], append(make([]byte, n), b[i:]...)...)
		}
	}
	return b
}

// destination is where a frame without tags has its IP destination.
func destination(b []byte) []byte {
	switch {
	case len(b) >= 34 && b[12] == 8 && b[13] == 0:
		return b[30:34]
	case len(b) >= 54 && b[12] == 0x86 && b[13] == 0xdd:
		return b[38:54]
	}
	return nil
}
