package hostile

import (
	"net/netip"
	"testing"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
	"github.com/sallyport-dev/sallyport/test/packet"
	"github.com/sallyport-dev/sallyport/test/shape"
)

// TestBackstopAlone sends every shape to a node with no hook on any device, as if all of them had appeared
// while nobody looked: no service answers what the backstop alone has seen.
func TestBackstopAlone(t *testing.T) {
	leak.Check(t)
	control, enforced := build(t), build(t)
	if enforced.Cgroup() == "" {
		t.Skip("no control groups of version 2 are mounted: the backstop needs them")
	}
	enforced.load(t)
	check(t, enforced.Node.Do(func() error {
		_, err := enforced.d.AttachBackstop(enforced.Cgroup())
		return err
	}))
	for _, f := range lab.Families() {
		closed := enforced.ways(t, f)
		for _, open := range control.ways(t, f) {
			t.Run(open.name+"/"+f.String(), func(t *testing.T) { unhooked(t, open, named(closed, open.name)) })
		}
	}
}

// unhooked sends every shape on one way. They are sent together; if one is answered, one by one.
func unhooked(t *testing.T, open, closed way) {
	t.Helper()
	var all, control [][]byte
	for i, s := range shape.All() {
		if !s.Fits(open.packet()) || open.raw && notRaw(s, open.family()) {
			continue
		}
		if frames := s.Frames(closed.apart(i)); closed.fits(frames) {
			all, control = append(all, frames...), append(control, s.Frames(open.apart(i))...)
		}
	}
	if n := open.attack(t, control)["answered"]; n < 10 {
		t.Errorf("%d answers without enforcement, want more", n)
	}
	if closed.attack(t, all)["answered"] == 0 {
		return
	}
	for i, s := range shape.All() {
		if s.Fits(closed.packet()) && closed.attack(t, s.Frames(closed.apart(200+i)))["answered"] > 0 {
			t.Errorf("%s is answered", s.Name)
		}
	}
}

// apart is a packet of this way with a port and an identification of its own: a SYN is answered once.
func (a way) apart(i int) packet.Packet {
	p := a.packet()
	p.ID, p.Src = uint16(i+1), netip.AddrPortFrom(a.src, uint16(20000+i))
	return p
}
