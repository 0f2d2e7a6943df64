// Package grant holds the signed permission to go around the proxy: its payload, its envelope and
// the keys that sign it.
package grant

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// PayloadType is the DSSE payload type of a grant.
const PayloadType = "application/vnd.sallyport.grant.v1+json"

// Errors that callers may match. Each comes inside a *policy.Error that names the field and the
// next step.
var (
	ErrMalformed    = errors.New("malformed grant")
	ErrUnknownField = errors.New("unknown field")
	ErrTrailing     = errors.New("trailing data")
	ErrNotCanonical = errors.New("not in canonical form")
	ErrInvalid      = errors.New("invalid grant")
	ErrSignature    = errors.New("signature does not verify")
	ErrUnknownKey   = errors.New("unknown key")
	ErrKeyExpired   = errors.New("key expired")
	ErrKeyRevoked   = errors.New("key revoked")
	ErrNotYet       = errors.New("grant not valid yet")
	ErrExpired      = errors.New("grant expired")
	ErrAudience     = errors.New("grant for another node")
	ErrPolicyDigest = errors.New("grant for another policy")
)

// Kind is a kind of grant.
type Kind string

// BreakGlass is the kind for the night on which something is broken: policies of their own allow it, everybody hears of it,
// and it is reviewed. The empty kind is an ordinary grant.
const BreakGlass Kind = "breakGlass"

// Probe is the kind of what a service lists for the probes of kubelet. The agent makes it by itself, of the resources in force, and nobody
// signs one: an envelope with this kind is refused.
const Probe Kind = "probe"

// Begin is what lets a grant begin. The empty one is its requester's answer to a challenge of the node.
type Begin string

// BeginApplied lets it begin when its resource comes to the node from the API server of its cluster. Whoever has the envelope and
// can write there chooses the moment then, within the grant's window.
const BeginApplied Begin = "applied"

// Payload is what a grant says. All times are wall-clock times.
type Payload struct {
	ID        string // ULID, new for each grant
	Kind      Kind
	Requester string // who asked for it: a person, or the SPIFFE ID of a workload
	Service   string // name of a protected service
	Binding   string // what a path is bound to: policy.BindingAddress and its like
	Addresses []netip.Addr
	// ClientPort is the one port of the client that a tuple's path serves, once; else 0.
	ClientPort uint16
	// Cgroup is the kernel's number of the control group whose sockets a workload's path serves; else 0. It means
	// something on one node until that reboots.
	Cgroup uint64
	// Device is the kernel's number of the device of the pod that a workload asked from; 0: it asked from elsewhere. It means
	// something on one node until that reboots.
	Device uint32
	Ports  []uint16 // of the service; empty: all of them
	// NotBefore and NotAfter bound its activation, and no path lives past NotAfter.
	NotBefore, NotAfter time.Time
	// Duration of a path from its activation.
	Duration time.Duration
	// IdleTimeout ends the grant when its paths carried nothing for so long; 0: they may, unless policy says otherwise.
	IdleTimeout  time.Duration
	Budget       policy.Budget  // of each path; 0 is no limit
	Ingress      policy.Ingress // kind of device that the clients come by; empty: any
	Reason       string
	Ticket       string // may be empty
	Template     string // name of the template that it was asked for by; may be empty
	Audience     string // name of the one node that may activate it
	PolicyDigest string // digest of the only policy set that it is for; may be empty
	Begin        Begin
}

// NewID makes a grant id of the time and of randomness.
func NewID(now time.Time) (string, error) {
	id, err := ulid.New(ulid.Timestamp(now), rand.Reader)
	if err != nil {
		return "", fmt.Errorf("make grant id: %w", err)
	}
	return id.String(), nil
}

// Made is when the grant was made, by the clock of whoever asked for it: its id says so.
func (p Payload) Made() time.Time {
	id, err := ulid.ParseStrict(p.ID)
	if err != nil {
		return time.Time{}
	}
	return ulid.Time(id.Time()).UTC()
}

// CheckTime tells whether the grant may be activated at now: ErrNotYet or ErrExpired if not.
func (p Payload) CheckTime(now time.Time) error {
	if now.Before(p.NotBefore) {
		return refuse("notBefore", ErrNotYet, "wait, or check the clock of the node",
			"the grant is valid from %s, and now is %s", stamp(p.NotBefore), stamp(now))
	}
	if !now.Before(p.NotAfter) {
		return refuse("notAfter", ErrExpired, "issue a new grant",
			"the grant ended at %s, and now is %s", stamp(p.NotAfter), stamp(now))
	}
	return nil
}

// CheckAudience tells whether the grant is for the node: ErrAudience if not.
func (p Payload) CheckAudience(node string) error {
	if p.Audience != node {
		return refuse("audience", ErrAudience, "activate it there, or issue one for this node",
			"the grant is for the node %q, and this is %q", p.Audience, node)
	}
	return nil
}

// CheckPolicy tells whether the grant is for the policy set of that digest: ErrPolicyDigest if not.
// A grant that names no digest is for any.
func (p Payload) CheckPolicy(digest string) error {
	if p.PolicyDigest != "" && p.PolicyDigest != digest {
		return refuse("policyDigest", ErrPolicyDigest, "issue a new grant under the present policy",
			"the grant is for the policy %.12s, and the node has %.12s", p.PolicyDigest, digest)
	}
	return nil
}

// Deadline is the end of a path that is opened at now: after Duration, at NotAfter at the latest.
func (p Payload) Deadline(now time.Time) time.Time {
	if end := now.Add(p.Duration); end.Before(p.NotAfter) {
		return end
	}
	return p.NotAfter
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func refuse(field string, sentinel error, hint, format string, args ...any) error {
	return &policy.Error{Field: field, Msg: fmt.Sprintf(format, args...), Hint: hint, Err: sentinel}
}
