package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/proxy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// TestAnotherRunTakesOver: at SIGHUP a new run takes the listeners, while clients come all the time. None of them is refused or reset,
// what the old run had goes on in it for longer than it would at a stop, also a handshake that was not done, and it ends with its last.
func TestAnotherRunTakesOver(t *testing.T) {
	b := newBench(t, func(s *settings) { s.drain = 100 * time.Millisecond })
	for _, f := range lab.Families() {
		_, err := b.Pod.WhoAnswers(b.target(f))
		b.must(err)
	}
	old := b.dialAs(lab.IPv4, web)
	half := b.plain(b.target(lab.IPv6))
	ctx, stop := context.WithCancel(b.ctx)
	defer stop()
	asked := make(chan int, 1)
	go func() {
		n := 0
		for ; ctx.Err() == nil; n++ {
			b.check(b.askAnew(lab.Families()[n%2]))
		}
		asked <- n
	}()
	b.must(b.proxy.Signal(unix.SIGHUP))
	pid := b.successor()
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) })
	late := b.tlsAs(half, web)
	if _, err := lab.Ask(late); err != nil {
		t.Errorf("handshake after another took over: %v", err)
	}
	for range 3 { // turns of what feeds the watchdog, much longer than the drain timeout
		b.hears("WATCHDOG=1")
	}
	stop()
	if n := <-asked; n < 10 {
		t.Errorf("%d clients came", n)
	}
	if _, err := lab.Ask(old); err != nil {
		t.Errorf("connection of before: %v", err)
	}
	select {
	case <-b.proxy.Exited():
		t.Fatalf("the old run ended with connections:\n%s", b.proxy.Output())
	default:
	}
	b.must(old.Close())
	b.must(late.Close())
	select {
	case <-b.proxy.Exited():
	case <-time.After(wait):
		t.Errorf("the old run goes on without connections:\n%s", b.proxy.Output())
	}
	b.must(b.askAnew(lab.IPv4))
	b.must(unix.Kill(pid, unix.SIGTERM))
	b.hears("STOPPING=1")
	b.until(func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
}

// askAnew is one short connection.
func (b *bench) askAnew(f lab.Family) error {
	raw, err := b.Client.Dial(b.ctx, netip.AddrPort{}, b.target(f))
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer raw.Close()
	_, err = lab.Ask(b.tlsAs(raw, web))
	return err
}

// successor waits for the word of who is the proxy now.
func (b *bench) successor() (pid int) {
	b.Helper()
	said := b.hears("MAINPID=")
	if _, err := fmt.Sscanf(said, "MAINPID=%d\nREADY=1", &pid); err != nil || pid == b.proxy.Pid() {
		b.Fatalf("the old proxy, %d, said %q", b.proxy.Pid(), said)
	}
	return pid
}

// hears gives the next message to the service manager that begins so.
func (b *bench) hears(begin string) string {
	b.Helper()
	b.must(b.notify.SetReadDeadline(time.Now().Add(wait)))
	for buf := make([]byte, 256); ; {
		n, err := b.notify.Read(buf)
		b.must(err)
		if said := string(buf[:n]); strings.HasPrefix(said, begin) {
			return said
		}
	}
}

// TestNobodyTakesOver: a program that is not there, or does not get ready, changes nothing.
func TestNobodyTakesOver(t *testing.T) {
	for _, program := range []string{"/bin/false", "/bin/true", "/does/not/exist"} {
		s := succession{env: environment{args: []string{program}}, log: slog.New(slog.DiscardHandler)}
		if pid, err := s.handOn(t.Context(), &proxy.Proxy{}); err == nil {
			t.Errorf("%s takes over as %d", program, pid)
		}
	}
}
