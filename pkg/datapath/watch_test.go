package datapath_test

import (
	"net"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// mode puts every service into a mode.
func (n *node) mode(t *testing.T, m datapath.Mode) {
	t.Helper()
	services := n.d.Services()
	for i := range services {
		services[i].Mode = m
	}
	_, err := n.d.SetServices(services)
	must(t, err)
}

// newly gives what was seen of the cell's service while f ran.
func (n *node) newly(t *testing.T, c cell, f func()) datapath.Watched {
	t.Helper()
	look := func() datapath.Watched {
		all, err := n.d.Watched()
		must(t, err)
		return all[c.serviceID]
	}
	before := look()
	f()
	after := look()
	for _, pair := range [][2]*datapath.Seen{{&after.Seen, &before.Seen}, {&after.Proxied, &before.Proxied}, {&after.Bypassed, &before.Bypassed}, {&after.Denied, &before.Denied}} {
		pair[0].Opens -= pair[1].Opens
		pair[0].Packets -= pair[1].Packets
		pair[0].Bytes -= pair[1].Bytes
	}
	return after
}

// quiet fails if a packet was decided about, or is counted for the comparison of hooks with sockets.
func (n *node) quiet(t *testing.T) {
	t.Helper()
	if c := n.counters(t); c != "" {
		t.Errorf("something was decided:%s", c)
	}
	traffic, err := n.d.Traffic()
	must(t, err)
	if len(traffic) != 0 {
		t.Errorf("hooks and sockets are compared: %+v", traffic)
	}
}

// TestWatchedTraffic asks every service in every way while it is not enforced: the service itself answers, with no proxy there,
// and each connection is seen once, by what Enforce would make of it.
func TestWatchedTraffic(t *testing.T) { eachProfile(t, testWatchedTraffic) }

func testWatchedTraffic(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	for _, m := range []datapath.Mode{datapath.Observe, datapath.Shadow} {
		n.mode(t, m)
		for _, c := range n.cells() {
			t.Run(c.name, func(t *testing.T) {
				ask := func() {
					t.Helper()
					if got, err := c.ask(within(t)); got != "service" {
						t.Errorf("answered by %s (%v)", got, err)
					}
				}
				shadowed := m == datapath.Shadow
				if w := n.newly(t, c, ask); !oneConnection(w, w.Proxied, shadowed) {
					t.Errorf("mode %d: saw %+v", m, w)
				}
				slot := c.path(n, t, time.Minute)
				if w := n.newly(t, c, ask); !oneConnection(w, w.Bypassed, shadowed) {
					t.Errorf("mode %d: saw %+v under a path", m, w)
				}
				if p, err := n.d.Path(slot); err != nil || p.Flows != 0 || p.PacketsToServer != 0 {
					t.Errorf("the path carried something: %+v, %v", p, err)
				}
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
			})
		}
	}
	n.quiet(t)
}

// oneConnection: one was seen, and all of it counted as `by` if it was shadowed, but for what may still come of the connection
// before, which opens nothing. Of an observed one nothing is said.
func oneConnection(w datapath.Watched, by datapath.Seen, shadowed bool) bool {
	said := w.Proxied.Packets + w.Bypassed.Packets + w.Denied.Packets
	if !shadowed {
		return w.Seen.Opens == 1 && w.Seen.Packets >= 3 && said == 0
	}
	opens := w.Proxied.Opens + w.Bypassed.Opens + w.Denied.Opens
	return w.Seen.Opens == 1 && opens == 1 && by.Opens == 1 && by.Packets >= 3 && said == w.Seen.Packets
}

// TestWatchedDatagrams does so with UDP services, and with UDP to ports of TCP.
func TestWatchedDatagrams(t *testing.T) {
	t.Parallel()
	n := newUDPNode(t, 30*time.Second)
	for _, m := range []datapath.Mode{datapath.Observe, datapath.Shadow} {
		n.mode(t, m)
		for _, tcp := range n.cells() {
			t.Run(tcp.name, func(t *testing.T) {
				c := tcp.udp()
				shadowed := m == datapath.Shadow
				if w := n.newly(t, c, func() { wantAnswer(t, n, c.dialUDP(t)) }); w.Seen.Packets != 1 || (w.Denied == w.Seen) != shadowed {
					t.Errorf("mode %d: saw %+v", m, w)
				}
				if w := n.newly(t, tcp, func() { wantAnswer(t, n, tcp.dialUDP(t)) }); w.Seen.Packets != 1 || (w.Denied == w.Seen) != shadowed {
					t.Errorf("mode %d: saw %+v at a port of TCP", m, w)
				}
				slot := c.path(n, t, time.Minute)
				if w := n.newly(t, c, func() { wantAnswer(t, n, c.dialUDP(t)) }); w.Seen.Packets != 1 || (w.Bypassed == w.Seen) != shadowed {
					t.Errorf("mode %d: saw %+v under a path", m, w)
				}
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
			})
		}
	}
	n.quiet(t)
}

// TestShadowKnowsWorkloads: a path that is bound to a control group would take its SYNs, and nobody else's.
func TestShadowKnowsWorkloads(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.mode(t, datapath.Shadow)
	alice, number := groupOf(t, n.Lab, "alice")
	bob, _ := groupOf(t, n.Lab, "bob")
	for _, c := range n.cells() {
		if c.client == n.Client {
			continue // another machine's sockets are not known
		}
		t.Run(c.name, func(t *testing.T) {
			opens := func(g *lab.Group) (bypassed, proxied uint64) {
				w := n.newly(t, c, func() {
					if got, err := c.asWorkload(within(t), g, 0); got != "service" {
						t.Errorf("answered by %s (%v)", got, err)
					}
				})
				return w.Bypassed.Opens, w.Proxied.Opens
			}
			slot := c.bind(t, n, func(p *datapath.Path) { p.Cgroup = number })
			if b, p := opens(alice); b != 1 || p != 0 {
				t.Errorf("the workload: %d would be bypassed, %d proxied", b, p)
			}
			if b, p := opens(bob); b != 0 || p != 1 {
				t.Errorf("another one: %d would be bypassed, %d proxied", b, p)
			}
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
		})
	}
}

// TestEnteringEnforceCuts: a connection from before is reset at its next packet, and the next one lands on the proxy, or on
// the service where a path is live. TestLeavingEnforce is the way back.
func TestEnteringEnforceCuts(t *testing.T) { eachProfile(t, testEnteringEnforceCuts) }

func testEnteringEnforceCuts(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	for i, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			want := "proxy"
			if i%2 == 1 {
				want = "service"
				slot := c.path(n, t, time.Minute)
				defer func() { must(t, n.d.EndPath(slot, datapath.PathRevoked)) }()
			}
			n.mode(t, []datapath.Mode{datapath.Observe, datapath.Shadow}[i%2])
			conn := c.dialDirect(t)
			n.mode(t, datapath.Enforce)
			wantReset(t, conn)
			if got, err := c.ask(within(t)); got != want {
				t.Errorf("answered by %s (%v), want %s; counters:%s", got, err, want, n.counters(t))
			}
		})
	}
}

// TestLeavingEnforce: a proxied connection is reset by the service, which knows nothing of it, and the next one is direct. A
// bypassed connection goes on until the service is enforced again: its flow has ended, so nobody can take it up meanwhile.
func TestLeavingEnforce(t *testing.T) { eachProfile(t, testLeavingEnforce) }

func testLeavingEnforce(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	for i, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			proxied := c.dial(t)
			_, err := lab.Ask(proxied)
			must(t, err)
			slot := c.path(n, t, time.Minute)
			bypassed := c.dialDirect(t)
			n.swept(t)
			n.mode(t, []datapath.Mode{datapath.Observe, datapath.Shadow}[i%2])
			wantReset(t, proxied)
			if got, err := c.ask(within(t)); got != "service" {
				t.Errorf("answered by %s (%v), want the service", got, err)
			}
			if all := n.swept(t); len(all) != 1 || all[0].Event != flow.EventClose || all[0].Reason != flow.ReasonPolicyChanged ||
				all[0].Client != bypassed.LocalAddr().(*net.TCPAddr).AddrPort() || all[0].PacketsToServer == 0 || all[0].BytesToClient == 0 {
				t.Errorf("told of the flow: %+v", all)
			}
			n.mode(t, datapath.Shadow)
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			n.swept(t)
			if _, err := lab.Ask(bypassed); err != nil {
				t.Errorf("the bypassed connection, whose path has ended too: %v", err)
			}
			slot = c.path(n, t, time.Minute)
			n.mode(t, datapath.Enforce)
			wantReset(t, bypassed)
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
		})
	}
}

// TestFlowLeftBehind: a flow of a service that is not enforced, as an agent leaves it that is killed between the two steps, serves
// nobody when the service is enforced.
func TestFlowLeftBehind(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	for _, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			c.path(n, t, time.Minute)
			conn := c.dialDirect(t)
			flows, err := ebpf.LoadPinnedMap(n.pin("sp_flows"), nil)
			must(t, err)
			defer flows.Close()
			left := all[bpf.FlowKey, bpf.Flow](t, flows)
			n.mode(t, datapath.Observe)
			for key, value := range left {
				must(t, flows.Put(&key, &value))
			}
			n.mode(t, datapath.Enforce)
			wantReset(t, conn)
		})
	}
}

// TestWatchedPodBesideTheNode: connections of a pod's service that is enforced no more go on, though the node's own service at that
// port is enforced.
func TestWatchedPodBesideTheNode(t *testing.T) { eachProfile(t, testWatchedPodBesideTheNode) }

func testWatchedPodBesideTheNode(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	both := append(n.d.Services(), datapath.Service{ID: 9, Name: "host-too", Target: datapath.TargetHost, Ports: []uint16{podPort}})
	for _, c := range n.cells() {
		if c.serviceID != podID {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			_, err := n.d.SetServices(both)
			must(t, err)
			slot := c.path(n, t, time.Minute)
			bypassed := c.dialDirect(t)
			open := slices.Clone(both)
			for i := range open {
				if open[i].ID == podID {
					open[i].Mode = datapath.Observe
				}
			}
			_, err = n.d.SetServices(open)
			must(t, err)
			if _, err := lab.Ask(bypassed); err != nil {
				t.Errorf("the bypassed connection: %v", err)
			}
			if got, err := c.ask(within(t)); got != "service" {
				t.Errorf("answered by %s (%v), want the service", got, err)
			}
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
		})
	}
}

// swept gives what a sweep tells.
func (n *node) swept(t *testing.T) (all []flow.Record) {
	t.Helper()
	must(t, n.Node.Do(func() (err error) {
		all, err = n.d.Sweep()
		return err
	}))
	return slices.DeleteFunc(all, func(r flow.Record) bool { return r.Event != flow.EventClose })
}
