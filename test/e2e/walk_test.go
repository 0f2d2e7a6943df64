package e2e_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// backupPeople ask for a way around for the backup, and agree to it, two of three.
var backupPeople = []string{"dana", "eli", "fay", "gil"}

func backupResources(t *testing.T, key func(string) string) string {
	t.Helper()
	var people []string
	for _, name := range backupPeople {
		people = append(people, fmt.Sprintf("{name: %s, keys: [{publicKey: %q}]}", name, publicKey(t, key(name))))
	}
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: backup}
spec:
  services: [host-echo, pod-echo]
  bindings: [address]
  sources: ["10.0.0.0/8", "fd00::/16"]
  maxDuration: 30m
  maxBudget: {bytes: 4MiB}
  ticket: {required: true, pattern: "OPS-[0-9]+"}
  requesters: [dana]
  approvals: [{from: [eli, fay, gil], min: 2}]
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: backup}
spec:
  version: 1
  people: [%s]
`, strings.Join(people, ", "))
}

// TestTwoOfThree is the way of a grant by day: asked for, approved by two of three, begun, used until its budget cuts a
// transfer in its midst; the transfer is made again through the proxy, and the log tells the whole story.
func TestTwoOfThree(t *testing.T) {
	leak.Check(t)
	for _, f := range lab.Families() {
		t.Run(f.String(), func(t *testing.T) { twoOfThree(t, f) })
	}
}

func twoOfThree(t *testing.T, f lab.Family) {
	w := newWorld(t, options{})
	key := func(name string) string { return filepath.Join(w.Dir, name+".key") }
	for _, name := range backupPeople {
		w.cli(t, "keygen", "--out", key(name))
	}
	w.writeResources(t, "20-backup.yaml", backupResources(t, key))
	for _, d := range []*daemon{w.collector, w.agent, w.guard, w.proxy} {
		d.start(t)
	}
	way := w.ways("pod-echo", f)[0]
	way.to = netip.AddrPortFrom(way.to.Addr(), sinkPort)
	got := make(chan int64, 1)
	sink, err := w.home(way).Serve(way.to, func(c net.Conn) {
		n, _ := io.Copy(io.Discard, c)
		got <- n
	})
	must(t, err)
	defer sink.Close()

	file := filepath.Join(w.Dir, "backup.grant")
	w.cli(t, "grant", "issue", "--service", way.service, "--client", way.from.String(), "--for", "20m", "--node", nodeName, "--max-bytes", "4MiB",
		"--reason", "nightly backup", "--ticket", "OPS-1207", "--key", key("dana"), "--policy", w.files.resources, "--out", file, "--yes")
	wantTold(t, w.try("grant", "activate", file, "--key", key("dana"), "--yes"), "approval")
	approve := func(file, who string) string {
		w.cli(t, "grant", "approve", file, "--key", key(who), "--policy", w.files.resources, "--out", file+"."+who, "--yes")
		return file + "." + who
	}
	one := approve(file, "fay")
	wantTold(t, w.try("grant", "activate", one, "--key", key("dana"), "--yes"), "approval")
	two := approve(one, "gil")
	wantTold(t, w.try("grant", "activate", two, "--key", key("eli"), "--yes"), "dana") // another's key begins nothing
	g := read[activated](t, w, "grant", "activate", two, "--key", key("dana"), "--yes")

	conn, err := way.dial(within(t, patience))
	must(t, err)
	defer conn.Close()
	if _, err := io.Copy(conn, stream()); !isReset(err) {
		t.Errorf("transfer ended with %v, want a reset", err)
	}
	if n := <-got; n == 0 || n > 4<<20 {
		t.Errorf("service got %d bytes under a budget of %d", n, 4<<20)
	}
	waitUntil(t, "the end of the grant", func() bool { return strings.Contains(w.cli(t, "grants", "-o", "json"), `"spent"`) })
	w.sendAll(t, way, 6<<20)
	if n := <-got; n != 6<<20 {
		t.Errorf("service got %d bytes through the proxy, want %d", n, 6<<20)
	}
	wantTold(t, w.try("grant", "activate", two, "--key", key("dana"), "--yes"), g.ID)
	wantTold(t, w.try("grant", "review", g.ID, "--key", key("gil"), "--by", "gil", "--why", "fine", "--yes"), "gil may not review it")
	w.cli(t, "grant", "review", g.ID, "--key", key("eli"), "--by", "eli", "--why", "6 MiB in place of 4", "--yes")
	if out := w.cli(t, "grant", "show", g.ID); !strings.Contains(out, "6 MiB in place of 4") {
		t.Errorf("the review is not shown:\n%s", out)
	}
	waitUntil(t, "the end in the log", func() bool {
		out := w.cli(t, "flows", "-o", "json")
		return strings.Contains(out, "PATH_SPENT") && strings.Contains(out, `"IDENTITY"`)
	})
	for _, d := range []*daemon{w.proxy, w.agent, w.guard, w.collector} {
		d.stop(t)
	}
}

// sendAll sends so many bytes with an identity, and waits for the service's end of the connection.
func (w *world) sendAll(t *testing.T, way way, n int) {
	t.Helper()
	raw, err := way.dial(within(t, patience))
	must(t, err)
	defer raw.Close()
	conn, err := w.secure(within(t, patience), raw, web)
	must(t, err)
	_, err = conn.Write(make([]byte, n))
	must(t, err)
	must(t, conn.CloseWrite())
	_, _ = io.Copy(io.Discard, conn)
}
