package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// ErrRefused is in every error of CheckGrant.
var ErrRefused = errors.New("grant refused by policy")

// ErrUnapproved is in those errors of CheckGrant that another person's signature would mend.
var ErrUnapproved = fmt.Errorf("%w: not approved yet", ErrRefused)

// GrantFacts is what policy looks at in a grant whose signatures were verified.
type GrantFacts struct {
	ID        string
	Service   string
	Ports     []uint16 // empty: all of the service
	Addresses []netip.Addr
	Duration  time.Duration
	Budget    Budget
	Ingress   Ingress
	// BreakGlass grants are for policies of their own, and signed with keys that may.
	BreakGlass bool
	Binding    string
	Ticket     string
	Reason     string
	// Template that it was asked for by; empty: none.
	Template  string
	Requester string
	Signers   []Signer // whose signatures were verified
	// NodeAddresses are the node's own addresses. Loopback counts as such in any case.
	NodeAddresses []netip.Addr
	// Now is the time of activation, by the wall clock. Zero: nobody knows it yet, and what depends on it is left out.
	Now time.Time
}

// Allowance is what a grant that policy allows gets.
type Allowance struct {
	Policy string // that allows it
	// Rule is that policy in words, with where it was read.
	Rule string
	// Until is when policy ends its paths, whatever the grant says, by the wall clock. Zero: it does not.
	Until time.Time
}

// CheckGrant is Evaluate for those who only want to go on or not: the error is that of Answer.Err.
func (s *Set) CheckGrant(g GrantFacts) (Allowance, error) {
	a := s.Evaluate(g)
	return a.Allowance, a.Err()
}

// check lists what one policy does not allow, and says until when it allows the rest.
func (s *Set) check(p BypassPolicy, svc ProtectedService, g GrantFacts) (until time.Time, violations []*Error) {
	c := grantCheck{set: s, policy: p}
	by := fmt.Sprintf("policy %q", p.Name)
	c.binding(g.Binding)
	c.ports(svc, g.Ports)
	c.addresses(g)
	c.reach(svc, g)
	c.duration(g.Duration, p.Spec.MaxDuration, by)
	c.budget(g.Budget, p.Spec.MaxBudget, by)
	c.template(svc, g)
	c.ingress(g.Ingress)
	c.paperwork(g)
	c.requester(g)
	c.approvals(g)
	until = c.times(g.Now)
	c.when(g)
	return until, c.errs
}

// grantCheck gathers the violations of one policy by one grant.
type grantCheck struct {
	set    *Set
	policy BypassPolicy
	errs   []*Error
}

func (c *grantCheck) refuse(field, hint, format string, args ...any) {
	c.add(ErrRefused, field, hint, format, args...)
}

func (c *grantCheck) add(kind error, field, hint, format string, args ...any) {
	c.errs = append(c.errs, &Error{
		File: c.policy.Source.File, Line: c.policy.Source.Line,
		Field: field, Msg: fmt.Sprintf(format, args...), Hint: hint, Err: kind,
	})
}

func (c *grantCheck) binding(binding string) {
	if !slices.Contains(c.policy.Spec.Bindings, binding) {
		c.refuse("binding", "ask for one of: "+strings.Join(c.policy.Spec.Bindings, ", "),
			"policy %q does not allow the binding %q", c.policy.Name, binding)
	}
}

func (c *grantCheck) ports(svc ProtectedService, ports []uint16) {
	for i, port := range ports {
		if !slices.Contains(svc.Spec.Ports, port) {
			c.refuse(fmt.Sprintf("ports[%d]", i), fmt.Sprintf("ask for ports of the service: %v", svc.Spec.Ports),
				"the service %q does not protect port %d", svc.Name, port)
		}
	}
}

func (c *grantCheck) addresses(g GrantFacts) {
	if len(g.Addresses) == 0 {
		c.refuse("addresses", "name the client's address", "needs at least one address")
	}
	for i, a := range g.Addresses {
		field := fmt.Sprintf("addresses[%d]", i)
		if err := CheckAddress(a); err != nil {
			c.refuse(field, "name the address of one client", "%v", err)
			continue
		}
		if !c.listed(a) {
			c.refuse(field, "ask for an address of spec.sources, or have it added there",
				"policy %q does not list %s in its sources", c.policy.Name, a)
		}
		if isNode(a, g.NodeAddresses) && !c.policy.Spec.NodeAddresses && !ownsSockets(g.Binding) {
			c.refuse(field, "ask for the address of a pod or another host, or have nodeAddresses: true set",
				"%s is an address of the node, and policy %q does not allow those", a, c.policy.Name)
		}
	}
}

func (c *grantCheck) listed(a netip.Addr) bool {
	return slices.ContainsFunc(c.policy.Spec.Sources, func(r AddressRange) bool { return r.Contains(a) })
}

func isNode(a netip.Addr, own []netip.Addr) bool {
	return a.IsLoopback() || slices.ContainsFunc(own, func(n netip.Addr) bool { return n.Unmap().WithZone("") == a })
}

// duration refuses one that is above what the policy or template of that name allows.
func (c *grantCheck) duration(v time.Duration, most Duration, by string) {
	switch {
	case v <= 0:
		c.refuse("duration", "ask for at most "+most.String(), "must be more than 0: every grant ends")
	case v > most.Duration:
		c.refuse("duration", "ask for at most "+most.String(),
			"%s is over the cap of %s in %s", Duration{v}, most, by)
	}
}

func (c *grantCheck) paperwork(g GrantFacts) {
	if strings.TrimSpace(g.Reason) == "" {
		c.refuse("reason", "say why the bypass is needed", "is empty")
	}
	rule := c.policy.Spec.Ticket
	switch {
	case strings.TrimSpace(g.Ticket) == "":
		if rule.Required {
			c.refuse("ticket", "name the ticket", "policy %q requires a ticket", c.policy.Name)
		}
	case rule.Pattern != "" && !rule.matches(g.Ticket):
		c.refuse("ticket", "name one like "+rule.Pattern, "policy %q takes no ticket %q", c.policy.Name, cut(g.Ticket))
	}
}

// requester holds that the grant was asked for by somebody who may, and who signed it.
func (c *grantCheck) requester(g GrantFacts) {
	may := c.policy.Spec.Requesters
	if !c.set.includes(may, g.Requester) {
		c.refuse("requester", "have it asked for by one of: "+strings.Join(may, ", "), "policy %q lets %q ask for nothing", c.policy.Name, g.Requester)
		return
	}
	if !slices.ContainsFunc(g.Signers, func(s Signer) bool { return s.Person == g.Requester && s.May(g.UseOf(UseRequest)) }) {
		c.refuse("signatures", "have it signed with a key of "+g.Requester+" of the use "+string(g.UseOf(UseRequest)), "the requester %s has not signed it", g.Requester)
	}
}

// approvals names each that is missing.
func (c *grantCheck) approvals(g GrantFacts) {
	for _, a := range c.set.unmet(c.policy.Spec.Approvals, approversOf(g)) {
		c.add(ErrUnapproved, "signatures", "have it approved by one more of: "+strings.Join(a.From, ", "),
			"policy %q wants another approval, from somebody else than %s", c.policy.Name, g.Requester)
	}
}

// times holds that now is before the end of the policy and in a window, and gives the end of either.
func (c *grantCheck) times(now time.Time) (until time.Time) {
	if now.IsZero() {
		return time.Time{}
	}
	end := c.policy.Spec.NotAfter
	if !end.IsZero() && !now.Before(end) {
		c.refuse("notAfter", "have the policy renewed", "policy %q ended at %s", c.policy.Name, end.Format(time.RFC3339))
	}
	if len(c.policy.Spec.Windows) == 0 {
		return end
	}
	var texts []string
	var last time.Time
	for _, w := range c.policy.Spec.Windows {
		texts = append(texts, w.String())
		if t, ok := w.until(now); ok && t.After(last) {
			last = t
		}
	}
	if last.IsZero() {
		c.refuse("windows", "activate it in one of: "+strings.Join(texts, "; "), "%s is in no window of policy %q", now.UTC().Format(time.RFC3339), c.policy.Name)
	}
	return earlier(end, last)
}

// when asks the condition. What depends on the time is left to whoever knows it.
func (c *grantCheck) when(g GrantFacts) {
	program := c.set.when[c.policy.Name]
	if program == nil || g.Now.IsZero() {
		return
	}
	if err := checkWhen(program, g); err != nil {
		c.refuse("when", "see the policy's condition: "+c.policy.Spec.When, "policy %q has a condition, and %v", c.policy.Name, err)
	}
}
