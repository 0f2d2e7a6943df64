package agent

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/protobuf/proto"
)

// sequences is how many random sequences a run tries; propertyEnv asks for another number, and seedEnv for one seed.
const (
	propertyEnv = "SALLYPORT_SEQUENCES"
	seedEnv     = "SALLYPORT_SEED"
)

func fromEnv(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	must(t, err)
	return n
}

// model is what a sequence did, seen from outside: it knows nothing of how the agent works.
type model struct {
	*life
	crew    crew
	rng     *rand.Rand
	log     []string
	known   map[string]*modelGrant // by id
	order   []string
	used    int              // activations
	said    int              // statements against grants
	before  string           // a copy of the state directory, or empty
	answers []grantAndAnswer // that were made and may have been used
}

type modelGrant struct {
	envelope []byte
	full     bool // signed by all whom policy asks for
	glass    bool
	used     bool // an activation succeeded, in whatever life
	over     bool // it ended, was withdrawn or denied, or everything was ended
	final    bool // withdrawn or denied, durably
	end      time.Duration
}

type grantAndAnswer struct{ envelope, answer []byte }

func (m *model) note(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

func (m *model) fail(format string, args ...any) {
	m.t.Helper()
	for _, line := range m.log {
		m.t.Log(line)
	}
	m.t.Fatalf(format, args...)
}

// pickGrant is any that was ever asked for.
func (m *model) pickGrant() *modelGrant {
	if len(m.order) == 0 {
		return m.ask()
	}
	return m.known[m.order[m.rng.IntN(len(m.order))]]
}

var modelClients = []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.1.0.3"), netip.MustParseAddr("10.1.0.4"), netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("10.1.0.6")}

func (m *model) ask() *modelGrant {
	people := []string{"alice bob", "alice carol", "alice", "alice mallory", "mallory bob"}
	i := m.rng.IntN(2)
	glass := m.rng.IntN(4) == 0
	if glass {
		people = []string{"alice bob carol", "dave bob carol", "alice bob"}
	}
	if m.rng.IntN(4) == 0 {
		i = m.rng.IntN(len(people))
	}
	g := &modelGrant{glass: glass, full: i < 2}
	g.envelope = m.asked(m.crew, people[i], func(p *grant.Payload) {
		p.Duration = time.Duration(1+m.rng.IntN(10)) * time.Minute
		p.Addresses = []netip.Addr{modelClients[m.rng.IntN(len(modelClients))]}
		if glass {
			p.Kind = grant.BreakGlass
		}
	})
	p, err := grant.Peek(g.envelope)
	must(m.t, err)
	m.known[p.ID] = g
	m.order = append(m.order, p.ID)
	m.note("ask %s by %s", p.ID, people[i])
	return g
}

func (m *model) activateOne() {
	if m.rng.IntN(2) == 0 {
		m.activate(m.ask())
	} else {
		m.activate(m.pickGrant())
	}
}

func (m *model) activate(g *modelGrant) {
	p, err := grant.Peek(g.envelope)
	must(m.t, err)
	who := p.Requester
	if m.rng.IntN(8) == 0 {
		who = "mallory"
	}
	answer := signer{m.crew[who]}.answer(m.t, g.envelope, m.challenges.mint())
	if len(m.answers) > 0 && m.rng.IntN(8) == 0 { // one that was made before, maybe for another grant
		answer = m.answers[m.rng.IntN(len(m.answers))].answer
		who = "before"
	}
	m.answers = append(m.answers, grantAndAnswer{g.envelope, answer})
	row, err := m.grants.Activate(m.t.Context(), g.envelope, answer, "uid:0")
	m.note("activate %s, answered by %s: %v", p.ID, who, err)
	if err != nil {
		return
	}
	switch {
	case !g.full:
		m.fail("activated without the signatures that policy asks for")
	case g.used:
		m.fail("activated twice")
	case g.final:
		m.fail("activated after it was withdrawn or denied")
	case who != p.Requester && who != "before":
		m.fail("begun by somebody else")
	}
	g.used = true
	m.used++
	g.end = m.now() + p.Duration
	if row.DeadlineBoot > g.end+time.Second {
		m.fail("deadline %s is beyond %s", row.DeadlineBoot, g.end)
	}
}

func (m *model) now() time.Duration { return m.grants.clock.boot() }

func (m *model) say() {
	g := m.pickGrant()
	step := []grant.Step{grant.StepWithdrawn, grant.StepDenied, grant.StepReviewed}[m.rng.IntN(3)]
	p, err := grant.Peek(g.envelope)
	must(m.t, err)
	who := map[grant.Step]string{grant.StepWithdrawn: p.Requester, grant.StepDenied: "bob", grant.StepReviewed: "erin"}[step]
	if m.rng.IntN(3) == 0 {
		who = []string{"alice", "bob", "carol", "erin", "mallory"}[m.rng.IntN(5)]
	}
	_, err = m.State(m.t.Context(), m.says(m.crew, who, step, g.envelope), g.envelope, "uid:0")
	m.note("%s says that %s is %s: %v", who, p.ID, step, err)
	if err == nil && step != grant.StepReviewed {
		g.final, g.over = true, true
		m.said++
	}
	if m.rng.IntN(2) == 0 {
		m.activate(g)
	}
}

func (m *model) revokeOne() {
	g := m.pickGrant()
	p, err := grant.Peek(g.envelope)
	must(m.t, err)
	_, err = m.Revoke(m.t.Context(), p.ID, "", "uid:0")
	m.note("revoke %s: %v", p.ID, err)
	if err == nil {
		g.over = true
	}
}

// crash ends the life between any two steps of an activation, or between them all.
func (m *model) crash() {
	if m.rng.IntN(2) == 0 {
		g := m.ask()
		p, err := grant.Peek(g.envelope)
		must(m.t, err)
		a := &activation{envelope: g.envelope, actor: "uid:0", answer: signer{m.crew[p.Requester]}.answer(m.t, g.envelope, m.challenges.mint())}
		at := m.rng.IntN(5)
		m.note("die after %d steps of activating %s", at, p.ID)
		m.mu.Lock()
		for i, step := range m.activationSteps() {
			if i == at {
				break
			}
			if err := step.do(m.t.Context(), a); err != nil {
				m.note("step %s: %v", step.name, err)
				break
			}
			if i == 1 { // it is recorded
				if g.used || !g.full {
					m.fail("recorded, and may not be")
				}
				g.used, g.end = true, m.now()+p.Duration
			}
		}
		m.mu.Unlock()
	}
	m.restart("die")
}

func (m *model) restart(why string) {
	m.note("%s", why)
	must(m.t, m.store.Close())
	m.life = m.beginOn(m.datapath)
	must(m.t, m.adopt(m.t.Context()))
}

// reboot takes the maps' paths with it, as a kernel does; their state here is ended by hand.
func (m *model) reboot() {
	m.endEverything()
	m.testbed.bootID = fmt.Sprintf("boot-%d", m.rng.Uint64())
	m.restart("reboot")
}

// endEverything notes that nothing that was active goes on.
func (m *model) endEverything() {
	for _, g := range m.known {
		g.over = g.over || g.used
	}
}

// stepClock moves the wall clock, and the keeper sees it.
func (m *model) stepClock() {
	by := time.Duration(m.rng.IntN(600)-300) * time.Second
	m.setClock(by)
}

// repair sets the clock right, and has somebody vouch who may: what an operator does who reads the status.
func (m *model) repair() {
	m.setClock(m.truth - m.testbed.clock.wall)
	if m.store.Memory().Check(m.grants.clock.wall()) != nil {
		m.vouch("erin")
	}
}

func (m *model) setClock(by time.Duration) {
	m.testbed.clock.wall += by
	m.note("the wall clock is stepped by %s", by)
	if by.Abs() > jumpLimit+time.Second {
		must(m.t, m.endAll(m.t.Context(), stepRevoked, "the clock moved", "agent")) // what the keeper does at its tick: TestClockJumpEndsAllPaths
		m.endEverything()
	}
	m.remember(m.t.Context(), m.grants.clock.wall(), time.Hour)
}

func (m *model) pass() {
	by := time.Duration(m.rng.IntN(240)) * time.Second
	m.testbed.clock.wall += by
	m.testbed.clock.boot += by
	m.truth += by
	m.note("%s pass", by)
}

func (m *model) vouchFor() { m.vouch([]string{"erin", "bob", "mallory"}[m.rng.IntN(3)]) }

func (m *model) vouch(who string) {
	err := m.Vouch(m.t.Context(), m.crew.vouches(m.t, who, m.challenges.mint(), time.Now().Add(m.truth)), "uid:0")
	m.note("%s vouches: %v", who, err)
	if err == nil && who != "erin" {
		m.fail("somebody vouches who may not")
	}
}

// copyState keeps the state directory as a backup does, with no agent alive.
func (m *model) copyState() {
	dir := filepath.Join(m.lab.Dir, "state")
	must(m.t, m.store.Close())
	m.before = filepath.Join(m.lab.Dir, fmt.Sprintf("before-%d", m.rng.Uint64()))
	must(m.t, os.CopyFS(m.before, os.DirFS(dir)))
	m.note("the state directory is copied")
	m.life = m.beginOn(m.datapath)
	must(m.t, m.adopt(m.t.Context()))
}

func (m *model) restoreState() {
	if m.before == "" {
		return
	}
	dir := filepath.Join(m.lab.Dir, "state")
	must(m.t, m.store.Close())
	must(m.t, errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(m.before)), os.Chmod(dir, 0o700)))
	m.note("the state directory is restored")
	m.life = m.beginOn(m.datapath)
	must(m.t, m.adopt(m.t.Context()))
	// What was said since is forgotten with the rest; that nothing of it is let in again is what check asks.
}

// check holds what must be true after each step, by the kernel's paths and the store's records.
func (m *model) check() {
	m.t.Helper()
	entries, err := m.store.Entries(m.t.Context(), 0, 100000)
	must(m.t, err)
	activated := map[string]*api.GrantEvent{}
	for _, e := range entries {
		var entry api.Entry
		must(m.t, proto.Unmarshal(e.Data, &entry))
		if g := entry.GetGrant(); g.GetStep() == stepActivated {
			activated[g.Grant] = g
		}
	}
	rows, err := m.all(m.t.Context())
	must(m.t, err)
	byID := map[string]store.GrantRow{}
	for _, row := range rows {
		byID[row.ID] = row
	}
	paths, err := m.datapath.Paths()
	must(m.t, err)
	for _, p := range paths {
		if !isOpen(p) {
			continue
		}
		g, row := m.known[p.Grant], byID[p.Grant]
		switch {
		case g == nil || !g.full:
			m.fail("open path of %q, which was never approved", p.Grant)
		case !g.used || activated[p.Grant] == nil:
			m.fail("open path of %s without an event", p.Grant)
		case row.State != store.StateActive || row.BootID != m.grants.bootID:
			m.fail("open path of %s, whose row is %s of boot %s", p.Grant, row.State, row.BootID)
		case g.over:
			m.fail("open path of %s, which is over", p.Grant)
		case m.now() > g.end+5*time.Second:
			m.fail("open path of %s, which ended at %s, and it is %s", p.Grant, g.end, m.now())
		case p.Deadline > g.end+time.Second:
			m.fail("path of %s until %s, want at most %s", p.Grant, p.Deadline, g.end)
		case p.State == datapath.PathPending:
			m.fail("path of %s half open", p.Grant)
		}
	}
	for id, g := range m.known {
		if g.over && byID[id].State == store.StateActive && m.before == "" {
			m.fail("grant %s is over, and its row is active", id)
		}
	}
}

// TestNoSequenceOpensTooMuch is the state machine by property: no sequence of calls, deaths, reboots, restored directories
// and steps of the clock has a live path without all that makes one, or beyond its cap.
func TestNoSequenceOpensTooMuch(t *testing.T) {
	b, c := crewed(t)
	seed := uint64(fromEnv(t, seedEnv, int(time.Now().UnixNano()&0xffffff)))
	t.Logf("%s=%d", seedEnv, seed)
	opened, used, said, sequences := 0, 0, 0, fromEnv(t, propertyEnv, 4)
	for n := range sequences {
		must(t, os.RemoveAll(filepath.Join(b.lab.Dir, "state")))
		must(t, os.RemoveAll(b.owner.Witness))
		*b.clock, b.truth, b.bootID = testOffset{}, 0, ""
		m := &model{life: b.begin(), crew: c, rng: rand.New(rand.NewPCG(seed, uint64(n))), known: map[string]*modelGrant{}}
		steps := []struct {
			weight int
			do     func()
		}{
			{20, m.activateOne}, {4, m.say}, {4, m.revokeOne}, {4, m.crash}, {4, m.pass}, {1, m.stepClock},
			{1, m.reboot}, {1, m.vouchFor}, {1, m.copyState}, {1, m.restoreState}, {6, m.repair},
		}
		var deck []func()
		for _, s := range steps {
			for range s.weight {
				deck = append(deck, s.do)
			}
		}
		for range 80 {
			deck[m.rng.IntN(len(deck))]()
			_, err := m.tick(t.Context())
			must(t, err)
			m.check()
			_, open := m.states()
			opened += len(open)
		}
		used, said = used+m.used, said+m.said
		must(t, m.endAll(t.Context(), stepRevoked, "next sequence", "test"))
		for range 2 {
			_, err := m.tick(t.Context())
			must(t, err)
			m.testbed.clock.boot += 2 * keepEnded
			m.testbed.clock.wall += 2 * keepEnded
		}
		m.kill()
	}
	t.Logf("%d sequences: %d activations, %d statements against grants, %d paths seen open", sequences, used, said, opened)
	if used < sequences || opened < sequences {
		t.Error("that shows little")
	}
}
