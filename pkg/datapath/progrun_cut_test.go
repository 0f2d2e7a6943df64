package datapath_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// shape changes a packet of a case.
type bend func(*packet.Packet)

// bulk is all that an RST must not have.
func bulk(p *packet.Packet) {
	p.TCPOptions = bytes.Repeat([]byte{1}, 12)
	p.Payload = bytes.Repeat([]byte("secret"), 200)
}

func ipOptions(p *packet.Packet) { p.Options = []byte{1, 1, 1, 1} }

func extensions(p *packet.Packet) {
	p.Extensions = []packet.Extension{{Type: packet.DestOptions, Body: packet.SkippedOption(16)}}
}

func towardsAs(flags uint8, shapes ...bend) func(scene) probe {
	return func(s scene) probe { return shapedAs(s.towards, s.device, tcp(s.client, s.server, flags), shapes) }
}

func fromAs(flags uint8, shapes ...bend) func(scene) probe {
	return func(s scene) probe { return shapedAs(s.from, s.device, tcp(s.server, s.client, flags), shapes) }
}

func shapedAs(program string, device int, p packet.Packet, shapes []bend) probe {
	for _, f := range shapes {
		f(&p)
	}
	return at(program, device, p)
}

// unfinished puts the sum of the pseudo header where the checksum goes, for a device to complete.
func unfinished(send func(scene) probe) func(scene) probe {
	return func(s scene) probe {
		p := send(s)
		l4, sum := 34, uint32(6+len(p.frame)-34)
		if s.family == lab.IPv6 {
			l4, sum = 54, uint32(6+len(p.frame)-54)
		}
		for i := 26 - 4*(l4-34)/20; i < l4; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(p.frame[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(p.frame[l4+16:], uint16(sum))
		return p
	}
}

// cutCases: what becomes of the packet that meets the end of its path.
func cutCases() []progCase {
	over := path(datapath.PathRevoked)
	ended := ended(flow.ReasonPathRevoked)
	bothCut := bpf.SallyportSpFlagsSP_CUT_CLIENT | bpf.SallyportSpFlagsSP_CUT_SERVER
	to := func(flags uint8) func(scene) probe { return towardsAs(flags, bulk) }
	back := func(flags uint8) func(scene) probe { return fromAs(flags, bulk) }
	const psh, urg = 0x08, 0x20
	toServer := []string{"flow 0/0 ended=PATH_REVOKED CUT_SERVER", "stray down"}
	toClient := []string{"flow 0/0 ended=PATH_REVOKED CUT_CLIENT", "stray up"}
	gone := func(change ...func(*bpf.Flow)) []given { return []given{over, bypassed(append(change, ended)...)} }
	return []progCase{
		{name: "cut/data to server", packet: to(ack | psh), given: gone(), want: cuts(flow.ReasonPathRevoked, towards(packet.RST|ack), toServer...)},
		{name: "cut/data to client", packet: back(ack | psh | urg), given: gone(), want: cuts(flow.ReasonPathRevoked, from(packet.RST|ack), toClient...)},
		{name: "cut/fin", packet: to(ack | packet.FIN), given: gone(), want: cuts(flow.ReasonPathRevoked, towards(packet.RST|ack), toServer...)},
		{name: "cut/syn-ack", packet: back(syn | ack), given: gone(), want: cuts(flow.ReasonPathRevoked, from(packet.RST|ack), toClient...)},
		{name: "cut/no flags", packet: to(0), given: gone(), want: drop(flow.ReasonBadFlags, "flow 0/0 ended=PATH_REVOKED")},
		{name: "cut/reset with data", packet: to(packet.RST), given: gone(), want: cuts(flow.ReasonPathRevoked, towards(packet.RST), toServer...)},
		{name: "cut/other direction was first", packet: to(ack), given: gone(flags(bpf.SallyportSpFlagsSP_CUT_CLIENT)),
			want: cuts(flow.ReasonPathRevoked, towards(packet.RST|ack), "flow 0/0 ended=PATH_REVOKED CUT_SERVER CUT_CLIENT", "stray down")},
		{name: "cut/once to server", packet: to(ack), given: gone(flags(bothCut)),
			want: steer(flow.ReasonPathRevoked, "flow 0/0 ended=PATH_REVOKED CUT_SERVER CUT_CLIENT", "stray down")},
		{name: "cut/once to client", packet: back(ack), given: gone(flags(bothCut)),
			want: steer(flow.ReasonPathRevoked, "flow 0/0 ended=PATH_REVOKED CUT_SERVER CUT_CLIENT", "stray up")},
		{name: "cut/reset, once to client", packet: back(packet.RST), given: gone(flags(bothCut)),
			want: steer(flow.ReasonPathRevoked, "flow 0/0 ended=PATH_REVOKED CUT_SERVER CUT_CLIENT", "stray up")},
		{name: "cut/closed, not by its path", packet: to(ack), given: []given{over, bypassed(closedFlow)},
			want: steer(flow.ReasonClosed, "flow 0/0 ended=CLOSED", "stray down")},
		{name: "cut/no proxy set up", packet: to(ack), given: append(gone(), noConfig), want: drop(flow.ReasonNoConfig, "flow 0/0 ended=PATH_REVOKED")},
		{name: "cut/IPv4 options", only: lab.IPv4, packet: towardsAs(ack, bulk, ipOptions), given: gone(),
			want: cuts(flow.ReasonPathRevoked, towardsAs(packet.RST|ack, ipOptions), toServer...)},
		{name: "cut/IPv6 extension headers", only: lab.IPv6, packet: fromAs(ack, bulk, extensions), given: gone(),
			want: cuts(flow.ReasonPathRevoked, fromAs(packet.RST|ack, extensions), toClient...)},
		{name: "cut/checksum left to a device", packet: unfinished(to(ack)), given: gone(),
			want: cuts(flow.ReasonPathRevoked, unfinished(towards(packet.RST|ack)), toServer...)},
		{name: "cut/many segments", packet: segmented(to(ack), 3), given: gone(),
			want: cuts(flow.ReasonPathRevoked, towards(packet.RST|ack), toServer...)},
	}
}

// segmented makes a packet stand for several.
func segmented(send func(scene) probe, n uint32) func(scene) probe {
	return func(s scene) probe {
		p := send(s)
		l4 := 34
		if s.family == lab.IPv6 {
			l4 = 54
		}
		headers := l4 - 14 + int(p.frame[l4+12]>>4)*4
		p.ctx.GSOSegs, p.ctx.GSOSize = n, 400
		p.segs, p.bytes = uint64(n), p.bytes+uint64(n-1)*uint64(headers)
		return p
	}
}

func closedFlow(f *bpf.Flow) { f.Ended = bpf.SallyportSpReason(flow.ReasonClosed) }

func TestCut(t *testing.T) {
	r := newRig(t, 0, 0)
	runCases(t, r, cutCases())
}
