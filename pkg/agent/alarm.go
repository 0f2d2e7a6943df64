package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// alarmName is a kind of alarm: a bounded metric label.
type alarmName string

// Kinds of alarms. Each says that somebody or something worked against enforcement, also when it was mended at once.
const (
	alarmHookLost   alarmName = "hook_lost"   // a link was detached, a filter deleted
	alarmHookBehind alarmName = "hook_behind" // a program was put ahead of ours
	alarmPinsLost   alarmName = "pins_lost"   // pins were removed
	alarmBPFFSLost  alarmName = "bpffs_lost"  // the bpffs was unmounted
	alarmPxLost     alarmName = "px_lost"     // px or its devices were removed
	alarmClockJump  alarmName = "clock_jump"  // the wall clock moved against boot time

	alarmBackstop     alarmName = "backstop"      // traffic came around the hooks and was refused at a socket
	alarmBackstopLost alarmName = "backstop_lost" // the backstop was detached
	alarmUnexplained  alarmName = "unexplained"   // sockets got more than the hooks let through

	alarmCanary alarmName = "canary" // a canary saw an enforced port open

	alarmBreakGlass alarmName = "break_glass" // a break-glass grant is live, or nobody has reviewed it

	alarmStoreDamaged alarmName = "store_damaged" // the node's records were, and begin anew
	alarmLog          alarmName = "log"           // the collector showed another history than it did before
	alarmRollout      alarmName = "rollout"       // what a roll-out had enforced fell back: too much was refused
	alarmUnreconciled alarmName = "unreconciled"  // the kernel counted another volume than records tell of, and no loss explains it
)

var alarmNames = []alarmName{alarmHookLost, alarmHookBehind, alarmPinsLost, alarmBPFFSLost, alarmPxLost, alarmClockJump,
	alarmBackstop, alarmBackstopLost, alarmUnexplained, alarmCanary, alarmBreakGlass, alarmStoreDamaged, alarmLog, alarmRollout, alarmUnreconciled}

// alarmQuiet bounds the records of one kind: those that come within it are told as one, with their count.
const alarmQuiet = time.Minute

// alarm is one kind of alarm in the life of this process. Times are wall-clock time, for people.
type alarm struct {
	name        alarmName
	since, last time.Time
	count       uint64
	text        string // of the last

	recorded   uint64 // of count
	recordedAt time.Time
}

func (a alarm) String() string {
	return fmt.Sprintf("%s: %d times since %s: %s", a.name, a.count, a.since.UTC().Format(time.RFC3339), a.text)
}

// alarms are what was raised, and the way to their records: a critical record in the log, a metric, a line in status.
// Safe for concurrent use; raise never waits.
type alarms struct {
	clock  clock
	log    *slog.Logger
	record func(context.Context, alarm, uint64) error // durably, that it was raised so many times more
	kick   chan struct{}

	mu  sync.Mutex
	all map[alarmName]*alarm // guarded by mu
}

func newAlarms(c clock, log *slog.Logger, record func(context.Context, alarm, uint64) error) *alarms {
	return &alarms{clock: c, log: log, record: record, kick: make(chan struct{}, 1), all: make(map[alarmName]*alarm)}
}

// raise notes one more alarm of a kind. text says what was found and what was done, in one line.
func (s *alarms) raise(name alarmName, text string) {
	now, _ := s.clock.read()
	s.mu.Lock()
	a, ok := s.all[name]
	if !ok {
		a = &alarm{name: name, since: now}
		s.all[name] = a
	}
	a.last, a.text = now, oneLine(text)
	a.count++
	s.mu.Unlock()
	s.log.Error("alarm", "alarm", name, "text", text)
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// recorded notes an alarm whose record is durable already.
func (s *alarms) recorded(name alarmName, text string) {
	now, _ := s.clock.read()
	s.mu.Lock()
	s.all[name] = &alarm{name: name, since: now, last: now, count: 1, text: oneLine(text), recorded: 1, recordedAt: now}
	s.mu.Unlock()
	s.log.Error("alarm", "alarm", name, "text", text)
}

// list gives every alarm that was raised, by name.
func (s *alarms) list() []alarm {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]alarm, 0, len(s.all))
	for _, a := range s.all {
		out = append(out, *a)
	}
	slices.SortFunc(out, func(a, b alarm) int { return cmp.Compare(a.name, b.name) })
	return out
}

// alarmRetry is how often what was not recorded yet is looked at again.
const alarmRetry = 5 * time.Second

// Run records what is raised until ctx ends, and what is left then.
func (s *alarms) Run(ctx context.Context, report func(error)) error {
	retry := time.NewTicker(alarmRetry)
	defer retry.Stop()
	for {
		report(s.flush(ctx, alarmQuiet))
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), alarmRetry)
			defer cancel()
			report(s.flush(last, 0))
			return nil
		case <-s.kick:
		case <-retry.C:
		}
	}
}

// flush records the alarms whose last record is older than quiet.
func (s *alarms) flush(ctx context.Context, quiet time.Duration) error {
	now, _ := s.clock.read()
	for _, a := range s.list() {
		if a.count == a.recorded || now.Sub(a.recordedAt).Abs() < quiet {
			continue
		}
		if err := s.record(ctx, a, a.count-a.recorded); err != nil {
			return fmt.Errorf("record alarm %s: %w", a.name, err)
		}
		s.mu.Lock()
		s.all[a.name].recorded, s.all[a.name].recordedAt = a.count, now
		s.mu.Unlock()
	}
	return nil
}

// recordAlarm appends an event to the log: critical, so never shed.
func (n *node) recordAlarm(ctx context.Context, a alarm, times uint64) error {
	event, err := encodeEvent(newEvent(stepAlarm, "agent", fmt.Sprintf("%s (%d times): %s", a.name, times, a.text), n.clock))
	if err == nil {
		_, err = n.store.Append(ctx, event)
	}
	if err != nil {
		return err
	}
	n.eventCounts.count(stepAlarm)
	n.audit.Kick()
	return nil
}
