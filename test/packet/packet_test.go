package packet

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestTheKernelTakesThem sends SYNs to a listening socket and waits for its SYN-ACK: lengths and
// checksums are right by the kernel's own judgement.
func TestTheKernelTakesThem(t *testing.T) {
	l := lab.New(t, lab.Options{})
	tap, err := l.Pod.Tap(5432)
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(40000)
	for _, f := range lab.Families() {
		server := netip.AddrPortFrom(l.Pod.Addr(f), 5432)
		if _, err := l.Pod.WhoAnswers(server); err != nil {
			t.Fatal(err)
		}
		for name, change := range accepted(f) {
			t.Run(f.String()+"/"+name, func(t *testing.T) {
				port++
				p := syn(t, l, netip.AddrPortFrom(l.Client.Addr(f), port), server)
				for _, frame := range change(p) {
					if err := l.Client.Inject("eth0", frame); err != nil {
						t.Fatal(err)
					}
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				if _, err := tap.Wait(ctx, func(q lab.Packet) bool {
					return q.Outgoing && q.SYN && q.ACK && q.Dst == p.Src
				}); err != nil {
					t.Errorf("no SYN-ACK: %v", err)
				}
			})
		}
	}
}

func syn(t *testing.T, l *lab.Lab, src, dst netip.AddrPort) Packet {
	t.Helper()
	from, err := l.Client.MAC("eth0")
	if err != nil {
		t.Fatal(err)
	}
	to, err := l.Node.MAC(lab.Uplink)
	if err != nil {
		t.Fatal(err)
	}
	return Packet{SrcMAC: from, DstMAC: to, Src: src, Dst: dst, Flags: SYN, Seq: 1, Window: 65535}
}

func accepted(f lab.Family) map[string]func(Packet) [][]byte {
	all := map[string]func(Packet) [][]byte{
		"plain":       func(p Packet) [][]byte { return [][]byte{p.Bytes()} },
		"TCP options": func(p Packet) [][]byte { p.TCPOptions = []byte{2, 4, 5, 180, 4, 2}; return [][]byte{p.Bytes()} },
		"odd payload": func(p Packet) [][]byte { p.Payload = []byte("odd"); return [][]byte{p.Bytes()} },
		"fragments": func(p Packet) [][]byte {
			p.Payload = make([]byte, 64)
			return p.Fragments(32, 7)
		},
	}
	if f == lab.IPv4 {
		all["IPv4 options"] = func(p Packet) [][]byte { p.Options = []byte{1, 1, 1}; return [][]byte{p.Bytes()} }
		return all
	}
	all["destination options"] = func(p Packet) [][]byte {
		p.Extensions = []Extension{{HopByHop, SkippedOption(8)}, {DestOptions, SkippedOption(24)}}
		return [][]byte{p.Bytes()}
	}
	return all
}

// random is any packet of which Build promises correct checksums.
func random(r *rand.Rand) Packet {
	p := Packet{
		Src: netip.MustParseAddrPort("192.0.2.1:4000"), Dst: netip.MustParseAddrPort("198.51.100.2:5432"),
		Flags: uint8(r.Uint32()), Seq: r.Uint32(), Ack: r.Uint32(), Window: uint16(r.Uint32()),
		TCPOptions: make([]byte, r.IntN(12)), Payload: bytes(r, r.IntN(100)), TOS: uint8(r.Uint32()), ID: uint16(r.Uint32()),
		Options: make([]byte, r.IntN(12)), DF: r.IntN(2) == 0,
	}
	if r.IntN(2) == 0 {
		p.Src, p.Dst = netip.MustParseAddrPort("[2001:db8::1]:4000"), netip.MustParseAddrPort("[2001:db8::2]:5432")
		p.Extensions = []Extension{{HopByHop, SkippedOption(8)}, {Routing, make([]byte, 6)}, {AH, make([]byte, 14)}}[:r.IntN(4)]
	}
	if r.IntN(3) == 0 {
		p.Protocol = UDP
	}
	p.VLANs = []uint16{5, 6}[:r.IntN(3)]
	return p
}

func bytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func TestEveryPacketVerifies(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		p := random(r)
		if err := Verify(p.Bytes()); err != nil {
			t.Fatalf("%+v: %v", p, err)
		}
		e := p.ICMPError(p.Dst.Addr(), 3, 4, 1300)
		if err := Verify(e.Bytes()); err != nil {
			t.Fatalf("ICMP error for %+v: %v", p, err)
		}
	}
}

func TestVerifyFindsAnyChangedByte(t *testing.T) {
	for _, src := range []string{"192.0.2.1:1", "[2001:db8::1]:1"} {
		s := netip.MustParseAddrPort(src)
		b, at := Packet{Src: s, Dst: netip.AddrPortFrom(s.Addr().Next(), 2), Flags: SYN, Payload: []byte("x")}.Build()
		for i := at.L4; i < len(b); i++ {
			b[i] ^= 1
			if Verify(b) == nil {
				t.Errorf("%v: changed byte %d was not found", s, i)
			}
			b[i] ^= 1
		}
		for n := range b {
			if Verify(b[:n]) == nil {
				t.Errorf("%v: cut to %d bytes was not found", s, n)
			}
		}
	}
}

func TestOffsets(t *testing.T) {
	p := Packet{
		Src: netip.MustParseAddrPort("192.0.2.1:258"), Dst: netip.MustParseAddrPort("198.51.100.2:2"),
		VLANs: []uint16{9}, Options: []byte{1}, TCPOptions: []byte{1}, Payload: []byte("payload"),
	}
	b, at := p.Build()
	want := Offsets{L3: 18, L4: 18 + 24, Payload: 18 + 24 + 24}
	if at != want {
		t.Fatalf("offsets %+v, want %+v", at, want)
	}
	if b[at.L3] != 0x46 || b[at.L4] != 1 || b[at.L4+1] != 2 || string(b[at.Payload:]) != "payload" {
		t.Errorf("layers are not where the offsets say: % x", b)
	}
}

func TestReplyTwiceIsTheSame(t *testing.T) {
	p := random(rand.New(rand.NewPCG(3, 4)))
	if string(p.Reply().Reply().Bytes()) != string(p.Bytes()) {
		t.Error("reply of the reply differs")
	}
	if p.Reply().Src != p.Dst {
		t.Error("reply does not come from the destination")
	}
}

func FuzzVerify(f *testing.F) {
	f.Add(Packet{Src: netip.MustParseAddrPort("192.0.2.1:1"), Dst: netip.MustParseAddrPort("192.0.2.2:2")}.Bytes())
	f.Add(Packet{Src: netip.MustParseAddrPort("[::1]:1"), Dst: netip.MustParseAddrPort("[::2]:2")}.Bytes())
	f.Fuzz(func(_ *testing.T, b []byte) { _ = Verify(b) })
}
