package e2e_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
	"github.com/vishvananda/netlink"
)

// TestReadiness: the agent does not say that it is ready before a connection of its own has crossed the hooks.
func TestReadiness(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{})
	lo, err := w.Node.Netlink.LinkByName("lo")
	must(t, err)
	must(t, w.Node.Netlink.LinkSetDown(lo)) // the probe of host services cannot cross what is down
	must(t, w.agent.launch())
	waitUntil(t, "the first probe", func() bool {
		s := w.try("status", "-o", "json")
		return s.err == nil && strings.Contains(s.stdout, "127.0.0.1:8080: a connection to a protected port was not steered")
	})
	if s := w.status(t); s.Ready || w.agent.notify.isReady() {
		t.Errorf("ready before the probe crossed: status %v, READY=1 %v", s.Ready, w.agent.notify.isReady())
	}
	must(t, w.Node.Netlink.LinkSetUp(lo))
	must(t, w.agent.wait())
	if s := w.status(t); !s.Ready || s.NotReadyWhy != "" {
		t.Errorf("ready: %+v", s)
	}
}

// survivor is a connection of each kind that must go on, and the path that it lives by.
type survivor struct {
	way    way
	grant  activated
	direct live
	secure live
}

func (w *world) newSurvivor(t *testing.T, service string, f lab.Family) *survivor {
	t.Helper()
	s := &survivor{way: w.ways(service, f)[0]}
	raw, err := s.way.dial(within(t, patience))
	must(t, err)
	t.Cleanup(func() { raw.Close() })
	secured, err := w.secure(within(t, patience), raw, web)
	must(t, err)
	s.secure = live{secured, unmapped(raw.LocalAddr())}
	s.grant = w.open(t, wanted{service, s.way.from, "5m"})
	s.direct = s.way.dialDirect(t)
	return s
}

// check asks on both connections, and on a new one.
func (s *survivor) check(t *testing.T, when string) {
	t.Helper()
	if o := s.direct.ask(); o.who != direct {
		t.Errorf("%s: bypassed connection to %s: %s", when, s.way.service, o)
	}
	if o := s.secure.ask(); o.who != proxied {
		t.Errorf("%s: proxied connection to %s: %s", when, s.way.service, o)
	}
	if o := s.way.plain(within(t, patience)); o.who != direct {
		t.Errorf("%s: new connection to %s answered by %s", when, s.way.service, o)
	}
}

// TestRestartAdopts: paths and live connections do not notice that the agent was killed or stopped, and started again.
func TestRestartAdopts(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{})
	var survivors []*survivor
	for _, f := range lab.Families() {
		for _, service := range services() {
			survivors = append(survivors, w.newSurvivor(t, service, f))
		}
	}
	hooks := w.status(t).Hooks
	for _, how := range []struct {
		name string
		end  func(*testing.T)
	}{{"SIGKILL", w.agent.kill}, {"SIGTERM", w.agent.stop}} {
		t.Run(how.name, func(t *testing.T) {
			before := w.paths(t)
			how.end(t)
			for _, s := range survivors {
				if o := s.direct.ask(); o.who != direct {
					t.Errorf("no agent: bypassed connection to %s: %s", s.way.service, o)
				}
				if o := s.secure.ask(); o.who != proxied {
					t.Errorf("no agent: proxied connection to %s: %s", s.way.service, o)
				}
			}
			w.agent.start(t)
			if !strings.Contains(w.agent.proc.Output(), "adopted=true") {
				t.Errorf("not adopted:\n%s", w.agent.proc.Output())
			}
			after := w.paths(t)
			if len(after) != len(survivors) {
				t.Fatalf("paths before %+v, after %+v", before, after)
			}
			for i, p := range after {
				if p.Slot != before[i].Slot || p.Grant != before[i].Grant || p.State != "active" {
					t.Errorf("path %+v, was %+v", p, before[i])
				}
			}
			for _, s := range survivors {
				s.check(t, "restarted")
			}
			if now := w.status(t); len(now.Hooks) != len(hooks) || len(now.Problems) != 0 {
				t.Errorf("status after the restart: %+v", now)
			}
		})
	}
	for _, s := range survivors { // the new agent can end what the first one opened
		w.revoke(t, s.grant)
		s.direct.wantCut(t)
		if o := s.secure.ask(); o.who != proxied {
			t.Errorf("revoked: proxied connection: %s", o)
		}
	}
}

// TestUninstall: nothing of ours is left in a node that goes on, and the services are as if we had never been there.
func TestUninstall(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{})
	for _, how := range []string{"first", "again"} { // the second installation finds nothing of the first
		t.Run(how, func(t *testing.T) {
			leak.Check(t) // of this installation alone: the lab stays
			w.installAndUninstall(t)
		})
	}
}

func (w *world) installAndUninstall(t *testing.T) {
	all := []*daemon{w.collector, w.agent, w.guard, w.proxy}
	for _, d := range all {
		d.start(t)
	}
	way := w.ways("pod-echo", lab.IPv6)[0]
	w.open(t, wanted{way.service, way.from, "5m"})
	conn := way.dialDirect(t)
	if s, err := w.run(t, "sallyport", "uninstall", "--yes", "--config", w.files.agent); err == nil || !strings.Contains(s, "hint: ") {
		t.Errorf("uninstall under a running agent: %v, %s", err, s)
	}
	if o := conn.ask(); o.who != direct {
		t.Errorf("after a refused uninstall: %s", o)
	}
	w.agent.stop(t)
	if out := w.uninstall(t); !strings.Contains(out, "detached") {
		t.Errorf("uninstall says %q", out)
	}
	w.nothingLeft(t)
	for _, service := range services() {
		for _, f := range lab.Families() {
			for _, way := range w.ways(service, f) {
				if o := way.plain(within(t, patience)); o.who != direct {
					t.Errorf("%s %s: answered by %s", service, way.name, o)
				}
			}
		}
	}
	w.guard.stop(t)
	<-w.proxy.proc.Exited() // its namespace is gone
	w.collector.stop(t)
}

func (w *world) nothingLeft(t *testing.T) {
	t.Helper()
	entries, err := os.ReadDir(w.bpffs)
	must(t, err)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "sallyport") {
			t.Errorf("left on bpffs: %s", e.Name())
		}
	}
	var notFound netlink.LinkNotFoundError
	if _, err := w.Node.Netlink.LinkByName("px0"); err == nil || !errors.As(err, &notFound) {
		t.Errorf("px0: %v", err)
	}
	if left := attached(t, w.Node); len(left) > 0 {
		t.Errorf("programs in the node: %q", left)
	}
	if entries, err := os.ReadDir(w.files.run); err != nil || len(entries) > 0 {
		t.Errorf("left in the run directory: %v, %v", entries, err)
	}
}
