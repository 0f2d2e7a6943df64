package policy

import (
	"slices"
	"strings"
	"time"
)

// groupPrefix stands before the name of a group where people may be listed as well.
const groupPrefix = "group:"

// workloadPrefix is what every SPIFFE ID begins with, and no person's name.
const workloadPrefix = "spiffe://"

// Use is something that a key may sign.
// +kubebuilder:validation:Enum=request;approve;breakGlass;resources
type Use string

// Uses of a key. One without any may request and approve.
const (
	UseRequest Use = "request"
	UseApprove Use = "approve"
	// UseBreakGlass is to ask for and to approve what a policy with breakGlass: true allows, and nothing else.
	UseBreakGlass Use = "breakGlass"
	// UseResources is to sign sets of resources, and to vouch for a node.
	UseResources Use = "resources"
)

var uses = map[Use]bool{UseRequest: true, UseApprove: true, UseBreakGlass: true, UseResources: true}

// Signer is a person whose signature was verified, and what the key may sign; or a workload that proved its identity.
type Signer struct {
	Person string `json:"person"`
	KeyID  string `json:"keyId"`
	Uses   []Use  `json:"uses,omitempty"`
}

// May reports whether the signature counts for that use.
func (s Signer) May(u Use) bool {
	if len(s.Uses) == 0 {
		return u == UseRequest || u == UseApprove
	}
	return slices.Contains(s.Uses, u)
}

// Group is people who approve together.
type Group struct {
	// +kubebuilder:validation:MinLength=1
	Name Name `json:"name" yaml:"name"`
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=512
	// +listType=set
	Members []PersonName `json:"members" yaml:"members"`
}

// Approval says how many of some people have to agree. The requester is never one of them.
type Approval struct {
	// From are people, and groups as group:NAME.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	From []PersonOrGroup `json:"from" yaml:"from"`
	// Min is how many of them; 1 when it is not written.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=15
	Min uint8 `json:"min,omitempty" yaml:"min,omitempty"`
}

// KnownKey is a key of a keyring, with whose it is.
type KnownKey struct {
	Key
	Person  string
	Revoked bool
	// Until is when it or its keyring ends. Zero: it does not.
	Until time.Time
}

// Ended reports whether the key counts no more at now.
func (k KnownKey) Ended(now time.Time) bool { return !k.Until.IsZero() && !now.Before(k.Until) }

// KnownKeys lists the keys of keyrings by their ids. A key that one keyring revokes is revoked in all.
func KnownKeys(rings []Keyring) map[string]KnownKey {
	known := map[string]KnownKey{}
	for _, r := range rings {
		for _, p := range r.Spec.People {
			for _, k := range p.Keys {
				known[k.PublicKey.ID()] = KnownKey{Key: k, Person: p.Name, Until: earlier(k.NotAfter, r.Spec.NotAfter)}
			}
		}
	}
	for _, r := range rings {
		for _, id := range r.Spec.RevokedKeys {
			if k, ok := known[id]; ok {
				k.Revoked = true
				known[id] = k
			}
		}
	}
	return known
}

// earlier takes zero for never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// includes reports whether a list of people, groups and workloads has the person or workload.
func (s *Set) includes(list []string, who string) bool {
	return slices.ContainsFunc(list, func(name string) bool {
		group, isGroup := strings.CutPrefix(name, groupPrefix)
		switch {
		case isGroup:
			return slices.Contains(s.groups[group], who)
		case IsWorkload(name):
			return matches(name, who)
		}
		return name == who
	})
}

// IsWorkload tells whether a requester is a workload, by its SPIFFE ID or a pattern of them, and not a person.
func IsWorkload(requester string) bool { return strings.HasPrefix(requester, workloadPrefix) }

// unmet lists what approvals are missing. Each person counts once in all, for one of the approvals, and in the way in
// which most of them are met: a matching of people with seats (Kuhn).
func (s *Set) unmet(wanted []Approval, approvers []string) (missing []Approval) {
	var seats []Approval
	for _, a := range wanted {
		seats = append(seats, slices.Repeat([]Approval{a}, int(a.Min))...)
	}
	taken := map[string]int{} // person -> seat
	for i := range seats {
		if !s.seat(i, seats, approvers, taken, map[string]bool{}) {
			missing = append(missing, Approval{From: seats[i].From, Min: 1})
		}
	}
	return missing
}

// seat finds somebody for a seat, and another seat for whoever has to give his up for it.
func (s *Set) seat(i int, seats []Approval, people []string, taken map[string]int, tried map[string]bool) bool {
	for _, p := range people {
		if tried[p] || !s.includes(seats[i].From, p) {
			continue
		}
		tried[p] = true
		if other, busy := taken[p]; !busy || s.seat(other, seats, people, taken, tried) {
			taken[p] = i
			return true
		}
	}
	return false
}
