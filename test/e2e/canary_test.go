package e2e_test

import (
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// canarySaw is what sallyport canary tells of one port.
type canarySaw struct {
	Canaries []struct{ Service, Address, State, Why, Closed string }
}

func (c canarySaw) states() map[string]string {
	all := map[string]string{}
	for _, one := range c.Canaries {
		all[one.Address] = one.State + ": " + one.Why
	}
	return all
}

// covered is what sallyport services --coverage tells.
type covered struct {
	Services []struct {
		Service, Mode, Canary string
		Since, Closed, Denied time.Time
	}
}

func (w *world) coverage(t *testing.T) covered {
	t.Helper()
	return read[covered](t, w, "services", "--coverage")
}

// TestCanary: whoever proves nothing is reset at every enforced port, on loopback and in pods of both families, and no service hears of
// it. The trail tells a canary's denial from others'. Without a proxy the ports are closed, too.
func TestCanary(t *testing.T) {
	leak.Check(t)
	w := newWorld(t, options{plain: true})
	for _, d := range []*daemon{w.collector, w.agent, w.proxy} {
		d.start(t)
	}
	heard := func() (n int) {
		for _, s := range w.echoes {
			n += len(s.Peers())
		}
		return n
	}
	before, began := heard(), time.Now()
	saw := read[canarySaw](t, w, "canary")
	want := []string{"127.0.0.1:8080", w.Pod.Addr(lab.IPv4).String() + ":8081", "[" + w.Pod.Addr(lab.IPv6).String() + "]:8081"}
	for _, address := range want {
		if got := saw.states()[address]; !strings.HasPrefix(got, "closed: bytes that are no TLS were reset") {
			t.Errorf("%s is seen %q", address, got)
		}
	}
	if n := heard() - before; n != 0 {
		t.Errorf("services heard of %d connections", n)
	}
	waitUntil(t, "records of canaries", func() bool {
		return strings.Contains(w.cli(t, "flows", "--verdict", "denied", "-o", "json"), `"detail":"canary: first byte is 0x0a`)
	})
	for _, s := range w.coverage(t).Services {
		if s.Mode != "Enforce" || s.Since.IsZero() || s.Canary != "closed" || s.Closed.IsZero() {
			t.Errorf("coverage: %+v", s)
		}
		if s.Denied.After(began) { // the agent's own probes were denied before, while there was no proxy
			t.Errorf("%s: a canary is told as somebody denied at %s", s.Service, s.Denied)
		}
	}
	metrics := w.metrics(t)
	for _, line := range []string{
		`sallyport_canary{service="host-echo",state="closed"} 1`, `sallyport_canary{service="pod-echo",state="open"} 0`,
		`sallyport_flow_records_total{event="DENY",reason="NO_TLS",source="canary",verdict="DENIED"}`,
	} {
		if !strings.Contains(metrics, line) {
			t.Errorf("no metric %s", line)
		}
	}
	if strings.Contains(metrics, `reason="NO_TLS",source="proxy"`) {
		t.Error("a canary's denial is counted as somebody's")
	}
	w.proxy.kill(t)
	for address, got := range read[canarySaw](t, w, "canary").states() {
		if got != "closed: steered, and no proxy answered" {
			t.Errorf("without a proxy %s is seen %q", address, got)
		}
	}
}
