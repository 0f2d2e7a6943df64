package agent

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/protobuf/proto"
)

func (l *life) storedEvents() (events []*api.GrantEvent) {
	l.t.Helper()
	entries, err := l.store.Entries(l.t.Context(), 0, 1000)
	must(l.t, err)
	for _, e := range entries {
		var entry api.Entry
		must(l.t, proto.Unmarshal(e.Data, &entry))
		events = append(events, entry.GetGrant())
	}
	return events
}

// two names both clients.
func two(p *grant.Payload) { p.Addresses = []netip.Addr{clientA, clientB} }

// TestKillBetweenSteps is invariants 5 and 10: a kill after any step of an activation leaves no path without its record, and
// the next agent either goes on with all of the grant or ends all of it.
func TestKillBetweenSteps(t *testing.T) {
	b := newTestbed(t, 16)
	for done := range 6 {
		l := b.begin()
		a := l.activation(b.signer.envelope(t, two))
		for _, step := range l.activationSteps()[:done] {
			must(t, step.do(t.Context(), a))
		}
		l.recorded()
		l.kill()

		l = b.begin()
		must(t, l.adopt(t.Context()))
		l.recorded()
		states, open := l.states()
		id := ""
		if done > 0 {
			id = a.verified.Payload.ID
		}
		want, paths := map[int]string{2: stateEnded, 3: stateEnded, 4: store.StateActive, 5: store.StateActive}[done], 0
		if want == store.StateActive {
			paths = 2
		}
		if states[id] != want || open[id] != paths {
			t.Errorf("killed after %d steps: row %q with %d open paths, want %q with %d", done, states[id], open[id], want, paths)
		}
		must(t, l.endAll(t.Context(), stepRevoked, "next case", "test"))
		if _, open := l.states(); len(open) != 0 {
			t.Errorf("open after the end of all: %v", open)
		}
		l.kill()
	}
}

// TestKillBetweenPaths: of two clients one has its path.
func TestKillBetweenPaths(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	a := l.activation(b.signer.envelope(t, two))
	must(t, l.authorise(t.Context(), a))
	must(t, l.record(t.Context(), a))
	a.held.payload.Addresses = a.held.payload.Addresses[:1]
	must(t, l.openPaths(t.Context(), a))
	l.kill()
	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	if states, open := l.states(); states[a.verified.Payload.ID] != stateEnded || len(open) != 0 {
		t.Errorf("%v, open %v", states, open)
	}
}

// TestKillWithinRevoke: closed in the kernel, not yet recorded.
func TestKillWithinRevoke(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, two), "uid:0")
	must(t, err)
	must(t, l.datapath.EndPath(row.Slots[1], datapath.PathRevoked))
	l.kill()
	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	if states, open := l.states(); states[row.ID] != store.StateRevoked || len(open) != 0 {
		t.Errorf("%v, open %v", states, open)
	}
	if got, want := l.steps(), []string{stepActivated, stepRevoked}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestRefusalsChangeNothing(t *testing.T) {
	b := newTestbed(t, 16)
	b.own = []netip.Addr{netip.MustParseAddr("10.2.0.2")}
	l := b.begin()
	defer l.kill()
	stranger := newSigner(t)
	live, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	used := live.Envelope
	for _, c := range []struct {
		name     string
		envelope []byte
		is       error
		says     string
	}{
		{"another's key", stranger.envelope(t, nil), grant.ErrUnknownKey, "keyid"},
		{"tampered", []byte(strings.Replace(string(b.signer.envelope(t, nil)), `"sig":"`, `"sig":"AAAA`, 1)), grant.ErrSignature, "sig"},
		{"no envelope", []byte("{}"), grant.ErrMalformed, "payloadType"},
		{"another node", b.signer.envelope(t, func(p *grant.Payload) { p.Audience = "node-2" }), grant.ErrAudience, "audience"},
		{"another policy", b.signer.envelope(t, func(p *grant.Payload) { p.PolicyDigest = strings.Repeat("0", 64) }), grant.ErrPolicyDigest, "policyDigest"},
		{"too early", b.signer.envelope(t, func(p *grant.Payload) { p.NotBefore = p.NotBefore.Add(30 * time.Minute) }), grant.ErrNotYet, "notBefore"},
		{"too late", b.signer.envelope(t, func(p *grant.Payload) {
			p.NotBefore, p.NotAfter = p.NotBefore.Add(-time.Hour), p.NotBefore.Add(-time.Minute)
		}), grant.ErrExpired, "notAfter"},
		{"over the cap", b.signer.envelope(t, func(p *grant.Payload) { p.Duration = 16 * time.Minute }), policy.ErrRefused, "duration"},
		{"the node's own address", b.signer.envelope(t, func(p *grant.Payload) { p.Addresses = b.own }), policy.ErrRefused, "addresses[0]"},
		{"another port", b.signer.envelope(t, func(p *grant.Payload) { p.Ports = []uint16{22} }), policy.ErrRefused, "ports[0]"},
		{"another client of a live path", b.signer.envelope(t, nil), ErrOverlap, live.ID},
		{"used before", used, store.ErrReplayed, ""},
	} {
		_, err := l.Activate(t.Context(), c.envelope, "uid:0")
		if !errors.Is(err, c.is) || !contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
		if status := toStatus(err).Error(); !contains(status, "hint: ") {
			t.Errorf("%s: no next step in %q", c.name, status)
		}
		if states, open := l.states(); len(states) != 1 || len(open) != 1 || open[live.ID] != 1 {
			t.Errorf("%s: changed something: %v, open %v", c.name, states, open)
		}
		if steps := l.steps(); steps[len(steps)-1] != stepRefused {
			t.Errorf("%s: the refusal is not recorded: %v", c.name, steps)
		}
	}
}

func TestGrantIsUsedOnce(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	envelope := b.signer.envelope(t, nil)
	row, err := l.Activate(t.Context(), envelope, "uid:0")
	must(t, err)
	_, err = l.Revoke(t.Context(), row.ID, "enough", "uid:7")
	must(t, err)
	l.kill()
	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	if _, err := l.Activate(t.Context(), envelope, "uid:0"); !errors.Is(err, store.ErrReplayed) {
		t.Errorf("second use: %v", err)
	}
	if _, open := l.states(); len(open) != 0 {
		t.Errorf("open: %v", open)
	}
	if _, err := l.Revoke(t.Context(), row.ID, "again", "uid:7"); !errors.Is(err, ErrNoGrant) {
		t.Errorf("second revoke: %v", err)
	}
	events := l.storedEvents()
	if last := events[1]; last.Step != stepRevoked || last.Actor != "uid:7" || last.Why != "enough" || last.Service != "postgres" {
		t.Errorf("event of the revoke: %v", last)
	}
}

func TestDeadlineIsCappedAndEnds(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	long, err := l.Activate(t.Context(), b.signer.envelope(t, func(p *grant.Payload) {
		p.NotAfter, p.Duration = p.NotBefore.Add(2*time.Minute), 10*time.Minute
	}), "uid:0")
	must(t, err)
	if left := long.DeadlineBoot - datapath.BootTime(); left > time.Minute+time.Second {
		t.Errorf("%s left beyond not-after", left)
	}
	paths, err := l.datapath.Paths()
	must(t, err)
	if paths[0].Deadline != long.DeadlineBoot {
		t.Errorf("the kernel has %s, the record %s", paths[0].Deadline, long.DeadlineBoot)
	}
	next, err := l.tick(t.Context())
	must(t, err)
	if states, open := l.states(); states[long.ID] != store.StateActive || open[long.ID] != 1 || next != time.Second {
		t.Errorf("before the deadline: %v, open %v, next %s", states, open, next)
	}
	b.clock.boot = time.Hour // both clocks go on together
	b.clock.wall = time.Hour
	_, err = l.tick(t.Context())
	must(t, err)
	if states, open := l.states(); states[long.ID] != store.StateExpired || len(open) != 0 {
		t.Errorf("after the deadline: %v, open %v", states, open)
	}
	if got, want := l.steps(), []string{stepActivated, stepExpired}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestNothingIsRevivedAfterReboot(t *testing.T) {
	b := newTestbed(t, 16)
	b.bootID = "another-boot"
	l := b.begin()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	l.kill()
	b.bootID = ""
	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	rows, err := l.all(t.Context())
	must(t, err)
	if _, open := l.states(); rows[0].ID != row.ID || rows[0].State != stateEnded || rows[0].EndedWhy != "reboot" || len(open) != 0 {
		t.Errorf("%+v, open %v", rows[0], open)
	}
}

func TestNothingIsRevivedAfterTheClockMoved(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	l.kill()
	b.clock.wall = -time.Minute
	l = b.begin()
	defer l.kill()
	must(t, l.adopt(t.Context()))
	if states, open := l.states(); states[row.ID] != stateEnded || len(open) != 0 {
		t.Errorf("%v, open %v", states, open)
	}
}

// TestPathsOutOfNowhere: a path that somebody wrote into the map, and one that somebody ended there.
func TestPathsOutOfNowhere(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	_, err = l.datapath.OpenPath(datapath.Path{Grant: "forged", Client: clientB, ServiceID: 1, Ports: []uint16{5432},
		Deadline: datapath.BootTime() + time.Minute})
	must(t, err)
	must(t, l.datapath.EndPath(row.Slots[0], datapath.PathRevoked))
	_, err = l.tick(t.Context())
	must(t, err)
	rows, err := l.all(t.Context())
	must(t, err)
	if _, open := l.states(); len(open) != 0 || rows[0].State != store.StateRevoked {
		t.Errorf("%+v, open %v", rows[0], open)
	}
	if events := l.storedEvents(); events[1].Actor != "kernel" {
		t.Errorf("actor of a revoke by hand: %v", events[1])
	}
}

func TestFullTableUndoesTheActivation(t *testing.T) {
	b := newTestbed(t, 3)
	l := b.begin()
	defer l.kill()
	first, err := l.Activate(t.Context(), b.signer.envelope(t, two), "uid:0")
	must(t, err)
	third, fourth := netip.MustParseAddr("10.1.0.3"), netip.MustParseAddr("10.1.0.4")
	second := b.signer.envelope(t, func(p *grant.Payload) { p.Addresses = []netip.Addr{third, fourth} })
	if _, err := l.Activate(t.Context(), second, "uid:0"); !errors.Is(err, datapath.ErrPathsFull) {
		t.Errorf("%v", err)
	}
	if _, open := l.states(); len(open) != 1 || open[first.ID] != 2 {
		t.Errorf("open: %v", open)
	}
	l.recorded()
	_, err = l.Revoke(t.Context(), first.ID, "make room", "uid:0")
	must(t, err)
	_, err = l.tick(t.Context()) // ended slots are known, and kept for people to look at
	must(t, err)
	again := b.signer.envelope(t, func(p *grant.Payload) { p.Addresses = []netip.Addr{third, fourth} })
	if _, err := l.Activate(t.Context(), again, "uid:0"); err != nil {
		t.Errorf("slots of ended grants are not given back when needed: %v", err)
	}
}

func TestEndedSlotsAreFreedLater(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, two), "uid:0")
	must(t, err)
	_, err = l.Revoke(t.Context(), row.ID, "", "uid:0")
	must(t, err)
	for _, want := range []int{2, 2, 0} {
		_, err = l.tick(t.Context())
		must(t, err)
		paths, err := l.datapath.Paths()
		must(t, err)
		if len(paths) != want {
			t.Errorf("%d slots in use, want %d", len(paths), want)
		}
		b.clock.boot += keepEnded * 2 / 3
	}
}

func TestResourcesThatChangeEndGrants(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	must(t, l.recheck(t.Context(), l.enforced()))
	if _, open := l.states(); open[row.ID] != 1 {
		t.Fatalf("ended by resources that did not change: %v", open)
	}
	tighter, err := policy.Parse("test.yaml", []byte(b.signer.resources("30s")))
	must(t, err)
	must(t, l.recheck(t.Context(), &enforced{verified: tighter, set: tighter, services: l.enforced().services}))
	rows, err := l.all(t.Context())
	must(t, err)
	if _, open := l.states(); len(open) != 0 || rows[0].State != store.StateRevoked || !contains(rows[0].EndedWhy, "resources changed", "duration") {
		t.Errorf("%+v, open %v", rows[0], open)
	}
}

// TestPolicyEndsPaths: a path ends with its policy, and at once when that is to end sooner.
func TestPolicyEndsPaths(t *testing.T) {
	b := newTestbed(t, 16)
	ending := func(at time.Time) *policy.Set {
		set, err := policy.Parse("test.yaml", []byte(strings.Replace(b.signer.resources("10m"), "requesters: [alice]\n",
			"requesters: [alice]\n  notAfter: "+at.Format(time.RFC3339)+"\n", 1)))
		must(t, err)
		return set
	}
	end := time.Now().UTC().Truncate(time.Second).Add(30 * time.Second) // before the minute of the grant
	b.set = ending(end)
	l := b.begin()
	defer l.kill()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	paths, err := l.datapath.Paths()
	must(t, err)
	if left := paths[0].Deadline - datapath.BootTime(); !row.Deadline.Equal(end) || left > time.Until(end)+time.Second {
		t.Fatalf("recorded until %v, in the kernel for %v; its policy ends at %v", row.Deadline, left, end)
	}
	must(t, l.recheck(t.Context(), &enforced{verified: ending(end), set: ending(end), services: l.enforced().services}))
	if _, open := l.states(); open[row.ID] != 1 {
		t.Fatal("ended by a policy that ends no sooner")
	}
	must(t, l.recheck(t.Context(), &enforced{verified: ending(end.Add(-5 * time.Second)), set: ending(end.Add(-5 * time.Second)), services: l.enforced().services}))
	rows, err := l.all(t.Context())
	must(t, err)
	if _, open := l.states(); len(open) != 0 || !contains(rows[0].EndedWhy, "resources changed", "ends it sooner") {
		t.Errorf("%+v, open %v", rows[0], open)
	}
}

func TestClockJumpEndsAllPaths(t *testing.T) {
	b := newTestbed(t, 16)
	l := b.begin()
	defer l.kill()
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	var alarms []alarmName
	k := &keeper{datapath: l.datapath, grants: l.grants, lease: 10 * time.Second, clock: b.clock.clock(), problems: l.problems,
		alarm: func(name alarmName, _ string) { alarms = append(alarms, name) }, pulse: newPulse()}
	beat := func() {
		k.tick()
		k.settle(t.Context(), k.takeLeft())
		if wrong := l.problems.lines(); len(wrong) > 0 {
			t.Error(wrong)
		}
	}
	k.begin()
	beat()
	if _, open := l.states(); open[row.ID] != 1 {
		t.Fatalf("ended without a jump: %v", open)
	}
	b.clock.wall = 6 * time.Second
	beat()
	rows, err := l.all(t.Context())
	must(t, err)
	if _, open := l.states(); len(open) != 0 || rows[0].State != store.StateRevoked || !contains(rows[0].EndedWhy, "clock moved") {
		t.Errorf("%+v, open %v", rows[0], open)
	}
	if !slices.Equal(alarms, []alarmName{alarmClockJump}) {
		t.Errorf("alarms are %v", alarms)
	}
	left, err := l.datapath.LeaseLeft()
	must(t, err)
	if left < 9*time.Second {
		t.Errorf("lease of %s left", left)
	}
}

// TestLetGoIsTriedAgain: what could not be ended when its holder let go of it is not open until its deadline.
func TestLetGoIsTriedAgain(t *testing.T) {
	b := newTestbed(t, 16)
	b.use(strings.Replace(b.signer.resources("15m"), "requesters: [alice]", `requesters: ["spiffe://example.org/*"]`, 1))
	l := b.begin()
	defer func() { l.kill() }()
	p := b.signer.payload(t, func(p *grant.Payload) { p.Requester = backup.String() })
	h, err := l.ActivateFor(t.Context(), wanted{p, "svid:0"})
	must(t, err)
	live := l.datapath
	broken, err := datapath.Open(b.config)
	must(t, err)
	must(t, broken.Close())
	l.datapath = broken
	if err := l.LetGo(t.Context(), h, whyGivenBack); err == nil {
		t.Error("ended by a datapath that is closed")
	}
	l.datapath = live
	if _, open := l.states(); open[p.ID] != 1 {
		t.Fatalf("open %v", open)
	}
	if state, why := l.look(p.ID); state != store.StateRevoked || why != whyGivenBack {
		t.Errorf("after a tick it is %s, %s", state, why)
	}
}
