package datapath_test

import (
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// pump sends and receives as much as the connection takes, until it ends.
func pump(conns ...net.Conn) {
	var done sync.WaitGroup
	for _, c := range conns {
		done.Go(func() { io.Copy(io.Discard, c) })
		done.Go(func() {
			for block := make([]byte, 256<<10); ; {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		})
	}
	done.Wait()
}

// arrived adds up what a tap saw come in of the service's traffic but the resets: packets, and their bytes. A packet that stands
// for several counts as one, with one header.
func arrived(t *testing.T, tap *lab.Tap) (packets, bytes uint64) {
	t.Helper()
	seen, err := tap.Packets()
	must(t, err)
	for _, p := range seen {
		if p.Outgoing || p.RST {
			continue
		}
		header := 40
		if p.Src.Addr().Is6() {
			header = 60
		}
		packets++
		bytes += uint64(p.Payload + header)
	}
	if lost, err := tap.Lost(); err != nil || lost > 0 {
		t.Errorf("tap lost %d packets, %v", lost, err)
	}
	return packets, bytes
}

// TestBudgetIsExact: connections on all CPUs that send and receive as fast as they can get no byte and no packet more than the
// path's budget through, by taps behind it; little is left over; all are cut, and the next one is the proxy's. No agent
// takes part.
func TestBudgetIsExact(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	n.readEvents(t)
	conns := n.pushers(t)
	for _, c := range n.pushCells() {
		if c.client != n.Client {
			continue // taps need two namespaces without anything else
		}
		for name, b := range map[string]datapath.Budget{"bytes": {Bytes: 16 << 20}, "packets": {Packets: 5000}} {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				behind := n.Pod
				if c.serviceID == hostID {
					behind = nil // a tap on the node sees packets before the hooks
				}
				slot, err := n.d.OpenPath(datapath.Path{Grant: "01TEST", Client: c.from, ServiceID: c.serviceID, Service: "test",
					Ports: []uint16{c.port}, Deadline: datapath.BootTime() + time.Minute, Budget: b})
				must(t, err)
				var taps []*lab.Tap
				for _, ns := range []*lab.Namespace{n.Client, behind} {
					if ns != nil {
						tap, err := ns.Tap(c.port)
						must(t, err)
						taps = append(taps, tap)
					}
				}
				var ends []net.Conn
				for range 2 * runtime.NumCPU() {
					ends = append(ends, c.dial(t), <-conns)
				}
				pump(ends...)
				n.wantSpent(t, slot, b)
				var packets, bytes uint64
				for _, tap := range taps {
					p, b := arrived(t, tap)
					packets, bytes = packets+p, bytes+b
					must(t, tap.Close())
				}
				if b.Bytes != 0 && bytes > b.Bytes || b.Packets != 0 && packets > b.Packets {
					t.Errorf("taps saw %d packets, %d bytes", packets, bytes)
				}
				again := c.dial(t)
				server := <-conns
				if server.RemoteAddr().(*net.TCPAddr).Port == again.LocalAddr().(*net.TCPAddr).Port {
					t.Error("a new connection went straight to the service")
				}
				must(t, n.d.FreePath(slot))
			})
		}
	}
}

// wantSpent holds what the kernel counted against the budget: never more, and no more left than what other CPUs had
// taken ahead and the packet that was not covered.
func (n *node) wantSpent(t *testing.T, slot uint32, b datapath.Budget) {
	t.Helper()
	paths, err := n.d.Paths()
	must(t, err)
	for _, p := range paths {
		if p.Slot != slot {
			continue
		}
		bytes, packets := p.BytesToServer+p.BytesToClient, p.PacketsToServer+p.PacketsToClient
		cpus := uint64(runtime.NumCPU())
		if p.State != datapath.PathSpent {
			t.Errorf("path is in state %d", p.State)
		}
		if b.Bytes != 0 && (bytes > b.Bytes || bytes+(cpus+1)*66<<10 < b.Bytes) {
			t.Errorf("%d bytes of %d were used", bytes, b.Bytes)
		}
		if b.Packets != 0 && (packets > b.Packets || packets+(cpus+1)*64 < b.Packets) {
			t.Errorf("%d packets of %d were used", packets, b.Packets)
		}
		t.Logf("%d bytes, %d packets of %+v", bytes, packets, b)
		return
	}
	t.Errorf("no path in slot %d", slot)
}

// TestConnectionBudget: the last connection lives on when no more are admitted, and the path ends with it. A limit per second
// keeps out only what is too quick.
func TestConnectionBudget(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	c := n.cells()[0]
	slot, err := n.d.OpenPath(datapath.Path{Grant: "01TEST", Client: c.from, ServiceID: c.serviceID, Service: "test",
		Ports: []uint16{c.port}, Deadline: datapath.BootTime() + time.Minute, Budget: datapath.Budget{Connections: 2, ConnectionsPerSecond: 1}})
	must(t, err)
	first := c.dialDirect(t)
	if got, err := c.ask(within(t)); got != "proxy" {
		t.Errorf("second connection of the second answered by %s (%v)", got, err)
	}
	waitUntil(t, "the next second", func() bool {
		got, err := c.ask(within(t))
		must(t, err)
		return got == "service"
	})
	waitUntil(t, "the short connection to be swept", func() bool { return len(n.sweep(t)) > 0 })
	if s := n.state(t, slot); s != datapath.PathActive {
		t.Errorf("path with a live connection is in state %d", s)
	}
	if _, err := lab.Ask(first); err != nil {
		t.Errorf("live connection: %v", err)
	}
	if got, err := c.ask(within(t)); got != "proxy" {
		t.Errorf("third connection answered by %s (%v)", got, err)
	}
	must(t, first.Close())
	waitUntil(t, "the path to end", func() bool {
		n.sweep(t)
		return n.state(t, slot) == datapath.PathSpent
	})
}

// TestBudgetAdopted: limits and what was used survive a restart of the agent.
func TestBudgetAdopted(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	b := datapath.Budget{Bytes: 1 << 30, Packets: 1 << 20, Connections: 10, ConnectionsPerSecond: 5}
	_, err := n.d.OpenPath(datapath.Path{Grant: "01TEST", Client: netip.MustParseAddr("10.1.0.2"), ServiceID: hostID, Service: "test",
		Ports: []uint16{hostPort}, Deadline: datapath.BootTime() + time.Minute, Budget: b})
	must(t, err)
	before, err := n.cells()[0].ask(within(t))
	must(t, err)
	was, err := n.d.Paths()
	must(t, err)
	must(t, n.d.Close())
	n.open(t)
	paths, err := n.d.Paths()
	must(t, err)
	if before != "service" || len(paths) != 1 || paths[0].Budget != b || paths[0].BytesToClient < was[0].BytesToClient || paths[0].Flows != 1 {
		t.Errorf("%s; path was %+v, is %+v", before, was, paths)
	}
}
