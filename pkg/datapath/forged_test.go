package datapath_test

import (
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// forge has the remote client's network send a packet of its connection, with a sequence number that nobody
// there would know.
func (n *node) forge(t *testing.T, conn net.Conn, flags uint8) {
	t.Helper()
	p := tcp(conn.LocalAddr().(*net.TCPAddr).AddrPort(), conn.RemoteAddr().(*net.TCPAddr).AddrPort(), flags)
	p.Seq = 1
	var err error
	p.SrcMAC, err = n.Client.MAC("eth0")
	must(t, err)
	p.DstMAC, err = n.Node.MAC(lab.Uplink)
	must(t, err)
	must(t, n.Client.Inject("eth0", p.Bytes()))
}

// remoteCells are the cells of the client beyond the uplink.
func (n *node) remoteCells() (out []cell) {
	for _, c := range n.cells() {
		if c.client == n.Client {
			out = append(out, c)
		}
	}
	return out
}

// TestForgedReset: a RST that the service does not take, because its sender knows the tuple and nothing more, ends
// no bypassed connection, also when it is silent for a while.
func TestForgedReset(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.showPods(t)
	n.readEvents(t)
	for _, c := range n.remoteCells() {
		t.Run(c.name, func(t *testing.T) {
			c.path(n, t, time.Minute)
			conn, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, 0), c.target())
			must(t, err)
			defer conn.Close()
			_, err = lab.Ask(conn)
			must(t, err)
			n.forge(t, conn, packet.RST)
			for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				for _, r := range n.sweep(t) {
					t.Errorf("a sweep took %v %v", r.Event, r.Reason)
				}
			}
			if _, err := lab.Ask(conn); err != nil {
				t.Errorf("the connection ended: %v; counters:%s", err, n.counters(t))
			}
			must(t, conn.(*net.TCPConn).SetLinger(0))
			must(t, conn.Close())
			waitUntil(t, "the end of a connection whose reset was meant", func() bool { return len(n.sweep(t)) > 0 })
		})
	}
}

// TestIdleOnABridge: a sweep ends silent connections to a pod behind a bridge's port as well.
func TestIdleOnABridge(t *testing.T) {
	t.Parallel()
	n := newBridged(t, datapath.ProfileAuto, false)
	n.showPods(t)
	n.readEvents(t)
	for _, c := range n.bridgedCells() {
		if c.serviceID != podID {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			slot := c.path(n, t, time.Minute)
			conn, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, 0), c.target())
			must(t, err)
			defer conn.Close()
			_, err = lab.Ask(conn)
			must(t, err)
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			n.sweep(t)
			wantResetNow(t, "client", conn)
			waitUntil(t, "the record of the flow", func() bool { return len(n.sweep(t)) > 0 })
			must(t, n.d.FreePath(slot))
		})
	}
}

// TestForgedSYNOfALeg: a SYN with the tuple of a proxied connection, which comes in by another device, does not take
// the answers there. Where the client shook no hands, or came by this device, it is decided as ever.
func TestForgedSYNOfALeg(t *testing.T) {
	r := newRig(t, 64, 64)
	other, err := r.Node.Ifindex(lab.PodDevice(1))
	check(t, err)
	for _, f := range lab.Families() {
		for name, c := range map[string]struct {
			answers []uint8
			moved   bool
		}{
			"live":      {[]uint8{syn | ack, ack}, false},
			"half-open": {[]uint8{syn | ack}, true},
			"reset":     {[]uint8{syn | ack, ack, packet.RST}, true},
		} {
			t.Run(name+"/"+f.String(), func(t *testing.T) {
				r.reset(t)
				s := r.scenes(t, f)["host"]
				r.send(t, at(s.towards, s.device, tcp(s.client, s.server, syn)))
				for _, flags := range c.answers {
					r.send(t, at("sp_px0_in", r.px.Px0(), tcp(s.server, s.client, flags)))
				}
				r.send(t, at(s.towards, other, tcp(s.client, s.server, syn)))
				for _, l := range all[bpf.LegKey, bpf.Leg](t, r.m.SpLegs) {
					if moved := int(l.Ifindex) == other; moved != c.moved {
						t.Errorf("the leg is at device %d, of the client %d, of the other %d", l.Ifindex, s.device, other)
					}
				}
			})
		}
	}
}

// TestForgedResetOfALeg: where nobody can ask which connections the proxy has, its next packet, a keepalive if there is nothing
// to say, undoes a RST that it did not take; one that it took is followed by nothing, and its leg ends.
func TestForgedResetOfALeg(t *testing.T) {
	r := newRig(t, 64, 64)
	blind := r.where
	blind.PxNetns = filepath.Join(r.Dir, "no-px")
	d, err := datapath.Open(blind)
	check(t, err)
	defer func() { check(t, d.Close()) }()
	for _, f := range lab.Families() {
		for name, c := range map[string]struct {
			after []uint8
			age   time.Duration
			left  int
		}{
			"until a keepalive": {nil, 35 * time.Second, 1},
			"taken":             {nil, 45 * time.Second, 0},
			"forged":            {[]uint8{ack}, 45 * time.Second, 1},
			"reset by both":     {[]uint8{packet.RST | ack}, 45 * time.Second, 0},
		} {
			t.Run(name+"/"+f.String(), func(t *testing.T) {
				r.reset(t)
				s := r.scenes(t, f)["host"]
				r.send(t, at(s.towards, s.device, tcp(s.client, s.server, syn)))
				for _, flags := range []uint8{syn | ack, ack} {
					r.send(t, at("sp_px0_in", r.px.Px0(), tcp(s.server, s.client, flags)))
				}
				r.send(t, at(s.towards, s.device, tcp(s.client, s.server, packet.RST)))
				for _, flags := range c.after {
					r.send(t, at("sp_px0_in", r.px.Px0(), tcp(s.server, s.client, flags)))
				}
				ageLegs(t, r.m, c.age)
				_, err := d.Sweep()
				check(t, err)
				if left := len(all[bpf.LegKey, bpf.Leg](t, r.m.SpLegs)); left != c.left {
					t.Errorf("%d legs are left, want %d", left, c.left)
				}
			})
		}
	}
}

// TestForgedResetOfAProxied: a RST that the proxy did not take costs a silent connection nothing; the legs of one that it took are gone
// with the next look.
func TestForgedResetOfAProxied(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.showPods(t)
	n.copyProxy(t)
	legs := func() int { return len(all[bpf.LegKey, bpf.Leg](t, n.d.Maps().SpLegs)) }
	for _, c := range n.remoteCells() {
		t.Run(c.name, func(t *testing.T) {
			empty[bpf.LegKey, bpf.Leg](t, n.d.Maps().SpLegs)
			conn, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, 0), c.target())
			must(t, err)
			defer conn.Close()
			_, err = lab.Ask(conn)
			must(t, err)
			n.forge(t, conn, packet.RST)
			waitUntil(t, "the forged reset", func() bool { return resetLegs(t, n) == 1 })
			ageLegs(t, n.d.Maps(), 30*time.Second)
			n.sweep(t)
			if legs() != 2 {
				t.Errorf("%d legs are left of a connection whose reset was forged, want 2", legs())
			}
			_, err = lab.Ask(conn)
			must(t, err)
			must(t, conn.(*net.TCPConn).SetLinger(0))
			must(t, conn.Close())
			waitUntil(t, "the reset", func() bool { return resetLegs(t, n) > 0 })
			waitUntil(t, "the end of its leg", func() bool { // the proxy ends the other half in order
				ageLegs(t, n.d.Maps(), 2*time.Second)
				n.sweep(t)
				return resetLegs(t, n) == 0
			})
		})
	}
}

func resetLegs(t *testing.T, n *node) (count int) {
	for _, l := range all[bpf.LegKey, bpf.Leg](t, n.d.Maps().SpLegs) {
		if l.Flags&uint32(bpf.SallyportSpFlagsSP_RST) != 0 {
			count++
		}
	}
	return count
}
