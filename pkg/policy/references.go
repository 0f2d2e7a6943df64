package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// checkNames reports two resources of one kind and name.
func (p *parser) checkNames() {
	checkUnique(p.services, func(s ProtectedService) string { return s.Name })
	checkUnique(p.policies, func(b BypassPolicy) string { return b.Name })
	checkUnique(p.keyrings, func(k Keyring) string { return k.Name })
	checkUnique(p.denials, func(l DenyList) string { return l.Name })
	checkUnique(p.templates, func(t GrantTemplate) string { return t.Name })
	checkUnique(p.providers, func(i IdentityProvider) string { return i.Name })
	checkUnique(p.remotes, func(r RemoteService) string { return r.Name })
	checkUnique(p.rollouts, func(r Rollout) string { return r.Name })
}

func checkUnique[T any](list []located[T], name func(T) string) {
	seen := map[string]int{}
	for i, l := range list {
		if at, dup := first(seen, name(l.value), i); dup {
			l.report("metadata.name", faultf("rename or remove one of them",
				"the name %q is already taken at %s", name(l.value), list[at].source()))
		}
	}
}

// endpoint is what only one protected service may claim. Host services have no address.
type endpoint struct {
	protocol string
	addr     netip.Addr
	port     uint16
}

// checkOverlaps reports a port that two services claim at the same place.
func (p *parser) checkOverlaps() {
	seen := map[endpoint]int{}
	for i, l := range p.services {
		for j, port := range l.value.Spec.Ports {
			for _, addr := range claimed(l.value) {
				at, taken := first(seen, endpoint{l.value.Spec.Protocol, addr, port}, i)
				if !taken || at == i {
					continue
				}
				other := p.services[at]
				l.report(fmt.Sprintf("spec.ports[%d]", j), faultf("give the port to one service",
					"port %d is already protected by %q at %s", port, other.value.Name, other.source()))
			}
		}
	}
}

func claimed(s ProtectedService) []netip.Addr {
	switch s.Spec.Target {
	case TargetPod:
		return s.Spec.Addresses
	case TargetHost:
		return []netip.Addr{{}}
	}
	return nil
}

// checkPeople reports a person or a key that is in the keyrings twice.
func (p *parser) checkPeople() {
	people, keys := map[string]string{}, map[string]string{}
	for _, l := range p.keyrings {
		for i, person := range l.value.Spec.People {
			field := fmt.Sprintf("spec.people[%d]", i)
			if other, taken := claim(people, person.Name, l.place(field+".name")); taken {
				l.report(field+".name", faultf("list each person once, with all keys", "%q is already at %s", person.Name, other))
			}
			for j, key := range person.Keys {
				at, id := fmt.Sprintf("%s.keys[%d].publicKey", field, j), key.PublicKey.ID()
				if other, taken := claim(keys, id, l.place(at)); taken {
					l.report(at, faultf("give each key to one person, once", "the key %s is already at %s", id, other))
				}
			}
		}
	}
}

// checkGroups reports a group that is there twice, or has members that are nobody.
func (p *parser) checkGroups(people map[string]bool) (groups map[string]bool) {
	groups = map[string]bool{}
	places := map[string]string{}
	for _, l := range p.keyrings {
		for i, g := range l.value.Spec.Groups {
			field := fmt.Sprintf("spec.groups[%d]", i)
			if other, taken := claim(places, g.Name, l.place(field+".name")); taken {
				l.report(field+".name", faultf("list each group once, with all members", "%q is already at %s", g.Name, other))
			}
			l.checkKnown(field+".members", g.Members, people, "no Keyring has a person %q")
			groups[g.Name] = true
		}
	}
	return groups
}

// checkRequesters reports names in a list of people, groups and workloads that are none of these.
func (d *document) checkRequesters(field string, names []string, people, groups map[string]bool) {
	for i, name := range names {
		if IsWorkload(name) {
			d.report(fmt.Sprintf("%s[%d]", field, i), checkPattern(name))
			continue
		}
		d.checkPersonOrGroup(fmt.Sprintf("%s[%d]", field, i), name, people, groups)
	}
}

// checkWho reports names in a list of people and groups that are neither.
func (d *document) checkWho(field string, names []string, people, groups map[string]bool) {
	for i, name := range names {
		d.checkPersonOrGroup(fmt.Sprintf("%s[%d]", field, i), name, people, groups)
	}
}

func (d *document) checkPersonOrGroup(field, name string, people, groups map[string]bool) {
	group, isGroup := strings.CutPrefix(name, groupPrefix)
	switch {
	case isGroup && !groups[group]:
		d.report(field, faultf(suggest(group, groups), "no Keyring has a group %q", group))
	case !isGroup && !people[name]:
		d.report(field, faultf(suggest(name, people), "no Keyring has a person %q", name))
	}
}

// sureOfNames reports whether every name in the set could be read. If not, a reference that finds
// nothing would only repeat that problem.
func (p *parser) sureOfNames() bool {
	return !slices.ContainsFunc(p.list, func(e *Error) bool {
		return e.Field == "" || e.Field == "kind" || e.Field == "spec" ||
			strings.HasPrefix(e.Field, "metadata") || strings.HasPrefix(e.Field, "spec.people") || strings.HasPrefix(e.Field, "spec.groups")
	})
}

// checkReferences reports a bypass policy for a service, a person or a group that does not exist.
func (p *parser) checkReferences() {
	services, people, templates := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, l := range p.services {
		services[l.value.Name] = true
	}
	for _, l := range p.keyrings {
		for _, person := range l.value.Spec.People {
			people[person.Name] = true
		}
	}
	for _, l := range p.templates {
		templates[l.value.Name] = true
		if name := l.value.Spec.Service; !services[name] {
			l.report("spec.service", faultf(suggest(name, services), "no ProtectedService is named %q", name))
		}
	}
	p.checkProviders()
	groups := p.checkGroups(people)
	p.checkRollouts(services, people, groups)
	for _, l := range p.policies {
		l.checkKnown("spec.services", l.value.Spec.Services, services, "no ProtectedService is named %q")
		l.checkRequesters("spec.requesters", l.value.Spec.Requesters, people, groups)
		l.checkKnown("spec.templates", l.value.Spec.Templates, templates, "no GrantTemplate is named %q")
		l.checkWho("spec.reviewers", l.value.Spec.Reviewers, people, groups)
		for i, a := range l.value.Spec.Approvals {
			l.checkWho(fmt.Sprintf("spec.approvals[%d].from", i), a.From, people, groups)
		}
	}
}

func (d *document) checkKnown(field string, names []string, known map[string]bool, format string) {
	for i, name := range names {
		if !known[name] {
			d.report(fmt.Sprintf("%s[%d]", field, i), faultf(suggest(name, known), format, name))
		}
	}
}

func (d *document) place(field string) string {
	return Source{File: d.file, Line: d.line(field)}.String()
}

// claim takes a name for a place, and gives the place of whoever had it before.
func claim(taken map[string]string, name, place string) (string, bool) {
	if other, ok := taken[name]; ok {
		return other, true
	}
	taken[name] = place
	return place, false
}
