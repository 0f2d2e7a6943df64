package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Arrival is one TCP packet that the stack of a namespace was given.
type Arrival struct {
	Time     time.Time // CLOCK_REALTIME, by the kernel
	Src, Dst netip.AddrPort
	Flags    uint8 // byte 13 of the TCP header
}

// Arrivals hands on the TCP packets that are delivered in a namespace, by raw sockets: they get their
// copy where the sockets of the packet's port do, behind the hooks of every device, behind routing and
// behind netfilter. What is redirected away before that never arrives.
type Arrivals struct {
	files []*os.File
	done  chan struct{}
	lost  atomic.Uint32
}

// Arrivals calls f, from one goroutine for each family, for every packet to one of the ports. Close of
// the Lab ends it.
func (n *Namespace) Arrivals(f func(Arrival), ports ...uint16) (*Arrivals, error) {
	a := &Arrivals{done: make(chan struct{}, len(Families()))}
	for _, family := range Families() {
		var fd int
		err := n.Do(func() (err error) {
			fd, err = openArrivals(family, ports)
			return err
		})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("watch arrivals in %s: %w", n.Name, err), a.Close())
		}
		file := os.NewFile(uintptr(fd), "arrivals in "+n.Name)
		a.files = append(a.files, file)
		go a.run(file, family, f)
	}
	n.lab.onClose(a.Close)
	return a, nil
}

// openArrivals sets the filter before the socket can get anything else: a raw socket takes packets
// from the moment it is made, so what came before the filter is read away.
func openArrivals(f Family, ports []uint16) (fd int, err error) {
	domain, level := unix.AF_INET, unix.SOL_IP
	option := unix.IP_PKTINFO
	if f == IPv6 {
		domain, level, option = unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_RECVPKTINFO
	}
	fd, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, fmt.Errorf("open raw socket: %w", err)
	}
	filter, err := arrivalFilter(f, ports)
	if err == nil {
		err = errors.Join(unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, filter),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, tapBuffer),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1),
			unix.SetsockoptInt(fd, level, option, 1))
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("prepare raw socket: %w", err), unix.Close(fd))
	}
	for buf := make([]byte, 64); ; { // an empty queue is an error, too
		if _, _, err := unix.Recvfrom(fd, buf, 0); err != nil && !errors.Is(err, unix.EINTR) {
			return fd, nil
		}
	}
}

// arrivalFilter passes what goes to one of the ports. A raw socket of IPv4 sees the IP header, one of
// IPv6 does not.
func arrivalFilter(f Family, ports []uint16) (*unix.SockFprog, error) {
	in := []bpf.Instruction{bpf.LoadMemShift{Off: 0}}
	if f == IPv6 {
		in[0] = bpf.LoadConstant{Dst: bpf.RegX, Val: 0}
	}
	in = append(in, bpf.LoadIndirect{Off: 2, Size: 2})
	for i, p := range ports {
		in = append(in, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(p), SkipTrue: uint8(len(ports) - i)})
	}
	return assemble(append(in, bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: tapSnap}))
}

func (a *Arrivals) run(file *os.File, family Family, f func(Arrival)) {
	defer func() { a.done <- struct{}{} }()
	raw, err := file.SyscallConn()
	if err != nil {
		return // closed
	}
	buf, oob := make([]byte, tapSnap), make([]byte, 256)
	_ = raw.Read(func(fd uintptr) bool {
		for {
			n, oobn, _, from, err := unix.Recvmsg(int(fd), buf, oob, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return !errors.Is(err, unix.EAGAIN)
			}
			if one, ok := a.arrival(family, buf[:n], oob[:oobn], from); ok {
				f(one)
			}
		}
	})
}

// arrival reads a message of the raw socket, and how many the kernel could not queue.
func (a *Arrivals) arrival(family Family, b, oob []byte, from unix.Sockaddr) (one Arrival, ok bool) {
	var src, dst netip.Addr
	tcp := b
	one.Time, _ = stamp(oob)
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return one, false
	}
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_RXQ_OVFL:
			a.lost.Store(binary.NativeEndian.Uint32(m.Data))
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_PKTINFO:
			dst = netip.AddrFrom16([16]byte(m.Data[:16]))
		}
	}
	if family == IPv4 {
		src, dst, tcp, _, ok = network(b)
	} else if sa, is := from.(*unix.SockaddrInet6); is {
		src, ok = netip.AddrFrom16(sa.Addr), true
	}
	if !ok || len(tcp) < 20 {
		return one, false
	}
	one.Src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(tcp[0:]))
	one.Dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(tcp[2:]))
	one.Flags = tcp[13]
	return one, true
}

// Lost is how many packets were delivered that could not be handed on.
func (a *Arrivals) Lost() uint32 { return a.lost.Load() }

// Close returns when f is called no more.
func (a *Arrivals) Close() error {
	var errs []error
	for _, file := range a.files {
		if err := file.Close(); !errors.Is(err, os.ErrClosed) {
			errs = append(errs, err)
			<-a.done
		}
	}
	return errors.Join(errs...)
}
