package datapath_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// A test run cannot give a program a packet with a VLAN tag beside it, one that is not linear, or one
// at tc ingress. These tests send frames on real devices.

// newWire is a rig with its hooks on.
func newWire(t *testing.T) *rig {
	t.Helper()
	r := newRig(t, 4096, 4096)
	check(t, r.Node.Do(func() error {
		if err := r.d.AttachPx(); err != nil {
			return err
		}
		for name, role := range map[string]datapath.Role{lab.Uplink: datapath.RoleUplink, lab.PodDevice(0): datapath.RolePod,
			lab.PodDevice(1): datapath.RolePod, "lo": datapath.RoleLo} {
			dev, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			if err := r.d.Attach(dev.Index, role); err != nil {
				return err
			}
		}
		return nil
	}))
	return r
}

// frame addresses a packet of the client to the node's uplink.
func (r *rig) frame(t testing.TB, p packet.Packet) packet.Packet {
	t.Helper()
	var err error
	p.SrcMAC, err = r.Client.MAC("eth0")
	check(t, err)
	p.DstMAC, err = r.Node.MAC(lab.Uplink)
	check(t, err)
	return p
}

// counted waits until the counters are as wanted.
func (r *rig) counted(t *testing.T, want map[flow.Reason]uint64) {
	t.Helper()
	have := map[flow.Reason]uint64{}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		clear(have)
		for reason, c := range r.counters(t) {
			have[reason] = c.Packets
		}
		if fmt.Sprint(have) == fmt.Sprint(want) {
			return
		}
	}
	t.Errorf("counters %v, want %v", have, want)
}

// steeredSYN is what a SYN without a proxy counts.
func steeredSYN() map[flow.Reason]uint64 {
	return map[flow.Reason]uint64{flow.ReasonNoPath: 1, flow.ReasonNoListener: 1}
}

// TestTagsOnTheWire: a tag of id 0 is no other network, however often it is there.
func TestTagsOnTheWire(t *testing.T) {
	r := newWire(t)
	dropped := map[flow.Reason]uint64{flow.ReasonMalformed: 1}
	for _, c := range []struct {
		name string
		tags []uint16
		want map[flow.Reason]uint64
	}{
		{"none", nil, steeredSYN()},
		{"priority", []uint16{0}, steeredSYN()},
		{"priority with bits", []uint16{0xe000}, steeredSYN()},
		{"two of id 0", []uint16{0, 0}, dropped},
		{"three of id 0", []uint16{0, 0, 0}, dropped},
		{"two of id 0 with bits", []uint16{0xe000, 0x7000}, dropped},
	} {
		for _, f := range lab.Families() {
			t.Run(c.name+"/"+f.String(), func(t *testing.T) {
				r.reset(t)
				s := r.scenes(t, f)["host"]
				p := r.frame(t, tcp(s.client, s.server, syn))
				p.VLANs = c.tags
				check(t, r.Client.Inject("eth0", p.Bytes()))
				r.counted(t, c.want)
			})
		}
	}
}

// tagged makes a program that puts a tag beside the packet and goes on in the given one.
func tagged(t *testing.T, r *rig, target *ebpf.Program, tci uint16) *ebpf.Program {
	t.Helper()
	jump, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	check(t, err)
	t.Cleanup(func() { check(t, jump.Close()) })
	var tag [2]byte
	binary.BigEndian.PutUint16(tag[:], 0x8100)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "tag", Type: ebpf.SchedCLS, AttachType: attachType(r.d.Profile(), ebpf.AttachTCXIngress), License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.Mov.Imm(asm.R2, int32(binary.NativeEndian.Uint16(tag[:]))), asm.Mov.Imm(asm.R3, int32(tci)),
			asm.FnSkbVlanPush.Call(),
			asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, jump.FD()), asm.Mov.Imm(asm.R3, 0),
			asm.FnTailCall.Call(),
			asm.Mov.Imm(asm.R0, 77), asm.Return(),
		}})
	check(t, err)
	t.Cleanup(func() { check(t, p.Close()) })
	check(t, jump.Put(uint32(0), target))
	return p
}

// TestTagsBesideThePacket: every tag beside the packet, at both hooks of the way in.
func TestTagsBesideThePacket(t *testing.T) {
	r := newRig(t, 4096, 4096)
	none, read := map[flow.Reason]uint64{}, one(flow.ReasonNoPath)
	for _, c := range []struct {
		name  string
		tci   uint16
		inner []uint16
		act   int32
		want  map[flow.Reason]uint64
	}{
		{"id 0", 0, nil, actRedirect, read},
		{"id 0 with priority", 0xe000, nil, actRedirect, read},
		{"id 5", 5, nil, actNext, none},
		{"id 4095", 4095, nil, actNext, none},
		{"id 5 and 0", 5, []uint16{0}, actNext, none},
		{"id 0 and 5", 0, []uint16{5}, actNext, none},
		{"id 0 and 0", 0, []uint16{0}, actDrop, one(flow.ReasonMalformed)},
	} {
		for _, f := range lab.Families() {
			for _, name := range []string{"host", "lo"} {
				t.Run(c.name+"/"+name+"/"+f.String(), func(t *testing.T) {
					s := r.scenes(t, f)[name]
					r.reset(t)
					p := tcp(s.client, s.server, syn)
					p.VLANs = c.inner
					o := ebpf.RunOptions{Data: p.Bytes(), Context: &skBuff{Ifindex: uint32(s.device)}}
					prog := tagged(t, r, r.program(s.towards), c.tci)
					check(t, r.Node.Do(func() error {
						code, err := prog.Run(&o)
						if int32(code) != c.act {
							t.Errorf("verdict %d, want %d", int32(code), c.act)
						}
						return err
					}))
					have := map[flow.Reason]uint64{}
					for reason, n := range r.counters(t) {
						have[reason] = n.Packets
					}
					if fmt.Sprint(have) != fmt.Sprint(c.want) {
						t.Errorf("counters %v, want %v", have, c.want)
					}
				})
			}
		}
	}
}

// TestShortFrames: an IP header that is not there is for the kernel to drop; nothing is counted.
func TestShortFrames(t *testing.T) {
	r := newWire(t)
	for _, f := range lab.Families() {
		r.reset(t)
		s := r.scenes(t, f)["host"]
		b := r.frame(t, tcp(s.client, s.server, syn)).Bytes()
		for _, n := range []int{15, 14 + 8, 14 + 19} {
			check(t, r.Client.Inject("eth0", b[:n]))
		}
		check(t, r.Client.Inject("eth0", b))
		r.counted(t, steeredSYN())
	}
}

// TestScatteredFrame: headers that lie in fragments of the buffer are read all the same.
func TestScatteredFrame(t *testing.T) {
	r := newWire(t)
	for _, f := range lab.Families() {
		for _, linear := range []int{14, 20, 34, 40, 60} {
			r.reset(t)
			s := r.scenes(t, f)["host"]
			p := r.frame(t, tcp(s.client, s.server, syn))
			p.Payload = make([]byte, 6000)
			check(t, r.Client.Do(func() error { return sendScattered("eth0", p.Bytes(), linear) }))
			r.counted(t, steeredSYN())
		}
	}
}

// sendScattered sends a frame whose first bytes alone are linear, by a virtio header that says so
// (packet(7), PACKET_VNET_HDR).
func sendScattered(device string, frame []byte, linear int) error {
	dev, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)
	if err == nil {
		header := make([]byte, 10)
		binary.NativeEndian.PutUint16(header[2:], uint16(linear)) // hdr_len
		err = unix.Sendto(fd, append(header, frame...), 0, &unix.SockaddrLinklayer{Ifindex: dev.Index})
	}
	return errors.Join(err, unix.Close(fd))
}

// fromHooks is a packet as the hooks send it to px1.
func (r *rig) fromHooks(t testing.TB, src, dst netip.AddrPort, flags uint8) {
	t.Helper()
	p := tcp(src, dst, flags)
	p.SrcMAC, p.DstMAC = r.cfg.Stamp, [6]byte{}
	check(t, r.Node.Inject("px0", p.Bytes()))
}

// TestProxySockets: px1 gives a packet to the socket of its tuple, else to the listener.
func TestProxySockets(t *testing.T) {
	r := newWire(t)
	for _, f := range lab.Families() {
		for _, name := range everyScene() {
			s := r.scenes(t, f)[name]
			t.Run(name+"/"+f.String(), func(t *testing.T) { r.proxySockets(t, s) })
		}
	}
}

// socketCase is one packet to px1, with or without the proxy's listener.
type socketCase struct {
	name     string
	listener int // port; 0: none
	flags    uint8
	given    given
	want     map[flow.Reason]uint64
}

func socketCases() []socketCase {
	accepted := func(answer ...flow.Reason) map[flow.Reason]uint64 {
		out := one(flow.ReasonPxAccept)
		for _, r := range answer {
			out[r] = 1
		}
		return out
	}
	nothing := func(testing.TB, *rig, scene, *probe) {}
	return []socketCase{
		{"nobody there", 0, syn, nothing, one(flow.ReasonNoListener)},
		{"nobody there, mid-stream", 0, ack, nothing, one(flow.ReasonNoListener)},
		{"a listener, but not the proxy's", hostPort, syn, nothing, one(flow.ReasonNoListener)},
		// what the kernel answers needs a leg or a stray to leave px
		{"answered, no leg", listenPort, syn, nothing, accepted(flow.ReasonPxUnexpected)},
		{"reset, no stray", listenPort, ack, nothing, accepted(flow.ReasonPxUnexpected)},
		{"reset of a stray", listenPort, ack, stray(down), accepted(flow.ReasonPxReset, flow.ReasonReinjected)},
		{"reset of a leg", listenPort, ack, leg(down), accepted(flow.ReasonPxDown, flow.ReasonReinjected)},
	}
}

func (r *rig) proxySockets(t *testing.T, s scene) {
	for i, c := range socketCases() {
		s.client = netip.AddrPortFrom(s.client.Addr(), uint16(clientPort+i)) // a request outlives its listener for a while
		t.Run(c.name, func(t *testing.T) {
			if c.listener != 0 {
				ln := listenPx(t, r.px, s.family, c.listener)
				defer func() { check(t, ln.Close()) }()
			}
			r.reset(t)
			c.given(t, r, s, nil)
			r.fromHooks(t, s.client, s.server, c.flags)
			r.counted(t, c.want)
		})
	}
}

// TestTimeWait: a client may come again with a tuple that the proxy has in TIME_WAIT.
func TestTimeWait(t *testing.T) {
	r := newWire(t)
	for _, f := range lab.Families() {
		ln := listenPx(t, r.px, f, listenPort)
		for _, name := range everyScene() {
			s := r.scenes(t, f)[name]
			t.Run(name+"/"+f.String(), func(t *testing.T) {
				r.reset(t)
				ns := map[bool]*lab.Namespace{true: r.Node, false: r.Client}[name == "lo"]
				for range 3 {
					closedByProxy(t, ns, ln, s)
				}
				if c := r.counters(t); c[flow.ReasonNoListener].Packets != 0 || c[flow.ReasonPxUnexpected].Packets != 0 {
					t.Errorf("counters %v, want no refusal", c)
				}
			})
		}
		check(t, ln.Close())
	}
}

// closedByProxy makes one connection that the proxy ends first, which leaves the TIME_WAIT to it.
func closedByProxy(t *testing.T, client *lab.Namespace, ln net.Listener, s scene) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, s.client, s.server)
	check(t, err)
	defer c.Close()
	up, err := ln.Accept()
	check(t, err)
	check(t, up.Close())
	check(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("read %d bytes (%v), want the end", n, err)
	}
}
