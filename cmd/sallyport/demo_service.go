package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// demoService answers each line with the address it sees, and remembers the kernel's time stamp of
// everything it received: a witness that does not depend on Sallyport.
type demoService struct {
	listener net.Listener

	mu       sync.Mutex // guards arrivals
	arrivals []arrival
}

type arrival struct {
	from netip.AddrPort
	boot time.Duration // CLOCK_BOOTTIME, from the kernel's receive time stamp
}

func (w *demoWorld) serve() (*demoService, error) {
	s := &demoService{}
	err := w.node.do(func() (err error) {
		s.listener, err = net.Listen("tcp4", fmt.Sprintf(":%d", demoPort))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("start service: %w", err)
	}
	go s.accept()
	return s, nil
}

func (s *demoService) accept() {
	for {
		c, err := s.listener.Accept()
		if err != nil {
			return // closed
		}
		go func() {
			defer c.Close()
			_ = s.answer(c.(*net.TCPConn)) // the client sees how it ended
		}()
	}
}

// answer reads with recvmsg, for the time stamps.
func (s *demoService) answer(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var opt error
	if err := raw.Control(func(fd uintptr) {
		opt = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)
	}); err != nil || opt != nil {
		return errors.Join(err, opt)
	}
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	buf, oob := make([]byte, 4096), make([]byte, 128)
	for {
		var n, oobn int
		var recv error
		if err := raw.Read(func(fd uintptr) bool {
			n, oobn, _, _, recv = unix.Recvmsg(int(fd), buf, oob, 0)
			return !errors.Is(recv, syscall.EAGAIN)
		}); err != nil || recv != nil || n == 0 {
			return errors.Join(err, recv)
		}
		s.remember(from, oob[:oobn])
		if _, err := fmt.Fprintf(c, "service saw %s\n", from); err != nil {
			return err
		}
	}
}

func (s *demoService) remember(from netip.AddrPort, oob []byte) {
	boot, ok := arrivedAt(oob)
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.arrivals = append(s.arrivals, arrival{from, boot})
}

// arrivedAt converts a CLOCK_REALTIME stamp by the present distance of the clocks.
func arrivedAt(oob []byte) (time.Duration, bool) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0, false
	}
	for _, m := range msgs {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SO_TIMESTAMPNS || len(m.Data) < 16 {
			continue
		}
		at := time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		return datapath.BootTime() - time.Since(at), true
	}
	return 0, false
}

// count gives how much arrived from an address, and how much of it after the deadline.
func (s *demoService) count(from netip.AddrPort, deadline time.Duration) (all, late int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.arrivals {
		if a.from != from {
			continue
		}
		all++
		if a.boot > deadline {
			late++
		}
	}
	return all, late
}
