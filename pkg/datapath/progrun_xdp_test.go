package datapath_test

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// Verdicts of XDP (linux/bpf.h).
const (
	xdpDrop uint32 = 1
	xdpPass uint32 = 2
)

const (
	udpPort = 8082
	udpID   = 3
)

// newFilterRig protects a UDP port of the node too, and refuses sources: the node's, the pod's network, and some
// that are denied.
func newFilterRig(t testing.TB) *rig { return newFilterRigOf(t, smallConfig(4096, 4096)) }

func newFilterRigOf(t testing.TB, cfg datapath.Config) *rig {
	r := newRigOf(t, cfg)
	pod := r.device(t, lab.PodDevice(0))
	_, err := r.d.SetServices([]datapath.Service{
		{ID: hostID, Name: "host-echo", Target: datapath.TargetHost, Ports: []uint16{hostPort}},
		{ID: udpID, Name: "host-udp", Target: datapath.TargetHost, Protocol: datapath.UDP, Ports: []uint16{udpPort}},
		{ID: podID, Name: "pod-echo", Target: datapath.TargetPod, Ports: []uint16{podPort}, Ifindex: pod,
			Addresses: []netip.Addr{r.Pod.Addr(lab.IPv4), r.Pod.Addr(lab.IPv6)}},
	})
	check(t, err)
	var own []netip.Prefix
	for _, f := range lab.Families() {
		own = append(own, host(r.Node.Addr(f)))
	}
	own = append(own, prefix("10.2.0.0/24"), prefix("fd00:2::/64"))
	check(t, r.d.SetSources(own, deniedSources()))
	return r
}

func deniedSources() []netip.Prefix {
	return []netip.Prefix{prefix("198.51.100.0/24"), prefix("203.0.113.7/32"), prefix("2001:db8:bad::/48"), prefix("2001:db8::7/128"),
		prefix("10.2.0.9/32")} // in the pods' network
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// filterCase is one packet from outside and why it is dropped, if it is.
type filterCase struct {
	name  string
	only  lab.Family
	frame func(s scene) []byte
	want  flow.Reason
	blind bool // the ports are in no record
}

// made is the SYN of a scene after a change to its description, warped the one after a change to its bytes.
func made(f func(s scene, p *packet.Packet)) func(scene) []byte {
	return func(s scene) []byte {
		p := tcp(s.client, s.server, syn)
		f(s, &p)
		return p.Bytes()
	}
}

func warped(f func(b []byte, o packet.Offsets) []byte) func(scene) []byte {
	return func(s scene) []byte {
		b, o := tcp(s.client, s.server, syn).Build()
		return f(b, o)
	}
}

func segment(f uint8) func(scene) []byte {
	return made(func(_ scene, p *packet.Packet) { p.Flags = f })
}

// claims gives the packet another source address.
func claims(address string) func(scene, *packet.Packet) {
	return func(_ scene, p *packet.Packet) {
		p.Src = netip.AddrPortFrom(netip.MustParseAddr(address), p.Src.Port())
	}
}

// abroad sends it to another machine's address.
func abroad(f func(scene, *packet.Packet)) func(scene, *packet.Packet) {
	return func(s scene, p *packet.Packet) {
		f(s, p)
		p.Dst = netip.AddrPortFrom(foreign(s), p.Dst.Port())
	}
}

// unprotected sends it to a port of nobody.
func unprotected(f func(scene, *packet.Packet)) func(scene, *packet.Packet) {
	return func(s scene, p *packet.Packet) {
		f(s, p)
		p.Dst = netip.AddrPortFrom(p.Dst.Addr(), 9999)
	}
}

func none(scene, *packet.Packet) {}

// TestFilter sends every case to both filters, for a service of the node and for one of a pod.
func TestFilter(t *testing.T) { newFilterRig(t).runFilters(t) }

// TestFilterOneBuffer does the same with what kernels before 5.18 get.
func TestFilterOneBuffer(t *testing.T) {
	cfg := smallConfig(4096, 4096)
	cfg.OneBuffer()
	newFilterRigOf(t, cfg).runFilters(t)
}

func (r *rig) runFilters(t *testing.T) {
	for _, cases := range [][]filterCase{cleanCases(), sourceCases(), answerCases(), lieCases(), landCases(), headerCases()} {
		for _, c := range cases {
			for _, f := range lab.Families() {
				if c.only != 0 && c.only != f {
					continue
				}
				for _, where := range []string{"host", "pod"} {
					t.Run(fmt.Sprintf("%s/%s/%v", c.name, where, f), func(t *testing.T) {
						r.runFilter(t, c, r.scenes(t, f)[where], r.d.Programs().SpXdpUp)
						r.runFilter(t, c, r.scenes(t, f)[where], r.d.Programs().SpXdpGeneric)
					})
				}
			}
		}
	}
}

// TestFilterMapped: a mapped destination is in no packet of a lab, so it has a table of its own.
func TestFilterMapped(t *testing.T) {
	r := newFilterRig(t)
	s := r.scenes(t, lab.IPv6)["pod"]
	mapped := netip.AddrFrom16(r.Pod.Addr(lab.IPv4).As16())
	frame, o := tcp(s.client, s.server, syn).Build()
	address := mapped.As16()
	copy(frame[o.L3+24:], address[:])
	c := filterCase{frame: func(scene) []byte { return frame }, want: flow.ReasonXDPMapped}
	s.server = netip.AddrPortFrom(r.Pod.Addr(lab.IPv4), podPort)
	r.runFilter(t, c, s, r.d.Programs().SpXdpUp)
}

func (r *rig) runFilter(t *testing.T, c filterCase, s scene, filter *ebpf.Program) {
	t.Helper()
	r.reset(t)
	r.drain(t)
	frame := c.frame(s)
	verdict := r.sendXDP(t, filter, frame)
	want, counts := xdpPass, map[flow.Reason]datapath.Counter{}
	if c.want != flow.ReasonNone {
		want = xdpDrop
		counts[c.want] = datapath.Counter{Packets: 1, Bytes: uint64(len(frame) - l3Of(frame))}
	}
	if verdict != want {
		t.Errorf("verdict %d, want %d: %x", verdict, want, frame)
	}
	if have := r.counters(t); !maps.Equal(have, counts) {
		t.Errorf("counters %v, want %v", have, counts)
	}
	r.compareFilterRecords(t, c, s)
	compareLines(t, "state", r.renderState(t, s, probe{segs: 1, bytes: 1}), nil)
}

func (r *rig) compareFilterRecords(t *testing.T, c filterCase, s scene) {
	t.Helper()
	events := r.drain(t)
	if c.want == flow.ReasonNone {
		if len(events) > 0 {
			t.Errorf("%d records of a packet that passed", len(events))
		}
		return
	}
	if len(events) != 1 {
		t.Fatalf("%d records, want 1", len(events))
	}
	e := events[0]
	if flow.Event(e.Kind) != flow.EventDeny || flow.Reason(e.Reason) != c.want || flow.Verdict(e.Verdict) != flow.VerdictDenied || e.Count != 1 {
		t.Errorf("record kind %d reason %v verdict %d count %d", e.Kind, flow.Reason(e.Reason), e.Verdict, e.Count)
	}
	if c.blind && (e.ServerPort != 0 && e.ServerPort != s.server.Port()) {
		t.Errorf("port %d was made up", e.ServerPort)
	}
}

// l3Of finds the IP header behind the tags.
func l3Of(frame []byte) int {
	l3 := 14
	for frame[l3-2] == 0x81 && frame[l3-1] == 0 || frame[l3-2] == 0x88 && frame[l3-1] == 0xa8 {
		l3 += 4
	}
	return l3
}

// sendXDP runs a filter once. What it returns it must not have changed.
func (r *rig) sendXDP(t testing.TB, filter *ebpf.Program, frame []byte) uint32 {
	t.Helper()
	out := make([]byte, len(frame)+256)
	o := ebpf.RunOptions{Data: frame, DataOut: out}
	var verdict uint32
	check(t, r.Node.Do(func() (err error) {
		verdict, err = filter.Run(&o)
		return err
	}))
	if !bytes.Equal(o.DataOut, frame) {
		t.Errorf("the filter changed\n%x to\n%x", frame, o.DataOut)
	}
	return verdict
}

// TestFilterBuffers: a frame in several buffers is judged like one in a single buffer, also when its headers are beyond
// the first.
func TestFilterBuffers(t *testing.T) {
	r := newFilterRig(t)
	dest := packet.Extension{Type: packet.DestOptions, Body: packet.SkippedOption(2040)}
	for _, c := range []struct {
		name string
		f    func(p *packet.Packet)
		less int
		want flow.Reason
	}{
		{"own", func(*packet.Packet) {}, 0, flow.ReasonXDPOwnSource},
		{"clean", func(p *packet.Packet) { p.Src = netip.MustParseAddrPort("[fd00:1::2]:40000") }, 0, flow.ReasonNone},
		{"ports beyond the first buffer", func(p *packet.Packet) { p.Extensions = repeat(dest, 3) }, 0, flow.ReasonXDPOwnSource},
		{"clean, ports beyond the first buffer", func(p *packet.Packet) {
			p.Src = netip.MustParseAddrPort("[fd00:1::2]:40000")
			p.Extensions = repeat(dest, 3)
		}, 0, flow.ReasonNone},
		{"one byte missing at the end", func(p *packet.Packet) { p.Src = netip.MustParseAddrPort("[fd00:1::2]:40000") }, 1, flow.ReasonXDPMalformed},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := r.scenes(t, lab.IPv6)["pod"]
			p := tcp(netip.MustParseAddrPort("[fd00:1::1]:40000"), s.server, ack)
			p.Payload = make([]byte, 8000)
			c.f(&p)
			b := p.Bytes()
			r.runFilter(t, filterCase{frame: func(scene) []byte { return b[:len(b)-c.less] }, want: c.want}, s, r.d.Programs().SpXdpUp)
		})
	}
}

// TestFilterKnowsSecondPass: generic XDP meets what px0 puts back on an uplink again, and does not count it again.
func TestFilterKnowsSecondPass(t *testing.T) {
	r := limited(t, datapath.SYNLimit{Rate: 1, Burst: 1}, datapath.SYNLimit{})
	for _, f := range lab.Families() {
		r.reset(t)
		s := r.scenes(t, f)["host"]
		p := probe{frame: segment(syn)(s)}
		leg(up)(t, r, s, &p)
		for range 5 {
			if v := r.sendXDP(t, r.d.Programs().SpXdpGeneric, p.frame); v != xdpPass {
				t.Fatalf("%v: verdict %d for a packet of the proxy's half", f, v)
			}
		}
		if n := r.admitted(t, p.frame, 5); n != 1 {
			t.Errorf("%v: %d of 5 SYNs passed by the driver's filter, which never sees them again: want 1", f, n)
		}
	}
}

// TestFilterOnlyDropsOrPasses sends generated frames of every shape. There is no other verdict and no change, each drop is
// counted, and none is of a packet between machines that own nothing protected.
func TestFilterOnlyDropsOrPasses(t *testing.T) {
	d := newDifferential(t, 7)
	check(t, d.d.LimitSYNs(datapath.SYNLimit{Rate: 100, Burst: 10}, datapath.SYNLimit{Rate: 100, Burst: 10}))
	check(t, d.d.SetSources([]netip.Prefix{host(d.Node.Addr(lab.IPv4)), host(d.Node.Addr(lab.IPv6))}, []netip.Prefix{prefix("0.0.0.0/1")}))
	owners := append(slices.Clone(d.world.Local), d.Pod.Addr(lab.IPv4), d.Pod.Addr(lab.IPv6))
	owners = append(owners, d.world.Shared...)
	dropped := 0
	for i := range uint64(20000) {
		c := d.gen.Case(i)
		filter := d.d.Programs().SpXdpUp
		if i%2 == 0 {
			filter = d.d.Programs().SpXdpGeneric
		}
		if len(c.Frame) < 14 {
			continue // none such comes from a device
		}
		switch v := d.sendXDP(t, filter, c.Frame); v {
		case xdpPass:
		case xdpDrop:
			dropped++
			src, dst := addressesOf(c.Frame)
			if !slices.Contains(owners, src) && !slices.Contains(owners, dst) && !staysHere(src) && !staysHere(dst) {
				t.Errorf("case %d, %s: from %v to %v dropped: %x", c.Index, c.Shape, src, dst, c.Frame)
			}
		default:
			t.Fatalf("case %d, %s: verdict %d for %x", c.Index, c.Shape, v, c.Frame)
		}
	}
	total := uint64(0)
	for _, c := range d.counters(t) {
		total += c.Packets
	}
	if dropped == 0 || uint64(dropped) != total {
		t.Errorf("dropped %d, counted %d", dropped, total)
	}
}

// staysHere is what no router passes on: a packet to there is for this node or for nobody.
func staysHere(a netip.Addr) bool {
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() || a == broadcast
}

// addressesOf reads what stands where addresses are; mapped ones are IPv4.
func addressesOf(frame []byte) (src, dst netip.Addr) {
	l3 := l3Of(frame)
	at, size := l3+12, 4
	if frame[l3-2] == 0x86 {
		at, size = l3+8, 16
	}
	src, _ = netip.AddrFromSlice(frame[at : at+size])
	dst, _ = netip.AddrFromSlice(frame[at+size : at+2*size])
	return src.Unmap(), dst.Unmap()
}
