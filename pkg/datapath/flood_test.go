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
				ageLegs(t, r.m, 31*time.Second)
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
func ageLegs(t *testing.T, m *bpf.SallyportMaps, by time.Duration) {
	t.Helper()
	for k, v := range all[bpf.LegKey, bpf.Leg](t, m.SpLegs) {
		then := uint64(datapath.BootTime() - by)
		v.OpenedNs, v.LastNs = then, then
		check(t, m.SpLegs.Put(&k, &v))
	}
}

// TestFloodedLegs: however a flood fills the table, with SYNs alone or with connections that it closes or resets, what carries no data
// makes room for others in seconds. Below half of the table everything has its time.
func TestFloodedLegs(t *testing.T) {
	r := newRig(t, 64, 64)
	s := r.scenes(t, lab.IPv4)["host"]
	const fins = bpf.SallyportSpFlagsSP_FIN_CLIENT | bpf.SallyportSpFlagsSP_FIN_SERVER
	const answered = bpf.SallyportSpFlagsSP_ANSWERED
	for name, c := range map[string]struct {
		flags   bpf.SallyportSpFlags
		age     time.Duration
		n, left int
	}{
		"half-open, some":  {0, 5 * time.Second, 32, 32},
		"half-open":        {0, 5 * time.Second, 64, 0},
		"half-open, fresh": {0, 2 * time.Second, 64, 64},
		"closed, some":     {answered | fins, 2 * time.Second, 32, 32},
		"closed":           {answered | fins, 2 * time.Second, 64, 0},
		"refused":          {bpf.SallyportSpFlagsSP_RST, 2 * time.Second, 64, 0},
		"reset":            {answered | bpf.SallyportSpFlagsSP_RST, 2 * time.Second, 64, 0},
		"reset just now":   {answered | bpf.SallyportSpFlagsSP_RST, 0, 64, 64},
		"live":             {answered, time.Minute, 64, 64},
	} {
		t.Run(name, func(t *testing.T) {
			r.reset(t)
			for i := range c.n {
				check(t, r.m.SpLegs.Put(&bpf.LegKey{Client: somebody(i), Server: datapath.ToAddr(s.server.Addr()), ServerPort: s.server.Port(), Side: down}, &bpf.Leg{Flags: uint32(c.flags)}))
			}
			ageLegs(t, r.m, c.age)
			_, err := r.d.Sweep()
			check(t, err)
			if left := len(all[bpf.LegKey, bpf.Leg](t, r.m.SpLegs)); left != c.left {
				t.Errorf("%d legs are left, want %d", left, c.left)
			}
			if verdict, _, _ := r.send(t, towards(syn)(s)); (verdict == actRedirect) != (c.left < 64) {
				t.Errorf("verdict on the next SYN: %d", verdict)
			}
		})
	}
}
