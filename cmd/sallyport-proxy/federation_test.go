package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/test/lab"
)

var (
	partner    = spiffeid.RequireTrustDomainFromString("partner.example")
	partnerWeb = spiffeid.RequireFromPath(partner, "/web")
)

// visit asks the service once with a certificate, and gives its connection.
func (b *bench) visit(svid *x509svid.SVID) (*tls.Conn, error) {
	c := b.tlsWith(b.plain(b.target(lab.IPv4)), svid)
	_, err := lab.Ask(c)
	return c, err
}

func (b *bench) issue(a *devauthority.Authority, id spiffeid.ID) *x509svid.SVID {
	b.Helper()
	svid, err := a.Issue(id)
	b.must(err)
	return svid
}

// TestFederatedClient: a client of another trust domain is let in by a rule, while the domains are federated and only
// then. What it vouches for is its own names alone.
func TestFederatedClient(t *testing.T) {
	b := newBench(t, nil)
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	foreign, err := devauthority.New(partner, devauthority.Options{})
	b.must(err)
	b.writePolicy(policyFor(web, partnerWeb))
	svid := b.issue(foreign, partnerWeb)
	if _, err := b.visit(svid); err == nil {
		t.Error("a stranger was let in")
	}
	b.authority.Federate(foreign.TrustBundle())
	var live *tls.Conn
	b.until(func() bool {
		live, err = b.visit(svid)
		return err == nil
	})
	if r := b.find("OPEN", "IDENTITY"); r.Identity != partnerWeb.String() {
		t.Errorf("record %v", r)
	}
	own := b.dialAs(lab.IPv4, web)
	_, err = lab.Ask(own)
	b.must(err)
	if _, err := b.visit(b.issue(foreign, spiffeid.RequireFromPath(partner, "/other"))); err == nil {
		t.Error("a partner whom no rule names was let in")
	}
	b.find("DENY", "NOT_AUTHORISED")

	b.authority.Unfederate(partner)
	b.must(live.SetDeadline(time.Now().Add(wait)))
	b.resets(live)
	if r := b.find("CLOSE", "POLICY_CHANGED"); r.Identity != partnerWeb.String() || !strings.Contains(r.Detail, "not trusted any more") {
		t.Errorf("record %v", r)
	}
	if _, err := b.visit(svid); err == nil {
		t.Error("let in after the federation ended")
	}
	if _, err = lab.Ask(own); err != nil {
		t.Errorf("a client of the own trust domain was cut: %v", err)
	}
}

// authority is one that signs anything.
type authority struct {
	b    *bench
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// federatedAuthority is a root of the partner's that the proxy trusts.
func (b *bench) federatedAuthority() *authority {
	b.Helper()
	a := &authority{b: b}
	template := leaf("spiffe://partner.example")
	template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
	svid := a.sign(template)
	a.cert, a.key = svid.Certificates[0], svid.PrivateKey.(*ecdsa.PrivateKey)
	bundle := spiffebundle.FromX509Authorities(partner, []*x509.Certificate{a.cert})
	b.authority.Federate(bundle)
	return a
}

// leaf is a certificate in order, of as many names as are given.
func leaf(names ...string) *x509.Certificate {
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	for _, name := range names {
		u, err := url.Parse(name)
		if err != nil {
			panic(err)
		}
		c.URIs = append(c.URIs, u)
	}
	return c
}

func (a *authority) sign(template *x509.Certificate) *x509svid.SVID {
	a.b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	a.b.must(err)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	a.b.must(err)
	cert, err := x509.ParseCertificate(raw)
	a.b.must(err)
	return &x509svid.SVID{ID: partnerWeb, Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

// TestOddCertificates: a root that is trusted signs what it should not, and nobody is let in by it.
func TestOddCertificates(t *testing.T) {
	b := newBench(t, nil)
	service, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	b.writePolicy(policyFor(web, partnerWeb))
	a := b.federatedAuthority()
	good := leaf(partnerWeb.String())
	b.until(func() bool {
		_, err := b.visit(a.sign(good))
		return err == nil
	})
	before := len(service.Peers())
	change := func(f func(*x509.Certificate)) *x509.Certificate {
		c := leaf(partnerWeb.String())
		f(c)
		return c
	}
	for name, template := range map[string]*x509.Certificate{
		"expired":                  change(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }),
		"not yet valid":            change(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
		"authority":                change(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign }),
		"may sign certificates":    change(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }),
		"no name":                  leaf(),
		"two names":                leaf(partnerWeb.String(), web.String()),
		"name twice":               leaf(partnerWeb.String(), partnerWeb.String()),
		"the proxy's trust domain": leaf(web.String()),
		"a third trust domain":     leaf("spiffe://third.example/web"),
		"trust domain alone":       leaf("spiffe://partner.example"),
		"another scheme":           leaf("https://partner.example/web"),
		"query":                    leaf(partnerWeb.String() + "?a=b"),
		"fragment":                 leaf(partnerWeb.String() + "#a"),
		"port":                     leaf("spiffe://partner.example:443/web"),
		"user":                     leaf("spiffe://web@partner.example/web"),
		"slash at its end":         leaf(partnerWeb.String() + "/"),
		"dots":                     leaf("spiffe://partner.example/app/../web"),
		"empty segment":            leaf("spiffe://partner.example//web"),
		"escaped letter":           leaf("spiffe://partner.example/w%65b"),
		"letters in capitals":      leaf("spiffe://PARTNER.example/web"),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := b.in(t).visit(a.sign(template)); err == nil {
				t.Error("was let in")
			}
		})
	}
	if got := service.Peers()[before:]; len(got) > 0 {
		t.Errorf("reached the service: %v", got)
	}
	if r := b.find("DENY", "HANDSHAKE_FAILED"); r.Identity != "" {
		t.Errorf("an unproven identity is in the record: %v", r)
	}
	_, err = b.visit(a.sign(good))
	b.must(err)
}

// TestNoSessionIsResumed: a client that keeps sessions gets none, so that none outlives the trust that it was made by.
func TestNoSessionIsResumed(t *testing.T) {
	b := newBench(t, nil)
	_, err := b.Pod.WhoAnswers(b.target(lab.IPv4))
	b.must(err)
	b.writePolicy(policyFor(web, partnerWeb))
	a := b.federatedAuthority()
	config := tlsconfig.MTLSClientConfig(a.sign(leaf(partnerWeb.String())), b.authority.Bundle(), tlsconfig.AuthorizeID(proxyID))
	kept := &sessions{ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	config.ClientSessionCache, config.ServerName = kept, "proxy"
	visit := func() (tls.ConnectionState, error) {
		c := tls.Client(b.plain(b.target(lab.IPv4)), config)
		_, err := lab.Ask(c) // which reads, and so takes in what comes after the handshake
		return c.ConnectionState(), err
	}
	b.until(func() bool {
		_, err := visit()
		return err == nil
	})
	for range 3 {
		state, err := visit()
		if err != nil || state.DidResume {
			t.Errorf("resumed: %v, %v", state.DidResume, err)
		}
	}
	if kept.put > 0 {
		t.Errorf("the proxy gave out %d sessions", kept.put)
	}
	b.authority.Unfederate(partner)
	b.until(func() bool {
		_, err := visit()
		return err != nil
	})
}

// sessions counts what a client was given to resume by.
type sessions struct {
	tls.ClientSessionCache
	put int
}

// Put implements tls.ClientSessionCache.
func (s *sessions) Put(key string, state *tls.ClientSessionState) {
	if state != nil {
		s.put++
	}
	s.ClientSessionCache.Put(key, state)
}
