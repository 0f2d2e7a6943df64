package policy

import (
	"fmt"
	"net/netip"
)

// checkNames reports two resources of one kind and name.
func (p *parser) checkNames() {
	checkUnique(p.services, func(s ProtectedService) string { return s.Name })
	checkUnique(p.policies, func(b BypassPolicy) string { return b.Name })
	checkUnique(p.keyrings, func(k Keyring) string { return k.Name })
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
	addr netip.Addr
	port uint16
}

// checkOverlaps reports a port that two services claim at the same place.
func (p *parser) checkOverlaps() {
	seen := map[endpoint]int{}
	for i, l := range p.services {
		for j, port := range l.value.Spec.Ports {
			for _, addr := range claimed(l.value) {
				at, taken := first(seen, endpoint{addr, port}, i)
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
	if s.Spec.Target == TargetPod {
		return s.Spec.Addresses
	}
	return []netip.Addr{{}}
}

// checkServiceReferences reports a bypass policy for a service that does not exist.
func (p *parser) checkServiceReferences() {
	names := map[string]bool{}
	for _, l := range p.services {
		names[l.value.Name] = true
	}
	for _, l := range p.policies {
		for i, name := range l.value.Spec.Services {
			if !names[name] {
				l.report(fmt.Sprintf("spec.services[%d]", i), faultf(suggest(name, names),
					"no ProtectedService is named %q", name))
			}
		}
	}
}

// checkPeople reports a person or a key that is in the keyrings twice, and a signer who is in none.
func (p *parser) checkPeople() {
	people, keys := map[string]string{}, map[string]string{}
	for _, l := range p.keyrings {
		for i, person := range l.value.Spec.People {
			field := fmt.Sprintf("spec.people[%d]", i)
			if other, taken := claim(people, person.Name, l.place(field+".name")); taken {
				l.report(field+".name", faultf("list each person once, with all keys", "%q is already at %s", person.Name, other))
			}
			for j, key := range person.Keys {
				at := fmt.Sprintf("%s.keys[%d].publicKey", field, j)
				if other, taken := claim(keys, key.PublicKey.ID(), l.place(at)); taken {
					l.report(at, faultf("give each key to one person, once", "the key %s is already at %s", key.PublicKey.ID(), other))
				}
			}
		}
	}
	for _, l := range p.policies {
		for i, signer := range l.value.Spec.Signers {
			if _, ok := people[signer]; !ok {
				l.report(fmt.Sprintf("spec.signers[%d]", i), faultf(suggest(signer, people), "no Keyring has a person %q", signer))
			}
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
