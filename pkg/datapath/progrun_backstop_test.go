package datapath_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// Verdicts of a program of a control group.
const (
	cgDrop int32 = 0
	cgPass int32 = 1
)

// socketScenes are where packets of a scene meet a socket: in the node for a service of the host, in
// the pod for that of a pod, by the device there.
func (r *rig) socketScenes(t testing.TB, f lab.Family) map[string]scene {
	t.Helper()
	out := r.scenes(t, f)
	pod := out["pod"]
	var err error
	pod.device, err = r.Pod.Ifindex("eth0")
	check(t, err)
	out["pod"] = pod
	return out
}

// atSocket is a packet that reaches a socket where its service lives.
func atSocket(flags uint8) func(scene) probe {
	return func(s scene) probe { return at("sp_cg_in", s.device, tcp(s.client, s.server, flags)) }
}

// where runs the packet in the namespace of the scene's service.
func where(_ testing.TB, r *rig, s scene, p *probe) {
	if s.service == podID || s.service == podUDPID {
		p.in = r.Pod
	}
}

// admitted and turnedAway are what the backstop says.
func admitted(reason flow.Reason, state ...string) want {
	w := pass(reason, state...)
	w.verdict = cgPass
	return w
}

func turnedAway(reason flow.Reason, state ...string) want {
	w := want{verdict: cgDrop, counts: one(reason), state: state}
	if reason != flow.ReasonSocketEnded {
		w.records = []string{"BACKSTOP " + reason.String()}
	}
	return w
}

func backstopCases() []progCase {
	send := func(name string, flags uint8, w want, g ...given) progCase {
		return progCase{name: "socket/" + name, packet: atSocket(flags), want: w, given: append([]given{where}, g...)}
	}
	active := path(datapath.PathActive)
	none := admitted(flow.ReasonNone)
	backstop := turnedAway(flow.ReasonBackstop)
	return []progCase{
		send("nothing explains a SYN", syn, backstop),
		send("nothing explains it in mid-stream", ack, backstop),
		send("nothing explains a reset", packet.RST, backstop),
		send("no configuration", syn, turnedAway(flow.ReasonNoConfig), noConfig),
		send("a path is no flow", syn, backstop, active),
		send("leg of the proxy, SYN", syn, admitted(flow.ReasonSocketLeg, "leg up"), leg(up)),
		send("leg of the proxy", ack, admitted(flow.ReasonSocketLeg, "leg up"), leg(up)),
		send("leg of the client", ack, turnedAway(flow.ReasonBackstop, "leg down"), leg(down)),
		send("live path, SYN", syn, admitted(flow.ReasonSocketPath, "flow 0/0"), active, bypassed()),
		send("live path", ack, admitted(flow.ReasonSocketPath, "flow 0/0"), active, bypassed()),
		send("path expired", ack, turnedAway(flow.ReasonSocketEnded, "flow 0/0"), path(datapath.PathActive, deadline(-1)), bypassed()),
		send("path revoked", ack, turnedAway(flow.ReasonSocketEnded, "flow 0/0"), path(datapath.PathRevoked), bypassed()),
		send("path of another grant", ack, turnedAway(flow.ReasonSocketEnded, "flow 0/0 slot=0 epoch=2"), active, bypassed(func(f *bpf.Flow) { f.Epoch = 2 })),
		send("flow ended", ack, turnedAway(flow.ReasonSocketEnded, "flow 0/0 ended=PATH_EXPIRED"), active, bypassed(ended(flow.ReasonPathExpired))),
		send("flow of another service", ack, turnedAway(flow.ReasonSocketEnded, "flow 0/0 service=77"), active, bypassed(func(f *bpf.Flow) { f.ServiceId = 77 })),
		send("reset of an ended flow", packet.RST, admitted(flow.ReasonSocketReset, "flow 0/0"), path(datapath.PathRevoked), bypassed()),
		send("reset for the service's stray", packet.RST, admitted(flow.ReasonSocketReset, "stray up"), stray(up)),
		send("more than a reset for a stray", ack, turnedAway(flow.ReasonBackstop, "stray up"), stray(up)),
		send("reset made of the client's stray", packet.RST, admitted(flow.ReasonSocketReset, "stray down"), stray(down)),
		send("more than a reset for the client's stray", ack, turnedAway(flow.ReasonBackstop, "stray down"), stray(down)),
		send("unprotected port", syn, none, func(_ testing.TB, _ *rig, s scene, p *probe) {
			s.server = netip.AddrPortFrom(s.server.Addr(), 9999)
			p.frame = tcp(s.client, s.server, syn).Bytes()
		}),
		send("not TCP", syn, none, func(_ testing.TB, _ *rig, _ scene, p *probe) { p.frame[12], p.frame[13] = 8, 6 }),
		send("in px", syn, none, func(_ testing.TB, r *rig, _ scene, p *probe) { p.in, p.px, p.ctx.Ifindex = nil, true, 1 }),
		send("host port in a pod", syn, none, func(_ testing.TB, r *rig, _ scene, p *probe) { p.in, p.ctx.Ifindex = r.Pods[1], 1 }).in("host", "lo"),
		send("pod's address, somewhere else", syn, turnedAway(flow.ReasonBackstop), func(t testing.TB, r *rig, s scene, p *probe) {
			p.in = r.Pods[1]
		}).in("pod"),
		send("pod's port, another address", syn, none, func(_ testing.TB, _ *rig, s scene, p *probe) {
			p.frame = tcp(s.client, netip.AddrPortFrom(foreign(s), podPort), syn).Bytes()
		}).in("pod"),
		send("pod to itself", syn, admitted(flow.ReasonPodLoopback), onLoopback).in("pod"),
		send("pod to itself, denied", syn, turnedAway(flow.ReasonLoopbackDenied), onLoopback, denyLoopback).in("pod"),
		send("pod to itself, by the proxy", ack, admitted(flow.ReasonSocketLeg, "leg up"), leg(up), onLoopback, denyLoopback).in("pod"),
		send("host's lo is not the pod's", syn, turnedAway(flow.ReasonBackstop), onLoopback, func(_ testing.TB, r *rig, _ scene, p *probe) {
			p.in = r.Node
		}).in("pod"),
	}
}

// backstopDatagrams: only a live flow explains a datagram. The legs of the proxy have no protocol in their
// keys, and explain none.
func backstopDatagrams() []progCase {
	send := func(name string, w want, g ...given) progCase {
		return progCase{name: "socket/datagram/" + name, want: w, given: append([]given{where}, g...),
			packet: func(s scene) probe { return at("sp_cg_in", s.device, udp(s.client, s.server)) }}
	}
	active := path(datapath.PathActive)
	return []progCase{
		send("nothing explains it", turnedAway(flow.ReasonBackstop)),
		send("a path is no flow", turnedAway(flow.ReasonBackstop), active),
		send("live path", admitted(flow.ReasonSocketPath, "flow 0/0"), active, bypassed()),
		send("path revoked", turnedAway(flow.ReasonSocketEnded, "flow 0/0"), path(datapath.PathRevoked), bypassed()),
		send("silent for too long", turnedAway(flow.ReasonSocketEnded, "flow 0/0"), active, bypassed(silent((udpIdle+1)*time.Second))),
		send("leg with the same tuple", turnedAway(flow.ReasonBackstop, "leg up"), leg(up)),
		send("stray with the same tuple", turnedAway(flow.ReasonBackstop, "stray up"), stray(up)),
		send("pod to itself", admitted(flow.ReasonPodLoopback), onLoopback).in("pod"),
	}
}

func onLoopback(_ testing.TB, _ *rig, _ scene, p *probe) { p.ctx.Ifindex = 1 }

func denyLoopback(t testing.TB, r *rig, _ scene, _ *probe) {
	c := r.cfg
	c.DenyPodLoopback = 1
	check(t, r.m.SpConfig.Put(uint32(0), &c))
}

// TestBackstopProgram: what a socket may have, and what not.
func TestBackstopProgram(t *testing.T) {
	needSocketRuns(t)
	t.Parallel()
	r := newRig(t, 0, 0)
	r.runAtSockets(t, backstopCases(), func(s scene) scene { return s })
	r.runAtSockets(t, backstopDatagrams(), scene.udp)
}

// runAtSockets runs the cases in each scene, changed as given.
func (r *rig) runAtSockets(t *testing.T, cases []progCase, of func(scene) scene) {
	for _, c := range cases {
		scenes := c.scenes
		if scenes == nil {
			scenes = everyScene()
		}
		for _, f := range lab.Families() {
			for _, name := range scenes {
				s := of(r.socketScenes(t, f)[name])
				t.Run(fmt.Sprintf("%s/%s/%s", c.name, name, f), func(t *testing.T) {
					p := c.packet(s)
					for _, g := range c.given {
						g(t, r, s, &p)
					}
					s.device = int(p.ctx.Ifindex) // that records and counts name
					c.run(t, r, s)
					r.countedDevice(t, p, c.want)
				})
			}
		}
	}
}

// countedDevice holds that refusals, and nothing else, are counted for the device and the namespace.
func (r *rig) countedDevice(t *testing.T, p probe, w want) {
	t.Helper()
	have := all[bpf.BackstopKey, bpf.Backstop](t, r.m.SpBackstop)
	if len(w.records) == 0 {
		if len(have) > 0 {
			t.Errorf("counted for devices: %v, want none", have)
		}
		return
	}
	b, ok := have[bpf.BackstopKey{Netns: r.inode(t, p.in), Ifindex: p.ctx.Ifindex}]
	if !ok || len(have) != 1 || b.Packets != p.segs || b.Bytes != p.bytes || b.LastNs == 0 {
		t.Errorf("counted for devices: %v, want one packet of %d bytes on device %d", have, p.bytes, p.ctx.Ifindex)
	}
}

// inode of a namespace as the system shows it; nil is the node's.
func (r *rig) inode(t *testing.T, n *lab.Namespace) (inode uint32) {
	t.Helper()
	if n == nil {
		n = r.Node
	}
	check(t, n.Do(func() (err error) { inode, err = datapath.NetnsInode(); return err }))
	return inode
}

// socketRuns says whether a test run on this kernel hands a program of a control group its packet. Older ones (6.1 and 6.12 among
// them) leave the ends of its data unset; on the wire they do not, which the tests of late pods hold.
func socketRuns(t testing.TB) bool {
	t.Helper()
	const data, dataEnd = 76, 80 // in struct __sk_buff (linux/bpf.h)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "first_byte", Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetIngress, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R0, 0),
			asm.LoadMem(asm.R2, asm.R1, data, asm.Word),
			asm.LoadMem(asm.R3, asm.R1, dataEnd, asm.Word),
			asm.Mov.Reg(asm.R4, asm.R2),
			asm.Add.Imm(asm.R4, 20),
			asm.JGT.Reg(asm.R4, asm.R3, "end"),
			asm.LoadMem(asm.R2, asm.R2, 0, asm.Byte),
			asm.JNE.Imm(asm.R2, 0x45, "end"),
			asm.Mov.Imm(asm.R0, 1),
			asm.Return().WithSymbol("end"),
		}})
	check(t, err)
	defer func() { check(t, p.Close()) }()
	first := netip.MustParseAddrPort("10.0.0.1:1")
	sent := tcp(first, first, syn)
	code, err := p.Run(&ebpf.RunOptions{Data: sent.Bytes()})
	check(t, err)
	return int32(code) == cgPass
}

// needSocketRuns skips where a program of a control group cannot be run by hand.
func needSocketRuns(t *testing.T) {
	t.Helper()
	if !socketRuns(t) {
		t.Skip("a test run of this kernel hands programs of control groups no packet")
	}
}
