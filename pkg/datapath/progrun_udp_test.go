package datapath_test

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// udp is the valid datagram that every case starts from.
func udp(from, to netip.AddrPort) packet.Packet {
	p := tcp(from, to, 0)
	p.Protocol, p.Payload = packet.UDP, []byte("a question")
	return p
}

func udpTowards(s scene) probe { return at(s.towards, s.device, udp(s.client, s.server)) }

func udpFrom(s scene) probe { return at(s.from, s.device, udp(s.server, s.client)) }

// told is a datagram whose sender is told.
func told(reason flow.Reason, state ...string) want {
	w := drop(reason, state...)
	w.verdict, w.out = actRedirect, unreachable
	w.mark = noMark
	return w
}

// unreachable is the ICMP error that answers a datagram. It quotes the headers and two bytes, in which
// the UDP checksum is 0xffff and the sum of all is nothing.
func unreachable(_ *rig, _ scene, sent []byte) []byte {
	l4 := 14 + 20
	if sent[14]>>4 == 6 {
		l4 = 14 + 40
	}
	quote := append(slices.Clone(sent[14:l4+6]), 0xff, 0xff, 0, 0)
	b := quote[l4-14:]
	sum := uint32(binary.BigEndian.Uint16(b)) + uint32(binary.BigEndian.Uint16(b[2:])) + uint32(binary.BigEndian.Uint16(b[4:]))
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[8:], ^uint16(sum))
	p := packet.Packet{SrcMAC: [6]byte(sent), DstMAC: [6]byte(sent[6:]), TTL: 64}
	if sent[14]>>4 == 6 {
		src, dst := netip.AddrFrom16([16]byte(sent[14+24:])), netip.AddrFrom16([16]byte(sent[14+8:]))
		return p.ICMPErrorQuoting(src, dst, 1, 4, 0, quote)
	}
	p.TOS, p.DF = 0xc0, true
	src, dst := netip.AddrFrom4([4]byte(sent[14+16:])), netip.AddrFrom4([4]byte(sent[14+12:]))
	return p.ICMPErrorQuoting(src, dst, 3, 3, 0, quote)
}

var udpScenes = []string{"udp host", "udp pod", "udp lo"}

// silent is a flow whose last datagram was so long ago.
func silent(d time.Duration) func(*bpf.Flow) {
	return func(f *bpf.Flow) {
		f.OpenedNs -= uint64(d)
		f.LastNs -= uint64(d)
	}
}

// datagramCases: a datagram opens its flow under a path, lives in it, or is refused.
func datagramCases() []progCase {
	active := path(datapath.PathActive)
	to := func(name string, w want, g ...given) progCase {
		return progCase{name: "udp/" + name, scenes: udpScenes, packet: udpTowards, given: g, want: w}
	}
	back := func(name string, w want, g ...given) progCase {
		return progCase{name: "udp/answer, " + name, scenes: udpScenes, packet: udpFrom, given: g, want: w}
	}
	opened := pass(flow.ReasonPathOpen, "flow 1/0").recorded("OPEN PATH_OPEN 1/0")
	return []progCase{
		to("no path", told(flow.ReasonUDPNoPath)),
		to("no path, marked", told(flow.ReasonUDPNoPath), markedBy(5)),
		to("live path", opened, active),
		to("path of another client", told(flow.ReasonUDPNoPath), path(datapath.PathActive, func(k *bpf.PathKey, _ *bpf.PathRef, _ *bpf.Path) { k.Client.Bytes[15]++ })),
		to("past deadline", told(flow.ReasonPathExpired), path(datapath.PathActive, deadline(-1))),
		to("revoked", told(flow.ReasonPathRevoked), path(datapath.PathRevoked)),
		to("lease lapsed", told(flow.ReasonLeaseLapsed), active, lapsed),
		to("leg of TCP with the same tuple", pass(flow.ReasonPathOpen, "flow 1/0", "leg up").recorded("OPEN PATH_OPEN 1/0"), active, leg(up)),
		to("mark of TCP with the same tuple", told(flow.ReasonUDPNoPath, "leg up"), leg(up), marked(up)),
		to("no configuration", drop(flow.ReasonNoConfig), active, noConfig),
		to("live flow", pass(flow.ReasonPathLive, "flow 1/0"), active, bypassed()),
		to("live flow, lease lapsed", pass(flow.ReasonPathLive, "flow 1/0"), active, bypassed(), lapsed),
		to("silent for almost too long", pass(flow.ReasonPathLive, "flow 1/0"), active, bypassed(silent((udpIdle-5)*time.Second))),
		to("silent for too long, path lives", opened.recorded("CLOSE UDP_IDLE 0/0"), active, bypassed(silent((udpIdle+1)*time.Second))),
		to("silent for too long, no path", told(flow.ReasonPathRevoked).recorded("CLOSE UDP_IDLE 0/0"), path(datapath.PathRevoked), bypassed(silent((udpIdle+1)*time.Second))),
		to("flow of a revoked path", told(flow.ReasonPathRevoked).recorded("END PATH_REVOKED 0/0", "CLOSE PATH_REVOKED 0/0"), path(datapath.PathRevoked), bypassed()),
		to("flow past its deadline", told(flow.ReasonPathExpired).recorded("END PATH_EXPIRED 0/0", "CLOSE PATH_EXPIRED 0/0"), path(datapath.PathActive, deadline(-1)), bypassed()),
		to("flow of another service", opened.recorded("END PATH_STALE 0/0 service=99", "CLOSE PATH_STALE 0/0 service=99"), active,
			bypassed(func(f *bpf.Flow) { f.ServiceId = 99 })),
		back("no flow", drop(flow.ReasonUDPNoFlow)),
		back("no flow, live path", drop(flow.ReasonUDPNoFlow), active),
		back("live flow", pass(flow.ReasonPathLive, "flow 0/1 ANSWERED"), active, bypassed()),
		back("silent for too long", drop(flow.ReasonUDPIdle, "flow 0/0 ended=UDP_IDLE"), active, bypassed(silent((udpIdle+1)*time.Second))),
		back("revoked", drop(flow.ReasonPathRevoked, "flow 0/0 ended=PATH_REVOKED").recorded("END PATH_REVOKED 0/0"), path(datapath.PathRevoked), bypassed()),
	}
}

// refusedCases: UDP to a port of TCP, and whose business a datagram is.
func refusedCases() []progCase {
	active := path(datapath.PathActive)
	web := func(s scene) scene {
		id, port := uint32(hostWebID), uint16(hostWebPort)
		if s.name == "udp pod" {
			id, port = podWebID, podWebPort
		}
		s.service, s.server = id, netip.AddrPortFrom(s.server.Addr(), port)
		return s
	}
	webPath := func(t testing.TB, r *rig, s scene, p *probe) { active(t, r, web(s), p) }
	to := func(name string, w want, send func(s scene) probe, g ...given) progCase {
		return progCase{name: "udp/" + name, scenes: udpScenes, packet: send, given: g, want: w}
	}
	denied := told(flow.ReasonUDPDenied)
	denied.records = []string{"DENY UDP_DENIED web"}
	none := pass(flow.ReasonNone)
	noOptions := drop(flow.ReasonUDPNoPath) // dropped, but nobody is told
	multicast := map[lab.Family]netip.Addr{lab.IPv4: netip.MustParseAddr("224.0.0.251"), lab.IPv6: netip.MustParseAddr("ff02::fb")}
	return []progCase{
		to("port of TCP", denied, func(s scene) probe { return udpTowards(web(s)) }),
		to("port of TCP, live path", denied, func(s scene) probe { return udpTowards(web(s)) }, webPath),
		to("answer to a client at a port of TCP", none, func(s scene) probe { return udpFrom(web(s)) }),
		to("unprotected port", none, func(s scene) probe {
			s.server = netip.AddrPortFrom(s.server.Addr(), 9999)
			return udpTowards(s)
		}),
		to("port of a TCP service that allows UDP", none, func(s scene) probe {
			s.server = netip.AddrPortFrom(s.server.Addr(), map[bool]uint16{true: podPort, false: hostPort}[s.name == "udp pod"])
			return udpTowards(s)
		}),
		to("TCP to a port of UDP", none, func(s scene) probe {
			s.server = netip.AddrPortFrom(s.server.Addr(), podUDPPort)
			return at(s.towards, s.device, tcp(s.client, s.server, syn))
		}),
		to("with IPv4 options", noOptions, func(s scene) probe {
			p := udp(s.client, s.server)
			p.Options = []byte{1, 1, 1, 1}
			return at(s.towards, s.device, p)
		}).family(lab.IPv4),
		to("with extension headers", noOptions, func(s scene) probe {
			p := udp(s.client, s.server)
			p.Extensions = []packet.Extension{{Type: packet.DestOptions, Body: packet.SkippedOption(8)}}
			return at(s.towards, s.device, p)
		}).family(lab.IPv6),
		{name: "udp/forwarded to a host port", scenes: []string{"udp host"}, want: none, packet: func(s scene) probe {
			return at(s.towards, s.device, udp(s.client, netip.AddrPortFrom(foreign(s), hostUDPPort)))
		}},
		{name: "udp/forwarded from a host port", scenes: []string{"udp host"}, want: none, packet: func(s scene) probe {
			return at(s.from, s.device, udp(netip.AddrPortFrom(foreign(s), hostUDPPort), s.client))
		}},
		{name: "udp/to a group", scenes: []string{"udp host"}, want: want{verdict: actDrop, counts: one(flow.ReasonUDPNoPath), records: []string{"DENY UDP_NO_PATH group"}},
			packet: func(s scene) probe {
				return at(s.towards, s.device, udp(s.client, netip.AddrPortFrom(multicast[s.family], hostUDPPort)))
			}},
		{name: "udp/without payload", scenes: udpScenes, want: told(flow.ReasonUDPNoPath), packet: func(s scene) probe {
			p := udp(s.client, s.server)
			p.Payload = nil
			return at(s.towards, s.device, p)
		}},
		{name: "udp/of one byte", scenes: udpScenes, want: told(flow.ReasonUDPNoPath), packet: func(s scene) probe {
			p := udp(s.client, s.server)
			p.Payload = []byte{1}
			return at(s.towards, s.device, p)
		}},
	}
}

// family limits a case to one address family.
func (c progCase) family(f lab.Family) progCase {
	c.only = f
	return c
}

func udpCases() []progCase { return slices.Concat(datagramCases(), refusedCases()) }

func TestDatagrams(t *testing.T) {
	r := newRig(t, 4096, 4096)
	runCases(t, r, udpCases())
}

// onOneCPU keeps the test, and what it has the kernel run, on the first CPU that it may have. The thread ends with the test.
func onOneCPU(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	var may, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		t.Fatal(err)
	}
	for cpu := range 1024 {
		if may.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
}

// TestAnswersAreBounded: each CPU answers a burst of refusals, and so many a second; the others are silent. On a machine that
// refuses more slowly than that nothing is to be silent.
func TestAnswersAreBounded(t *testing.T) {
	onOneCPU(t)
	r := newRig(t, 4096, 4096)
	for _, f := range lab.Families() {
		s := r.scenes(t, f)["udp host"]
		r.reset(t)
		answered := 0
		const sent, burst, rate = 3000, 200, 1000
		began := time.Now()
		for range sent {
			if verdict, _, _ := r.send(t, udpTowards(s)); verdict == actRedirect {
				answered++
			}
		}
		took := time.Since(began)
		t.Logf("%v: %d of %d refusals were answered in %v", f, answered, sent, took)
		if most := burst + int(took.Seconds()*rate) + 1; answered < burst || answered > most {
			t.Errorf("%v: %d of %d refusals were answered in %v, want %d to %d", f, answered, sent, took, burst, most)
		}
		if c := r.counters(t)[flow.ReasonUDPNoPath]; c.Packets != sent {
			t.Errorf("%v: counted %d refusals, want %d", f, c.Packets, sent)
		}
	}
}
