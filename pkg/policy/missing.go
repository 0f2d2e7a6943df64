package policy

import (
	"slices"
	"time"
)

// MissingApproval is how many more of some people have to agree to a grant.
type MissingApproval struct {
	Count int `json:"count"`
	// From are people and groups, as the policy names them.
	From []string `json:"from"`
	// People are those of them who could: who did not ask for it, have not agreed yet, and have a key that counts.
	People []string `json:"people"`
}

// MissingApprovals are the approvals that the grant still wants, where it wants nothing else: those of the nearest policy,
// as Evaluate finds it. now is the wall clock, by which people's keys count.
func (s *Set) MissingApprovals(g GrantFacts, now time.Time) (missing []MissingApproval) {
	a := s.Evaluate(g)
	if len(a.Unapproved()) == 0 {
		return nil
	}
	agreed := approversOf(g)
	for _, seat := range s.unmet(a.Near[0].Policy.Spec.Approvals, agreed) {
		if i := slices.IndexFunc(missing, func(m MissingApproval) bool { return slices.Equal(m.From, seat.From) }); i >= 0 {
			missing[i].Count++
			continue
		}
		missing = append(missing, MissingApproval{Count: 1, From: seat.From, People: s.couldApprove(seat.From, g, agreed, now)})
	}
	return missing
}

// couldApprove lists, in the order of the keyrings, whose approval would count beside those who agreed.
func (s *Set) couldApprove(from []string, g GrantFacts, agreed []string, now time.Time) []string {
	people := []string{}
	known := KnownKeys(s.keyrings)
	for _, ring := range s.keyrings {
		for _, p := range ring.Spec.People {
			if p.Name == g.Requester || slices.Contains(agreed, p.Name) || !s.includes(from, p.Name) {
				continue
			}
			if _, denied := s.DeniedPerson(p.Name, now); denied {
				continue
			}
			if slices.ContainsFunc(p.Keys, func(k Key) bool {
				key := known[k.PublicKey.ID()]
				return !key.Revoked && !key.Ended(now) && Signer{Uses: k.Uses}.May(g.UseOf(UseApprove))
			}) {
				people = append(people, p.Name)
			}
		}
	}
	return people
}
