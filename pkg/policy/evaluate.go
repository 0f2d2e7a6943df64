package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Answer is what policy makes of a grant, and why.
type Answer struct {
	// Allowed says that one bypass policy allows all of it, and nothing denies it.
	Allowed bool
	// Allowance is that of the policy; of several, of the one that lets it last longest.
	Allowance
	// Denied refuses it whatever bypass policies say: a deny list, or a service that none is for.
	Denied []*Error
	// Near are the policies for its service that do not allow it, the nearest first.
	Near []NearPolicy
	// Open says that its service is not enforced, so that nothing depends on the grant yet. Empty: it is enforced.
	Open string
}

// NearPolicy is a policy that does not allow a grant.
type NearPolicy struct {
	Policy BypassPolicy
	// Missing is everything that it does not allow, at least one thing.
	Missing []*Error
}

// Evaluate decides whether policy allows the grant: no deny list may name it, and one bypass policy must allow all of it. It
// is the one evaluator, for agent, check, tests and explain.
func (s *Set) Evaluate(g GrantFacts) Answer {
	svc, ok := s.Service(g.Service)
	if !ok {
		return refused("service", "`sallyport services` lists them", "no ProtectedService is named %q", g.Service)
	}
	a := Answer{Denied: s.denied(g), Open: svc.Open()}
	var best *Allowance
	for _, p := range s.policies {
		if !slices.Contains(p.Spec.Services, g.Service) || p.Spec.BreakGlass != g.BreakGlass {
			continue
		}
		until, missing := s.check(p, svc, g)
		if len(missing) == 0 {
			best = longer(best, Allowance{Policy: p.Name, Rule: p.inWords(), Until: until})
			continue
		}
		a.Near = append(a.Near, NearPolicy{Policy: p, Missing: missing})
	}
	slices.SortStableFunc(a.Near, NearPolicy.compare)
	switch {
	case len(a.Denied) > 0:
	case best != nil:
		a.Allowed, a.Allowance = true, *best
	case len(a.Near) == 0:
		a.Denied = refused("service", "add it to a BypassPolicy", "no BypassPolicy%s covers the service %q", ofKind(g.BreakGlass), g.Service).Denied
	}
	return a
}

// Err is why it is refused, every violated field at once: what denies it, or else what the nearest policy does not allow, as
// errors.Join of *Error with ErrRefused.
func (a Answer) Err() error {
	switch {
	case a.Allowed:
		return nil
	case len(a.Denied) > 0:
		return joined(a.Denied)
	case len(a.Near) > 0:
		return joined(a.Near[0].Missing)
	}
	return ErrRefused
}

// Unapproved are the approvals that are missing, where nothing else is.
func (a Answer) Unapproved() []*Error {
	if a.Allowed || len(a.Denied) > 0 || len(a.Near) == 0 || !a.Near[0].unapproved() {
		return nil
	}
	return a.Near[0].Missing
}

// unapproved says that others' signatures would do.
func (n NearPolicy) unapproved() bool {
	return !slices.ContainsFunc(n.Missing, func(e *Error) bool { return !errors.Is(e, ErrUnapproved) })
}

// compare puts what only others have to agree to before all else, and then what is refused for less.
func (n NearPolicy) compare(m NearPolicy) int {
	if n.unapproved() != m.unapproved() {
		if n.unapproved() {
			return -1
		}
		return 1
	}
	return cmp.Compare(len(n.Missing), len(m.Missing))
}

func refused(field, hint, format string, args ...any) Answer {
	return Answer{Denied: []*Error{{Field: field, Msg: fmt.Sprintf(format, args...), Hint: hint, Err: ErrRefused}}}
}

func joined(list []*Error) error {
	errs := make([]error, 0, len(list))
	for _, e := range list {
		errs = append(errs, e)
	}
	return errors.Join(errs...)
}

// longer takes zero for no end.
func longer(a *Allowance, b Allowance) *Allowance {
	if a == nil || !a.Until.IsZero() && (b.Until.IsZero() || b.Until.After(a.Until)) {
		return &b
	}
	return a
}

// inWords names the policy, where it was read, and its terms.
func (p BypassPolicy) inWords() string {
	place := ""
	if at := p.Source.String(); at != "" {
		place = " (" + at + ")"
	}
	return fmt.Sprintf("policy %q%s: %s", p.Name, place, p.Terms())
}

// Terms say in words who may ask for a grant under it, for how long and how much, and who has to agree.
func (p BypassPolicy) Terms() string {
	terms := fmt.Sprintf("asked for by %s, for at most %s", strings.Join(p.Spec.Requesters, " or "), p.Spec.MaxDuration)
	if p.Spec.MaxBudget != (Budget{}) {
		terms += " and " + p.Spec.MaxBudget.String()
	}
	if p.Spec.Ticket.Required {
		terms += ", with a ticket"
	}
	for _, a := range p.Spec.Approvals {
		terms += fmt.Sprintf(", approved by %d of %s", a.Min, strings.Join(a.From, ", "))
	}
	between := ", from "
	for _, w := range p.Spec.Windows {
		terms += between + w.String()
		between = " or "
	}
	if !p.Spec.NotAfter.IsZero() {
		terms += ", until " + p.Spec.NotAfter.Format(time.RFC3339)
	}
	return terms
}

// Way is a policy that somebody could ask for a way around under, or what it has against that.
type Way struct {
	// Policy is in words, with its terms.
	Policy string
	// Against are the violated fields; none: it may be asked for.
	Against []*Error
}

// Ways tells for a client and a port of a service which bypass policies would let anybody ask for a path now: of all that
// they require, what does not depend on the one who asks. Denied refuses all of them.
func (s *Set) Ways(g GrantFacts) (ways []Way, denied []*Error) {
	a := s.Evaluate(g)
	for _, n := range a.Near {
		against := slices.DeleteFunc(slices.Clone(n.Missing), func(e *Error) bool { return !e.ofPlace() })
		ways = append(ways, Way{Policy: n.Policy.inWords(), Against: against})
	}
	return ways, a.Denied
}

// ofPlace says that the violated field is one that asking otherwise does not change: where from, where to, and when.
func (e *Error) ofPlace() bool {
	return slices.ContainsFunc([]string{"addresses", "ports", "windows", "notAfter"}, func(f string) bool {
		return e.Field == f || within(e.Field, f)
	})
}
