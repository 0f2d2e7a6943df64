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
type HTTPSpec struct {
	// Authenticate says how a caller may prove who it is: spiffe, also when it is not written, jwt, oidc.
	Authenticate []string `json:"authenticate,omitempty" yaml:"authenticate,omitempty"`
	// Audiences are those of JWT-SVIDs, one of which a token must be for. At least one with jwt.
	Audiences []string `json:"audiences,omitempty" yaml:"audiences,omitempty"`
	// Providers are the IdentityProviders whose tokens count. At least one with oidc.
	Providers []string `json:"providers,omitempty" yaml:"providers,omitempty"`
	// Login is the one of Providers at which browsers log in. Empty: none.
	Login string `json:"login,omitempty" yaml:"login,omitempty"`
	// Certificate is the name of one of the proxy's web certificates, for clients without SPIFFE. Empty: clients prove the
	// proxy by its SVID.
	Certificate string `json:"certificate,omitempty" yaml:"certificate,omitempty"`
	// Hosts are the names that it is served under, without port; a request for another is refused. Empty: any.
	Hosts []string `json:"hosts,omitempty" yaml:"hosts,omitempty"`
	// Upstream says how the proxy speaks with the service itself: plaintext HTTP/1.1 when it is not written.
	Upstream HTTPUpstream `json:"upstream,omitzero" yaml:"upstream,omitempty"`
	// Limits bound what one client may ask of the proxy and of the service.
	Limits HTTPLimits `json:"limits,omitzero" yaml:"limits,omitempty"`
}

// HTTPUpstream says how the proxy speaks with a service.
type HTTPUpstream struct {
	// TLS is for a service that speaks TLS itself. Left out: plaintext.
	TLS *UpstreamTLS `json:"tls,omitempty" yaml:"tls,omitempty"`
	// H2C is HTTP/2 in plaintext, as gRPC servers speak it. With TLS the protocol is agreed on in the handshake.
	H2C bool `json:"h2c,omitempty" yaml:"h2c,omitempty"`
}

// UpstreamTLS says what certificate a service must show.
type UpstreamTLS struct {
	// ServerName is what its certificate must be for.
	ServerName string `json:"serverName" yaml:"serverName"`
	// CA are the certificates, in PEM, of which one must have signed it. Empty: the system's.
	CA string `json:"ca,omitempty" yaml:"ca,omitempty"`
}

// HTTPLimits bound requests. A change of headerBytes, headerTimeout or streams counts for connections that begin from then on, of the
// others for the next request.
type HTTPLimits struct {
	// HeaderBytes of one request: 32KiB.
	HeaderBytes Size `json:"headerBytes,omitempty" yaml:"headerBytes,omitempty"`
	// BodyBytes of one request; 0 is no limit.
	BodyBytes Size `json:"bodyBytes,omitempty" yaml:"bodyBytes,omitempty"`
	// HeaderTimeout is how long a client may take to send a request's header: 10s.
	HeaderTimeout Duration `json:"headerTimeout,omitzero" yaml:"headerTimeout,omitempty"`
	// BodyTimeout is how long the body of a request may be silent: 30s.
	BodyTimeout Duration `json:"bodyTimeout,omitzero" yaml:"bodyTimeout,omitempty"`
	// BodyRate is how many bytes a second of a body there must be, counted over each BodyTimeout; 0 asks for no rate.
	BodyRate Size `json:"bodyRate,omitempty" yaml:"bodyRate,omitempty"`
	// Streams are how many requests one HTTP/2 connection may have at a time: 100.
	Streams uint32 `json:"streams,omitempty" yaml:"streams,omitempty"`
	// RequestsPerMinute of one caller; 0 is no limit.
	RequestsPerMinute uint32 `json:"requestsPerMinute,omitempty" yaml:"requestsPerMinute,omitempty"`
}
