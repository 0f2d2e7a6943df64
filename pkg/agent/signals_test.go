package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/signal"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
)

// posture is a signal of the source of that name, for a minute.
func (l *life) posture(e signal.Effect, about signal.About) signal.Signal {
	return signal.Signal{Source: "posture", About: about, Effect: e, Until: l.grants.clock.wall().Add(time.Minute), Reason: "its disk is not encrypted"}
}

// heeding is a life whose policy hears posture.
func heeding(t *testing.T, rule string) *life {
	t.Helper()
	b := newTestbed(t, 16)
	b.set = withPolicy(t, b, "signals: ["+rule+"]")
	l := b.begin()
	must(t, l.adopt(t.Context()))
	return l
}

const hearsPosture = `{source: posture, may: [Shorten, Lower, Revoke]}`

func tenMinutes(p *grant.Payload) { p.Duration = 10 * time.Minute }

// again is the next life of an agent.
func (l *life) again() *life {
	l.t.Helper()
	l.kill()
	next := l.begin()
	must(l.t, next.adopt(l.t.Context()))
	return next
}

func (l *life) look(id string) (state, why string) {
	l.t.Helper()
	_, err := l.tick(l.t.Context())
	must(l.t, err)
	rows, err := l.all(l.t.Context())
	must(l.t, err)
	i := slices.IndexFunc(rows, func(r store.GrantRow) bool { return r.ID == id })
	return rows[i].State, rows[i].EndedWhy
}

// TestSignalsForCallers: what an access rule hears is taken, handed to the proxy, and again by the next agent, until it lapses.
func TestSignalsForCallers(t *testing.T) {
	b := newTestbed(t, 16)
	set, err := policy.Parse("test.yaml", []byte(strings.Replace(b.signer.resources("15m"), "  ports: [5432, 5433]\n",
		"  ports: [5432, 5433]\n  access: [{identities: [\"spiffe://example.org/app/*\"], signals: [{source: edr, uids: [7], required: true}]}]\n", 1)))
	must(t, err)
	b.set = set
	l := b.begin()
	must(t, l.adopt(t.Context()))
	file := filepath.Join(b.lab.Dir, policy.SignalsFile)
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nothing was said, and the proxy is told: %v", err)
	}
	allowed := func(name string) bool {
		t.Helper()
		data, err := os.ReadFile(file)
		must(t, err)
		signals, err := policy.ParseSignals(data)
		must(t, err)
		who := policy.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/app/" + name)}
		return set.Heeding(signals).Authorise("postgres", who, nil, l.grants.clock.wall()).Allowed
	}
	say := func(s signal.Signal) error {
		s.Source, s.Reason = "edr", "its disk is not encrypted"
		s.Until = l.grants.clock.wall().Add(time.Minute)
		_, err := l.Signal(t.Context(), s, "uid 7")
		return err
	}
	if err := say(signal.Signal{}); !errors.Is(err, ErrNotBelieved) {
		t.Errorf("of root, whom no rule hears: %v", err)
	}
	must(t, say(signal.Signal{UID: 7}))
	must(t, say(signal.Signal{UID: 7, About: signal.About{Requester: "spiffe://example.org/app/bad"}, Effect: signal.Effect{Revoke: true}}))
	must(t, say(signal.Signal{UID: 7, About: signal.About{Requester: "spiffe://example.org/app/late"}, Effect: signal.Effect{End: l.grants.clock.wall().Add(30 * time.Second)}}))
	must(t, say(signal.Signal{UID: 7, About: signal.About{Grant: "01J8ZQ4X5M3T9V0Y2B7C6D1E4F"}, Effect: signal.Effect{Revoke: true}}))
	for name, want := range map[string]bool{"good": true, "bad": false, "late": true} {
		if allowed(name) != want {
			t.Errorf("%s is let in: %t", name, !want)
		}
	}
	must(t, os.Remove(file))
	l = l.again()
	if !allowed("good") || allowed("bad") {
		t.Error("the next agent hands over something else")
	}
	b.clock.wall += 31 * time.Second
	if allowed("late") || !allowed("good") {
		t.Error("an end that has come is none")
	}
	b.clock.wall += time.Minute
	must(t, say(signal.Signal{UID: 7, About: signal.About{Requester: "spiffe://example.org/app/bad"}}))
	if data, err := os.ReadFile(file); err != nil || strings.Count(string(data), `"source"`) != 1 {
		t.Errorf("what has lapsed is still said: %s, %v", data, err)
	}
}

// TestSignalRevokes: the path is closed when the call returns, and stays so when the signal has lapsed.
func TestSignalRevokes(t *testing.T) {
	l := heeding(t, hearsPosture)
	row, err := l.Activate(t.Context(), l.signer.envelope(t, nil), "uid:0")
	must(t, err)
	concerned, err := l.Signal(t.Context(), l.posture(signal.Effect{Revoke: true}, signal.About{Clients: netip.MustParsePrefix("10.9.0.0/16")}), "uid:0")
	must(t, err)
	if _, open := l.states(); len(concerned) != 0 || open[row.ID] != 1 {
		t.Errorf("a signal about others concerns %v, open %v", concerned, open)
	}
	concerned, err = l.Signal(t.Context(), l.posture(signal.Effect{Revoke: true}, signal.About{Requester: "alice"}), "uid:0")
	must(t, err)
	if _, open := l.states(); !slices.Equal(concerned, []string{row.ID}) || len(open) != 0 {
		t.Errorf("concerns %v, open %v", concerned, open)
	}
	if _, err := l.Activate(t.Context(), l.signer.envelope(t, nil), "uid:0"); !errors.Is(err, ErrSignalled) || !contains(err.Error(), "disk is not encrypted") {
		t.Errorf("activation under it: %v", err)
	}
	l = l.again()
	defer func() { l.kill() }()
	if _, err := l.Activate(t.Context(), l.signer.envelope(t, nil), "uid:0"); !errors.Is(err, ErrSignalled) {
		t.Errorf("activation after a restart: %v", err)
	}
	l.later(2 * time.Minute)
	if state, why := l.look(row.ID); state != store.StateRevoked || !contains(why, "posture: its disk is not encrypted") {
		t.Errorf("%s, %s", state, why)
	}
	_, err = l.Activate(t.Context(), l.signer.envelope(t, nil), "uid:0")
	must(t, err)
}

// TestSignalShortens: what was taken stays taken when the signal lapses and over a restart; a later end gives nothing.
func TestSignalShortens(t *testing.T) {
	l := heeding(t, hearsPosture)
	row, err := l.Activate(t.Context(), l.signer.envelope(t, tenMinutes), "uid:0")
	must(t, err)
	say := func(after time.Duration) {
		_, err := l.Signal(t.Context(), l.posture(signal.Effect{End: l.grants.clock.wall().Add(after)}, signal.About{}), "uid:0")
		must(t, err)
	}
	say(3 * time.Minute)
	say(8 * time.Minute)
	l = l.again()
	defer func() { l.kill() }()
	l.later(2 * time.Minute) // the signals have lapsed
	if state, _ := l.look(row.ID); state != store.StateActive {
		t.Fatalf("%s before its time", state)
	}
	o := &operators{grants: l.grants, datapath: l.datapath, clock: l.grants.clock}
	reply, err := o.Grants(t.Context(), nil)
	must(t, err)
	if g := reply.GetGrants()[0]; g.GetDeadline().AsTime().Sub(row.Activated) > 4*time.Minute || !slices.Contains(g.GetSignals(), "posture: its disk is not encrypted") {
		t.Errorf("shown as %v", g)
	}
	l.later(time.Minute + 5*time.Second)
	if state, why := l.look(row.ID); state != store.StateExpired || !contains(why, "shortened: ", "posture: its disk is not encrypted") {
		t.Errorf("%s, %s", state, why)
	}
}

// TestSignalsBeforeActivation: the kernel gets what they leave, and the next agent agrees with it.
func TestSignalsBeforeActivation(t *testing.T) {
	l := heeding(t, hearsPosture+`, {source: firstSeen, shortenTo: 5m}`)
	_, err := l.Signal(t.Context(), l.posture(signal.Effect{Budget: policy.Budget{Bytes: 4096}}, signal.About{Service: "postgres"}), "uid:0")
	must(t, err)
	row, err := l.Activate(t.Context(), l.signer.envelope(t, func(p *grant.Payload) { p.Duration, p.Budget.Connections = 10*time.Minute, 7 }), "uid:0")
	must(t, err)
	paths, err := l.datapath.Paths()
	must(t, err)
	left := paths[0].Deadline - l.grants.clock.boot()
	if b := paths[0].Budget; b.Bytes != 4096 || b.Connections != 7 || left > 5*time.Minute || left < 4*time.Minute || paths[0].Deadline != row.DeadlineBoot {
		t.Errorf("the kernel has %+v for %v", b, left)
	}
	events := l.storedEvents()
	if said := strings.Join(events[len(events)-1].GetSignals(), "; "); !contains(said, "posture: its disk is not encrypted", "firstSeen: 10.1.0.2 never had a way to postgres") {
		t.Errorf("recorded with %q", said)
	}
	l = l.again()
	defer func() { l.kill() }()
	if state, why := l.look(row.ID); state != store.StateActive {
		t.Errorf("after a restart it is %s: %s", state, why)
	}
	_, err = l.Revoke(t.Context(), row.ID, "next", "uid:0")
	must(t, err)
	row, err = l.Activate(t.Context(), l.signer.envelope(t, tenMinutes), "uid:0")
	must(t, err)
	if life := row.Deadline.Sub(row.Activated); life != 10*time.Minute {
		t.Errorf("a client that was seen before got %v", life)
	}
}

// TestRequiredSignal: silence is the worst.
func TestRequiredSignal(t *testing.T) {
	l := heeding(t, `{source: posture, may: [Revoke], required: true}`)
	defer func() { l.kill() }()
	if _, err := l.Activate(t.Context(), l.signer.envelope(t, nil), "uid:0"); !errors.Is(err, ErrSignalled) || !contains(err.Error(), "nothing was heard of posture") {
		t.Errorf("in silence: %v", err)
	}
	well := l.posture(signal.Effect{}, signal.About{Service: "postgres"})
	_, err := l.Signal(t.Context(), well, "uid:0")
	must(t, err)
	row, err := l.Activate(t.Context(), l.signer.envelope(t, tenMinutes), "uid:0")
	must(t, err)
	l.later(30 * time.Second)
	if state, why := l.look(row.ID); state != store.StateActive {
		t.Errorf("while all is well: %s, %s", state, why)
	}
	l.later(31 * time.Second)
	if state, why := l.look(row.ID); state != store.StateRevoked || !contains(why, "nothing was heard of posture") {
		t.Errorf("in silence again: %s, %s", state, why)
	}
}

// TestSignalsThatNobodyHeeds are refused, and change nothing.
func TestSignalsThatNobodyHeeds(t *testing.T) {
	l := heeding(t, hearsPosture)
	defer func() { l.kill() }()
	good := l.posture(signal.Effect{Revoke: true}, signal.About{})
	for name, change := range map[string]func(*signal.Signal){
		"another source":  func(s *signal.Signal) { s.Source = "rumour" },
		"a built-in name": func(s *signal.Signal) { s.Source = policy.SignalFirstSeen },
		"another user":    func(s *signal.Signal) { s.UID = 7 },
		"lapsed":          func(s *signal.Signal) { s.Until = s.Until.Add(-time.Hour) },
		"for ever":        func(s *signal.Signal) { s.Until = s.Until.Add(31 * 24 * time.Hour) },
		"without reason":  func(s *signal.Signal) { s.Reason = "" },
		"a long grant":    func(s *signal.Signal) { s.About.Grant = strings.Repeat("0", 27) },
		"a long service":  func(s *signal.Signal) { s.About.Service = strings.Repeat("a", 4<<20) },
		"a false line":    func(s *signal.Signal) { s.About.Requester = "alice\nbob" },
	} {
		s := good
		change(&s)
		_, err := l.Signal(t.Context(), s, "uid:7")
		if err == nil || !contains(toStatus(err).Error(), "hint: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(l.storedEvents()) != 0 || len(l.signals) != 0 {
		t.Errorf("kept %v, recorded %v", l.signals, l.steps())
	}
}

// TestManySignals: each user has room for so many of each source. Who says much takes none of others, can say something else
// about what it spoke of, and has room again when some have lapsed.
func TestManySignals(t *testing.T) {
	l := heeding(t, `{source: posture, uids: [7, 8], may: [Revoke]}, {source: incident, uids: [7], may: [Revoke]}`)
	defer func() { l.kill() }()
	said := func(source string, uid uint32, client int, e signal.Effect) error {
		s := l.posture(e, signal.About{Clients: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(client >> 8), byte(client)}), 32)})
		s.Source, s.UID = source, uid
		_, err := l.Signal(t.Context(), s, "uid:7")
		return err
	}
	for i := range maxSignals { // as if they had been said: each is a durable write
		s := l.posture(signal.Effect{}, signal.About{Clients: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), 32)})
		s.UID = 7
		notes, err := l.signalNotes(s)
		must(t, err)
		l.signals[notes[0].Name] = s
	}
	if err := said("posture", 7, maxSignals, signal.Effect{}); !errors.Is(err, ErrManySignals) || !contains(toStatus(err).Error(), "hint: ") {
		t.Errorf("one more: %v", err)
	}
	before := len(l.signals)
	must(t, said("posture", 7, 0, signal.Effect{Revoke: true})) // about what it had spoken of
	if len(l.signals) != before {
		t.Errorf("%d signals, want %d", len(l.signals), before)
	}
	must(t, said("incident", 7, maxSignals, signal.Effect{Revoke: true}))
	must(t, said("posture", 8, 0, signal.Effect{}))
	envelope := func(client byte) []byte {
		return l.signer.envelope(t, func(p *grant.Payload) { p.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 9, 0, client})} })
	}
	if _, err := l.Activate(t.Context(), envelope(0), "uid:0"); !errors.Is(err, ErrSignalled) {
		t.Errorf("another user has lifted it: %v", err)
	}
	_, err := l.Activate(t.Context(), envelope(1), "uid:0")
	must(t, err)
	l.later(2 * time.Minute)
	must(t, said("posture", 7, maxSignals, signal.Effect{}))
	if len(l.signals) != 1 {
		t.Errorf("%d signals are kept, of which one counts", len(l.signals))
	}
}

// TestSignalsInAFullStore: one that revokes is heeded, kept over a restart and on record, once where it is said again and again; one that
// takes nothing is refused.
func TestSignalsInAFullStore(t *testing.T) {
	b := newTestbed(t, 16)
	dir := filepath.Join(b.lab.Dir, "state")
	must(t, os.MkdirAll(dir, 0o700))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m,mode=0700"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	b.set = withPolicy(t, b, "signals: ["+hearsPosture+"]")
	l := b.begin()
	must(t, l.adopt(t.Context()))
	row, err := l.Activate(t.Context(), b.signer.envelope(t, nil), "uid:0")
	must(t, err)
	full, err := os.Create(filepath.Join(dir, "filler"))
	must(t, err)
	for page := make([]byte, 4096); err == nil; {
		_, err = full.Write(page)
	}
	must(t, full.Close())
	about := signal.About{Requester: "alice"}
	if _, err := l.Signal(t.Context(), l.posture(signal.Effect{}, about), "uid:0"); !errors.Is(err, store.ErrFull) {
		t.Errorf("one that takes nothing: %v", err)
	}
	for range 3 {
		_, err := l.Signal(t.Context(), l.posture(signal.Effect{Revoke: true}, about), "uid:0")
		must(t, err)
	}
	if states, open := l.states(); states[row.ID] != store.StateRevoked || len(open) != 0 {
		t.Errorf("revoked, and %v, open %v", states, open)
	}
	if got, want := l.steps(), []string{stepActivated, stepSignalled, stepRevoked}; !slices.Equal(got, want) {
		t.Errorf("on record: %v, want %v", got, want)
	}
	l.later(signalsTold)
	other := l.posture(signal.Effect{Revoke: true}, about)
	_, err = l.Signal(t.Context(), other, "uid:0")
	must(t, err)
	other.Reason = "another one"
	_, err = l.Signal(t.Context(), other, "uid:0")
	must(t, err)
	if got := l.steps(); len(got) != 5 || got[3] != stepSignalled || got[4] != stepSignalled {
		t.Errorf("on record a minute later, and for another reason: %v", got)
	}
	said := 0
	for i := range 2 * maxUrged {
		_, err := l.Signal(t.Context(), l.posture(signal.Effect{Revoke: true}, signal.About{Requester: fmt.Sprint("somebody", i)}), "uid:0")
		if err == nil {
			said++
		} else if !errors.Is(err, store.ErrFull) {
			t.Fatal(err)
		}
	}
	if said != maxUrged-2 {
		t.Errorf("one source has %d places, want %d", said, maxUrged-2)
	}
	l = l.again()
	defer func() { l.kill() }()
	if len(l.signals) != 1+said {
		t.Errorf("after a restart: %v", l.signals)
	}
}
