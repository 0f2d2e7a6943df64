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
	Service   string
	Ports     []uint16 // empty: all of the service
	Addresses []netip.Addr
	Duration  time.Duration
	Budget    Budget
	Ingress   Ingress
	Binding   string
	Ticket    string
	Reason    string
	Requester string
	Signers   []Signer // whose signatures were verified
	// NodeAddresses are the node's own addresses. Loopback counts as such in any case.
	NodeAddresses []netip.Addr
}

// CheckGrant decides whether policy allows the grant: one bypass policy must allow all of it. It is
// the one evaluator, for agent, check and explain. It gives every violated field at once, as
// errors.Join of *Error with ErrRefused, of the policy that came nearest to allowing it.
func (s *Set) CheckGrant(g GrantFacts) error {
	svc, ok := s.Service(g.Service)
	if !ok {
		return refuse("service", "`sallyport services` lists them", "no ProtectedService is named %q", g.Service)
	}
	var nearest []error
	for _, p := range s.policies {
		if !slices.Contains(p.Spec.Services, g.Service) {
			continue
		}
		violations := s.check(p, svc, g)
		if len(violations) == 0 {
			return nil
		}
		if nearest == nil || len(violations) < len(nearest) {
			nearest = violations
		}
	}
	if nearest == nil {
		return refuse("service", "add it to a BypassPolicy", "no BypassPolicy covers the service %q", g.Service)
	}
	return errors.Join(nearest...)
}

func refuse(field, hint, format string, args ...any) error {
	return &Error{Field: field, Msg: fmt.Sprintf(format, args...), Hint: hint, Err: ErrRefused}
}

// check lists what one policy does not allow.
func (s *Set) check(p BypassPolicy, svc ProtectedService, g GrantFacts) []error {
	c := grantCheck{set: s, policy: p}
	c.binding(g.Binding)
	c.ports(svc, g.Ports)
	c.addresses(g)
	c.duration(g.Duration)
	c.budget(g.Budget)
	c.ingress(g.Ingress)
	c.paperwork(g)
	c.requester(g)
	c.approvals(g)
	return c.errs
}

// grantCheck gathers the violations of one policy by one grant.
type grantCheck struct {
	set    *Set
	policy BypassPolicy
	errs   []error
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
		if isNode(a, g.NodeAddresses) && !c.policy.Spec.NodeAddresses {
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

func (c *grantCheck) duration(v time.Duration) {
	most := c.policy.Spec.MaxDuration
	switch {
	case v <= 0:
		c.refuse("duration", "ask for at most "+most.String(), "must be more than 0: every grant ends")
	case v > most.Duration:
		c.refuse("duration", "ask for at most "+most.String(),
			"%s is over the cap of %s in policy %q", Duration{v}, most, c.policy.Name)
	}
}

func (c *grantCheck) paperwork(g GrantFacts) {
	if strings.TrimSpace(g.Reason) == "" {
		c.refuse("reason", "say why the bypass is needed", "is empty")
	}
	if c.policy.Spec.RequireTicket && strings.TrimSpace(g.Ticket) == "" {
		c.refuse("ticket", "name the ticket", "policy %q requires a ticket", c.policy.Name)
	}
}

// requester holds that the grant was asked for by somebody who may, and who signed it.
func (c *grantCheck) requester(g GrantFacts) {
	may := c.policy.Spec.Requesters
	if !c.set.includes(may, g.Requester) {
		c.refuse("requester", "have it asked for by one of: "+strings.Join(may, ", "), "policy %q lets %q ask for nothing", c.policy.Name, g.Requester)
		return
	}
	if !slices.ContainsFunc(g.Signers, func(s Signer) bool { return s.Person == g.Requester && s.May(UseRequest) }) {
		c.refuse("signatures", "have it signed with a key of "+g.Requester+" that may request", "the requester %s has not signed it", g.Requester)
	}
}

// approvals names each that is missing.
func (c *grantCheck) approvals(g GrantFacts) {
	var people []string
	for _, s := range g.Signers {
		if s.Person != g.Requester && s.May(UseApprove) && !slices.Contains(people, s.Person) {
			people = append(people, s.Person)
		}
	}
	for _, a := range c.set.unmet(c.policy.Spec.Approvals, people) {
		c.add(ErrUnapproved, "signatures", "have it approved by one more of: "+strings.Join(a.From, ", "),
			"policy %q wants another approval, from somebody else than %s", c.policy.Name, g.Requester)
	}
}
