package datapath_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// limited prepares a rig for SYNs.
func limited(t testing.TB, source, service datapath.SYNLimit) *rig {
	r := newFilterRig(t)
	check(t, r.d.LimitSYNs(source, service))
	return r
}

// admitted counts how many of n equal frames pass.
func (r *rig) admitted(t testing.TB, frame []byte, n int) int {
	t.Helper()
	passed := 0
	for range n {
		if r.sendXDP(t, r.d.Programs().SpXdpUp, frame) == xdpPass {
			passed++
		}
	}
	return passed
}

func synFrom(address string, s scene) []byte { return made(claims(address))(s) }

// TestSYNBuckets: a burst passes and no SYN more; other sources, other packets and other machines are not touched.
func TestSYNBuckets(t *testing.T) {
	r := limited(t, datapath.SYNLimit{Rate: 1, Burst: 20}, datapath.SYNLimit{})
	for _, f := range lab.Families() {
		for _, where := range []string{"host", "pod"} {
			s := r.scenes(t, f)[where]
			a, b := map[lab.Family]string{lab.IPv4: "192.0.2.", lab.IPv6: "2001:db8:" + map[string]string{"host": "1", "pod": "2"}[where] + "::"}[f], 1
			if f == lab.IPv4 && where == "pod" {
				b = 10
			}
			first, second := fmt.Sprint(a, b), fmt.Sprint(a, b+1)
			if f == lab.IPv6 {
				second = fmt.Sprintf("2001:db8:%s:1::1", map[string]string{"host": "1", "pod": "2"}[where])
			}
			if n := r.admitted(t, synFrom(first, s), 300); n < 20 || n > 22 { // the bucket fills on a slow machine
				t.Errorf("%s/%v: %d SYNs of one source passed, want 20", where, f, n)
			}
			if n := r.admitted(t, synFrom(second, s), 5); n != 5 {
				t.Errorf("%s/%v: %d of 5 SYNs of another source passed", where, f, n)
			}
			if f == lab.IPv6 && r.admitted(t, synFrom(first+"1", s), 5) > 1 {
				t.Errorf("%s: an address of the same /64 has a bucket of its own", where)
			}
			ackFrame := made(func(s scene, p *packet.Packet) { claims(first)(s, p); p.Flags = ack })(s)
			if n := r.admitted(t, ackFrame, 50); n != 50 {
				t.Errorf("%s/%v: %d of 50 later packets passed", where, f, n)
			}
			for name, other := range map[string]func(scene, *packet.Packet){"unprotected": unprotected(claims(first)), "another machine's": abroad(claims(first))} {
				if n := r.admitted(t, made(other)(s), 50); n != 50 {
					t.Errorf("%s/%v: %d of 50 SYNs passed to %s", where, f, n, name)
				}
			}
		}
	}
}

// TestSYNBucketOfService: many sources together get what the service's bucket has, and each service has its own.
func TestSYNBucketOfService(t *testing.T) {
	r := limited(t, datapath.SYNLimit{Rate: 1, Burst: 5}, datapath.SYNLimit{Rate: 1, Burst: 30})
	for _, where := range []string{"host", "pod"} {
		s := r.scenes(t, lab.IPv4)[where]
		r.reset(t)
		passed := 0
		for n := range 100 {
			passed += r.admitted(t, synFrom(fmt.Sprintf("172.16.%d.%d", len(where), n+1), s), 1)
		}
		if passed < 30 || passed > 32 {
			t.Errorf("%s: %d SYNs of 100 sources passed, want 30", where, passed)
		}
		counted := r.counters(t)[flow.ReasonXDPSYNService].Packets
		if int(counted) != 100-passed {
			t.Errorf("%s: %d counted as %s, want %d", where, counted, flow.ReasonXDPSYNService, 100-passed)
		}
	}
}

// TestSYNBucketRefills: a bucket has one token more after each interval, and never more than its burst.
func TestSYNBucketRefills(t *testing.T) {
	r := limited(t, datapath.SYNLimit{Rate: 20, Burst: 3}, datapath.SYNLimit{})
	s := r.scenes(t, lab.IPv4)["host"]
	frame := synFrom("192.0.2.1", s)
	start := time.Now()
	passed := 0
	for time.Since(start) < 500*time.Millisecond {
		passed += r.admitted(t, frame, 1)
	}
	most := 3 + int(time.Since(start)/(50*time.Millisecond))
	if passed < 10 || passed > most {
		t.Errorf("%d SYNs passed in %v, want 10 to %d", passed, time.Since(start), most)
	}
	waitUntil(t, "the bucket to be full", func() bool { return r.bucketFull(t, "192.0.2.1") })
	if n := r.admitted(t, frame, 50); n < 3 || n > 6 {
		t.Errorf("%d SYNs passed at once, want 3", n)
	}
}

func (r *rig) bucketFull(t testing.TB, source string) bool {
	var b bpf.Bucket
	key := datapath.ToAddr(netip.MustParseAddr(source))
	check(t, r.m.SpSynSources.Lookup(&key, &b))
	return time.Duration(b.FullNs) < datapath.BootTime()
}

// TestSYNRace: CPUs that take from one bucket at a time never take more than it has.
func TestSYNRace(t *testing.T) {
	const burst, workers, each = 200000, 4, 100000
	r := limited(t, datapath.SYNLimit{Rate: 1, Burst: burst}, datapath.SYNLimit{})
	frame := synFrom("192.0.2.1", r.scenes(t, lab.IPv4)["host"])
	done := make(chan error, workers)
	start := time.Now()
	for range workers {
		go func() {
			done <- r.Node.Do(func() error {
				_, err := r.d.Programs().SpXdpUp.Run(&ebpf.RunOptions{Data: frame, Repeat: each})
				return err
			})
		}()
	}
	for range workers {
		check(t, <-done)
	}
	dropped := r.counters(t)[flow.ReasonXDPSYNSource].Packets
	passed := workers*each - int(dropped)
	if most := burst + int(time.Since(start)/time.Second) + 1; passed > most || passed < burst*9/10 {
		t.Errorf("%d SYNs passed, want %d to %d", passed, burst, most)
	}
}
