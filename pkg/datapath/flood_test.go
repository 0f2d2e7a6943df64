package datapath_test

import (
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// TestHalfOpenLegsEnd: a SYN to which the proxy's kernel answered, and whose sender never came back, is
// over after half a minute, however often the answer was repeated. A flood of them would fill the table
// for as long as they stay. One handshake later the leg is that of a connection.
func TestHalfOpenLegsEnd(t *testing.T) {
	r := newRig(t, 64, 64)
	for _, f := range lab.Families() {
		for name, c := range map[string]struct {
			answers []uint8
			left    int
		}{
			"half-open": {[]uint8{syn | ack, syn | ack}, 0},
			"shaken":    {[]uint8{syn | ack, ack}, 1},
		} {
			t.Run(name+"/"+f.String(), func(t *testing.T) {
				r.reset(t)
				s := r.scenes(t, f)["host"]
				r.send(t, at(s.towards, s.device, tcp(s.client, s.server, packet.SYN)))
				ageLegs(t, r, 31*time.Second)
				for _, flags := range c.answers {
					r.send(t, at("sp_px0_in", r.px.Px0(), tcp(s.server, s.client, flags)))
				}
				_, err := r.d.Sweep()
				check(t, err)
				if left := len(all[bpf.LegKey, bpf.Leg](t, r.m.SpLegs)); left != c.left {
					t.Errorf("%d legs are left, want %d", left, c.left)
				}
			})
		}
	}
}

// ageLegs makes every leg so much older.
func ageLegs(t *testing.T, r *rig, by time.Duration) {
	t.Helper()
	for k, v := range all[bpf.LegKey, bpf.Leg](t, r.m.SpLegs) {
		then := uint64(datapath.BootTime() - by)
		v.OpenedNs, v.LastNs = then, then
		check(t, r.m.SpLegs.Put(&k, &v))
	}
}
