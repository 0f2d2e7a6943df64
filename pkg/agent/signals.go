package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/signal"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// What callers of Signal and Activate may match.
var (
	// ErrSignalled says that signals forbid the grant.
	ErrSignalled = errors.New("signals forbid this grant")
	// ErrNotBelieved says that no policy lets the caller speak for the source.
	ErrNotBelieved = errors.New("no policy believes this user for this source")
	// ErrManySignals says that there is no room for one more of this user for this source.
	ErrManySignals = errors.New("too many signals of one user for one source count at a time")
)

const (
	noteOfSignal = "signal/" // where the store has a signal, with its source, who spoke for it and what it is about behind it
	noteOfLimits = "limits/" // where the store has what signals left of a grant, with its id behind it
	maxSignals   = 1024      // of one user for one source that count at a time: whoever says much takes no room of others
	longestTerm  = 30 * 24 * time.Hour
	signalsTold  = time.Minute // in a full store: how often the same is recorded
	maxUrged     = 16          // of one user for one source that are recorded there meanwhile
)

// limits are what signals left of an active grant.
type limits struct {
	signal.Limits
	Boot time.Duration // Limits.End as CLOCK_BOOTTIME; 0: not sooner than the deadline
}

// ends is when a grant is over at the latest: at its deadline, which the kernel keeps, or sooner by signals.
func (h *held) ends() time.Duration {
	if h.limits.Boot != 0 {
		return min(h.limits.Boot, h.row.DeadlineBoot)
	}
	return h.row.DeadlineBoot
}

// facts are what signals look at.
func (h *held) facts() signal.Facts {
	return signal.Facts{Grant: h.row.ID, Requester: h.payload.Requester, Service: h.payload.Service, Clients: h.payload.Addresses,
		Ports: len(portsOf(h.payload, h.service)), Duration: h.row.Deadline.Sub(h.row.Activated)}
}

// heed takes from a grant on its way what signals take: its paths are opened with the rest. g.mu is held.
func (g *grants) heed(h *held, now time.Time) (err error) {
	rules, f := g.policyOf(h).Spec.Signals, h.facts()
	said := slices.Concat(g.said(), signal.BuiltIn(f, g.history.of(f, now), rules, now))
	l := signal.Fold(signal.Limits{End: h.row.Deadline, Budget: h.payload.Budget}, f, rules, said, now)
	h.limits.Limits = l
	if l.Revoked || !l.End.After(now) {
		return fmt.Errorf("%w: %s", ErrSignalled, strings.Join(l.Reasons, "; "))
	}
	h.row.DeadlineBoot -= h.row.Deadline.Sub(l.End)
	h.row.Deadline, h.payload.Budget = l.End, l.Budget
	h.row.Payload, err = json.Marshal(h.payload)
	return err
}

// noteLimits is what the store keeps of them.
func (h *held) noteLimits() (store.Note, error) {
	data, err := json.Marshal(h.limits)
	if err != nil {
		return store.Note{}, fmt.Errorf("keep limits: %w", err)
	}
	return store.Note{Name: noteOfLimits + h.row.ID, Data: data}, nil
}

// activationNotes keep why a grant has less than it asked for, and what else was said.
func (h *held) activationNotes() ([]store.Note, error) {
	if len(h.limits.Reasons) == 0 {
		return nil, nil
	}
	n, err := h.noteLimits()
	return []store.Note{n}, err
}

// heedActive takes from an active grant what signals take by now, and gives its end when nothing is left. The kernel keeps the
// deadline and the budget that its paths were opened with; what is less is kept by this agent. g.mu is held.
func (g *grants) heedActive(ctx context.Context, h *held, p *overseen, paths []datapath.PathStatus, now time.Duration) (e ending, over bool, err error) {
	if rules := p.Spec.Signals; len(rules) > 0 {
		wall := g.clock.wall()
		said := slices.Concat(p.said, signal.NearBudget(mostUsed(paths), rules, wall))
		l := signal.Fold(h.limits.Limits, h.facts(), rules, said, wall)
		if l.Revoked { // the end of the grant tells of it
			h.limits.Limits = l
		} else if err := g.lessen(ctx, h, l, wall, now); err != nil {
			return ending{}, false, err
		}
	}
	e, over = h.spentBySignals(paths, now)
	return e, over, nil
}

// lessen records that a grant has less than before.
func (g *grants) lessen(ctx context.Context, h *held, l signal.Limits, wall time.Time, now time.Duration) error {
	if was := h.limits; l.End.Equal(was.End) && l.Budget == was.Budget && len(l.Reasons) == len(was.Reasons) {
		return nil
	}
	before := h.limits
	if h.limits.Limits = l; l.End.Before(before.End) { // converted once: the wall clock may be set later
		h.limits.Boot = min(now+l.End.Sub(wall), h.ends())
	}
	event := newEvent(stepSignalled, "agent", strings.Join(l.Reasons, "; "), g.clock)
	describe(event, h)
	data, err := encodeEvent(event)
	if err == nil {
		err = g.keepLimits(ctx, h, data)
	}
	if err != nil {
		h.limits = before
		return fmt.Errorf("record signal: %w", err)
	}
	g.events.count(stepSignalled)
	g.log.Warn("grant has less by signals", "grant", h.row.ID, "end", l.End, "budget", l.Budget, "why", l.Reasons)
	g.kick()
	return nil
}

func (g *grants) keepLimits(ctx context.Context, h *held, event []byte) error {
	n, err := h.noteLimits()
	if err != nil {
		return err
	}
	return g.store.KeepUrgent(ctx, []store.Note{n}, event)
}

// spentBySignals tells whether what signals left of a grant is over.
func (h *held) spentBySignals(paths []datapath.PathStatus, now time.Duration) (ending, bool) {
	e := ending{grant: h.row.ID, actor: "agent"}
	if !h.limits.Revoked && h.limits.Boot == 0 && h.limits.Budget == h.payload.Budget {
		return e, false // the kernel keeps the rest
	}
	why := strings.Join(h.limits.Reasons, "; ")
	switch {
	case h.limits.Revoked:
		return e.revoked("agent", why), true
	case h.limits.Boot != 0 && now >= h.limits.Boot:
		return e.as(stateExpired, stepExpired, datapath.PathExpired, "shortened: "+why), true
	}
	for _, p := range paths {
		p.Budget = budgetOf(grant.Payload{Budget: h.limits.Budget})
		for _, l := range limitsOf(p) {
			if l.used >= l.most {
				return e.as(stateSpent, stepSpent, datapath.PathSpent, "lowered: "+why), true
			}
		}
	}
	return e, false
}

// mostUsed is the largest part of a limit that any path has used, in per cent.
func mostUsed(paths []datapath.PathStatus) (most uint64) {
	for _, p := range paths {
		for _, l := range limitsOf(p) {
			most = max(most, percent(l.used, l.most))
		}
	}
	return most
}

// said are the signals that were given, in a fixed order. g.mu is held.
func (g *grants) said() []signal.Signal {
	if len(g.signals) == 0 {
		return nil
	}
	out := make([]signal.Signal, 0, len(g.signals))
	for _, name := range slices.Sorted(maps.Keys(g.signals)) {
		out = append(out, g.signals[name])
	}
	return out
}

// Signal takes what a user says for a source, in the place of what that user said for it before about the same. When it returns without error that is
// durable, what it takes is taken, and the proxy has it for callers. It gives the active grants that it concerns.
func (g *grants) Signal(ctx context.Context, s signal.Signal, actor string) ([]string, error) {
	if err := g.takeSignal(ctx, s, actor); err != nil {
		return nil, err
	}
	handed := g.handSignals()
	concerned, err := g.heedAll(ctx, s)
	return concerned, errors.Join(err, handed)
}

// takeSignal makes it durable. What is activated from then on heeds it.
func (g *grants) takeSignal(ctx context.Context, s signal.Signal, actor string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.checkSignal(s); err != nil {
		return err
	}
	notes, err := g.signalNotes(s)
	if err != nil {
		return err
	}
	event, err := encodeEvent(newEvent(stepSignalled, actor, inWordsOf(s), g.clock))
	if err == nil {
		err = g.keepSignal(ctx, s, notes, event)
	}
	if err != nil {
		return fmt.Errorf("take signal: %w", err)
	}
	for _, n := range notes[1:] {
		delete(g.signals, n.Name)
	}
	g.signals[notes[0].Name] = s
	g.events.count(stepSignalled)
	g.kick()
	return nil
}

// handSignals gives the proxy what was said by now.
func (g *grants) handSignals() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.hand()
}

// hand gives the proxy what was said, but for what is about one grant. Which of it counts, policy says there. g.mu is held.
func (g *grants) hand() error {
	all, now := []policy.Said{}, g.clock.wall()
	for _, s := range g.said() {
		if s.About.Grant == "" && now.Before(s.Until) {
			all = append(all, aboutCallers(s))
		}
	}
	if _, err := os.Stat(g.saidFile); g.saidFile == "" || len(all) == 0 && errors.Is(err, os.ErrNotExist) {
		return nil // nobody has heard anything
	}
	data, err := policy.WriteSignals(all)
	if err == nil {
		err = keepFile(g.saidFile, data, 0o644)
	}
	if err != nil {
		return fmt.Errorf("hand signals to the proxy: %w", err)
	}
	return nil
}

// aboutCallers is what a signal says about those who come by the proxy. A budget is nothing that they have.
func aboutCallers(s signal.Signal) policy.Said {
	said := policy.Said{Source: s.Source, UID: s.UID, Caller: s.About.Requester, Service: s.About.Service, Clients: s.About.Clients,
		Against: s.Effect.Revoke || !s.Effect.End.IsZero(), Until: s.Until, Reason: s.Reason}
	if !s.Effect.Revoke {
		said.From = s.Effect.End
	}
	return said
}

// keepSignal makes a signal durable, with its record. In a full store one that takes something away has room all the same, if its source
// has not taken too much of it just now; what only says the same for longer takes its place without a record. g.mu is held.
func (g *grants) keepSignal(ctx context.Context, s signal.Signal, notes []store.Note, event []byte) error {
	err := g.store.Keep(ctx, notes, event)
	if !errors.Is(err, store.ErrFull) || s.Effect == (signal.Effect{}) {
		return err
	}
	name, now := notes[0].Name, g.clock.boot()
	g.urged = slices.DeleteFunc(g.urged, func(u urgedSignal) bool { return now-u.at >= signalsTold })
	before := g.signals[name]
	if before.Effect == s.Effect && before.Reason == s.Reason && slices.ContainsFunc(g.urged, func(u urgedSignal) bool { return u.name == name }) {
		return g.store.KeepUrgent(ctx, notes)
	}
	lately := 0
	for _, u := range g.urged {
		if u.source == s.Source && u.uid == s.UID {
			lately++
		}
	}
	if lately >= maxUrged {
		return err
	}
	if err := g.store.KeepUrgent(ctx, notes, event); err != nil {
		return err
	}
	g.urged = append(g.urged, urgedSignal{name: name, source: s.Source, uid: s.UID, at: now})
	return nil
}

// urgedSignal is a signal that was recorded where only what takes away has room.
type urgedSignal struct {
	name, source string
	uid          uint32
	at           time.Duration // boot time
}

// signalNotes keep a signal, and forget those that have lapsed.
func (g *grants) signalNotes(s signal.Signal) ([]store.Note, error) {
	data, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("take signal: %w", err)
	}
	about, err := json.Marshal(s.About)
	if err != nil {
		return nil, fmt.Errorf("take signal: %w", err)
	}
	sum := sha256.Sum256(about)
	notes := []store.Note{{Name: fmt.Sprintf("%s%s/%d/%s", noteOfSignal, s.Source, s.UID, hex.EncodeToString(sum[:16])), Data: data}}
	now, live := g.clock.wall(), 0
	for name, old := range g.signals {
		switch {
		case name == notes[0].Name: // it takes that place
		case !now.Before(old.Until):
			notes = append(notes, store.Note{Name: name})
		case old.Source == s.Source && old.UID == s.UID:
			live++
		}
	}
	if live >= maxSignals {
		return nil, ErrManySignals
	}
	return notes, nil
}

// heedAll has every active grant heed all signals now, and gives those that the signal concerns.
func (g *grants) heedAll(ctx context.Context, s signal.Signal) (concerned []string, err error) {
	all := g.every()
	carried, err := g.allPaths()
	if err != nil {
		return nil, err
	}
	now, wall := g.clock.boot(), g.clock.wall()
	policies := g.overseers()
	var over []doomed
	err = inTurns(&g.mu, all, func(h *held) error {
		p := policies(h)
		if !g.holds(h) || h.over != nil || !s.Concerns(h.facts(), wall) || !p.Hears(s.Source, s.UID) {
			return nil
		}
		concerned = append(concerned, h.row.ID)
		e, ends, err := g.heedActive(ctx, h, p, carried[h.row.ID], now)
		if ends {
			over = append(over, doomed{h, e})
		}
		return err
	})
	slices.Sort(concerned)
	return concerned, errors.Join(err, g.endMany(ctx, over))
}

// checkSignal refuses what nobody would heed.
func (g *grants) checkSignal(s signal.Signal) error {
	e, now := g.enforced(), g.clock.wall()
	if e == nil {
		return fmt.Errorf("take signal: %w", ErrNoResources)
	}
	heard := e.set.Hears(s.Source, s.UID) || slices.ContainsFunc(e.set.BypassPolicies(), func(p policy.BypassPolicy) bool { return p.Hears(s.Source, s.UID) })
	if !heard || policy.IsBuiltInSignal(s.Source) {
		return fmt.Errorf("take signal of %q from uid %d: %w", plain(s.Source), s.UID, ErrNotBelieved)
	}
	if left := s.Until.Sub(now); left <= 0 || left > longestTerm {
		return &policy.Error{Field: "until", Msg: fmt.Sprintf("%s is not within the next 30 days", s.Until.UTC().Format(time.RFC3339)),
			Hint: "a signal counts for a while, and is given again"}
	}
	if err := checkAbout(s.About); err != nil {
		return err
	}
	if s.Effect != (signal.Effect{}) && s.Reason == "" {
		return &policy.Error{Field: "reason", Msg: "is missing", Hint: "say why, for those whose grant it touches"}
	}
	return nil
}

// checkAbout holds what a signal is about to what grants can have: it is kept, and written into the record.
func checkAbout(a signal.About) error {
	var errs []error
	for _, f := range []struct {
		field, value string
		most         int // bytes
	}{{"grant", a.Grant, maxGrantID}, {"requester", a.Requester, maxText}, {"service", a.Service, maxText}} {
		switch {
		case len(f.value) > f.most:
			errs = append(errs, &policy.Error{Field: f.field, Msg: fmt.Sprintf("has %d bytes, the most is %d", len(f.value), f.most), Hint: "name it as `sallyport grants` shows it"})
		case plain(f.value) != f.value:
			errs = append(errs, &policy.Error{Field: f.field, Msg: "has characters that cannot be shown", Hint: "name it as `sallyport grants` shows it"})
		}
	}
	return errors.Join(errs...)
}

// maxGrantID is the length of a ULID, in bytes.
const maxGrantID = 26

// inWordsOf says for the record what a signal says.
func inWordsOf(s signal.Signal) string {
	about, _ := json.Marshal(s.About)
	effect, _ := json.Marshal(s.Effect)
	return fmt.Sprintf("%s until %s, about %s: %s", s, s.Until.UTC().Format(time.RFC3339), about, effect)
}

// recallSignals goes on with what earlier agents were told, and with what grants there were. One that cannot be read is an
// error: it may have forbidden something. g.mu is held.
func (g *grants) recallSignals(ctx context.Context, rows []store.GrantRow) error {
	notes, err := g.store.Notes(ctx, noteOfSignal)
	if err != nil {
		return err
	}
	g.signals = make(map[string]signal.Signal, len(notes))
	for _, n := range notes {
		var s signal.Signal
		if err := json.Unmarshal(n.Data, &s); err != nil {
			return fmt.Errorf("recall %s: %w", n.Name, err)
		}
		g.signals[n.Name] = s
	}
	g.problems.report(problemGrants, "signals", g.hand()) // the proxy goes on with what it has heard
	for _, row := range rows {
		if p, ok := readPayload(row); ok {
			g.history.note(p, row.Activated)
		}
	}
	return nil
}

// left is what signals left of each grant, as far as the store knows.
func (g *grants) left(ctx context.Context) (map[string]limits, error) {
	notes, err := g.store.Notes(ctx, noteOfLimits)
	if err != nil {
		return nil, err
	}
	out := make(map[string]limits, len(notes))
	for _, n := range notes {
		var l limits
		if err := json.Unmarshal(n.Data, &l); err != nil {
			return nil, fmt.Errorf("recall %s: %w", n.Name, err)
		}
		out[strings.TrimPrefix(n.Name, noteOfLimits)] = l
	}
	return out, nil
}

// recallLimits goes on with what is left of a grant; without a note that is all of it.
func (h *held) recallLimits(left map[string]limits) {
	l, ok := left[h.row.ID]
	if !ok {
		l.Limits = signal.Limits{End: h.row.Deadline, Budget: h.payload.Budget}
	}
	h.limits = l
}
