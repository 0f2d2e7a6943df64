package datapath_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// vanish closes a connection without a word to its peer, as its client may.
func vanish(t *testing.T, conn *net.TCPConn) {
	t.Helper()
	raw, err := conn.SyscallConn()
	must(t, err)
	var serr error
	must(t, raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1) }))
	must(t, serr)
	must(t, conn.Close())
}

// sockets lists those of the node whose peer has this port.
func (n *node) sockets(t *testing.T, peer netip.AddrPort) string {
	t.Helper()
	out, err := n.Node.Run(within(t), "ss", "-Htan", "dport", "=", strconv.Itoa(int(peer.Port())))
	must(t, err)
	return strings.TrimSpace(out)
}

// TestSecondConnection: a client that never closes its half, and comes again from the same port when the service
// has given up, has a second connection: of the path's budget, and with records of its own.
func TestSecondConnection(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	n.readEvents(t)
	conns := n.pushers(t)
	must(t, n.Node.Sysctl("ipv4/tcp_fin_timeout", "1")) // of IPv6 too
	for _, c := range n.pushCells() {
		if c.client != n.Client || c.serviceID != hostID {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			p := c.connected(t, n, conns, time.Minute)
			from := p.client.LocalAddr().(*net.TCPAddr).AddrPort()
			must(t, p.server.Close())
			if _, err := p.client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Fatalf("client: %v, want the end of the service's half", err)
			}
			waitUntil(t, "the service's half to be closed", func() bool { return strings.HasPrefix(n.sockets(t, from), "FIN-WAIT-2") })
			vanish(t, p.client)
			waitUntil(t, "the service to forget", func() bool { return n.sockets(t, from) == "" })
			again, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, from.Port()), c.target())
			must(t, err)
			defer again.Close()
			said(t, again, <-conns)
			paths, err := n.d.Paths()
			must(t, err)
			if got := paths[len(paths)-1].Flows; got != 2 {
				t.Errorf("the path counts %d connections, want 2; counters:%s", got, n.counters(t))
			}
			must(t, n.d.EndPath(p.slot, datapath.PathRevoked))
		})
	}
}
