package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is one network namespace of a Lab.
type Namespace struct {
	// Name is for people: "client", "node", "pod0".
	Name string
	// Netlink speaks to this namespace from any goroutine.
	Netlink *netlink.Handle

	lab    *Lab
	handle netns.NsHandle
	addrs  map[Family][]netip.Addr
	end    func() error // closes handle and Netlink, once
}

// newNamespace makes an empty namespace with lo up and without duplicate address detection.
func (l *Lab) newNamespace(name string) (*Namespace, error) {
	h, err := create()
	if err != nil {
		return nil, fmt.Errorf("create namespace %s: %w", name, err)
	}
	n := &Namespace{Name: name, lab: l, handle: h, addrs: map[Family][]netip.Addr{}}
	n.end = sync.OnceValue(n.close)
	l.onClose(n.end)
	if n.Netlink, err = netlink.NewHandleAt(h); err != nil {
		return nil, fmt.Errorf("open netlink of %s: %w", name, err)
	}
	for key, value := range map[string]string{
		"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0",
		"ipv6/conf/default/accept_ra": "0", "ipv6/conf/default/router_solicitations": "0",
	} {
		if err := n.Sysctl(key, value); err != nil {
			return nil, err
		}
	}
	lo := side{ns: n, device: "lo"}
	return n, lo.up()
}

func (n *Namespace) close() error {
	var err error
	if n.Netlink != nil {
		if err = unhook(n.Netlink); err != nil {
			err = fmt.Errorf("unhook %s: %w", n.Name, err)
		}
		n.Netlink.Close()
	}
	return errors.Join(err, n.handle.Close())
}

// unhook takes the filters of clsact off all devices of a namespace that is to end. Connections that nobody holds any more keep a namespace
// for minutes while they wait for answers, and its devices with it; links went with who held them.
func unhook(h *netlink.Handle) error {
	devices, err := h.LinkList()
	for errors.Is(err, netlink.ErrDumpInterrupted) { // a peer went meanwhile
		devices, err = h.LinkList()
	}
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, d := range devices {
		err := h.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: d.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}})
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT): // there is none
		case errors.Is(err, unix.ENODEV): // it went with its peer
		default:
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// unhookKept does so in a namespace that a mount keeps.
func unhookKept(path string) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	return unhook(h)
}

// create unshares a namespace on a thread that then returns to its own.
func create() (h netns.NsHandle, err error) {
	err = onThread(func() error {
		h, err = netns.New()
		return err
	})
	return h, err
}

// onThread runs f with its thread locked, and puts the thread back into its namespace.
func onThread(f func() error) error {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("get own namespace: %w", err)
	}
	defer func() {
		if err := netns.Set(home); err != nil {
			panic(fmt.Sprintf("lab: thread cannot return to its namespace: %v", err)) // nothing it does now can be trusted
		}
		_ = home.Close()
		runtime.UnlockOSThread()
	}()
	return f()
}

// Do runs f inside the namespace, on the calling goroutine. Sockets that f opens stay in the
// namespace after Do returns; goroutines that f starts are not in it.
func (n *Namespace) Do(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(n.handle); err != nil {
			return fmt.Errorf("enter %s: %w", n.Name, err)
		}
		return n.lab.cgroup.do(f)
	})
}

// Path names the namespace for other processes, for as long as the Lab lives.
func (n *Namespace) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(n.handle))
}

// Addr is the first address of the namespace in that family: the one that it sends from. The
// node's is the one towards the client.
func (n *Namespace) Addr(f Family) netip.Addr { return n.addrs[f][0] }

// Other is the second address, which is used only by those who bind to it. For the node it is the
// one towards the first pod.
func (n *Namespace) Other(f Family) netip.Addr { return n.addrs[f][1] }

// Ifindex is the number of the device with that name.
func (n *Namespace) Ifindex(device string) (int, error) {
	dev, err := n.Netlink.LinkByName(device)
	if err != nil {
		return 0, fmt.Errorf("find %s in %s: %w", device, n.Name, err)
	}
	return dev.Attrs().Index, nil
}

// Sysctl sets a value below /proc/sys/net, with slashes: "ipv4/ip_forward".
func (n *Namespace) Sysctl(key, value string) error {
	return n.Do(func() error {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0o644); err != nil {
			return fmt.Errorf("set sysctl %s in %s: %w", key, n.Name, err)
		}
		return nil
	})
}

// Dial connects from the namespace. An invalid local address lets the kernel choose; its port may
// be 0.
func (n *Namespace) Dial(ctx context.Context, local, remote netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{}
	if local.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(local)
	}
	var c net.Conn
	err := n.Do(func() (err error) {
		c, err = d.DialContext(ctx, "tcp", remote.String())
		return err
	})
	return c, err
}

// Listen listens for plain TCP (not MPTCP) in the namespace, in the family of addr alone. The
// caller closes.
func (n *Namespace) Listen(addr netip.AddrPort) (net.Listener, error) {
	network := "tcp4"
	if addr.Addr().Is6() {
		network = "tcp6"
	}
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	var ln net.Listener
	err := n.Do(func() (err error) {
		ln, err = lc.Listen(context.Background(), network, addr.String())
		return err
	})
	return ln, err
}
