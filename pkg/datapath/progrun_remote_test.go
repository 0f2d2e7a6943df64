package datapath_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

const (
	remotePort = 5432
	remoteID   = 21
)

// remoteAddr is another node's, behind the uplink.
func remoteAddr(f lab.Family) netip.Addr {
	return netip.MustParseAddr(map[lab.Family]string{lab.IPv4: "10.1.0.9", lab.IPv6: "fd00:1::9"}[f])
}

// newRemoteRig protects a service on another node besides the others. Its first pod's device is not known for one.
func newRemoteRig(t testing.TB) *rig {
	r := newRig(t, 4096, 4096)
	_, err := r.d.SetServices(append(r.d.Services(), datapath.Service{ID: remoteID, Name: "remote", Target: datapath.TargetRemote,
		Addresses: []netip.Addr{remoteAddr(lab.IPv4), remoteAddr(lab.IPv6)}, Ports: []uint16{remotePort}}))
	check(t, err)
	return r
}

// remoteScenes are the places where a workload of the node asks. A test run's packets are of a socket of the node.
func (r *rig) remoteScenes(t testing.TB, f lab.Family) map[string]scene {
	in, out := bpf.SallyportSpHookSP_HOOK_IN, bpf.SallyportSpHookSP_HOOK_OUT
	of := func(hook bpf.SallyportSpHook, device string, client netip.Addr, towards, from string) scene {
		return scene{family: f, hook: hook, device: r.device(t, device), client: netip.AddrPortFrom(client, clientPort),
			server: netip.AddrPortFrom(remoteAddr(f), remotePort), service: remoteID, protocol: packet.TCP, towards: towards, from: from}
	}
	return map[string]scene{
		"node":            of(out, lab.Uplink, r.Node.Addr(f), "sp_dev_out", "sp_dev_in"),
		"node by bridge":  of(out, lab.PodDevice(0), r.Node.Addr(f), "sp_bridge_out", "sp_bridge_in"),
		"pod":             of(in, lab.PodDevice(1), r.Pods[1].Addr(f), "sp_dev_in", "sp_pod_out"),
		"pods' bridge":    of(in, lab.PodDevice(1), r.Pods[1].Addr(f), "sp_bridge_in", "sp_bridge_out"),
		"pod in any hook": of(in, lab.PodDevice(1), r.Pods[1].Addr(f), "sp_dev_in", "sp_dev_out"),
	}
}

// remoteFacts are those of a node whose second pod is known.
func remoteFacts(t testing.TB, r *rig, _ scene, _ *probe) {
	for name, facts := range map[string]bpf.SallyportSpFact{lab.Uplink: uplinkFact, lab.PodDevice(1): bound} {
		check(t, r.m.SpDevices.Put(uint32(r.device(t, name)), &bpf.Device{Facts: facts}))
	}
}

var everyRemote = []string{"node", "node by bridge", "pod", "pods' bridge", "pod in any hook"}

// bridgeFacts have a bridge of pods in place of the second pod.
func bridgeFacts(t testing.TB, r *rig, s scene, p *probe) {
	remoteFacts(t, r, s, p)
	check(t, r.m.SpDevices.Put(uint32(r.device(t, lab.PodDevice(1))), &bpf.Device{Facts: bpf.SallyportSpFactSP_DEVICE_PODS}))
}

// runRemote is runCases for the scenes of a service on another node.
func runRemote(t *testing.T, r *rig, cases []progCase) {
	t.Helper()
	for _, c := range cases {
		if c.scenes == nil {
			c.scenes = everyRemote
		}
		given := c.given
		for _, f := range lab.Families() {
			scenes := r.remoteScenes(t, f)
			for _, name := range c.scenes {
				facts := remoteFacts
				if name == "pods' bridge" {
					facts = bridgeFacts
				}
				c.given = slices.Insert(slices.Clone(given), 0, facts)
				t.Run(c.name+"/"+name+"/"+f.String(), func(t *testing.T) { c.run(t, r, scenes[name]) })
			}
		}
	}
}

// misplaced puts the leg or stray where another hook or device than the scene's would have it.
func misplaced(g given, move func(r *rig, s *scene)) given {
	return func(t testing.TB, r *rig, s scene, p *probe) {
		move(r, &s)
		g(t, r, s, p)
	}
}

func byAnotherDevice(r *rig, s *scene) { s.device = nowhere(r) }

func nowhere(r *rig) int { return r.px1 + 100 }

func placedAt(hook, device int) string { return fmt.Sprintf(" at hook %d device %d", hook, device) }

func byAnotherHook(_ *rig, s *scene) {
	s.hook = bpf.SallyportSpHookSP_HOOK_IN + bpf.SallyportSpHookSP_HOOK_OUT - s.hook
}

// remoteTowardsCases: what a workload sends goes to the proxy, and a connection that was there before is reset.
func remoteTowardsCases() []progCase {
	to := func(name string, flags uint8, w want, g ...given) progCase {
		return progCase{name: "remote/towards, " + name, packet: towards(flags), given: g, want: w}
	}
	begins := steer(flow.ReasonNoPath, "leg down", "origin")
	again := want{verdict: actNext, counts: one(flow.ReasonReinjected), mark: noMark}
	of := func(w want, state ...string) want { w.state = state; return w }
	return []progCase{
		to("SYN", syn, begins),
		to("SYN of an old connection's tuple", syn, begins, leg(down)),
		to("SYN, whatever paths there are", syn, begins, path(datapath.PathActive)),
		to("leg", ack, steer(flow.ReasonLeg, "leg down"), leg(down)),
		to("leg, end", packet.RST, steer(flow.ReasonLeg, "leg down RST"), leg(down)),
		to("nothing", ack, steer(flow.ReasonStray, "stray down")),
		to("answer", syn|ack, steer(flow.ReasonStray, "stray down")),
		to("reset of nothing", packet.RST, pass(flow.ReasonNone)),
		to("flags of no connection", syn|packet.FIN, drop(flow.ReasonBadFlags)),
		to("put back", ack, of(again, "leg up"), leg(up), marked(up)),
		to("put back, reset of a stray", packet.RST, of(again, "stray up"), stray(up), marked(up)),
		to("somebody's mark", syn, begins, markedBy(7)),
		{name: "remote/towards, segment size", scenes: []string{"pod"}, packet: func(s scene) probe {
			p := tcp(s.client, s.server, syn)
			p.TCPOptions = mss(0xffff)
			return at(s.towards, s.device, p)
		}, want: resized(begins)},
	}
}

// resized is a steered SYN that asks for no larger segment than a pod's device carries.
func resized(w want) want {
	w.out = func(r *rig, s scene, _ []byte) []byte {
		p := tcp(s.client, s.server, syn)
		p.SrcMAC, p.DstMAC = r.cfg.Stamp, [6]byte{}
		p.TCPOptions = mss(1500 - map[lab.Family]int{lab.IPv4: 40, lab.IPv6: 60}[s.family])
		return p.Bytes()
	}
	return w
}

// remoteFromCases: what such a service sends is the proxy's if it answers the proxy, else it is nobody's business.
func remoteFromCases(t testing.TB, r *rig) []progCase {
	from := func(name string, flags uint8, w want, g ...given) progCase {
		return progCase{name: "remote/from, " + name, packet: from(flags), given: g, want: w}
	}
	none := pass(flow.ReasonNone)
	again := want{verdict: actNext, counts: one(flow.ReasonReinjected), mark: noMark, state: []string{"leg down"}}
	elsewhere := func(c progCase, scenes ...string) progCase { c.scenes = scenes; return c }
	legAt := func(where string) want { return pass(flow.ReasonNone, "leg up"+where) }
	uplink, pod1 := r.device(t, lab.Uplink), r.device(t, lab.PodDevice(1))
	return []progCase{
		from("leg, SYN-ACK", syn|ack, steer(flow.ReasonLeg, "leg up"), leg(up)),
		from("leg", ack, steer(flow.ReasonLeg, "leg up ANSWERED"), leg(up)),
		from("leg of the client", ack, pass(flow.ReasonNone, "leg down"), leg(down)),
		from("nothing", ack, none),
		from("SYN", syn, none),
		from("flags of no connection", syn|packet.FIN, none),
		from("put back", ack, again, leg(down), marked(down)),
		{name: "remote/from, in at a port", scenes: []string{"node"}, given: []given{leg(up)}, want: legAt(""), packet: func(s scene) probe {
			return at("sp_port_in", s.device, tcp(s.server, s.client, ack))
		}},
		{name: "remote/from, on lo", scenes: []string{"node"}, given: []given{leg(up)}, want: legAt(""), packet: func(s scene) probe {
			return at("sp_lo_in", 1, tcp(s.server, s.client, ack))
		}},
		elsewhere(from("leg of another device", ack, legAt(placedAt(1, nowhere(r))), misplaced(leg(up), byAnotherDevice)), "pod", "pods' bridge"),
		elsewhere(from("leg of another device, of the node", ack, steer(flow.ReasonLeg, "leg up"+placedAt(2, nowhere(r))+" ANSWERED"), misplaced(leg(up), byAnotherDevice)), "node", "node by bridge"),
		elsewhere(from("leg of the other hook", ack, legAt(placedAt(1, uplink)), misplaced(leg(up), byAnotherHook)), "node"),
		elsewhere(from("leg of the other hook", ack, legAt(placedAt(2, pod1)), misplaced(leg(up), byAnotherHook)), "pod", "pods' bridge"),
	}
}

// remoteElsewhereCases: where no workload of this node asks, nothing is done.
func remoteElsewhereCases(t testing.TB, r *rig) []progCase {
	uplink, pod0, pod1 := r.device(t, lab.Uplink), r.device(t, lab.PodDevice(0)), r.device(t, lab.PodDevice(1))
	none := pass(flow.ReasonNone)
	not := func(name, program string, device int, scenes []string, g ...given) []progCase {
		w := none
		if program == "sp_cg_in" {
			w.verdict = cgPass
		}
		to := func(flags uint8) func(scene) probe {
			return func(s scene) probe { return at(program, device, tcp(s.client, s.server, flags)) }
		}
		return []progCase{
			{name: "remote/not, " + name + ", SYN", scenes: scenes, packet: to(syn), given: g, want: w},
			{name: "remote/not, " + name + ", mid-stream", scenes: scenes, packet: to(ack), given: g, want: w},
		}
	}
	odd := func(name string, frame func(s scene) packet.Packet) progCase {
		return progCase{name: "remote/not, " + name, want: none, packet: func(s scene) probe { return at(s.towards, s.device, frame(s)) }}
	}
	pod, node := []string{"pod"}, []string{"node"}
	return slices.Concat(
		not("in by an uplink", "sp_dev_in", uplink, node, removeFacts),
		not("in by a device that is not known", "sp_dev_in", pod0, pod),
		not("out to a pod", "sp_pod_out", pod0, node),
		not("out to a pod that is known", "sp_pod_out", pod1, node),
		not("out to a bridge of pods", "sp_bridge_out", pod1, node, bridgeFacts),
		not("in at a port", "sp_port_in", pod1, pod),
		not("out at a port", "sp_port_out", pod0, node),
		not("out at a pod's port", "sp_pod_port_out", pod0, node),
		not("on lo", "sp_lo_in", 1, node),
		not("at a socket", "sp_cg_in", uplink, node),
		not("of another namespace's socket", "sp_dev_out", uplink, node, otherNetns),
		not("of another namespace's socket by a bridge", "sp_bridge_out", pod0, node, otherNetns),
		[]progCase{
			odd("another port", func(s scene) packet.Packet {
				return tcp(s.client, netip.AddrPortFrom(s.server.Addr(), 9999), syn)
			}),
			odd("the same port of another machine", func(s scene) packet.Packet {
				return tcp(s.client, netip.AddrPortFrom(another(s.server.Addr()), remotePort), syn)
			}),
			odd("datagram", func(s scene) packet.Packet { return udp(s.client, s.server) }),
			{name: "remote/not, lie about the source", scenes: []string{"pod"}, want: want{verdict: actDrop, counts: one(flow.ReasonSourceForeign)}, unread: true,
				packet: func(s scene) probe {
					return at(s.towards, s.device, tcp(netip.AddrPortFrom(another(s.server.Addr()), clientPort), s.server, syn))
				}},
			{name: "remote/not, fragment", scenes: []string{"node", "pod"}, want: none, packet: func(s scene) probe {
				p := tcp(s.client, s.server, syn)
				p.Payload = make([]byte, 64)
				b := p.Fragments(40, 9)[0]
				return probe{program: s.towards, ctx: skBuff{Ifindex: uint32(s.device)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
			}},
		})
}

// removeFacts forgets the devices: an uplink would refuse the node's own address as a source.
func removeFacts(t testing.TB, r *rig, _ scene, _ *probe) {
	empty[uint32, bpf.Device](t, r.m.SpDevices)
}

// otherNetns makes the sockets of a test run those of another namespace.
func otherNetns(t testing.TB, r *rig, _ scene, _ *probe) {
	c := r.cfg
	c.HostNetns++
	check(t, r.m.SpConfig.Put(uint32(0), &c))
}

// another is a neighbour of an address.
func another(a netip.Addr) netip.Addr { return a.Next() }

// remoteErrorCases: ICMP errors of the proxy's connections find the proxy, others their way.
func remoteErrorCases(r *rig) []progCase {
	of := func(name string, send func(scene) probe, w want, g ...given) progCase {
		return progCase{name: "remote/icmp, " + name, packet: send, given: g, want: w}
	}
	to, back, none := errorTowards(size), errorFrom(size), pass(flow.ReasonNone)
	redirected := func(s scene) probe {
		return at(s.towards, s.device, redirect(s, quoted(s, s.server, s.client), s.server.Addr()))
	}
	pods := of("back, leg of another device", back, pass(flow.ReasonNone, "leg up"+placedAt(1, nowhere(r))), misplaced(leg(up), byAnotherDevice))
	pods.scenes = []string{"pod", "pods' bridge"}
	return []progCase{
		of("towards, leg", to, steer(flow.ReasonICMPLeg, "leg down"), leg(down)),
		of("towards, nothing", to, none),
		of("towards, leg of the other side", to, pass(flow.ReasonNone, "leg up"), leg(up)),
		of("redirect, leg", redirected, drop(flow.ReasonICMPStray, "leg down"), leg(down)),
		of("redirect, nothing", redirected, none),
		of("back, leg", back, steer(flow.ReasonICMPLeg, "leg up"), leg(up)),
		of("back, nothing", back, none),
		of("back, leg of the client", back, pass(flow.ReasonNone, "leg down"), leg(down)),
		pods,
	}
}

// remotePx0Cases: the proxy may dial where the client came from, and its packets leave there.
func remotePx0Cases(px0 int) []progCase {
	dial := func(s scene) probe { return at("sp_px0_in", px0, tcp(s.client, s.server, syn)) }
	return []progCase{
		{name: "remote/px0, dial", packet: dial, given: []given{origin}, want: want{verdict: actRedirect, counts: one(flow.ReasonPxUp),
			state: []string{"leg up", "origin"}, mark: func(r *rig, s scene) uint32 { return markOf(r, s, up) }}},
		{name: "remote/px0, dial for nobody", packet: dial, want: want{verdict: actDrop, counts: one(flow.ReasonPxNoOrigin)}},
	}
}

func TestRemotePrograms(t *testing.T) {
	r := newRemoteRig(t)
	r.settle(t)
	runRemote(t, r, slices.Concat(remoteTowardsCases(), remoteFromCases(t, r), remoteElsewhereCases(t, r), remoteErrorCases(r), remotePx0Cases(r.px.Px0())))
}

// TestRemoteIsNoBusinessOfTheFilter: neither limits of SYNs nor faults are about a service on another node, and nothing that
// sockets here got is compared with what goes there.
func TestRemoteIsNoBusinessOfTheFilter(t *testing.T) {
	r := newRemoteRig(t)
	check(t, r.d.LimitSYNs(datapath.SYNLimit{Rate: 1, Burst: 1}, datapath.SYNLimit{Rate: 1, Burst: 1}))
	check(t, r.d.SetSources([]netip.Prefix{host(remoteAddr(lab.IPv4)), host(remoteAddr(lab.IPv6))}, nil))
	for _, f := range lab.Families() {
		s := r.remoteScenes(t, f)["node"]
		s.client = netip.AddrPortFrom(r.Client.Addr(f), clientPort)
		if n := r.admitted(t, tcp(s.client, s.server, syn).Bytes(), 50); n != 50 {
			t.Errorf("%v: %d of 50 SYNs towards it passed", f, n)
		}
		if n := r.admitted(t, tcp(s.server, s.client, ack).Bytes(), 50); n != 50 {
			t.Errorf("%v: %d of 50 packets from it passed, whose source would be refused", f, n)
		}
	}
	traffic, err := r.d.Traffic()
	check(t, err)
	if _, ok := traffic[remoteID]; ok {
		t.Errorf("its volumes are compared: %v", slices.Collect(maps.Keys(traffic)))
	}
}

// TestRemoteOwnsNothing: addresses of other nodes take whatever is sent to them, and alone they protect nothing here.
func TestRemoteOwnsNothing(t *testing.T) {
	r := newRemoteRig(t)
	for k := range all[bpf.OwnerKey, bpf.Owner](t, r.m.SpOwners) {
		if a := datapath.FromAddr(k.Address); a == remoteAddr(lab.IPv4) || a == remoteAddr(lab.IPv6) {
			t.Errorf("%v owns a port", a)
		}
	}
	services := r.d.Services()
	_, err := r.d.SetServices(services[len(services)-1:])
	check(t, err)
	var word bpf.Ports
	check(t, r.m.SpPorts.Lookup(uint32(0), &word))
	if word.Bits != 0 {
		t.Errorf("the first ports have flags %#x", word.Bits)
	}
	for _, change := range []func(*datapath.Service){
		func(s *datapath.Service) { s.Protocol = datapath.UDP },
		func(s *datapath.Service) { s.Mode = datapath.Shadow },
		func(s *datapath.Service) { s.DenyUDP = true },
		func(s *datapath.Service) { s.Ifindex = 1 },
	} {
		s := services[len(services)-1]
		change(&s)
		if _, err := r.d.SetServices([]datapath.Service{s}); err == nil {
			t.Errorf("%+v was taken", s)
		}
	}
}
