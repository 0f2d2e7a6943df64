package e2e_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// mendTime is how long the agent may take to mend what somebody took away.
const mendTime = 5 * time.Second

// attack is what root on the node can do to enforcement.
type attack struct {
	name  string
	alarm string
	do    func(t *testing.T, w *world)
	over  func(t *testing.T, w *world) // nil: the agent mends it alone
	well  func(t *testing.T, w *world) bool
}

func attacks(hooks string) []attack {
	all := []attack{
		{name: "pins removed", alarm: "pins_lost",
			do:   func(t *testing.T, w *world) { must(t, os.RemoveAll(filepath.Join(w.bpffs, "sallyport"))) },
			well: func(_ *testing.T, w *world) bool { return exists(w.pinned("sp_config")) }},
		{name: "bpffs unmounted", alarm: "bpffs_lost",
			do:   func(t *testing.T, w *world) { must(t, unix.Unmount(w.bpffs, unix.MNT_DETACH)) },
			over: func(t *testing.T, w *world) { must(t, unix.Mount("bpf", w.bpffs, "bpf", 0, "")) },
			well: func(_ *testing.T, w *world) bool { return exists(w.pinned("sp_config")) }},
		{name: "px0 deleted", alarm: "px_lost",
			do: func(t *testing.T, w *world) {
				px0, err := w.Node.Netlink.LinkByName("px0")
				must(t, err)
				must(t, w.Node.Netlink.LinkDel(px0))
			},
			well: func(t *testing.T, w *world) bool {
				return w.ways("host-echo", lab.IPv4)[0].identified(within(t, silence), w, web).who == proxied
			}},
	}
	if hooks == "clsact" {
		return append(all, attack{name: "qdisc deleted", alarm: "hook_lost",
			do: func(t *testing.T, w *world) {
				_, err := w.Node.Run(within(t, patience), "tc", "qdisc", "del", "dev", lab.Uplink, "clsact")
				must(t, err)
			},
			well: func(t *testing.T, w *world) bool {
				up, err := w.Node.Netlink.LinkByName(lab.Uplink)
				must(t, err)
				filters, err := w.Node.Netlink.FilterList(up, netlink.HANDLE_MIN_INGRESS)
				return err == nil && len(filters) > 0
			}})
	}
	return append(all, attack{name: "link detached", alarm: "hook_lost",
		do: func(t *testing.T, w *world) {
			_, err := w.Node.Run(within(t, patience), "bpftool", "link", "detach", "pinned", w.uplinkHook(t))
			must(t, err)
		},
		well: func(t *testing.T, w *world) bool {
			l, err := link.LoadPinnedLink(w.uplinkHook(t), nil)
			if err != nil {
				return false
			}
			defer l.Close()
			info, err := l.Info()
			return err == nil && info.TCX().Ifindex != 0
		}})
}

// uplinkHook is the pin of the link that holds the uplink's ingress.
func (w *world) uplinkHook(t *testing.T) string {
	t.Helper()
	ifindex, err := w.Node.Ifindex(lab.Uplink)
	must(t, err)
	return filepath.Join(filepath.Dir(filepath.Dir(w.pinned("sp_config"))), "links", fmt.Sprintf("sp_dev_in-%d", ifindex))
}

// TestTampering takes parts of enforcement away while clients try both services in both families without a path. Nothing
// reaches a service but through the proxy, and within five seconds everything is as it was, with an alarm in status, in the metrics and in the collector's log.
func TestTampering(t *testing.T) {
	leak.Check(t)
	for _, hooks := range []string{"tcx", "clsact"} {
		t.Run(hooks, func(t *testing.T) {
			w := startWorld(t, options{hooks: hooks})
			must(t, w.Client.Sysctl("ipv4/ip_local_port_range", fmt.Sprintf("%d %d", firstClientPort, lastClientPort)))
			ctx, cancel := context.WithCancel(t.Context())
			load := &load{world: w, targets: w.chaosTargets()}
			done := make(chan struct{})
			go func() { defer close(done); load.run(ctx) }()
			for _, a := range attacks(hooks) {
				t.Run(a.name, func(t *testing.T) { w.suffer(t, a) })
			}
			cancel()
			<-done
			load.report(t)
			for _, s := range w.echoes {
				if i := slices.IndexFunc(s.Peers(), func(p netip.AddrPort) bool { return isClientPort(p.Port()) }); i >= 0 {
					t.Errorf("service %s was reached by %s", s.Addr, s.Peers()[i])
				}
			}
		})
	}
}

// suffer makes one attack and waits for its end.
func (w *world) suffer(t *testing.T, a attack) {
	raised := w.alarm(t, a.alarm)
	a.do(t, w)
	began := time.Now()
	if a.over != nil {
		waitUntil(t, "the alarm", func() bool { return w.alarm(t, a.alarm) > raised })
		a.over(t, w)
		began = time.Now()
	}
	waitUntil(t, "it to be mended", func() bool { return a.well(t, w) })
	if took := time.Since(began); took > mendTime {
		t.Errorf("mended after %v", took)
	} else {
		t.Logf("mended after %v", took.Round(time.Millisecond))
	}
	waitUntil(t, "the alarm", func() bool { return w.alarm(t, a.alarm) > raised })
	if took := time.Since(began); took > mendTime {
		t.Errorf("alarm after %v", took)
	}
	waitUntil(t, "the record of the alarm", func() bool {
		return slices.ContainsFunc(w.grantEvents(t), func(e grantEvent) bool {
			return e.Event.Step == "ALARM" && strings.HasPrefix(e.Event.Why, a.alarm)
		})
	})
}

// alarm is how often an alarm was raised, as status has it.
func (w *world) alarm(t *testing.T, name string) (times int) {
	t.Helper()
	for _, p := range w.status(t).Problems {
		if rest, ok := strings.CutPrefix(p, "alarm "+name+": "); ok {
			_, err := fmt.Sscanf(rest, "%d times", &times)
			must(t, err)
		}
	}
	return times
}
