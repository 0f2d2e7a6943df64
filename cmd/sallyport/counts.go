package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// notChecked is said where somebody signs and no resources are at hand.
const notChecked = "nobody has checked whether this key counts for anything: --policy names the resources that say so"

// signerFor finds whose key it is, and holds that it may sign for a use.
func (c *cli) signerFor(set *policy.Set, key policy.PublicKey, use policy.Use) (policy.Signer, error) {
	signer, err := signerOf(set, key, c)
	if err == nil && !signer.May(use) {
		err = &policy.Error{Field: "key", Msg: fmt.Sprintf("the key %s of %s counts for nothing here: it has not the use %s, but %s", key.ID(), signer.Person, use, usesOf(signer)),
			Hint: "sign with a key that has the use " + string(use)}
	}
	return signer, err
}

func usesOf(s policy.Signer) string {
	var names []string
	for _, u := range s.Uses {
		names = append(names, string(u))
	}
	return either(strings.Join(names, ", "), string(policy.UseRequest)+", "+string(policy.UseApprove))
}

// signerOfStep holds that the key is one with which its owner may say that of a grant, as a node would. facts are what is
// known of the grant; those without a service are of none, or of one that nobody knows here.
func (c *cli) signerOfStep(set *policy.Set, key policy.PublicKey, step grant.Step, facts policy.GrantFacts) (policy.Signer, error) {
	use, may, who := policy.UseResources, true, ""
	signer, err := signerOf(set, key, c)
	if err != nil {
		return signer, err
	}
	switch step {
	case grant.StepAdvanced, grant.StepResumed:
		use = policy.UseRollout
	case grant.StepWithdrawn:
		use, may, who = facts.UseOf(policy.UseRequest), signer.Person == facts.Requester, facts.Requester+" asked for it, and `sallyport grant deny` is for those who could approve it"
	case grant.StepDenied:
		use, may, who = facts.UseOf(policy.UseApprove), set.MayDeny(facts, signer.Person), "somebody can deny what they could approve"
	case grant.StepReviewed:
		use, may, who = policy.UseApprove, set.MayReview(facts, signer.Person), "policy names the reviewers, and who asked for it or approved it is none"
	}
	if !may && facts.Service != "" {
		return signer, &policy.Error{Field: "key", Msg: fmt.Sprintf("what %s says of it counts for nothing: %s", signer.Person, who), Hint: "have it said by somebody who may"}
	}
	return c.signerFor(set, key, use)
}

// approver holds that an approval with the key would count: that a policy for the grant asks for one of its owner.
func (c *cli) approver(set *policy.Set, key policy.PublicKey, facts policy.GrantFacts) error {
	signer, err := signerOf(set, key, c)
	switch {
	case err != nil:
		return err
	case signer.Person == facts.Requester:
		return &policy.Error{Field: "key", Msg: fmt.Sprintf("%s asked for it, and cannot approve it", signer.Person), Hint: c.approvers(set, facts)}
	case !set.MayDeny(facts, signer.Person):
		return &policy.Error{Field: "key", Msg: fmt.Sprintf("an approval of %s counts for nothing: no policy for %s asks for it", signer.Person, facts.Service), Hint: c.approvers(set, facts)}
	}
	_, err = c.signerFor(set, key, facts.UseOf(policy.UseApprove))
	return err
}

// approvers is a hint that names whose approval is missing.
func (c *cli) approvers(set *policy.Set, facts policy.GrantFacts) string {
	var people []string
	for _, m := range set.MissingApprovals(facts, c.now()) {
		people = append(people, m.People...)
	}
	if len(people) == 0 {
		return "no approval is missing that somebody could give: `sallyport grant show FILE --policy DIR` says what is"
	}
	slices.Sort(people)
	return "have it approved by " + strings.Join(slices.Compact(people), " or ")
}
