package datapath_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
func TestOnePacketEndsBothHalves(t *testing.T) { eachProfile(t, testOnePacketEndsBothHalves) }

func testOnePacketEndsBothHalves(t *testing.T, profile datapath.Profile) {
	n := newNode(t, profile)
	n.copyProxy(t)
	conns := n.pushers(t)
	for _, c := range n.pushCells() {
		n.onePacketEnds(t, c, conns)
	}
	if c, err := n.d.Counters(); err != nil || c[flow.ReasonPathReset].Packets == 0 {
		t.Errorf("no packet was turned into an RST: %v, counters:%s", err, n.counters(t))
	}
}

// TestOnePacketEndsBothHalvesOfATunnel: the same where packets begin with the IP header.
func TestOnePacketEndsBothHalvesOfATunnel(t *testing.T) { eachProfile(t, testOnePacketInATunnel) }

func testOnePacketInATunnel(t *testing.T, profile datapath.Profile) {
	n := newNode(t, profile)
	n.copyProxy(t)
	joined(openTun(t, n.Node, "10.8.0.1/24", "fd00:8::1/64"), openTun(t, n.Client, "10.8.0.2/24", "fd00:8::2/64"))
	dev, err := n.Node.Ifindex(tunnel)
	must(t, err)
	must(t, n.Node.Do(func() error { return n.d.Attach(dev, datapath.RoleUplink) }))
	conns := n.pushers(t)
	for f, client := range map[lab.Family]string{lab.IPv4: "10.8.0.2", lab.IPv6: "fd00:8::2"} {
		n.onePacketEnds(t, cell{"tunnel/" + f.String(), n.Client, netip.MustParseAddr(client), tunnelAddr(f), pushHostPort, hostID}, conns)
	}
}

// onePacketEnds has either party of a connection speak first after its end.
func (n *node) onePacketEnds(t *testing.T, c cell, conns <-chan net.Conn) {
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
				told := errors.Is(err, syscall.ECONNRESET) // before all of it was said; nothing else tells of it then
				if !told {
					must(t, err)
				}
				wantResetNow(t, "the other party", listens)
				if !told {
					wantResetNow(t, "the "+speaker, speaks)
				}
				if t.Failed() {
					t.Logf("counters:%s", n.counters(t))
				}
			})
		}
	}
}

// showPods makes the namespaces of the pods findable, as a container runtime does.
func (n *node) showPods(t *testing.T) {
	t.Helper()
	for _, pod := range n.Pods {
		file := filepath.Join(n.Dir, pod.Name)
		must(t, os.WriteFile(file, nil, 0o444))
		must(t, unix.Mount(pod.Path(), file, "", unix.MS_BIND, ""))
		t.Cleanup(func() { must(t, unix.Unmount(file, 0)) })
	}
}

func (n *node) sweep(t *testing.T) (out []flow.Record) {
	t.Helper()
	must(t, n.Node.Do(func() (err error) {
		out, err = n.d.Sweep()
		return err
	}))
	return out
}

// TestIdleConnectionsEnd: a sweep ends both halves of a connection over which nobody says a word, and leaves the
// listener alone. The record of the flow follows.
func TestIdleConnectionsEnd(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	n.showPods(t)
	conns := n.pushers(t)
	for _, c := range n.pushCells() {
		t.Run(c.name, func(t *testing.T) {
			for range 2 { // the second needs the listener
				p := c.connected(t, n, conns, time.Minute)
				if closed := n.sweep(t); len(closed) != 0 {
					t.Errorf("records %v of a live flow", closed)
				}
				must(t, n.d.EndPath(p.slot, datapath.PathRevoked))
				if closed := n.sweep(t); len(closed) != 0 {
					t.Errorf("flow was taken before its end could reach the client: %v", closed)
				}
				wantResetNow(t, "client", p.client)
				if _, err := p.server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("server: %v, want the end", err)
				}
				var closed []flow.Record
				waitUntil(t, "the record of the flow", func() bool {
					closed = n.sweep(t)
					return len(closed) > 0
				})
				if len(closed) != 1 || closed[0].Reason != flow.ReasonPathRevoked || closed[0].Grant != "01TEST" {
					t.Errorf("records %+v", closed)
				}
				must(t, n.d.FreePath(p.slot))
			}
		})
	}
}

// TestIdleBehindUnknownNamespace: where a pod's sockets are out of reach, the sweep says so, and those of a client on
// the node end with their own.
func TestIdleBehindUnknownNamespace(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	conns := n.pushers(t)
	for _, c := range n.pushCells() {
		if c.serviceID != podID {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			p := c.connected(t, n, conns, time.Minute)
			must(t, n.d.EndPath(p.slot, datapath.PathRevoked))
			err := n.Node.Do(func() error {
				_, err := n.d.Sweep()
				return err
			})
			if err == nil || !strings.Contains(err.Error(), lab.PodDevice(0)) {
				t.Errorf("sweep says %v, want the name of the device", err)
			}
			if c.client == n.Node {
				wantResetNow(t, "server", p.server)
			}
			must(t, n.d.FreePath(p.slot))
		})
	}
}

// readEvents keeps the rings empty: a full one would send connections to the proxy.
func (n *node) readEvents(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.d.ReadEvents(ctx, func(flow.Record) {}) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
	})
}

// TestThousandIdleConnections: a path with a thousand live connections ends within a second.
func TestThousandIdleConnections(t *testing.T) {
	n := newNode(t, datapath.ProfileAuto, func(c *datapath.Config) { c.RingBytes = 2 << 20 })
	n.copyProxy(t)
	n.showPods(t)
	n.readEvents(t)
	const many = 1000
	conns := n.pushers(t)
	for _, i := range []int{0, 4} { // a service of the node, and one in a pod
		c := n.pushCells()[i]
		t.Run(c.name, func(t *testing.T) {
			slot := c.path(n, t, time.Minute)
			clients := make([]net.Conn, many)
			for i := range clients {
				clients[i] = c.dial(t)
				<-conns
			}
			start := time.Now()
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			n.sweep(t)
			for _, conn := range clients {
				must(t, conn.SetReadDeadline(start.Add(time.Second)))
				if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Fatalf("%v after %v, want a reset", err, time.Since(start))
				}
			}
			t.Logf("%d connections ended in %v", many, time.Since(start))
			must(t, n.d.FreePath(slot))
		})
	}
}
