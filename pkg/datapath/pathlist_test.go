package datapath_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// TestPathsOfManySlots: slots are read in batches, of which the last is not full.
func TestPathsOfManySlots(t *testing.T) {
	const slots = 2500
	r := newRigOf(t, datapath.Config{MaxPaths: slots, MaxFlows: 64, MaxLegs: 64})
	client := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}) }
	want := map[uint32]netip.Addr{}
	for i := range slots {
		slot, err := r.d.OpenPath(datapath.Path{Grant: "01TEST", Client: client(i), ServiceID: hostID, Service: "host-echo",
			Ports: []uint16{hostPort}, Deadline: datapath.BootTime() + 10*time.Minute})
		check(t, err)
		want[slot] = client(i)
	}
	for _, slot := range []uint32{0, 1023, 1024, 2048} {
		check(t, r.d.EndPath(slot, datapath.PathRevoked))
		check(t, r.d.FreePath(slot))
		delete(want, slot)
	}
	check(t, r.d.EndPath(slots-1, datapath.PathRevoked))
	got, err := r.d.Paths()
	check(t, err)
	if len(got) != len(want) {
		t.Fatalf("%d paths, want %d", len(got), len(want))
	}
	for i, s := range got {
		state := datapath.PathActive
		if s.Slot == slots-1 {
			state = datapath.PathRevoked
		}
		if s.Client != want[s.Slot] || s.State != state || len(s.Ports) != 1 || i > 0 && s.Slot <= got[i-1].Slot {
			t.Errorf("path %d is %+v, want client %v, state %v", i, s, want[s.Slot], state)
		}
	}
}
