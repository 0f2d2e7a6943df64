package datapath_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// BenchmarkFilter compares the uplink filter with an XDP program that does nothing.
func BenchmarkFilter(b *testing.B) {
	r := newFilterRig(b)
	nothing, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "empty", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, int32(xdpPass)), asm.Return()}})
	check(b, err)
	b.Cleanup(func() { check(b, nothing.Close()) })
	filter := r.d.Programs().SpXdpUp
	check(b, r.d.SetSources([]netip.Prefix{host(r.Node.Addr(lab.IPv4)), host(r.Node.Addr(lab.IPv6))}, manySources(10000)))
	unbound, bound := datapath.SYNLimit{}, datapath.SYNLimit{Rate: 1000000, Burst: 1000000}
	for _, f := range lab.Families() {
		s := r.scenes(b, f)["host"]
		pod := r.scenes(b, f)["pod"]
		for _, row := range []struct {
			name  string
			prog  *ebpf.Program
			frame []byte
			limit datapath.SYNLimit
		}{
			{"empty", nothing, segment(ack)(s), unbound},
			{"unprotected", filter, made(unprotected(none))(s), unbound},
			{"protected", filter, segment(ack)(s), unbound},
			{"SYN", filter, segment(syn)(s), unbound},
			{"SYN to pod, bucket", filter, segment(syn)(pod), bound},
			{"SYN to node, bucket", filter, segment(syn)(s), bound},
			{"SYN to node, empty bucket", filter, segment(syn)(s), datapath.SYNLimit{Rate: 1, Burst: 1}},
			{"own source", filter, made(func(s scene, p *packet.Packet) { claimsOwn(s, p) })(pod), unbound},
		} {
			b.Run(row.name+"/"+f.String(), func(b *testing.B) {
				r.reset(b)
				check(b, r.d.LimitSYNs(row.limit, datapath.SYNLimit{}))
				r.measureXDP(b, row.prog, row.frame)
			})
		}
	}
}

// manySources is a deny list of neighbours.
func manySources(n int) []netip.Prefix {
	all := make([]netip.Prefix, n)
	for i := range all {
		all[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), 32)
	}
	return all
}

// measureXDP takes the kernel's own clock: to begin and end such a run costs it a grace period.
func (r *rig) measureXDP(b *testing.B, p *ebpf.Program, frame []byte) {
	b.Helper()
	check(b, r.Node.Do(func() error {
		var spent time.Duration
		calls := 0
		for b.Loop() {
			_, each, err := p.Benchmark(frame, 10*perCall, nil)
			if err != nil {
				return err
			}
			spent += each
			calls++
		}
		b.ReportMetric(float64(spent.Nanoseconds())/float64(calls), "ns/packet")
		return nil
	}))
}
