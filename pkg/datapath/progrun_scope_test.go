package datapath_test

import (
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
	free := pass(flow.ReasonNone)
	return []progCase{
		to("SYN", syn, dropped),
		to("SYN of a client with ECN", syn|0xc0, dropped),
		to("in mid-stream", ack, free),
		to("answer to a client of the pod", syn|ack, free),
		{name: "link/unprotected port", want: free, packet: func(s scene) probe {
			s.server = netip.AddrPortFrom(s.server.Addr(), 9999)
			return towards(syn)(ofLink(s))
		}},
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
	runCases(t, r, linkCases())
	r.runAtSockets(t, unlistedCases(), func(s scene) scene { return s })
	r.runAtSockets(t, unlistedDatagrams(), scene.udp)
}
