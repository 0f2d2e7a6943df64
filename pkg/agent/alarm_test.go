package agent

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"testing"
	"time"
)

// alarmRig has alarms whose clock stands still and whose records can fail.
type alarmRig struct {
	*alarms
	now     time.Time
	fail    error
	records []string
	times   []uint64
}

func newAlarmRig() *alarmRig {
	r := &alarmRig{now: time.Unix(1000, 0)}
	r.alarms = newAlarms(clock{wall: func() time.Time { return r.now }, boot: func() time.Duration { return 0 }}, slog.New(slog.DiscardHandler),
		func(_ context.Context, a alarm, times uint64) error {
			if r.fail == nil {
				r.records, r.times = append(r.records, string(a.name)+" "+a.text), append(r.times, times)
			}
			return r.fail
		})
	return r
}

func TestAlarmsAreRecordedOnceAMinute(t *testing.T) {
	r := newAlarmRig()
	flush := func() { must(t, r.flush(t.Context(), alarmQuiet)) }
	r.raise(alarmHookLost, "eth0")
	flush()
	r.raise(alarmHookLost, "eth1")
	r.raise(alarmHookLost, "eth2")
	r.raise(alarmPinsLost, "3 pins")
	flush()
	r.now = r.now.Add(alarmQuiet)
	flush()
	flush()
	if want := []string{"hook_lost eth0", "pins_lost 3 pins", "hook_lost eth2"}; !reflect.DeepEqual(r.records, want) {
		t.Errorf("records %q, want %q", r.records, want)
	}
	if want := []uint64{1, 1, 2}; !reflect.DeepEqual(r.times, want) {
		t.Errorf("counts %v, want %v", r.times, want)
	}
	if l := r.list(); len(l) != 2 || l[0].count != 3 || l[0].String() != "hook_lost: 3 times since 1970-01-01T00:16:40Z: eth2" {
		t.Errorf("list %v", l)
	}
}

// TestAlarmsOutlastAFullDisk: what could not be recorded is recorded later, and counted.
func TestAlarmsOutlastAFullDisk(t *testing.T) {
	r := newAlarmRig()
	r.fail = errors.New("disk full")
	r.raise(alarmPxLost, "px0")
	if err := r.flush(t.Context(), alarmQuiet); !errors.Is(err, r.fail) {
		t.Errorf("%v, want %v", err, r.fail)
	}
	r.raise(alarmPxLost, "px0 again")
	r.fail = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must(t, r.Run(ctx, func(err error) { must(t, err) }))
	if len(r.times) != 1 || r.times[0] != 2 {
		t.Errorf("counts %v, want one record of 2", r.times)
	}
}
