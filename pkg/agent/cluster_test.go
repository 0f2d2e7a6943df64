package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/kube"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/sallyport-dev/sallyport/test/loosen"
)

// asInCluster gives the documents of a file as an API server has them.
func asInCluster(t *testing.T, text string) (all []kube.Resource) {
	t.Helper()
	for part := range strings.SplitSeq(text, "---\n") {
		var d struct {
			Kind     string
			Metadata struct{ Name string }
			Spec     any
		}
		must(t, yaml.Unmarshal([]byte(part), &d))
		plain, err := json.Marshal(d.Spec)
		must(t, err)
		must(t, json.Unmarshal(plain, &d.Spec))
		all = append(all, kube.Resource{Kind: d.Kind, Name: d.Metadata.Name, Generation: 3, Spec: d.Spec})
	}
	return all
}

// TestSetOfACluster: what an API server has is the same set as in files, to the digest that is signed; and an error says where.
func TestSetOfACluster(t *testing.T) {
	text := loosen.InForce(newSigner(t).key.Public().String())
	files, err := policy.Parse("x", []byte(text))
	must(t, err)
	all := asInCluster(t, text)
	slices.Reverse(all) // there is no order
	set, err := setOf(all)
	must(t, err)
	if set.Digest() != files.Digest() {
		t.Errorf("in the cluster:\n%s\nin files:\n%s", set.YAML(), files.YAML())
	}
	all[0].Spec.(map[string]any)["unheard"] = "of"
	_, err = setOf(all)
	if want := all[0].Origin() + ": spec.unheard: unknown key"; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
	if _, err := setOf(nil); err == nil || !contains(err.Error(), "kubernetes: no ProtectedService") {
		t.Errorf("an empty cluster: %v", err)
	}
}

// TestVersionComesBeforeItsSet: one by one, a version counts once all that was signed with it is there. What is tighter counts at once.
func TestVersionComesBeforeItsSet(t *testing.T) {
	o := newOffice(t)
	parse := func(text string) *policy.Set {
		set, err := policy.Parse("x", []byte(text))
		must(t, err)
		return set
	}
	first := loosen.InForce(o.carol.key.Public().String())
	last := parse(first)
	wanted := parse(strings.NewReplacer("version: 4", "version: 5", "maxDuration: 15m", "maxDuration: 16m").Replace(first))
	var envelope []byte
	for _, s := range []signer{o.carol, o.pinned} {
		var err error
		envelope, err = grant.SignResources(t.Context(), wanted, envelope, s.key)
		must(t, err)
	}
	signed := &signedSets{name: "all", pinned: []policy.PublicKey{o.pinned.key.Public()}, now: time.Now}
	of := func(set *policy.Set) offer {
		return offer{set: set, piecemeal: true, signedAt: kube.Where, signatures: func() ([]byte, error) { return envelope, nil }}
	}
	early := parse(strings.NewReplacer("version: 4", "version: 5", "maxDuration: 15m", "maxDuration: 14m").Replace(first))
	set, err := signed.admit(last, of(early))
	if err != nil || set.Version() != 4 || set.BypassPolicies()[0].Spec.MaxDuration.String() != "14m" {
		t.Fatalf("the version alone, and something tighter: %v, version %d", err, set.Version())
	}
	if set, err = signed.admit(set, of(wanted)); err != nil || set.Digest() != wanted.Digest() {
		t.Errorf("all of it: %v", err)
	}
	if _, err := signed.admit(set, of(parse(strings.Replace(first, "maxDuration: 15m", "maxDuration: 17m", 1)))); !errors.Is(err, ErrLooser) {
		t.Errorf("looser than signed: %v", err)
	}
}

// TestVerdicts: the resource that is wrong is told so, and nobody else is.
func TestVerdicts(t *testing.T) {
	text := loosen.InForce(newSigner(t).key.Public().String())
	all := asInCluster(t, text)
	inForce, err := setOf(all)
	must(t, err)
	for _, r := range all {
		if v, judged := verdictOf(r, inForce, nil); !judged || !v.Accepted || v.Generation != 3 {
			t.Errorf("%s: %+v, %v", r.Origin(), v, judged)
		}
	}
	wrong := fmt.Errorf("wrapped: %w", &policy.Error{File: all[1].Origin(), Field: "spec.ports[0]", Msg: "is wrong", Hint: "mend it"})
	for i, r := range all {
		v, judged := verdictOf(r, inForce, wrong)
		if judged != (i == 1) || judged && (v.Accepted || v.Reason != "Invalid" || !contains(v.Message, "spec.ports[0]: is wrong", "mend it")) {
			t.Errorf("%s: %+v, %v", r.Origin(), v, judged)
		}
	}
	i := slices.IndexFunc(all, func(r kube.Resource) bool { return r.Kind == policy.KindResourceSet })
	all[i].Spec.(map[string]any)["version"] = float64(9)
	if v, judged := verdictOf(all[i], inForce, nil); !judged || v.Accepted || v.Reason != "NotSigned" {
		t.Errorf("a version that does not count: %+v", v)
	}
}

// TestDamagedVerifiedSet: a set that is valid and not the one that was kept is not begun with.
func TestDamagedVerifiedSet(t *testing.T) {
	yaml := []byte("kind: X\n")
	must(t, checkSum("f", summed(yaml)))
	must(t, checkSum("f", yaml)) // of an older agent
	if err := checkSum("f", []byte(strings.Replace(string(summed(yaml)), "X", "Y", 1))); err == nil || !contains(err.Error(), "f:1: is damaged") {
		t.Errorf("%v", err)
	}
}

func (l *life) applied(t *testing.T, change func(*grant.Payload)) (envelope []byte, id string) {
	envelope = l.signer.envelope(t, func(p *grant.Payload) {
		p.NotBefore, p.Begin = time.Now().UTC(), grant.BeginApplied
		if change != nil {
			change(p)
		}
	})
	p, err := grant.Peek(envelope)
	must(t, err)
	return envelope, p.ID
}

// TestAppliedGrants: a resource begins what says so and nothing else, once; when it is gone the path ends, and a node that has forgotten
// what was used begins nothing from before.
func TestAppliedGrants(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	envelope, _ := l.applied(t, nil)
	if _, err := l.Apply(t.Context(), envelope, "kubernetes"); !errors.Is(err, ErrForgotten) {
		t.Errorf("before it is known what was used: %v", err)
	}
	must(t, l.rememberApplied(t.Context()))
	if _, err := l.Apply(t.Context(), envelope, "kubernetes"); !errors.Is(err, ErrForgotten) {
		t.Errorf("made before: %v", err)
	}
	if _, err := l.Apply(t.Context(), l.signer.envelope(t, nil), "kubernetes"); !errors.Is(err, ErrBegin) {
		t.Errorf("one that wants an answer: %v", err)
	}
	envelope, id := l.applied(t, nil)
	if _, err := l.Activate(t.Context(), envelope, "uid:0"); !errors.Is(err, ErrBegin) {
		t.Errorf("answered: %v", err)
	}
	if row, err := l.Apply(t.Context(), envelope, "kubernetes"); err != nil || row.State != store.StateActive {
		t.Fatalf("%v, %v", row.State, err)
	}
	if _, err := l.Apply(t.Context(), envelope, "kubernetes"); !errors.Is(err, store.ErrReplayed) {
		t.Errorf("again: %v", err)
	}
	a := newApplied(nil, l.grants, l.grants.clock)
	must(t, a.endGone(t.Context(), carried([]kube.Grant{{Envelope: envelope}})))
	if _, open := l.states(); open[id] != 1 {
		t.Errorf("ended although its resource is there: %v", open)
	}
	forged, _ := l.applied(t, func(p *grant.Payload) { p.ID, p.Reason = id, "to keep it open" })
	must(t, a.endGone(t.Context(), carried([]kube.Grant{{Envelope: forged}, {Envelope: []byte("nonsense")}})))
	if states, open := l.states(); states[id] != store.StateRevoked || len(open) != 0 {
		t.Errorf("its resource is gone: %v, open %v", states, open)
	}
	events := l.storedEvents()
	if e := events[len(events)-1]; e.GetActor() != actorCluster || e.GetWhy() != whyDeleted {
		t.Errorf("%v", e)
	}
	w := a.take(t.Context(), kube.Grant{Name: "x", UID: "1", Generation: 1, Envelope: envelope})
	if w.Ended == nil || w.Ended.Reason != "Revoked" || w.Active.Is || w.ID != id || w.Requester != "alice" {
		t.Errorf("%+v", w)
	}
	l.kill()
	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	if _, err := l.Apply(t.Context(), envelope, "kubernetes"); err == nil {
		t.Error("a new agent opened it again")
	}
}

// TestRefusedGrantsAreNotTriedForEver: a grant that was refused is looked at anew when something is another, and not each time somebody
// looks.
func TestRefusedGrantsAreNotTriedForEver(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	must(t, l.rememberApplied(t.Context()))
	a := newApplied(nil, l.grants, l.grants.clock)
	envelope, _ := l.applied(t, func(p *grant.Payload) { p.Duration = 20 * time.Minute }) // policy has 15
	r := kube.Grant{Name: "x", UID: "1", Generation: 1, Envelope: envelope}
	for range 3 {
		if w := a.take(t.Context(), r); w.Verified.Is || w.Verified.Reason != "PolicyRefuses" || !contains(w.Verified.Message, "duration") {
			t.Errorf("%+v", w)
		}
	}
	if got := l.events.n[stepRefused]; got != 1 {
		t.Errorf("%d refusals of three looks", got)
	}
	more, err := policy.Parse("test.yaml", []byte(b.signer.resources("30m")))
	must(t, err)
	before := l.enforced()
	l.enforced = func() *enforced {
		return &enforced{verified: more, set: more, handed: more, services: before.services, generation: before.generation}
	}
	if w := a.take(t.Context(), r); !w.Active.Is {
		t.Errorf("policy allows it now: %+v", w)
	}
}
