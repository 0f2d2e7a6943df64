package inventory

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"go.yaml.in/yaml/v3"
)

// Proposal is a protected service that nobody has written yet.
type Proposal struct {
	Name    string                  `json:"name"`
	Service policy.ProtectedService `json:"service"`
	// Listeners are what it would protect.
	Listeners []string `json:"listeners"`
	// Denied are the clients that Enforce would have denied.
	Denied []Client `json:"denied"`
	// Decide says what has to be decided before Enforce.
	Decide []string `json:"decide"`

	kind    Kind
	because string
	process Process
}

// Propose makes protected services of that mode of the TCP listeners that can be protected and are not enforced yet. Ports of one
// process are one service, and processes that share a port too; a service that is there keeps its name.
func (v *Inventory) Propose(mode policy.Mode) []Proposal {
	type owner struct {
		space   uint64
		pid     int32
		port    uint16 // of what has no process
		service string
	}
	groups, at := map[owner][]Listener{}, map[portKey]owner{}
	var order []owner
	for _, l := range v.Listeners {
		if !l.protectable() {
			continue
		}
		key := owner{l.Namespace, l.Process.PID, 0, l.Service}
		if l.Process.PID == 0 {
			key.port = l.Port
		}
		if first, ok := at[portKey{l.Namespace, TCP, l.Port}]; ok {
			key = first // a service has a port on every address
		}
		at[portKey{l.Namespace, TCP, l.Port}] = key
		if groups[key] == nil {
			order = append(order, key)
		}
		groups[key] = append(groups[key], l)
	}
	proposals, names := []Proposal{}, map[string]bool{}
	for _, key := range order {
		proposals = append(proposals, propose(groups[key], mode, names))
	}
	return proposals
}

// protectable says whether there is something to propose for the listener.
func (l Listener) protectable() bool {
	switch {
	case l.Service != "" && l.Mode == string(policy.ModeEnforce), l.Protocol != TCP, l.Kind == Sallyport, l.Where == Apart:
		return false
	case l.Where == Pod:
		return len(l.Reach) > 0 && !l.loopbackOnly()
	}
	return true
}

func propose(group []Listener, mode policy.Mode, names map[string]bool) Proposal {
	first := group[0]
	p := Proposal{Name: freeName(first, names), kind: first.Kind, because: first.Because, process: first.Process}
	p.Service = policy.ProtectedService{
		TypeMeta: policy.TypeMeta{APIVersion: policy.APIVersion, Kind: policy.KindProtectedService},
		Metadata: policy.Metadata{Name: p.Name},
		Spec:     policy.ProtectedServiceSpec{Target: policy.TargetHost, Mode: mode},
	}
	spec := &p.Service.Spec
	if first.Where == Pod {
		spec.Target, spec.Addresses = policy.TargetPod, first.Reach
	}
	var rule policy.AccessRule
	for _, l := range group {
		if !slices.Contains(spec.Ports, l.Port) {
			spec.Ports = append(spec.Ports, l.Port)
		}
		p.Listeners = append(p.Listeners, l.String())
		for _, c := range l.Clients {
			if !admit(&rule, c.Identity) {
				p.Denied = append(p.Denied, c)
			}
		}
		for _, caution := range l.Cautions {
			if !slices.Contains(p.Decide, caution) {
				p.Decide = append(p.Decide, caution)
			}
		}
	}
	if len(rule.Identities)+len(rule.Subjects) > 0 {
		spec.Access = []policy.AccessRule{rule}
	}
	if first.Service != "" {
		p.Decide = append(p.Decide, fmt.Sprintf("what else the file of %s says: it is a service already, and this would take its place", first.Service))
	}
	p.decide()
	return p
}

// admit writes an identity into the rule, and says whether there is one.
func admit(rule *policy.AccessRule, identity string) bool {
	list := &rule.Subjects
	switch {
	case identity == "":
		return false
	case strings.HasPrefix(identity, "spiffe://"):
		list = &rule.Identities
	}
	if !slices.Contains(*list, identity) {
		*list = append(*list, identity)
		slices.Sort(*list)
	}
	return true
}

func (p *Proposal) decide() {
	if len(p.Service.Spec.Access) == 0 {
		p.Decide = append(p.Decide, "who may come in: no client's identity is known, so spec.access is empty, and enforced the service would be closed to everybody")
	}
	if len(p.Denied) > 0 {
		p.Decide = append(p.Decide, "how each client without identity is to prove one: an SVID and `sallyport forward` beside it, tokens, or a grant")
	}
	if p.kind == HTTP {
		p.Decide = append(p.Decide, "whether browsers or token holders come: spec.http says how they prove themselves")
	}
	if p.kind == Unknown {
		p.Decide = append(p.Decide, "what it is: "+p.because)
	}
}

// freeName is that of the service that is there, or a DNS label made of kind or program, and port.
func freeName(l Listener, taken map[string]bool) string {
	if l.Service != "" && !taken[l.Service] {
		taken[l.Service] = true
		return l.Service
	}
	word := strings.ToLower(string(l.Kind))
	if l.Kind == Unknown || l.Kind == HTTP {
		word = cmp.Or(label(l.Process.Name), "port")
	}
	if l.Where == Pod {
		word = "pod-" + word
	}
	for n := 1; ; n++ {
		tail := fmt.Sprintf("-%d", l.Port)
		if n > 1 {
			tail += fmt.Sprintf("-%d", n)
		}
		name := strings.TrimRight(word[:min(len(word), policy.MaxName-len(tail))], "-") + tail
		if !taken[name] {
			taken[name] = true
			return name
		}
	}
}

// label keeps of a foreign text what may stand in a name.
func label(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case 'a' <= r && r <= 'z', '0' <= r && r <= '9':
			return r
		case 'A' <= r && r <= 'Z':
			return r + 'a' - 'A'
		}
		return '-'
	}, s)
	return strings.Trim(s, "-")
}

// Document is the resource with what was seen in comments. Text that others made stands there quoted.
func (p Proposal) Document(now time.Time, looked string) ([]byte, error) {
	var b bytes.Buffer
	line := func(format string, args ...any) { fmt.Fprintf(&b, "# "+format+"\n", args...) }
	line("Proposed by `sallyport inventory`, %s, from what was seen in %s.", now.UTC().Format(time.RFC3339), looked)
	line("%s %s: %s", p.kind, p.because, p.process.describe())
	if p.Service.Spec.Mode != policy.ModeEnforce {
		line("Mode %s closes nothing.", p.Service.Spec.Mode)
	}
	if len(p.Denied) == 0 {
		line("Enforced like this it would have denied nobody who was seen.")
	} else {
		line("Enforced like this it would have denied:")
	}
	for _, c := range p.Denied {
		line("  %s", c.describe())
	}
	line("To be decided before Enforce:")
	for _, d := range p.Decide {
		line("  - %s", d)
	}
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(p.Service); err != nil {
		return nil, fmt.Errorf("write %s: %w", p.Name, err)
	}
	return b.Bytes(), e.Close()
}

// describe tells of a process in a line, with foreign text quoted.
func (p Process) describe() string {
	if p.PID == 0 {
		return "no process was found"
	}
	says := fmt.Sprintf("%q (pid %d, user %q", p.Name, p.PID, cmp.Or(p.User, fmt.Sprint(p.UID)))
	if home := p.Home(); home != "" {
		says += fmt.Sprintf(", %q", home)
	}
	return says + ")"
}

func (c Client) describe() string {
	says := fmt.Sprintf("%s, connections: %d, no identity is known", c.Address, c.Connections)
	if c.Process != nil {
		says += ", " + c.Process.describe()
	}
	return says
}
