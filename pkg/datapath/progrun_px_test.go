package datapath_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// px0Cases: what the proxy sends is put back where it belongs, and only what it may send.
func px0Cases(px0 int) []progCase {
	answer := func(flags uint8) func(scene) probe {
		return func(s scene) probe { return at("sp_px0_in", px0, tcp(s.server, s.client, flags)) }
	}
	dial := func(flags uint8) func(scene) probe {
		return func(s scene) probe { return at("sp_px0_in", px0, tcp(s.client, s.server, flags)) }
	}
	back := func(side bpf.SallyportSpLegSide, reason flow.Reason, state ...string) want {
		return want{verdict: actRedirect, counts: one(reason), state: state,
			mark: func(r *rig, s scene) uint32 { return markOf(r, s, side) }}
	}
	no := func(reason flow.Reason, state ...string) want {
		return want{verdict: actDrop, counts: one(reason), state: state}
	}
	elsewhere := func(s scene) scene {
		s.server = netip.AddrPortFrom(s.server.Addr(), 9999)
		return s
	}
	active := path(datapath.PathActive)
	unexpected := no(flow.ReasonPxUnexpected)
	return []progCase{
		{name: "px0/answer", packet: answer(syn | ack), given: []given{leg(down)}, want: back(down, flow.ReasonPxDown, "leg down")},
		{name: "px0/answer, segment size", given: []given{leg(down)}, want: sized(back(down, flow.ReasonPxDown, "leg down"), func(s scene) packet.Packet {
			return tcp(s.server, s.client, syn|ack)
		}), packet: func(s scene) probe {
			p := tcp(s.server, s.client, syn|ack)
			p.TCPOptions = mss(0xffff)
			return at("sp_px0_in", px0, p)
		}},
		{name: "px0/dial, segment size", given: []given{origin}, want: sized(back(up, flow.ReasonPxUp, "leg up", "origin"), func(s scene) packet.Packet {
			return tcp(s.client, s.server, syn)
		}), packet: func(s scene) probe {
			p := tcp(s.client, s.server, syn)
			p.TCPOptions = mss(0xffff)
			return at("sp_px0_in", px0, p)
		}},
		{name: "px0/answer, fin", packet: answer(ack | packet.FIN), given: []given{leg(down)}, want: back(down, flow.ReasonPxDown, "leg down FIN_SERVER ANSWERED")},
		{name: "px0/answer, reset", packet: answer(packet.RST), given: []given{leg(down)}, want: back(down, flow.ReasonPxDown, "leg down RST ANSWERED")},
		{name: "px0/answer without a leg", packet: answer(ack), want: unexpected},
		{name: "px0/answer, syn-ack without a leg", packet: answer(syn | ack), want: unexpected},
		{name: "px0/reset of a stray", packet: answer(packet.RST), given: []given{stray(down)}, want: back(down, flow.ReasonPxReset, "stray down")},
		{name: "px0/reset of the service's stray", packet: dial(packet.RST), given: []given{stray(up)}, want: back(up, flow.ReasonPxReset, "stray up")},
		{name: "px0/reset of nothing", packet: answer(packet.RST), want: unexpected},
		{name: "px0/more than a reset for a stray", packet: answer(ack), given: []given{stray(down)}, want: no(flow.ReasonPxUnexpected, "stray down")},
		{name: "px0/more than a reset for the service's stray", packet: dial(ack), given: []given{stray(up)}, want: no(flow.ReasonPxUnexpected, "stray up")},
		{name: "px0/dial", packet: dial(syn), given: []given{origin}, want: back(up, flow.ReasonPxUp, "leg up", "origin")},
		{name: "px0/dial again", packet: dial(syn), given: []given{origin, leg(up)}, want: back(up, flow.ReasonPxUp, "leg up", "origin")},
		{name: "px0/dialled", packet: dial(ack), given: []given{leg(up)}, want: back(up, flow.ReasonPxUp, "leg up")},
		{name: "px0/dialled, fin", packet: dial(ack | packet.FIN), given: []given{leg(up)}, want: back(up, flow.ReasonPxUp, "leg up FIN_CLIENT")},
		{name: "px0/dialled, reset", packet: dial(packet.RST), given: []given{leg(up)}, want: back(up, flow.ReasonPxUp, "leg up RST")},
		{name: "px0/dial, no origin", packet: dial(syn), want: no(flow.ReasonPxNoOrigin)},
		{name: "px0/dial, no origin, live path", packet: dial(syn), given: []given{active}, want: no(flow.ReasonPxNoOrigin)},
		{name: "px0/dial, tuple of a bypassed flow", packet: dial(syn), given: []given{origin, active, bypassed()}, want: no(flow.ReasonPxTupleHeld, "flow 0/0", "origin")},
		{name: "px0/dial, tuple of an ended flow", packet: dial(syn), given: []given{origin, bypassed(ended(flow.ReasonPathExpired))},
			want: no(flow.ReasonPxTupleHeld, "flow 0/0 ended=PATH_EXPIRED", "origin")},
		{name: "px0/dial of no service", given: []given{origin}, want: no(flow.ReasonPxUnexpected, "origin"), packet: func(s scene) probe {
			s = elsewhere(s)
			return at("sp_px0_in", px0, tcp(s.client, s.server, syn))
		}},
		{name: "px0/mid-stream to no service", want: unexpected, packet: func(s scene) probe {
			s = elsewhere(s)
			return at("sp_px0_in", px0, tcp(s.client, s.server, ack))
		}},
		{name: "px0/mid-stream of a bypassed flow", packet: dial(ack), given: []given{active, bypassed()}, want: no(flow.ReasonPxUnexpected, "flow 0/0")},
		{name: "px0/both legs", packet: answer(ack), given: []given{leg(down), leg(up)}, want: back(down, flow.ReasonPxDown, "leg down ANSWERED", "leg up")},
		{name: "px0/not TCP", want: unexpected, packet: func(s scene) probe {
			p := tcp(s.client, s.server, 0)
			p.Protocol = packet.UDP
			return at("sp_px0_in", px0, p)
		}},
		{name: "px0/fragment", given: []given{leg(up)}, want: no(flow.ReasonPxUnexpected, "leg up"), packet: func(s scene) probe {
			p := tcp(s.client, s.server, ack)
			p.Payload = make([]byte, 64)
			b := p.Fragments(40, 9)[0]
			return probe{program: "sp_px0_in", ctx: skBuff{Ifindex: uint32(px0)}, frame: b, segs: 1, bytes: uint64(len(b) - 14)}
		}},
		{name: "px0/no configuration", packet: answer(ack), given: []given{leg(down), noConfig}, want: no(flow.ReasonNoConfig, "leg down")},
		{name: "px0/marked", packet: answer(ack), given: []given{leg(down), markedBy(7)}, want: back(down, flow.ReasonPxDown, "leg down ANSWERED")},
	}
}

// sized is a SYN that asks for no larger segment than its device carries.
func sized(w want, f func(scene) packet.Packet) want {
	w.out = func(_ *rig, s scene, _ []byte) []byte {
		p := f(s)
		p.TCPOptions = mss(deviceMTU(s) - map[lab.Family]int{lab.IPv4: 40, lab.IPv6: 60}[s.family])
		return p.Bytes()
	}
	return w
}

// deviceMTU is that of the scene's device in a rig.
func deviceMTU(s scene) int { return map[string]int{"host": 9000, "pod": 1500, "lo": 65536}[s.name] }

// inPx makes a probe at one of the programs in the px namespace; the packet is stamped.
func inPx(r *rig, program string, s scene, flags uint8) probe {
	p := tcp(s.client, s.server, flags)
	p.SrcMAC = r.cfg.Stamp
	device := map[string]int{"sp_px1_in": r.px1, "sp_px_lo_in": 1, "sp_px_lo_out": 1}[program]
	out := at(program, device, p)
	out.px = true
	return out
}

// refused is a denial at px1, which knows no device of the host.
func refused(reason flow.Reason) want {
	w := drop(reason)
	w.records = []string{"DENY " + reason.String() + " device 0"}
	return w
}

// pxCases: px1 takes what our programs sent, for sockets that are there.
func pxCases(r *rig, program string) []progCase {
	send := func(flags uint8) func(scene) probe {
		return func(s scene) probe { return inPx(r, program, s, flags) }
	}
	change := func(f func(*packet.Packet)) func(scene) probe {
		return func(s scene) probe {
			p := tcp(s.client, s.server, ack)
			p.SrcMAC = r.cfg.Stamp
			f(&p)
			out := at(program, r.px1, p)
			out.px = true
			if program != "sp_px1_in" {
				out.ctx.Ifindex = 1
			}
			return out
		}
	}
	off := func(i int) func(*packet.Packet) {
		return func(p *packet.Packet) { p.SrcMAC[i] ^= 1 }
	}
	// ::1 is px1's to send on and lo's to take.
	own := []string{"host", "pod"}
	return []progCase{
		{name: program + "/no listener", scenes: own, packet: send(syn), want: refused(flow.ReasonNoListener)},
		{name: program + "/no listener, mid-stream", scenes: own, packet: send(ack), want: refused(flow.ReasonNoListener)},
		{name: program + "/no listener, loopback", scenes: []string{"lo"}, only: lab.IPv4, packet: send(syn), want: refused(flow.ReasonNoListener)},
		{name: program + "/not stamped", packet: change(off(5)), want: refused(flow.ReasonNoStamp)},
		{name: program + "/not stamped, first byte", packet: change(off(0)), want: refused(flow.ReasonNoStamp)},
		{name: program + "/not TCP", packet: change(func(p *packet.Packet) { p.Protocol = packet.UDP }), want: refused(flow.ReasonPxUnexpected)},
		{name: program + "/no configuration", packet: send(syn), given: []given{noConfig}, want: refused(flow.ReasonNoConfig)},
	}
}

// loopback6Cases: ::1 goes by px's lo in both directions.
func loopback6Cases(r *rig) []progCase {
	sendOn := want{verdict: actRedirect}
	return []progCase{
		{name: "px1/loopback", scenes: []string{"lo"}, only: lab.IPv6, want: sendOn, packet: func(s scene) probe { return inPx(r, "sp_px1_in", s, syn) }},
		{name: "px lo/loopback, no listener", scenes: []string{"lo"}, only: lab.IPv6, want: refused(flow.ReasonNoListener),
			packet: func(s scene) probe { return inPx(r, "sp_px_lo_in", s, syn) }},
		{name: "px lo/out", packet: func(s scene) probe { return inPx(r, "sp_px_lo_out", s, ack) }, want: sendOn},
		{name: "px lo/out, no configuration", given: []given{noConfig}, want: want{verdict: actDrop},
			packet: func(s scene) probe { return inPx(r, "sp_px_lo_out", s, ack) }},
	}
}

func TestPx0(t *testing.T) {
	r := newRig(t, 4096, 4096)
	runCases(t, r, px0Cases(r.px.Px0()))
}

func TestPx(t *testing.T) {
	r := newRig(t, 4096, 4096)
	for _, cases := range [][]progCase{pxCases(r, "sp_px1_in"), pxCases(r, "sp_px_lo_in"), loopback6Cases(r)} {
		runCases(t, r, cases)
	}
}

// listenPx opens a transparent listener of the proxy.
func listenPx(t testing.TB, n *px.Namespace, f lab.Family, port int) net.Listener {
	t.Helper()
	var ln net.Listener
	check(t, n.Do(func() (err error) {
		lc := net.ListenConfig{Control: transparent}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), fmt.Sprintf("tcp%d", int(f)), fmt.Sprintf(":%d", port))
		return err
	}))
	return ln
}
