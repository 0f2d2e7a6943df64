package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// caller speaks to the service of a world from its remote client, in this process, and has a tap behind
// enforcement as its judge.
type caller struct {
	world  *world
	from   netip.Addr
	clocks clocks
}

// newCaller has a tap of its own for as long as the world lasts: the kernel begins to stamp packets some
// time after the first tap asks for it, and stamps those that came before when they are read.
func newCaller(w *world) (caller, error) {
	_, err := w.Pod.Tap(unusedPort)
	return caller{w, w.Client.Addr(lab.IPv4), readClocks()}, err
}

const unusedPort = 9

// dial connects and has the service answer once.
func (cl caller) dial() (c *os.File, err error) {
	err = cl.world.Client.Do(func() error {
		c, err = dial(cl.from, cl.world.target(lab.IPv4))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNotServed, err)
	}
	err = unix.SetsockoptTimeval(int(c.Fd()), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2})
	if err == nil {
		_, err = c.Write([]byte{askEcho})
	}
	if err == nil {
		err = ping(c)
	}
	if err != nil {
		return nil, joinClose(fmt.Errorf("%w: %w", errNotServed, err), c.Close)
	}
	return c, nil
}

// errNotServed: a new connection was not served. On a busy machine its path may be over before it stands.
var errNotServed = errors.New("new connection was not served")

// lateness is what the tap saw after an end. last is negative when the last packet came before it.
type lateness struct {
	packets int
	last    time.Duration
}

// afterTime is how long packets are sent after an end.
const afterTime = 50 * time.Millisecond

// flood sends single bytes until after the end. end says when, in boot time, that was.
func (cl caller) flood(end func() (time.Duration, error)) (late lateness, err error) {
	tap, err := cl.world.Pod.Tap(servicePort)
	if err != nil {
		return late, err
	}
	defer func() { err = joinClose(err, tap.Close) }()
	c, err := cl.dial()
	if err != nil {
		return late, err
	}
	defer c.Close()
	own, err := localPort(c)
	if err != nil {
		return late, err
	}
	sent, stop := make(chan error, 1), make(chan struct{})
	go func() { sent <- send(c, stop) }()
	over, err := end()
	time.Sleep(over + afterTime - datapath.BootTime()) // what is waited for is the clock
	close(stop)
	if err := errors.Join(err, <-sent); err != nil {
		return late, err
	}
	packets, err := tap.Packets()
	if err != nil {
		return late, err
	}
	return cl.judge(packets, netip.AddrPortFrom(cl.from, own), over)
}

// judge looks at the packets with data from the connection.
func (cl caller) judge(packets []lab.Packet, own netip.AddrPort, over time.Duration) (late lateness, err error) {
	seen := 0
	for _, p := range packets {
		if p.Src != own || p.Payload == 0 {
			continue
		}
		seen++
		late.last = cl.clocks.boot(p.Time) - over
		if late.last > 0 {
			late.packets++
		}
	}
	if seen == 0 {
		return late, errors.New("the tap saw nothing of the connection")
	}
	return late, nil
}

// send sends single bytes until it is reset or told to stop. It reads what comes back, so that the window
// stays open.
func send(c *os.File, stop <-chan struct{}) error {
	fd, buf := int(c.Fd()), make([]byte, 1<<16)
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		_, err := unix.SendmsgN(fd, []byte{0}, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if reset(err) {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("send: %w", err)
		}
		if _, _, err = unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT); reset(err) {
			return nil
		}
	}
}

func reset(err error) bool { return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) }

func localPort(c *os.File) (uint16, error) {
	sa, err := unix.Getsockname(int(c.Fd()))
	if err != nil {
		return 0, fmt.Errorf("read own address: %w", err)
	}
	return uint16(sa.(*unix.SockaddrInet4).Port), nil
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// clocks turn the wall clock's time stamps into boot time. Nothing steps the wall clock meanwhile.
type clocks struct{ origin time.Time }

// readClocks takes the closest of many pairs of readings.
func readClocks() clocks {
	best, least := clocks{}, time.Hour
	for range 100 {
		before := datapath.BootTime()
		wall := time.Now()
		after := datapath.BootTime()
		if after-before < least {
			least = after - before
			best.origin = wall.Round(0).Add(-(before + (after-before)/2))
		}
	}
	return best
}

func (c clocks) boot(wall time.Time) time.Duration { return wall.Round(0).Sub(c.origin) }
