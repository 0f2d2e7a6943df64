package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// crew are people with a key each.
type crew map[string]grant.PrivateKey

func newCrew(t *testing.T, alice grant.PrivateKey) crew {
	t.Helper()
	c := crew{"alice": alice}
	for _, name := range []string{"bob", "carol", "dave", "erin", "mallory"} {
		key, err := grant.GenerateKey()
		must(t, err)
		c[name] = key
	}
	return c
}

// resources let alice ask bob, carol and dave; erin reviews, and may vouch for the node. Mallory is in the keyring, and
// nowhere else; frank is denied everything.
func (c crew) resources(maxDuration string) string {
	var people []string
	for name, key := range c {
		uses := "request, approve, breakGlass"
		if name == "erin" {
			uses = "approve, resources"
		}
		people = append(people, fmt.Sprintf("    - {name: %s, keys: [{publicKey: %q, uses: [%s]}]}", name, key.Public().String(), uses))
	}
	slices.Sort(people)
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, ports: [5432, 5433]}
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: backup}
spec:
  services: [postgres]
  bindings: [address]
  sources: ["10.0.0.0/8"]
  maxDuration: %s
  requesters: [alice]
  approvals: [{from: [bob, carol]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: glass}
spec:
  services: [postgres]
  bindings: [address]
  sources: ["10.0.0.0/8"]
  breakGlass: true
  maxDuration: 30m
  requesters: [alice, dave]
  approvals: [{from: [bob, carol, dave], min: 2}]
  reviewers: [bob, erin]
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people:
%s
`, maxDuration, strings.Join(people, "\n"))
}

// crewed is a testbed whose policies want more than alice.
func crewed(t *testing.T) (*testbed, crew) {
	t.Helper()
	b := newTestbed(t, 16)
	c := newCrew(t, b.signer.key)
	b.use(c.resources("15m"))
	return b, c
}

// use puts other resources to work from the next life on.
func (b *testbed) use(yaml string) {
	b.t.Helper()
	var err error
	b.set, err = policy.Parse("test.yaml", []byte(yaml))
	must(b.t, err)
}

// asked is a grant that the first has asked for and the others have approved.
func (b *testbed) asked(c crew, people string, change func(*grant.Payload)) []byte {
	b.t.Helper()
	names := strings.Fields(people)
	p := b.signer.payload(b.t, func(p *grant.Payload) {
		p.Requester = names[0]
		p.NotBefore, p.NotAfter = p.NotBefore.Add(b.truth), p.NotAfter.Add(b.truth)
		if change != nil {
			change(p)
		}
		if p.ID == "" {
			named, err := p.Named(time.Now().Add(b.truth))
			must(b.t, err)
			*p = named
		}
	})
	envelope, err := grant.Sign(b.t.Context(), p, c[names[0]])
	must(b.t, err)
	for _, name := range names[1:] {
		envelope, err = grant.Approve(b.t.Context(), envelope, c[name])
		must(b.t, err)
	}
	return envelope
}

func breakGlass(p *grant.Payload) { p.Kind = grant.BreakGlass }

// says is a statement about an envelope, signed now by the clocks of people.
func (b *testbed) says(c crew, who string, step grant.Step, envelope []byte) []byte {
	b.t.Helper()
	return c.says(b.t, who, step, envelope, time.Now().Add(b.truth))
}

func (c crew) says(t *testing.T, who string, step grant.Step, envelope []byte, at time.Time) []byte {
	t.Helper()
	p, err := grant.Peek(envelope)
	must(t, err)
	digest, err := grant.Digest(envelope)
	must(t, err)
	id, err := grant.NewID(at)
	must(t, err)
	signed, err := grant.SignStatement(t.Context(), grant.Statement{ID: id, Step: step, Grant: p.ID, Digest: digest, By: who, At: at, Why: "as agreed"}, c[who])
	must(t, err)
	return signed
}

// TestWhoMaySayWhat: of each statement, who may make it, and what becomes of the grant.
func TestWhoMaySayWhat(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	defer l.kill()
	everybody := []string{"alice", "bob", "carol", "dave", "erin", "mallory"}
	for _, kind := range []grant.Kind{"", grant.BreakGlass} {
		signers := "alice bob"
		if kind == grant.BreakGlass {
			signers = "alice carol dave"
		}
		for _, s := range []struct {
			step   grant.Step
			may    map[grant.Kind]string
			active bool
		}{
			{grant.StepWithdrawn, map[grant.Kind]string{"": "alice", grant.BreakGlass: "alice"}, true},
			{grant.StepWithdrawn, map[grant.Kind]string{"": "alice", grant.BreakGlass: "alice"}, false},
			{grant.StepDenied, map[grant.Kind]string{"": "bob carol", grant.BreakGlass: "bob carol dave"}, true},
			{grant.StepDenied, map[grant.Kind]string{"": "bob carol", grant.BreakGlass: "bob carol dave"}, false},
			{grant.StepReviewed, map[grant.Kind]string{"": "carol", grant.BreakGlass: "bob erin"}, true},
			{grant.StepReviewed, map[grant.Kind]string{}, false},
		} {
			for _, who := range everybody {
				name := fmt.Sprintf("%s %s a grant %q, activated %v", who, s.step, kind, s.active)
				envelope := b.asked(c, signers, func(p *grant.Payload) { p.Kind = kind })
				var id string
				if s.active {
					row, err := l.Activate(t.Context(), envelope, "uid:0")
					must(t, err)
					if id = row.ID; s.step == grant.StepReviewed {
						if _, err := l.State(t.Context(), b.says(c, who, s.step, envelope), nil, "uid:0"); err == nil {
							t.Errorf("%s: before its end", name)
						}
						_, err = l.Revoke(t.Context(), id, "", "uid:0")
						must(t, err)
					}
				}
				row, err := l.State(t.Context(), b.says(c, who, s.step, envelope), envelope, "uid:0")
				may := slices.Contains(strings.Fields(s.may[kind]), who)
				if (err == nil) != may || err != nil && !contains(toStatus(err).Error(), "hint: ") {
					t.Errorf("%s: %v, want allowed %v", name, err, may)
				}
				if err == nil && (row != nil) != s.active {
					t.Errorf("%s: row %v", name, row)
				}
				_, open := l.states()
				if s.active && s.step != grant.StepReviewed && (open[id] == 0) != may {
					t.Errorf("%s: %d open paths", name, open[id])
				}
				if _, err := l.Activate(t.Context(), envelope, "uid:0"); may && !s.active && s.step != grant.StepReviewed && !errors.Is(err, store.ErrFinal) {
					t.Errorf("%s: activated afterwards: %v", name, err)
				}
				must(t, l.endAll(t.Context(), stepRevoked, "next", "test"))
				l.forgetReviews()
				_, err = l.tick(t.Context()) // ended slots are known, and given back when they are needed
				must(t, err)
			}
		}
	}
}

// forgetReviews lets the same people break the glass again, which only a test may.
func (l *life) forgetReviews() { l.reviews.open = nil }

// TestStatementsAreFinal: over a restart, for another signature over the same grant, and for whoever comes second.
func TestStatementsAreFinal(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	waiting := b.asked(c, "alice bob", nil)
	_, err := l.State(t.Context(), b.says(c, "carol", grant.StepDenied, waiting), waiting, "uid:0")
	must(t, err)
	if _, err := l.State(t.Context(), b.says(c, "bob", grant.StepDenied, waiting), waiting, "uid:0"); !errors.Is(err, store.ErrStated) {
		t.Errorf("denied twice: %v", err)
	}
	live := b.asked(c, "alice bob", nil)
	row, err := l.Activate(t.Context(), live, "uid:0")
	must(t, err)
	// The statement is durable, and then the agent dies: the path is still open.
	s, err := l.hear(b.says(c, "alice", grant.StepWithdrawn, live), l.enforced())
	must(t, err)
	about, err := l.subject(t.Context(), s, nil)
	must(t, err)
	must(t, l.recordStatement(t.Context(), s, about, "uid:0"))
	l.kill()

	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	rows, err := l.all(t.Context())
	must(t, err)
	if _, open := l.states(); len(open) != 0 || rows[0].ID != row.ID || !contains(rows[0].EndedWhy, "withdrawn by alice", "as agreed") {
		t.Errorf("%+v, open %v", rows[0], open)
	}
	again, err := grant.Approve(t.Context(), waiting, c["carol"])
	must(t, err)
	for _, envelope := range [][]byte{waiting, again} {
		if _, err := l.Activate(t.Context(), envelope, "uid:0"); !errors.Is(err, store.ErrFinal) || !contains(toStatus(err).Error(), "denied by carol", "hint: ") {
			t.Errorf("denied, and yet: %v", err)
		}
	}
	// The second refusal is counted with the first: see refusalsTold.
	if got, want := l.steps(), []string{stepDenied, stepActivated, stepWithdrawn, stepRevoked, stepRefused}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestStatementsAboutOthers: a statement counts for the very grant that it was made for, and one of another step elsewhere.
func TestStatementsAboutOthers(t *testing.T) {
	b, c := crewed(t)
	l := b.begin()
	defer l.kill()
	one, other := b.asked(c, "alice bob", nil), b.asked(c, "alice bob", func(p *grant.Payload) { p.Duration = time.Second })
	denied := b.says(c, "carol", grant.StepDenied, one)
	for _, x := range []struct {
		name                string
		statement, envelope []byte
		is                  error
	}{
		{"without the grant", denied, nil, ErrNoGrant},
		{"with another grant", denied, other, ErrOtherGrant},
		{"an answer", l.answer(one), one, ErrOtherGrant},
		{"a grant", one, one, grant.ErrMalformed},
	} {
		if _, err := l.State(t.Context(), x.statement, x.envelope, "uid:0"); !errors.Is(err, x.is) || !contains(toStatus(err).Error(), "hint: ") {
			t.Errorf("%s: %v, want %v", x.name, err, x.is)
		}
	}
	for name, answer := range map[string][]byte{"none": nil, "for another grant": l.answer(other), "a denial": denied} {
		if _, err := l.grants.Activate(t.Context(), one, answer, "uid:0"); !errors.Is(err, grant.ErrChallenge) || !contains(toStatus(err).Error(), "hint: ") {
			t.Errorf("answer %s: %v", name, err)
		}
	}
	for who := range c {
		if who == "alice" {
			continue
		}
		mine := signer{c[who]}
		if _, err := l.grants.Activate(t.Context(), one, mine.answer(t, one, l.challenges.mint()), "uid:0"); !errors.Is(err, grant.ErrSigner) || !contains(err.Error(), "answer.by") {
			t.Errorf("%s begins what alice asked for: %v", who, err)
		}
	}
	// A refused activation leaves the challenge to whoever it was made for; one that succeeds uses it up.
	answer := l.answer(one)
	blocker, err := l.Activate(t.Context(), other, "uid:0")
	must(t, err)
	if _, err := l.grants.Activate(t.Context(), one, answer, "uid:0"); !errors.Is(err, ErrOverlap) {
		t.Errorf("beside another: %v", err)
	}
	_, err = l.Revoke(t.Context(), blocker.ID, "", "uid:0")
	must(t, err)
	_, err = l.grants.Activate(t.Context(), one, answer, "uid:0")
	must(t, err)
	if _, err := l.grants.Activate(t.Context(), one, answer, "uid:0"); !errors.Is(err, grant.ErrChallenge) {
		t.Errorf("answered twice: %v", err)
	}
	must(t, l.endAll(t.Context(), stepRevoked, "done", "test"))
	// Whoever is on a deny list is not heard at all.
	b.use(c.resources("15m") + "---\napiVersion: sallyport.dev/v1alpha1\nkind: DenyList\nmetadata: {name: left}\nspec: {reason: left the company, people: [carol]}\n")
	third := b.asked(c, "alice bob", nil)
	if _, err := l.State(t.Context(), b.says(c, "carol", grant.StepDenied, third), third, "uid:0"); !errors.Is(err, ErrNotYours) || !contains(err.Error(), "left the company") {
		t.Errorf("denied by somebody who is denied: %v", err)
	}
}

// TestParallelActivations: of many at once, one wins, with one path, whoever answers what.
func TestParallelActivations(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	envelope := b.signer.envelope(t, nil)
	answers := make([][]byte, 8)
	for i := range answers {
		answers[i] = l.answer(envelope)
	}
	results := make([]error, len(answers))
	var wg sync.WaitGroup
	for i, answer := range answers {
		wg.Go(func() { _, results[i] = l.grants.Activate(context.Background(), envelope, answer, "uid:0") })
	}
	wg.Wait()
	won := 0
	for _, err := range results {
		if err == nil {
			won++
		} else if !errors.Is(err, store.ErrReplayed) {
			t.Errorf("refused for %v", err)
		}
	}
	_, open := l.states()
	if len(open) != 1 || won != 1 {
		t.Errorf("%d won, open %v", won, open)
	}
	for _, n := range open {
		if n != 1 {
			t.Errorf("%d paths", n)
		}
	}
}

// TestOnAnotherNode: neither the grant, nor the answer, nor the node's own memory is worth anything elsewhere.
func TestOnAnotherNode(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	envelope := b.signer.envelope(t, nil)
	answer := l.answer(envelope)
	row, err := l.Activate(t.Context(), envelope, "uid:0")
	must(t, err)
	l.kill()

	b.owner.Node = "node-2" // the directory was copied, onto the same machine even
	l = b.begin()
	l.node, l.challenges.node = "node-2", "node-2"
	must(t, l.adopt(t.Context()))
	states, open := l.states()
	if len(open) != 0 || states[row.ID] == store.StateActive {
		t.Errorf("revived: %v, open %v", states, open)
	}
	fresh := b.signer.envelope(t, func(p *grant.Payload) { p.Audience = "node-2" })
	if _, err := l.Activate(t.Context(), fresh, "uid:0"); !errors.Is(err, store.ErrDoubt) || !contains(toStatus(err).Error(), "sallyport grant vouch") {
		t.Errorf("with another node's memory: %v", err)
	}
	for _, answer := range [][]byte{answer, nil} {
		if _, err := l.grants.Activate(t.Context(), envelope, answer, "uid:0"); !errors.Is(err, grant.ErrAudience) || !errors.Is(err, grant.ErrChallenge) {
			t.Errorf("the grant of another node: %v", err)
		}
	}
	l.remember(t.Context(), l.grants.clock.wall(), time.Hour)
	if got := strings.Join(l.problems.lines(), "\n"); !contains(got, "memory: no grant is activated", `by the node "node-1"`, "sallyport grant vouch") {
		t.Errorf("problems: %s", got)
	}
	l.kill()
}
