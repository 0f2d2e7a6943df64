package agent

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/test/lab"
)

func TestWarnings(t *testing.T) {
	usual := []time.Duration{5 * time.Minute, time.Minute}
	path := func(bytes, of uint64) []datapath.PathStatus {
		return []datapath.PathStatus{{Path: datapath.Path{Client: netip.MustParseAddr("10.1.0.2"), Budget: datapath.Budget{Bytes: of}}, BytesToServer: bytes}}
	}
	for _, c := range []struct {
		name       string
		left, life time.Duration
		before     []time.Duration
		paths      []datapath.PathStatus
		want       []string
	}{
		{"early", 6 * time.Minute, time.Hour, usual, nil, nil},
		{"five minutes", 5 * time.Minute, time.Hour, usual, nil, []string{"end 5m0s"}},
		{"between", 2 * time.Minute, time.Hour, usual, nil, []string{"end 5m0s"}},
		{"one minute", time.Minute, time.Hour, usual, nil, []string{"end 1m0s"}},
		{"a short grant has the short warning alone", 3 * time.Minute, 4 * time.Minute, usual, nil, nil},
		{"one of that very length has none", time.Minute, time.Minute, usual, nil, nil},
		{"policy's choice", 9 * time.Minute, time.Hour, []time.Duration{10 * time.Minute}, nil, []string{"end 10m0s"}},
		{"budget, not yet", time.Hour, time.Hour, usual, path(799, 1000), nil},
		{"budget", time.Hour, time.Hour, usual, path(800, 1000), []string{"bytes 10.1.0.2"}},
		{"no budget", time.Hour, time.Hour, usual, path(800, 0), nil},
		{"a budget of one", time.Hour, time.Hour, usual, path(0, 1), nil},
		{"the largest budget", time.Hour, time.Hour, usual, path(1<<60/10*8, 1<<60), nil},
		{"nearly all of it", time.Hour, time.Hour, usual, path(1<<60/10*8+1<<10, 1<<60), []string{"bytes 10.1.0.2"}},
	} {
		var got []string
		for _, w := range warnings(c.left, c.life, c.before, c.paths) {
			got = append(got, w.key)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// TestWarningsAreGivenOnce: in the records and to watchers, who see countdown, volume and peers besides.
func TestWarningsAreGivenOnce(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	l.hook()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, func(p *grant.Payload) {
		l.client(p)
		p.Duration, p.Budget.Connections = 10*time.Minute, 5
	}), "uid:0")
	must(t, err)
	o := &operators{grants: l.grants, datapath: l.datapath, clock: b.clock.clock()}
	look := func() {
		_, err := l.tick(t.Context())
		must(t, err)
	}
	look()
	for range 4 {
		_, err := lab.Ask(l.dial())
		must(t, err)
	}
	for range 3 {
		look()
	}
	frame, err := o.frame(t.Context(), nil)
	must(t, err)
	w := frame.GetActive()[0]
	if left := w.GetLeft().AsDuration(); left > 10*time.Minute || left < 9*time.Minute || w.GetLiveFlows() != 4 || len(w.GetPeers()) != 4 ||
		w.GetPaths()[0].GetBytesToClient() == 0 || !contains(w.GetPeers()[0], "10.1.0.2:") {
		t.Errorf("watchers see %v", w)
	}
	b.later(6 * time.Minute)
	look()
	b.later(3*time.Minute + 30*time.Second)
	look()
	look()
	frame, err = o.frame(t.Context(), frame)
	must(t, err)
	var texts, recorded []string
	for _, w := range frame.GetActive()[0].GetWarnings() {
		texts = append(texts, w.GetText())
	}
	for _, e := range l.storedEvents()[1:] {
		recorded = append(recorded, e.GetWhy())
		if e.GetStep() != stepWarned || e.GetGrant() != row.ID {
			t.Errorf("recorded %v", e)
		}
	}
	if len(texts) != 3 || !contains(texts[0], "used 4 of 5 connections (80 %)") || !contains(texts[1], "ends in 4m") || !contains(texts[2], "ends in ", "s") || !slices.Equal(texts, recorded) {
		t.Errorf("warned of %q, recorded %q", texts, recorded)
	}
	b.later(time.Hour)
	look()
	after, err := o.frame(t.Context(), frame)
	must(t, err)
	if len(after.GetActive()) != 0 || len(after.GetEnded()) != 1 || after.GetEnded()[0].GetState() != stateExpired {
		t.Errorf("after its end watchers see %v", after)
	}
}
