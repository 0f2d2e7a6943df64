package policy

import (
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// AccessRule lets callers through the proxy. It names who by at least one of Identities, Subjects and Groups; the rest narrows.
// +kubebuilder:validation:XValidation:rule="(has(self.identities) && size(self.identities) > 0) || (has(self.subjects) && size(self.subjects) > 0) || (has(self.groups) && size(self.groups) > 0)",message="a rule without identities, subjects and groups lets nobody in",fieldPath=".identities"
type AccessRule struct {
	// Identities are SPIFFE IDs, exact, or ending in /* for everything below.
	// +kubebuilder:validation:MaxItems=128
	// +listType=atomic
	Identities []IdentityPattern `json:"identities,omitempty" yaml:"identities,omitempty"`
	// Subjects are those of tokens: PROVIDER/SUBJECT, or PROVIDER/* for whoever that IdentityProvider knows.
	// +kubebuilder:validation:MaxItems=128
	// +listType=atomic
	Subjects []SubjectPattern `json:"subjects,omitempty" yaml:"subjects,omitempty"`
	// Groups are those of tokens: PROVIDER/GROUP.
	// +kubebuilder:validation:MaxItems=128
	// +listType=atomic
	Groups []TokenGroup `json:"groups,omitempty" yaml:"groups,omitempty"`
	// From are the addresses that callers must come from. They identify nobody. Empty: any.
	// +kubebuilder:validation:MaxItems=128
	// +listType=atomic
	From []AddressRange `json:"from,omitempty" yaml:"from,omitempty"`
	// During are the times at which the rule holds. Empty: always.
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	During []Window `json:"during,omitempty" yaml:"during,omitempty"`
	// Routes are the requests that it is for, of a service with http. Empty: every request.
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Routes []Route `json:"routes,omitempty" yaml:"routes,omitempty"`
	// When is a condition in CEL. One that cannot be worked out does not hold.
	When Condition `json:"when,omitempty" yaml:"when,omitempty"`
	// Signals are the sources that can speak against a caller. They only ever take away.
	// +kubebuilder:validation:MaxItems=32
	// +listType=map
	// +listMapKey=source
	Signals []AccessSignal `json:"signals,omitempty" yaml:"signals,omitempty"`
}

// Route is requests. Each of its lists that is not empty must have the request's.
// +kubebuilder:validation:XValidation:rule="(has(self.methods) && size(self.methods) > 0) || (has(self.paths) && size(self.paths) > 0) || (has(self.hosts) && size(self.hosts) > 0) || (has(self.headers) && size(self.headers) > 0)",message="says nothing of a request: write methods, paths, hosts or headers"
type Route struct {
	// Methods like GET.
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	Methods []Method `json:"methods,omitempty" yaml:"methods,omitempty"`
	// Paths are canonical, and exact, or end in /* for everything below.
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Paths []RoutePath `json:"paths,omitempty" yaml:"paths,omitempty"`
	// Hosts are names without port.
	// +kubebuilder:validation:MaxItems=16
	// +listType=atomic
	Hosts []HostName `json:"hosts,omitempty" yaml:"hosts,omitempty"`
	// Headers must be there once each, with exactly that value.
	// +kubebuilder:validation:MaxProperties=32
	// +kubebuilder:validation:XValidation:rule="!('host' in self)",message="host is no header to compare: use hosts"
	Headers map[string]HeaderValue `json:"headers,omitempty" yaml:"headers,omitempty"`
}

// AccessSignal names a source whose word against a caller makes a rule not hold for that caller.
type AccessSignal struct {
	// Source is a name.
	// +kubebuilder:validation:XValidation:rule="!(self in ['firstSeen', 'outOfHours', 'breadth', 'frequency', 'nearBudget'])",message="is about grants: name a source of your own"
	Source PersonName `json:"source" yaml:"source"`
	// UIDs are the users who may speak for it on the agent's socket: root alone.
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	UIDs []uint32 `json:"uids,omitempty" yaml:"uids,omitempty"`
	// Required makes the rule not hold for callers about whom the source says nothing.
	Required bool `json:"required,omitempty" yaml:"required,omitempty"`
}

// How a caller was proven.
const (
	ProofSPIFFE = "spiffe" // mTLS with an X.509-SVID
	ProofJWT    = "jwt"    // a JWT-SVID
	ProofOIDC   = "oidc"   // a token of an IdentityProvider, or a login with it
	ProofLocal  = "local"  // the socket's process on this node, attested: of who asks a RemoteService
)

// Caller is who comes, as it was proven, and how.
type Caller struct {
	// ID is the SPIFFE ID; zero where a token of an IdentityProvider proved the caller.
	ID spiffeid.ID
	// Provider is the name of the IdentityProvider whose token it was, and Subject whom it is about. Empty with an ID.
	Provider, Subject string
	// Groups of the token, without the provider.
	Groups []string
	// Claims of the token.
	Claims map[string]any
	// Proof is spiffe, jwt, oidc or local. Empty: oidc for who has a Provider, and spiffe for others.
	Proof string
	// Address that the caller comes from.
	Address netip.Addr
}

// String is the SPIFFE ID, or provider/subject. Nobody is the empty string.
func (c Caller) String() string {
	switch {
	case !c.ID.IsZero():
		return c.ID.String()
	case c.Provider == "" || c.Subject == "":
		return ""
	}
	return c.Provider + "/" + c.Subject
}

func (c Caller) proof() string {
	switch {
	case c.Proof != "":
		return c.Proof
	case c.Provider != "":
		return ProofOIDC
	}
	return ProofSPIFFE
}

// Request is what a caller wants of an HTTP service.
type Request struct {
	Method string
	// Host is in lower case, without port.
	Host string
	// Path is canonical, as CanonicalPath has it and as it is sent on, without the query.
	Path string
	// Headers by their names in lower case.
	Headers map[string][]string
}
