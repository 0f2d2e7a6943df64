package datapath_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// ofLink is the scene's service at an address that its link gave the pod, and ofGroup at a group's: no table has either.
func ofLink(s scene) scene {
	a := map[lab.Family]string{lab.IPv4: "169.254.7.7", lab.IPv6: "fe80::7"}[s.family]
	s.server = netip.AddrPortFrom(netip.MustParseAddr(a), s.server.Port())
	return s
}

// ofAnother is the service at an address of the pod that no policy lists.
func ofAnother(s scene) scene {
	s.server = netip.AddrPortFrom(foreign(s), s.server.Port())
	return s
}

func ofGroup(s scene) scene {
	a := map[lab.Family]string{lab.IPv4: "224.0.0.251", lab.IPv6: "ff02::fb"}[s.family]
	s.server = netip.AddrPortFrom(netip.MustParseAddr(a), s.server.Port())
	return s
}

// linkCases: what goes out to a pod at an address that its link gave it.
func linkCases() []progCase {
	to := func(name string, flags uint8, w want) progCase {
		return progCase{name: "link/" + name, packet: func(s scene) probe { return towards(flags)(ofLink(s)) }, want: w}.in("pod")
	}
	dropped := drop(flow.ReasonLinkLocal)
	dropped.records = []string{"DENY LINK_LOCAL link"}
	free, closed := pass(flow.ReasonNone), drop(flow.ReasonUnlisted)
	closed.records = []string{"DENY UNLISTED link"}
	return []progCase{
		to("SYN", syn, dropped),
		to("SYN of a client with ECN", syn|0xc0, dropped),
		to("in mid-stream", ack, closed),
		to("SYN-ACK", syn|ack, closed),
		behindAnother(to("in mid-stream, to another pod", ack, free)),
		behindAnother(to("answer to a client of another pod", syn|ack, free)),
		{name: "link/unprotected port", want: free, packet: func(s scene) probe {
			s.server = netip.AddrPortFrom(s.server.Addr(), 9999)
			return towards(syn)(ofLink(s))
		}},
	}
}

// behindAnother is the case at a pod that has none of the services.
func behindAnother(c progCase) progCase {
	c.given = append(c.given, byAnotherPod)
	return c
}

// anotherCases: what goes out to a pod at an address of its own that is in no table.
func anotherCases() []progCase {
	to := func(name string, w want, packet func(scene) probe) progCase {
		return progCase{name: "another address/" + name, packet: func(s scene) probe { return packet(ofAnother(s)) }, want: w}.in("pod")
	}
	refused := func(r flow.Reason) want {
		w := drop(r)
		w.records = []string{fmt.Sprintf("DENY %s elsewhere", r)}
		return w
	}
	closed, free := refused(flow.ReasonUnlisted), pass(flow.ReasonNone)
	fragment := func(s scene) probe {
		p := tcp(s.client, s.server, syn)
		p.Payload = make([]byte, 64)
		b := p.Fragments(40, 99)[0]
		return probe{program: s.towards, ctx: skBuff{Ifindex: uint32(s.device)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
	}
	return []progCase{
		to("SYN", closed, towards(syn)),
		to("in mid-stream", closed, towards(ack)),
		to("reset", closed, towards(packet.RST)),
		to("no flags", closed, towards(0)),
		to("another port", free, func(s scene) probe { s.server = netip.AddrPortFrom(s.server.Addr(), 9999); return towards(syn)(s) }),
		to("port of the node's service", free, func(s scene) probe { s.server = netip.AddrPortFrom(s.server.Addr(), hostPort); return towards(syn)(s) }),
		behindAnother(to("SYN to another pod", free, towards(syn))),
		behindAnother(to("fragment to another pod", free, fragment)),
		to("datagram", refused(flow.ReasonUDPDenied), udpTowards).in("udp pod"),
		to("fragment", portless(refused(flow.ReasonFragment)), fragment),
		to("answer by another pod's service", free, func(s scene) probe { return at("sp_dev_in", s.device, tcp(s.server, s.client, syn|ack)) }),
	}
}

// unlistedCases are the same at the socket, where the device of the pod had no hooks.
func unlistedCases() []progCase {
	refused := turnedAway(flow.ReasonBackstop)
	send := func(name, record string, flags uint8, w want, at func(scene) scene, g ...given) progCase {
		if len(w.records) > 0 {
			w.records = []string{w.records[0] + " " + record}
		}
		return progCase{name: "socket/unlisted/" + name, packet: func(s scene) probe { return atSocket(flags)(at(s)) }, want: w,
			given: append([]given{where}, g...)}.in("pod")
	}
	free := admitted(flow.ReasonNone)
	return []progCase{
		send("SYN at the link", "link", syn, refused, ofLink),
		send("SYN at a group", "group", syn, refused, ofGroup),
		send("mid-stream at the link", "", ack, free, ofLink),
		send("reset at the link", "", packet.RST, free, ofLink),
		send("SYN of the pod itself", "", syn, free, ofLink, onLoopback),
		send("SYN in the node", "", syn, free, ofLink, func(_ testing.TB, r *rig, _ scene, p *probe) { p.in = r.Node }),
	}
}

func unlistedDatagrams() []progCase {
	send := func(name string, w want, at func(scene) scene, g ...given) progCase {
		if len(w.records) > 0 {
			w.records = []string{w.records[0] + " " + name}
		}
		return progCase{name: "socket/unlisted/datagram/" + name, packet: func(s scene) probe { return atSocketUDP(at(s)) }, want: w,
			given: append([]given{where}, g...)}.in("pod")
	}
	return []progCase{
		send("link", turnedAway(flow.ReasonBackstop), ofLink),
		send("group", turnedAway(flow.ReasonBackstop), ofGroup),
		send("of the pod itself", admitted(flow.ReasonNone), ofGroup, onLoopback),
	}
}

func atSocketUDP(s scene) probe { return at("sp_cg_in", s.device, udp(s.client, s.server)) }

// TestUnlisted: addresses of a link and of groups are in no table, and no way to a pod's service.
func TestUnlisted(t *testing.T) {
	r := newRig(t, 4096, 4096)
	runCases(t, r, append(linkCases(), anotherCases()...))
	t.Run("sockets", func(t *testing.T) {
		needSocketRuns(t)
		r.runAtSockets(t, unlistedCases(), func(s scene) scene { return s })
		r.runAtSockets(t, unlistedDatagrams(), scene.udp)
	})
}
