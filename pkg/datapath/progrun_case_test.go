package datapath_test

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// skBuff is struct __sk_buff of linux/bpf.h, as far as a test run reads it.
type skBuff struct {
	Len, PktType, Mark, QueueMapping, Protocol, VlanPresent, VlanTCI, VlanProto, Priority uint32
	IngressIfindex, Ifindex, TCIndex                                                      uint32
	CB                                                                                    [5]uint32
	_                                                                                     [19]uint32
	FlowKeys, Tstamp                                                                      uint64
	WireLen, GSOSegs                                                                      uint32
	Sk                                                                                    uint64
	GSOSize, TstampType                                                                   uint32
	HWTstamp                                                                              uint64
}

// scene is one way to one service: where its packets are seen, and who talks.
type scene struct {
	name           string
	family         lab.Family
	hook           bpf.SallyportSpHook
	device         int
	client, server netip.AddrPort
	service        uint32
	protocol       uint8
	towards, from  string // programs that see the packets of either direction
}

const clientPort = 40000

// scenes lists the ways that the hooks tell apart.
func (r *rig) scenes(t testing.TB, f lab.Family) map[string]scene {
	at := netip.AddrPortFrom
	list := []scene{
		{name: "host", hook: bpf.SallyportSpHookSP_HOOK_IN, device: r.device(t, lab.Uplink), client: at(r.Client.Addr(f), clientPort),
			server: at(r.Node.Addr(f), hostPort), service: hostID, towards: "sp_dev_in", from: "sp_dev_out"},
		{name: "pod", hook: bpf.SallyportSpHookSP_HOOK_OUT, device: r.device(t, lab.PodDevice(0)), client: at(r.Client.Addr(f), clientPort),
			server: at(r.Pod.Addr(f), podPort), service: podID, towards: "sp_pod_out", from: "sp_dev_in"},
		{name: "lo", hook: bpf.SallyportSpHookSP_HOOK_LO, device: 1, client: at(f.Loopback(), clientPort),
			server: at(f.Loopback(), hostPort), service: hostID, towards: "sp_lo_in", from: "sp_lo_in"},
	}
	for _, s := range list[:3] {
		list = append(list, s.udp())
	}
	for i := range list {
		list[i].family = f
		if list[i].protocol == 0 {
			list[i].protocol = packet.TCP
		}
	}
	out := map[string]scene{}
	for _, s := range list {
		out[s.name] = s
	}
	return out
}

// udp is the same way to the UDP service of the same place.
func (s scene) udp() scene {
	s.name, s.protocol = "udp "+s.name, packet.UDP
	id, port := uint32(hostUDPID), uint16(hostUDPPort)
	if s.service == podID {
		id, port = podUDPID, podUDPPort
	}
	s.service, s.server = id, netip.AddrPortFrom(s.server.Addr(), port)
	return s
}

func everyScene() []string { return []string{"host", "pod", "lo"} }

// probe is one packet at one program.
type probe struct {
	program string
	ctx     skBuff
	frame   []byte
	px      bool           // run in the px namespace
	in      *lab.Namespace // run there; nil: in the node's
	segs    uint64         // packets that the frame counts for
	bytes   uint64         // IP bytes that it counts for
}

// at makes a probe of a packet at a program on a device.
func at(program string, device int, p packet.Packet) probe {
	frame := p.Bytes()
	return probe{program: program, ctx: skBuff{Ifindex: uint32(device)}, frame: frame, segs: 1, bytes: uint64(len(frame) - 14)}
}

// tcp is the valid packet that every case starts from.
func tcp(from, to netip.AddrPort, flags uint8) packet.Packet {
	return packet.Packet{SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, DstMAC: [6]byte{2, 0, 0, 0, 0, 2},
		Src: from, Dst: to, Flags: flags, Seq: 1000, Ack: 2000, Window: 65535}
}

// given prepares what a case finds; mutate changes its packet.
type given func(t testing.TB, r *rig, s scene, p *probe)

// progCase sends one packet of a scene to the program that sees it.
type progCase struct {
	name   string
	scenes []string // nil: all
	only   lab.Family
	packet func(s scene) probe
	given  []given
	want   want
	unread bool // the rings are left as the preparations filled them
}

// want is everything that a packet brings about.
type want struct {
	verdict int32
	// counts are the packets by reason: all of them.
	counts map[flow.Reason]uint64
	// state are all entries of the flow, leg, stray and origin maps, records all records of the rings;
	// state.go says how they read. C and S stand for the scene's client and server.
	state   []string
	records []string
	// out is the packet afterwards; nil: as before, but for the MAC addresses of a steered one.
	out func(r *rig, s scene, sent []byte) []byte
	// mark of the packet afterwards; nil: as before.
	mark func(r *rig, s scene) uint32
	// becomes is what goes on in place of the packet; nil: the packet.
	becomes func(s scene) probe
}

// one is a single packet of one reason.
func one(r flow.Reason) map[flow.Reason]uint64 { return map[flow.Reason]uint64{r: 1} }

// steer, pass and drop are the usual wants.
func steer(reason flow.Reason, state ...string) want {
	w := want{verdict: actRedirect, counts: one(reason), state: state}
	if reason == flow.ReasonStray {
		w.records = []string{"DENY STRAY"}
	}
	return w
}

func pass(reason flow.Reason, state ...string) want {
	w := want{verdict: actNext, state: state}
	if reason != flow.ReasonNone {
		w.counts = one(reason)
	}
	return w
}

func drop(reason flow.Reason, state ...string) want {
	return want{verdict: actDrop, counts: one(reason), state: state, records: []string{"DENY " + reason.String()}}
}

// cuts is for a packet that goes on as another, and that the proxy got a copy of.
func cuts(reason flow.Reason, becomes func(s scene) probe, state ...string) want {
	counts := map[flow.Reason]uint64{reason: 1, flow.ReasonPathReset: 1}
	return want{verdict: actNext, counts: counts, state: state, becomes: becomes}
}

func (w want) recorded(records ...string) want {
	w.records = append(records, w.records...)
	return w
}

// in says that the case is for these scenes only.
func (c progCase) in(scenes ...string) progCase {
	c.scenes = scenes
	return c
}

func (c progCase) run(t *testing.T, r *rig, s scene) {
	t.Helper()
	r.reset(t)
	if !c.unread {
		r.drain(t)
	}
	p := c.packet(s)
	for _, g := range c.given {
		g(t, r, s, &p)
	}
	counted := r.counters(t) // by preparations that sent packets themselves
	if !c.unread {
		r.drain(t)
	}
	verdict, out, mark := r.send(t, p)
	if verdict != c.want.verdict {
		t.Errorf("verdict %d, want %d", verdict, c.want.verdict)
	}
	became := p
	if c.want.becomes != nil {
		became = c.want.becomes(s)
	}
	r.compareBytes(t, became, s, verdict, out, c.want.out)
	wantMark := p.ctx.Mark
	if c.want.mark != nil {
		wantMark = c.want.mark(r, s)
	}
	if mark != wantMark {
		t.Errorf("mark %#x, want %#x", mark, wantMark)
	}
	r.compareCounters(t, p, became, counted, c.want.counts)
	if !c.unread {
		compareLines(t, "records", r.renderEvents(t, r.drain(t), s), c.want.records)
	}
	compareLines(t, "state", r.renderState(t, s, p), c.want.state)
}

// send runs the program once.
func (r *rig) send(t testing.TB, p probe) (verdict int32, out []byte, mark uint32) {
	t.Helper()
	var after skBuff
	o := ebpf.RunOptions{Data: p.frame, DataOut: make([]byte, len(p.frame)+256), Context: &p.ctx, ContextOut: &after}
	ns := r.Node.Do
	switch {
	case p.px:
		ns = r.px.Do
	case p.in != nil:
		ns = p.in.Do
	}
	check(t, ns(func() error {
		code, err := r.program(p.program).Run(&o)
		verdict = int32(code)
		return err
	}))
	return verdict, o.DataOut, after.Mark
}

// compareBytes: unless a case says otherwise, a packet changes only on its way to the proxy, and then only in
// its MAC addresses.
func (r *rig) compareBytes(t *testing.T, p probe, s scene, verdict int32, out []byte, change func(*rig, scene, []byte) []byte) {
	t.Helper()
	expect := bytes.Clone(p.frame)
	if change != nil {
		expect = change(r, s, expect)
	} else if verdict == actRedirect && !strings.HasPrefix(p.program, "sp_px") {
		copy(expect, make([]byte, 6))
		copy(expect[6:], r.cfg.Stamp[:])
	}
	if p.program == "sp_cg_in" {
		copy(expect, make([]byte, 14)) // a socket's packet begins with the IP header
	}
	if !bytes.Equal(out, expect) {
		t.Errorf("packet is\n%x, want\n%x", out, expect)
	}
}

func (r *rig) compareCounters(t *testing.T, p, became probe, before map[flow.Reason]datapath.Counter, counts map[flow.Reason]uint64) {
	t.Helper()
	expect := maps.Clone(before)
	for reason, n := range counts {
		c, p := expect[reason], p
		if reason == flow.ReasonPathReset {
			p = became
		}
		expect[reason] = datapath.Counter{Packets: c.Packets + n*p.segs, Bytes: c.Bytes + n*p.bytes}
	}
	if have := r.counters(t); !maps.Equal(have, expect) {
		t.Errorf("counters %v, want %v", have, expect)
	}
}

func compareLines(t *testing.T, what string, have, want []string) {
	t.Helper()
	have, want = slices.Clone(have), slices.Clone(want)
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		t.Errorf("%s are\n  %s\nwant\n  %s", what, strings.Join(have, "\n  "), strings.Join(want, "\n  "))
	}
}

// runCases runs every case in every scene and family that it is for.
func runCases(t *testing.T, r *rig, cases []progCase) {
	for _, c := range cases {
		c.eachScene(t, r, func(t *testing.T, s scene) { c.run(t, r, s) })
	}
}

// eachScene makes a test of each scene and family that the case is for.
func (c progCase) eachScene(t *testing.T, r *rig, f func(t *testing.T, s scene)) {
	scenes := c.scenes
	if scenes == nil {
		scenes = everyScene()
	}
	for _, family := range lab.Families() {
		if c.only != 0 && c.only != family {
			continue
		}
		for _, name := range scenes {
			s := r.scenes(t, family)[name]
			t.Run(fmt.Sprintf("%s/%s/%s", c.name, name, family), func(t *testing.T) { f(t, s) })
		}
	}
}

// later is a deadline far enough away for a slow machine.
func later() uint64 { return uint64(datapath.BootTime() + 10*time.Minute) }
