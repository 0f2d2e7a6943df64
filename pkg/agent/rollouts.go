package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/rollout"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// Steps of grant events that are about roll-outs.
const (
	stepAdvanced  = "ADVANCED"
	stepHalted    = "HALTED"
	stepResumed   = "RESUMED"
	stepFellBack  = "FELL_BACK"
	stepRolledOut = "ROLLED_OUT"
)

// noteOfRollout is where the store has the state of a roll-out, with its name behind it.
const noteOfRollout = "rollout/"

// rolloutTick is how often it is looked whether a wave has held, and what could not be done is tried again.
const rolloutTick = time.Second

// ErrNoRollout says that no Rollout in force has that name.
var ErrNoRollout = errors.New("no such roll-out")

// rollouts is how far roll-outs have come on this node. Nothing but a signed word has a wave begin, and a state is durable before it has
// an effect: an agent that is killed goes on where it was.
type rollouts struct {
	node     string
	store    *store.Store
	clock    clock
	enforced func() *enforced
	hear     func(statement []byte, e *enforced) (said, error)
	apply    func() // makes the table anew
	recorded func()
	alarm    func(alarmName, string)
	events   *eventCounter
	problems *problems
	log      *slog.Logger
	kick     chan struct{}
	watch    *rolloutWatch

	change sync.Mutex // held by who changes a state, over the disk
	mu     sync.Mutex
	states map[string]rollout.State // guarded by mu; by the name of the roll-out
}

// recall reads what an earlier agent has kept. One that cannot be read ends the start: what is enforced must not be opened by that.
func (r *rollouts) recall(ctx context.Context) error {
	notes, err := r.store.Notes(ctx, noteOfRollout)
	if err != nil {
		return fmt.Errorf("recall roll-outs: %w", err)
	}
	r.states = make(map[string]rollout.State)
	for _, n := range notes {
		var s rollout.State
		if err := json.Unmarshal(n.Data, &s); err != nil {
			return fmt.Errorf("recall roll-out %s: %w", n.Name, err)
		}
		r.states[strings.TrimPrefix(n.Name, noteOfRollout)] = s
	}
	return nil
}

// modes are the modes that services of the set have reached here.
func (r *rollouts) modes(set *policy.Set) map[string]policy.Mode {
	if r == nil {
		return nil
	}
	all := make(map[string]policy.Mode)
	for _, one := range set.Rollouts() {
		maps.Copy(all, rollout.Follow(one, r.state(one.Name)).Modes)
	}
	return all
}

func (r *rollouts) state(name string) rollout.State {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.states[name]
}

// follow forgets roll-outs that are gone: one that comes again begins anew.
func (r *rollouts) follow(ctx context.Context, e *enforced) error {
	if r == nil {
		return nil
	}
	r.change.Lock()
	defer r.change.Unlock()
	r.watch.follow(e)
	var errs []error
	for _, name := range r.names() {
		if _, there := e.verified.Rollout(name); there {
			continue
		}
		if err := r.store.KeepUrgent(ctx, []store.Note{{Name: noteOfRollout + name}}); err != nil {
			errs = append(errs, fmt.Errorf("forget roll-out %s: %w", name, err))
			continue
		}
		r.mu.Lock()
		delete(r.states, name)
		r.mu.Unlock()
	}
	return errors.Join(errs...)
}

func (r *rollouts) names() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(maps.Keys(r.states))
}

// keep makes a state durable with its event, and only then has it count. r.change is held.
func (r *rollouts) keep(ctx context.Context, name string, s rollout.State, e *api.GrantEvent) error {
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("keep roll-out %s: %w", name, err)
	}
	event, err := encodeEvent(e)
	if err != nil {
		return err
	}
	if err := r.store.KeepUrgent(ctx, []store.Note{{Name: noteOfRollout + name, Data: data}}, event); err != nil {
		return fmt.Errorf("%w: %w", errNotRecorded, err)
	}
	r.mu.Lock()
	r.states[name] = s
	r.mu.Unlock()
	r.events.count(e.Step)
	r.log.Warn("roll-out", "rollout", name, "step", e.Step, "wave", s.Wave, "service", e.Service, "actor", e.Actor, "why", e.Why)
	r.recorded()
	r.apply()
	return nil
}

// State takes a signed word: a wave begins, or the roll-out goes on.
func (r *rollouts) State(ctx context.Context, statement []byte, actor string) (policy.Rollout, error) {
	r.change.Lock()
	defer r.change.Unlock()
	e := r.enforced()
	if e == nil {
		return policy.Rollout{}, fmt.Errorf("take statement: %w", ErrNoResources)
	}
	s, err := r.hear(statement, e)
	if err != nil {
		return policy.Rollout{}, err
	}
	one, err := entitledToRollOut(s, e.verified)
	if err != nil {
		return one, err
	}
	now, told := r.clock.wall().Round(0), r.watch.told(one)
	word := rollout.Word{By: s.By, Why: s.Why, At: s.At}
	step, why := stepResumed, fmt.Sprintf("roll-out %s: %s", one.Name, s.Why)
	var next rollout.State
	if s.Step == grant.StepAdvanced {
		step, why = stepAdvanced, fmt.Sprintf("roll-out %s, wave %d: %s", one.Name, s.Wave, s.Why)
		next, err = rollout.Advance(one, r.node, r.state(one.Name), int(s.Wave), told, word, now)
	} else {
		next, err = rollout.Resume(one, r.node, r.state(one.Name), told, word, now)
	}
	if err != nil {
		return one, refusedRollout(err)
	}
	event := newEvent(step, actor, why, r.clock)
	event.Requester, event.Envelope = s.By, s.envelope
	for _, by := range s.signers {
		event.Signers = append(event.Signers, by.KeyID)
	}
	r.watch.anew(next.Enforced())
	return one, r.keep(ctx, one.Name, next, event)
}

// entitledToRollOut finds the roll-out that somebody speaks of, if they may.
func entitledToRollOut(s said, set *policy.Set) (policy.Rollout, error) {
	if s.Step != grant.StepAdvanced && s.Step != grant.StepResumed {
		return policy.Rollout{}, &policy.Error{Field: "step", Msg: fmt.Sprintf("it says that something is %s", s.Step), Hint: "make it with `sallyport rollout`", Err: ErrOtherGrant}
	}
	one, ok := set.Rollout(s.Rollout)
	if !ok {
		return one, noRollout(s.Rollout)
	}
	if !set.MayRollOut(one, s.By) {
		return one, &policy.Error{Field: "by", Msg: fmt.Sprintf("%s is not among the operators of the roll-out %s", s.By, one.Name), Hint: "have one of spec.operators sign", Err: ErrNotYours}
	}
	if s.Digest != one.Plan() {
		return one, &policy.Error{Field: "digest", Msg: fmt.Sprintf("it is for another plan than the one that %s has on this node", one.Name),
			Hint: "wait until the node has the same resources, look at `sallyport rollout status`, and sign anew", Err: rollout.ErrOtherPlan}
	}
	return one, s.with(policy.UseRollout)
}

func noRollout(name string) error {
	return &policy.Error{Field: "rollout", Msg: fmt.Sprintf("no Rollout %q is in force on this node", name), Hint: "`sallyport rollout status` lists them", Err: ErrNoRollout}
}

// refusedRollout says what to do next.
func refusedRollout(err error) error {
	hint := "`sallyport rollout status` shows how it stands"
	switch {
	case errors.Is(err, rollout.ErrHalted):
		hint = "mend what broke, and then `sallyport rollout resume`"
	case errors.Is(err, rollout.ErrStale):
		hint = "sign anew; if you just did, set the clocks right, where you sign and on the node"
	}
	return &policy.Error{Field: "rollout", Msg: err.Error(), Hint: hint, Err: err}
}

// Halt lets no wave begin, of one roll-out or of all. It gives those that it stopped.
func (r *rollouts) Halt(ctx context.Context, name, why, actor string) (halted []string, err error) {
	r.change.Lock()
	defer r.change.Unlock()
	e := r.enforced()
	if e == nil {
		return nil, fmt.Errorf("halt: %w", ErrNoResources)
	}
	if _, ok := e.verified.Rollout(name); name != "" && !ok {
		return nil, noRollout(name)
	}
	for _, one := range e.verified.Rollouts() {
		if name != "" && one.Name != name {
			continue
		}
		next, err := rollout.Halt(rollout.Follow(one, r.state(one.Name)), rollout.Word{By: actor, Why: why}, r.clock.wall().Round(0))
		if err != nil {
			continue // no wave begins there as it is
		}
		if err := r.keep(ctx, one.Name, next, newEvent(stepHalted, actor, "roll-out "+one.Name+": "+why, r.clock)); err != nil {
			return halted, err
		}
		halted = append(halted, one.Name)
	}
	return halted, nil
}

// Run falls back where a budget is spent, and ends roll-outs whose last wave has held.
func (r *rollouts) Run(ctx context.Context) error {
	tick := time.NewTicker(rolloutTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.kick:
		case <-tick.C:
		}
		r.problems.report(problemRollouts, "", r.tend(ctx))
	}
}

// soon has Run look at once.
func (r *rollouts) soon() {
	select {
	case r.kick <- struct{}{}:
	default: // it has not looked yet
	}
}

func (r *rollouts) tend(ctx context.Context) error {
	e := r.enforced()
	if e == nil {
		return nil
	}
	r.change.Lock()
	defer r.change.Unlock()
	var errs []error
	for _, one := range e.verified.Rollouts() {
		before := rollout.Follow(one, r.state(one.Name))
		if next, done := rollout.Settle(one, before, r.clock.wall().Round(0)); done {
			errs = append(errs, r.keep(ctx, one.Name, next, newEvent(stepRolledOut, "agent", "roll-out "+one.Name+": "+next.Why, r.clock)))
			continue
		}
		errs = append(errs, r.fallBack(ctx, one, before))
	}
	return errors.Join(errs...)
}

// fallBack shadows the services of a roll-out whose budget is spent. r.change is held.
func (r *rollouts) fallBack(ctx context.Context, one policy.Rollout, s rollout.State) error {
	for _, service := range s.Enforced() {
		why := r.watch.spent(one, service)
		if why == "" {
			continue
		}
		next, changed := rollout.FallBack(s, service, rollout.Word{By: "agent", Why: service + ": " + why}, r.clock.wall().Round(0))
		if !changed {
			continue
		}
		event := newEvent(stepFellBack, "agent", fmt.Sprintf("roll-out %s: %s is shadowed: %s", one.Name, service, why), r.clock)
		event.Service = service
		if err := r.keep(ctx, one.Name, next, event); err != nil {
			return fmt.Errorf("%s of roll-out %s cannot fall back: %w", service, one.Name, err)
		}
		s = next
		r.alarm(alarmRollout, event.Why)
	}
	return nil
}

// lines tell of every roll-out, for status.
func (r *rollouts) lines(e *enforced) (lines []string) {
	for _, one := range e.verified.Rollouts() {
		s := rollout.Follow(one, r.state(one.Name))
		line := fmt.Sprintf("%s: wave %d of %d, %s", one.Name, s.Wave, len(one.Spec.Waves), s.Stands())
		if s.Why != "" {
			line += fmt.Sprintf(" since %s, by %s: %s", s.Changed.UTC().Format(time.RFC3339), s.By, oneLine(s.Why))
		}
		lines = append(lines, line)
	}
	return lines
}

// isTold tells whether Shadow has told that a client would be refused.
func isTold(s rollout.State, service string, client netip.Addr) bool {
	return slices.Contains(s.Told[service], client.Unmap())
}
