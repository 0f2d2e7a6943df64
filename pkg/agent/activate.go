package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// activation is a grant on its way to its paths.
type activation struct {
	envelope []byte
	answer   []byte  // the requester's, to a challenge of this node
	ask      *wanted // instead of both
	applied  bool    // its resource begins it, and no answer
	actor    string
	verified grant.Verified
	held     *held
	inTheWay []*held // of workloads
	recorded bool
	planned  []uint32 // slots, as they were recorded
	after    string   // grant that it takes new connections over from
}

// prove gives what is asked for, and who vouches for it.
func (a *activation) prove(keys []policy.Keyring, now time.Time) (grant.Verified, error) {
	if a.ask != nil {
		return a.ask.prove()
	}
	return grant.Verify(a.envelope, keys, now)
}

// activationStep is one step of an activation. A kill between any two leaves nothing open that is not recorded.
type activationStep struct {
	name string
	do   func(context.Context, *activation) error
}

// activationSteps are the order of invariant 5: record before effect.
func (g *grants) activationSteps() []activationStep {
	return []activationStep{
		{"authorise", g.authorise},
		{"record", g.record},
		{"give way", g.giveWay},
		{"map", g.openPaths},
		{"note slots", g.noteSlots},
	}
}

// Activate opens the paths of a signed grant, whose requester answered a challenge of this node. When it returns without
// error they are open, and that was durable before. A refusal is recorded, and changes nothing.
func (g *grants) Activate(ctx context.Context, envelope, answer []byte, actor string) (store.GrantRow, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	a := &activation{envelope: envelope, answer: answer, actor: actor}
	h, err := g.activate(ctx, a)
	if err != nil {
		return store.GrantRow{}, err
	}
	row := h.row
	row.Envelope = envelope
	row.Payload, err = json.Marshal(h.payload)
	return row, err
}

// activate takes the steps. g.mu is held.
func (g *grants) activate(ctx context.Context, a *activation) (*held, error) {
	for _, step := range g.activationSteps() {
		if err := step.do(ctx, a); err != nil {
			g.abandon(ctx, a, err)
			return nil, err
		}
	}
	g.events.count(stepActivated)
	g.problems.report(problemGrants, "activation", nil)
	g.log.Info("grant activated", "grant", a.held.row.ID, "service", a.held.payload.Service, "clients", a.held.payload.Addresses,
		"deadline", a.held.row.Deadline, "actor", a.actor)
	g.recorded()
	a.held.forget()
	return a.held, nil
}

// authorise decides whether the grant may be activated here and now, and fixes its deadline on both clocks.
func (g *grants) authorise(_ context.Context, a *activation) error {
	if err := g.refusePanic(); err != nil {
		return err
	}
	e := g.enforced()
	if e == nil {
		return fmt.Errorf("authorise: %w", ErrNoResources)
	}
	now, boot := g.clock.read()
	v, err := a.prove(e.set.Keyrings(), now)
	a.verified = v
	if err != nil {
		return err
	}
	p := v.Payload
	allowance, refused := g.allowed(v, e, now)
	answered, unanswered := g.answered(a, e)
	if err := errors.Join(g.beginsSo(a), p.CheckID(), p.CheckTime(now), p.CheckAudience(g.node), p.CheckPolicy(e.verified.Digest()), refused, unanswered,
		g.reviews.check(v), g.remembered(p, now)); err != nil {
		return err
	}
	service, _ := e.service(p.Service)
	a.held = &held{payload: p, service: service, policy: allowance.Policy}
	if a.ask != nil {
		a.held.holding = newHolding(p)
	}
	if a.inTheWay, err = g.overlap(a.held); err != nil {
		return err
	}
	if a.held.row, err = g.newRow(a, allowance, now, boot); err != nil {
		return err
	}
	if err := g.heed(a.held, now); err != nil {
		return err
	}
	if a.ask != nil || a.applied {
		return nil
	}
	return g.challenges.use(answered)
}

// giveWay ends grants that workloads hold, for one that people have signed: nothing can refuse that any more. A tick records an
// end that the disk does not take.
func (g *grants) giveWay(ctx context.Context, a *activation) error {
	p := a.held.payload
	var errs []error
	for _, h := range a.inTheWay {
		err := g.end(ctx, h, ending{grant: h.row.ID}.revoked("agent", "gives way to the grant "+p.ID+" of "+p.Requester))
		if err != nil && !errors.Is(err, errNotRecorded) {
			errs = append(errs, fmt.Errorf("end grant %s, which is in the way: %w", h.row.ID, err))
		}
	}
	return errors.Join(errs...)
}

// answered verifies that who asked for the grant wants it to begin, here and now. A workload says so by asking, and who signed a grant
// that begins by its resource has said so before.
func (g *grants) answered(a *activation, e *enforced) (grant.Challenge, error) {
	p := a.verified.Payload
	if a.ask != nil || a.applied {
		return grant.Challenge{}, nil
	}
	if len(a.answer) == 0 {
		return grant.Challenge{}, challengeRefused("%s has not answered this node's challenge", p.Requester)
	}
	s, err := g.hear(a.answer, e)
	if err != nil {
		return grant.Challenge{}, ofAnswer(err)
	}
	digest, err := p.Digest()
	if err != nil {
		return grant.Challenge{}, err
	}
	switch {
	case s.Step != grant.StepActivated || s.Digest != digest:
		return grant.Challenge{}, challengeRefused("the answer is about another grant")
	case s.By != p.Requester:
		return grant.Challenge{}, s.refuse("cannot begin what %s asked for", p.Requester)
	}
	facts := a.verified.Facts(nil, time.Time{})
	return s.Challenge, errors.Join(s.with(facts.UseOf(policy.UseRequest)), g.challenges.check(s.Challenge))
}

// ofAnswer tells what is wrong with an answer from what is wrong with the grant.
func ofAnswer(err error) error {
	var errs []error
	for _, e := range policy.Errors(err) {
		named := *e
		named.Field = "answer." + named.Field
		errs = append(errs, &named)
	}
	return errors.Join(errs...)
}

// allowed asks policy, with the node's own addresses as they are now.
func (g *grants) allowed(v grant.Verified, e *enforced, now time.Time) (policy.Allowance, error) {
	own, err := g.own(v.Payload.Addresses)
	if err != nil {
		return policy.Allowance{}, err
	}
	return e.set.CheckGrant(v.Facts(own, now))
}

// overlap refuses a grant that would share a client's sockets, service and port with one that is active: a path has one owner.
// Those that workloads hold are in the way of other workloads only: who breaks the glass does not wait for a job.
func (g *grants) overlap(n *held) (inTheWay []*held, err error) {
	for _, c := range n.clients() {
		for _, h := range g.serving[c] {
			switch {
			case !h.inTheWayOf(n):
			case n.holding != nil || h.holding == nil:
				return nil, fmt.Errorf("%w: %s to %s, by grant %s until %s", ErrOverlap, c.client, c.service, h.row.ID,
					h.row.Deadline.UTC().Format(time.RFC3339))
			case !slices.Contains(inTheWay, h):
				inTheWay = append(inTheWay, h)
			}
		}
	}
	return inTheWay, nil
}

// inTheWayOf tells whether an active grant of the same client and service has the same sockets and a port in common. Of the
// very grant the store knows that it was used, and says so.
func (h *held) inTheWayOf(n *held) bool {
	return h.row.ID != n.payload.ID && h.over == nil && h.payload.ClientPort == n.payload.ClientPort &&
		h.payload.Cgroup == n.payload.Cgroup && sharePort(n, h)
}

func sharePort(a, b *held) bool {
	ports := portsOf(b.payload, b.service)
	return slices.ContainsFunc(portsOf(a.payload, a.service), func(p uint16) bool { return slices.Contains(ports, p) })
}

// newRow is what is remembered of the grant. The deadline is converted here, once.
func (g *grants) newRow(a *activation, may policy.Allowance, now time.Time, boot time.Duration) (store.GrantRow, error) {
	p := a.verified.Payload
	payload, err := json.Marshal(p)
	if err != nil {
		return store.GrantRow{}, fmt.Errorf("keep payload: %w", err)
	}
	digest, err := p.Digest()
	if err != nil {
		return store.GrantRow{}, err
	}
	deadline := p.Deadline(now)
	if !may.Until.IsZero() && may.Until.Before(deadline) {
		deadline = may.Until
	}
	row := store.GrantRow{
		ID: p.ID, State: store.StateActive, Kind: string(p.Kind), Digest: digest, People: a.verified.People(), Envelope: a.envelope, Payload: payload, BootID: g.bootID,
		Activated: now, Deadline: deadline, DeadlineBoot: boot + deadline.Sub(now), NotAfter: p.NotAfter, Keep: p.NotAfter.Add(keepPeoples),
	}
	if a.ask != nil { // nobody has it in writing, to hand it in again
		row.NotAfter, row.Keep = time.Time{}, deadline.Add(keepWorkloads)
	}
	for _, s := range a.verified.Signers {
		row.Signers = append(row.Signers, s.KeyID)
	}
	return row, nil
}

// record makes the activation durable; the kernel knows nothing of it yet. The error wraps store.ErrReplayed for a grant
// that was used before.
func (g *grants) record(ctx context.Context, a *activation) error {
	a.planned = g.datapath.NextSlots(len(a.held.payload.Addresses))
	a.held.row.Slots = a.planned
	event, err := activatedEvent(a, g.clock)
	if err != nil {
		return err
	}
	notes, err := a.held.activationNotes()
	if err != nil {
		return err
	}
	if err := g.store.Activate(ctx, a.held.row, event, notes...); err != nil {
		return err
	}
	a.recorded = true
	g.take(a.held)
	g.reviews.note(a.held.row, a.held.payload, true)
	if !a.held.isProbe() {
		g.history.note(a.held.payload, a.held.row.Activated)
	}
	return nil
}

// openPaths opens one path for each client.
func (g *grants) openPaths(_ context.Context, a *activation) error {
	a.held.row.Slots = nil
	for _, client := range a.held.payload.Addresses {
		slot, err := g.openPath(datapath.Path{
			Grant: a.held.row.ID, Client: client, ServiceID: a.held.service.ID, Service: a.held.service.Name,
			Ports: portsOf(a.held.payload, a.held.service), Deadline: a.held.row.DeadlineBoot, Budget: budgetOf(a.held.payload),
			Ingress: ingressOf(a.held.payload), ClientPort: a.held.payload.ClientPort, Cgroup: a.held.payload.Cgroup, After: a.after,
		})
		if err != nil {
			return fmt.Errorf("open path for %s: %w", client, err)
		}
		a.held.row.Slots = append(a.held.row.Slots, slot)
	}
	return nil
}

// openPath takes a slot; when none is free, one that an ended path still holds for people to look at is given back first.
func (g *grants) openPath(p datapath.Path) (uint32, error) {
	slot, err := g.datapath.OpenPath(p)
	if !errors.Is(err, datapath.ErrPathsFull) {
		return slot, err
	}
	for ended := range g.ended {
		freed, err := g.freeSlot(ended)
		if err != nil {
			return 0, err
		}
		if freed {
			return g.datapath.OpenPath(p)
		}
	}
	return slot, err
}

// noteSlots corrects what was recorded of the slots. Mostly it was right: nobody else opens paths.
func (g *grants) noteSlots(ctx context.Context, a *activation) error {
	if slices.Equal(a.planned, a.held.row.Slots) {
		return nil
	}
	return g.store.SetSlots(ctx, a.held.row.ID, a.held.row.Slots)
}

// maxWhy bounds what one refusal adds to the store, in bytes: who asks for what is wrong in a thousand ways is told all of them, once.
const maxWhy = 1024

func inShort(why string) string {
	if len(why) <= maxWhy {
		return why
	}
	return strings.ToValidUTF8(why[:maxWhy], "") + "…"
}

// abandon undoes a failed activation: what is recorded ends, what was refused is recorded as refused.
func (g *grants) abandon(ctx context.Context, a *activation, cause error) {
	// The caller may be gone; what is begun is ended all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	why := inShort(oneLine(cause.Error()))
	g.log.Warn("grant refused", "grant", a.verified.Payload.ID, "why", why, "actor", a.actor)
	if a.recorded {
		e := ending{grant: a.held.row.ID, actor: "agent"}
		g.problems.report(problemGrants, "activation", g.end(ctx, a.held, e.as(stateEnded, stepRevoked, datapath.PathRevoked, why)))
		return
	}
	g.events.count(stepRefused)
	g.problems.report(problemGrants, "refusals", g.refuse(ctx, a, why))
	g.recorded()
}
