package datapath_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// putCaller is what a socket said of itself when it sent the SYN with this number, so long ago.
func putCaller(t testing.TB, r *rig, s scene, sequence uint32, ago time.Duration) bpf.FlowKey {
	t.Helper()
	key := flowKey(s)
	check(t, r.m.SpCallers.Put(&key, &bpf.Caller{Cookie: 7, Cgroup: 11, Pid: 13, Sequence: sequence, SaidNs: uint64(datapath.BootTime() - ago)}))
	return key
}

// TestTakeCaller: a hook that decides on a SYN takes what the socket of this very SYN said, and nothing that another one said:
// neither with the same addresses and ports in another network namespace, nor before.
func TestTakeCaller(t *testing.T) {
	r := newRig(t, 64, 64)
	for _, f := range lab.Families() {
		for _, name := range everyScene() {
			s := r.scenes(t, f)[name]
			for what, c := range map[string]struct {
				flags    uint8
				sequence uint32
				ago      time.Duration
				path     bool
				taken    bool
				kept     bool
			}{
				"to the proxy":             {syn, 1000, 0, false, true, true},
				"under a path":             {syn, 1000, 0, true, true, true},
				"of another namespace":     {syn, 1001, 0, false, false, false},
				"of another, under a path": {syn, 1001, 0, true, false, false},
				"of before":                {syn, 1000, 2 * time.Second, false, false, false},
				"no SYN":                   {ack, 1000, 0, false, false, true},
				"the answer to one":        {syn | ack, 1000, 0, false, false, true},
			} {
				t.Run(f.String()+"/"+name+"/"+what, func(t *testing.T) {
					r.reset(t)
					key := putCaller(t, r, s, c.sequence, c.ago)
					p := at(s.towards, s.device, tcp(s.client, s.server, c.flags))
					if c.path {
						path(datapath.PathActive)(t, r, s, &p)
					}
					before := datapath.BootTime()
					r.send(t, p)
					var got bpf.Caller
					err := r.m.SpCallers.Lookup(&key, &got)
					if (err == nil) != c.kept || err == nil && (got.TakenNs >= uint64(before)) != c.taken || c.kept && (got.Cookie != 7 || got.Pid != 13) {
						t.Errorf("%+v, %v", got, err)
					}
					if _, err := r.d.Caller(s.client, s.server); (err == nil) != c.taken || err != nil && !errors.Is(err, datapath.ErrNoCaller) {
						t.Errorf("as the agent reads it: %v", err)
					}
				})
			}
		}
	}
}

// dialAs connects as a workload, and gives the socket's number.
func (c cell) dialAs(t *testing.T, g *lab.Group, port uint16) (conn *net.TCPConn, cookie uint64) {
	t.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.from, port))}
	d.Control = func(_, _ string, raw syscall.RawConn) (err error) {
		return errors.Join(raw.Control(func(fd uintptr) {
			cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
		}), err)
	}
	must(t, g.Do(c.client, func() error {
		raw, err := d.DialContext(within(t), "tcp", c.target().String())
		if err == nil {
			conn = raw.(*net.TCPConn)
		}
		return err
	}))
	t.Cleanup(func() { conn.Close() })
	return conn, cookie
}

func ends(conn net.Conn) (client, server netip.AddrPort) {
	return conn.LocalAddr().(*net.TCPAddr).AddrPort(), conn.RemoteAddr().(*net.TCPAddr).AddrPort()
}

// ticks is when this process began, as proc(5) has it.
func ticks(t *testing.T) uint64 {
	t.Helper()
	stat, err := os.ReadFile("/proc/self/stat")
	must(t, err)
	n, err := strconv.ParseUint(strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))[19], 10, 64)
	must(t, err)
	return n
}

// TestCallers: whose socket a connection is, is told with its number, its control group and its process, on proxied connections
// and on bypassed ones.
func TestCallers(t *testing.T) {
	t.Parallel()
	eachProfile(t, func(t *testing.T, profile datapath.Profile) {
		n := newNode(t, profile)
		n.copyProxy(t)
		alice, number := groupOf(t, n.Lab, "alice")
		started := ticks(t)
		for _, c := range n.cells() { // the remote client is on this machine too: its sockets say who they are
			t.Run(c.name, func(t *testing.T) {
				asks := func(what string) {
					t.Helper()
					before := datapath.BootTime()
					conn, cookie := c.dialAs(t, alice, 0)
					_, err := lab.Ask(conn)
					must(t, err)
					got, err := n.d.Caller(ends(conn))
					if err != nil || got.Cookie != cookie || got.Cgroup != number || got.ProcessCgroup != number || int(got.PID) != os.Getpid() ||
						uint64(got.Started/(10*time.Millisecond)) != started || got.Taken < before || got.Taken > datapath.BootTime() {
						t.Errorf("%s: %+v, %v, want socket %d of group %d, process %d begun at %d", what, got, err, cookie, number, os.Getpid(), started)
					}
				}
				asks("proxied")
				slot := c.path(n, t, time.Minute)
				asks("bypassed")
				must(t, n.d.EndPath(slot, datapath.PathRevoked))
				must(t, n.d.FreePath(slot))
			})
		}
	})
}

// handedOver makes a socket in one group and connects it in another, in the cell's namespace.
func (c cell) handedOver(t *testing.T, made, connects *lab.Group) (client, server netip.AddrPort) {
	t.Helper()
	var fd int
	must(t, made.Do(c.client, func() (err error) {
		fd, err = unix.Socket(familyOf(c.to), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	t.Cleanup(func() { unix.Close(fd) })
	must(t, connects.Do(c.client, func() error {
		return errors.Join(unix.Bind(fd, sockaddr(netip.AddrPortFrom(c.from, 0))), unix.Connect(fd, sockaddr(c.target())))
	}))
	own, err := unix.Getsockname(fd)
	must(t, err)
	port := 0
	switch a := own.(type) {
	case *unix.SockaddrInet4:
		port = a.Port
	case *unix.SockaddrInet6:
		port = a.Port
	}
	return netip.AddrPortFrom(c.from, uint16(port)), c.target()
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// TestHandedOverSocket: a socket is of the group that it was made in, whoever connects it, and the group of the one who does is told
// beside it. A path that is bound to either group serves the socket by where it was made.
func TestHandedOverSocket(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	alice, number := groupOf(t, n.Lab, "alice")
	bob, other := groupOf(t, n.Lab, "bob")
	for _, c := range n.cells() {
		if c.client == n.Client {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			got, err := n.d.Caller(c.handedOver(t, alice, bob))
			if err != nil || got.Cgroup != number || got.ProcessCgroup != other || int(got.PID) != os.Getpid() {
				t.Errorf("%+v, %v, want a socket of %d that one of %d connected", got, err, number, other)
			}
		})
	}
}

// TestCallerWorksAs: a caller is told with the user and group that it was at work as, which are not those of its program's next one.
func TestCallerWorksAs(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	alice, _ := groupOf(t, n.Lab, "alice")
	c := n.cells()[0]
	fd := -1
	must(t, alice.Do(c.client, func() (err error) {
		fd, err = unix.Socket(familyOf(c.to), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return errors.Join(err, unix.Bind(fd, sockaddr(netip.AddrPortFrom(c.from, 42424))), as(1234, 5678, func() error {
			return unix.Connect(fd, sockaddr(c.target()))
		}))
	}))
	defer unix.Close(fd)
	if got, err := n.d.Caller(netip.AddrPortFrom(c.from, 42424), c.target()); err != nil || got.User != 1234 || got.Group != 5678 {
		t.Errorf("%+v, %v", got, err)
	}
}

// as runs f with the effective user and group of somebody else, on this thread alone, which is locked.
func as(user, group uintptr, f func() error) error {
	const same = ^uintptr(0)
	set := func(call, id uintptr) error {
		if _, _, errno := unix.RawSyscall(call, same, id, same); errno != 0 {
			return errno
		}
		return nil
	}
	if err := errors.Join(set(unix.SYS_SETRESGID, group), set(unix.SYS_SETRESUID, user)); err != nil {
		return err
	}
	return errors.Join(f(), set(unix.SYS_SETRESUID, 0), set(unix.SYS_SETRESGID, 0))
}

// TestForgedCallers attacks: what a workload says of its own sockets never counts for those of another one.
func TestForgedCallers(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	alice, number := groupOf(t, n.Lab, "alice")
	bob, _ := groupOf(t, n.Lab, "bob")
	for _, c := range n.cells() {
		if c.client != n.Pods[1] {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			conn, _ := c.dialAs(t, alice, 0)
			client, server := ends(conn)
			if got, err := n.d.Caller(client, server); err != nil || got.Cgroup != number {
				t.Fatalf("%+v, %v", got, err)
			}

			t.Run("same tuple in another namespace", func(t *testing.T) {
				n.elsewhere(t, bob, client, server)
				if got, err := n.d.Caller(client, server); !errors.Is(err, datapath.ErrNoCaller) && got.Cgroup != number {
					t.Errorf("%+v, %v", got, err)
				}
			})
			t.Run("raw SYN with the tuple of before", func(t *testing.T) {
				must(t, conn.SetLinger(0))
				must(t, conn.Close())
				again, _ := c.dialAs(t, alice, client.Port())
				must(t, again.SetLinger(0))
				must(t, again.Close())
				if got, err := n.d.Caller(client, server); err != nil || got.Cgroup != number {
					t.Fatalf("%+v, %v", got, err)
				}
				n.injectSYN(t, client, server)
				waitUntil(t, "the hook to see it", func() bool {
					_, err := n.d.Caller(client, server)
					return errors.Is(err, datapath.ErrNoCaller)
				})
			})
			t.Run("next socket with the same port", func(t *testing.T) {
				next, cookie := c.dialAs(t, bob, client.Port())
				if got, err := n.d.Caller(ends(next)); err != nil || got.Cookie != cookie || got.Cgroup == number {
					t.Errorf("%+v, %v", got, err)
				}
			})
		})
	}
}

// injectSYN sends one from the second pod, past its sockets.
func (n *node) injectSYN(t *testing.T, from, to netip.AddrPort) {
	t.Helper()
	p := tcp(from, to, packet.SYN)
	var err error
	p.SrcMAC, err = n.Pods[1].MAC("eth0")
	must(t, err)
	p.DstMAC, err = n.Node.MAC(lab.PodDevice(1))
	must(t, err)
	must(t, n.Pods[1].Inject("eth0", p.Bytes()))
}

// elsewhere has a socket with these ends send a SYN in a namespace that leads nowhere.
func (n *node) elsewhere(t *testing.T, g *lab.Group, client, server netip.AddrPort) {
	t.Helper()
	must(t, g.Do(n.Pods[1], func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return connectRefused(client, server)
	}))
}

// connectRefused connects where both ends are the namespace's own, and nobody listens.
func connectRefused(client, server netip.AddrPort) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{client.Addr(), server.Addr()} {
		ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) { // the kernel makes IPv6 addresses usable in its own time
		err := connectOnce(client, server)
		switch {
		case errors.Is(err, unix.ECONNREFUSED):
			return nil
		case !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EADDRNOTAVAIL), time.Now().After(deadline):
			return fmt.Errorf("%w, want it refused", err)
		}
	}
}

func connectOnce(client, server netip.AddrPort) error {
	fd, err := unix.Socket(familyOf(client.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, sockaddr(client)); err != nil {
		return err
	}
	return unix.Connect(fd, sockaddr(server))
}

// TestCallersOfAnOlderVersion: what a version without the table has pinned is taken over, and callers are told from then on.
func TestCallersOfAnOlderVersion(t *testing.T) {
	t.Parallel()
	n := newNode(t, datapath.ProfileAuto)
	n.copyProxy(t)
	alice, number := groupOf(t, n.Lab, "alice")
	c := n.cells()[1]
	live := c.dial(t)
	must(t, n.d.Close())
	pins, err := filepath.Glob(filepath.Join(n.cf.Dir, "v*", "maps", "sp_callers"))
	if err != nil || len(pins) != 1 {
		t.Fatalf("pins %v, %v", pins, err)
	}
	must(t, os.Remove(pins[0]))
	n.open(t)
	must(t, n.attachAll(n.d))
	must(t, n.d.Renew(time.Minute))
	if _, err := lab.Ask(live); err != nil {
		t.Errorf("the connection of before: %v", err)
	}
	conn, _ := c.dialAs(t, alice, 0)
	if got, err := n.d.Caller(ends(conn)); err != nil || got.Cgroup != number {
		t.Errorf("%+v, %v", got, err)
	}
}
