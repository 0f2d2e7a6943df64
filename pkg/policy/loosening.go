package policy

import (
	"bytes"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"
)

// Loosening is one thing that a set allows and another does not, in words.
type Loosening struct {
	// Resource is the kind and the name.
	Resource string `json:"resource"`
	// Field is empty where it is about the resource as a whole.
	Field string `json:"field,omitempty"`
	// What became of it.
	What string `json:"what"`
}

// String gives "BypassPolicy backup: spec.maxDuration: 15m became 1h".
func (l Loosening) String() string {
	if l.Field == "" {
		return l.Resource + ": " + l.What
	}
	return l.Resource + ": " + l.Field + ": " + l.What
}

// Effect is what a change does to what a set allows.
type Effect string

// Effects of a change. Neither: it lets nobody do more or less.
const (
	Looser  Effect = "looser"
	Tighter Effect = "tighter"
	Neither Effect = "neither"
)

// Change is one thing in which two sets differ, in the words of a loosening.
type Change struct {
	Effect Effect `json:"effect"`
	Loosening
}

// Loosenings lists what is looser in next than in old. A change that is not known to be tighter counts, and so does a
// resource that is gone, whatever it was. Nil for old is a node that has none yet: everything is looser than nothing.
func Loosenings(old, next *Set) (looser []Loosening) {
	for _, c := range Changes(old, next) {
		if c.Effect == Looser {
			looser = append(looser, c.Loosening)
		}
	}
	return looser
}

// Changes lists everything in which next differs from old, with what is looser as Loosenings has it.
func Changes(old, next *Set) []Change {
	if old == nil {
		return []Change{{Looser, Loosening{Resource: "the set", What: "is the first one of this node"}}}
	}
	c := &comparison{}
	before := map[string]resource{}
	for _, r := range old.resources() {
		before[r.String()] = r
	}
	for _, r := range next.resources() {
		c.at = r.String()
		if was, ok := before[r.String()]; ok {
			told := len(c.found)
			c.compare(was.value, r.value)
			if len(c.found) == told && !same(was.value, r.value) {
				c.note(Neither, "", "says the same in other words")
			}
		} else {
			c.added(r.value)
		}
		delete(before, r.String())
	}
	for _, r := range old.resources() {
		if _, gone := before[r.String()]; gone {
			c.at = r.String()
			c.loosen("", "is gone")
		}
	}
	c.taken(old, next)
	c.opened(old, next)
	return c.found
}

// comparison is one of two sets on its way.
type comparison struct {
	at    string // the resource that is being looked at
	found []Change
}

func (c *comparison) loosen(field, format string, args ...any) {
	c.note(Looser, field, format, args...)
}

func (c *comparison) note(effect Effect, field, format string, args ...any) {
	c.found = append(c.found, Change{effect, Loosening{Resource: c.at, Field: field, What: fmt.Sprintf(format, args...)}})
}

// added judges a resource that was not there. What only refuses is no loosening.
func (c *comparison) added(r any) {
	switch r := r.(type) {
	case ProtectedService:
		c.note(ofModes(ProtectedService{Spec: ProtectedServiceSpec{Mode: ModeObserve}}, r), "", "is new")
	case DenyList, GrantTemplate, RemoteService, Rollout:
		c.note(Tighter, "", "is new")
	default:
		c.loosen("", "is new")
	}
}

func (c *comparison) compare(old, next any) {
	switch was := old.(type) {
	case ProtectedService:
		c.service(was.Spec, next.(ProtectedService).Spec)
	case BypassPolicy:
		c.policy(was.Spec, next.(BypassPolicy).Spec)
	case Keyring:
		c.keyring(was.Spec, next.(Keyring).Spec)
	case DenyList:
		c.denyList(was.Spec, next.(DenyList).Spec)
	case IdentityProvider:
		c.provider(was.Spec, next.(IdentityProvider).Spec)
	case RemoteService:
		c.remote(was.Spec, next.(RemoteService).Spec)
	case Rollout:
		rest(c, "spec", was.Spec, next.(Rollout).Spec)
	default:
		if !same(old, next) {
			c.loosen("", "is not what it was")
		}
	}
}

// settle notes a change of a field, which is looser or tighter, and takes the field out of what rest looks at.
func settle[T any](c *comparison, field string, old T, next *T, looser bool) {
	if looser {
		became(c, Looser, field, old, next)
	}
	became(c, Tighter, field, old, next)
}

// became notes a change of a field, and settles it.
func became[T any](c *comparison, effect Effect, field string, old T, next *T) {
	if !same(old, *next) {
		c.note(effect, field, "%v became %v", shown(old), shown(*next))
	}
	*next = old
}

// rest notes every field that was not settled and differs: nobody has said that such a change is tighter.
func rest[T any](c *comparison, field string, old, next T) {
	a, b := reflect.ValueOf(old), reflect.ValueOf(next)
	for i := range a.NumField() {
		name, _, _ := strings.Cut(a.Type().Field(i).Tag.Get("yaml"), ",")
		if was, is := a.Field(i).Interface(), b.Field(i).Interface(); name != "-" && !same(was, is) {
			c.loosen(join(field, name), "%v became %v", shown(was), shown(is))
		}
	}
}

// same compares as the canonical form does: an empty list is none.
func same(a, b any) bool { return reflect.DeepEqual(a, b) || bytes.Equal(written(a), written(b)) }

func written(v any) []byte { return encode([]resource{{value: v}}) }

// shown is a value in one line.
func shown(v any) string {
	if p := reflect.ValueOf(v); p.Kind() == reflect.Pointer && p.IsNil() {
		return "none"
	}
	switch v := v.(type) {
	case time.Time:
		if v.IsZero() {
			return "never"
		}
		return v.Format(time.RFC3339)
	case fmt.Stringer:
		return v.String()
	}
	text := strings.Join(strings.Fields(string(written(v))), " ")
	if s := reflect.ValueOf(v); s.Kind() == reflect.String {
		text = s.String()
	}
	if text == "[]" || text == "" || text == "{}" {
		return "none"
	}
	return cut(text)
}

// beyond lists what of next no entry of old covers.
func beyond[T any](old, next []T, covers func(a, b T) bool) (more []T) {
	for _, n := range next {
		if !slices.ContainsFunc(old, func(o T) bool { return covers(o, n) }) {
			more = append(more, n)
		}
	}
	return more
}

// grows notes each entry of a list that no entry had covered, and settles the list. What goes makes it tighter.
func grows[T any](c *comparison, field string, old []T, next *[]T, covers func(a, b T) bool) {
	moved(c, field, "was added", Looser, old, *next, covers)
	moved(c, field, "was removed", Tighter, *next, old, covers)
	*next = old
}

// shrinks notes each entry that no entry covers any more, and settles the list. What comes makes it tighter.
func shrinks[T any](c *comparison, field string, old []T, next *[]T, covers func(a, b T) bool) {
	moved(c, field, "was removed", Looser, *next, old, covers)
	moved(c, field, "was added", Tighter, old, *next, covers)
	*next = old
}

// moved notes what the list with has and the list without has not. What an entry of without covers has no effect.
func moved[T any](c *comparison, field, how string, effect Effect, without, with []T, covers func(a, b T) bool) {
	isSame := func(a, b T) bool { return same(a, b) }
	for _, m := range beyond(without, with, isSame) {
		if len(beyond(without, []T{m}, covers)) > 0 {
			c.note(effect, field, "%v %s", shown(m), how)
		} else {
			c.note(Neither, field, "%v %s", shown(m), how)
		}
	}
}

// oneOf compares lists of which one has to hold, and of which an empty one asks for nothing.
func oneOf[T any](c *comparison, field string, old []T, next *[]T, covers func(a, b T) bool) {
	switch {
	case len(old) == 0:
		settle(c, field, old, next, false)
	case len(*next) == 0:
		settle(c, field, old, next, true)
	default:
		grows(c, field, old, next, covers)
	}
}

func equal[T comparable](a, b T) bool { return a == b }

func (r AddressRange) covers(of AddressRange) bool {
	return r.Bits() <= of.Bits() && r.Contains(of.Addr())
}

// coversPattern compares two patterns of identities.
func coversPattern(a, b string) bool { return a == b || matches(a, b) }

// laterEnd takes zero for never.
func laterEnd(old, next time.Time) bool {
	return !old.IsZero() && (next.IsZero() || next.After(old))
}

// raised takes 0 for no limit.
func raised(old, next uint64) bool { return old != 0 && (next == 0 || next > old) }

func (c *comparison) service(old, next ProtectedServiceSpec) {
	shrinks(c, "spec.ports", old.Ports, &next.Ports, equal)
	shrinks(c, "spec.addresses", old.Addresses, &next.Addresses, equal)
	c.selector(old.PodSelector, &next.PodSelector)
	became(c, ofModes(ProtectedService{Spec: old}, ProtectedService{Spec: next}), "spec.mode", old.Mode, &next.Mode)
	settle(c, "spec.udp", old.UDP, &next.UDP, old.UDP != UDPAllow && next.UDP == UDPAllow)
	settle(c, "spec.idle", old.Idle, &next.Idle, old.Idle != nil && next.Idle != nil && next.Idle.Duration > old.Idle.Duration)
	is := entries(next.Access)
	grows(c, "spec.access", entries(old.Access), &is, entry.covers)
	next.Access = old.Access
	c.http(old.HTTP, &next.HTTP)
	c.tokens(old.Tokens, &next.Tokens)
	c.probes(old.Probes, &next.Probes)
	if !same(old.Tests, next.Tests) {
		c.note(Neither, "spec.tests", "are not what they were")
	}
	next.Tests = old.Tests // nothing follows from them on a node
	rest(c, "spec", old, next)
}

// ofModes is the effect of going over from one mode to another.
func ofModes(old, next ProtectedService) Effect {
	switch {
	case old.Enforced() == next.Enforced():
		return Neither
	case next.Enforced():
		return Tighter
	}
	return Looser
}

// taken notes ports that one service takes from another: an exact address comes before every address of the node, so what
// is new could let in whom the old one does not.
func (c *comparison) taken(old, next *Set) {
	claims := func(svc ProtectedService) map[endpoint]bool {
		all := map[endpoint]bool{}
		for _, port := range svc.Spec.Ports {
			for _, a := range claimed(svc) {
				all[endpoint{svc.Spec.Protocol, a, port}] = true
			}
		}
		return all
	}
	for _, svc := range next.services {
		was, _ := old.Service(svc.Name)
		mine, had := claims(svc), claims(was)
		for _, other := range old.services {
			if other.Name == svc.Name || other.Spec.Protocol != svc.Spec.Protocol {
				continue
			}
			for _, port := range svc.Spec.Ports {
				news := slices.ContainsFunc(claimed(svc), func(a netip.Addr) bool {
					e := endpoint{svc.Spec.Protocol, a, port}
					return mine[e] && !had[e]
				})
				if news && slices.Contains(other.Spec.Ports, port) {
					c.at = resource{kind: KindProtectedService, name: svc.Name}.String()
					c.loosen("spec.ports", "%d is taken at a place that %s may have", port, other.Name)
				}
			}
		}
	}
}

// opened notes ports at which a TCP service refused UDP, and which a UDP service has now that is not enforced. Of two services in
// pods nobody knows here whether it is the same pod.
func (c *comparison) opened(old, next *Set) {
	for _, svc := range next.services {
		was, had := old.Service(svc.Name)
		if svc.Spec.Protocol != ProtocolUDP || svc.Enforced() {
			continue
		}
		for _, other := range old.services {
			if other.Spec.Protocol != ProtocolTCP || other.Spec.UDP == UDPAllow || !old.mayBeEnforced(other) || other.Spec.Target != svc.Spec.Target {
				continue
			}
			for _, port := range svc.Spec.Ports {
				before := had && !was.Enforced() && slices.Contains(was.Spec.Ports, port) && same(was.Spec.Addresses, svc.Spec.Addresses) &&
					same(was.Spec.PodSelector, svc.Spec.PodSelector)
				if slices.Contains(other.Spec.Ports, port) && !before {
					c.at = resource{kind: KindProtectedService, name: svc.Name}.String()
					c.loosen("spec.ports", "UDP to %d was refused by %s, and is not any more", port, other.Name)
				}
			}
		}
	}
}

func (c *comparison) policy(old, next BypassPolicySpec) {
	grows(c, "spec.services", old.Services, &next.Services, equal)
	grows(c, "spec.bindings", old.Bindings, &next.Bindings, equal)
	grows(c, "spec.sources", old.Sources, &next.Sources, AddressRange.covers)
	grows(c, "spec.requesters", old.Requesters, &next.Requesters, coversPattern)
	settle(c, "spec.nodeAddresses", old.NodeAddresses, &next.NodeAddresses, next.NodeAddresses && !old.NodeAddresses)
	settle(c, "spec.maxDuration", old.MaxDuration, &next.MaxDuration, next.MaxDuration.Duration > old.MaxDuration.Duration)
	settle(c, "spec.ingress", old.Ingress, &next.Ingress, old.Ingress != "" && next.Ingress != old.Ingress)
	was, _ := old.Class.rank()
	is, _ := next.Class.rank()
	reach := BypassPolicy{Spec: next}.reach() > BypassPolicy{Spec: old}.reach()
	settle(c, "spec.maxReach", old.MaxReach, &next.MaxReach, reach)
	settle(c, "spec.class", old.Class, &next.Class, is < was)
	c.conditions(old, &next)
	c.oversight(old, &next)
	c.approvals(old.Approvals, &next.Approvals)
	c.budget(old.MaxBudget, &next.MaxBudget)
	if !same(old.Tests, next.Tests) {
		c.note(Neither, "spec.tests", "are not what they were")
	}
	next.Tests = old.Tests // nothing follows from them on a node
	rest(c, "spec", old, next)
}

func (c *comparison) conditions(old BypassPolicySpec, next *BypassPolicySpec) {
	oneOf(c, "spec.templates", old.Templates, &next.Templates, equal)
	oneOf(c, "spec.windows", old.Windows, &next.Windows, func(a, b Window) bool { return same(a, b) })
	settle(c, "spec.ticket.required", old.Ticket.Required, &next.Ticket.Required, old.Ticket.Required && !next.Ticket.Required)
	settle(c, "spec.ticket.pattern", old.Ticket.Pattern, &next.Ticket.Pattern, old.Ticket.Pattern != "" && next.Ticket.Pattern != old.Ticket.Pattern)
	settle(c, "spec.when", old.When, &next.When, old.When != "" && next.When != old.When)
	settle(c, "spec.notAfter", old.NotAfter, &next.NotAfter, laterEnd(old.NotAfter, next.NotAfter))
}

// approvals notes each that no other approval stands for any more: of as many people, and of nobody else.
func (c *comparison) approvals(old []Approval, next *[]Approval) {
	left := slices.Clone(*next)
	for _, o := range old {
		i := slices.IndexFunc(left, func(n Approval) bool {
			return n.Min >= o.Min && len(beyond(o.From, n.From, equal)) == 0
		})
		if i < 0 {
			c.loosen("spec.approvals", "%s is not asked for any more", shown(o))
			continue
		}
		became(c, Tighter, "spec.approvals", o, &left[i])
		left = slices.Delete(left, i, i+1)
	}
	for _, n := range left {
		c.note(Tighter, "spec.approvals", "%s is asked for now", shown(n))
	}
	*next = old
}

func (c *comparison) budget(old Budget, next *Budget) {
	now := next.limits()
	for i, was := range old.limits() {
		switch field := "spec.maxBudget." + was.field; {
		case raised(was.value, now[i].value):
			c.loosen(field, "%s became %s", was.text(was.value), limitText(now[i]))
		case was.value != now[i].value:
			c.note(Tighter, field, "%s became %s", limitText(was), limitText(now[i]))
		}
	}
	*next = old
}

func limitText(l budgetLimit) string {
	if l.value == 0 {
		return "no limit"
	}
	return l.text(l.value)
}

func (c *comparison) keyring(old, next KeyringSpec) {
	if next.Version < old.Version {
		became(c, Looser, "spec.version", old.Version, &next.Version)
	}
	became(c, Neither, "spec.version", old.Version, &next.Version)
	settle(c, "spec.notAfter", old.NotAfter, &next.NotAfter, laterEnd(old.NotAfter, next.NotAfter))
	shrinks(c, "spec.revokedKeys", old.RevokedKeys, &next.RevokedKeys, equal)
	for _, person := range next.People {
		c.person(old.People, person)
	}
	for _, p := range beyond(next.People, old.People, func(a, b Person) bool { return a.Name == b.Name }) {
		c.note(Tighter, "spec.people", "%s was removed", p.Name)
	}
	next.People = old.People
	for _, g := range next.Groups {
		i := slices.IndexFunc(old.Groups, func(o Group) bool { return o.Name == g.Name })
		if i < 0 {
			c.loosen("spec.groups", "%s was added", g.Name)
			continue
		}
		grows(c, "spec.groups."+g.Name, old.Groups[i].Members, &g.Members, equal)
		rest(c, "spec.groups."+g.Name, old.Groups[i], g)
	}
	for _, g := range beyond(next.Groups, old.Groups, func(a, b Group) bool { return a.Name == b.Name }) {
		c.note(Tighter, "spec.groups", "%s was removed", g.Name)
	}
	next.Groups = old.Groups
	rest(c, "spec", old, next)
}

// person compares somebody with who is of that name in old.
func (c *comparison) person(old []Person, next Person) {
	i := slices.IndexFunc(old, func(o Person) bool { return o.Name == next.Name })
	if i < 0 {
		c.loosen("spec.people", "%s was added", next.Name)
		return
	}
	field := "spec.people." + next.Name
	for _, k := range next.Keys {
		c.key(field, old[i].Keys, k)
	}
	for _, k := range beyond(next.Keys, old[i].Keys, func(a, b Key) bool { return a.PublicKey == b.PublicKey }) {
		c.note(Tighter, field, "the key %s was removed", k.PublicKey.ID())
	}
	next.Keys = old[i].Keys
	rest(c, field, old[i], next)
}

func (c *comparison) key(field string, old []Key, next Key) {
	id := next.PublicKey.ID()
	i := slices.IndexFunc(old, func(o Key) bool { return o.PublicKey == next.PublicKey })
	if i < 0 {
		c.loosen(field, "the key %s was added", id)
		return
	}
	was := old[i]
	field += "." + id
	settle(c, field+".notAfter", was.NotAfter, &next.NotAfter, laterEnd(was.NotAfter, next.NotAfter))
	more := slices.ContainsFunc(knownUses(), func(u Use) bool { return Signer{Uses: next.Uses}.May(u) && !Signer{Uses: was.Uses}.May(u) })
	settle(c, field+".uses", was.Uses, &next.Uses, more)
	rest(c, field, was, next)
}

func (c *comparison) denyList(old, next DenyListSpec) {
	settle(c, "spec.notAfter", old.NotAfter, &next.NotAfter, laterEnd(next.NotAfter, old.NotAfter))
	shrinks(c, "spec.identities", old.Identities, &next.Identities, coversPattern)
	shrinks(c, "spec.subjects", old.Subjects, &next.Subjects, coversPattern)
	shrinks(c, "spec.people", old.People, &next.People, equal)
	shrinks(c, "spec.services", old.Services, &next.Services, equal)
	shrinks(c, "spec.addresses", old.Addresses, &next.Addresses, AddressRange.covers)
	shrinks(c, "spec.grants", old.Grants, &next.Grants, equal)
	became(c, Neither, "spec.reason", old.Reason, &next.Reason)
	rest(c, "spec", old, next)
}

func knownUses() []Use {
	var all []Use
	for u := range uses {
		all = append(all, u)
	}
	return all
}
