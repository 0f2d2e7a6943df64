package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// vouchSkew is how far the clock of whoever vouches may be from the node's.
const vouchSkew = 5 * time.Minute

// rememberEvery is how often the time is made durable.
const rememberEvery = time.Minute

// machineFile has the id of the installation (machine-id(5)). A container may have none.
const machineFile = "/etc/machine-id"

var (
	// ErrClockWrong says that the node's clock is not what the one who vouches for it says.
	ErrClockWrong = errors.New("clock is still wrong")
	// ErrForgotten says that a grant could have been activated when the node may have forgotten it.
	ErrForgotten = errors.New("grant from before the node's memory")
)

func machineID() string {
	id, err := os.ReadFile(machineFile)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

// Vouch takes somebody's word that the node's clock is right and that its records are its own, in answer to a challenge.
// It is durable when it returns.
func (g *grants) Vouch(ctx context.Context, statement []byte, actor string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	e := g.enforced()
	if e == nil {
		return fmt.Errorf("take statement: %w", ErrNoResources)
	}
	s, err := g.hear(statement, e)
	if err != nil {
		return err
	}
	if err := g.entitledToVouch(s); err != nil {
		return err
	}
	now := g.clock.wall().Round(0)
	event := newEvent(stepVouched, actor, fmt.Sprintf("%s vouches for clock and records: %s", s.By, s.Why), g.clock)
	event.Envelope = s.envelope
	for _, by := range s.signers {
		event.Signers = append(event.Signers, by.KeyID)
	}
	entry, err := encodeEvent(event)
	if err != nil {
		return err
	}
	if err := g.challenges.use(s.Challenge); err != nil {
		return err
	}
	floor := now
	if s.At.After(floor) {
		floor = s.At
	}
	if err := g.store.Vouch(ctx, g.owner, now, floor, entry); err != nil {
		return err
	}
	g.log.Info("somebody vouches for clock and records", "by", s.By, "actor", actor)
	g.events.count(stepVouched)
	g.problems.report(problemMemory, "", nil)
	g.kick()
	return nil
}

func (g *grants) entitledToVouch(s said) error {
	if s.Step != grant.StepVouched {
		return &policy.Error{Field: "step", Msg: fmt.Sprintf("it says that something is %s", s.Step), Hint: "make it with `sallyport grant vouch`", Err: ErrOtherGrant}
	}
	if err := s.with(policy.UseResources); err != nil {
		return err
	}
	if now := g.clock.wall(); now.Sub(s.At).Abs() > vouchSkew {
		return &policy.Error{Field: "at", Msg: fmt.Sprintf("the node's clock says %s, and that of %s said %s", now.UTC().Format(time.RFC3339), s.By, s.At.Format(time.RFC3339)),
			Hint: "set the node's clock right first", Err: ErrClockWrong}
	}
	return g.challenges.check(s.Challenge)
}

// remember makes the time durable each minute, and tells what the node's memory lacks. seen is the wall clock's time at a look,
// and steady how long it had gone on then without a jump: a time that was set by mistake, and set back at once, is not worth
// remembering.
func (g *grants) remember(ctx context.Context, seen time.Time, steady time.Duration) {
	memory := g.store.Memory()
	err := memory.Check(g.clock.wall())
	if err == nil && steady >= rememberEvery && seen.Sub(memory.Latest) >= rememberEvery {
		err = g.store.See(ctx, seen)
	}
	if err != nil {
		err = fmt.Errorf("no grant is activated: %w", err)
		if hint := hintFor(err); hint != "" {
			err = fmt.Errorf("%w (%s)", err, hint)
		}
	}
	g.problems.report(problemMemory, "", err)
}

// remembered tells whether the node would know if the grant had been used before. One that was made before the floor of
// its memory, or could begin before it, may have been; the node's clock may have been wrong then, so both count.
func (g *grants) remembered(p grant.Payload, now time.Time) error {
	memory := g.store.Memory()
	if err := memory.Check(now); err != nil {
		return err
	}
	if p.NotBefore.Before(memory.Floor) || p.Made().Before(memory.Floor) {
		return &policy.Error{Field: "notBefore", Msg: fmt.Sprintf("made at %s to begin at %s, and the node may have forgotten what was used before %s",
			p.Made().Format(time.RFC3339), p.NotBefore.Format(time.RFC3339), memory.Floor.Format(time.RFC3339)),
			Hint: "issue a new one that begins after that: --not-before", Err: ErrForgotten}
	}
	return nil
}

// restored tells why nothing that the store calls active may go on.
func restored(m store.Memory) string {
	if m.Doubt == "" {
		return ""
	}
	return "the node's records are in doubt: " + m.Doubt
}
