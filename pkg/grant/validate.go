package grant

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/oklog/ulid/v2"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Bounds of a payload.
const (
	// MaxWindow is the longest time from NotBefore to NotAfter.
	MaxWindow = 30 * 24 * time.Hour
	// MaxBreakGlassWindow is the longest one of a break-glass grant: it is made when it is needed.
	MaxBreakGlassWindow    = 24 * time.Hour
	maxBreakGlassAddresses = 4

	maxAddresses = 64
	maxPorts     = 1024
	maxText      = 512 // bytes of a text field
)

// Validate gives every wrong field at once, as errors.Join of *policy.Error with ErrInvalid. What
// depends on a policy, a node or a clock is not its business.
func (p Payload) Validate() error {
	v := &validation{}
	v.check("id", checkID(p.ID))
	v.kind(p)
	v.check("requester", checkText(p.Requester, "name who asks for it"))
	v.check("service", policy.CheckName(p.Service))
	v.binding(p)
	v.addresses(p.Addresses)
	v.ports(p.Ports)
	v.window(p.NotBefore, p.NotAfter)
	v.duration(p.Duration)
	v.check("idleTimeout", policy.CheckIdleTimeout(p.IdleTimeout))
	v.check("budget", policy.CheckBudget(p.Budget))
	v.check("ingress", policy.CheckIngress(p.Ingress))
	v.check("reason", checkText(p.Reason, "say why the bypass is needed"))
	if p.Ticket != "" {
		v.check("ticket", checkText(p.Ticket, "name the ticket or leave it out"))
	}
	if p.Template != "" {
		v.check("template", policy.CheckName(p.Template))
	}
	v.check("audience", policy.CheckNodeName(p.Audience))
	v.digest(p.PolicyDigest)
	v.begin(p)
	return errors.Join(v.errs...)
}

type validation struct{ errs []error }

func (v *validation) refuse(field, hint, format string, args ...any) {
	v.errs = append(v.errs, refuse(field, ErrInvalid, hint, format, args...))
}

// check takes over what policy says of a value.
func (v *validation) check(field string, err error) {
	if err == nil {
		return
	}
	hint := ""
	if e, ok := errors.AsType[*policy.Error](err); ok {
		hint = e.Hint
	}
	v.refuse(field, hint, "%v", err)
}

func checkID(s string) error {
	id, err := ulid.ParseStrict(s)
	if err != nil || id.String() != s {
		return &policy.Error{Msg: fmt.Sprintf("%q is not a ULID", s), Hint: "let `sallyport grant issue` make the id"}
	}
	return nil
}

func checkText(s, hint string) error {
	switch {
	case strings.TrimSpace(s) == "":
		return &policy.Error{Msg: "is empty", Hint: hint}
	case len(s) > maxText:
		return &policy.Error{Msg: fmt.Sprintf("has %d bytes, the most is %d", len(s), maxText), Hint: "shorten it"}
	case !utf8.ValidString(s) || strings.ContainsFunc(s, notPrintable):
		return &policy.Error{Msg: "has characters that cannot be shown", Hint: "write it in one line of plain text"}
	}
	return nil
}

// notPrintable refuses control and format characters, which could make a log line lie.
func notPrintable(r rune) bool { return !unicode.IsPrint(r) }

// binding holds that what a path is bound to is there, whole, and nothing else.
func (v *validation) binding(p Payload) {
	v.check("binding", policy.CheckBinding(p.Binding))
	tuple, workload := p.Binding == policy.BindingTuple, p.Binding == policy.BindingWorkload
	if tuple != (p.ClientPort != 0) {
		v.refuse("clientPort", "a tuple has one, and nothing else has", "the binding %q has the client's port %d", p.Binding, p.ClientPort)
	}
	if workload != (p.Cgroup != 0) {
		v.refuse("cgroup", "a workload has one, and nothing else has", "the binding %q has the control group %d", p.Binding, p.Cgroup)
	}
	if (tuple || workload) && len(p.Addresses) > 1 {
		v.refuse("addresses", "ask for each address by itself", "the binding %q is to one address", p.Binding)
	}
	if tuple && len(p.Ports) != 1 {
		v.refuse("ports", "name the port of the service that is connected to", "the binding %q is to one port", p.Binding)
	}
}

// begin holds that what needs somebody who is there begins by somebody's answer.
func (v *validation) begin(p Payload) {
	switch {
	case p.Begin == "":
	case p.Begin != BeginApplied:
		v.refuse("begin", "write applied or leave it out", "begin %.40q is not known", p.Begin)
	case p.Kind == BreakGlass:
		v.refuse("begin", "activate it yourself: whoever breaks the glass is there", "a break-glass grant does not begin by a resource")
	case p.Binding != policy.BindingAddress:
		v.refuse("begin", "name the client's address", "the binding %q does not begin by a resource: who has the sockets asks for the path", p.Binding)
	}
}

// kind holds break-glass grants to less than others.
func (v *validation) kind(p Payload) {
	switch {
	case p.Kind == "":
		return
	case p.Kind != BreakGlass:
		v.refuse("kind", "write breakGlass or leave it out", "kind %.40q is not known", p.Kind)
		return
	}
	if len(p.Addresses) > maxBreakGlassAddresses {
		v.refuse("addresses", "name the one from which you mend it", "has %d addresses, the most for break-glass is %d", len(p.Addresses), maxBreakGlassAddresses)
	}
	if p.NotAfter.Sub(p.NotBefore) > MaxBreakGlassWindow {
		v.refuse("notAfter", "issue it when it is needed", "is more than %s after notBefore, the most for break-glass", policy.Duration{Duration: MaxBreakGlassWindow})
	}
	if made := p.Made(); p.NotAfter.Sub(made) > MaxBreakGlassWindow+time.Minute {
		v.refuse("notAfter", "ask when it is needed: none is kept for later", "is more than %s after %s, when it was made by its id", policy.Duration{Duration: MaxBreakGlassWindow},
			made.Format(time.RFC3339))
	}
	if p.Duration > policy.MaxBreakGlassDuration {
		v.refuse("duration", "write a duration such as 15m", "%s is over the cap of %s for break-glass",
			policy.Duration{Duration: p.Duration}, policy.Duration{Duration: policy.MaxBreakGlassDuration})
	}
}

func (v *validation) addresses(list []netip.Addr) {
	if len(list) == 0 {
		v.refuse("addresses", "name the client's address", "needs at least one address")
	}
	if len(list) > maxAddresses {
		v.refuse("addresses", "issue several grants", "has %d addresses, the most is %d", len(list), maxAddresses)
		return
	}
	seen := map[netip.Addr]bool{}
	for i, a := range list {
		field := fmt.Sprintf("addresses[%d]", i)
		v.check(field, policy.CheckAddress(a))
		if seen[a] {
			v.refuse(field, "remove one of them", "%s is listed twice", a)
		}
		seen[a] = true
	}
}

func (v *validation) ports(list []uint16) {
	if len(list) > maxPorts {
		v.refuse("ports", "leave the ports out to mean all of the service", "has %d ports, the most is %d", len(list), maxPorts)
		return
	}
	seen := map[uint16]bool{}
	for i, port := range list {
		field := fmt.Sprintf("ports[%d]", i)
		if port == 0 {
			v.refuse(field, "write a port from 1 to 65535", "0 is not a port")
		}
		if seen[port] {
			v.refuse(field, "remove one of them", "port %d is listed twice", port)
		}
		seen[port] = true
	}
}

func (v *validation) window(from, to time.Time) {
	v.time("notBefore", from)
	v.time("notAfter", to)
	switch {
	case !from.Before(to):
		v.refuse("notAfter", "let it end after it begins", "%s is not after notBefore", stamp(to))
	case to.Sub(from) > MaxWindow:
		v.refuse("notAfter", "issue it nearer to its use", "is more than %s after notBefore", policy.Duration{Duration: MaxWindow})
	}
}

func (v *validation) time(field string, t time.Time) {
	if t.IsZero() || t.Year() < 1970 || t.Year() > 9999 {
		v.refuse(field, "write a time like 2027-01-01T00:00:00Z", "is missing or out of range")
	}
}

func (v *validation) duration(d time.Duration) {
	const hint = "write a duration such as 15m"
	switch {
	case d <= 0:
		v.refuse("duration", hint, "must be more than 0: every grant ends")
	case d > policy.MaxGrantDuration:
		v.refuse("duration", hint, "%s is over the cap of %s",
			policy.Duration{Duration: d}, policy.Duration{Duration: policy.MaxGrantDuration})
	}
}

func (v *validation) digest(s string) {
	if s == "" {
		return
	}
	raw, err := hex.DecodeString(s)
	if err != nil || len(raw) != 32 || s != strings.ToLower(s) {
		v.refuse("policyDigest", "leave it out, or write the digest that `sallyport policy check` prints",
			"%q is not a SHA-256 in hex", s)
	}
}
