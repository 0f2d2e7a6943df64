package e2e_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// strictWorld is a world whose firewall drops what conntrack cannot explain, and whose pod can be found by a mount, as
// runtimes do it.
func strictWorld(t *testing.T, o options) *world {
	t.Helper()
	w := startWorld(t, o)
	rules := w.Dir + "/strict.nft"
	write(t, rules, dropInvalid)
	_, err := w.Node.Run(within(t, patience), "nft", "-f", rules)
	must(t, err)
	file := filepath.Join(w.Dir, "pod0.netns")
	must(t, os.WriteFile(file, nil, 0o444))
	must(t, unix.Mount(w.Pod.Path(), file, "", unix.MS_BIND, ""))
	t.Cleanup(func() { must(t, unix.Unmount(file, 0)) })
	return w
}

// TestIdleEnds: a revoked, an expired and a withdrawn path each end a connection over which nobody says a word, within a
// second of the end, in both families and for both services.
func TestIdleEnds(t *testing.T) {
	leak.Check(t)
	w := strictWorld(t, options{plain: true})
	for _, service := range services() {
		for _, f := range lab.Families() {
			way := w.ways(service, f)[0]
			for _, end := range []struct {
				name, duration string
				do             func(activated)
			}{
				{"revoked", "5m", func(g activated) { w.revoke(t, g) }},
				{"expired", "2s", func(activated) {}},
			} {
				t.Run(service+"/"+f.String()+"/"+end.name, func(t *testing.T) {
					g := w.open(t, wanted{service, way.from, end.duration})
					l := way.dialDirect(t)
					end.do(g)
					must(t, l.SetReadDeadline(time.Now().Add(4*time.Second)))
					if _, err := l.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("idle connection: %v, want a reset", err)
					}
					if o := way.plain(within(t, patience)); o.who == direct {
						t.Errorf("new connection: %s", o)
					}
				})
			}
		}
	}
}

// TestBudgetSpent: a transfer that is larger than the path's budget is cut in its midst, the next connection is the proxy's,
// and the records say why.
func TestBudgetSpent(t *testing.T) {
	leak.Check(t)
	w := strictWorld(t, options{plain: true, resource: strings.Replace(bypassPolicy("budgeted", "host-echo, pod-echo"),
		"maxDuration: 10m", "maxDuration: 20m\n  maxBudget: {bytes: 8MiB}", 1)})
	for _, service := range services() {
		for _, f := range lab.Families() {
			t.Run(service+"/"+f.String(), func(t *testing.T) {
				way := w.ways(service, f)[0]
				way.to = netip.AddrPortFrom(way.to.Addr(), sinkPort)
				got := make(chan int64, 1)
				s, err := w.home(way).Serve(way.to, func(c net.Conn) {
					n, _ := io.Copy(io.Discard, c)
					got <- n
				})
				must(t, err)
				defer s.Close()
				file := w.issue(t, wanted{service, way.from, "15m"}, "--max-bytes", "8MiB", "--max-connections", "5")
				g := read[activated](t, w, "grant", "activate", file, "--key", w.key, "--yes")
				conn, err := way.dial(within(t, patience))
				must(t, err)
				defer conn.Close()
				if _, err := io.Copy(conn, stream()); !isReset(err) {
					t.Errorf("transfer ended with %v, want a reset", err)
				}
				if n := <-got; n == 0 || n > 8<<20 {
					t.Errorf("service got %d bytes under a budget of %d", n, 8<<20)
				}
				waitUntil(t, "the end of the grant", func() bool {
					return strings.Contains(w.cli(t, "grants", "-o", "json"), `"spent"`) && len(w.live(t, g.ID)) == 0
				})
				if o := way.plain(within(t, patience)); o.who == direct {
					t.Errorf("new connection: %s", o)
				}
				out := w.cli(t, "flows", "-o", "json")
				if !strings.Contains(out, "PATH_SPENT") {
					t.Errorf("no record says PATH_SPENT:\n%s", out)
				}
			})
		}
	}
}

// live are the active paths of a grant.
func (w *world) live(t *testing.T, grant string) (out []path) {
	t.Helper()
	for _, p := range w.paths(t) {
		if p.Grant == grant && p.State == "active" {
			out = append(out, p)
		}
	}
	return out
}
