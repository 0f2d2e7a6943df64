package shape

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/test/packet"
)

func example(v6 bool) packet.Packet {
	p := packet.Packet{Src: netip.MustParseAddrPort("10.1.0.2:4000"), Dst: netip.MustParseAddrPort("10.1.0.1:8080"), Flags: packet.SYN}
	if v6 {
		p.Src, p.Dst = netip.MustParseAddrPort("[fd00::2]:4000"), netip.MustParseAddrPort("[fd00::1]:8080")
	}
	return p
}

func TestEveryShapeBuilds(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range All() {
		if seen[s.Name] || !strings.Contains(s.Name, "/") || s.Frames == nil {
			t.Errorf("%q is there twice, has no group or no frames", s.Name)
		}
		seen[s.Name] = true
		for _, v6 := range []bool{false, true} {
			if !s.Fits(example(v6)) {
				continue
			}
			if frames := s.Frames(example(v6)); len(frames) == 0 || len(frames[0]) < 34 {
				t.Errorf("%s: %d frames", s.Name, len(frames))
			}
		}
	}
}

// TestShapesLeaveTheirPacketAlone: a shape is given the same packet again and again.
func TestShapesLeaveTheirPacketAlone(t *testing.T) {
	p := example(true)
	p.Payload, p.TCPOptions, p.Extensions = []byte("payload"), []byte{1, 1}, options(2)
	before := p.Bytes()
	for _, s := range All() {
		if s.Family != 4 {
			s.Frames(p)
		}
	}
	if !bytes.Equal(before, p.Bytes()) {
		t.Error("a shape has changed what it was given")
	}
}

// between is a generator with one place.
func between(seed uint64) *Generator {
	var ends [2]Ends
	for i, v6 := range []bool{false, true} {
		p := example(v6)
		ends[i] = Ends{Src: []netip.Addr{p.Src.Addr()}, Dst: []netip.Addr{p.Dst.Addr()}, Ports: []uint16{1, 2}, Wanted: []uint16{8080}}
	}
	return NewGenerator(seed, [][2]Ends{ends})
}

func TestCasesComeAgain(t *testing.T) {
	a, b := between(7), between(7)
	names := map[string]bool{}
	for i := range uint64(20000) {
		c := a.Case(i)
		names[c.Shape] = true
		if i%100 == 0 && !bytes.Equal(c.Frame, b.Case(i).Frame) {
			t.Fatalf("case %d differs", i)
		}
	}
	if len(names) != len(All()) {
		t.Errorf("%d shapes in 20,000 cases, want %d", len(names), len(All()))
	}
}

func BenchmarkCase(b *testing.B) {
	g := between(1)
	b.ReportAllocs()
	for i := range uint64(b.N) {
		g.Case(i)
	}
}
