package datapath_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// How long an end may take to reach both parties once a packet has told of it. Milliseconds are usual; the
// first retransmission, which would hide a missing RST, comes after 200.
const atOnce = 150 * time.Millisecond

const (
	pushHostPort = 9090
	pushPodPort  = 9091
)

// pair is both ends of one bypassed connection.
type pair struct {
	client, server *net.TCPConn
	slot           uint32
}

// pushers protects a silent service on the node and one in the pod, and hands over their connections.
func (n *node) pushers(t *testing.T) <-chan net.Conn {
	t.Helper()
	pod, err := n.Node.Ifindex(lab.PodDevice(0))
	must(t, err)
	_, err = n.d.SetServices([]datapath.Service{
		{ID: hostID, Name: "host-push", Target: datapath.TargetHost, Ports: []uint16{pushHostPort}},
		{ID: podID, Name: "pod-push", Target: datapath.TargetPod, Ports: []uint16{pushPodPort}, Ifindex: pod,
			Addresses: []netip.Addr{n.Pod.Addr(lab.IPv4), n.Pod.Addr(lab.IPv6)}},
	})
	must(t, err)
	conns := make(chan net.Conn, 1)
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	hold := func(c net.Conn) {
		conns <- c
		<-over
	}
	for _, f := range lab.Families() {
		_, err := n.Node.Serve(netip.AddrPortFrom(unspecified(f), pushHostPort), hold)
		must(t, err)
		_, err = n.Pod.Serve(netip.AddrPortFrom(unspecified(f), pushPodPort), hold)
		must(t, err)
	}
	return conns
}

// pushCells are the cells with the pushers' ports.
func (n *node) pushCells() []cell {
	cells := n.cells()
	for i := range cells {
		cells[i].port += pushHostPort - hostPort
	}
	return cells
}

// connected opens a path and a connection under it, over which each side has said something.
func (c cell) connected(t *testing.T, n *node, conns <-chan net.Conn, left time.Duration) pair {
	t.Helper()
	p := pair{slot: c.path(n, t, left)}
	p.client = c.dial(t).(*net.TCPConn)
	select {
	case s := <-conns:
		p.server = s.(*net.TCPConn)
	case <-within(t).Done():
		t.Fatalf("service was not reached; counters:%s", n.counters(t))
	}
	said(t, p.client, p.server)
	said(t, p.server, p.client)
	return p
}

func said(t *testing.T, from, to net.Conn) {
	t.Helper()
	_, err := io.WriteString(from, "hello")
	must(t, err)
	must(t, to.SetReadDeadline(time.Now().Add(5*time.Second)))
	_, err = io.ReadFull(to, make([]byte, 5))
	must(t, err)
}

// wantResetNow waits for the end of a side that says nothing.
func wantResetNow(t *testing.T, what string, c net.Conn) {
	t.Helper()
	must(t, c.SetReadDeadline(time.Now().Add(atOnce)))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: %v, want a reset", what, err)
	}
}

// TestOnePacketEndsBothHalves: after the end of a path one packet of either party resets both, and nothing
// of it arrives.
func TestOnePacketEndsBothHalves(t *testing.T) {
	eachProfile(t, testOnePacketEndsBothHalves)
}

func testOnePacketEndsBothHalves(t *testing.T, profile datapath.Profile) {
	n := newNode(t, profile)
	n.copyProxy(t)
	conns := n.pushers(t)
	for _, c := range n.pushCells() {
		for _, speaker := range []string{"client", "server"} {
			for size, text := range map[string]string{"small": "after the end\n", "bulk": string(make([]byte, 60000))} {
				t.Run(c.name+"/"+speaker+"/"+size, func(t *testing.T) {
					p := c.connected(t, n, conns, time.Minute)
					must(t, n.d.EndPath(p.slot, datapath.PathRevoked))
					must(t, n.d.FreePath(p.slot))
					speaks, listens := p.client, p.server
					if speaker == "server" {
						speaks, listens = p.server, p.client
					}
					_, err := io.WriteString(speaks, text)
					must(t, err)
					wantResetNow(t, "the other party", listens)
					wantResetNow(t, "the "+speaker, speaks)
					if t.Failed() {
						t.Logf("counters:%s", n.counters(t))
					}
				})
			}
		}
	}
	if c, err := n.d.Counters(); err != nil || c[flow.ReasonPathReset].Packets == 0 {
		t.Errorf("no packet was turned into an RST: %v, counters:%s", err, n.counters(t))
	}
}
