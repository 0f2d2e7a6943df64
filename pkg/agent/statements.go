package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// Steps of grant events that people take by a statement.
const (
	stepWithdrawn = "WITHDRAWN"
	stepDenied    = "DENIED"
	stepReviewed  = "REVIEWED"
	stepVouched   = "VOUCHED"
)

// stepsOf are the steps that State takes, and their events.
var stepsOf = map[grant.Step]string{grant.StepWithdrawn: stepWithdrawn, grant.StepDenied: stepDenied, grant.StepReviewed: stepReviewed}

// What callers may match.
var (
	// ErrNotYours says that somebody may not say this.
	ErrNotYours = errors.New("not for this person to say")
	// ErrNotEnded says that a grant is reviewed after its end.
	ErrNotEnded = errors.New("grant has not ended")
	// ErrOtherGrant says that a statement is about another grant than the one it came with.
	ErrOtherGrant = errors.New("statement about another grant")
)

// said is a statement whose signatures were verified.
type said struct {
	grant.Statement
	envelope []byte
	signers  []policy.Signer // keys of the person who says so
}

// hear verifies a statement. Somebody on a deny list is not heard.
func (g *grants) hear(statement []byte, e *enforced) (said, error) {
	now := g.clock.wall()
	s, signers, err := grant.VerifyStatement(statement, e.set.Keyrings(), now)
	if err != nil {
		return said{}, err
	}
	heard := said{s, statement, signers}
	if l, denied := e.set.DeniedPerson(s.By, now); denied {
		return said{}, heard.refuse("is denied by the list %q: %s", l.Name, l.Spec.Reason)
	}
	return heard, nil
}

// with holds that one of the keys is good for a use.
func (s said) with(use policy.Use) error {
	if slices.ContainsFunc(s.signers, func(by policy.Signer) bool { return by.May(use) }) {
		return nil
	}
	return s.refuse("has signed with no key of the use %s", use)
}

func (s said) refuse(format string, args ...any) error {
	return &policy.Error{Field: "by", Msg: s.By + " " + fmt.Sprintf(format, args...), Hint: "have it said by somebody who may: the help of `sallyport grant withdraw`, deny, review and vouch says who", Err: ErrNotYours}
}

// subject is the grant that a statement is about.
type subject struct {
	payload grant.Payload
	people  []string        // whose signatures are on it, also those that counted for nothing, where the node activated it
	row     *store.GrantRow // nil where it did not
	ended   time.Time       // wall clock; zero while it is active
}

func (s subject) facts() policy.GrantFacts {
	v := grant.Verified{Payload: s.payload}
	for _, p := range s.people {
		v.Signers = append(v.Signers, policy.Signer{Person: p})
	}
	return v.Facts(nil, time.Time{})
}

// State takes what somebody says of a grant: that it is withdrawn, denied or reviewed. When it returns without error that
// is durable and final, and a withdrawn or denied grant has no open path. envelope is the grant's; none is needed where the
// node activated it. It gives the grant as it is then, or nil where the node never activated it.
func (g *grants) State(ctx context.Context, statement, envelope []byte, actor string) (*store.GrantRow, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	e := g.enforced()
	if e == nil {
		return nil, fmt.Errorf("take statement: %w", ErrNoResources)
	}
	s, err := g.hear(statement, e)
	if err != nil {
		return nil, err
	}
	about, err := g.subject(ctx, s, envelope)
	if err != nil {
		return nil, err
	}
	if err := g.entitled(s, about, e.set); err != nil {
		return nil, err
	}
	if err := g.recordStatement(ctx, s, about, actor); err != nil {
		return nil, err
	}
	g.log.Info("statement taken", "grant", s.Grant, "step", s.Step, "by", s.By, "actor", actor)
	g.events.count(stepsOf[s.Step])
	g.kick()
	if s.Step == grant.StepReviewed {
		g.reviews.close(s.Grant)
		return about.row, nil
	}
	return about.row, g.endFinal(ctx, about, s.row().String())
}

// subject finds the grant: what the node activated, or else what came with the statement.
func (g *grants) subject(ctx context.Context, s said, envelope []byte) (subject, error) {
	row, err := g.store.Grant(ctx, s.Grant)
	if err == nil && row.Digest == s.Digest {
		about := subject{people: row.People, row: &row}
		if e := g.enforced(); e != nil { // a key may have come to the keyrings since
			about.people = append(about.people, grant.SignedBy(row.Envelope, e.set.Keyrings())...)
		}
		about.ended, err = g.endedAt(ctx, row)
		return about, errors.Join(err, json.Unmarshal(row.Payload, &about.payload))
	}
	if err != nil && !errors.Is(err, store.ErrNoGrant) {
		return subject{}, err
	}
	if len(envelope) == 0 {
		return subject{}, &policy.Error{Field: "grant", Msg: fmt.Sprintf("this node never activated the grant %s", s.Grant), Hint: "name the grant's file, too", Err: ErrNoGrant}
	}
	p, err := grant.Peek(envelope) // nobody can make another one of this digest
	if err != nil {
		return subject{}, err
	}
	if digest, err := grant.Digest(envelope); err != nil || digest != s.Digest || p.ID != s.Grant {
		return subject{}, &policy.Error{Field: "digest", Msg: "it is about another grant than the one that came with it", Hint: "hand in the very grant that it was made for", Err: errors.Join(ErrOtherGrant, err)}
	}
	return subject{payload: p}, nil
}

// entitled tells whether the person may say this of the grant.
func (g *grants) entitled(s said, about subject, set *policy.Set) error {
	facts := about.facts()
	switch s.Step {
	case grant.StepWithdrawn:
		if s.By != about.payload.Requester {
			return s.refuse("did not ask for it: %s did", about.payload.Requester)
		}
		return s.with(facts.UseOf(policy.UseRequest))
	case grant.StepDenied:
		if !set.MayDeny(facts, s.By) {
			return s.refuse("could not approve it, and so cannot deny it")
		}
		return s.with(facts.UseOf(policy.UseApprove))
	case grant.StepReviewed:
		return errors.Join(entitledToReview(s, about, facts, set), g.reviewedInTime(s, about))
	}
	return &policy.Error{Field: "step", Msg: fmt.Sprintf("a statement that something is %s is no word about a grant alone", s.Step),
		Hint: "hand it in with `sallyport grant activate` or `sallyport grant vouch`", Err: ErrOtherGrant}
}

func entitledToReview(s said, about subject, facts policy.GrantFacts, set *policy.Set) error {
	if about.row == nil {
		return &policy.Error{Field: "grant", Msg: "this node never activated it", Hint: "there is nothing to review", Err: ErrNoGrant}
	}
	if about.row.State == store.StateActive {
		return &policy.Error{Field: "grant", Msg: "it is active until " + about.row.Deadline.Format(time.RFC3339), Hint: "wait for its end, or revoke it: `sallyport grant revoke`", Err: ErrNotEnded}
	}
	if !set.MayReview(facts, s.By) {
		return s.refuse("may not review it: no policy names them for it, or they had a part in it")
	}
	return s.with(policy.UseApprove)
}

// reviewedInTime refuses a review that was signed before there was an end to look at, or with a clock that is ahead: one that
// was kept ready would be no look at what was done.
func (g *grants) reviewedInTime(s said, about subject) error {
	now := g.clock.wall()
	switch {
	case about.ended.IsZero(): // it is refused for that
		return nil
	case s.At.Before(about.ended):
		return &policy.Error{Field: "at", Msg: fmt.Sprintf("%s signed it at %s, and by this node's clock the grant ended at %s", s.By, exactly(s.At), exactly(about.ended)),
			Hint: "look at what was done and sign anew; if you did, the clock where you sign is behind", Err: ErrNotEnded}
	case s.At.Sub(now) > vouchSkew:
		return &policy.Error{Field: "at", Msg: fmt.Sprintf("%s signed it at %s, and this node's clock says %s", s.By, exactly(s.At), exactly(now)),
			Hint: "set the clock where you sign right, and sign anew", Err: ErrClockWrong}
	}
	return nil
}

func exactly(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func (s said) row() store.StatementRow {
	return store.StatementRow{Digest: s.Digest, Step: string(s.Step), Grant: s.Grant, By: s.By, At: s.At, Why: s.Why, Envelope: s.envelope}
}

func (g *grants) recordStatement(ctx context.Context, s said, about subject, actor string) error {
	e := newEvent(stepsOf[s.Step], actor, s.row().String(), g.clock)
	p := about.payload
	e.Grant, e.Kind, e.Requester, e.Service, e.Clients, e.Envelope = p.ID, string(p.Kind), p.Requester, p.Service, texts(p.Addresses), s.envelope
	for _, by := range s.signers {
		e.Signers = append(e.Signers, by.KeyID)
	}
	event, err := encodeEvent(e)
	if err != nil {
		return err
	}
	return g.store.State(ctx, s.row(), event)
}

// endFinal ends the grant if it is active. g.mu is held.
func (g *grants) endFinal(ctx context.Context, about subject, why string) error {
	h, ok := g.active[about.payload.ID]
	if !ok || about.row == nil {
		return nil
	}
	err := g.end(ctx, h, ending{grant: h.row.ID}.revoked("agent", why))
	about.row.State, about.row.EndedWhy = h.row.State, h.row.EndedWhy
	return err
}

// final gives what was said against grants, by their digests.
func (g *grants) final(ctx context.Context) (map[string]store.StatementRow, error) {
	return g.statements(ctx, func(s store.StatementRow) bool { return s.Step != store.StepReviewed })
}

// reviewed gives the reviews of grants, by their digests.
func (g *grants) reviewed(ctx context.Context) (map[string]store.StatementRow, error) {
	return g.statements(ctx, func(s store.StatementRow) bool { return s.Step == store.StepReviewed })
}

func (g *grants) statements(ctx context.Context, which func(store.StatementRow) bool) (map[string]store.StatementRow, error) {
	all, err := g.store.Statements(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[string]store.StatementRow)
	for _, s := range all {
		if which(s) {
			out[s.Digest] = s
		}
	}
	return out, nil
}
