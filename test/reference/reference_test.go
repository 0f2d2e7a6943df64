package reference

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/test/packet"
	"github.com/sallyport-dev/sallyport/test/shape"
)

const (
	hostPort, podPort, udpPort = 8080, 8081, 53
	uplink, pod                = 2, 3
)

func world() *World {
	return &World{
		Services: []Service{
			{Protocol: packet.TCP, Port: hostPort},
			{Protocol: packet.UDP, Port: udpPort},
			{Protocol: packet.TCP, Port: podPort, Device: pod, Addresses: addresses("10.2.0.2", "fd00:2::2")},
			{Protocol: packet.UDP, Port: udpPort, Device: pod, Addresses: addresses("10.2.0.2", "fd00:2::2")},
		},
		Local:  addresses("10.1.0.1", "fd00:1::1"),
		Shared: addresses("10.1.0.255", "10.2.0.255"),
	}
}

func addresses(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// towards is a SYN to the port of the host, or of the pod.
func towards(v6, toPod bool) packet.Packet {
	src, dst, port := "10.1.0.2", "10.1.0.1", uint16(hostPort)
	if v6 {
		src, dst = "fd00:1::2", "fd00:1::1"
	}
	if toPod {
		dst, port = map[bool]string{false: "10.2.0.2", true: "fd00:2::2"}[v6], podPort
	}
	return packet.Packet{Src: netip.AddrPortFrom(netip.MustParseAddr(src), 4000), Dst: netip.AddrPortFrom(netip.MustParseAddr(dst), port), Flags: packet.SYN}
}

// at is the frame at a hook, its first tag beside it where Linux has it there.
func at(h Hook, b []byte) Frame {
	f := Frame{Hook: h, Ifindex: uplink, Protocol: binary.BigEndian.Uint16(b[12:]), Data: b}
	if h == PodOut {
		f.Ifindex = pod
	}
	if h.ingress() && (f.Protocol == etherVLAN || f.Protocol == etherQinQ) {
		f.Tagged, f.TCI, f.Protocol = true, binary.BigEndian.Uint16(b[14:]), binary.BigEndian.Uint16(b[16:])
		f.Data = append(b[:12:12], b[16:]...)
	}
	return f
}

// TestWhatArrivesIsProtected: of every shape that Linux brings to a port by itself, some packet is Protect.
func TestWhatArrivesIsProtected(t *testing.T) {
	w := world()
	for _, s := range shape.All() {
		for _, v6 := range []bool{false, true} {
			for hook, toPod := range map[Hook]bool{DeviceIn: false, PodOut: true} {
				p := towards(v6, toPod)
				if !s.Fits(p) || s.Refused != "" {
					continue
				}
				if s.Name[:3] == "udp" {
					p.Dst = netip.AddrPortFrom(p.Dst.Addr(), udpPort)
				}
				protects := func(b []byte) bool { return w.Judge(at(hook, b)).Verdict == Protect }
				if !slices.ContainsFunc(s.Frames(p), protects) && !refusedLater[s.Name] {
					t.Errorf("%s: v6 %v, pod %v: no packet is to be protected", s.Name, v6, toPod)
				}
			}
		}
	}
}

// refusedLater are shapes that come to the port's host, where TCP or UDP takes none of it.
var refusedLater = map[string]bool{
	"length/data offset of four words": true, "length/data offset of none": true, "length/data offset beyond the end": true,
	"length/segment of 19 bytes": true, "length/segment of 4 bytes": true, "udp/length of 7": true, "udp/length beyond the end": true,
	"udp/length 0": true, "ipv6/multicast destination": true, "ipv6/hop-by-hop options not first": true,
}

// TestJudgements: what the verdict hangs on, one thing at a time.
func TestJudgements(t *testing.T) {
	w := world()
	for name, c := range map[string]struct {
		hook   Hook
		v6     bool
		toPod  bool
		change func(*packet.Packet)
		want   Verdict
		shape  Shape
	}{
		"to the host":                {DeviceIn, false, false, nil, Protect, TCP},
		"to the host, out":           {DeviceOut, false, false, nil, Free, TCP},
		"to the host over lo":        {LoopbackIn, true, false, nil, Protect, TCP},
		"to the pod, in":             {DeviceIn, false, true, nil, Free, TCP},
		"to the pod":                 {PodOut, true, true, nil, Protect, TCP},
		"to the pod by the uplink":   {DeviceOut, true, true, nil, Free, TCP},
		"to another port":            {DeviceIn, false, false, port(9), Free, TCP},
		"to the port of another":     {DeviceIn, false, false, to("10.1.0.3"), Free, TCP},
		"to loopback from outside":   {DeviceIn, false, false, to("127.0.0.1"), Protect, TCP},
		"to ::1 from outside":        {DeviceIn, true, false, to("::1"), Free, TCP},
		"to ::1 over lo":             {LoopbackIn, true, false, to("::1"), Protect, TCP},
		"TCP to broadcast":           {DeviceIn, false, false, to("10.1.0.255"), Free, TCP},
		"UDP to broadcast":           {DeviceIn, false, false, datagram("10.1.0.255"), Protect, UDP},
		"UDP to all":                 {DeviceIn, false, false, datagram("255.255.255.255"), Protect, UDP},
		"UDP to nobody":              {DeviceIn, false, false, datagram("0.0.0.0"), Protect, UDP},
		"UDP to a group":             {DeviceIn, true, false, datagram("ff02::1"), Protect, UDP},
		"UDP to a group, to the pod": {PodOut, false, true, datagram("224.0.0.251"), Protect, UDP},
		"UDP to the TCP port":        {DeviceIn, false, false, func(p *packet.Packet) { p.Protocol = packet.UDP }, Free, UDP},
		"from the port":              {DeviceOut, false, false, func(p *packet.Packet) { *p = p.Reply() }, Free, Answer},
		"ESP to the host":            {DeviceIn, true, false, protocol(packet.ESP), Protect, Encrypted},
		"ESP to another":             {DeviceIn, false, false, func(p *packet.Packet) { protocol(packet.ESP)(p); to("10.1.0.3")(p) }, Free, Encrypted},
		"GRE to the host":            {DeviceIn, false, false, protocol(packet.GRE), Free, Tunnel},
		"SCTP to the host":           {DeviceIn, false, false, protocol(132), Free, OtherProtocol},
	} {
		p := towards(c.v6, c.toPod)
		if c.change != nil {
			c.change(&p)
		}
		if j := w.Judge(at(c.hook, p.Bytes())); j.Verdict != c.want || j.Shape != c.shape {
			t.Errorf("%s: %v, %s; want %v, %s", name, j.Verdict, j.Shape, c.want, c.shape)
		}
	}
}

func port(n uint16) func(*packet.Packet) {
	return func(p *packet.Packet) { p.Dst = netip.AddrPortFrom(p.Dst.Addr(), n) }
}

func to(a string) func(*packet.Packet) {
	return func(p *packet.Packet) { p.Dst = netip.AddrPortFrom(netip.MustParseAddr(a), p.Dst.Port()) }
}

func datagram(a string) func(*packet.Packet) {
	return func(p *packet.Packet) {
		p.Protocol, p.Dst = packet.UDP, netip.AddrPortFrom(netip.MustParseAddr(a), udpPort)
	}
}

func protocol(n uint8) func(*packet.Packet) {
	return func(p *packet.Packet) { p.Payload, p.Protocol = p.Transport(), n }
}

// TestLaterFragments: IPv4 matches fragments by their protocol, so that it can be believed.
func TestLaterFragments(t *testing.T) {
	w := world()
	for _, v6 := range []bool{false, true} {
		p := towards(v6, false)
		p.Payload = make([]byte, 40)
		for i, b := range p.Fragments(24, 7) {
			if j := w.Judge(at(DeviceIn, b)); j.Verdict != Protect || j.Readable {
				t.Errorf("v6 %v, piece %d: %+v", v6, i, j)
			}
		}
		p.Dst = netip.AddrPortFrom(p.Dst.Addr(), 9)
		if j := w.Judge(at(DeviceIn, p.Fragments(24, 7)[0])); j.Verdict != Free {
			t.Errorf("v6 %v: first piece to another port: %+v", v6, j)
		}
	}
}

// TestTags: a tag of id 0 is none, at ingress; at egress nobody knows who reads it.
func TestTags(t *testing.T) {
	w := world()
	for _, c := range []struct {
		tags    []uint16
		in, out Verdict
	}{{[]uint16{0}, Protect, Protect}, {[]uint16{0, 0xe000, 0}, Protect, Protect}, {[]uint16{5}, Free, Protect}, {[]uint16{0, 5}, Free, Protect}, {[]uint16{5, 0}, Free, Protect}} {
		host, pod := towards(false, false), towards(false, true)
		host.VLANs, pod.VLANs = c.tags, c.tags
		if j := w.Judge(at(DeviceIn, host.Bytes())); j.Verdict != c.in {
			t.Errorf("tags %v in: %+v", c.tags, j)
		}
		if j := w.Judge(at(PodOut, pod.Bytes())); j.Verdict != c.out {
			t.Errorf("tags %v out: %+v", c.tags, j)
		}
	}
}

// TestRedirectsAreAboutTheirQuote holds both families' redirects to the packet that they quote.
func TestRedirectsAreAboutTheirQuote(t *testing.T) {
	w := world()
	for _, quoted := range []uint16{hostPort, 9} {
		want := map[bool]Verdict{true: Protect, false: Free}[quoted == hostPort]
		p := towards(false, false)
		p.Dst = netip.AddrPortFrom(p.Dst.Addr(), quoted)
		if j := w.Judge(at(DeviceIn, p.Reply().ICMPError(p.Src.Addr(), 5, 1, 0).Bytes())); j.Verdict != want {
			t.Errorf("port %d: %+v", quoted, j)
		}
		p = towards(true, false)
		p.Dst = netip.AddrPortFrom(p.Dst.Addr(), quoted)
		if j := w.Judge(at(DeviceIn, redirect6(p))); j.Verdict != want {
			t.Errorf("port %d, IPv6: %+v", quoted, j)
		}
	}
}

// redirect6 is a redirect of neighbour discovery about the answer to p.
func redirect6(p packet.Packet) []byte {
	quote, o := p.Reply().Build()
	quote = append(quote[o.L3:], make([]byte, 4)...)
	body := append([]byte{137, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 32)...)
	body = append(body, 4, byte(1+len(quote)/8), 0, 0, 0, 0, 0, 0)
	p.Protocol, p.Payload = packet.ICMPv6, append(body, quote...)
	return p.Bytes()
}

// FuzzJudge: no packet is too strange to be judged.
func FuzzJudge(f *testing.F) {
	w := world()
	for _, s := range shape.All() {
		for _, v6 := range []bool{false, true} {
			if p := towards(v6, false); s.Fits(p) {
				for _, b := range s.Frames(p) {
					f.Add(uint8(DeviceIn), binary.BigEndian.Uint16(b[12:]), b)
				}
			}
		}
	}
	f.Fuzz(func(t *testing.T, hook uint8, protocol uint16, b []byte) {
		j := w.Judge(Frame{Hook: Hook(hook % 6), Ifindex: pod, Protocol: protocol, Data: b})
		if j.Shape == "" || j.Verdict == Protect && !j.Owned {
			t.Errorf("%+v for %x", j, b)
		}
	})
}

// TestRemote: what a workload sends to a service on another node is to be protected where it sends, and nowhere else.
func TestRemote(t *testing.T) {
	w := world()
	w.Remote, w.Workloads = []Service{{Protocol: packet.TCP, Port: 5432, Addresses: addresses("10.1.0.9", "fd00:1::9")}}, []int{pod}
	for _, far := range addresses("10.1.0.9", "fd00:1::9") {
		p := towards(far.Is6(), false)
		p.Dst = netip.AddrPortFrom(far, 5432)
		judge := func(h Hook, ifindex int, own bool, flags uint8, port uint16) Verdict {
			q := p
			q.Flags, q.Dst = flags, netip.AddrPortFrom(far, port)
			f := at(h, q.Bytes())
			f.Ifindex, f.Own = ifindex, own
			return w.Judge(f).Verdict
		}
		for _, c := range []struct {
			name    string
			hook    Hook
			ifindex int
			own     bool
			flags   uint8
			port    uint16
			want    Verdict
		}{
			{"of the node", DeviceOut, uplink, true, packet.SYN, 5432, Protect},
			{"of the node, later", DeviceOut, uplink, true, packet.ACK, 5432, Protect},
			{"of a pod", DeviceIn, pod, false, packet.SYN, 5432, Protect},
			{"forwarded", DeviceOut, uplink, false, packet.SYN, 5432, Free},
			{"of others", DeviceIn, uplink, false, packet.SYN, 5432, Free},
			{"to a pod", PodOut, pod, true, packet.SYN, 5432, Free},
			{"reset", DeviceOut, uplink, true, packet.RST, 5432, Free},
			{"another port", DeviceOut, uplink, true, packet.SYN, 5433, Free},
		} {
			if got := judge(c.hook, c.ifindex, c.own, c.flags, c.port); got != c.want {
				t.Errorf("%v %s: %v, want %v", far, c.name, got, c.want)
			}
		}
	}
}
