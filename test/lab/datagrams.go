package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"
)

// Datagrams starts a UDP server that answers each datagram with "service saw ADDRESS:PORT" and the
// datagram behind it. Close of the Lab ends it.
func (n *Namespace) Datagrams(addr netip.AddrPort) error {
	var c net.PacketConn
	err := n.Do(func() (err error) {
		network := "udp6"
		if addr.Addr().Is4() {
			network = "udp4"
		}
		c, err = net.ListenPacket(network, addr.String())
		return err
	})
	if err != nil {
		return fmt.Errorf("serve datagrams in %s: %w", n.Name, err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		echoDatagrams(c)
	}()
	n.lab.onClose(func() error {
		err := c.Close()
		<-done
		return err
	})
	return nil
}

// echoDatagrams runs until the socket is closed. An ICMP error that it hears of is not its end.
func echoDatagrams(c net.PacketConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			return
		}
		if from != nil {
			answer := append([]byte(answerPrefix+from.String()+"\n"), buf[:n]...)
			_, _ = c.WriteTo(answer[:min(len(answer), 65000)], from)
		}
	}
}

// DialUDP makes a connected UDP socket in the namespace. A zero port of local is chosen by the kernel.
func (n *Namespace) DialUDP(ctx context.Context, local, remote netip.AddrPort) (*net.UDPConn, error) {
	var c net.Conn
	err := n.Do(func() (err error) {
		d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(local)}
		c, err = d.DialContext(ctx, "udp", remote.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dial from %s: %w", n.Name, err)
	}
	return c.(*net.UDPConn), nil
}

// AskDatagram sends one datagram and waits for its answer. It returns the address that the service saw.
func AskDatagram(c *net.UDPConn, payload []byte, wait time.Duration) (netip.AddrPort, error) {
	if _, err := c.Write(payload); err != nil {
		return netip.AddrPort{}, fmt.Errorf("ask: %w", err)
	}
	if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return netip.AddrPort{}, fmt.Errorf("set deadline: %w", err)
	}
	buf := make([]byte, 1<<16)
	n, err := c.Read(buf)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("read answer: %w", err)
	}
	line, echo, ok := strings.Cut(string(buf[:n]), "\n")
	rest, is := strings.CutPrefix(line, answerPrefix)
	if !ok || !is || echo != string(payload) {
		return netip.AddrPort{}, fmt.Errorf("read answer: %q is not the service's", line)
	}
	seen, err := netip.ParseAddrPort(rest)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("read answer: %w", err)
	}
	return netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port()), nil
}
