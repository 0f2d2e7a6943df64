package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What the first byte of a connection asks of the service.
const (
	askEcho = 'e' // every byte comes back
	askSink = 's' // what came is counted; the count comes back at the end
)

// joinClose closes and keeps both errors.
func joinClose(err error, shut func() error) error { return errors.Join(err, shut()) }

// listen is plain TCP, not MPTCP.
func listen(ctx context.Context, address string, control func(string, string, syscall.RawConn) error) (net.Listener, error) {
	lc := net.ListenConfig{Control: control}
	lc.SetMultipathTCP(false)
	return lc.Listen(ctx, "tcp4", address)
}

// serveRole accepts until the process is killed, and says that it is ready.
func serveRole(ln net.Listener, handle func(*net.TCPConn)) error {
	fmt.Println("ready")
	for {
		c, err := ln.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go handle(c.(*net.TCPConn))
	}
}

// serviceRole is the service: service ADDRESS:PORT.
func serviceRole(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("service ADDRESS:PORT")
	}
	ln, err := listen(ctx, args[0], nil)
	if err != nil {
		return err
	}
	return serveRole(ln, answer)
}

// answer uses a blocking descriptor: the runtime's poller would be in every figure.
func answer(c *net.TCPConn) {
	f, err := blocking(c)
	if err != nil {
		return
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	n, err := f.Read(buf[:1])
	if err != nil || n != 1 {
		return
	}
	if buf[0] == askSink {
		sink(f, buf)
		return
	}
	for {
		n, err := f.Read(buf)
		if err != nil {
			return
		}
		if _, err := f.Write(buf[:n]); err != nil {
			return
		}
	}
}

func sink(f io.ReadWriter, buf []byte) {
	var total uint64
	for {
		n, err := f.Read(buf)
		total += uint64(n)
		if err != nil {
			break
		}
	}
	_, _ = f.Write(binary.BigEndian.AppendUint64(nil, total)) // the client sees what is missing
}

// blocking takes the connection out of the runtime's poller.
func blocking(c *net.TCPConn) (*os.File, error) {
	f, err := c.File()
	if err := errors.Join(err, c.Close()); err != nil {
		return nil, err
	}
	return f, unix.SetNonblock(int(f.Fd()), false)
}

// loadRole is a client: load KIND FROM TO DURATION. It reports on standard output.
func loadRole(_ context.Context, args []string) error {
	if len(args) != 4 {
		return errors.New("load KIND FROM TO DURATION")
	}
	from, err := netip.ParseAddr(args[1])
	if err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(args[2])
	if err != nil {
		return err
	}
	d, err := time.ParseDuration(args[3])
	if err != nil {
		return err
	}
	do, ok := map[string]func(netip.Addr, netip.AddrPort, time.Duration) (loadResult, error){
		bulk.name: sendBulk, pingPong.name: playPingPong,
		connects.name: func(a netip.Addr, b netip.AddrPort, d time.Duration) (loadResult, error) {
			return connectOften(a, b, d, 1)
		},
		concurrent.name: func(a netip.Addr, b netip.AddrPort, d time.Duration) (loadResult, error) {
			return connectOften(a, b, d, 8)
		},
	}[args[0]]
	if !ok {
		return fmt.Errorf("load: no kind %q", args[0])
	}
	res, err := do(from, to, d)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(res)
}

// dial gives a blocking descriptor.
func dial(from netip.Addr, to netip.AddrPort) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()}))
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect %s to %s: %w", from, to, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), to.String()), nil
}

// sendBulk counts what the service has received, until it has received the last of it.
func sendBulk(from netip.Addr, to netip.AddrPort, d time.Duration) (res loadResult, err error) {
	c, err := dial(from, to)
	if err != nil {
		return res, err
	}
	defer c.Close()
	if _, err := c.Write([]byte{askSink}); err != nil {
		return res, err
	}
	buf := make([]byte, 256<<10)
	began := time.Now()
	for time.Since(began) < d {
		if _, err := c.Write(buf); err != nil {
			return res, fmt.Errorf("send: %w", err)
		}
	}
	if err := unix.Shutdown(int(c.Fd()), unix.SHUT_WR); err != nil {
		return res, fmt.Errorf("end stream: %w", err)
	}
	var total [8]byte
	if _, err := io.ReadFull(c, total[:]); err != nil {
		return res, fmt.Errorf("read count: %w", err)
	}
	res.BitsPerSecond = 8 * float64(binary.BigEndian.Uint64(total[:])) / time.Since(began).Seconds()
	return res, nil
}

// playPingPong sends one byte at a time and waits for it.
func playPingPong(from netip.Addr, to netip.AddrPort, d time.Duration) (res loadResult, err error) {
	c, err := dial(from, to)
	if err != nil {
		return res, err
	}
	defer c.Close()
	if _, err := c.Write([]byte{askEcho}); err != nil {
		return res, err
	}
	var took []float64
	for began := time.Now(); time.Since(began) < d; {
		at := time.Now()
		if err := ping(c); err != nil {
			return res, err
		}
		took = append(took, float64(time.Since(at).Nanoseconds())/1e3)
	}
	took = took[len(took)/10:] // until caches and windows are warm
	res.P50, res.P99 = quantile(took, 0.5), quantile(took, 0.99)
	return res, nil
}

func ping(c io.ReadWriter) error {
	var b [1]byte
	if _, err := c.Write(b[:]); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	return nil
}

// connectOften counts connections that were made, served one byte, and closed in order.
func connectOften(from netip.Addr, to netip.AddrPort, d time.Duration, at int) (res loadResult, err error) {
	var mu sync.Mutex
	var group sync.WaitGroup
	began := time.Now()
	for range at {
		group.Go(func() {
			var made int
			var failure error
			for ; failure == nil && time.Since(began) < d; made++ {
				failure = connectOnce(from, to)
			}
			mu.Lock()
			defer mu.Unlock()
			res.PerSecond += float64(made)
			err = errors.Join(err, failure)
		})
	}
	group.Wait()
	res.PerSecond /= time.Since(began).Seconds()
	return res, err
}

func connectOnce(from netip.Addr, to netip.AddrPort) error {
	c, err := dial(from, to)
	if err != nil {
		return err
	}
	_, err = c.Write([]byte{askEcho})
	if err == nil {
		err = ping(c)
	}
	return errors.Join(err, c.Close())
}

// proxyRole is the plain copy proxy, transparent on both sides: proxy PORT.
func proxyRole(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("proxy PORT")
	}
	port, err := strconv.ParseUint(args[0], 10, 16)
	if err != nil {
		return err
	}
	ln, err := listen(ctx, fmt.Sprintf("0.0.0.0:%d", port), transparent)
	if err != nil {
		return err
	}
	return serveRole(ln, relay)
}

func transparent(_, _ string, c syscall.RawConn) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1))
	})
	return errors.Join(err, cerr)
}

// relay copies both ways, in the kernel (splice).
func relay(c *net.TCPConn) {
	defer c.Close()
	d := net.Dialer{Control: transparent, Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: c.RemoteAddr().(*net.TCPAddr).IP}}
	d.SetMultipathTCP(false)
	conn, err := d.Dial("tcp4", c.LocalAddr().String())
	if err != nil {
		_ = c.SetLinger(0) // the client is to see it
		return
	}
	up := conn.(*net.TCPConn)
	defer up.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		half(up, c)
	}()
	half(c, up)
	<-done
}

// half copies until the end of one direction and passes it on. An error ends both.
func half(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		_ = errors.Join(to.Close(), from.Close())
		return
	}
	_ = to.CloseWrite()
}
