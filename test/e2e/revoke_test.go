package e2e_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestRevokeManyConnections: a path with 1,000 live connections, of which every fifth talks, is closed when the call
// returns: no packet of theirs reaches the pod after it, and all of them are reset.
func TestRevokeManyConnections(t *testing.T) {
	const connections, talking = 1000, 5
	leak.Check(t)
	w := strictWorld(t, options{plain: true})
	way := w.ways("pod-echo", lab.IPv4)[0]
	g := w.open(t, wanted{way.service, way.from, "10m"})
	tap, err := w.Pod.Tap(way.to.Port())
	must(t, err)
	ends := make(chan error, connections)
	at := make(chan time.Time, connections)
	own := map[netip.AddrPort]bool{}
	for i := range connections {
		l := way.dialDirect(t)
		own[l.own] = true
		must(t, l.SetDeadline(time.Time{}))
		go func() {
			err := untilEnd(l, i%talking == 0)
			at <- time.Now()
			ends <- err
		}()
	}
	if paths := w.live(t, g.ID); len(paths) != 1 || paths[0].Flows != connections {
		t.Fatalf("the path has %+v", paths)
	}
	agent, err := client.NewAgent(filepath.Join(w.files.run, "agent.sock"))
	must(t, err)
	defer agent.Close()
	_, err = agent.Revoke(within(t, patience), g.ID, "test")
	returned := time.Now()
	must(t, err)

	var last time.Duration
	for i := range connections {
		select {
		case err := <-ends:
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("connection ended with %v, want a reset", err)
			}
			last = max(last, (<-at).Sub(returned))
		case <-time.After(patience):
			t.Fatalf("%d connections go on", connections-i)
		}
	}
	if o := way.plain(within(t, patience)); o.who == direct {
		t.Errorf("new connection: %s", o)
	}
	late, err := tap.Count(func(p lab.Packet) bool {
		return !p.Outgoing && own[p.Src] && !p.RST && p.Time.After(returned)
	})
	must(t, err)
	lost, err := tap.Lost()
	must(t, err)
	seen, err := tap.Count(func(p lab.Packet) bool { return !p.Outgoing && own[p.Src] && !p.RST })
	must(t, err)
	t.Logf("the tap saw %d packets before and %d after the return; the last of %d connections was reset %v after it", seen-late, late, connections, last)
	if late != 0 || lost != 0 || seen < connections {
		t.Errorf("%d of %d packets reached the pod after revoke had returned; the tap lost %d", late, seen, lost)
	}
}

// untilEnd reads a connection, and talks on it, until it ends.
func untilEnd(c net.Conn, talks bool) error {
	answers := bufio.NewReader(c)
	for {
		if talks {
			if _, err := fmt.Fprintln(c, "still there?"); err != nil {
				return err
			}
			time.Sleep(50 * time.Millisecond) // the pace of the talk; nothing waits for it
		}
		if _, err := answers.ReadString('\n'); err != nil && !errors.Is(err, io.EOF) {
			return err
		} else if err != nil {
			return fmt.Errorf("closed in order: %w", err)
		}
	}
}
