package proxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// guests come into a room one after the other.
type guests struct {
	*testing.T
	room     *room
	listener *net.TCPListener
	came     time.Duration
}

func newGuests(t *testing.T, limit int) *guests {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &guests{T: t, room: newRoom(limit), listener: l}
}

// arrives is a stranger that comes from an address.
func (g *guests) arrives(addr string) (*session, flow.Reason) {
	g.Helper()
	c, err := net.DialTCP("tcp4", nil, g.listener.Addr().(*net.TCPAddr))
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { c.Close() })
	accepted, err := g.listener.AcceptTCP()
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { accepted.Close() })
	_, cancel := context.WithCancel(context.Background())
	g.came += time.Millisecond
	s := &session{down: accepted, client: netip.AddrPortFrom(netip.MustParseAddr(addr), 1), cancel: cancel, accepted: time.Unix(0, 0).Add(g.came), standing: unknown}
	return s, g.room.enter(s)
}

// enters must find a place.
func (g *guests) enters(addr string) *session {
	g.Helper()
	s, reason := g.arrives(addr)
	if reason != flow.ReasonNone {
		g.Fatalf("%s is turned away: %v", addr, reason)
	}
	return s
}

// settles must find one as a proven caller.
func (g *guests) settles(caller string) *session {
	g.Helper()
	s := g.enters("192.0.2.200")
	if !g.room.settle(s, caller) {
		g.Fatalf("%s is turned away", caller)
	}
	return s
}

func (g *guests) places(strangers, proven int) {
	g.Helper()
	if s, p := g.room.strangers.size(), g.room.proven.size(); s != strangers || p != proven {
		g.Errorf("%d strangers and %d proven, want %d and %d", s, p, strangers, proven)
	}
}

func TestStrangersPushOutWhoHasMost(t *testing.T) {
	g := newGuests(t, 8)
	alone := g.enters("192.0.2.1")
	same := []*session{g.enters("2001:db8::1"), g.enters("2001:db8::2")} // one network
	for i := range 30 {
		g.enters(fmt.Sprintf("2001:db8::%x", i+3))
	}
	g.places(8, 0)
	if end := alone.wasCut(); end != nil {
		t.Errorf("who has one connection was cut: %v", end)
	}
	for _, s := range same {
		if end := s.wasCut(); end == nil || end.reason != flow.ReasonLimit {
			t.Errorf("the oldest of those who have most ended with %v", end)
		}
	}
}

func TestStrangersPushOutWhoWasRefused(t *testing.T) {
	g := newGuests(t, 4)
	known, bad := g.enters("192.0.2.1"), g.enters("192.0.2.2")
	known.standing, bad.standing = welcome, refused
	for range 20 {
		g.enters("192.0.2.3").standing = unknown
	}
	if end := known.wasCut(); end != nil {
		t.Errorf("who was let in before was cut: %v", end)
	}
	if bad.wasCut() == nil {
		t.Error("who was refused before has kept the place")
	}
}

func TestStrangersNeverPushOutTheProven(t *testing.T) {
	g := newGuests(t, 4)
	proven := []*session{g.settles("a"), g.settles("a"), g.settles("a")}
	for range 20 {
		g.enters("192.0.2.1")
	}
	g.places(1, 3)
	g.room.settle(g.enters("192.0.2.2"), "a")
	if _, reason := g.arrives("192.0.2.3"); reason != flow.ReasonLimit {
		t.Errorf("with all places proven a stranger gets %v", reason)
	}
	for _, s := range proven {
		if end := s.wasCut(); end != nil {
			t.Errorf("a proven connection was cut: %v", end)
		}
	}
	g.places(0, 4)
}

func TestProvenLeaveRoomToStrangers(t *testing.T) {
	g := newGuests(t, 16)
	for range 14 {
		g.settles("many")
	}
	late := g.enters("192.0.2.1")
	if g.room.settle(late, "many") {
		t.Error("the proven took the places that are kept for strangers")
	}
	g.room.leave(late)
	g.enters("192.0.2.1")
	g.enters("192.0.2.2")
	g.places(2, 14)
}

func TestFewConnectionsBeatMany(t *testing.T) {
	g := newGuests(t, 16)
	for range 14 {
		g.settles("many")
	}
	few := g.settles("few")
	g.places(0, 14)
	for range 40 {
		g.room.leave(g.enters("192.0.2.1"))
		s := g.enters("192.0.2.1")
		g.room.settle(s, "few")
		g.room.leave(s)
	}
	if end := few.wasCut(); end != nil {
		t.Errorf("who has few was cut: %v", end)
	}
	for range 6 {
		g.settles("few")
	}
	s := g.enters("192.0.2.1")
	if g.room.proven.count["few"] != 7 || g.room.settle(s, "few") {
		t.Errorf("a caller with as many as the other took more: %v", g.room.proven.count)
	}
}

func TestRoomForgets(t *testing.T) {
	g := newGuests(t, 4)
	for i := range 12 {
		s := g.enters(fmt.Sprintf("192.0.2.%d", i))
		if i%2 == 0 {
			g.room.settle(s, fmt.Sprint(i))
		}
		g.room.leave(s)
		g.room.leave(s)
	}
	g.places(0, 0)
	if n := len(g.room.strangers.count) + len(g.room.proven.count); n != 0 {
		t.Errorf("%d of who left are still counted", n)
	}
	g.room.close()
	if _, reason := g.arrives("192.0.2.1"); reason != flow.ReasonDrained {
		t.Errorf("a closed room gives %v", reason)
	}
}

// TestWhoMadeRoomIsNotRefused: that a client's place went to another while it shook hands says nothing against it.
func TestWhoMadeRoomIsNotRefused(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb})
	c, err := net.Dial("tcp", l.addr)
	l.must(err)
	defer c.Close()
	_, err = c.Write([]byte{recordHandshake})
	l.must(err)
	l.eventually("the handshake to wait for the client", func() bool {
		l.proxy.turns.mu.Lock()
		defer l.proxy.turns.mu.Unlock()
		return l.proxy.turns.given > 0
	})
	s := l.proxy.room.snapshot()[0]
	s.cut(flow.ReasonLimit, "made room")
	l.find(flow.EventDeny, flow.ReasonLimit)
	if as := l.proxy.turns.standing(s.neighbourhood()); as != unknown {
		t.Errorf("its neighbourhood has standing %d", as)
	}
}
