package policy

import (
	"slices"
	"time"
)

// MaxBreakGlassDuration is the longest duration that a policy for break-glass may allow.
const MaxBreakGlassDuration = time.Hour

// minBreakGlassApprovals is how many other people have to agree to break the glass.
const minBreakGlassApprovals = 2

// validateBreakGlass holds a policy for break-glass to less than others.
func (p *BypassPolicy) validateBreakGlass(d *document) {
	if len(p.Spec.Reviewers) > 0 {
		d.checkList("spec.reviewers", p.Spec.Reviewers, "list the people who review")
	}
	if !p.Spec.BreakGlass {
		return
	}
	total := 0
	for _, a := range p.Spec.Approvals {
		total += max(int(a.Min), 1)
	}
	if total < minBreakGlassApprovals {
		d.report("spec.approvals", faultf("ask for two people besides the requester", "%d are too few to break the glass: at least %d", total, minBreakGlassApprovals))
	}
	if len(p.Spec.Reviewers) == 0 {
		d.report("spec.reviewers", faultf("list who looks at it afterwards", "a policy for break-glass needs reviewers"))
	}
	if p.Spec.MaxDuration.Duration > MaxBreakGlassDuration {
		d.report("spec.maxDuration", faultf("write a duration such as 30m", "%s is over the cap of %s for break-glass", p.Spec.MaxDuration, Duration{MaxBreakGlassDuration}))
	}
}

// ofKind is a kind of policy in words.
func ofKind(breakGlass bool) string {
	if breakGlass {
		return " for break-glass"
	}
	return ""
}

// UseOf is what a key has to be good for to stand for that use under the grant: break-glass has one use for both.
func (g GrantFacts) UseOf(u Use) Use {
	if g.BreakGlass {
		return UseBreakGlass
	}
	return u
}

// MayDeny tells whether a person could approve the grant, and so may say that it shall not be: some policy for its service
// and kind asks for that person's approval. The requester may not: that is to withdraw it.
func (s *Set) MayDeny(g GrantFacts, person string) bool {
	return person != g.Requester && slices.ContainsFunc(s.policiesFor(g), func(p BypassPolicy) bool { return s.approves(p, person) })
}

// MayReview tells whether a person may say that a grant was looked at: some policy for its service and kind names that
// person for it. Who asked for it or approved it may not.
func (s *Set) MayReview(g GrantFacts, person string) bool {
	if person == g.Requester || slices.ContainsFunc(g.Signers, func(by Signer) bool { return by.Person == person }) {
		return false
	}
	return slices.ContainsFunc(s.policiesFor(g), func(p BypassPolicy) bool {
		return s.includes(p.Spec.Reviewers, person) || len(p.Spec.Reviewers) == 0 && s.approves(p, person)
	})
}

func (s *Set) approves(p BypassPolicy, person string) bool {
	return slices.ContainsFunc(p.Spec.Approvals, func(a Approval) bool { return s.includes(a.From, person) })
}

// policiesFor are the policies that a grant could be allowed by.
func (s *Set) policiesFor(g GrantFacts) (list []BypassPolicy) {
	for _, p := range s.policies {
		if p.Spec.BreakGlass == g.BreakGlass && slices.Contains(p.Spec.Services, g.Service) {
			list = append(list, p)
		}
	}
	return list
}
