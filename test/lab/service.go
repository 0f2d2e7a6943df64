package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// Service is a TCP server inside a namespace that remembers who came.
type Service struct {
	// Addr is where it listens, with the real port.
	Addr netip.AddrPort

	ln    net.Listener
	wg    sync.WaitGroup
	mu    sync.Mutex // guards peers and conns
	peers []netip.AddrPort
	conns map[net.Conn]bool
}

const answerPrefix = "service saw "

// WhoAnswers starts a service that answers each line with "service saw ADDRESS:PORT", the address
// being the one it sees at its end of the connection.
func (n *Namespace) WhoAnswers(addr netip.AddrPort) (*Service, error) {
	return n.Serve(addr, func(c net.Conn) {
		for s := bufio.NewScanner(c); s.Scan(); {
			if _, err := fmt.Fprintf(c, "%s%s\n", answerPrefix, c.RemoteAddr()); err != nil {
				return
			}
		}
	})
}

// Serve starts a service that runs handle for each connection, and closes the connection after it.
// Close of the Lab ends it, with its connections.
func (n *Namespace) Serve(addr netip.AddrPort, handle func(net.Conn)) (*Service, error) {
	ln, err := n.Listen(addr)
	if err != nil {
		return nil, fmt.Errorf("serve in %s: %w", n.Name, err)
	}
	s := &Service{Addr: addrPort(ln.Addr()), ln: ln, conns: map[net.Conn]bool{}}
	s.wg.Add(1)
	go s.accept(handle)
	n.lab.onClose(s.Close)
	return s, nil
}

func (s *Service) accept(handle func(net.Conn)) {
	defer s.wg.Done()
	for {
		c, err := s.ln.Accept()
		if err != nil {
			return // closed
		}
		s.mu.Lock()
		s.peers = append(s.peers, addrPort(c.RemoteAddr()))
		s.conns[c] = true
		s.mu.Unlock()
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			handle(c)
			s.forget(c)
		}()
	}
}

func (s *Service) forget(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	_ = c.Close() // Close may have been first
}

// Peers are the remote addresses of all connections that the service has accepted, in order. It is
// the service's own word on who reached it.
func (s *Service) Peers() []netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]netip.AddrPort(nil), s.peers...)
}

// Close ends the service and its connections, and waits for the handlers.
func (s *Service) Close() error {
	err := s.ln.Close()
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Ask sends one line on a connection and returns the address that the service said it saw. An
// answer that is none of WhoAnswers' is an error, as is silence of five seconds.
func Ask(c net.Conn) (netip.AddrPort, error) {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return netip.AddrPort{}, fmt.Errorf("set deadline: %w", err)
	}
	if _, err := io.WriteString(c, "who answers?\n"); err != nil {
		return netip.AddrPort{}, fmt.Errorf("ask: %w", err)
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("read answer: %w", err)
	}
	rest, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), answerPrefix)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("read answer: %q is not the service's", line)
	}
	return netip.ParseAddrPort(rest)
}

// Ask connects from the namespace, asks once and closes. It returns the client's own address and
// the one that the service saw; they are equal when the service was reached directly.
func (n *Namespace) Ask(ctx context.Context, local, remote netip.AddrPort) (own, seen netip.AddrPort, err error) {
	c, err := n.Dial(ctx, local, remote)
	if err != nil {
		return own, seen, err
	}
	defer c.Close()
	own = addrPort(c.LocalAddr())
	seen, err = Ask(c)
	return own, seen, err
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
