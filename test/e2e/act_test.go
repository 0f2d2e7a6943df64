package e2e_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// TestCollectorEndsPaths: somebody on call ends a live path of a node without logging in there. The node takes the collector's word only where its
// configuration says so, and a signature of who may say it in any case; its record names who it was.
func TestCollectorEndsPaths(t *testing.T) {
	leak.Check(t)
	oncall := spiffeid.RequireFromPath(domain, "/oncall/eve")
	w := newWorld(t, options{plain: true, identities: []spiffeid.ID{oncall}})
	change(t, w.files.collector, "spec:\n", "spec:\n  actors: [\"spiffe://example.org/oncall/*\"]\n")
	change(t, w.files.agent, `sallyport/collector"}`, `sallyport/collector", mayRevoke: true}`)
	for _, d := range []*daemon{w.collector, w.agent, w.proxy} {
		d.start(t)
	}
	way := w.ways("host-echo", lab.IPv4)[0]
	g := w.open(t, wanted{way.service, way.from, "5m"})
	conn := way.dialDirect(t)
	revoke := func(as spiffeid.ID) (string, error) {
		return w.run(t, "sallyport", "grant", "revoke", g.ID, "--collector", "127.0.0.1:9443", "--node", nodeName, "--why", "the backup is through",
			"--workload-api", "unix://"+w.socket(as))
	}
	w.connected(t)
	if out, err := revoke(web); err == nil {
		t.Errorf("somebody who may not: %s", out)
	}
	if o := conn.ask(); o.who != direct {
		t.Fatalf("answered by %s, want the service", o)
	}
	out, err := revoke(oncall)
	if err != nil || !strings.Contains(out, "revoked") {
		t.Fatalf("%v\n%s", err, out)
	}
	conn.wantCut(t)
	if o := way.plain(within(t, patience)); o.who == direct {
		t.Errorf("new connection: %s", o)
	}
	w.recordedBy(t, g, "REVOKED", oncall.String()+" via collector")
	if out, err := revoke(oncall); err == nil || !strings.Contains(out, "nothing is left to do") {
		t.Errorf("again: %v\n%s", err, out)
	}

	g = w.open(t, wanted{way.service, way.from, "5m"})
	conn = way.dialDirect(t)
	waitUntil(t, "the grant at the collector", func() bool { return w.has(t, g, "ACTIVATED", "uid:0") })
	w.cli(t, "grant", "withdraw", g.ID, "--collector", "unix:"+w.files.recordsSocket, "--node", nodeName, "--key", w.key, "--why", "not needed", "--yes")
	conn.wantCut(t)
	w.recordedBy(t, g, "WITHDRAWN", "uid:0@collector via collector")
}

// change writes a file anew, with something else in the place of what is in it once.
func change(t *testing.T, file, from, to string) {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, err)
	if strings.Count(string(text), from) != 1 {
		t.Fatalf("%s has not %q once", file, from)
	}
	write(t, file, strings.Replace(string(text), from, to, 1))
}

// connected waits until the agent has the collector.
func (w *world) connected(t *testing.T) {
	t.Helper()
	waitUntil(t, "the collector", func() bool { return strings.HasPrefix(w.status(t).Collector, "connected") })
}

func (w *world) has(t *testing.T, g activated, step, actor string) bool {
	return slices.ContainsFunc(w.grantEvents(t), func(e grantEvent) bool {
		return e.Event.Grant == g.ID && e.Event.Step == step && e.Event.Actor == actor
	})
}

func (w *world) recordedBy(t *testing.T, g activated, step, actor string) {
	t.Helper()
	waitUntil(t, step+" by "+actor, func() bool { return w.has(t, g, step, actor) })
}
