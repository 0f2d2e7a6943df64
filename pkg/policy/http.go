package policy

// How a caller of an HTTP service may prove who it is.
const (
	// AuthenticateSPIFFE is mTLS with an X.509-SVID.
	AuthenticateSPIFFE = "spiffe"
	// AuthenticateJWT is a JWT-SVID in the Authorization header.
	AuthenticateJWT = "jwt"
	// AuthenticateOIDC is a bearer token of an IdentityProvider, or a login with it.
	AuthenticateOIDC = "oidc"
)

// HTTPSpec makes the proxy speak HTTP with the clients of a service, and judge each request. Without it bytes are carried
// as they are.
// +kubebuilder:validation:XValidation:rule="!(has(self.authenticate) && 'jwt' in self.authenticate) || has(self.audiences) && size(self.audiences) > 0",message="list what JWT-SVIDs must be for, like the URL of the service",fieldPath=".audiences"
// +kubebuilder:validation:XValidation:rule="!(has(self.authenticate) && 'oidc' in self.authenticate) || has(self.providers) && size(self.providers) > 0",message="list the IdentityProviders whose tokens count",fieldPath=".providers"
// +kubebuilder:validation:XValidation:rule="has(self.authenticate) && 'jwt' in self.authenticate || !has(self.audiences) || size(self.audiences) == 0",message="the service takes no such tokens: add jwt to authenticate",fieldPath=".audiences"
// +kubebuilder:validation:XValidation:rule="has(self.authenticate) && 'oidc' in self.authenticate || !has(self.providers) || size(self.providers) == 0",message="the service takes no such tokens: add oidc to authenticate",fieldPath=".providers"
// +kubebuilder:validation:XValidation:rule="!has(self.login) || size(self.login) == 0 || has(self.providers) && self.login in self.providers",message="is not in spec.http.providers",fieldPath=".login"
type HTTPSpec struct {
	// Authenticate says how a caller may prove who it is: spiffe, also when it is not written, jwt, oidc.
	// +kubebuilder:validation:MaxItems=3
	// +listType=set
	Authenticate []Authenticate `json:"authenticate,omitempty" yaml:"authenticate,omitempty"`
	// Audiences are those of JWT-SVIDs, one of which a token must be for. At least one with jwt.
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	// +kubebuilder:validation:items:MinLength=1
	Audiences []Line `json:"audiences,omitempty" yaml:"audiences,omitempty"`
	// Providers are the IdentityProviders whose tokens count. At least one with oidc.
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	Providers []Name `json:"providers,omitempty" yaml:"providers,omitempty"`
	// Login is the one of Providers at which browsers log in. Empty: none.
	// +kubebuilder:validation:MaxLength=31
	// +kubebuilder:validation:Pattern=`^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$`
	Login string `json:"login,omitempty" yaml:"login,omitempty"`
	// Certificate is the name of one of the proxy's web certificates, for clients without SPIFFE. Empty: clients prove the
	// proxy by its SVID.
	// +kubebuilder:validation:MaxLength=31
	// +kubebuilder:validation:Pattern=`^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$`
	Certificate string `json:"certificate,omitempty" yaml:"certificate,omitempty"`
	// Hosts are the names that it is served under, without port; a request for another is refused. Empty: any.
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	Hosts []HostName `json:"hosts,omitempty" yaml:"hosts,omitempty"`
	// Upstream says how the proxy speaks with the service itself: plaintext HTTP/1.1 when it is not written.
	// +optional
	Upstream HTTPUpstream `json:"upstream,omitzero" yaml:"upstream,omitempty"`
	// Limits bound what one client may ask of the proxy and of the service.
	// +optional
	Limits HTTPLimits `json:"limits,omitzero" yaml:"limits,omitempty"`
}

// HTTPUpstream says how the proxy speaks with a service.
// +kubebuilder:validation:XValidation:rule="!has(self.tls) || !has(self.h2c) || !self.h2c",message="h2c is plaintext: with TLS the protocol is agreed on in the handshake",fieldPath=".h2c"
type HTTPUpstream struct {
	// TLS is for a service that speaks TLS itself. Left out: plaintext.
	TLS *UpstreamTLS `json:"tls,omitempty" yaml:"tls,omitempty"`
	// H2C is HTTP/2 in plaintext, as gRPC servers speak it. With TLS the protocol is agreed on in the handshake.
	H2C bool `json:"h2c,omitempty" yaml:"h2c,omitempty"`
}

// UpstreamTLS says what certificate a service must show.
type UpstreamTLS struct {
	// ServerName is what its certificate must be for.
	ServerName HostName `json:"serverName" yaml:"serverName"`
	// CA are the certificates, in PEM, of which one must have signed it. Empty: the system's.
	CA Certificates `json:"ca,omitempty" yaml:"ca,omitempty"`
}

// HTTPLimits bound requests. A change of headerBytes, headerTimeout or streams counts for connections that begin from then on, of the
// others for the next request.
type HTTPLimits struct {
	// HeaderBytes of one request: 32KiB.
	// +kubebuilder:validation:XValidation:rule="!isQuantity(self.substring(0, size(self) - 1)) || self.startsWith('0') || (!quantity(self.substring(0, size(self) - 1)).isLessThan(quantity('1Ki')) && !quantity(self.substring(0, size(self) - 1)).isGreaterThan(quantity('1Mi')))",message="must be from 1KiB to 1MiB"
	HeaderBytes Size `json:"headerBytes,omitempty" yaml:"headerBytes,omitempty"`
	// BodyBytes of one request; 0 is no limit.
	BodyBytes Size `json:"bodyBytes,omitempty" yaml:"bodyBytes,omitempty"`
	// HeaderTimeout is how long a client may take to send a request's header: 10s.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) == duration('0s') || duration(self) >= duration('100ms') && duration(self) <= duration('10m')",message="must be 0s or from 100ms to 10m"
	HeaderTimeout Duration `json:"headerTimeout,omitzero" yaml:"headerTimeout,omitempty"`
	// BodyTimeout is how long the body of a request may be silent: 30s.
	// +optional
	// +kubebuilder:validation:XValidation:rule="duration(self) == duration('0s') || duration(self) >= duration('100ms') && duration(self) <= duration('10m')",message="must be 0s or from 100ms to 10m"
	BodyTimeout Duration `json:"bodyTimeout,omitzero" yaml:"bodyTimeout,omitempty"`
	// BodyRate is how many bytes a second of a body there must be, counted over each BodyTimeout; 0 asks for no rate.
	BodyRate Size `json:"bodyRate,omitempty" yaml:"bodyRate,omitempty"`
	// Streams are how many requests one HTTP/2 connection may have at a time: 100.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=10000
	Streams uint32 `json:"streams,omitempty" yaml:"streams,omitempty"`
	// RequestsPerMinute of one caller; 0 is no limit.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000
	RequestsPerMinute uint32 `json:"requestsPerMinute,omitempty" yaml:"requestsPerMinute,omitempty"`
}
