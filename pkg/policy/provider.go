package policy

import "slices"

// IdentityProvider is an OpenID Connect provider whose tokens can prove callers of services with http or tokens. Its name is what rules say
// before the subjects and groups of its tokens.
type IdentityProvider struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     IdentityProviderSpec `json:"spec" yaml:"spec"`
	// Source is where it was read.
	Source Source `json:"-" yaml:"-"`
}

// IdentityProviderSpec is what an IdentityProvider says.
type IdentityProviderSpec struct {
	// Issuer is what its tokens say in iss, an https URL, below which its discovery document is.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	// +kubebuilder:validation:Pattern=`^https://[A-Za-z0-9.:\[\]-]+(/[^?#\s]*)?$`
	// +kubebuilder:validation:XValidation:rule="isURL(self)",message="is not the URL of an issuer: write an https URL without query, like https://login.example.org"
	Issuer string `json:"issuer" yaml:"issuer"`
	// Audiences are those of tokens, one of which each must be for. At least one.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	// +kubebuilder:validation:items:MinLength=1
	Audiences []Line `json:"audiences" yaml:"audiences"`
	// Algorithms that may have signed a token: RS256, PS256, ES256 and EdDSA when they are not written. Never none, never HS*.
	// +kubebuilder:validation:MaxItems=10
	// +listType=set
	Algorithms []TokenAlgorithm `json:"algorithms,omitempty" yaml:"algorithms,omitempty"`
	// SubjectClaim is the claim that says whom a token is about: sub when it is not written.
	SubjectClaim Line `json:"subjectClaim,omitempty" yaml:"subjectClaim,omitempty"`
	// GroupsClaim is the claim that lists groups: groups when it is not written.
	GroupsClaim Line `json:"groupsClaim,omitempty" yaml:"groupsClaim,omitempty"`
	// Endpoints are the host:port that the agent relays the proxy to: the issuer's when they are not written.
	// +kubebuilder:validation:MaxItems=16
	// +listType=set
	Endpoints []Endpoint `json:"endpoints,omitempty" yaml:"endpoints,omitempty"`
	// CA are the certificates, in PEM, of which one must have signed the provider's. Empty: the system's.
	CA Certificates `json:"ca,omitempty" yaml:"ca,omitempty"`
	// Skew is how much its clock may differ: 30s when it is not written, at most 5m.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) >= duration('0s') && duration(self) <= duration('5m')",message="must be from 0s to 5m"
	Skew Duration `json:"skew,omitzero" yaml:"skew,omitempty"`
	// Keep is how long its keys count while it cannot be reached: 24h when it is not written, at most 30 days.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) == duration('0s') || duration(self) >= duration('1m') && duration(self) <= duration('720h')",message="must be 0s or from 1m to 720h"
	Keep Duration `json:"keep,omitzero" yaml:"keep,omitempty"`
	// Login lets browsers log in. Left out: they cannot.
	Login *LoginSpec `json:"login,omitempty" yaml:"login,omitempty"`
}

// LoginSpec is browser login by the code flow.
// +kubebuilder:validation:XValidation:rule="!has(self.idle) || duration(self.idle) <= duration(has(self.session) && duration(self.session) != duration('0s') ? self.session : '8h')",message="must be at most the session",fieldPath=".idle"
type LoginSpec struct {
	// ClientID that the provider knows the proxy by.
	// +kubebuilder:validation:MinLength=1
	ClientID Line `json:"clientID" yaml:"clientID"`
	// ClientSecretFile has the client's secret, on the node. Empty: a public client, by PKCE alone.
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:Pattern=`^(/.*[^/])?$`
	// +kubebuilder:validation:XValidation:rule="!self.contains('//') && !self.contains('/./') && !self.contains('/../') && !self.endsWith('/.') && !self.endsWith('/..')",message="is not an absolute path without . or .."
	ClientSecretFile string `json:"clientSecretFile,omitempty" yaml:"clientSecretFile,omitempty"`
	// Scopes beside openid.
	// +kubebuilder:validation:MaxItems=64
	// +listType=atomic
	Scopes []Scope `json:"scopes,omitempty" yaml:"scopes,omitempty"`
	// Session is how long a login counts: 8h when it is not written, at most 30 days.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) == duration('0s') || duration(self) >= duration('1m') && duration(self) <= duration('720h')",message="must be 0s or from 1m to 720h"
	Session Duration `json:"session,omitzero" yaml:"session,omitempty"`
	// Idle ends a login that is not used for so long: 1h when it is not written, at most Session.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) == duration('0s') || duration(self) >= duration('1m') && duration(self) <= duration('720h')",message="must be 0s or from 1m to 720h"
	Idle Duration `json:"idle,omitzero" yaml:"idle,omitempty"`
}

// Provider finds an identity provider by its name.
func (s *Set) Provider(name string) (IdentityProvider, bool) {
	if s == nil {
		return IdentityProvider{}, false
	}
	i := slices.IndexFunc(s.providers, func(p IdentityProvider) bool { return p.Name == name })
	if i < 0 {
		return IdentityProvider{}, false
	}
	return s.providers[i], true
}

// Providers lists the identity providers by name.
func (s *Set) Providers() []IdentityProvider {
	if s == nil {
		return nil
	}
	return slices.Clone(s.providers)
}
