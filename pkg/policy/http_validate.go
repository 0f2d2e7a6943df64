package policy

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"time"
)

// Defaults and bounds of HTTP services.
const (
	defaultHeaderBytes   Size = 32 << 10
	minHeaderBytes       Size = 1 << 10
	maxHeaderBytes       Size = 1 << 20
	defaultHeaderTimeout      = 10 * time.Second
	defaultBodyTimeout        = 30 * time.Second
	defaultStreams            = 100
	maxStreams                = 10000
	minHTTPTimeout            = 100 * time.Millisecond
)

// authenticates says whether a caller may prove itself in that way.
func (h *HTTPSpec) authenticates(how string) bool { return slices.Contains(h.Authenticate, how) }

func (s *ProtectedService) validateHTTP(d *document) {
	h := s.Spec.HTTP
	if h == nil {
		return
	}
	if s.Spec.Protocol == ProtocolUDP {
		d.report("spec.http", faultf("remove it, or write protocol: TCP", "a UDP service has no way through the proxy"))
	}
	if len(h.Authenticate) == 0 {
		h.Authenticate = []string{AuthenticateSPIFFE}
	}
	d.checkList("spec.http.authenticate", h.Authenticate, "write spiffe, jwt or oidc")
	for i, how := range h.Authenticate {
		if !slices.Contains([]string{AuthenticateSPIFFE, AuthenticateJWT, AuthenticateOIDC}, how) {
			d.report(fmt.Sprintf("spec.http.authenticate[%d]", i), faultf("write spiffe, jwt or oidc", "%q is no way to prove who one is", cut(how)))
		}
	}
	h.validateTokens(d)
	if h.Certificate != "" {
		d.report("spec.http.certificate", CheckName(h.Certificate))
	}
	if len(h.Hosts) > 0 {
		d.checkList("spec.http.hosts", h.Hosts, "list the names of the service, or leave it out")
	}
	for i, host := range h.Hosts {
		d.report(fmt.Sprintf("spec.http.hosts[%d]", i), checkHost(host))
	}
	h.Upstream.validate(d)
	h.Limits.validate(d)
}

// validateTokens holds that there is what judges the tokens that are taken, and nothing that nobody would look at.
func (h *HTTPSpec) validateTokens(d *document) {
	for _, of := range []struct {
		how, field string
		list       []string
		hint       string
	}{
		{AuthenticateJWT, "spec.http.audiences", h.Audiences, "list what JWT-SVIDs must be for, like the URL of the service"},
		{AuthenticateOIDC, "spec.http.providers", h.Providers, "list the IdentityProviders whose tokens count"},
	} {
		switch {
		case h.authenticates(of.how):
			d.checkList(of.field, of.list, of.hint)
		case len(of.list) > 0:
			d.report(of.field, faultf("add "+of.how+" to authenticate, or remove it", "the service takes no tokens of that kind"))
		}
	}
	for i, a := range h.Audiences {
		d.report(fmt.Sprintf("spec.http.audiences[%d]", i), checkOneLine(a))
	}
	if h.Login != "" && !slices.Contains(h.Providers, h.Login) {
		d.report("spec.http.login", faultf("name one of providers", "%q is not in spec.http.providers", cut(h.Login)))
	}
}

func (u HTTPUpstream) validate(d *document) {
	if u.TLS == nil {
		return
	}
	if u.H2C {
		d.report("spec.http.upstream.h2c", faultf("remove it: with TLS the protocol is agreed on in the handshake", "h2c is plaintext"))
	}
	d.report("spec.http.upstream.tls.serverName", checkHost(u.TLS.ServerName))
	if u.TLS.CA != "" {
		d.report("spec.http.upstream.tls.ca", checkCertificates(u.TLS.CA))
	}
}

func (l *HTTPLimits) validate(d *document) {
	l.HeaderBytes = cmp.Or(l.HeaderBytes, defaultHeaderBytes)
	l.HeaderTimeout = cmp.Or(l.HeaderTimeout, Duration{defaultHeaderTimeout})
	l.BodyTimeout = cmp.Or(l.BodyTimeout, Duration{defaultBodyTimeout})
	l.Streams = cmp.Or(l.Streams, defaultStreams)
	if l.HeaderBytes < minHeaderBytes || l.HeaderBytes > maxHeaderBytes {
		d.report("spec.http.limits.headerBytes", faultf("write a size in that range", "%s is not from %s to %s", l.HeaderBytes, minHeaderBytes, maxHeaderBytes))
	}
	d.report("spec.http.limits.headerTimeout", checkRange(l.HeaderTimeout, minHTTPTimeout, maxTimeout))
	d.report("spec.http.limits.bodyTimeout", checkRange(l.BodyTimeout, minHTTPTimeout, maxTimeout))
	d.report("spec.http.limits.streams", checkCount(l.Streams, maxStreams))
	if l.RequestsPerMinute != 0 {
		d.report("spec.http.limits.requestsPerMinute", checkCount(l.RequestsPerMinute, maxRequests))
	}
}

// checkCertificates tells why a text is not certificates in PEM, or gives nil.
func checkCertificates(text string) error {
	n := 0
	for rest := []byte(text); ; n++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return faultf("put certificates there, and nothing else", "has a block %q", cut(block.Type))
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return faultf("put certificates in PEM there", "has a certificate that cannot be read: %v", err)
		}
	}
	if n == 0 {
		return faultf("begin it with -----BEGIN CERTIFICATE-----", "has no certificate in PEM")
	}
	return nil
}

// checkProviders reports providers of services that are not there, or not as they are used.
func (p *parser) checkProviders() {
	providers := map[string]IdentityProvider{}
	for _, l := range p.providers {
		providers[l.value.Name] = l.value
	}
	for _, l := range p.services {
		spec := l.value.Spec
		issuers := map[string]string{}
		for i, name := range spec.Proofs().Providers {
			at := fmt.Sprintf("%s[%d]", spec.providersField(), i)
			provider, ok := providers[name]
			if !ok {
				l.report(at, faultf(suggest(name, providers), "no IdentityProvider is named %q", cut(name)))
				continue
			}
			if other, taken := claim(issuers, provider.Spec.Issuer, name); taken {
				l.report(at, faultf("keep one of them", "%q has the same issuer as %q: nobody could tell their tokens apart", name, other))
			}
		}
		if spec.HTTP == nil {
			continue
		}
		if login, ok := providers[spec.HTTP.Login]; ok && login.Spec.Login == nil {
			l.report("spec.http.login", faultf("write spec.login there, with the clientID", "the IdentityProvider %q has no login", spec.HTTP.Login))
		}
	}
}
