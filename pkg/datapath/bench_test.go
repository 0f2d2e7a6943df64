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
	"github.com/sallyport-dev/sallyport/test/lab"
)

// Packets are sent by BPF_PROG_TEST_RUN many at a time, so that its own cost, which is in every figure
// alike, is the kernel's set-up of a run and not the system call. Compare rows, not machines.

const perCall = 10000

// measure reports the nanoseconds of one packet.
func measure(b *testing.B, r *rig, p *ebpf.Program, probes ...probe) {
	b.Helper()
	check(b, r.Node.Do(func() error {
		var spent time.Duration
		packets := 0
		for b.Loop() {
			at := probes[packets/perCall%len(probes)]
			o := ebpf.RunOptions{Data: at.frame, Context: &at.ctx, Repeat: perCall}
			start := time.Now()
			if _, err := p.Run(&o); err != nil {
				return err
			}
			spent += time.Since(start)
			packets += perCall
		}
		b.ReportMetric(float64(spent.Nanoseconds())/float64(packets), "ns/packet")
		return nil
	}))
}

// BenchmarkUnprotected compares the hook with a program that does nothing.
func BenchmarkUnprotected(b *testing.B) {
	r := newRig(b, 0, 0)
	empty, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "empty", Type: ebpf.SchedCLS, AttachType: ebpf.AttachTCXIngress, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	check(b, err)
	b.Cleanup(func() { check(b, empty.Close()) })
	for _, f := range lab.Families() {
		s := r.scenes(b, f)["host"]
		s.server = netip.AddrPortFrom(s.server.Addr(), 9999)
		p := towards(ack)(s)
		b.Run("empty/"+f.String(), func(b *testing.B) { measure(b, r, empty, p) })
		b.Run("hook/"+f.String(), func(b *testing.B) { measure(b, r, r.d.Programs().SpDevIn, p) })
	}
}

// BenchmarkWatched sends mid-stream packets of a service that is not enforced; the shadowed one has a live path.
func BenchmarkWatched(b *testing.B) {
	r := newRig(b, 0, 0)
	for name, m := range map[string]datapath.Mode{"observed": datapath.Observe, "shadowed": datapath.Shadow} {
		r.mode(b, m)
		for _, f := range lab.Families() {
			s := r.scenes(b, f)["host"]
			r.reset(b)
			path(datapath.PathActive)(b, r, s, nil)
			b.Run(name+"/"+f.String(), func(b *testing.B) { measure(b, r, r.d.Programs().SpDevIn, towards(ack)(s)) })
		}
	}
}

// BenchmarkBypassed sends packets of live flows, one to a path, with few paths and with all.
func BenchmarkBypassed(b *testing.B) {
	for _, paths := range []int{1, 65536} {
		r := newRigOf(b, datapath.Config{MaxPaths: 65536, MaxFlows: 65536})
		for _, f := range lab.Families() {
			r.reset(b)
			var probes []probe
			for n := range paths {
				s := r.scenes(b, f)["host"]
				s.client = netip.AddrPortFrom(s.client.Addr(), uint16(n))
				r.livePath(b, s, uint32(n))
				if n%(paths/min(paths, 16)) == 0 {
					probes = append(probes, towards(ack)(s))
				}
			}
			b.Run(fmt.Sprintf("%d/%v", paths, f), func(b *testing.B) { measure(b, r, r.d.Programs().SpDevIn, probes...) })
		}
	}
}

// livePath makes slot n a live path with one flow.
func (r *rig) livePath(b *testing.B, s scene, n uint32) {
	key, now := flowKey(s), uint64(datapath.BootTime())
	check(b, r.m.SpPaths.Put(n, &bpf.Path{Epoch: 1, ServiceId: s.service, Client: key.Client, DeadlineNs: now + uint64(50*time.Minute)}))
	check(b, r.m.SpPathState.Put(n, &bpf.PathStatus{State: bpf.SallyportSpState(datapath.PathActive)}))
	check(b, r.m.SpFlows.Put(&key, &bpf.Flow{Slot: n, Epoch: 1, ServiceId: s.service, Hook: s.hook, Ifindex: uint32(s.device), Id: 1, OpenedNs: now, LastNs: now}))
}

// BenchmarkBackstop compares the backstop with a program that admits everything: packets to unprotected ports, and
// those that a leg or a live path explains.
func BenchmarkBackstop(b *testing.B) {
	r := newRig(b, 0, 0)
	empty, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "empty", Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetIngress, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
	check(b, err)
	b.Cleanup(func() { check(b, empty.Close()) })
	for _, f := range lab.Families() {
		s := r.scenes(b, f)["host"]
		other := s
		other.server = netip.AddrPortFrom(s.server.Addr(), 9999)
		b.Run("empty/"+f.String(), func(b *testing.B) { measure(b, r, empty, atSocket(ack)(s)) })
		b.Run("unprotected/"+f.String(), func(b *testing.B) { measure(b, r, r.d.Programs().SpCgIn, atSocket(ack)(other)) })
		r.reset(b)
		leg(up)(b, r, s, nil)
		b.Run("leg/"+f.String(), func(b *testing.B) { measure(b, r, r.d.Programs().SpCgIn, atSocket(ack)(s)) })
		r.reset(b)
		r.livePath(b, s, 0)
		b.Run("path/"+f.String(), func(b *testing.B) { measure(b, r, r.d.Programs().SpCgIn, atSocket(ack)(s)) })
	}
}
