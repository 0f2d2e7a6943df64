package datapath_test

import (
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// TestWatchedServicesChangeNothing sends the same packets to a node with services that are not enforced and to one without:
// every packet meets the same verdict. PROVE_WATCHED says how many.
func TestWatchedServicesChangeNothing(t *testing.T) {
	seed, n := setting(t, "PROVE_SEED", 1), setting(t, "PROVE_WATCHED", 20_000)
	plain, watching := newPlainDifferential(t, seed), newDifferential(t, seed)
	odd := 0
	for i := range n {
		want, _ := plain.outcomeOf(t, i)
		have, c := watching.outcomeOf(t, i)
		if have.refused != want.refused || have.passed(c.place) != want.passed(c.place) || (have.verdict == actRedirect) != (want.verdict == actRedirect) {
			if odd++; odd < 10 {
				t.Errorf("verdict %d with watched services, %d without: seed %d, %v", have.verdict, want.verdict, seed, c)
			}
		}
	}
	seen, err := watching.d.Watched()
	check(t, err)
	var sum datapath.Watched
	for _, w := range seen {
		sum.Seen.Packets += w.Seen.Packets
		sum.Proxied.Packets += w.Proxied.Packets
		sum.Bypassed.Packets += w.Bypassed.Packets
		sum.Denied.Packets += w.Denied.Packets
	}
	t.Logf("%d of %d packets differ; %d of watched services: %d would be proxied, %d denied", odd, n, sum.Seen.Packets, sum.Proxied.Packets, sum.Denied.Packets)
	if sum.Seen.Packets < n/100 || sum.Proxied.Packets == 0 || sum.Denied.Packets == 0 {
		t.Errorf("too few packets of watched services to tell: %+v", sum)
	}
	a, b := plain.counters(t), watching.counters(t)
	for _, reason := range flow.Reasons() {
		if a[reason] != b[reason] {
			t.Errorf("%v: counted %+v with watched services, %+v without", reason, b[reason], a[reason])
		}
	}
}

// outcomeOf tries one case, in the node's namespace.
func (d *differential) outcomeOf(t *testing.T, index uint64) (o outcome, c drawn) {
	if index%10_000 == 0 {
		d.drain(t)
		check(t, d.d.Renew(5*time.Minute))
	}
	c = d.draw(index)
	check(t, d.Node.Do(func() error { o = d.try(c); return nil }))
	return o, c
}
