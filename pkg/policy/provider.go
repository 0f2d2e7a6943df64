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
	Issuer string `json:"issuer" yaml:"issuer"`
	// Audiences are those of tokens, one of which each must be for. At least one.
	Audiences []string `json:"audiences" yaml:"audiences"`
	// Algorithms that may have signed a token: RS256, PS256, ES256 and EdDSA when they are not written. Never none, never HS*.
	Algorithms []string `json:"algorithms,omitempty" yaml:"algorithms,omitempty"`
	// SubjectClaim is the claim that says whom a token is about: sub when it is not written.
	SubjectClaim string `json:"subjectClaim,omitempty" yaml:"subjectClaim,omitempty"`
	// GroupsClaim is the claim that lists groups: groups when it is not written.
	GroupsClaim string `json:"groupsClaim,omitempty" yaml:"groupsClaim,omitempty"`
	// Endpoints are the host:port that the agent relays the proxy to: the issuer's when they are not written.
	Endpoints []string `json:"endpoints,omitempty" yaml:"endpoints,omitempty"`
	// CA are the certificates, in PEM, of which one must have signed the provider's. Empty: the system's.
	CA string `json:"ca,omitempty" yaml:"ca,omitempty"`
	// Skew is how much its clock may differ: 30s when it is not written, at most 5m.
	Skew Duration `json:"skew,omitzero" yaml:"skew,omitempty"`
	// Keep is how long its keys count while it cannot be reached: 24h when it is not written, at most 30 days.
	Keep Duration `json:"keep,omitzero" yaml:"keep,omitempty"`
	// Login lets browsers log in. Left out: they cannot.
	Login *LoginSpec `json:"login,omitempty" yaml:"login,omitempty"`
}

// LoginSpec is browser login by the code flow.
type LoginSpec struct {
	// ClientID that the provider knows the proxy by.
	ClientID string `json:"clientID" yaml:"clientID"`
	// ClientSecretFile has the client's secret, on the node. Empty: a public client, by PKCE alone.
	ClientSecretFile string `json:"clientSecretFile,omitempty" yaml:"clientSecretFile,omitempty"`
	// Scopes beside openid.
	Scopes []string `json:"scopes,omitempty" yaml:"scopes,omitempty"`
	// Session is how long a login counts: 8h when it is not written, at most 30 days.
	Session Duration `json:"session,omitzero" yaml:"session,omitempty"`
	// Idle ends a login that is not used for so long: 1h when it is not written, at most Session.
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
