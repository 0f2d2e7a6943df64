package datapath_test

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// withOptions is the SYN of a scene with options.
func withOptions(s scene, options []byte) packet.Packet {
	p := tcp(s.client, s.server, syn)
	p.TCPOptions = options
	return p
}

// rewritten is a packet that is another one afterwards, right in every checksum.
func (w want) rewritten(f func(s scene) packet.Packet) want {
	steered := w.verdict == actRedirect
	w.out = func(r *rig, s scene, _ []byte) []byte {
		p := f(s)
		if steered {
			p.DstMAC, p.SrcMAC = [6]byte{}, r.cfg.Stamp
		}
		return p.Bytes()
	}
	return w
}

func mss(n int) []byte { return binary.BigEndian.AppendUint16([]byte{2, 4}, uint16(n)) }

// optionCases: what a SYN asks for on its way to the service or to the proxy.
func optionCases() []progCase {
	join := append([]byte{30, 12, 0x10, 1}, make([]byte, 8)...)
	nops := slices.Repeat([]byte{1}, 12)
	smc := []byte{254, 6, 0xe2, 0xd4, 0xc3, 0xd9, 1, 1}
	capable := []byte{30, 4, 0, 0x81}
	active := path(datapath.PathActive)
	opened := pass(flow.ReasonPathOpen, "flow 1/0").recorded("OPEN PATH_OPEN 1/0")
	steered := steer(flow.ReasonNoPath, "leg down", "origin")
	with := func(name string, w want, before, after []byte, g ...given) progCase {
		return progCase{name: "options/" + name, given: g,
			packet: func(s scene) probe { return at(s.towards, s.device, withOptions(s, before)) },
			want:   w.rewritten(func(s scene) packet.Packet { return withOptions(s, after) })}
	}
	same := func(name string, w want, options []byte, g ...given) progCase {
		return with(name, w, options, options, g...)
	}
	return []progCase{
		with("MPTCP, bypassed", opened, slices.Concat(capable, mss(1400), join), slices.Concat(nops[:4], mss(1400), nops), active),
		with("MPTCP, bypassed, again", pass(flow.ReasonPathLive, "flow 1/0"), join, nops, active, bypassed()),
		with("MPTCP, steered", steered, slices.Concat(mss(1400), join, capable), slices.Concat(mss(1400), nops, nops[:4])),
		with("MPTCP at the end of all", opened, slices.Concat(nops, nops, nops[:4], join), slices.Concat(nops, nops, nops[:4], nops), active),
		with("SMC", steered, smc, nops[:8]),
		with("SMC, bypassed", opened, slices.Concat(smc, mss(1400)), slices.Concat(nops[:8], mss(1400)), active),
		with("the other experiment", steered, []byte{253, 4, 0xf9, 0x89}, nops[:4]),
		same("an option that nobody knows", steered, []byte{252, 4, 0xf9, 0x89}),
		same("MPTCP behind an option of no length", opened, slices.Concat([]byte{8, 0, 1, 1}, join), active),
		same("MPTCP behind the end of the list", opened, slices.Concat([]byte{0, 1, 1, 1}, join), active),
		same("MPTCP beyond the header", opened, []byte{1, 1, 1, 1, 30, 12, 0, 0}, active),
		same("MPTCP without a length", opened, []byte{1, 1, 1, 30}, active),
		same("segment size, bypassed", opened, mss(0xffff), active),
		same("segment size that fits", steered, mss(536)),
		same("segment size of odd length", steered, []byte{2, 3, 0xff, 1}),
		{name: "options/segment size, too large", want: steered.rewritten(func(s scene) packet.Packet {
			return withOptions(s, mss(deviceMTU(s)-map[lab.Family]int{lab.IPv4: 40, lab.IPv6: 60}[s.family]))
		}), packet: func(s scene) probe { return at(s.towards, s.device, withOptions(s, mss(0xffff))) }},
		{name: "options/of a SYN-ACK to the proxy", given: []given{leg(up)},
			want: steer(flow.ReasonLeg, "leg up").rewritten(func(s scene) packet.Packet {
				p := tcp(s.server, s.client, syn|ack)
				p.TCPOptions = nops[:4]
				return p
			}), packet: func(s scene) probe {
				p := tcp(s.server, s.client, syn|ack)
				p.TCPOptions = capable
				return at(s.from, s.device, p)
			}},
		{name: "options/of a later packet", given: []given{active, bypassed()}, want: pass(flow.ReasonPathLive, "flow 1/0"), packet: func(s scene) probe {
			p := tcp(s.client, s.server, ack)
			p.TCPOptions = join
			return at(s.towards, s.device, p)
		}},
		{name: "options/of our own second pass", given: []given{leg(down), marked(down)},
			want: want{verdict: actNext, counts: one(flow.ReasonReinjected), state: []string{"leg down"}, mark: noMark}, packet: func(s scene) probe {
				p := tcp(s.server, s.client, syn|ack)
				p.TCPOptions = mss(0xffff)
				return at(s.from, s.device, p)
			}},
	}
}

func TestOptions(t *testing.T) {
	r := newRig(t, 4096, 4096)
	runCases(t, r, optionCases())
}
