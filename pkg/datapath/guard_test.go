package datapath_test

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// guard runs HoldLinks, and says how many links it holds.
type guard struct {
	held chan int
	done chan error
	stop context.CancelFunc
	last int // owned by HoldLinks
}

func (n *node) guard(t *testing.T) *guard {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	g := &guard{held: make(chan int, 16), done: make(chan error, 1), stop: cancel, last: -1}
	go func() {
		g.done <- datapath.HoldLinks(ctx, n.cf.Dir, slog.New(slog.DiscardHandler), g.tell)
	}()
	t.Cleanup(func() { g.end(t) })
	return g
}

// tell hands on what is new; it is called after each look.
func (g *guard) tell(count int) {
	if count != g.last {
		g.held <- count
	}
	g.last = count
}

func (g *guard) end(t *testing.T) {
	g.stop()
	select {
	case err := <-g.done:
		must(t, err)
		g.done <- nil // for the clean-up after the test's own call
	case <-time.After(10 * time.Second):
		t.Fatal("the guard goes on after its context has ended")
	}
}

// wait waits until the guard holds so many links.
func (g *guard) wait(t *testing.T, count int) {
	t.Helper()
	last := -1
	for timeout := time.After(10 * time.Second); last != count; {
		select {
		case last = <-g.held:
		case <-timeout:
			t.Fatalf("the guard holds %d links, want %d", last, count)
		}
	}
}

// standIn answers in the proxy's place, without dialling the service: where nothing is asked but who
// answers. Its clean-up ends every connection, whatever became of the hooks.
func (n *node) standIn(t *testing.T) {
	t.Helper()
	for _, f := range lab.Families() {
		s := &standIn{ln: listenPx(t, n.px, f, listenPort), conns: map[net.Conn]bool{}}
		s.wg.Go(s.accept)
		t.Cleanup(s.close)
	}
}

type standIn struct {
	ln    net.Listener
	wg    sync.WaitGroup
	mu    sync.Mutex // guards conns; nil: closed
	conns map[net.Conn]bool
}

func (s *standIn) accept() {
	for {
		c, err := s.ln.Accept()
		if err != nil {
			return
		}
		if !s.keep(c) {
			_ = c.Close()
			return
		}
		s.wg.Go(func() {
			client := c.RemoteAddr().(*net.TCPAddr).AddrPort()
			for lines := bufio.NewScanner(c); lines.Scan(); {
				fmt.Fprintf(c, "service saw %s\n", netip.AddrPortFrom(client.Addr(), client.Port()^1))
			}
			_ = c.Close() // close may have been first
		})
	}
}

func (s *standIn) keep(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns != nil {
		s.conns[c] = true
	}
	return s.conns != nil
}

func (s *standIn) close() {
	_ = s.ln.Close()
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.conns = nil
	s.mu.Unlock()
	s.wg.Wait()
}

func (n *node) everySays(t *testing.T, want, when string) {
	t.Helper()
	for _, c := range n.cells() {
		ctx, cancel := context.WithTimeout(context.Background(), map[bool]time.Duration{true: 300 * time.Millisecond, false: 10 * time.Second}[want == "nobody"])
		got, err := c.ask(ctx)
		cancel()
		if got != want {
			t.Errorf("%s: %s: answered by %s (%v), want %s", when, c.name, got, err, want)
		}
	}
}

// TestGuardHolds: with the agent's handles closed and every pin removed, the hooks are still there.
func TestGuardHolds(t *testing.T) {
	needTCX(t) // filters stay without anybody
	n := newLeakFree(t, datapath.ProfileTCX)
	n.standIn(t)
	links, err := n.d.LinkIDs()
	must(t, err)
	g := n.guard(t)
	g.wait(t, len(links))
	must(t, n.d.Close())
	n.everySays(t, "proxy", "agent gone")
	must(t, os.RemoveAll(filepath.Join(n.cf.Dir, "v4", "links")))
	n.everySays(t, "proxy", "pins of links removed")
	must(t, os.RemoveAll(n.cf.Dir))
	n.everySays(t, "proxy", "all pins removed")
	must(t, unix.Unmount(filepath.Dir(n.cf.Dir), unix.MNT_DETACH))
	n.everySays(t, "proxy", "bpffs unmounted")
	g.end(t)
	waitUntil(t, "the links to go with the guard", func() bool {
		got, _ := n.cells()[0].ask(within(t))
		return got == "service"
	})
}

// TestNobodyHolds is the control: without a guard the same ends enforcement.
func TestNobodyHolds(t *testing.T) {
	needTCX(t) // filters stay without anybody
	n := newLeakFree(t, datapath.ProfileTCX)
	must(t, n.d.Close())
	n.everySays(t, "nobody", "pinned, proxy dead")
	must(t, os.RemoveAll(n.cf.Dir))
	waitUntil(t, "the links to go with their pins", func() bool {
		got, _ := n.cells()[0].ask(within(t))
		return got == "service"
	})
}

// TestGuardLetsGo: an uninstall takes the links from the guard too.
func TestGuardLetsGo(t *testing.T) {
	needTCX(t) // filters stay without anybody
	n := newLeakFree(t, datapath.ProfileTCX)
	links, err := n.d.LinkIDs()
	must(t, err)
	g := n.guard(t)
	g.wait(t, len(links))
	_, err = datapath.Uninstall(n.cf.Dir)
	must(t, err)
	n.noHooks(t)
	n.everySays(t, "service", "uninstalled")
	g.wait(t, 0)
}

// TestGuardFollows: a device that appears later is held too, and one that goes is let go.
func TestGuardFollows(t *testing.T) {
	needTCX(t) // filters stay without anybody
	n := newLeakFree(t, datapath.ProfileTCX)
	links, err := n.d.LinkIDs()
	must(t, err)
	g := n.guard(t)
	g.wait(t, len(links))
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "late0"}, PeerName: "late1"}
	must(t, n.Node.Netlink.LinkAdd(veth))
	late, err := n.Node.Ifindex("late0")
	must(t, err)
	must(t, n.Node.Do(func() error { return n.d.Attach(late, datapath.RolePod) }))
	g.wait(t, len(links)+2)
	must(t, n.Node.Netlink.LinkDel(veth))
	g.wait(t, len(links))
}

// TestGuardPassesJunk: a pin that is no link keeps the guard from none of the others.
func TestGuardPassesJunk(t *testing.T) {
	needTCX(t) // filters stay without anybody
	n := newLeakFree(t, datapath.ProfileTCX)
	links, err := n.d.LinkIDs()
	must(t, err)
	junk := filepath.Join(n.cf.Dir, "v4", "links", "a-junk") // before all links
	m, err := n.d.Maps().SpLease.Clone()
	must(t, err)
	defer m.Close()
	must(t, m.Pin(junk))
	t.Cleanup(func() { _ = os.Remove(junk) })
	g := n.guard(t)
	g.wait(t, len(links))
}
