package proxy

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/login"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// judged is one question on its way to an answer.
type judged struct {
	j       *Judge
	q       Question
	set     *policy.Set
	service policy.ProtectedService
	caller  policy.Caller
	token   bool // a token proved the caller
	target  target
	via     []string
	rule    string
	grant   string
	began   time.Time
}

// admit tells why the connection or request is refused, or gives nil. Its order is that of the proxy.
func (c *judged) admit(ctx context.Context) *rejection {
	if d := c.find(); d != nil {
		return d
	}
	if c.q.Wrong != nil {
		return asBadRequest(c.q.Wrong)
	}
	if c.q.Request == nil {
		return c.admitConnection()
	}
	if d := c.read(); d != nil {
		return d
	}
	if d := c.identify(ctx); d != nil {
		return d
	}
	limits := c.http().Limits
	if !c.j.pace.allow(c.service.Name, c.caller.String(), limits.RequestsPerMinute, c.began) {
		return tooMany(limits)
	}
	return c.authorise(c.request())
}

// http is how the service speaks HTTP: what is carried as bytes takes certificates, and whatever is asked for.
func (c *judged) http() policy.HTTPSpec {
	if c.service.Spec.HTTP == nil {
		return policy.HTTPSpec{}
	}
	return *c.service.Spec.HTTP
}

// find looks for the service. A name and an address that are of two services are a mistake in the other proxy's configuration.
func (c *judged) find() *rejection {
	if c.set == nil {
		return deny(http.StatusForbidden, flow.ReasonUnknownService, unknownService(nil, c.q.Server).Error())
	}
	exact, isExact := c.set.PodServiceAt(policy.ProtocolTCP, c.q.Server)
	found, ok := exact, isExact
	switch {
	case c.q.Service != "":
		found, ok = c.set.Service(c.q.Service)
	case !c.q.Elsewhere:
		found, ok = c.set.ServiceAt(policy.ProtocolTCP, c.q.Server)
	}
	switch {
	case !ok && c.q.Service != "":
		return deny(http.StatusForbidden, flow.ReasonUnknownService, fmt.Sprintf("no protected service is named %q", oneLine(c.q.Service)))
	case !ok:
		return deny(http.StatusForbidden, flow.ReasonUnknownService, unknownService(c.set, c.q.Server).Error())
	case isExact && exact.Name != found.Name:
		return deny(http.StatusForbidden, flow.ReasonUnknownService,
			fmt.Sprintf("asked for %s, and %s is %s", found.Name, bare(c.q.Server), exact.Name))
	case found.Spec.Protocol != policy.ProtocolTCP:
		return deny(http.StatusForbidden, flow.ReasonUnknownService, found.Name+" is not a service of TCP")
	}
	c.service = found
	return nil
}

// admitConnection is for what is carried as bytes, whose client has its certificate alone.
func (c *judged) admitConnection() *rejection {
	if c.service.Spec.HTTP != nil {
		return deny(http.StatusForbidden, flow.ReasonNotAuthorised,
			c.service.Name+" speaks HTTP, whose requests are judged one by one: ask for each")
	}
	if d := c.identifyByCertificate(); d != nil {
		return d
	}
	if c.caller.String() == "" {
		return deny(http.StatusUnauthorized, flow.ReasonHandshakeFailed, "the client showed no certificate")
	}
	return c.authorise(nil)
}

// read takes in what is asked for. What the proxy would spell in another way is refused: the other one sends on what came.
func (c *judged) read() (d *rejection) {
	r, spec := c.q.Request, c.http()
	raw, _, _ := strings.Cut(r.RequestURI, "?")
	if c.target, c.via, d = readRequest(r, spec.Hosts, c.mark()); d != nil {
		return d
	}
	switch upgrade := r.Header.Get("Upgrade"); {
	case c.target.path != raw:
		return asBadRequest(malformed("the path is not in its one spelling, %s, in which it is judged", c.target.path))
	case c.target.authority != r.Host:
		return asBadRequest(malformed("the host is not in its one spelling, %s, in which it is judged", c.target.authority))
	case upgrade != "" && !strings.EqualFold(upgrade, "websocket"):
		return asBadRequest(malformed("behind another protocol nothing would be judged"))
	case len(r.Header["Trailer"]) > 0 && r.ContentLength != 0:
		return asBadRequest(errTrailers)
	}
	return tooLarge(spec.Limits, r)
}

// tooLarge is what a header alone tells.
func tooLarge(limits policy.HTTPLimits, r *http.Request) *rejection {
	if most := int64(limits.BodyBytes); most > 0 && r.ContentLength > most {
		return deny(http.StatusRequestEntityTooLarge, flow.ReasonRequestLimit, fmt.Sprintf("the body is larger than %d bytes", most))
	}
	size := len(r.RequestURI)
	for name, values := range r.Header {
		for _, v := range values {
			size += len(name) + len(v) + len(": \r\n")
		}
	}
	if most := int(limits.HeaderBytes); most > 0 && size > most {
		return deny(http.StatusRequestHeaderFieldsTooLarge, flow.ReasonRequestLimit, fmt.Sprintf("header is longer than %d bytes", most))
	}
	return nil
}

// mark tells a passage by here from others.
func (c *judged) mark() string { return c.j.instance + "/" + c.service.Name }

// identify finds out who asks: by the certificate, else by a token. Browsers log in at the proxy itself.
func (c *judged) identify(ctx context.Context) *rejection {
	spec := c.http()
	if takes(spec, policy.AuthenticateSPIFFE) {
		if d := c.identifyByCertificate(); d != nil || c.caller.String() != "" {
			return d
		}
	}
	bearer, shown := bearerToken(c.q.Request.Header)
	if !shown || !takesTokens(spec) || c.j.cfg.Tokens == nil {
		return needsLogin(spec)
	}
	verified, err := c.j.cfg.Tokens.Verify(ctx, c.service, bearer)
	if err != nil {
		return tokenRefused(spec, err)
	}
	c.token, c.caller = true, verified.Caller
	c.caller.Address = c.q.Client.Addr()
	return nil
}

// identifyByCertificate leaves the caller nobody where the client showed nothing. A certificate counts before what is said of it.
func (c *judged) identifyByCertificate() *rejection {
	id, err := c.proven()
	if err != nil {
		d := deny(http.StatusUnauthorized, flow.ReasonHandshakeFailed, "the certificate proves nobody here")
		d.detail = err.Error()
		return d
	}
	if !id.IsZero() {
		c.caller = policy.Caller{ID: id, Proof: policy.ProofSPIFFE, Address: c.q.Client.Addr()}
	}
	return nil
}

func (c *judged) proven() (spiffeid.ID, error) {
	said := c.q.Principal
	if c.q.Certificate == nil {
		if said.IsZero() {
			return said, nil
		}
		if _, err := c.j.cfg.Trust.GetX509BundleForTrustDomain(said.TrustDomain()); err != nil {
			return spiffeid.ID{}, fmt.Errorf("%s is not trusted here: %w", said, err)
		}
		return said, nil
	}
	id, _, err := x509svid.Verify([]*x509.Certificate{c.q.Certificate}, c.j.cfg.Trust, x509svid.WithTime(c.began))
	if err != nil {
		return spiffeid.ID{}, err
	}
	if !said.IsZero() && said != id {
		return spiffeid.ID{}, fmt.Errorf("the certificate is of %s, and the other proxy says %s", id, said)
	}
	return id, nil
}

// request is what rules are asked of; nil for a service whose bytes nobody looks at.
func (c *judged) request() *policy.Request {
	if c.service.Spec.HTTP == nil {
		return nil
	}
	h := c.q.Request.Header.Clone()
	c.stripProofs(h)
	return &policy.Request{Method: c.q.Request.Method, Host: c.target.host, Path: c.target.path, Headers: ruleHeaders(h)}
}

// stripProofs takes out what proved the caller, or proves a login: neither rules nor the service get to see it.
func (c *judged) stripProofs(h http.Header) {
	login.Strip(h)
	if c.token {
		h.Del("Authorization")
	}
}

func (c *judged) authorise(r *policy.Request) *rejection {
	decision := c.set.Authorise(c.service.Name, c.caller, r, c.began)
	if !decision.Allowed {
		return notAllowed(decision)
	}
	c.rule = decision.Rule
	return nil
}

// mayBypass tells whether a grant could help: it is for who has not proven enough, and not for what nobody should send. A
// connection that is carried as bytes would outlive the grant, for nobody here could cut it.
func (c *judged) mayBypass(d *rejection) bool {
	who := []flow.Reason{flow.ReasonNotAuthorised, flow.ReasonLoginNeeded, flow.ReasonTokenRefused, flow.ReasonHandshakeFailed}
	return c.j.cfg.Live != nil && c.q.Request != nil && c.target.path != "" && slices.Contains(who, d.reason)
}

// underGrant asks whether the client could go around the proxy at this moment.
func (c *judged) underGrant(ctx context.Context, d *rejection) *rejection {
	port := c.q.Server.Port()
	if ports := c.service.Spec.Ports; len(ports) == 1 && c.q.Service != "" {
		port = ports[0] // where the other proxy listens says nothing
	}
	grant, err := c.j.cfg.Live(ctx, c.service.Name, c.q.Client, port)
	if err != nil {
		d.detail = fmt.Sprintf("%s; whether a grant is live is not known: %v", cmp.Or(d.detail, d.why), err)
		return d
	}
	if grant == "" {
		return d
	}
	c.grant, c.rule, c.caller, c.token = grant, "grant "+grant, policy.Caller{Address: c.q.Client.Addr()}, false
	return nil
}

func asBadRequest(err error) *rejection {
	d := deny(http.StatusBadRequest, flow.ReasonBadRequest, err.Error())
	errors.As(err, &d.badRequest)
	return d
}
