package policy

import (
	"cmp"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Defaults and bounds of identity providers.
const (
	defaultSkew    = 30 * time.Second
	maxSkew        = 5 * time.Minute
	defaultKeep    = 24 * time.Hour
	minKeep        = time.Minute
	maxKeep        = 30 * 24 * time.Hour
	defaultSession = 8 * time.Hour
	defaultOff     = time.Hour // without a request
	minSession     = time.Minute
	maxSession     = 30 * 24 * time.Hour
)

// tokenAlgorithms are the signatures of tokens that can be taken, all of them by a public key.
var tokenAlgorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}

func (p *IdentityProvider) validate(d *document) {
	d.report("metadata.name", CheckName(p.Name))
	s := &p.Spec
	d.report("spec.issuer", checkIssuer(s.Issuer))
	d.checkList("spec.audiences", s.Audiences, "list what its tokens must be for, like the URL of the service")
	for i, a := range s.Audiences {
		d.report(fmt.Sprintf("spec.audiences[%d]", i), checkOneLine(a))
	}
	if len(s.Algorithms) == 0 {
		s.Algorithms = []string{"RS256", "PS256", "ES256", "EdDSA"}
	}
	d.checkList("spec.algorithms", s.Algorithms, "list algorithms, or leave it out")
	for i, a := range s.Algorithms {
		if !slices.Contains(tokenAlgorithms, a) {
			d.report(fmt.Sprintf("spec.algorithms[%d]", i), faultf("known are "+strings.Join(tokenAlgorithms, ", "), "%q is no signature that proves a provider", cut(a)))
		}
	}
	s.SubjectClaim, s.GroupsClaim = cmp.Or(s.SubjectClaim, "sub"), cmp.Or(s.GroupsClaim, "groups")
	d.report("spec.subjectClaim", checkOneLine(s.SubjectClaim))
	d.report("spec.groupsClaim", checkOneLine(s.GroupsClaim))
	s.validateReach(d)
	s.Skew, s.Keep = cmp.Or(s.Skew, Duration{defaultSkew}), cmp.Or(s.Keep, Duration{defaultKeep})
	d.report("spec.skew", checkRange(s.Skew, 0, maxSkew))
	d.report("spec.keep", checkRange(s.Keep, minKeep, maxKeep))
	s.Login.validate(d)
}

// validateReach looks at where the provider is, and how it is known there.
func (s *IdentityProviderSpec) validateReach(d *document) {
	if len(s.Endpoints) == 0 && !d.isWrong("spec.issuer") {
		s.Endpoints = []string{issuerEndpoint(s.Issuer)}
	}
	if len(s.Endpoints) > 0 {
		d.checkList("spec.endpoints", s.Endpoints, "list host:port, or leave it out")
	}
	for i, e := range s.Endpoints {
		d.report(fmt.Sprintf("spec.endpoints[%d]", i), checkDialAddress(e))
	}
	if s.CA != "" {
		d.report("spec.ca", checkCertificates(s.CA))
	}
}

func checkIssuer(s string) error {
	u, err := url.Parse(s)
	switch {
	case s == "":
		return faultf("write what its tokens say in iss, like https://login.example.org", "is missing")
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || strings.ContainsAny(s, "?#") || checkDialAddress(issuerEndpoint(s)) != nil:
		return faultf("write an https URL without query, like https://login.example.org", "%q is not the URL of an issuer", cut(s))
	}
	return checkOneLine(s)
}

// issuerEndpoint is the host:port of an issuer that was checked.
func issuerEndpoint(issuer string) string {
	u, err := url.Parse(issuer)
	if err != nil {
		return ""
	}
	return net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "443"))
}

func (l *LoginSpec) validate(d *document) {
	if l == nil {
		return
	}
	if l.ClientID == "" {
		d.report("spec.login.clientID", faultf("write the id that the provider knows the proxy by", "is missing"))
	}
	d.report("spec.login.clientID", checkOneLine(l.ClientID))
	if l.ClientSecretFile != "" {
		d.report("spec.login.clientSecretFile", checkPath(l.ClientSecretFile))
	}
	for i, s := range l.Scopes {
		if s == "" || strings.ContainsAny(s, " \t\n\"\\") {
			d.report(fmt.Sprintf("spec.login.scopes[%d]", i), faultf("write one scope, like email", "%q is not a scope", cut(s)))
		}
	}
	l.Session = cmp.Or(l.Session, Duration{defaultSession})
	l.Idle = cmp.Or(l.Idle, Duration{min(defaultOff, l.Session.Duration)})
	d.report("spec.login.session", checkRange(l.Session, minSession, maxSession))
	d.report("spec.login.idle", checkRange(l.Idle, minSession, max(l.Session.Duration, minSession)))
}
