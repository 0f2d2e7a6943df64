package main

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const (
	// skew is how far before now a grant begins by default, for nodes whose clock is behind.
	skew = time.Minute
	// window is how long after its begin a grant can by default still be activated in full.
	window = time.Hour
)

// terms are what the flags of `grant issue` say of the grant itself.
type terms struct {
	service, node, reason, ticket, requester, template string

	clients   []string
	ports     []int
	duration  time.Duration
	notBefore string
	notAfter  string

	breakGlass bool
	onApply    bool

	idle     time.Duration
	maxBytes string
	ingress  string
	budget   policy.Budget
}

func (g *terms) add(f *pflag.FlagSet) {
	f.StringVar(&g.service, "service", "", "protected `SERVICE` to reach")
	f.StringSliceVar(&g.clients, "client", nil, "`ADDRESS` that may go around the proxy; may be repeated")
	f.IntSliceVar(&g.ports, "port", nil, "only this `PORT` of the service; may be repeated (default: every port)")
	f.DurationVar(&g.duration, "for", 0, "how long from activation: a `DURATION` like 15m")
	f.DurationVar(&g.idle, "idle", 0, "end it after so long without a packet: a `DURATION` (default: what policy says)")
	f.StringVar(&g.maxBytes, "max-bytes", "", "no more than this `SIZE`, like 10GiB, for each client and both directions together")
	f.Uint64Var(&g.budget.Packets, "max-packets", 0, "no more than `N` packets for each client (default: no limit)")
	f.Uint64Var(&g.budget.Connections, "max-connections", 0, "no more than `N` connections for each client (default: no limit)")
	f.Uint32Var(&g.budget.ConnectionsPerSecond, "max-connection-rate", 0, "no more than `N` new connections a second for each client (default: no limit)")
	f.StringVar(&g.ingress, "from", "", "only clients behind this `KIND` of device: uplink, pod or local (default: any)")
	f.StringVar(&g.node, "node", "", "the one `NODE` that may activate it")
	f.BoolVar(&g.breakGlass, "break-glass", false, "ask by the policy for break-glass: narrow, loud, and reviewed afterwards")
	f.BoolVar(&g.onApply, "on-apply", false, "it begins when its BypassGrant comes to the node from its cluster, with nobody's answer")
	f.StringVar(&g.reason, "reason", "", "`TEXT` that says why, for the record")
	f.StringVar(&g.template, "template", "", "ask by this GrantTemplate of --policy: `NAME`; what is not said is what it says")
	f.StringVar(&g.ticket, "ticket", "", "`TICKET` that asks for it")
	f.StringVar(&g.requester, "requester", "", "`NAME` of the key's owner in the Keyring, who asks for it\n(default: what --policy says)")
	f.StringVar(&g.notBefore, "not-before", "", "no activation before this `TIME`, RFC 3339 (default: a minute before now)")
	f.StringVar(&g.notAfter, "not-after", "", "no activation and no open path after this `TIME`: RFC 3339, or a duration from\nnot-before (default: an hour longer than --for)")
}

// flagOf names the flag that gives a field of the payload.
var flagOf = map[string]string{
	"service": "--service", "addresses": "--client", "ports": "--port", "duration": "--for", "audience": "--node",
	"reason": "--reason", "ticket": "--ticket", "requester": "--requester", "notBefore": "--not-before", "notAfter": "--not-after",
	"signatures": "--key", "key": "--key", "budget.bytes": "--max-bytes", "budget.packets": "--max-packets",
	"budget.connections": "--max-connections", "budget.connectionsPerSecond": "--max-connection-rate",
	"ingress": "--from", "template": "--template", "reach": "--client", "idleTimeout": "--idle", "kind": "--break-glass", "begin": "--on-apply",
	"why": "--why", "by": "--by",
}

// inFlags tells of wrong fields by the flags that gave them.
func inFlags(what string, err error) error {
	err = explained(what, err)
	p, ok := errors.AsType[*problemsError](err)
	if !ok {
		return err
	}
	for n, e := range p.list {
		field, _, _ := strings.Cut(e.Field, "[")
		if flag, ok := flagOf[field]; ok {
			named := *e
			named.Field = fmt.Sprintf("%s (%s)", flag, e.Field)
			p.list[n] = &named
		}
	}
	return err
}

// payload reads the flags as of now, with the owner of the key for a requester; it has no id yet. Its error has what cannot be
// read; whether the rest is valid is for the payload to say.
func (g *terms) payload(now time.Time, owner string) (grant.Payload, error) {
	addresses, addressErr := g.addresses()
	ports, portErr := g.portList()
	begin, beginErr := g.begin(now)
	end, endErr := g.end(begin)
	budget, budgetErr := g.limits()
	var kind grant.Kind
	if g.breakGlass {
		kind = grant.BreakGlass
	}
	var starts grant.Begin
	if g.onApply {
		starts = grant.BeginApplied
	}
	return grant.Payload{
		Begin: starts, Kind: kind, Requester: either(g.requester, owner), Service: g.service, Binding: policy.BindingAddress, Addresses: addresses, Ports: ports,
		NotBefore: begin, NotAfter: end, Duration: g.duration, IdleTimeout: g.idle, Budget: budget, Ingress: policy.Ingress(g.ingress), Reason: g.reason, Ticket: g.ticket, Template: g.template, Audience: g.node,
	}, errors.Join(addressErr, portErr, beginErr, endErr, budgetErr)
}

// fill takes from the template what was not said.
func (g *terms) fill(set *policy.Set) error {
	if g.template == "" {
		return nil
	}
	if set == nil {
		return withHint(usagef("issue grant: --template names what nobody has read"), "name the resources with --policy")
	}
	t, ok := set.GrantTemplate(g.template)
	if !ok {
		return &policy.Error{Field: "template", Msg: fmt.Sprintf("no GrantTemplate is named %q", g.template), Hint: "`sallyport policy check` lists them"}
	}
	g.fillPlaces(t.Spec)
	g.fillLimits(t.Spec)
	if !strings.HasPrefix(g.reason, t.Spec.ReasonPrefix) && g.reason != "" {
		g.reason = t.Spec.ReasonPrefix + g.reason
	}
	return nil
}

func (g *terms) fillPlaces(t policy.GrantTemplateSpec) {
	g.service, g.ingress = cmp.Or(g.service, t.Service), cmp.Or(g.ingress, string(t.Ingress))
	if len(g.ports) == 0 {
		for _, port := range t.Ports {
			g.ports = append(g.ports, int(port))
		}
	}
	if len(g.clients) == 0 && len(t.Clients) == 1 && t.Clients[0].IsSingleIP() {
		g.clients = []string{t.Clients[0].String()}
	}
}

func (g *terms) fillLimits(t policy.GrantTemplateSpec) {
	most := t.MaxBudget
	if g.maxBytes == "" && most.Bytes != 0 {
		g.maxBytes = most.Bytes.String()
	}
	g.duration = cmp.Or(g.duration, t.MaxDuration.Duration)
	g.budget.Packets, g.budget.Connections = cmp.Or(g.budget.Packets, most.Packets), cmp.Or(g.budget.Connections, most.Connections)
	g.budget.ConnectionsPerSecond = cmp.Or(g.budget.ConnectionsPerSecond, most.ConnectionsPerSecond)
}

func (g *terms) limits() (policy.Budget, error) {
	b := g.budget
	if g.maxBytes == "" {
		return b, nil
	}
	err := b.Bytes.UnmarshalText([]byte(g.maxBytes))
	if e, ok := errors.AsType[*policy.Error](err); ok {
		e.Field = "budget.bytes"
	}
	return b, err
}

func (g *terms) addresses() ([]netip.Addr, error) {
	var list []netip.Addr
	var errs []error
	for n, text := range g.clients {
		a, err := netip.ParseAddr(text)
		if err != nil {
			errs = append(errs, &policy.Error{
				Field: fmt.Sprintf("addresses[%d]", n), Msg: fmt.Sprintf("%q is no address", text), Hint: "write 10.1.0.2 or fd00::2",
			})
		}
		list = append(list, a)
	}
	return list, errors.Join(errs...)
}

func (g *terms) portList() ([]uint16, error) {
	var list []uint16
	var errs []error
	for n, port := range g.ports {
		if port < 0 || port > math.MaxUint16 {
			errs = append(errs, &policy.Error{
				Field: fmt.Sprintf("ports[%d]", n), Msg: fmt.Sprintf("%d is no port", port), Hint: "write a port from 1 to 65535",
			})
			continue
		}
		list = append(list, uint16(port))
	}
	return list, errors.Join(errs...)
}

func (g *terms) begin(now time.Time) (time.Time, error) {
	if g.notBefore == "" {
		return now.Add(-skew).UTC().Truncate(time.Second), nil
	}
	return readTime("notBefore", g.notBefore)
}

func (g *terms) end(begin time.Time) (time.Time, error) {
	if g.notAfter == "" {
		return begin.Add(g.duration + window), nil
	}
	if d, err := time.ParseDuration(g.notAfter); err == nil {
		return begin.Add(d), nil
	}
	return readTime("notAfter", g.notAfter)
}

func readTime(field, text string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, &policy.Error{Field: field, Msg: fmt.Sprintf("%q is no time", text), Hint: "write a time like 2027-01-01T00:00:00Z"}
	}
	return t.UTC().Truncate(time.Second), nil
}

// payloadTable says in plain words what a grant allows.
func payloadTable(t *table, p grant.Payload) {
	t.row("grant", p.ID)
	if p.Kind == grant.BreakGlass {
		t.row("BREAK-GLASS", "everybody hears of it, and nobody who signs it breaks the glass again before others have reviewed it")
	}
	t.row("lets", fmt.Sprintf("%s: whoever sends from there, with no identity asked", join(p.Addresses, " and ")))
	t.row("reach", fmt.Sprintf("%s on node %s, %s, around the proxy", p.Service, p.Audience, portWords(p.Ports)))
	t.row("ways in", waysIn(p))
	t.row("without", fmt.Sprintf("the proxy: for %s nobody asks for an identity, and no access rule of %s holds", policy.Duration{Duration: p.Duration}, p.Service))
	t.row("for", fmt.Sprintf("%s from its activation; then the kernel cuts it", policy.Duration{Duration: p.Duration}))
	if p.Ingress != "" {
		t.row("from", "clients behind "+ingressWords[p.Ingress])
	}
	if p.IdleTimeout != 0 {
		t.row("or until", fmt.Sprintf("nothing is sent for %s", policy.Duration{Duration: p.IdleTimeout}))
	}
	t.row("at most", limitWords(p.Budget))
	t.row("between", fmt.Sprintf("%s and %s: no activation before, no open path after", p.NotBefore.UTC().Format(time.RFC3339), p.NotAfter.UTC().Format(time.RFC3339)))
	if p.Begin == grant.BeginApplied {
		t.row("begins", "when its BypassGrant is applied in the cluster of the node: whoever can do that chooses the moment")
	}
	t.row("because", p.Reason)
	t.row("ticket", p.Ticket)
	t.row("asked by", p.Requester)
	if p.Template != "" {
		t.row("template", p.Template)
	}
	if p.PolicyDigest != "" {
		t.row("only under", "the policy "+p.PolicyDigest)
	}
}

// answerTable says what policy makes of a grant: the rule that allows it, or what each policy for its service has against it.
func answerTable(t *table, a policy.Answer) {
	switch {
	case a.Allowed:
		t.row("policy", "allows this, by "+a.Rule)
	case len(a.Unapproved()) > 0:
		t.row("policy", "allows this, once it is approved")
	default:
		t.row("policy", "refuses this")
	}
	for _, e := range a.Denied {
		t.row("denied", e.Msg)
	}
	if a.Open != "" {
		t.row("NOTE", a.Open)
	}
	if a.Allowed {
		return
	}
	for _, n := range a.Near {
		var missing []string
		for _, e := range n.Missing {
			missing = append(missing, e.Field+": "+e.Msg)
		}
		t.row("not by", n.Policy.Name+": "+strings.Join(missing, "; "))
	}
}

var ingressWords = map[policy.Ingress]string{
	policy.IngressUplink: "an uplink", policy.IngressPod: "a pod's device", policy.IngressLocal: "no device: the node itself",
}

// waysIn is how far the grant reaches: every client may use every port. How many ports a service has is not said in a grant.
func waysIn(p grant.Payload) string {
	if len(p.Ports) == 0 {
		return fmt.Sprintf("%s to every port of %s", plural(len(p.Addresses), "client"), p.Service)
	}
	return policy.Reach{Clients: len(p.Addresses), Ports: len(p.Ports)}.String()
}

func limitWords(b policy.Budget) string {
	if b == (policy.Budget{}) {
		return "any number of bytes, packets and connections"
	}
	return b.String() + ", for each of these addresses"
}

func portWords(list []uint16) string {
	switch len(list) {
	case 0:
		return "every port of it"
	case 1:
		return "port " + ports(list)
	}
	return "ports " + ports(list)
}

func join[T fmt.Stringer](list []T, between string) string {
	var texts []string
	for _, one := range list {
		texts = append(texts, one.String())
	}
	return strings.Join(texts, between)
}
