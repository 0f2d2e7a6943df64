package extauthz

import (
	"net"
	"net/netip"
	"testing"

	"google.golang.org/grpc/codes"
)

// TestIdleStrangers: who connects and says nothing keeps no gateway waiting, however many they are.
func TestIdleStrangers(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	for range 500 { // eight times as many as there are places
		c, err := net.Dial("tcp", l.tcp)
		l.must(err)
		defer c.Close()
	}
	if out := l.ask(l.remote(gateway), l.httpCheck(webID, "GET", "/public/a")); codeOf(out) != codes.OK {
		t.Errorf("%v", out)
	}
}

// from is a connection from an address, which notes its end.
type from struct {
	net.Conn
	address string
	closed  bool
}

func (f *from) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(f.address))
}

func (f *from) Close() error {
	f.closed = true
	return nil
}

// TestStrangersMakeRoom: the oldest of those of whom there are most.
func TestStrangersMakeRoom(t *testing.T) {
	t.Parallel()
	d := &door{}
	all := []*from{{address: "192.0.2.1:1"}, {address: "[2001:db8::1]:1"}, {address: "[2001:db8::2]:1"}}
	for range maxStrangers - len(all) {
		all = append(all, &from{address: "198.51.100.1:1"})
	}
	for _, f := range all {
		d.admit(f)
	}
	closed := func() (count int) {
		for _, f := range all {
			if f.closed {
				count++
			}
		}
		return count
	}
	if closed() != 0 {
		t.Fatalf("%d had to go while there was room", closed())
	}
	d.admit(&from{address: "203.0.113.1:1"})
	if closed() != 1 || !all[3].closed {
		t.Errorf("%d had to go, of whom there are most: %v", closed(), all[3].closed)
	}
	for range maxStrangers - 5 { // until of the others there is one
		d.admit(&from{address: "203.0.113.2:1"})
	}
	if all[0].closed || len(d.strangers) != maxStrangers {
		t.Errorf("who is alone had to go: %v; %d are in", all[0].closed, len(d.strangers))
	}
	if all[1].closed || all[2].closed {
		t.Error("two of one network had to go before many of another")
	}
}
