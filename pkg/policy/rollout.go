package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// Rollout takes services from the mode that they say to a stricter one, on some nodes after others. On a node where too much is refused
// that was served before, a service falls back from Enforce to Shadow by itself: whoever signs a Rollout allows that in advance, and
// nothing else. No service is ever less protected than its own mode says.
type Rollout struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     RolloutSpec `json:"spec" yaml:"spec"`
	// Source is where it was read.
	Source Source `json:"-" yaml:"-"`
}

// RolloutSpec is what a Rollout says.
type RolloutSpec struct {
	// Services are protected services of the set. Each is in one Rollout at most.
	Services []string `json:"services" yaml:"services"`
	// Operators are people, and groups as group:NAME, who may have a wave begin, and go on after a halt, by a signature with a key of
	// the use rollout.
	Operators []string `json:"operators" yaml:"operators"`
	// Waves begin one after the other. At least one.
	Waves []Wave `json:"waves" yaml:"waves"`
	// Budget is what may go wrong on a node before its services fall back.
	Budget ErrorBudget `json:"budget" yaml:"budget"`
	// Advance says whether `sallyport rollout run` may sign for the next wave by itself: Manual, also when it is not written, or Auto.
	Advance string `json:"advance,omitempty" yaml:"advance,omitempty"`
}

// Who has the next wave begin.
const (
	AdvanceManual = "Manual"
	AdvanceAuto   = "Auto"
)

// Wave is nodes, and the mode that they go over to together.
type Wave struct {
	Name string `json:"name" yaml:"name"`
	// Nodes are names of nodes, in which * stands for anything.
	Nodes []string `json:"nodes,omitempty" yaml:"nodes,omitempty"`
	// Percent takes in so many of a hundred nodes, by a hash of their names: who is in 10 is in 50, too.
	Percent uint8 `json:"percent,omitempty" yaml:"percent,omitempty"`
	// Mode is Shadow or Enforce.
	Mode Mode `json:"mode" yaml:"mode"`
	// Bake is how long it has to hold before the next wave.
	Bake Duration `json:"bake" yaml:"bake"`
}

// ErrorBudget bounds what may be refused at a service of a Rollout that is enforced. It is spent when more is refused within the window
// than one of its limits says.
type ErrorBudget struct {
	// Refusals is how many connections may be refused. 0, also when it is not written: none, unless percent is written.
	Refusals uint32 `json:"refusals,omitempty" yaml:"refusals,omitempty"`
	// Percent is how many of a hundred connections may be refused, once there were 20 of them.
	Percent uint8    `json:"percent,omitempty" yaml:"percent,omitempty"`
	Window  Duration `json:"window" yaml:"window"`
	// Clients are those whose refusals count. Empty: everybody's.
	Clients []AddressRange `json:"clients,omitempty" yaml:"clients,omitempty"`
	// Except are clients whose refusals do not count: canaries, scanners.
	Except []AddressRange `json:"except,omitempty" yaml:"except,omitempty"`
	// Reasons are those of refusals that count. Empty: every one by which a client is refused that is served otherwise.
	Reasons []string `json:"reasons,omitempty" yaml:"reasons,omitempty"`
}

// brokenFor are the reasons that count where a budget names none: what somebody meets who was served before. Packets that no connection
// of a client sends, and what is cut with the change of mode itself, are no such.
var brokenFor = []flow.Reason{flow.ReasonNoListener, flow.ReasonLegsFull, flow.ReasonNoTLS, flow.ReasonHandshakeFailed,
	flow.ReasonHandshakeTimeout, flow.ReasonNotAuthorised, flow.ReasonNoOwnIdentity, flow.ReasonUnknownService, flow.ReasonUpstreamFailed,
	flow.ReasonLimit, flow.ReasonTokenRefused, flow.ReasonLoginNeeded, flow.ReasonBadRequest, flow.ReasonUnattested, flow.ReasonUDPNoPath,
	flow.ReasonUDPDenied, flow.ReasonLoopbackDenied}

// bounds of what a Rollout says.
const (
	maxWaves  = 32
	maxBake   = 90 * 24 * time.Hour
	minWindow = time.Second
	maxWindow = 24 * time.Hour
)

func (r *Rollout) from(at Source) { r.Source = at }

func (r *Rollout) validate(d *document) {
	d.report("metadata.name", CheckName(r.Name))
	d.checkList("spec.services", r.Spec.Services, "list the services to roll out")
	d.checkList("spec.operators", r.Spec.Operators, "list who may have a wave begin")
	if n := len(r.Spec.Waves); n == 0 || n > maxWaves {
		d.report("spec.waves", faultf("list the waves, first one first", "%d waves are not between 1 and %d", n, maxWaves))
	}
	names := map[string]int{}
	for i, w := range r.Spec.Waves {
		field := fmt.Sprintf("spec.waves[%d]", i)
		w.validate(d, field)
		if at, dup := first(names, w.Name, i); dup {
			d.report(field+".name", faultf("give each wave a name of its own", "%q is already spec.waves[%d]", w.Name, at))
		}
	}
	if !slices.Contains([]string{"", AdvanceManual, AdvanceAuto}, r.Spec.Advance) {
		d.report("spec.advance", faultf("write Manual or Auto", "%q is not known", r.Spec.Advance))
	}
	r.Spec.Budget.validate(d)
}

func (w Wave) validate(d *document, field string) {
	d.report(field+".name", CheckName(w.Name))
	if len(w.Nodes) == 0 && w.Percent == 0 {
		d.report(field, faultf("write nodes: [NAME], or percent: 10", "takes in no node"))
	}
	for i, pattern := range w.Nodes {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			d.report(fmt.Sprintf("%s.nodes[%d]", field, i), faultf("write a name like node-1, or node-*", "%q is no pattern of names", pattern))
		}
	}
	if w.Percent > 100 {
		d.report(field+".percent", faultf("write 1 to 100", "%d %% are more than all nodes", w.Percent))
	}
	if w.Mode != ModeShadow && w.Mode != ModeEnforce {
		d.report(field+".mode", faultf("write Shadow or Enforce", "a wave cannot go over to %q", w.Mode))
	}
	if v := w.Bake.Duration; v <= 0 || v > maxBake {
		d.report(field+".bake", faultf("write a duration such as 24h", "%s is not between 0 and %s", w.Bake, Duration{maxBake}))
	}
}

func (b ErrorBudget) validate(d *document) {
	if b.Percent > 100 {
		d.report("spec.budget.percent", faultf("write 1 to 100, or leave it out", "%d %% cannot be refused", b.Percent))
	}
	if v := b.Window.Duration; v < minWindow || v > maxWindow {
		d.report("spec.budget.window", faultf("write a duration such as 10m", "%s is not between %s and %s", b.Window, Duration{minWindow}, Duration{maxWindow}))
	}
	for i, name := range b.Reasons {
		if _, err := flow.ParseReason(name); err != nil {
			d.report(fmt.Sprintf("spec.budget.reasons[%d]", i), faultf("`sallyport flows --verdict denied` shows the reasons", "no refusal has the reason %q", cut(name)))
		}
	}
}

// checkRollouts reports services and people of Rollouts that do not exist, and services that are in two.
func (p *parser) checkRollouts(services, people, groups map[string]bool) {
	places := map[string]string{}
	for _, l := range p.rollouts {
		l.checkKnown("spec.services", l.value.Spec.Services, services, "no ProtectedService is named %q")
		l.checkWho("spec.operators", l.value.Spec.Operators, people, groups)
		for i, name := range l.value.Spec.Services {
			field := fmt.Sprintf("spec.services[%d]", i)
			if other, taken := claim(places, name, l.place(field)); taken {
				l.report(field, faultf("leave it in one of them", "%q is already rolled out by %s", name, other))
			}
		}
	}
}

// Has tells whether a node is in the wave.
func (w Wave) Has(node string) bool {
	return nodeBucket(node) < w.Percent || slices.ContainsFunc(w.Nodes, func(pattern string) bool {
		ok, err := path.Match(pattern, node)
		return ok && err == nil
	})
}

// nodeBucket is from 0 to 99, the same for a name on every node and in every version.
func nodeBucket(node string) uint8 {
	sum := sha256.Sum256([]byte(node))
	return uint8(binary.BigEndian.Uint64(sum[:8]) % 100)
}

// Plan is the SHA-256, in hex, of what is rolled out where and in which order: a signature for a wave is for this very plan.
func (r Rollout) Plan() string {
	sum := sha256.Sum256(written(struct {
		Name     string
		Services []string
		Waves    []Wave
	}{r.Name, r.Spec.Services, r.Spec.Waves}))
	return hex.EncodeToString(sum[:])
}

// Counts tells whether a refusal of a client, for a reason, is one that the budget is for.
func (b ErrorBudget) Counts(client netip.Addr, reason flow.Reason) bool {
	has := func(ranges []AddressRange) bool {
		return slices.ContainsFunc(ranges, func(r AddressRange) bool { return r.Contains(client.Unmap()) })
	}
	if has(b.Except) || len(b.Clients) > 0 && !has(b.Clients) {
		return false
	}
	if len(b.Reasons) > 0 {
		return slices.Contains(b.Reasons, reason.String())
	}
	return slices.Contains(brokenFor, reason)
}

// String says it in words.
func (b ErrorBudget) String() string {
	text := fmt.Sprintf("%d refused", b.Refusals)
	if b.Percent > 0 {
		if text = fmt.Sprintf("%d %% refused", b.Percent); b.Refusals > 0 {
			text = fmt.Sprintf("%d or %s", b.Refusals, text)
		}
	}
	return text + " within " + b.Window.String()
}

// Rollouts lists the roll-outs by name.
func (s *Set) Rollouts() []Rollout {
	if s == nil {
		return nil
	}
	return slices.Clone(s.rollouts)
}

// Rollout finds a roll-out by its name.
func (s *Set) Rollout(name string) (Rollout, bool) {
	for _, r := range s.Rollouts() {
		if r.Name == name {
			return r, true
		}
	}
	return Rollout{}, false
}

// MayRollOut tells whether a person may say how a roll-out goes on.
func (s *Set) MayRollOut(r Rollout, person string) bool { return s.includes(r.Spec.Operators, person) }

// Stricter gives the stricter of two modes.
func (m Mode) Stricter(than Mode) Mode {
	if m.rank() >= than.rank() {
		return m
	}
	return than
}

func (m Mode) rank() int {
	switch m {
	case ModeObserve:
		return 0
	case ModeShadow:
		return 1
	}
	return 2
}

// AtModes is the set on a node where roll-outs have come so far: services have the given modes where these are stricter than their own.
// The roll-outs are not in it any more.
func (s *Set) AtModes(modes map[string]Mode) *Set {
	if s == nil || len(s.rollouts) == 0 {
		return s
	}
	at := *s
	at.services, at.rollouts = slices.Clone(s.services), nil
	for i := range at.services {
		if mode, ok := modes[at.services[i].Name]; ok {
			at.services[i].Spec.Mode = at.services[i].Spec.Mode.Stricter(mode)
		}
	}
	return at.withRemotes(at.remotes)
}

// mayBeEnforced tells whether there is a node where the service is enforced, or comes to be.
func (s *Set) mayBeEnforced(svc ProtectedService) bool {
	return svc.Enforced() || slices.ContainsFunc(s.rollouts, func(r Rollout) bool { return slices.Contains(r.Spec.Services, svc.Name) })
}
