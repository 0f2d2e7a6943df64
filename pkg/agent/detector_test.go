package agent

import (
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// step is one look of the detector at one measure: what was let through and what arrived, in all.
type step struct {
	after           time.Duration
	passed, arrived uint64
	more            uint64 // wanted
}

func TestBalance(t *testing.T) {
	const tick = time.Second
	for name, steps := range map[string][]step{
		"nothing":                {{tick, 0, 0, 0}, {tick, 0, 0, 0}},
		"all arrives":            {{tick, 100, 100, 0}, {tick, 200, 200, 0}},
		"on its way":             {{tick, 100, 60, 0}, {tick, 100, 100, 0}, {tick, 300, 250, 0}, {tick, 300, 300, 0}},
		"losses":                 {{tick, 100, 90, 0}, {6 * tick, 100, 90, 0}, {tick, 200, 180, 0}, {6 * tick, 200, 180, 0}},
		"forged":                 {{tick, 100, 100, 0}, {tick, 100, 101, 1}},
		"forged is told once":    {{tick, 100, 105, 5}, {tick, 100, 105, 0}, {tick, 150, 155, 0}, {tick, 150, 157, 2}},
		"before the first look":  {{tick, 100, 130, 30}},
		"hidden behind a loss":   {{tick, 100, 90, 0}, {6 * tick, 100, 90, 0}, {tick, 100, 95, 5}},
		"a loss is not yet sure": {{tick, 100, 90, 0}, {tick, 100, 95, 0}, {tick, 100, 100, 0}},
		"late, but in time":      {{tick, 100, 0, 0}, {4 * tick, 100, 100, 0}},
		"busy, with losses": {{tick, 1000, 900, 0}, {tick, 2000, 1900, 0}, {tick, 3000, 2800, 0}, {tick, 4000, 3800, 0}, {tick, 5000, 4800, 0},
			{tick, 6000, 5800, 0}, {tick, 7000, 6800, 0}, {7 * tick, 7000, 6800, 0}, {tick, 8000, 7801, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			var b balance
			now := time.Hour
			for i, s := range steps {
				now += s.after
				if more := b.look(now, s.passed, s.arrived); more != s.more {
					t.Errorf("look %d: %d too much, want %d", i, more, s.more)
				}
			}
		})
	}
}

func TestDetectorNamesServiceKindAndMeasure(t *testing.T) {
	d := newDetector()
	traffic := map[uint32]datapath.Traffic{
		1: {HookLeg: datapath.Volume{Opens: 1, Packets: 5, Bytes: 100}, SocketLeg: datapath.Volume{Opens: 1, Packets: 5, Bytes: 100}},
		2: {HookPath: datapath.Volume{Bytes: 100}, SocketPath: datapath.Volume{Bytes: 120, Packets: 3}, SocketLoopback: datapath.Volume{Bytes: 7}},
	}
	found := d.look(time.Hour, traffic)
	want := finding{service: 2, kind: kindPath, more: excess{packets: 3, bytes: 20}}
	if len(found) != 1 || found[0] != want {
		t.Errorf("found %+v, want %+v", found, want)
	}
	if again := d.look(time.Hour+time.Second, traffic); len(again) > 0 {
		t.Errorf("found again: %+v", again)
	}
	d.look(time.Hour+2*time.Second, nil)
	if len(d.balances) > 0 {
		t.Errorf("services that are gone are remembered: %v", d.balances)
	}
}
