package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const (
	listenPort = 15001
	hostPort   = 8080
	podPort    = 8081
	hostID     = 1
	podID      = 2
)

// node is a lab with a datapath on its node, and services that say whom they saw.
type node struct {
	*lab.Lab
	d  *datapath.Datapath
	px *px.Namespace
	cf datapath.Config

	relays sync.WaitGroup // accept loops, and relays that still use px
}

// eachProfile runs a test with tcx links and with filters of clsact.
func eachProfile(t *testing.T, test func(*testing.T, datapath.Profile)) {
	for _, p := range []datapath.Profile{datapath.ProfileTCX, datapath.ProfileClsact} {
		t.Run(string(p), func(t *testing.T) {
			if p == datapath.ProfileTCX {
				needTCX(t)
			}
			test(t, p)
		})
	}
}

// needTCX skips a test where the kernel has no tcx links.
func needTCX(t *testing.T) {
	t.Helper()
	if !hasTCX(t) {
		t.Skip("needs tcx links (Linux 6.6)")
	}
}

func hasTCX(t *testing.T) bool {
	t.Helper()
	version, err := features.LinuxVersionCode()
	must(t, err)
	return version >= 6<<16|6<<8
}

func newNode(t *testing.T, profile datapath.Profile, changes ...func(*datapath.Config)) *node {
	t.Helper()
	changes = append(changes, func(c *datapath.Config) { c.Profile = profile })
	return newNodeOn(t, lab.Options{Pods: 2}, changes...)
}

func newNodeOn(t *testing.T, o lab.Options, changes ...func(*datapath.Config)) *node {
	t.Helper()
	n := &node{Lab: lab.New(t, o)}
	bpffs, err := n.MountBPFFS()
	must(t, err)
	must(t, n.Node.Do(func() error {
		var err error
		n.px, err = px.Create(px.Config{Path: filepath.Join(n.Dir, "px")})
		return err
	}))
	t.Cleanup(func() {
		must(t, n.Node.Do(func() error { return px.Remove(px.Config{Path: filepath.Join(n.Dir, "px")}) }))
	})
	n.cf = datapath.Config{
		Dir: filepath.Join(bpffs, "sallyport"), PxNetns: filepath.Join(n.Dir, "px"), Px0: n.px.Px0(),
		ListenPort: listenPort, MaxFlows: 4096, MaxLegs: 8192, MaxPaths: 256, RingBytes: 64 << 10, MaxTTL: time.Hour,
	}
	for _, change := range changes {
		change(&n.cf)
	}
	n.open(t)
	t.Cleanup(func() {
		n.d.Close()
		n.uninstall(t)
	})
	must(t, n.attachAll(n.d))
	n.protect(t)
	must(t, n.d.Renew(time.Minute))
	return n
}

// uninstall runs where the agent does: filters are found by their devices.
func (n *node) uninstall(t *testing.T) (r datapath.Report) {
	t.Helper()
	must(t, n.Node.Do(func() (err error) {
		if r, err = datapath.Uninstall(n.cf.Dir); err != nil {
			return err
		}
		inPx, err := datapath.DetachPx(n.cf.PxNetns)
		r.Links += inPx
		return err
	}))
	return r
}

func (n *node) open(t *testing.T) {
	t.Helper()
	must(t, n.Node.Do(func() error {
		var err error
		n.d, err = datapath.Open(n.cf)
		return err
	}))
}

func (n *node) protect(t *testing.T) {
	t.Helper()
	n.program(t)
	for _, f := range lab.Families() {
		_, err := n.Node.WhoAnswers(netip.AddrPortFrom(unspecified(f), hostPort))
		must(t, err)
		_, err = n.Pod.WhoAnswers(netip.AddrPortFrom(unspecified(f), podPort))
		must(t, err)
	}
}

// program writes the services into the tables.
func (n *node) program(t *testing.T) {
	t.Helper()
	pod, err := n.Node.Ifindex(lab.PodDevice(0))
	must(t, err)
	_, err = n.d.SetServices([]datapath.Service{
		{ID: hostID, Name: "host-echo", Target: datapath.TargetHost, Ports: []uint16{hostPort}},
		{ID: podID, Name: "pod-echo", Target: datapath.TargetPod, Ports: []uint16{podPort}, Ifindex: pod,
			Addresses: []netip.Addr{n.Pod.Addr(lab.IPv4), n.Pod.Addr(lab.IPv6)}},
	})
	must(t, err)
}

func unspecified(f lab.Family) netip.Addr {
	if f == lab.IPv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// cell is one way to reach one service.
type cell struct {
	name      string
	client    *lab.Namespace
	from, to  netip.Addr
	port      uint16
	serviceID uint32
}

func (n *node) cells() []cell {
	var out []cell
	for _, f := range lab.Families() {
		out = append(out,
			cell{"host/remote", n.Client, n.Client.Addr(f), n.Node.Addr(f), hostPort, hostID},
			cell{"host/pod", n.Pods[1], n.Pods[1].Addr(f), n.Node.Addr(f), hostPort, hostID},
			cell{"host/loopback", n.Node, f.Loopback(), f.Loopback(), hostPort, hostID},
			cell{"host/own-address", n.Node, n.Node.Addr(f), n.Node.Addr(f), hostPort, hostID},
			cell{"pod/remote", n.Client, n.Client.Addr(f), n.Pod.Addr(f), podPort, podID},
			cell{"pod/pod", n.Pods[1], n.Pods[1].Addr(f), n.Pod.Addr(f), podPort, podID},
			cell{"pod/node", n.Node, nodeTowards(n, f), n.Pod.Addr(f), podPort, podID},
		)
		for i := len(out) - 7; i < len(out); i++ {
			out[i].name += "/" + f.String()
		}
	}
	return out
}

// nodeTowards is the node's address on the pod's link.
func nodeTowards(n *node, f lab.Family) netip.Addr {
	b := n.Pod.Addr(f).AsSlice()
	b[len(b)-1] = 1
	a, _ := netip.AddrFromSlice(b)
	return a
}

func (c cell) target() netip.AddrPort { return netip.AddrPortFrom(c.to, c.port) }

// ask says who answered: "service" when the service saw the client's own tuple, "proxy" when it saw
// another port.
func (c cell) ask(ctx context.Context) (string, error) {
	own, seen, err := c.client.Ask(ctx, netip.AddrPortFrom(c.from, 0), c.target())
	switch {
	case err != nil:
		return "nobody", err
	case own.Addr() != seen.Addr():
		return "stranger", fmt.Errorf("service saw %s, not %s", seen, own)
	case own == seen:
		return "service", nil
	}
	return "proxy", nil
}

func (c cell) path(n *node, t *testing.T, left time.Duration) uint32 {
	t.Helper()
	slot, err := n.d.OpenPath(datapath.Path{
		Grant: "01TEST", Client: c.from, ServiceID: c.serviceID, Service: "test", Ports: []uint16{c.port},
		Deadline: datapath.BootTime() + left,
	})
	must(t, err)
	return slot
}

// copyProxy is a transparent proxy that only copies: what the datapath needs behind px1.
func (n *node) copyProxy(t *testing.T) io.Closer {
	t.Helper()
	var all closers
	for _, network := range []string{"tcp4", "tcp6"} {
		var ln net.Listener
		must(t, n.inPx(func() error {
			var err error
			lc := net.ListenConfig{Control: transparent}
			lc.SetMultipathTCP(false)
			ln, err = lc.Listen(context.Background(), network, fmt.Sprintf(":%d", listenPort))
			return err
		}))
		all = append(all, ln)
		n.relays.Go(func() { n.serve(ln) })
	}
	t.Cleanup(func() {
		all.Close()
		n.relays.Wait()
	})
	return all
}

// inPx runs f in px, with sockets that the backstop sees.
func (n *node) inPx(f func() error) error {
	return n.Do(func() error { return n.px.Do(f) })
}

type closers []io.Closer

func (c closers) Close() error {
	var errs []error
	for _, x := range c {
		errs = append(errs, x.Close())
	}
	return errors.Join(errs...)
}

func (n *node) serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		n.relays.Add(1)
		go n.relay(c.(*net.TCPConn), n.relays.Done)
	}
}

// relay tells when it has dialled.
func (n *node) relay(c *net.TCPConn, dialled func()) {
	defer c.Close()
	var up net.Conn
	err := n.inPx(func() error {
		d := net.Dialer{Control: transparent, Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: c.RemoteAddr().(*net.TCPAddr).IP}}
		d.SetMultipathTCP(false)
		var err error
		up, err = d.Dial("tcp", c.LocalAddr().String())
		return err
	})
	dialled()
	if err != nil {
		c.SetLinger(0)
		return
	}
	defer up.Close()
	done := make(chan struct{})
	go func() {
		io.Copy(up, c)
		up.(*net.TCPConn).CloseWrite()
		close(done)
	}()
	io.Copy(c, up)
	c.CloseWrite()
	<-done
}

func transparent(network, _ string, c syscall.RawConn) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		if network == "tcp6" {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_V6ONLY, 1))
		} else {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		}
		err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1))
	})
	return errors.Join(err, cerr)
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (n *node) counters(t *testing.T) string {
	t.Helper()
	c, err := n.d.Counters()
	must(t, err)
	s := ""
	for _, r := range flow.Reasons() {
		if c[r].Packets > 0 {
			s += fmt.Sprintf(" %s=%d", r, c[r].Packets)
		}
	}
	return s
}

// TestWhoAnswers asks every service in every way: through the proxy without a path, directly with
// one, by the proxy again when it is over.
func TestWhoAnswers(t *testing.T) { eachProfile(t, testWhoAnswers) }

func testWhoAnswers(t *testing.T, profile datapath.Profile) {
	t.Parallel()
	n := newNode(t, profile)
	n.copyProxy(t)
	for _, c := range n.cells() {
		t.Run(c.name, func(t *testing.T) {
			expect := func(want string) {
				t.Helper()
				if got, err := c.ask(within(t)); got != want {
					t.Fatalf("answered by %s (%v), want %s; counters:%s", got, err, want, n.counters(t))
				}
			}
			expect("proxy")
			slot := c.path(n, t, time.Minute)
			expect("service")
			must(t, n.d.EndPath(slot, datapath.PathRevoked))
			expect("proxy")
		})
	}
}
