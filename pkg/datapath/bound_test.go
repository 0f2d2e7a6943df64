package datapath_test

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// asWorkload says who answers a socket that a workload makes, from a port or wherever the kernel says.
func (c cell) asWorkload(ctx context.Context, g *lab.Group, port uint16) (string, error) {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.from, port))}
	var conn net.Conn
	err := g.Do(c.client, func() (err error) {
		conn, err = d.DialContext(ctx, "tcp", c.target().String())
		return err
	})
	if err != nil {
		return "nobody", err
	}
	defer conn.Close()
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil { // its port is free at once
		return "nobody", err
	}
	seen, err := lab.Ask(conn)
	if err != nil {
		return "nobody", err
	}
	if seen == conn.LocalAddr().(*net.TCPAddr).AddrPort() {
		return "service", nil
	}
	return "proxy", nil
}

// bind opens a path of the cell, and gives its slot.
func (c cell) bind(t *testing.T, n *node, change func(*datapath.Path)) uint32 {
	t.Helper()
	p := datapath.Path{Grant: grantName, Client: c.from, ServiceID: c.serviceID, Service: c.name, Ports: []uint16{c.port},
		Deadline: datapath.BootTime() + time.Minute}
	change(&p)
	slot, err := n.d.OpenPath(p)
	must(t, err)
	return slot
}

func groupOf(t *testing.T, l *lab.Lab, name string) (*lab.Group, uint64) {
	t.Helper()
	g, err := l.NewGroup(name)
	must(t, err)
	id, err := g.ID()
	must(t, err)
	return g, id
}

// TestPathOfAWorkload: a path that is bound to a control group serves its sockets, on the node and in pods, and nobody
// else's with the same address: not those of another group, and not those of a pod that has inherited it.
func TestPathOfAWorkload(t *testing.T) {
	t.Parallel()
	eachProfile(t, func(t *testing.T, profile datapath.Profile) {
		n := newNode(t, profile)
		n.copyProxy(t)
		alice, number := groupOf(t, n.Lab, "alice")
		bob, other := groupOf(t, n.Lab, "bob")
		for _, c := range n.cells() {
			if c.client == n.Client {
				continue // another machine: nothing is known of its sockets, but that they have no number here
			}
			t.Run(c.name, func(t *testing.T) {
				says := func(g *lab.Group, want string) {
					t.Helper()
					if got, err := c.asWorkload(within(t), g, 0); got != want {
						t.Errorf("%s was answered by the %s (%v), want the %s; counters:%s", g.Dir, got, err, want, n.counters(t))
					}
				}
				slot := c.bind(t, n, func(p *datapath.Path) { p.Cgroup = number })
				says(alice, "service")
				before := n.count(t, flow.ReasonPathBound)
				says(bob, "proxy")
				if n.count(t, flow.ReasonPathBound) == before {
					t.Errorf("refused for another reason:%s", n.counters(t))
				}
				if got, err := c.ask(within(t)); got != "proxy" {
					t.Errorf("a socket of neither was answered by the %s, %v", got, err)
				}

				second := c.bind(t, n, func(p *datapath.Path) { p.Cgroup, p.Grant = other, "01OTHER" })
				says(alice, "service")
				says(bob, "service")
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
				says(alice, "proxy")
				says(bob, "service")
				must(t, n.d.EndPath(second, datapath.PathRevoked))
				says(bob, "proxy")
				must(t, n.d.FreePath(slot))
				must(t, n.d.FreePath(second))
			})
		}
	})
}

// TestPathOfATuple: a path that is bound to a port of the client serves one connection from it, and no other port.
func TestPathOfATuple(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	anybody, _ := groupOf(t, n.Lab, "anybody")
	for _, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			const port = 40123
			slot := c.bind(t, n, func(p *datapath.Path) { p.ClientPort, p.Budget.Connections = port, 1 })
			for i, try := range []struct {
				port uint16
				want string
			}{{port + 1, "proxy"}, {port, "service"}, {port, "proxy"}} {
				before := n.count(t, flow.ReasonPathConnections)
				got, err := c.asWorkload(within(t), anybody, try.port)
				if got != try.want {
					t.Errorf("port %d was answered by the %s (%v), want the %s; counters:%s", try.port, got, err, try.want, n.counters(t))
				}
				if again := i == 2; again != (n.count(t, flow.ReasonPathConnections) > before) {
					t.Errorf("port %d, try %d: another reason:%s", try.port, i, n.counters(t))
				}
			}
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			must(t, n.d.FreePath(slot))
		})
	}
}

// TestBoundBesideAddress: paths of an address and of sockets at the same address come and go without each other, also
// across a restart.
func TestBoundBesideAddress(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	alice, number := groupOf(t, n.Lab, "alice")
	c := n.cells()[2]
	says := func(when, group, anybody string) {
		t.Helper()
		if got, err := c.asWorkload(within(t), alice, 0); got != group {
			t.Errorf("%s: the group was answered by the %s, %v", when, got, err)
		}
		if got, err := c.ask(within(t)); got != anybody {
			t.Errorf("%s: the address was answered by the %s, %v", when, got, err)
		}
	}
	bound := c.bind(t, n, func(p *datapath.Path) { p.Cgroup = number })
	whole := c.bind(t, n, func(p *datapath.Path) { p.Grant = "01WHOLE" })
	says("both", "service", "service")
	must(t, n.d.EndPath(whole, datapath.PathRevoked))
	says("the address's has ended", "service", "proxy")
	must(t, n.d.FreePath(whole))
	whole = c.bind(t, n, func(p *datapath.Path) { p.Grant = "01WHOLE" })
	must(t, n.d.EndPath(bound, datapath.PathRevoked))
	says("the group's has ended", "service", "service")
	must(t, n.d.FreePath(bound))
	bound = c.bind(t, n, func(p *datapath.Path) { p.Cgroup = number })
	must(t, n.d.Close())
	n.open(t)
	paths, err := n.d.Paths()
	must(t, err)
	for _, p := range paths {
		if len(p.Ports) != 1 || (p.Cgroup != 0) != (p.Slot == bound) {
			t.Errorf("read back %+v", p)
		}
	}
	must(t, n.d.EndPath(whole, datapath.PathRevoked))
	says("after a restart", "service", "proxy")
	must(t, n.d.EndPath(bound, datapath.PathRevoked))
	says("none", "proxy", "proxy")
}
