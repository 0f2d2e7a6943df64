package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// keepAlive finds peers that vanished, on both halves of a connection.
func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 15 * time.Second, Count: 4}
}

// firstAttempt is how long the first SYN of a dial has; each later attempt has twice as long.
const firstAttempt = time.Second

func listenBoth(port uint16) ([]*net.TCPListener, error) {
	var all []*net.TCPListener
	for _, at := range []struct{ network, address string }{{"tcp4", "0.0.0.0"}, {"tcp6", "::"}} {
		l, err := listen(at.network, net.JoinHostPort(at.address, strconv.Itoa(int(port))))
		if errors.Is(err, unix.EAFNOSUPPORT) && at.network == "tcp6" {
			continue // a kernel without IPv6 has no IPv6 clients
		}
		if err != nil {
			for _, open := range all {
				open.Close()
			}
			return nil, err
		}
		all = append(all, l)
	}
	return all, nil
}

// listen opens a transparent listener: an accepted socket's local address is the client's original
// destination. Go's listeners are MPTCP by default, which the datapath's socket look-up would miss.
func listen(network, address string) (*net.TCPListener, error) {
	lc := net.ListenConfig{
		KeepAliveConfig: keepAlive(),
		Control: func(network, _ string, raw syscall.RawConn) error {
			return onSocket(raw, func(fd int) error { return setTransparent(fd, network) })
		},
	}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), network, address)
	if err != nil {
		return nil, fmt.Errorf("listen for clients: %w", err)
	}
	return l.(*net.TCPListener), nil
}

func onSocket(raw syscall.RawConn, f func(fd int) error) error {
	var err error
	if controlErr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); controlErr != nil {
		return controlErr
	}
	return err
}

func setTransparent(fd int, network string) error {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if network == "tcp6" {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return fmt.Errorf("make socket transparent: %w", err)
	}
	return nil
}

// dial connects to the service from the client's address and a fresh port. The kernel drops a SYN
// whose tuple a bypassed flow holds, so an attempt that times out is repeated with a new port.
func dial(ctx context.Context, client netip.Addr, service netip.AddrPort, timeout time.Duration) (*net.TCPConn, error) {
	deadline := time.Now().Add(timeout)
	for attempt := firstAttempt; ; attempt *= 2 {
		left := time.Until(deadline)
		c, err := dialOnce(ctx, client, service, min(attempt, left))
		if err == nil {
			return c, nil
		}
		var netErr net.Error
		timedOut := errors.As(err, &netErr) && netErr.Timeout()
		if !timedOut || ctx.Err() != nil || attempt >= left {
			return nil, err
		}
	}
}

func dialOnce(ctx context.Context, client netip.Addr, service netip.AddrPort, timeout time.Duration) (*net.TCPConn, error) {
	d := net.Dialer{
		Timeout:         timeout,
		LocalAddr:       net.TCPAddrFromAddrPort(netip.AddrPortFrom(client, 0)),
		KeepAliveConfig: keepAlive(),
		Control: func(network, _ string, raw syscall.RawConn) error {
			return onSocket(raw, func(fd int) error { return setClientSide(fd, network) })
		},
	}
	d.SetMultipathTCP(false)
	network := "tcp4"
	if service.Addr().Is6() {
		network = "tcp6"
	}
	c, err := d.DialContext(ctx, network, service.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// setClientSide lets a socket bind to an address that is not ours, and chooses its port at connect:
// then it only has to be free towards this service, not towards all.
func setClientSide(fd int, network string) error {
	if err := setTransparent(fd, network); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return fmt.Errorf("leave port to connect: %w", err)
	}
	return nil
}

// resetClose closes a connection with RST: whoever is at the other end learns that it was cut.
func resetClose(c *net.TCPConn) {
	_ = c.SetLinger(0) // on a broken socket closing is all there is
	_ = c.Close()
}

// addrPort of an address of a TCP connection, IPv4 as IPv4. The zone stays.
func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// bare is without zone: the device by which a link-local peer came to px says nothing outside.
func bare(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().WithZone(""), a.Port())
}
