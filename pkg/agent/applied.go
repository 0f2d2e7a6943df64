package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/kube"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

const (
	// noteOfApplied is where the store has the time since which the node knows which grants of its cluster were used.
	noteOfApplied = "applied/since"
	// actorCluster is who begins a grant by its resource, and ends one whose resource is gone: who that was only the API server knows.
	// One actor for all of them bounds what refusals add to the store.
	actorCluster = "kubernetes"
	whyDeleted   = "its BypassGrant was deleted"
	// applyAgain is the pause after which a grant is tried again that something else than itself stands in the way of.
	applyAgain = 30 * time.Second
)

// applied makes the node's grants follow the BypassGrants of its cluster: what comes is activated, and what is gone ends. What was
// used is never activated again. Owned by Run.
type applied struct {
	source  *kube.Source
	grants  *grants
	clock   clock
	kick    chan struct{}
	refused map[string]appliedRefusal // by the UID of the resource
}

// appliedRefusal is why a grant was not activated. It is not tried again before something is another.
type appliedRefusal struct {
	err    error
	digest string        // of the set in force
	again  time.Duration // boot time at which it is worth a try; 0: never
}

func newApplied(source *kube.Source, g *grants, c clock) *applied {
	return &applied{source: source, grants: g, clock: c, kick: make(chan struct{}, 1), refused: make(map[string]appliedRefusal)}
}

// poke asks Run to look: a grant has ended, or other resources are in force.
func (a *applied) poke() {
	if a == nil {
		return
	}
	select {
	case a.kick <- struct{}{}:
	default:
	}
}

// Run follows until ctx ends. Without the API server nothing begins, and what is active ends on time.
func (a *applied) Run(ctx context.Context) error {
	again := time.NewTicker(applyAgain)
	defer again.Stop()
	for {
		changed := a.source.Changed()
		a.follow(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-a.kick:
		case <-again.C:
		}
	}
}

// follow looks at all of them once. What is gone ends before anything begins: it may be in the way.
func (a *applied) follow(ctx context.Context) {
	all, err := a.source.Grants()
	if err != nil {
		return // nobody knows what is gone; the watch of the resources tells what is wrong
	}
	here := make(map[string]bool, len(all))
	for _, r := range all {
		here[r.UID] = true
	}
	err = a.endGone(ctx, carried(all))
	a.grants.problems.report(problemGrants, "cluster", errors.Join(err, a.grants.rememberApplied(ctx)))
	for uid := range a.refused {
		if !here[uid] {
			delete(a.refused, uid)
		}
	}
	for _, r := range all {
		a.source.Tell(r.Name, a.take(ctx, r))
	}
}

// carried are the digests of the grants that are there: a resource that only says the same id is another one's.
func carried(all []kube.Grant) map[string]bool {
	there := make(map[string]bool, len(all))
	for _, r := range all {
		p, err := grant.Peek(r.Envelope)
		if err != nil {
			continue
		}
		if digest, err := p.Digest(); err == nil {
			there[digest] = true
		}
	}
	return there
}

// endGone ends the active grants that began by a resource that is not there any more.
func (a *applied) endGone(ctx context.Context, there map[string]bool) error {
	var over []doomed
	for _, h := range a.grants.every() {
		if h.payload.Begin == grant.BeginApplied && !there[h.row.Digest] {
			over = append(over, doomed{h, ending{grant: h.row.ID}.revoked(actorCluster, whyDeleted)})
		}
	}
	err := a.grants.endMany(ctx, over)
	if store.Unwritable(err) {
		err = nil // they are closed, and a tick records it
	}
	return err
}

// take activates the grant of a resource, if it was never used, and says what became of it.
func (a *applied) take(ctx context.Context, r kube.Grant) kube.GrantWord {
	p, err := grant.Peek(r.Envelope)
	if err != nil {
		return refusedWord(r, err)
	}
	row, err := a.grants.store.Grant(ctx, p.ID)
	if errors.Is(err, store.ErrNoGrant) {
		return a.begin(ctx, r, p)
	}
	if digest, wrong := p.Digest(); err == nil && (wrong != nil || digest != row.Digest) {
		err = fmt.Errorf("%w: another grant has the id %s", store.ErrOther, p.ID)
	}
	if err != nil {
		return refusedWord(r, err)
	}
	return usedWord(r, row, p)
}

func (a *applied) begin(ctx context.Context, r kube.Grant, p grant.Payload) kube.GrantWord {
	digest := ""
	if e := a.grants.enforced(); e != nil {
		digest = e.verified.Digest()
	}
	now := a.clock.boot()
	before, tried := a.refused[r.UID]
	if tried && before.digest == digest && (before.again == 0 || now < before.again) {
		return refusedWord(r, before.err)
	}
	row, err := a.grants.Apply(ctx, r.Envelope, actorCluster)
	if err != nil {
		a.refused[r.UID] = appliedRefusal{err: err, digest: digest, again: tryAgain(err, now)}
		return refusedWord(r, err)
	}
	delete(a.refused, r.UID)
	return usedWord(r, row, p)
}

// tryAgain is the boot time at which a refused grant is worth a try, with nothing changed but what was in its way.
func tryAgain(err error, now time.Duration) time.Duration {
	for _, passing := range []error{grant.ErrNotYet, ErrOverlap, ErrPanic, ErrNoResources} {
		if errors.Is(err, passing) {
			return now + applyAgain
		}
	}
	if store.Unwritable(err) {
		return now + applyAgain
	}
	return 0
}

// refusedWord says why a grant has opened nothing. Of what was not verified it tells nothing.
func refusedWord(r kube.Grant, err error) kube.GrantWord {
	return kube.GrantWord{Generation: r.Generation,
		Verified: kube.Answer{Reason: reasonOf(err), Message: plainLines(inWords(err))}, Active: kube.Answer{Reason: "Refused"}}
}

// usedWord says how a grant stands that this node has verified and used.
func usedWord(r kube.Grant, row store.GrantRow, p grant.Payload) kube.GrantWord {
	w := kube.GrantWord{Generation: r.Generation, ID: p.ID, Service: p.Service, Requester: p.Requester, Until: row.Deadline,
		Approvers: slices.DeleteFunc(slices.Clone(row.People), func(person string) bool { return person == p.Requester }),
		Verified:  kube.Answer{Is: true, Reason: "Signed"}}
	if row.State == store.StateActive {
		w.Active = kube.Answer{Is: true, Reason: "Open", Message: "until " + row.Deadline.UTC().Format(time.RFC3339)}
		return w
	}
	w.Active = kube.Answer{Reason: "Ended"}
	w.Ended = &kube.Answer{Is: true, Reason: wordOf(row.State), Message: row.EndedWhy}
	return w
}

// wordOf makes a reason of a state: active is Active.
func wordOf(state string) string {
	if state == "" {
		return "Unknown"
	}
	return string(state[0]-'a'+'A') + state[1:]
}

// reasonOf is a refusal in one word.
func reasonOf(err error) string {
	for _, known := range []struct {
		is   error
		word string
	}{
		{grant.ErrUnknownKey, "UnknownKey"}, {grant.ErrSignature, "BadSignature"}, {grant.ErrMalformed, "Malformed"},
		{grant.ErrAudience, "OtherNode"}, {grant.ErrNotYet, "NotYet"}, {grant.ErrExpired, "Expired"},
		{store.ErrReplayed, "Used"}, {store.ErrOther, "OtherGrant"}, {ErrForgotten, "MaybeUsed"}, {ErrBegin, "BeginsOtherwise"},
		{ErrOverlap, "Overlap"}, {ErrPanic, "Panic"}, {policy.ErrRefused, "PolicyRefuses"},
	} {
		if errors.Is(err, known.is) {
			return known.word
		}
	}
	return "Refused"
}

// ErrBegin says that a grant begins by something else than what came.
var ErrBegin = errors.New("the grant begins otherwise")

// Apply opens the paths of a signed grant that its resource begins. It is as Activate, but nobody answers a challenge: who signed the
// grant has said so.
func (g *grants) Apply(ctx context.Context, envelope []byte, actor string) (store.GrantRow, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	h, err := g.activate(ctx, &activation{envelope: envelope, applied: true, actor: actor})
	if err != nil {
		return store.GrantRow{}, err
	}
	return h.row, nil
}

// beginsSo tells whether a grant may begin as it does now.
func (g *grants) beginsSo(a *activation) error {
	p := a.verified.Payload
	switch {
	case a.applied && p.Begin != grant.BeginApplied:
		return &policy.Error{Field: "begin", Msg: "it begins when " + p.Requester + " answers the node's challenge, and by no resource",
			Hint: "activate it with `sallyport grant activate`, or have one signed that says so: `sallyport grant issue --on-apply`", Err: ErrBegin}
	case !a.applied && p.Begin == grant.BeginApplied:
		return &policy.Error{Field: "begin", Msg: "it begins by its BypassGrant in the cluster, and by nobody's answer",
			Hint: "apply that, or issue one without --on-apply", Err: ErrBegin}
	case a.applied && (g.appliedSince.IsZero() || p.NotBefore.Before(g.appliedSince) || p.Made().Before(g.appliedSince)):
		return &policy.Error{Field: "notBefore", Msg: fmt.Sprintf("made at %s to begin at %s, and this node knows what was used since %s", p.Made().Format(time.RFC3339),
			p.NotBefore.Format(time.RFC3339), g.appliedSince.Format(time.RFC3339)), Hint: "issue a new one that begins after that: --not-before", Err: ErrForgotten}
	}
	return nil
}

// rememberApplied makes durable since when the node knows which grants of its cluster were used: with its state gone it would not know
// of one that has its resource still. Before that is durable none begins.
func (g *grants) rememberApplied(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.appliedSince.IsZero() {
		return nil
	}
	notes, err := g.store.Notes(ctx, noteOfApplied)
	if err != nil {
		return err
	}
	if len(notes) == 1 {
		return g.appliedSince.UnmarshalText(notes[0].Data)
	}
	now := g.clock.wall().UTC()
	data, err := now.MarshalText()
	if err == nil {
		err = g.store.Keep(ctx, []store.Note{{Name: noteOfApplied, Data: data}})
	}
	if err == nil {
		g.appliedSince = now
	}
	return err
}
