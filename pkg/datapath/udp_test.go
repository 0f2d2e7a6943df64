package datapath_test

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// newUDPNode has UDP services beside the others, and TCP services that refuse UDP at their ports.
func newUDPNode(t *testing.T, idle time.Duration) *node {
	t.Helper()
	n := newNode(t, datapath.ProfileAuto)
	services := n.d.Services()
	for i := range services {
		services[i].DenyUDP = true
	}
	host, pod := services[0], services[1]
	if host.ID != hostID {
		host, pod = pod, host
	}
	host.ID, host.Name, host.Ports = hostUDPID, "host-udp", []uint16{hostUDPPort}
	pod.ID, pod.Name, pod.Ports = podUDPID, "pod-udp", []uint16{podUDPPort}
	for _, s := range []datapath.Service{host, pod} {
		s.Protocol, s.Idle, s.DenyUDP = datapath.UDP, idle, false
		services = append(services, s)
	}
	_, err := n.d.SetServices(services)
	must(t, err)
	for _, f := range lab.Families() {
		for _, a := range []netip.Addr{n.Node.Addr(f), f.Loopback()} {
			must(t, n.Node.Datagrams(netip.AddrPortFrom(a, hostUDPPort)))
			must(t, n.Node.Datagrams(netip.AddrPortFrom(a, hostPort)))
		}
		must(t, n.Pod.Datagrams(netip.AddrPortFrom(n.Pod.Addr(f), podUDPPort)))
		must(t, n.Pod.Datagrams(netip.AddrPortFrom(n.Pod.Addr(f), podPort)))
	}
	return n
}

// udp is the same way to the UDP service.
func (c cell) udp() cell {
	if c.serviceID == hostID {
		c.port, c.serviceID = hostUDPPort, hostUDPID
	} else {
		c.port, c.serviceID = podUDPPort, podUDPID
	}
	return c
}

func (c cell) dialUDP(t *testing.T) *net.UDPConn {
	t.Helper()
	conn, err := c.client.DialUDP(within(t), netip.AddrPortFrom(c.from, 0), c.target())
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

func wantAnswer(t *testing.T, n *node, conn *net.UDPConn) {
	t.Helper()
	seen, err := lab.AskDatagram(conn, []byte("hello"), 5*time.Second)
	own := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	if err != nil || seen != netip.AddrPortFrom(own.Addr().Unmap(), own.Port()) {
		t.Fatalf("service saw %v, want %v (%v); counters:%s", seen, own, err, n.counters(t))
	}
}

// wantRefusal: the sender's socket hears of it, much earlier than it would give up.
func wantRefusal(t *testing.T, n *node, conn *net.UDPConn) {
	t.Helper()
	if seen, err := lab.AskDatagram(conn, []byte("hello"), 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatalf("service saw %v (%v), want refusal; counters:%s", seen, err, n.counters(t))
	}
}

// TestDatagramsAreAnswered asks every UDP service in every way: refused without a path, served under one, refused
// again when it is over. UDP to a port of TCP is refused.
func TestDatagramsAreAnswered(t *testing.T) {
	t.Parallel()
	n := newUDPNode(t, 30*time.Second)
	for _, tcp := range n.cells() {
		c := tcp.udp()
		t.Run(c.name, func(t *testing.T) {
			wantRefusal(t, n, tcp.dialUDP(t))
			wantRefusal(t, n, c.dialUDP(t))
			slot := c.path(n, t, time.Minute)
			conn := c.dialUDP(t)
			wantAnswer(t, n, conn)
			wantAnswer(t, n, conn)
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			wantRefusal(t, n, conn)
			wantRefusal(t, n, c.dialUDP(t))
		})
	}
}

// TestUDPDeadline: with no agent there, not one datagram reaches the service after the deadline, by a tap at the service.
func TestUDPDeadline(t *testing.T) {
	t.Parallel()
	n := newUDPNode(t, 30*time.Second)
	for _, f := range lab.Families() {
		c := cell{"pod/remote", n.Client, n.Client.Addr(f), n.Pod.Addr(f), podUDPPort, podUDPID}
		t.Run(f.String(), func(t *testing.T) {
			tap, err := n.Pod.Tap(podUDPPort)
			must(t, err)
			const left = 700 * time.Millisecond
			deadline := datapath.BootTime() + left
			c.path(n, t, left)
			conn := c.dialUDP(t)
			sent, sentAfter := 0, 0
			for datapath.BootTime() < deadline+300*time.Millisecond {
				_, err := conn.Write([]byte("x"))
				if err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
					t.Fatal(err)
				}
				sent++
				if datapath.BootTime() > deadline {
					sentAfter++
				}
				time.Sleep(100 * time.Microsecond) // the pace of the sender
			}
			all, err := tap.Packets()
			must(t, err)
			arrived, late := 0, 0
			for _, p := range all {
				if p.UDP && p.Dst.Port() == podUDPPort {
					arrived++
					if p.Boot > deadline+5*time.Millisecond { // what two clocks differ when they are read one after the other
						late++
					}
				}
			}
			if arrived == 0 || sentAfter == 0 || late > 0 {
				t.Errorf("%d of %d datagrams arrived, %d after the deadline, %d sent after it", arrived, sent, late, sentAfter)
			}
		})
	}
}

// TestUDPIdle: silence ends a flow with its record; the next datagram opens another while the path lives.
func TestUDPIdle(t *testing.T) {
	t.Parallel()
	n := newUDPNode(t, time.Second)
	c := cell{"pod/remote", n.Client, n.Client.Addr(lab.IPv4), n.Pod.Addr(lab.IPv4), podUDPPort, podUDPID}
	slot := c.path(n, t, time.Minute)
	conn := c.dialUDP(t)
	wantAnswer(t, n, conn)
	var closed []flow.Record
	waitUntil(t, "the silent flow to be swept", func() bool {
		records, err := n.d.Sweep()
		must(t, err)
		closed = append(closed, records...)
		return len(closed) > 0
	})
	if r := closed[0]; r.Reason != flow.ReasonUDPIdle || r.Protocol != "udp" || r.PacketsToServer != 1 || r.PacketsToClient != 1 {
		t.Errorf("record is %+v", r)
	}
	wantAnswer(t, n, conn)
	s, err := n.d.Paths()
	must(t, err)
	if len(s) != 1 || s[0].Slot != slot || s[0].Flows != 2 {
		t.Errorf("paths are %+v, want two flows in slot %d", s, slot)
	}
}

// TestUDPClientsAreFree: what a node or pod asks elsewhere from a port that is protected for TCP, or from any other,
// is answered.
func TestUDPClientsAreFree(t *testing.T) {
	t.Parallel()
	n := newUDPNode(t, 30*time.Second)
	for _, f := range lab.Families() {
		must(t, n.Client.Datagrams(netip.AddrPortFrom(n.Client.Addr(f), hostPort)))
		for _, from := range []*lab.Namespace{n.Node, n.Pod} {
			conn, err := from.DialUDP(within(t), netip.AddrPortFrom(from.Addr(f), 0), netip.AddrPortFrom(n.Client.Addr(f), hostPort))
			must(t, err)
			if _, err := lab.AskDatagram(conn, []byte("hello"), 5*time.Second); err != nil {
				t.Errorf("%s, %v: %v; counters:%s", from.Name, f, err, n.counters(t))
			}
			must(t, conn.Close())
		}
	}
}

// TestDatagramsInFragments: a datagram that goes in fragments is refused, served and counted whole; one that a
// node or pod is sent by somebody whom it asked arrives.
func TestDatagramsInFragments(t *testing.T) {
	t.Parallel()
	n := newUDPNode(t, 30*time.Second)
	large := make([]byte, 20000)
	for _, f := range lab.Families() {
		must(t, n.Client.Datagrams(netip.AddrPortFrom(n.Client.Addr(f), 53)))
		for _, c := range []cell{
			{"host", n.Client, n.Client.Addr(f), n.Node.Addr(f), hostUDPPort, hostUDPID},
			{"pod", n.Client, n.Client.Addr(f), n.Pod.Addr(f), podUDPPort, podUDPID},
		} {
			t.Run(c.name+"/"+f.String(), func(t *testing.T) {
				conn := c.dialUDP(t)
				if _, err := lab.AskDatagram(conn, large, 300*time.Millisecond); err == nil {
					t.Fatalf("served without a path; counters:%s", n.counters(t))
				}
				slot := c.path(n, t, time.Minute)
				if _, err := lab.AskDatagram(conn, large, 5*time.Second); err != nil {
					t.Fatalf("%v; counters:%s", err, n.counters(t))
				}
				paths, err := n.d.Paths()
				must(t, err)
				for _, p := range paths {
					if p.Slot == slot && (p.BytesToServer < 20000 || p.BytesToClient < 20000) {
						t.Errorf("counted %d bytes to the server, %d to the client", p.BytesToServer, p.BytesToClient)
					}
				}
				asker := map[string]*lab.Namespace{"host": n.Node, "pod": n.Pod}[c.name]
				free, err := asker.DialUDP(within(t), netip.AddrPortFrom(asker.Addr(f), 0), netip.AddrPortFrom(n.Client.Addr(f), 53))
				must(t, err)
				defer free.Close()
				if _, err := lab.AskDatagram(free, large, 5*time.Second); err != nil {
					t.Errorf("an answer to a free question: %v; counters:%s", err, n.counters(t))
				}
			})
		}
	}
}
