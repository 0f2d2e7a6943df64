package hostile

import (
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
	"github.com/sallyport-dev/sallyport/test/shape"
)

// TestShapes sends every shape of packet from every attacker to every service. The control shows that it
// would have arrived, or that Linux refuses it (what newer kernels refuse and older ones do not, may do either); with
// enforcement nothing arrives.
func TestShapes(t *testing.T) {
	leak.Check(t)
	control, enforced := newWorld(t, false), newWorld(t, true)
	id := uint16(0)
	for _, f := range lab.Families() {
		open, closed := control.ways(t, f), enforced.ways(t, f)
		for _, s := range shape.All() {
			if !s.Fits(open[0].packet()) {
				continue
			}
			t.Run(s.Name+"/"+f.String(), func(t *testing.T) {
				for _, a := range open {
					id++
					attack(t, s, id, a, named(closed, a.name))
				}
			})
		}
	}
}

func named(ways []way, name string) way {
	for _, a := range ways {
		if a.name == name {
			return a
		}
	}
	panic("no way " + name)
}

// notForwarded are shapes that a router does not pass on to a pod.
func notForwarded(name string) bool {
	return name == "ipv6/multicast destination" || strings.HasPrefix(name, "udp/") && (strings.Contains(name, "cast"))
}

// notRaw are shapes that the node's own IP output does not send: it writes the frame, and the length of
// an IPv4 packet, itself.
func notRaw(s shape.Shape, f lab.Family) bool {
	switch group, _, _ := strings.Cut(s.Name, "/"); group {
	case "vlan", "link":
		return true
	case "length":
		return f == lab.IPv4 && strings.HasPrefix(s.Name, "length/IP")
	}
	return s.Name == "ipv6/mapped destination" // routed before, it arrives
}

// attack sends a shape on one way, without enforcement and with it. id is of this attack alone, so that its
// fragments meet no others.
func attack(t *testing.T, s shape.Shape, id uint16, open, closed way) {
	t.Helper()
	p, q := open.packet(), closed.packet()
	p.ID, q.ID = id, id
	frames := s.Frames(p)
	if !open.fits(frames) || open.raw && notRaw(s, open.family()) {
		return
	}
	refused := s.Refused != "" || open.toPod() && notForwarded(s.Name)
	if arrived := open.attack(t, frames)["arrived"]; refused == (arrived > 0) && s.Bounded == "" {
		t.Errorf("%s: %d packets arrive without enforcement; refused by Linux itself: %q", open.name, arrived, s.Refused)
	}
	if n := closed.attack(t, s.Frames(q))["arrived"]; n > 0 {
		t.Errorf("%s: %d packets arrive", closed.name, n)
	}
}
