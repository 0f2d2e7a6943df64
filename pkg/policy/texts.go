package policy

// Kinds of text in resources. They are plain strings to Go. The markers say to the schema of the cluster's API (deploy/crds) what is
// checked here by functions: an API server that knows it refuses a wrong resource before any node sees it.

// Text is what people read, of several lines perhaps.
// +kubebuilder:validation:MaxLength=4096
// +kubebuilder:validation:Pattern=`^[\pL\pM\pN\pP\pS \n\t]*$`
type Text = string

// Line is what people read, in one line.
// +kubebuilder:validation:MaxLength=512
// +kubebuilder:validation:Pattern=`^[\pL\pM\pN\pP\pS ]*$`
type Line = string

// Name is the name of a resource.
// +kubebuilder:validation:MaxLength=31
// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
type Name = string

// PersonName is the name of a person, or of a source of signals.
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:Pattern=`^[A-Za-z0-9]([-A-Za-z0-9._@+]*[A-Za-z0-9])?$`
type PersonName = string

// PersonOrGroup is a person, or group:NAME.
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:Pattern=`^(group:[a-z0-9]([-a-z0-9]*[a-z0-9])?|[A-Za-z0-9]([-A-Za-z0-9._@+]*[A-Za-z0-9])?)$`
type PersonOrGroup = string

// Requester is a person, group:NAME, or a workload as IdentityPattern has it.
// +kubebuilder:validation:MaxLength=2048
// +kubebuilder:validation:Pattern=`^(group:[a-z0-9]([-a-z0-9]*[a-z0-9])?|[A-Za-z0-9]([-A-Za-z0-9._@+]*[A-Za-z0-9])?|spiffe://[a-z0-9._-]+((/([A-Za-z0-9_-]|\.[A-Za-z0-9_-]|\.\.[A-Za-z0-9._-])[A-Za-z0-9._-]*)+(/\*)?|/\*))$`
type Requester = string

// IdentityPattern is a SPIFFE ID, or ends in /* for everything below.
// +kubebuilder:validation:MaxLength=2048
// +kubebuilder:validation:Pattern=`^spiffe://[a-z0-9._-]+((/([A-Za-z0-9_-]|\.[A-Za-z0-9_-]|\.\.[A-Za-z0-9._-])[A-Za-z0-9._-]*)+(/\*)?|/\*)$`
type IdentityPattern = string

// SubjectPattern is PROVIDER/SUBJECT, or PROVIDER/* for all of them.
// +kubebuilder:validation:MaxLength=512
// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]{0,29}[a-z0-9])?/(\*|([^*\pC\pZ]| )+)$`
type SubjectPattern = string

// TokenGroup is PROVIDER/GROUP.
// +kubebuilder:validation:MaxLength=512
// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]{0,29}[a-z0-9])?/([^*\pC\pZ]| )+$`
type TokenGroup = string

// HostName is a name in lower case, or an address, without a port.
// +kubebuilder:validation:MaxLength=253
// +kubebuilder:validation:Pattern=`^(([a-z0-9]([-a-z0-9]*[a-z0-9])?\.)*[a-z]([-a-z0-9]*[a-z0-9])?|[0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9a-f]*:[0-9a-f:.]*)$`
type HostName = string

// Endpoint is host:port.
// +kubebuilder:validation:MaxLength=280
// +kubebuilder:validation:Pattern=`^([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?\]):[0-9]{1,5}$`
type Endpoint = string

// Method is one of HTTP, in capitals.
// +kubebuilder:validation:Pattern=`^[A-Z][-A-Z]{0,31}$`
// +kubebuilder:validation:XValidation:rule="self != 'CONNECT'",message="CONNECT is not passed on"
// +kubebuilder:validation:MaxLength=32
type Method = string

// RoutePath is canonical, and exact, or ends in /* for everything below.
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=1024
// +kubebuilder:validation:Pattern=`^(/([A-Za-z0-9_~!$&'()+,;=:@-]|%(2[0-9A-C]|3[A-F]|40|5[BDE]|60|7[B-D]|[89A-F][0-9A-F])|\.([A-Za-z0-9_~!$&'()+,;=:@-]|%(2[0-9A-C]|3[A-F]|40|5[BDE]|60|7[B-D]|[89A-F][0-9A-F]))|\.\.([A-Za-z0-9_~!$&'()+,;=:@-]|%(2[0-9A-C]|3[A-F]|40|5[BDE]|60|7[B-D]|[89A-F][0-9A-F])|\.))([A-Za-z0-9_~!$&'()+,;=:@-]|%(2[0-9A-C]|3[A-F]|40|5[BDE]|60|7[B-D]|[89A-F][0-9A-F])|\.)*)*(/\*?)?$`
type RoutePath = string

// Binding is what a path can be bound to.
// +kubebuilder:validation:Enum=address;tuple;workload
type Binding = string

// Weekday is a day on which a window begins.
// +kubebuilder:validation:Enum=Sun;Mon;Tue;Wed;Thu;Fri;Sat
type Weekday = string

// KeyID is what `sallyport keygen` prints.
// +kubebuilder:validation:Pattern=`^sp:[0-9a-f]{16}$`
type KeyID = string

// GrantID is a ULID.
// +kubebuilder:validation:Pattern=`^[0-7][0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{25}$`
type GrantID = string

// Certificates are in PEM.
// +kubebuilder:validation:MaxLength=131072
// +kubebuilder:validation:XValidation:rule="size(self) == 0 || self.contains('-----BEGIN CERTIFICATE-----')",message="has no certificate in PEM: begin it with -----BEGIN CERTIFICATE-----"
type Certificates = string

// Condition is a rule in CEL.
// +kubebuilder:validation:MaxLength=4096
type Condition = string

// Port is one of TCP or UDP.
// +kubebuilder:validation:Minimum=1
// +kubebuilder:validation:Maximum=65535
type Port = uint16

// Authenticate is a way in which callers of an HTTP service prove who they are.
// +kubebuilder:validation:Enum=spiffe;jwt;oidc
type Authenticate = string

// SignalEffect is what a signal may do to a grant.
// +kubebuilder:validation:Enum=Shorten;Lower;Revoke
type SignalEffect = string

// TokenAlgorithm is a signature of tokens by a public key.
// +kubebuilder:validation:Enum=RS256;RS384;RS512;PS256;PS384;PS512;ES256;ES384;ES512;EdDSA
type TokenAlgorithm = string

// Scope is one of a login.
// +kubebuilder:validation:MaxLength=256
// +kubebuilder:validation:Pattern=`^[^ \t\n"\\]+$`
type Scope = string

// RequestPath is canonical.
// +kubebuilder:validation:MaxLength=1024
// +kubebuilder:validation:Pattern=`^(/([A-Za-z0-9_~!$&'()*+,;=:@-]|%(2[0-9A-C]|3[A-F]|40|5[BDE]|60|7[B-D]|[89A-F][0-9A-F])|\.([A-Za-z0-9_~!$&'()*+,;=:@-]|%(2[0-9A-C]|3[A-F]|40|5[BDE]|60|7[B-D]|[89A-F][0-9A-F]))|\.\.([A-Za-z0-9_~!$&'()*+,;=:@-]|%(2[0-9A-C]|3[A-F]|40|5[BDE]|60|7[B-D]|[89A-F][0-9A-F])|\.))([A-Za-z0-9_~!$&'()*+,;=:@-]|%(2[0-9A-C]|3[A-F]|40|5[BDE]|60|7[B-D]|[89A-F][0-9A-F])|\.)*)*/?$`
type RequestPath = string

// HeaderValue is sent without spaces at its ends.
// +kubebuilder:validation:MaxLength=512
// +kubebuilder:validation:Pattern=`^([\pL\pM\pN\pP\pS]([\pL\pM\pN\pP\pS ]*[\pL\pM\pN\pP\pS])?)?$`
type HeaderValue = string

// SignalWord is what a source says of a caller.
// +kubebuilder:validation:Enum=ok;against
type SignalWord = string
