package agent

import (
	"net/netip"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// newEvent begins a grant event at the present moment.
func newEvent(step, actor, why string, c clock) *api.GrantEvent {
	wall, boot := c.read()
	return &api.GrantEvent{Step: step, Actor: actor, Why: why, Time: timestamppb.New(wall), Boot: durationpb.New(boot)}
}

func activatedEvent(a *activation, c clock) ([]byte, error) {
	e := newEvent(stepActivated, a.actor, a.verified.Payload.Reason, c)
	describe(e, a.held)
	e.Envelope = a.envelope
	return encodeEvent(e)
}

// refusedEvent tells of an envelope that was not accepted. Only what a signature vouches for is told of its content.
func refusedEvent(a *activation, why string, c clock) *api.GrantEvent {
	e := newEvent(stepRefused, a.actor, why, c)
	p := a.verified.Payload
	e.Grant, e.Kind, e.Requester, e.Service, e.Clients = p.ID, string(p.Kind), p.Requester, p.Service, texts(p.Addresses)
	for _, s := range a.verified.Signers {
		e.Signers = append(e.Signers, s.KeyID)
	}
	return e
}

func (g *grants) endEvent(h *held, end ending) ([]byte, error) {
	e := newEvent(end.step, end.actor, end.why, g.clock)
	describe(e, h)
	return encodeEvent(e)
}

func describe(e *api.GrantEvent, h *held) {
	e.Grant, e.Kind, e.Requester, e.Service, e.Clients = h.row.ID, h.row.Kind, h.payload.Requester, h.payload.Service, texts(h.payload.Addresses)
	e.Signals = h.limits.Reasons
	e.Deadline, e.Slots, e.Signers = timestamppb.New(h.row.Deadline), h.row.Slots, h.row.Signers
}

func texts(addrs []netip.Addr) (out []string) {
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return out
}

// timestamp leaves out a time that was never set.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// span leaves out a duration that was never set.
func span(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

// describeRow is a stored grant on the wire.
func describeRow(row store.GrantRow, p grant.Payload) *api.Grant {
	return &api.Grant{
		IdleTimeout: span(p.IdleTimeout),
		Id:          row.ID, State: row.State, Requester: p.Requester, Reason: p.Reason, Ticket: p.Ticket, Service: p.Service,
		Clients: texts(p.Addresses), Activated: timestamp(row.Activated), Deadline: timestamp(row.Deadline), Slots: row.Slots,
		Signers: row.Signers, Kind: row.Kind, Digest: row.Digest, People: row.People, EndedWhy: row.EndedWhy, Budget: describeBudget(budgetOf(p)),
	}
}

// showLimits shows what signals took from a grant, and what they said.
func showLimits(g *api.Grant, l limits) {
	g.Signals = l.Reasons
	if !l.End.IsZero() && l.End.Before(g.GetDeadline().AsTime()) {
		g.Deadline = timestamp(l.End)
	}
	if l.Budget != (policy.Budget{}) {
		g.Budget = describeBudget(budgetOf(grant.Payload{Budget: l.Budget}))
	}
}

// encodeEvent is the form in which the store keeps an event and audit sends it.
func encodeEvent(e *api.GrantEvent) ([]byte, error) { return audit.GrantEntry(e) }
