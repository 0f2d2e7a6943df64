package datapath_test

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/packet"
)

func pathKey(s scene) bpf.PathKey {
	return bpf.PathKey{Client: datapath.ToAddr(s.client.Addr()), ServiceId: s.service, Port: s.server.Port()}
}

// path puts a path into slot 0, as the agent would but without its checks.
func path(state datapath.PathState, change ...func(*bpf.PathKey, *bpf.PathRef, *bpf.Path)) given {
	return func(t testing.TB, r *rig, s scene, _ *probe) {
		key, ref := pathKey(s), bpf.PathRef{Epoch: 1}
		v := bpf.Path{Epoch: 1, ServiceId: s.service, Client: key.Client, DeadlineNs: later(),
			Grant: datapath.ToLabel(grantName), Service: datapath.ToLabel("test")}
		for _, f := range change {
			f(&key, &ref, &v)
		}
		check(t, r.m.SpPaths.Put(uint32(0), &v))
		check(t, r.m.SpPathState.Put(uint32(0), &bpf.PathStatus{State: bpf.SallyportSpState(state)}))
		check(t, r.m.SpPathIndex.Put(&key, &ref))
		if key.ClientPort != 0 || key.Cgroup != 0 {
			besideBound(^uint32(0))(t, r, s, nil)
		}
	}
}

// boundTo has the path serve one port of the client, or one control group. The probe's client comes from port 40000.
func boundTo(port uint16, cgroup uint64) func(*bpf.PathKey, *bpf.PathRef, *bpf.Path) {
	return func(k *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) {
		k.ClientPort, k.Cgroup, v.ClientPort, v.Cgroup = port, cgroup, uint32(port), cgroup
	}
}

// besideBound says that some sockets of the client have paths of their own, besides the one in that slot.
func besideBound(slot uint32) given {
	return func(t testing.TB, r *rig, s scene, _ *probe) {
		key := pathKey(s)
		check(t, r.m.SpPathIndex.Put(&key, &bpf.PathRef{Slot: slot, Epoch: 1, Bound: 1}))
	}
}

// spoken is what the socket of the client said of the control group that it is in, so long ago.
func spoken(cgroup uint64, ago time.Duration) given {
	return func(t testing.TB, r *rig, s scene, _ *probe) {
		key := flowKey(s)
		check(t, r.m.SpSpeakers.Put(&key, &bpf.Speaker{Cgroup: cgroup, SaidNs: uint64(datapath.BootTime() - ago)}))
	}
}

// deadline moves the path's deadline to so many nanoseconds from now.
func deadline(fromNow int64) func(*bpf.PathKey, *bpf.PathRef, *bpf.Path) {
	return func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) {
		v.DeadlineNs = uint64(int64(datapath.BootTime()) + fromNow)
	}
}

// lapsed ends the agent's lease.
func lapsed(t testing.TB, r *rig, _ scene, _ *probe) {
	check(t, r.m.SpLease.Put(uint32(0), &bpf.Lease{UntilNs: uint64(datapath.BootTime())}))
}

// noConfig is a datapath that was never set up.
func noConfig(t testing.TB, r *rig, _ scene, _ *probe) {
	check(t, r.m.SpConfig.Put(uint32(0), &bpf.Config{}))
}

// otherSchema is a configuration that these programs do not know.
func otherSchema(t testing.TB, r *rig, _ scene, _ *probe) {
	c := r.cfg
	c.Schema++
	check(t, r.m.SpConfig.Put(uint32(0), &c))
}

func flowKey(s scene) bpf.FlowKey {
	return bpf.FlowKey{Client: datapath.ToAddr(s.client.Addr()), Server: datapath.ToAddr(s.server.Addr()),
		ClientPort: s.client.Port(), ServerPort: s.server.Port(), Protocol: uint32(s.protocol)}
}

// bypassed is a flow of slot 0 that was opened before the case and has had no packets.
func bypassed(change ...func(*bpf.Flow)) given {
	return func(t testing.TB, r *rig, s scene, _ *probe) {
		now := uint64(datapath.BootTime())
		k := flowKey(s)
		v := bpf.Flow{Epoch: 1, ServiceId: s.service, Hook: s.hook, Ifindex: uint32(s.device), Id: 7, OpenedNs: now, LastNs: now}
		if s.protocol == packet.UDP {
			v.UdpIdleS = udpIdle
		}
		for _, f := range change {
			f(&v)
		}
		check(t, r.m.SpFlows.Put(&k, &v))
	}
}

func ended(reason flow.Reason) func(*bpf.Flow) {
	return func(f *bpf.Flow) { f.Ended = bpf.SallyportSpReason(reason) }
}

func flags(bits bpf.SallyportSpFlags) func(*bpf.Flow) {
	return func(f *bpf.Flow) { f.Flags = uint32(bits) }
}

const (
	bothFins = bpf.SallyportSpFlagsSP_FIN_CLIENT | bpf.SallyportSpFlagsSP_FIN_SERVER
	reset    = bpf.SallyportSpFlagsSP_RST
	shaken   = bpf.SallyportSpFlagsSP_ANSWERED
)

func legKey(s scene, side bpf.SallyportSpLegSide) bpf.LegKey {
	return bpf.LegKey{Client: datapath.ToAddr(s.client.Addr()), Server: datapath.ToAddr(s.server.Addr()),
		ClientPort: s.client.Port(), ServerPort: s.server.Port(), Side: side}
}

const (
	down = bpf.SallyportSpLegSideSP_LEG_DOWN
	up   = bpf.SallyportSpLegSideSP_LEG_UP
)

// leg is one half of a proxied flow, stray the memory of a packet without a flow.
func leg(side bpf.SallyportSpLegSide) given {
	return func(t testing.TB, r *rig, s scene, _ *probe) { putLeg(t, r.m.SpLegs, s, side, s.service) }
}

func stray(side bpf.SallyportSpLegSide) given {
	return func(t testing.TB, r *rig, s scene, _ *probe) { putLeg(t, r.m.SpStrays, s, side, 0) }
}

func putLeg(t testing.TB, m *ebpf.Map, s scene, side bpf.SallyportSpLegSide, service uint32) {
	t.Helper()
	now := uint64(datapath.BootTime())
	k := legKey(s, side)
	check(t, m.Put(&k, &bpf.Leg{Hook: s.hook, Ifindex: uint32(s.device), ServiceId: service, OpenedNs: now, LastNs: now}))
}

// origin says that the client came to the service by the scene's device.
func origin(t testing.TB, r *rig, s scene, _ *probe) {
	k := bpf.OriginKey{Client: datapath.ToAddr(s.client.Addr()), Server: datapath.ToAddr(s.server.Addr()), ServerPort: uint32(s.server.Port())}
	check(t, r.m.SpOrigins.Put(&k, &bpf.Origin{Hook: s.hook, Ifindex: uint32(s.device)}))
}

// marked gives the packet the mark that px0 gives for this side of the scene's flow.
func marked(side bpf.SallyportSpLegSide) given {
	return func(_ testing.TB, r *rig, s scene, p *probe) { p.ctx.Mark = markOf(r, s, side) }
}

// markedBy gives it any other mark.
func markedBy(mark uint32) given {
	return func(_ testing.TB, _ *rig, _ scene, p *probe) { p.ctx.Mark = mark }
}

func noMark(*rig, scene) uint32 { return 0 }

func markOf(r *rig, s scene, side bpf.SallyportSpLegSide) uint32 {
	k := legKey(s, side)
	raw := append(append([]byte(nil), k.Client.Bytes[:]...), k.Server.Bytes[:]...)
	raw = binary.NativeEndian.AppendUint16(raw, k.ClientPort)
	raw = binary.NativeEndian.AppendUint16(raw, k.ServerPort)
	raw = binary.NativeEndian.AppendUint32(raw, uint32(k.Side))
	return max(halfSipHash(r.cfg.Secret[0], raw), 1)
}

// halfSipHash is HalfSipHash-2-4 with 32 bits of output, after the authors' description; the key is
// two words, the low one first.
func halfSipHash(key uint64, b []byte) uint32 {
	k0, k1 := uint32(key), uint32(key>>32)
	v := [4]uint32{k0, k1, 0x6c796765 ^ k0, 0x74656462 ^ k1}
	round := func() {
		v[0] += v[1]
		v[1] = bits.RotateLeft32(v[1], 5) ^ v[0]
		v[0] = bits.RotateLeft32(v[0], 16)
		v[2] += v[3]
		v[3] = bits.RotateLeft32(v[3], 8) ^ v[2]
		v[0] += v[3]
		v[3] = bits.RotateLeft32(v[3], 7) ^ v[0]
		v[2] += v[1]
		v[1] = bits.RotateLeft32(v[1], 13) ^ v[2]
		v[2] = bits.RotateLeft32(v[2], 16)
	}
	word := func(m uint32) {
		v[3] ^= m
		round()
		round()
		v[0] ^= m
	}
	last := uint32(len(b)) << 24
	for ; len(b) >= 4; b = b[4:] {
		word(binary.LittleEndian.Uint32(b))
	}
	for i, c := range b {
		last |= uint32(c) << (8 * i)
	}
	word(last)
	v[2] ^= 0xff
	for range 4 {
		round()
	}
	return v[1] ^ v[3]
}

// TestHalfSipHash holds the reference of the tests against published vectors: key 00..07, input
// 00, 01, 02, ... of rising length.
func TestHalfSipHash(t *testing.T) {
	want := []uint32{0x5b9f35a9, 0xb85a4727, 0x03a662fa, 0x04e7fe8a}
	for n, w := range want {
		in := []byte{0, 1, 2, 3}[:n]
		if got := halfSipHash(0x0706050403020100, in); got != w {
			t.Errorf("%d bytes: %#08x, want %#08x", n, got, w)
		}
	}
}

// foreign moves the packet's destination, or source, to another machine that the node has a route to.
func foreign(s scene) netip.Addr {
	a := s.client.Addr().AsSlice()
	a[len(a)-1] = 77
	out, _ := netip.AddrFromSlice(a)
	return out
}
