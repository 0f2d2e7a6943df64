package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/rollout"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// rolling is a node's roll-outs on a real store, without a datapath.
type rolling struct {
	*rollouts
	t      *testing.T
	dir    string
	e      *enforced
	alice  signer // may say how it goes on
	plain  signer // alice's other key, of no such use
	bob    signer // is no operator
	alarms []string
	kicked int
}

const rolledOutResources = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec: {target: Host, mode: Shadow, ports: [5432], access: [{identities: ["spiffe://example.org/app/web"]}]}
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  version: 1
  people:
    - {name: alice, keys: [{publicKey: "ALICE", uses: [rollout]}, {publicKey: "PLAIN"}]}
    - {name: bob, keys: [{publicKey: "BOB", uses: [rollout]}]}
---
apiVersion: sallyport.dev/v1alpha1
kind: Rollout
metadata: {name: databases}
spec:
  services: [postgres]
  operators: [alice]
  waves: [{name: first, nodes: [node-1], mode: Enforce, bake: 1h}, {name: all, percent: 100, mode: Enforce, bake: 1h}]
  budget: {refusals: 2, window: 1m, except: ["10.1.9.0/24"]}
`

func newRolling(t *testing.T) *rolling {
	t.Helper()
	r := &rolling{t: t, dir: t.TempDir(), alice: newSigner(t), plain: newSigner(t), bob: newSigner(t)}
	r.begin(rolledOutResources)
	return r
}

// begin is an agent with those resources.
func (r *rolling) begin(resources string) {
	r.t.Helper()
	s, err := store.Open(filepath.Join(r.dir, "node.db"))
	must(r.t, err)
	must(r.t, s.Claim(r.t.Context(), store.Owner{Node: testNode, Machine: "1", Witness: filepath.Join(r.dir, "witness")}))
	r.t.Cleanup(func() { s.Close() })
	c, log := bootClock(), slog.New(slog.DiscardHandler)
	r.rollouts = &rollouts{node: testNode, store: s, clock: c, enforced: func() *enforced { return r.e }, hear: (&grants{clock: c}).hear, apply: func() {},
		recorded: func() {}, alarm: func(_ alarmName, text string) { r.alarms = append(r.alarms, text) }, events: newEventCounter(), problems: newProblems(log),
		log: log, kick: make(chan struct{}, 1)}
	r.watch = &rolloutWatch{clock: c, state: r.state, kick: func() { r.kicked++ }}
	must(r.t, r.recall(r.t.Context()))
	r.put(resources)
}

func (r *rolling) put(resources string) {
	r.t.Helper()
	keys := strings.NewReplacer("ALICE", r.alice.key.Public().String(), "PLAIN", r.plain.key.Public().String(), "BOB", r.bob.key.Public().String())
	set, err := policy.Parse("resources.yaml", []byte(keys.Replace(resources)))
	must(r.t, err)
	r.e = &enforced{verified: set, set: set.AtModes(r.modes(set))}
	must(r.t, r.follow(r.t.Context(), r.e))
}

// kill is a kill -9, and another agent after it.
func (r *rolling) kill() {
	r.t.Helper()
	must(r.t, r.store.Close())
	r.begin(rolledOutResources)
}

// word is a signed one.
func (r *rolling) word(by signer, name string, change func(*grant.Statement)) []byte {
	r.t.Helper()
	one, _ := r.e.verified.Rollout("databases")
	id, err := grant.NewID(time.Now())
	must(r.t, err)
	s := grant.Statement{ID: id, Step: grant.StepAdvanced, Rollout: one.Name, Wave: 1, Digest: one.Plan(), By: name, At: time.Now(), Why: "a week of Shadow"}
	if change != nil {
		change(&s)
	}
	signed, err := grant.SignStatement(r.t.Context(), s, by.key)
	must(r.t, err)
	return signed
}

func (r *rolling) resumed(s *grant.Statement) { s.Step, s.Wave = grant.StepResumed, 0 }

func (r *rolling) mode() policy.Mode {
	svc, _ := r.e.verified.AtModes(r.modes(r.e.verified)).Service("postgres")
	return svc.Spec.Mode
}

func (r *rolling) steps() (steps []string) {
	r.t.Helper()
	entries, err := r.store.Entries(r.t.Context(), 0, 100)
	must(r.t, err)
	for _, e := range entries {
		var entry api.Entry
		must(r.t, proto.Unmarshal(e.Data, &entry))
		steps = append(steps, entry.GetGrant().GetStep())
	}
	return steps
}

// refused has clients refused, for a reason.
func (r *rolling) refused(n int, from string, reason flow.Reason) {
	for range n {
		r.watch.note(flow.Record{Event: flow.EventDeny, Verdict: flow.VerdictDenied, Reason: reason, Service: "postgres", Count: 1,
			Client: netip.AddrPortFrom(netip.MustParseAddr(from), 40000)})
	}
}

// TestWhoMayRollOut: a wave begins by the signature of an operator, with a key for it, for the very plan; every other word changes nothing.
func TestWhoMayRollOut(t *testing.T) {
	t.Parallel()
	r := newRolling(t)
	for _, c := range []struct {
		name string
		word []byte
		want error
	}{
		{"no operator", r.word(r.bob, "bob", nil), ErrNotYours},
		{"a key for something else", r.word(r.plain, "alice", nil), ErrNotYours},
		{"in another name", r.word(r.bob, "alice", nil), grant.ErrSigner},
		{"another plan", r.word(r.alice, "alice", func(s *grant.Statement) { s.Digest = strings.Repeat("0", 64) }), rollout.ErrOtherPlan},
		{"another roll-out", r.word(r.alice, "alice", func(s *grant.Statement) { s.Rollout = "caches" }), ErrNoRollout},
		{"no such wave", r.word(r.alice, "alice", func(s *grant.Statement) { s.Wave = 3 }), rollout.ErrNoWave},
		{"nothing to go on after", r.word(r.alice, "alice", r.resumed), rollout.ErrNotHalted},
		{"not signed", []byte("{}"), grant.ErrMalformed},
		{"altered", bytes.Replace(r.word(r.alice, "alice", nil), []byte(`"payload":"e`), []byte(`"payload":"f`), 1), nil},
	} {
		if _, err := r.State(t.Context(), c.word, "uid:0"); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if r.mode() != policy.ModeShadow || len(r.steps()) != 0 {
		t.Errorf("mode %s, records %v", r.mode(), r.steps())
	}
}

// TestRolloutOverKills: a state is as it was after a kill at each step, and each step is on record. A Rollout that was gone begins anew.
func TestRolloutOverKills(t *testing.T) {
	t.Parallel()
	r := newRolling(t)
	is := func(when string, phase rollout.Phase, mode policy.Mode) {
		t.Helper()
		for _, again := range []string{"", " after a kill"} {
			if got := r.state("databases"); got.Stands() != phase || r.mode() != mode {
				t.Errorf("%s%s: %s and %s, want %s and %s", when, again, got.Stands(), r.mode(), phase, mode)
			}
			r.kill()
		}
	}
	state := func(change func(*grant.Statement)) {
		t.Helper()
		_, err := r.State(t.Context(), r.word(r.alice, "alice", change), "uid:0")
		must(t, err)
	}
	is("at first", rollout.Running, policy.ModeShadow)
	state(nil)
	is("in the first wave", rollout.Running, policy.ModeEnforce)
	halted, err := r.Halt(t.Context(), "", "INC-7", "uid:0")
	if err != nil || !slices.Equal(halted, []string{"databases"}) {
		t.Fatalf("halted %v, %v", halted, err)
	}
	is("halted", rollout.Halted, policy.ModeEnforce)
	if _, err := r.State(t.Context(), r.word(r.alice, "alice", func(s *grant.Statement) { s.Wave = 2 }), "uid:0"); !errors.Is(err, rollout.ErrHalted) {
		t.Errorf("a wave begins while it is halted: %v", err)
	}
	state(r.resumed)
	is("resumed", rollout.Running, policy.ModeEnforce)
	r.refused(3, "10.1.0.2", flow.ReasonNoTLS)
	must(t, r.tend(t.Context()))
	is("fell back", rollout.FellBack, policy.ModeShadow)
	state(r.resumed)
	is("resumed again", rollout.Running, policy.ModeEnforce)
	if got := r.steps(); !slices.Equal(got, []string{stepAdvanced, stepHalted, stepResumed, stepFellBack, stepResumed}) {
		t.Errorf("records: %v", got)
	}
	before, _, _ := strings.Cut(rolledOutResources, "---\napiVersion: sallyport.dev/v1alpha1\nkind: Rollout")
	r.put(before)
	r.kill()
	is("gone and come again", rollout.Running, policy.ModeShadow)
}

// TestWhatFallsBack: refusals that the budget is for, and no others; and nothing that cannot be recorded.
func TestWhatFallsBack(t *testing.T) {
	t.Parallel()
	r := newRolling(t)
	watched := flow.Record{Event: flow.EventWatched, Verdict: flow.VerdictDenied, Reason: flow.ReasonSourceRoute, Service: "postgres", Protocol: "tcp", Count: 2,
		Client: netip.MustParseAddrPort("10.1.0.66:4000"), Server: netip.MustParseAddrPort("10.1.0.1:5432")}
	r.watch.note(watched)
	unproven := watched
	unproven.Verdict, unproven.Reason, unproven.Client = flow.VerdictProxied, flow.ReasonNoPath, netip.MustParseAddrPort("10.1.0.67:4000")
	r.watch.note(unproven)
	one, _ := r.e.verified.Rollout("databases")
	if f := r.watch.forecast(one, "postgres"); f.seen != 4 || f.refused != 4 || len(f.clients) != 2 {
		t.Errorf("forecast: %+v", f)
	}
	r.refused(9, "10.1.0.2", flow.ReasonNoTLS) // while it is shadowed
	_, err := r.State(t.Context(), r.word(r.alice, "alice", nil), "uid:0")
	must(t, err)
	r.refused(9, "10.1.9.1", flow.ReasonNoTLS)          // left out
	r.refused(9, "10.1.0.66", flow.ReasonNotAuthorised) // of whom Shadow has told
	r.refused(9, "10.1.0.2", flow.ReasonStray)          // was cut by the change of mode
	r.watch.note(flow.Record{Event: flow.EventDeny, Verdict: flow.VerdictDenied, Reason: flow.ReasonHandshakeFailed, Service: "postgres", Count: 9,
		Client: netip.MustParseAddrPort("127.0.0.1:40000"), Detail: flow.DetailLeft + ": EOF"}) // a probe
	r.refused(2, "10.1.0.67", flow.ReasonNoTLS)
	must(t, r.tend(t.Context()))
	if r.mode() != policy.ModeEnforce || r.kicked != 0 {
		t.Fatalf("fell back without a cause: %+v", r.state("databases"))
	}
	r.refused(1, "10.1.0.67", flow.ReasonNoTLS)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.tend(canceled); err == nil || r.mode() != policy.ModeEnforce {
		t.Errorf("falls back without a record: %v, %s", err, r.mode())
	}
	must(t, r.tend(t.Context()))
	if r.mode() != policy.ModeShadow || r.kicked != 1 || len(r.alarms) != 1 || !contains(r.alarms[0], "postgres is shadowed: 3 of 3 connections were refused") {
		t.Errorf("mode %s, alarms %v, kicked %d", r.mode(), r.alarms, r.kicked)
	}
}

// TestModesOfRolloutsInTheTable: what a roll-out has reached is in the kernel's table and in what the proxy reads, and what is kept as
// verified says what was signed.
func TestModesOfRolloutsInTheTable(t *testing.T) {
	t.Parallel()
	d := newDirectory(t)
	reached := map[string]policy.Mode{}
	d.modes = func(*policy.Set) map[string]policy.Mode { return reached }
	alice := newSigner(t).key.Public().String()
	text := strings.NewReplacer("ALICE", alice, "PLAIN", newSigner(t).key.Public().String(), "BOB", newSigner(t).key.Public().String()).Replace(rolledOutResources)
	d.write("a.yaml", text)
	must(t, d.load())
	for i, c := range []struct {
		reached policy.Mode
		want    datapath.Mode
	}{{policy.ModeObserve, datapath.Shadow}, {policy.ModeEnforce, datapath.Enforce}, {policy.ModeShadow, datapath.Shadow}} {
		reached["postgres"] = c.reached
		d.reload()
		d.settle() // pods came or went
		handed, err := os.ReadFile(d.proxy)
		must(t, err)
		kept, err := os.ReadFile(d.verified)
		must(t, err)
		if got := d.applied[len(d.applied)-1][0].Mode; got != c.want {
			t.Errorf("%d: table has %v, want %v", i, got, c.want)
		}
		if strings.Contains(string(handed), "mode: Shadow") != (c.want == datapath.Shadow) || strings.Contains(string(handed), "Rollout") {
			t.Errorf("%d: the proxy reads\n%s", i, handed)
		}
		if !contains(string(kept), "mode: Shadow", "kind: Rollout") || d.current().verified.Digest() == d.current().set.Digest() {
			t.Errorf("%d: kept as verified\n%s", i, fmt.Sprint(string(kept)))
		}
	}
}
