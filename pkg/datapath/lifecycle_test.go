package datapath_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// dial opens a connection that the service answers directly.
func (c cell) dial(t *testing.T) net.Conn {
	t.Helper()
	conn, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, 0), c.target())
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (c cell) dialDirect(t *testing.T) net.Conn {
	t.Helper()
	conn := c.dial(t)
	seen, err := lab.Ask(conn)
	must(t, err)
	if own := conn.LocalAddr().(*net.TCPAddr).AddrPort(); own.Port() != seen.Port() {
		t.Fatalf("service saw %s, not %s: not direct", seen, own)
	}
	return conn
}

// wantReset writes until the peer's RST arrives.
func wantReset(t *testing.T, conn net.Conn) {
	t.Helper()
	must(t, conn.SetDeadline(time.Now().Add(5*time.Second)))
	r := bufio.NewReader(conn)
	for {
		if _, err := io.WriteString(conn, "still there?\n"); isReset(err) {
			return
		} else if err != nil {
			t.Fatalf("write: %v, want a reset", err)
		}
		if _, err := r.ReadString('\n'); isReset(err) {
			return
		} else if err != nil {
			t.Fatalf("read: %v, want a reset", err)
		}
	}
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// waitUntil polls: what is waited for is the kernel's clock or another process.
func waitUntil(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 10 s for %s", what)
		}
	}
}

// TestDeadlineResets: a live connection meets the kernel's deadline with nobody's help, is reset at
// its next packet, and the next connection is the proxy's.
func TestDeadlineResets(t *testing.T) { eachProfile(t, testDeadlineResets) }

func testDeadlineResets(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	for _, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			slot := c.path(n, t, 300*time.Millisecond)
			conn := c.dialDirect(t)
			deadline := n.deadline(t, slot)
			waitUntil(t, "the deadline", func() bool { return datapath.BootTime() > deadline })
			wantReset(t, conn)
			if got, err := c.ask(within(t)); got != "proxy" {
				t.Fatalf("answered by %s (%v) after the deadline; counters:%s", got, err, n.counters(t))
			}
			must(t, n.d.EndPath(slot, datapath.PathExpired))
			must(t, n.d.FreePath(slot))
		})
	}
}

func (n *node) deadline(t *testing.T, slot uint32) time.Duration {
	t.Helper()
	paths, err := n.d.Paths()
	must(t, err)
	for _, p := range paths {
		if p.Slot == slot {
			return p.Deadline
		}
	}
	t.Fatalf("no path in slot %d", slot)
	return 0
}

// TestServerIsReset: a service that speaks after the end of the path is reset too.
func TestServerIsReset(t *testing.T) { eachProfile(t, testServerIsReset) }

func testServerIsReset(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	for _, f := range lab.Families() {
		for _, where := range []*lab.Namespace{n.Node, n.Pod} {
			t.Run(fmt.Sprintf("%s/%s", where.Name, f), func(t *testing.T) {
				port := map[bool]uint16{true: 9090, false: 9091}[where == n.Node]
				conns, ended := make(chan net.Conn, 1), make(chan error, 1)
				s, err := where.Serve(netip.AddrPortFrom(where.Addr(f), port), func(c net.Conn) {
					conns <- c
					_, err := c.Read(make([]byte, 1))
					ended <- err
				})
				must(t, err)
				defer s.Close()
				svc := datapath.Service{ID: 9, Name: "push", Target: datapath.TargetHost, Ports: []uint16{port}}
				if where == n.Pod {
					pod, err := n.Node.Ifindex(lab.PodDevice(0))
					must(t, err)
					svc = datapath.Service{ID: 9, Name: "push", Target: datapath.TargetPod, Ports: []uint16{port}, Ifindex: pod, Addresses: []netip.Addr{where.Addr(f)}}
				}
				_, err = n.d.SetServices([]datapath.Service{svc})
				must(t, err)
				c := cell{"push", n.Client, n.Client.Addr(f), where.Addr(f), port, 9}
				slot := c.path(n, t, time.Minute)
				c.dial(t)
				server := <-conns
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
				must(t, n.d.FreePath(slot))
				_, err = io.WriteString(server, "news\n")
				must(t, err)
				select {
				case err := <-ended:
					if !isReset(err) {
						t.Errorf("server's connection ended with %v, want a reset", err)
					}
				case <-within(t).Done():
					t.Errorf("server was not reset; counters:%s", n.counters(t))
				}
			})
		}
	}
}

// TestLeaseLapsed: a dead agent admits nothing new; what it admitted goes on to its deadline.
func TestLeaseLapsed(t *testing.T) { eachProfile(t, testLeaseLapsed) }

func testLeaseLapsed(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	c := n.cells()[0]
	c.path(n, t, time.Minute)
	conn := c.dialDirect(t)
	must(t, n.d.Renew(-time.Second))
	if got, err := c.ask(within(t)); got != "proxy" {
		t.Errorf("new connection answered by %s (%v), want proxy", got, err)
	}
	if _, err := lab.Ask(conn); err != nil {
		t.Errorf("old connection: %v", err)
	}
	if counters, _ := n.d.Counters(); counters[flow.ReasonLeaseLapsed].Packets != 1 {
		t.Errorf("counters:%s, want LEASE_LAPSED=1", n.counters(t))
	}
}

// TestMidStream: a connection that is older than its protection is reset, not passed.
func TestMidStream(t *testing.T) { eachProfile(t, testMidStream) }

func testMidStream(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	services := n.d.Services()
	for _, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			_, err := n.d.SetServices(nil)
			must(t, err)
			conn := c.dialDirect(t)
			_, err = n.d.SetServices(services)
			must(t, err)
			wantReset(t, conn)
		})
	}
}

// TestProxiedConnectionKept: opening a path does not touch a proxied connection.
func TestProxiedConnectionKept(t *testing.T) { eachProfile(t, testProxiedConnectionKept) }

func testProxiedConnectionKept(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	for _, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			conn := c.dial(t)
			before, err := lab.Ask(conn)
			must(t, err)
			slot := c.path(n, t, time.Minute)
			after, err := lab.Ask(conn)
			must(t, err)
			if before != after {
				t.Errorf("service saw %s, then %s", before, after)
			}
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			must(t, n.d.FreePath(slot))
		})
	}
}

// TestProxyDead: without a listener the port is closed, and a live path unaffected.
func TestProxyDead(t *testing.T) { eachProfile(t, testProxyDead) }

func testProxyDead(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	for _, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			if got, _ := c.ask(ctx); got != "nobody" {
				t.Errorf("answered by %s", got)
			}
			slot := c.path(n, t, time.Minute)
			if got, err := c.ask(within(t)); got != "service" {
				t.Errorf("answered by %s (%v), want service", got, err)
			}
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			must(t, n.d.FreePath(slot))
		})
	}
	if counters, _ := n.d.Counters(); counters[flow.ReasonNoListener].Packets == 0 {
		t.Errorf("counters:%s, want NO_LISTENER", n.counters(t))
	}
}

// TestRecordOrProxy: with the reader stopped and the ring full, the SYN goes to the proxy.
func TestRecordOrProxy(t *testing.T) { eachProfile(t, testRecordOrProxy) }

func testRecordOrProxy(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	c := n.cells()[2] // loopback is the quickest
	c.path(n, t, time.Minute)
	waitUntil(t, "the ring to fill", func() bool {
		for range 200 {
			if got, err := c.ask(within(t)); got == "proxy" {
				return true
			} else if err != nil {
				t.Fatal(err)
			}
			_, err := n.d.Sweep()
			must(t, err)
		}
		return false
	})
	if counters, _ := n.d.Counters(); counters[flow.ReasonRingFull].Packets == 0 {
		t.Errorf("counters:%s, want RING_FULL", n.counters(t))
	}
}

// TestRecordsAddUp: the records of a path's flows and its counters in the kernel agree to the byte.
func TestRecordsAddUp(t *testing.T) { eachProfile(t, testRecordsAddUp) }

func testRecordsAddUp(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	var records []flow.Record
	keep := func(r flow.Record) {
		mu.Lock()
		defer mu.Unlock()
		records = append(records, r)
	}
	done := make(chan error, 1)
	go func() { done <- n.d.ReadEvents(ctx, keep) }()
	c := n.cells()[0]
	slot := c.path(n, t, time.Minute)
	const flows = 20
	for range flows {
		if got, err := c.ask(within(t)); got != "service" {
			t.Fatalf("answered by %s (%v)", got, err)
		}
	}
	var sum flow.Record
	closed := 0
	waitUntil(t, "the flows to close", func() bool {
		rs, err := n.d.Sweep()
		must(t, err)
		for _, r := range rs {
			closed++
			sum.BytesToServer += r.BytesToServer
			sum.BytesToClient += r.BytesToClient
			sum.PacketsToServer += r.PacketsToServer
			sum.PacketsToClient += r.PacketsToClient
			if r.Grant != "01TEST" || r.Reason != flow.ReasonClosed || r.Event != flow.EventClose {
				t.Errorf("record %+v", r)
			}
		}
		return closed == flows
	})
	paths, err := n.d.Paths()
	must(t, err)
	p := paths[0]
	if p.Slot != slot || p.Flows != flows || p.BytesToServer != sum.BytesToServer || p.BytesToClient != sum.BytesToClient ||
		p.PacketsToServer != sum.PacketsToServer || p.PacketsToClient != sum.PacketsToClient || sum.BytesToClient == 0 {
		t.Errorf("path %+v, records add up to %+v", p, sum)
	}
	opened := func() (o int) {
		mu.Lock()
		defer mu.Unlock()
		for _, r := range records {
			if r.Event == flow.EventOpen && r.Reason == flow.ReasonPathOpen && r.Client.Addr() == c.from && r.Service == "test" {
				o++
			}
		}
		return o
	}
	waitUntil(t, "the OPEN records", func() bool { return opened() == flows })
	cancel()
	must(t, <-done)
}

// TestPodDeviceUnknown: a pod service whose device is not known yet is closed at every device.
func TestPodDeviceUnknown(t *testing.T) { eachProfile(t, testPodDeviceUnknown) }

func testPodDeviceUnknown(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	services := n.d.Services()
	for i := range services {
		services[i].Ifindex = 0
	}
	_, err := n.d.SetServices(services)
	must(t, err)
	for _, c := range n.cells() {
		if got, err := c.ask(within(t)); got != "proxy" {
			t.Errorf("%s: answered by %s (%v), want proxy", c.name, got, err)
		}
	}
}
