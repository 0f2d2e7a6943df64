package datapath_test

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/test/reference"
	"github.com/sallyport-dev/sallyport/test/shape"
)

// TestFilterDropsNothingFree: the uplink's filter opens nothing, so what it must not do is to take away what
// is nobody's: a whole segment or datagram for no protected port, from an address that can be one.
func TestFilterDropsNothingFree(t *testing.T) {
	d := newDifferential(t, 1)
	passed := 0
	for i := range uint64(50_000) {
		c := d.gen.Case(i)
		if len(c.Frame) < 34 || len(c.Frame) > 3000 {
			continue
		}
		j := d.world.Judge(d.asReceived(c).frame)
		if j.Verdict != reference.Free || !j.Readable || d.oddSource(j.Tuple) {
			continue
		}
		for name, verdict := range map[string]uint32{"native": d.sendXDP(t, d.d.Programs().SpXdpUp, c.Frame), "generic": d.sendXDP(t, d.d.Programs().SpXdpGeneric, c.Frame)} {
			if verdict != xdpPass {
				t.Fatalf("case %d (%s), %s: verdict %d for %x\n%+v", i, c.Shape, name, verdict, c.Frame, j)
			}
		}
		passed++
	}
	if passed < 1000 {
		t.Errorf("%d packets were free, want more", passed)
	}
}

// asReceived is the case at the uplink's ingress, wherever it was made for.
func (d *differential) asReceived(c shape.Case) drawn {
	c.Frame = slices.Clone(c.Frame)
	c.Place = 0
	return d.seen(c)
}

// oddSource are sources that the filter drops whatever they send, and destinations that are no machine's.
func (d *differential) oddSource(t reference.Tuple) bool {
	src, dst := t.Src.Addr(), t.Dst.Addr()
	none := func(a netip.Addr) bool {
		return a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() || a.Is4In6() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255})
	}
	return src == dst || none(src) || dst.IsLoopback() || dst.Is4In6() || slices.Contains(d.world.Local, src) || slices.Contains(d.world.Shared, src)
}
