package e2e_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

const datagramPort = 8092 // of pod-datagrams

// datagrams is a UDP service in the pod, and a policy that alice may open paths by.
func (w *world) datagrams(t *testing.T) {
	t.Helper()
	w.writeResources(t, "20-datagrams.yaml", fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: pod-datagrams}
spec: {target: Pod, protocol: UDP, idle: 2s, ports: [%d], addresses: [%q, %q]}
---
`, datagramPort, w.Pod.Addr(lab.IPv4), w.Pod.Addr(lab.IPv6))+bypassPolicy("datagrams", "pod-datagrams"))
	for _, f := range lab.Families() {
		must(t, w.Pod.Datagrams(netip.AddrPortFrom(w.Pod.Addr(f), datagramPort)))
	}
	waitUntil(t, "the UDP service to be protected", func() bool {
		return strings.Contains(w.cli(t, "services"), "UDP")
	})
}

// TestDatagramsUnderAGrant: a UDP service is refused, served under a grant until its deadline and not one datagram
// longer, by a tap at the service, and stands in the log.
func TestDatagramsUnderAGrant(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{plain: true})
	w.datagrams(t)
	for _, f := range lab.Families() {
		t.Run(f.String(), func(t *testing.T) { w.underAGrant(t, f) })
	}
	waitUntil(t, "the flows to be in the log", func() bool {
		out := w.cli(t, "flows", "-o", "json")
		return strings.Contains(out, `"udp"`) && strings.Contains(out, "PATH_OPEN") && strings.Contains(out, "UDP_NO_PATH")
	})
}

func (w *world) underAGrant(t *testing.T, f lab.Family) {
	tap, err := w.Pod.Tap(datagramPort)
	must(t, err)
	conn, err := w.Client.DialUDP(t.Context(), netip.AddrPortFrom(w.Client.Addr(f), 0), netip.AddrPortFrom(w.Pod.Addr(f), datagramPort))
	must(t, err)
	defer conn.Close()
	if _, err := lab.AskDatagram(conn, []byte("hello"), patience); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatalf("without a grant: %v, want a refusal", err)
	}
	w.open(t, wanted{"pod-datagrams", w.Client.Addr(f), "3s"})
	opened := time.Now()
	if _, err := lab.AskDatagram(conn, []byte("hello"), patience); err != nil {
		t.Fatalf("under a grant: %v", err)
	}
	var last time.Time
	for refused := 0; refused < 50; time.Sleep(time.Millisecond) { // the pace of the client
		if time.Since(opened) > patience {
			t.Fatal("the path has no end")
		}
		switch _, err := conn.Write([]byte("x")); {
		case errors.Is(err, syscall.ECONNREFUSED):
			refused++
		case err != nil:
			t.Fatal(err)
		}
	}
	all, err := tap.Packets()
	must(t, err)
	for _, p := range all {
		if p.UDP && p.Dst.Port() == datagramPort && p.Time.After(last) {
			last = p.Time
		}
	}
	if lived := last.Sub(opened); lived > 3*time.Second+50*time.Millisecond || lived < 2*time.Second {
		t.Errorf("the last datagram arrived %v after the grant was opened for 3s", lived)
	}
}
