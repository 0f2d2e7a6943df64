package grant

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// wire is the payload's form in JSON. The order of its fields is the canonical order. What has a
// text form stays text here, so that an error can name the field.
type wire struct {
	ID           string   `json:"id"`
	Kind         Kind     `json:"kind,omitempty"`
	Requester    string   `json:"requester"`
	Service      string   `json:"service"`
	Binding      string   `json:"binding"`
	Addresses    []string `json:"addresses"`
	ClientPort   uint16   `json:"clientPort,omitempty"`
	Cgroup       uint64   `json:"cgroup,omitempty"`
	Device       uint32   `json:"device,omitempty"`
	Ports        []uint16 `json:"ports,omitempty"`
	NotBefore    string   `json:"notBefore"`
	NotAfter     string   `json:"notAfter"`
	Duration     string   `json:"duration"`
	IdleTimeout  string   `json:"idleTimeout,omitempty"`
	Budget       *budget  `json:"budget,omitempty"`
	Ingress      string   `json:"ingress,omitempty"`
	Reason       string   `json:"reason"`
	Ticket       string   `json:"ticket,omitempty"`
	Template     string   `json:"template,omitempty"`
	Audience     string   `json:"audience"`
	PolicyDigest string   `json:"policyDigest,omitempty"`
	Begin        Begin    `json:"begin,omitempty"`
}

// budget is a budget's form in JSON, in numbers alone.
type budget struct {
	Bytes                uint64 `json:"bytes,omitempty"`
	Packets              uint64 `json:"packets,omitempty"`
	Connections          uint64 `json:"connections,omitempty"`
	ConnectionsPerSecond uint32 `json:"connectionsPerSecond,omitempty"`
}

// wireBudget leaves out a budget without a limit.
func wireBudget(b policy.Budget) *budget {
	if b == (policy.Budget{}) {
		return nil
	}
	return &budget{uint64(b.Bytes), b.Packets, b.Connections, b.ConnectionsPerSecond}
}

func (b *budget) read() policy.Budget {
	if b == nil {
		return policy.Budget{}
	}
	return policy.Budget{Bytes: policy.Size(b.Bytes), Packets: b.Packets, Connections: b.Connections,
		ConnectionsPerSecond: b.ConnectionsPerSecond}
}

// MarshalJSON gives the canonical form, but for the escapes that encoding/json adds around it.
func (p Payload) MarshalJSON() ([]byte, error) { return p.canonical() }

// UnmarshalJSON reads the form of MarshalJSON, strictly, but not only in canonical form. It does
// not validate.
func (p *Payload) UnmarshalJSON(data []byte) error {
	var w wire
	if err := decodeStrict("payload", data, &w); err != nil {
		return err
	}
	parsed, err := w.payload()
	if err != nil {
		return err
	}
	*p = parsed
	return nil
}

// payload reads the text forms, and gives every one that is wrong.
func (w wire) payload() (Payload, error) {
	p := Payload{
		ID: w.ID, Kind: w.Kind, Requester: w.Requester, Service: w.Service, Binding: w.Binding, ClientPort: w.ClientPort, Cgroup: w.Cgroup, Device: w.Device, Ports: w.Ports, Budget: w.Budget.read(), Ingress: policy.Ingress(w.Ingress),
		Template: w.Template,
		Reason:   w.Reason, Ticket: w.Ticket, Audience: w.Audience, PolicyDigest: w.PolicyDigest, Begin: w.Begin,
	}
	v := &validation{}
	p.IdleTimeout = v.parseIdle(w.IdleTimeout)
	for i, s := range w.Addresses {
		a, err := netip.ParseAddr(s)
		if err != nil {
			v.refuse(fmt.Sprintf("addresses[%d]", i), "write one address, like 10.1.0.2 or fd00:1::2", "%.80q is not an IP address", s)
		}
		p.Addresses = append(p.Addresses, a)
	}
	p.NotBefore = v.parseTime("notBefore", w.NotBefore)
	p.NotAfter = v.parseTime("notAfter", w.NotAfter)
	var d policy.Duration
	v.check("duration", d.UnmarshalText([]byte(w.Duration)))
	p.Duration = d.Duration
	return p, errors.Join(v.errs...)
}

func (v *validation) parseIdle(s string) time.Duration {
	var d policy.Duration
	if s != "" {
		v.check("idleTimeout", d.UnmarshalText([]byte(s)))
	}
	return d.Duration
}

func (v *validation) parseTime(field, s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		v.refuse(field, "write a time like 2027-01-01T00:00:00Z", "%.80q is not a time", s)
	}
	return t.UTC()
}

// canonical is the one form of a payload that is signed: fixed order of fields, no spaces, UTC.
func (p Payload) canonical() ([]byte, error) {
	w := wire{
		ID: p.ID, Kind: p.Kind, Requester: p.Requester, Service: p.Service, Binding: p.Binding,
		Addresses: make([]string, 0, len(p.Addresses)), ClientPort: p.ClientPort, Cgroup: p.Cgroup, Device: p.Device, Ports: p.Ports,
		NotBefore: p.NotBefore.UTC().Format(time.RFC3339Nano),
		NotAfter:  p.NotAfter.UTC().Format(time.RFC3339Nano),
		Duration:  policy.Duration{Duration: p.Duration}.String(),
		Budget:    wireBudget(p.Budget), Ingress: string(p.Ingress),
		Template: p.Template,
		Reason:   p.Reason, Ticket: p.Ticket, Audience: p.Audience, PolicyDigest: p.PolicyDigest, Begin: p.Begin,
	}
	if p.IdleTimeout != 0 {
		w.IdleTimeout = policy.Duration{Duration: p.IdleTimeout}.String()
	}
	for _, a := range p.Addresses {
		w.Addresses = append(w.Addresses, a.String())
	}
	return encode(w)
}

// parsePayload reads a payload that must be in canonical form, valid, and one that a signature can vouch for.
func parsePayload(data []byte) (Payload, error) {
	var w wire
	if err := decodeStrict("payload", data, &w); err != nil {
		return Payload{}, err
	}
	p, err := w.payload()
	if err != nil {
		return Payload{}, err
	}
	if err := p.validateSigned(); err != nil {
		return Payload{}, err
	}
	canonical, err := p.canonical()
	if err != nil || !bytes.Equal(canonical, data) {
		return Payload{}, refuse("payload", ErrNotCanonical, "issue it with `sallyport grant issue`",
			"is not written in the one form that is signed")
	}
	return p, nil
}

// encode writes JSON without a newline and without escapes for HTML.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// decodeStrict reads one JSON value. what names the whole of it in errors.
func decodeStrict(what string, data []byte, into any) error {
	const hint = "take the grant's file as `sallyport grant issue` wrote it"
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return jsonError(what, hint, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return refuse(what, ErrTrailing, hint, "has data after its end")
	}
	return nil
}

func jsonError(what, hint string, err error) error {
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && wrong.Field != "" {
		return refuse(wrong.Field, ErrMalformed, hint, "a JSON %s does not fit here", wrong.Value)
	}
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return refuse(unquote(name), ErrUnknownField, hint, "the %s has a field that is not known", what)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return refuse(what, ErrMalformed, hint, "is empty or cut off")
	}
	return refuse(what, ErrMalformed, hint, "%s", strings.TrimPrefix(err.Error(), "json: "))
}

// unquote shortens a name that encoding/json has quoted. An empty one keeps its quotes.
func unquote(name string) string {
	if plain := strings.Trim(name, `"`); plain != "" {
		return fmt.Sprintf("%.64s", plain)
	}
	return name
}
