package policy

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"

	"cel.dev/cel-go/cel"
	"go.yaml.in/yaml/v3"
)

// Set is resources that were validated as a whole. It does not change. The nil set protects nothing
// and allows nobody. Slices inside the resources that it hands out are shared: do not write to them.
type Set struct {
	services []ProtectedService
	policies []BypassPolicy
	keyrings []Keyring
	denials  []DenyList

	templates []GrantTemplate
	sets      []ResourceSet // one at most
	providers []IdentityProvider
	remotes   []RemoteService
	rollouts  []Rollout

	yaml   []byte
	digest string

	groups  map[string][]string    // members by name
	when    map[string]cel.Program // conditions by the name of their policy
	rules   map[string][]condition // of access rules, by the name of their service; a rule without one has the zero value
	signals *Signals               // what was said against callers; nil: nothing was heard of anybody
	byName  map[string]int         // service index by name
	byPlace map[endpoint]int       // by address and port; a Host service has no address

	byRemote map[netip.AddrPort]int // remote service index by place
}

// newSet takes a set of resources that fit together, and makes what is looked up in it.
func newSet(s *Set) *Set {
	s.groups, s.when = map[string][]string{}, map[string]cel.Program{}
	s.byName, s.byPlace, s.rules = map[string]int{}, map[endpoint]int{}, map[string][]condition{}
	slices.SortFunc(s.services, func(a, b ProtectedService) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(s.policies, func(a, b BypassPolicy) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(s.keyrings, func(a, b Keyring) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(s.denials, func(a, b DenyList) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(s.templates, func(a, b GrantTemplate) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(s.providers, func(a, b IdentityProvider) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(s.remotes, func(a, b RemoteService) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(s.rollouts, func(a, b Rollout) int { return cmp.Compare(a.Name, b.Name) })
	for i, svc := range s.services {
		s.index(i, svc)
	}
	for _, r := range s.keyrings {
		for _, g := range r.Spec.Groups {
			s.groups[g.Name] = g.Members
		}
	}
	for _, p := range s.policies {
		if p.Spec.When != "" {
			program, err := compileWhen(p.Spec.When)
			must(err) // it was read before
			s.when[p.Name] = program
		}
	}
	return s.withRemotes(s.remotes)
}

// withRemotes gives the set those remote services, in their order, and so its digest.
func (s *Set) withRemotes(remotes []RemoteService) *Set {
	s.remotes, s.byRemote = remotes, map[netip.AddrPort]int{}
	for i, r := range remotes {
		for _, place := range r.Places() {
			s.byRemote[place] = i
		}
	}
	s.yaml = encode(s.resources())
	sum := sha256.Sum256(s.yaml)
	s.digest = hex.EncodeToString(sum[:])
	return s
}

func (s *Set) index(i int, svc ProtectedService) {
	for _, r := range svc.Spec.Access {
		var c condition
		if r.When != "" {
			var err error
			c, err = compileCondition(r.When, svc.Spec.HTTP != nil)
			must(err) // it was read before
		}
		s.rules[svc.Name] = append(s.rules[svc.Name], c)
	}
	s.byName[svc.Name] = i
	s.claim(i, svc)
}

// claim notes the places of a service.
func (s *Set) claim(i int, svc ProtectedService) {
	for _, port := range svc.Spec.Ports {
		for _, a := range claimed(svc) {
			s.byPlace[endpoint{svc.Spec.Protocol, a, port}] = i
		}
	}
}

// resource is one document of a set.
type resource struct {
	kind, name string
	value      any
}

func (r resource) String() string { return r.kind + " " + r.name }

// resources lists everything in the set, in the order of YAML. What is not here is not in the digest, and nobody signs it.
func (s *Set) resources() (all []resource) {
	for _, v := range s.services {
		all = append(all, resource{KindProtectedService, v.Name, v})
	}
	for _, v := range s.policies {
		all = append(all, resource{KindBypassPolicy, v.Name, v})
	}
	for _, v := range s.keyrings {
		all = append(all, resource{KindKeyring, v.Name, v})
	}
	for _, v := range s.denials {
		all = append(all, resource{KindDenyList, v.Name, v})
	}
	for _, v := range s.templates {
		all = append(all, resource{KindGrantTemplate, v.Name, v})
	}
	for _, v := range s.providers {
		all = append(all, resource{KindIdentityProvider, v.Name, v})
	}
	for _, v := range s.remotes {
		all = append(all, resource{KindRemoteService, v.Name, v})
	}
	for _, v := range s.rollouts {
		all = append(all, resource{KindRollout, v.Name, v})
	}
	for _, v := range s.sets {
		all = append(all, resource{KindResourceSet, v.Name, v})
	}
	return all
}

func encode(all []resource) []byte {
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	for _, r := range all {
		must(enc.Encode(r.value))
	}
	must(enc.Close())
	return b.Bytes()
}

// must holds for writing values of our own types to memory, which has no way to go wrong.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// YAML is the canonical form: one document per resource, by kind and name. Parse(YAML()) gives a set
// with the same YAML.
func (s *Set) YAML() []byte {
	if s == nil {
		return nil
	}
	return bytes.Clone(s.yaml)
}

// Digest is the SHA-256 of YAML, in hex.
func (s *Set) Digest() string {
	if s == nil {
		return ""
	}
	return s.digest
}

// Services lists the protected services by name.
func (s *Set) Services() []ProtectedService {
	if s == nil {
		return nil
	}
	return slices.Clone(s.services)
}

// BypassPolicies lists the bypass policies by name.
func (s *Set) BypassPolicies() []BypassPolicy {
	if s == nil {
		return nil
	}
	return slices.Clone(s.policies)
}

// Keyrings lists the keyrings by name.
func (s *Set) Keyrings() []Keyring {
	if s == nil {
		return nil
	}
	return slices.Clone(s.keyrings)
}

// DenyLists lists the deny lists by name.
func (s *Set) DenyLists() []DenyList {
	if s == nil {
		return nil
	}
	return slices.Clone(s.denials)
}

// Service finds a protected service by its name.
func (s *Set) Service(name string) (ProtectedService, bool) {
	if s == nil {
		return ProtectedService{}, false
	}
	i, ok := s.byName[name]
	if !ok {
		return ProtectedService{}, false
	}
	return s.services[i], true
}

// ServiceAt finds the protected service that a connection or datagram to dst is for, and takes dst for one of the node's addresses
// where no pod has it. It looks as the kernel does: for what is enforced first, a Pod service of exactly that address and port, then a
// Host service of that port, and then for the same of what is only watched.
func (s *Set) ServiceAt(protocol string, dst netip.AddrPort) (ProtectedService, bool) {
	exact, isExact := s.PodServiceAt(protocol, dst)
	host, isHost := s.place(endpoint{protocol: protocol, port: dst.Port()})
	if isExact && (exact.Enforced() || !isHost || !host.Enforced()) {
		return exact, true
	}
	return host, isHost
}

// PodServiceAt finds the Pod service of exactly that address and port. At an address that is none of the node's there is no other.
func (s *Set) PodServiceAt(protocol string, dst netip.AddrPort) (ProtectedService, bool) {
	return s.place(endpoint{protocol, dst.Addr().Unmap().WithZone(""), dst.Port()})
}

func (s *Set) place(at endpoint) (ProtectedService, bool) {
	if s == nil {
		return ProtectedService{}, false
	}
	i, ok := s.byPlace[at]
	if !ok {
		return ProtectedService{}, false
	}
	return s.services[i], true
}
