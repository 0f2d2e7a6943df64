package datapath_test

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// differential runs frames through the hook and through the reference.
type differential struct {
	*rig
	device int
	sent   int
	dsts   map[lab.Family][]netip.Addr // own, own on another link, the pod's, another machine's
}

func newDifferential(t testing.TB) *differential {
	r := newRig(t, 4096, 65536)
	d := &differential{rig: r, device: r.device(t, lab.Uplink), dsts: map[lab.Family][]netip.Addr{}}
	for _, f := range lab.Families() {
		s := r.scenes(t, f)["host"]
		own := r.Pod.Addr(f).AsSlice()
		own[len(own)-1] = 1
		towardsPod, _ := netip.AddrFromSlice(own)
		d.dsts[f] = []netip.Addr{r.Node.Addr(f), towardsPod, r.Pod.Addr(f), foreign(s)}
	}
	r.reset(t)
	return d
}

func (d *differential) isNode(a netip.Addr) bool {
	return slices.Contains(d.dsts[lab.IPv4][:2], a) || slices.Contains(d.dsts[lab.IPv6][:2], a)
}

func (d *differential) isPod(a netip.Addr) bool {
	return a == d.dsts[lab.IPv4][2] || a == d.dsts[lab.IPv6][2]
}

// compare fails the test when kernel and reference differ about the frame.
func (d *differential) compare(t *testing.T, frame []byte) class {
	t.Helper()
	if d.sent++; d.sent%1024 == 0 {
		empty[bpf.LegKey, bpf.Leg](t, d.m.SpLegs)
	}
	v := parseReference(frame)
	want := v.judge(d.isNode, d.isPod)
	before := d.total(t, want.reason)
	o := ebpf.RunOptions{Data: frame, Context: &skBuff{Ifindex: uint32(d.device)}}
	var verdict int32
	check(t, d.Node.Do(func() error {
		code, err := d.d.Programs().SpDevIn.Run(&o)
		verdict = int32(code)
		return err
	}))
	counted := d.total(t, want.reason) - before
	if want.verdict == anyRefusal && (verdict == actRedirect || verdict == actDrop) {
		verdict = anyRefusal
	}
	if v.class == isError || v.class == isRest || v.class == isRouted && want.verdict == actNext {
		return v.class // what else decides is for other tests
	}
	if verdict != want.verdict || want.reason != flow.ReasonNone && counted != 1 {
		t.Errorf("kernel: verdict %d, reference: %d with %s (counted %d), parsed as %+v\n%x", verdict, want.verdict, want.reason, counted, v, frame)
	}
	return v.class
}

// total counts the packets of a reason; steering is one, whatever its reason.
func (d *differential) total(t testing.TB, reason flow.Reason) uint64 {
	reasons := []flow.Reason{reason}
	if reason == flow.ReasonNoPath {
		reasons = append(reasons, flow.ReasonStray, flow.ReasonLeg)
	}
	sum := uint64(0)
	for _, r := range reasons {
		var perCPU []bpf.Counter
		check(t, d.m.SpCounters.Lookup(uint32(r), &perCPU))
		for _, c := range perCPU {
			sum += c.Packets
		}
	}
	return sum
}

// random makes a frame that is valid, or nearly so.
func (d *differential) random(rnd *rand.Rand) []byte {
	f := lab.Families()[rnd.IntN(2)]
	ports := []uint16{hostPort, podPort, 9999, clientPort, hostUDPPort, hostWebPort}
	port := func() uint16 { return ports[rnd.IntN(len(ports))] }
	p := tcp(netip.AddrPortFrom(d.Client.Addr(f), port()), netip.AddrPortFrom(d.dsts[f][rnd.IntN(4)], port()), uint8(rnd.Uint32()))
	if rnd.IntN(2) == 0 {
		p.Dst = netip.AddrPortFrom(p.Dst.Addr(), hostPort)
	}
	p.TOS, p.TTL, p.DF = uint8(rnd.Uint32()), uint8(rnd.Uint32()), rnd.IntN(2) == 0
	p.Payload = make([]byte, rnd.IntN(80))
	if rnd.IntN(3) == 0 {
		p.TCPOptions = make([]byte, 4*rnd.IntN(11))
	}
	if rnd.IntN(8) == 0 {
		p.Protocol = []uint8{packet.UDP, packet.UDP, packet.ESP, packet.AH, packet.NoNext, packet.ICMPv6, packet.Fragment, uint8(rnd.Uint32())}[rnd.IntN(8)]
	}
	if f == lab.IPv4 {
		p.Options = make([]byte, 4*max(0, rnd.IntN(21)-10))
	} else {
		p.Extensions = randomChain(rnd)
	}
	b := p.Bytes()
	if rnd.IntN(16) == 0 && len(p.Payload) > 16 {
		pieces := p.Fragments(16, rnd.Uint32())
		b = pieces[rnd.IntN(len(pieces))]
	}
	return bend(rnd, b)
}

func randomChain(rnd *rand.Rand) []packet.Extension {
	var chain []packet.Extension
	types := []uint8{packet.HopByHop, packet.DestOptions, packet.Routing, packet.AH, packet.DestOptions, packet.Routing, packet.Fragment}
	for range max(0, rnd.IntN(14)-3) {
		typ := types[rnd.IntN(len(types)-rnd.IntN(2))]
		if typ == packet.Fragment {
			chain = append(chain, packet.FragmentHeader(8*rnd.IntN(3), rnd.IntN(2) == 0, 7))
			continue
		}
		chain = append(chain, packet.Extension{Type: typ, Body: make([]byte, rnd.IntN(60))})
	}
	return chain
}

// addressAt is where the destination is in a frame; the test knows only of a few what the node's
// routes make of them.
func addressAt(frame []byte) (from, to int) {
	if binary.BigEndian.Uint16(frame[12:]) == 0x0800 {
		return 14 + 16, 14 + 20
	}
	return 14 + 24, 14 + 40
}

// bend changes some bytes behind the Ethernet header, and cuts the frame, but spares its destination
// and leaves an IP header, as a test run wants it.
func bend(rnd *rand.Rand, b []byte) []byte {
	from, to := addressAt(b)
	for range max(0, rnd.IntN(6)-2) {
		if i := 14 + rnd.IntN(min(len(b)-14, 100)); i < from || i >= to {
			b[i] = []byte{byte(rnd.Uint32()), b[i] ^ 1<<rnd.IntN(8), 0, 6, 0xff}[rnd.IntN(5)]
		}
	}
	if least := max(to, 14+20); rnd.IntN(6) == 0 && len(b) > least {
		b = b[:least+rnd.IntN(len(b)-least)]
	}
	return b
}

// TestParseAsReference compares on seeded random frames, and holds that every class was met.
func TestParseAsReference(t *testing.T) {
	d := newDifferential(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	met := map[class]int{}
	for range 20000 {
		met[d.compare(t, d.random(rnd))]++
		if t.Failed() {
			break
		}
	}
	t.Logf("other %d, TCP %d, fragments %d, hidden %d, malformed %d, UDP %d, misplaced %d",
		met[other], met[isTCP], met[isFragment], met[isHidden], met[isMalformed], met[isUDP], met[isMisplaced])
	for c := other; c <= isRest; c++ {
		if met[c] < 30 {
			t.Errorf("class %d was met %d times only", c, met[c])
		}
	}
}

// FuzzParse looks for an IP packet that kernel and reference read differently. The destination is one
// of the four that the reference knows.
func FuzzParse(f *testing.F) {
	d := newDifferential(f)
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 64 {
		b := d.random(rnd)
		f.Add(binary.BigEndian.Uint16(b[12:]) == 0x86dd, uint8(rnd.Uint32()), b[14:])
	}
	f.Fuzz(func(t *testing.T, v6 bool, dst uint8, ip []byte) {
		family, typ := lab.IPv4, []byte{8, 0}
		if v6 {
			family, typ = lab.IPv6, []byte{0x86, 0xdd}
		}
		frame := slices.Concat(make([]byte, 12), typ, ip)
		from, to := addressAt(frame)
		if len(frame) < to || len(frame) > 2048 {
			return // a test run takes no packet without an IP header
		}
		copy(frame[from:to], d.dsts[family][dst%4].AsSlice())
		d.compare(t, frame)
	})
}
