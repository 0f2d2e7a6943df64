package policy

import (
	"fmt"
	"slices"
)

// TokensSpec lets callers of a service without http prove who they are by a bearer token, which `sallyport connect` and
// `sallyport forward` show before the first byte. X.509-SVIDs count beside it.
// +kubebuilder:validation:XValidation:rule="(has(self.audiences) && size(self.audiences) > 0) || (has(self.providers) && size(self.providers) > 0)",message="the service would take no token: list providers, or audiences for JWT-SVIDs"
type TokensSpec struct {
	// Audiences are those of JWT-SVIDs, one of which a token must be for. Empty: none is taken.
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	// +kubebuilder:validation:items:MinLength=1
	Audiences []Line `json:"audiences,omitempty" yaml:"audiences,omitempty"`
	// Providers are the IdentityProviders whose tokens count. Empty: none.
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	Providers []Name `json:"providers,omitempty" yaml:"providers,omitempty"`
	// Certificate is the name of the web certificate of the proxy that callers with a token see.
	// +kubebuilder:validation:MinLength=1
	Certificate Name `json:"certificate" yaml:"certificate"`
}

// Proofs are the ways in which callers of a service may prove who they are.
type Proofs struct {
	// Authenticate has spiffe, jwt and oidc.
	Authenticate []string
	// Audiences are those of JWT-SVIDs, and Providers the IdentityProviders whose tokens count.
	Audiences, Providers []string
}

// Take says whether callers may prove themselves in that way.
func (p Proofs) Take(how string) bool { return slices.Contains(p.Authenticate, how) }

// Proofs of the service: what http says, and tokens where there is none.
func (s ProtectedServiceSpec) Proofs() Proofs {
	switch {
	case s.HTTP != nil && len(s.HTTP.Authenticate) == 0: // was not read from a file
		return Proofs{Authenticate: []string{AuthenticateSPIFFE}}
	case s.HTTP != nil:
		return Proofs{s.HTTP.Authenticate, s.HTTP.Audiences, s.HTTP.Providers}
	case s.Tokens == nil:
		return Proofs{Authenticate: []string{AuthenticateSPIFFE}}
	}
	p := Proofs{[]string{AuthenticateSPIFFE}, s.Tokens.Audiences, s.Tokens.Providers}
	if len(p.Audiences) > 0 {
		p.Authenticate = append(p.Authenticate, AuthenticateJWT)
	}
	if len(p.Providers) > 0 {
		p.Authenticate = append(p.Authenticate, AuthenticateOIDC)
	}
	return p
}

// providersField is where the service names its providers.
func (s ProtectedServiceSpec) providersField() string {
	if s.HTTP != nil {
		return "spec.http.providers"
	}
	return "spec.tokens.providers"
}

func (s *ProtectedService) validateTokens(d *document) {
	t := s.Spec.Tokens
	if t == nil {
		return
	}
	if s.Spec.Protocol == ProtocolUDP {
		d.report("spec.tokens", faultf("remove it, or write protocol: TCP", "a UDP service has no way through the proxy"))
	}
	if s.Spec.HTTP != nil {
		d.report("spec.tokens", faultf("write authenticate, audiences and providers in spec.http", "a service with http takes tokens with its requests"))
	}
	if len(t.Audiences)+len(t.Providers) == 0 {
		d.report("spec.tokens", faultf("list providers, or audiences for JWT-SVIDs", "the service would take no token"))
	}
	if len(t.Providers) > 0 {
		d.checkList("spec.tokens.providers", t.Providers, "list the IdentityProviders whose tokens count")
	}
	if len(t.Audiences) > 0 {
		d.checkList("spec.tokens.audiences", t.Audiences, "list what JWT-SVIDs must be for")
	}
	for i, a := range t.Audiences {
		d.report(fmt.Sprintf("spec.tokens.audiences[%d]", i), checkOneLine(a))
	}
	d.report("spec.tokens.certificate", CheckName(t.Certificate))
}

// tokens compares who can prove themselves without an X.509-SVID.
func (c *comparison) tokens(old *TokensSpec, next **TokensSpec) {
	if old == nil || *next == nil {
		effect := Looser
		if *next == nil {
			effect = Tighter
		}
		became(c, effect, "spec.tokens", old, next)
		return
	}
	is := **next
	grows(c, "spec.tokens.audiences", old.Audiences, &is.Audiences, equal)
	grows(c, "spec.tokens.providers", old.Providers, &is.Providers, equal)
	rest(c, "spec.tokens", *old, is)
	*next = old
}
