package datapath_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

const pouring = 8 << 20 // bytes of a transfer

// sinks take bytes at a second port of both services, and answer at the end with how many.
func (n *node) sinks(t *testing.T) {
	t.Helper()
	services := n.d.Services()
	for i := range services {
		services[i].Ports = append(services[i].Ports, sinkPort)
	}
	_, err := n.d.SetServices(services)
	must(t, err)
	swallow := func(c net.Conn) {
		got, _ := io.Copy(io.Discard, c)
		fmt.Fprintln(c, got)
	}
	for _, f := range lab.Families() {
		for _, ns := range []*lab.Namespace{n.Node, n.Pod} {
			_, err := ns.Serve(netip.AddrPortFrom(unspecified(f), sinkPort), swallow)
			must(t, err)
		}
	}
}

const sinkPort = 8090

// pour sends so much to a sink of the cell's service and waits for its count.
func (c cell) pour(t *testing.T, bytes int) {
	t.Helper()
	conn, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, 0), netip.AddrPortFrom(c.to, sinkPort))
	must(t, err)
	defer conn.Close()
	must(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	_, err = conn.Write(make([]byte, bytes))
	must(t, err)
	must(t, conn.(*net.TCPConn).CloseWrite())
	var got int
	if _, err := fmt.Fscan(conn, &got); err != nil || got != bytes {
		t.Fatalf("%d bytes arrived, want %d (%v)", got, bytes, err)
	}
}

func (n *node) trafficOf(t *testing.T, service uint32) datapath.Traffic {
	t.Helper()
	all, err := n.d.Traffic()
	must(t, err)
	traffic, ok := all[service]
	if !ok {
		t.Fatalf("no row for service %d in %v", service, all)
	}
	return traffic
}

// covers holds that sockets got no more than hooks let through, in every measure.
func covers(hook, socket datapath.Volume) bool {
	return hook.Opens >= socket.Opens && hook.Packets >= socket.Packets && hook.Bytes >= socket.Bytes
}

// TestBulkAgrees: whatever segmentation and merging does on the way, hooks and sockets count the same
// payload, in every way to every service, by the proxy and under a path.
func TestBulkAgrees(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.sinks(t)
	n.copyProxy(t)
	for _, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			before := n.trafficOf(t, c.serviceID)
			c.pour(t, pouring)
			slot, err := n.d.OpenPath(datapath.Path{Grant: "01BULK", Client: c.from, ServiceID: c.serviceID, Service: "test",
				Ports: []uint16{sinkPort}, Deadline: datapath.BootTime() + time.Minute})
			must(t, err)
			c.pour(t, pouring)
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			now := n.trafficOf(t, c.serviceID)
			for _, v := range []struct {
				kind                       string
				hook, socket, hook0, sock0 datapath.Volume
			}{{"leg", now.HookLeg, now.SocketLeg, before.HookLeg, before.SocketLeg},
				{"path", now.HookPath, now.SocketPath, before.HookPath, before.SocketPath}} {
				if got := v.socket.Bytes - v.sock0.Bytes; got < pouring || v.socket.Opens == v.sock0.Opens || v.socket.Packets == v.sock0.Packets {
					t.Errorf("%s: sockets counted %+v, before %+v: want %d bytes and more", v.kind, v.socket, v.sock0, pouring)
				}
				if !covers(v.hook, v.socket) {
					t.Errorf("%s: sockets counted %+v, hooks %+v", v.kind, v.socket, v.hook)
				}
			}
		})
	}
}

// TestForgedTuple: what comes by a device without hooks with the tuple of a live path or leg passes the
// backstop, and shows in the difference.
func TestForgedTuple(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	p := n.latePod(t)
	must(t, n.Node.Sysctl("ipv4/conf/all/rp_filter", "0")) // else the node itself refuses the foreign source
	must(t, n.Node.Sysctl("ipv4/conf/"+p.device+"/rp_filter", "0"))
	for _, f := range lab.Families() {
		c := cell{client: n.Client, from: n.Client.Addr(f), to: n.Node.Addr(f), port: hostPort, serviceID: hostID}
		t.Run("leg/"+f.String(), func(t *testing.T) {
			n.forges(t, p, c, func(v datapath.Traffic) (hook, socket datapath.Volume) { return v.HookLeg, v.SocketLeg })
		})
		t.Run("path/"+f.String(), func(t *testing.T) {
			c.path(n, t, time.Minute)
			n.forges(t, p, c, func(v datapath.Traffic) (hook, socket datapath.Volume) { return v.HookPath, v.SocketPath })
		})
	}
}

// forges sends one packet with payload and one without into a connection that is open.
func (n *node) forges(t *testing.T, p late, c cell, of func(datapath.Traffic) (hook, socket datapath.Volume)) {
	t.Helper()
	conn, err := c.client.Dial(within(t), netip.AddrPortFrom(c.from, 0), c.target())
	must(t, err)
	defer conn.Close()
	seen, err := lab.Ask(conn)
	must(t, err)
	more := func() (empties, bytes int64) {
		hook, socket := of(n.trafficOf(t, c.serviceID))
		return int64(socket.Packets - hook.Packets), int64(socket.Bytes - hook.Bytes)
	}
	empties0, bytes0 := more()
	out, err := p.Injector("eth0")
	must(t, err)
	defer out.Close()
	forged := tcp(seen, c.target(), packet.ACK)
	forged.SrcMAC, err = p.MAC("eth0")
	must(t, err)
	forged.DstMAC, err = n.Node.MAC(p.device)
	must(t, err)
	must(t, out.Send(forged.Bytes()))
	forged.Payload = []byte("forged")
	must(t, out.Send(forged.Bytes()))
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		empties, bytes := more()
		if bytes-bytes0 == 6 && empties > empties0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("sockets counted %d bytes and %d packets without payload more than hooks, before %d and %d: want 6 bytes and an empty packet more;%s",
				bytes, empties, bytes0, empties0, n.counters(t))
		}
	}
}
