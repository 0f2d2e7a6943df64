package datapath_test

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// shaped is the valid SYN of a scene after a change to its description.
func shaped(f func(*packet.Packet)) func(scene) probe {
	return func(s scene) probe {
		p := tcp(s.client, s.server, syn)
		f(&p)
		return at(s.towards, s.device, p)
	}
}

// bent is the valid SYN of a scene after a change to its bytes.
func bent(f func(b []byte, o packet.Offsets) []byte) func(scene) probe {
	return func(s scene) probe {
		b, o := tcp(s.client, s.server, syn).Build()
		b = f(b, o)
		return probe{program: s.towards, ctx: skBuff{Ifindex: uint32(s.device)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
	}
}

// cut is the SYN without what follows n bytes of the IP packet.
func cut(n int) func(scene) probe {
	return bent(func(b []byte, _ packet.Offsets) []byte { return b[:14+n] })
}

// portless is a denial of a packet whose ports were not read.
func portless(w want) want {
	w.records = []string{w.records[0] + " *"}
	return w
}

func ext(chain ...packet.Extension) func(*packet.Packet) {
	return func(p *packet.Packet) { p.Extensions = chain }
}

func repeat(e packet.Extension, n int) []packet.Extension {
	return slices.Repeat([]packet.Extension{e}, n)
}

// shapeCases: valid packets in every shape that a TCP packet may have.
func shapeCases() []progCase {
	read := steer(flow.ReasonNoPath, "leg down", "origin")
	v4 := func(name string, w want, f func(*packet.Packet)) progCase {
		return progCase{name: "shape/" + name, only: lab.IPv4, packet: shaped(f), want: w}
	}
	v6 := func(name string, w want, chain ...packet.Extension) progCase {
		return progCase{name: "shape/" + name, only: lab.IPv6, packet: shaped(ext(chain...)), want: w}
	}
	beyond := portless(drop(flow.ReasonExtHeaders))
	hop := packet.Extension{Type: packet.HopByHop, Body: packet.SkippedOption(8)}
	dest := packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(24)}
	routing := packet.Extension{Type: packet.Routing, Body: make([]byte, 6)}
	auth := packet.Extension{Type: packet.AH, Body: make([]byte, 22)}
	odd := packet.Extension{Type: packet.AH, Body: make([]byte, 14)}
	out := []progCase{
		v4("tos and ttl", read, func(p *packet.Packet) { p.TOS, p.TTL = 0xff, 1 }),
		v4("don't fragment", read, func(p *packet.Packet) { p.DF = true }),
		{name: "shape/TCP options", packet: shaped(func(p *packet.Packet) { p.TCPOptions = make([]byte, 40) }), want: read},
		{name: "shape/payload", packet: shaped(func(p *packet.Packet) { p.Payload = make([]byte, 1400) }), want: read},
		v6("hop by hop", read, hop),
		v6("every header", read, hop, dest, routing, auth, dest),
		v6("long header", read, packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(2048)}),
		v6("authentication", read, auth),
		v6("authentication, odd words", read, odd),
		v6("eight headers", read, repeat(dest, 8)...),
		v6("nine headers", beyond, repeat(dest, 9)...),
		v6("twenty headers", beyond, repeat(dest, 20)...),
	}
	for words := 1; words <= 10; words++ {
		out = append(out, v4("options", read, func(p *packet.Packet) { p.Options = slices.Repeat([]byte{1}, 4*words) }))
	}
	return out
}

// brokenCases: what cannot be read is dropped when its address owns a protected port.
func brokenCases() []progCase {
	malformed := portless(drop(flow.ReasonMalformed))
	v4 := func(name string, w want, f func(b []byte, o packet.Offsets) []byte) progCase {
		return progCase{name: "broken/" + name, only: lab.IPv4, packet: bent(f), want: w}
	}
	v6 := func(name string, w want, f func(b []byte, o packet.Offsets) []byte) progCase {
		return progCase{name: "broken/" + name, only: lab.IPv6, packet: bent(f), want: w}
	}
	set := func(i int, v ...byte) func([]byte, packet.Offsets) []byte {
		return func(b []byte, o packet.Offsets) []byte { copy(b[14+i:], v); return b }
	}
	doff := func(words byte) func([]byte, packet.Offsets) []byte {
		return func(b []byte, o packet.Offsets) []byte { b[o.L4+12] = words << 4; return b }
	}
	mapped := func(i int) func([]byte, packet.Offsets) []byte {
		return func(b []byte, o packet.Offsets) []byte {
			copy(b[14+i:], netip.MustParseAddr("::ffff:10.9.9.9").AsSlice())
			return b
		}
	}
	lie := func(n uint16) func([]byte, packet.Offsets) []byte {
		return func(b []byte, o packet.Offsets) []byte { binary.BigEndian.PutUint16(b[16:], n); return b }
	}
	lies := withPorts(malformed)
	cutAt := func(f lab.Family, n int) progCase {
		return progCase{name: "broken/cut", only: f, packet: cut(n), want: malformed}
	}
	out := []progCase{
		v4("header length 4", malformed, set(0, 0x44)),
		v4("header length 0", malformed, set(0, 0x40)),
		v4("header beyond the packet", malformed, set(0, 0x4f)),
		v4("total length without TCP", lies, lie(20)),
		v4("total length without IP", lies, lie(19)),
		v4("total length cuts TCP", lies, lie(39)),
		v4("total length zero", lies, lie(0)),
		v4("total length beyond the packet by one", lies, lie(41)),
		v4("total length beyond the packet", lies, lie(1500)),
		v6("payload length zero", lies, set(4, 0, 0)),
		v6("payload length cuts TCP", lies, set(4, 0, 19)),
		v6("payload length beyond the packet by one", lies, set(4, 0, 21)),
		v6("payload length beyond the packet", lies, set(4, 5, 0xdc)),
		{name: "broken/data offset 4", packet: bent(doff(4)), want: withPorts(malformed)},
		{name: "broken/data offset 0", packet: bent(doff(0)), want: withPorts(malformed)},
		{name: "broken/data offset beyond the packet", packet: bent(doff(15)), want: lies},
		{name: "broken/data offset beyond the packet by a word", packet: bent(doff(6)), want: lies},
		v6("mapped source", malformed, mapped(8)),
		cutAt(lab.IPv4, 39), cutAt(lab.IPv4, 24), cutAt(lab.IPv4, 20), cutAt(lab.IPv6, 59), cutAt(lab.IPv6, 44), cutAt(lab.IPv6, 40),
		{name: "broken/options cut off", only: lab.IPv4, want: malformed, packet: bent(func(b []byte, o packet.Offsets) []byte {
			b[14] = 0x46
			binary.BigEndian.PutUint16(b[16:], 44)
			return b
		})},
		{name: "broken/extension cut off", only: lab.IPv6, want: malformed, packet: func(s scene) probe {
			p := shaped(ext(packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(64)}))(s)
			p.frame = p.frame[:14+40+70]
			p.bytes = uint64(len(p.frame) - 14)
			return p
		}},
		{name: "broken/extension begins at the end", only: lab.IPv6, want: malformed, packet: func(s scene) probe {
			p := shaped(ext(packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(64)}))(s)
			p.frame = p.frame[:14+40+1]
			p.bytes = uint64(len(p.frame) - 14)
			return p
		}},
	}
	return out
}

// withPorts is a denial of a packet that failed behind its ports.
func withPorts(w want) want {
	w.records = []string{"DENY MALFORMED"}
	return w
}

// misplacedCases: no IP header where it should begin. Whose packet it is cannot be read, so it is dropped
// while anything is protected.
func misplacedCases() []progCase {
	lost := drop(flow.ReasonMalformed)
	lost.records = []string{"DENY MALFORMED of :::0 to :::0"}
	begins := func(name string, f lab.Family, first byte) progCase {
		return progCase{name: "misplaced/" + name, only: f, want: lost, packet: bent(func(b []byte, _ packet.Offsets) []byte {
			b[14] = first
			return b
		})}
	}
	return []progCase{
		begins("version 5", lab.IPv4, 0x55), begins("version 6 in IPv4", lab.IPv4, 0x65), begins("version 0", lab.IPv4, 5),
		begins("version 4 in IPv6", lab.IPv6, 0x45), begins("version 0", lab.IPv6, 0),
	}
}

// fragmentCases: fragments and what hides TCP.
func fragmentCases() []progCase {
	fragment := portless(drop(flow.ReasonFragment))
	hidden := portless(drop(flow.ReasonExtHeaders))
	piece := func(n int) func(scene) probe {
		return func(s scene) probe {
			p := tcp(s.client, s.server, syn)
			p.Payload = make([]byte, 64)
			b := p.Fragments(40, 99)[n]
			return probe{program: s.towards, ctx: skBuff{Ifindex: uint32(s.device)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
		}
	}
	is := func(name string, protocol uint8, w want, only lab.Family) progCase {
		return progCase{name: "protocol/" + name, only: only, want: w, packet: shaped(func(p *packet.Packet) {
			p.Protocol, p.Payload = protocol, make([]byte, 40)
		})}
	}
	inFragment := func(name string, next uint8, w want) progCase {
		return progCase{name: "fragment/of " + name, only: lab.IPv6, want: w, packet: shaped(func(p *packet.Packet) {
			p.Protocol, p.Payload = next, make([]byte, 40)
			p.Extensions = []packet.Extension{packet.FragmentHeader(0, true, 9)}
		})}
	}
	dest := packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(8)}
	none, free := pass(flow.ReasonNone), pass(flow.ReasonNone, "fragment free")
	return []progCase{
		{name: "fragment/first", packet: piece(0), want: fragment},
		{name: "fragment/last", packet: piece(2), want: fragment},
		{name: "fragment/middle", packet: piece(1), want: fragment},
		{name: "fragment/whole packet", only: lab.IPv6, packet: shaped(ext(packet.FragmentHeader(0, false, 9))), want: fragment},
		{name: "fragment/behind options", only: lab.IPv6, packet: shaped(ext(dest, packet.FragmentHeader(0, true, 9))), want: fragment},
		{name: "fragment/reserved bit", only: lab.IPv4, packet: bent(func(b []byte, _ packet.Offsets) []byte { b[20] |= 0x80; return b }),
			want: steer(flow.ReasonNoPath, "leg down", "origin")},
		inFragment("UDP", packet.UDP, free),
		inFragment("ICMP", packet.ICMPv6, free),
		inFragment("options", packet.DestOptions, fragment),
		is("ESP", packet.ESP, hidden, 0), is("AH", packet.AH, hidden, lab.IPv4), is("no next header", packet.NoNext, hidden, lab.IPv6),
		is("UDP", packet.UDP, none, 0), is("ICMP", packet.ICMP, none, lab.IPv4), is("ICMPv6", packet.ICMPv6, none, lab.IPv6),
		is("GRE", packet.GRE, none, 0), is("IP in IP", packet.IPIP, none, 0), is("IPv6 in IP", packet.IPv6InIP, none, 0),
		is("unknown", 253, none, 0),
		{name: "fragment/of UDP", only: lab.IPv4, want: free, packet: func(s scene) probe {
			p := tcp(s.client, s.server, 0)
			p.Protocol, p.Payload = packet.UDP, make([]byte, 64)
			return probe{program: s.towards, ctx: skBuff{Ifindex: uint32(s.device)}, frame: p.Fragments(40, 9)[0]}
		}},
	}
}

// byAnotherPod sends what leaves for the pod to one without services: a pod that has some owns whatever goes to it.
func byAnotherPod(t testing.TB, r *rig, s scene, p *probe) {
	if s.device == r.device(t, lab.PodDevice(0)) {
		p.ctx.Ifindex = uint32(r.device(t, lab.PodDevice(1)))
	}
}

// unownedCases: towards an address without a protected port nothing is dropped.
func unownedCases() []progCase {
	var out []progCase
	for _, c := range append(brokenCases(), fragmentCases()...) {
		if c.want.verdict != actDrop || c.scenes != nil {
			continue
		}
		broken := c.packet
		c.name, c.want, c.scenes = "unowned "+c.name, pass(flow.ReasonNone), []string{"host", "pod"}
		c.packet = func(s scene) probe {
			s.server = netip.AddrPortFrom(foreign(s), s.server.Port())
			return broken(s)
		}
		c.given = []given{byAnotherPod}
		out = append(out, c)
	}
	return out
}

func TestUnreadablePackets(t *testing.T) {
	r := newRig(t, 4096, 4096)
	for _, cases := range [][]progCase{shapeCases(), brokenCases(), fragmentCases(), unownedCases()} {
		runCases(t, r, cases)
	}
	runCases(t, r, misplacedCases())
}

// TestUnreadableWithoutServices: with nothing protected there is nothing to drop.
func TestUnreadableWithoutServices(t *testing.T) {
	r := newRig(t, 4096, 4096)
	_, err := r.d.SetServices(nil)
	check(t, err)
	var cases []progCase
	for _, c := range slices.Concat(brokenCases(), fragmentCases(), misplacedCases()) {
		c.want = pass(flow.ReasonNone)
		cases = append(cases, c)
	}
	runCases(t, r, cases)
}

// TestUnreadableWithPodOnly: without a host service only the pods' addresses are owned.
func TestUnreadableWithPodOnly(t *testing.T) {
	r := newRig(t, 4096, 4096)
	pod, err := r.Node.Ifindex(lab.PodDevice(0))
	check(t, err)
	_, err = r.d.SetServices([]datapath.Service{{ID: podID, Name: "pod-echo", Target: datapath.TargetPod, Ports: []uint16{podPort},
		Ifindex: pod, Addresses: []netip.Addr{r.Pod.Addr(lab.IPv4), r.Pod.Addr(lab.IPv6)}}})
	check(t, err)
	runCases(t, r, misplacedCases())
	for _, c := range append(brokenCases(), fragmentCases()...) {
		runCases(t, r, []progCase{c.in("pod")})
		c.want = pass(flow.ReasonNone)
		runCases(t, r, []progCase{c.in("host", "lo")})
	}
}
