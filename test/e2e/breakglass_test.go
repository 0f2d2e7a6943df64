package e2e_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// glassPeople ask for break-glass, approve it and review it, each with a key of their own.
var glassPeople = []string{"dana", "eli", "fay", "gil"}

// glassResources let dana, eli and fay break the glass together, and gil review it.
func glassResources(t *testing.T, key func(string) string) string {
	t.Helper()
	var people []string
	for _, name := range glassPeople {
		uses := "breakGlass"
		if name == "gil" {
			uses = "approve"
		}
		people = append(people, fmt.Sprintf("{name: %s, keys: [{publicKey: %q, uses: [%s]}]}", name, publicKey(t, key(name)), uses))
	}
	return fmt.Sprintf(`---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: glass}
spec:
  services: [host-echo, pod-echo]
  bindings: [address]
  sources: ["10.0.0.0/8", "fd00::/16"]
  breakGlass: true
  maxDuration: 30m
  requesters: [dana]
  approvals: [{from: [eli, fay], min: 2}]
  reviewers: [gil]
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: glass}
spec:
  version: 1
  people: [%s]
`, strings.Join(people, ", "))
}

// TestBreakGlassNight is the whole way with no identity provider and no collector: asked for, approved by two, begun with a
// key that is not on the node, used until its budget cuts a transfer, loud until it was reviewed, and once.
func TestBreakGlassNight(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{plain: true})
	key := func(name string) string { return filepath.Join(w.Dir, name+".key") }
	for _, name := range glassPeople {
		w.cli(t, "keygen", "--out", key(name))
	}
	w.writeResources(t, "20-glass.yaml", glassResources(t, key))
	w.agent.start(t)
	w.proxy.start(t)
	must(t, os.RemoveAll(filepath.Join(w.Dir, "id"))) // the sockets that give identities; what gave them is gone

	way := w.ways("host-echo", lab.IPv4)[0]
	way.to = netip.AddrPortFrom(way.to.Addr(), sinkPort)
	got := make(chan int64, 1)
	sink, err := w.home(way).Serve(way.to, func(c net.Conn) {
		n, _ := io.Copy(io.Discard, c)
		got <- n
	})
	must(t, err)
	defer sink.Close()

	file := func(name string) string { return filepath.Join(w.Dir, name) }
	ask := func(name string) string {
		w.cli(t, "grant", "issue", "--break-glass", "--service", way.service, "--client", way.from.String(), "--for", "10m", "--node", nodeName,
			"--max-bytes", "4MiB", "--reason", "the provider is down", "--key", key("dana"), "--policy", w.files.resources, "--out", file(name), "--yes")
		return file(name)
	}
	approve := func(envelope, who string) string {
		w.cli(t, "grant", "approve", envelope, "--key", key(who), "--policy", w.files.resources, "--out", envelope+"."+who, "--yes")
		return envelope + "." + who
	}
	one := approve(ask("night"), "eli")
	wantTold(t, w.try("grant", "activate", one, "--key", key("dana"), "--yes"), "signatures", "another approval")
	both := approve(one, "fay")
	w.cli(t, "grant", "challenge", "--out", file("challenge"))
	w.cli(t, "grant", "answer", both, "--challenge", file("challenge"), "--key", key("dana"), "--out", file("answer"), "--yes")
	g := read[activated](t, w, "grant", "activate", both, "--answer", file("answer"))

	conn, err := way.dial(within(t, patience))
	must(t, err)
	defer conn.Close()
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	if _, err := io.Copy(conn, stream()); !isReset(err) {
		t.Errorf("transfer ended with %v, want a reset", err)
	}
	if n := <-got; n == 0 || n > 4<<20 {
		t.Errorf("service got %d bytes under a budget of %d", n, 4<<20)
	}
	waitUntil(t, "the end of the grant", func() bool { return strings.Contains(w.cli(t, "grants", "-o", "json"), `"spent"`) })

	loud := func() bool {
		return strings.Contains(w.cli(t, "status"), "break_glass "+g.ID) && strings.Contains(w.cli(t, "grant", "show", g.ID), "open")
	}
	if !loud() {
		t.Errorf("nobody hears of it:\n%s", w.cli(t, "status"))
	}
	again := approve(approve(ask("again"), "eli"), "fay")
	wantTold(t, w.try("grant", "activate", again, "--key", key("dana"), "--yes"), "nobody has reviewed", g.ID)
	w.agent.kill(t)
	w.agent.start(t)
	if !loud() {
		t.Error("a restart makes it quiet")
	}
	wantTold(t, w.try("grant", "review", g.ID, "--key", key("eli"), "--by", "eli", "--why", "fine", "--yes"), "eli may not review it")
	w.cli(t, "grant", "review", g.ID, "--key", key("gil"), "--by", "gil", "--why", "read what was sent", "--yes")
	if loud() || strings.Contains(w.cli(t, "status"), "PROBLEM  break_glass") {
		t.Errorf("reviewed, and yet:\n%s", w.cli(t, "status"))
	}
	read[activated](t, w, "grant", "activate", again, "--key", key("dana"), "--yes")
	w.proxy.stop(t)
	w.agent.stop(t)
}
