// Package userlogin logs a person at a command in at an OpenID Connect provider, and keeps the token that this brings.
package userlogin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// What callers may match with errors.Is.
var (
	// ErrAway says that the provider gave no answer.
	ErrAway = errors.New("the identity provider gave no answer")
	// ErrRefused says that the provider, or the person there, said no.
	ErrRefused = errors.New("the identity provider said no")
	// ErrNoLogin says that no login is kept under that name.
	ErrNoLogin = errors.New("nobody is logged in")
	// ErrExpired says that the kept token has expired, and cannot be renewed.
	ErrExpired = errors.New("the login has expired")
	// ErrOpaque says that the provider's access token is none that says whom it is about.
	ErrOpaque = errors.New("the provider's access token is not a JWT")
)

// Which of a provider's tokens are shown to services.
const (
	ShowAccess = "access"
	ShowID     = "id"
)

// Client is this program as a provider knows it.
type Client struct {
	// Issuer is the provider's URL.
	Issuer string `json:"issuer"`
	ID     string `json:"clientID"`
	// SecretFile has the client's secret. Empty: a public client.
	SecretFile string `json:"secretFile,omitempty"`
	// CA are the certificates, in PEM, of which one must have signed the provider's. Empty: the system's.
	CA string `json:"ca,omitempty"`
	// Scopes beside openid; nil: offline_access, where the provider has it.
	Scopes []string `json:"scopes,omitempty"`
	// Resource is what the access token must be for (RFC 8707). Empty: what the provider makes of it.
	Resource string `json:"resource,omitempty"`
	// Show is ShowAccess or ShowID.
	Show string `json:"show"`
}

// timeout bounds one question to a provider.
const timeout = 20 * time.Second

// Provider is an identity provider that has said who it is.
type Provider struct {
	client   Client
	http     *http.Client
	oidc     *oidc.Provider
	config   oauth2.Config
	metadata struct {
		Scopes      []string `json:"scopes_supported"`
		Revoke      string   `json:"revocation_endpoint"`
		NamesIssuer bool     `json:"authorization_response_iss_parameter_supported"`
	}
}

// Discover asks a provider who it is, and reads the client's secret.
func Discover(ctx context.Context, c Client) (*Provider, error) {
	p := &Provider{client: c}
	if u, err := url.Parse(c.Issuer); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%q is not the https address of a provider", c.Issuer)
	}
	roots, err := pool(c.CA)
	if err != nil {
		return nil, err
	}
	p.http = &http.Client{Timeout: timeout, Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{RootCAs: roots}}}
	if p.oidc, err = oidc.NewProvider(p.context(ctx), c.Issuer); err != nil {
		return nil, judge("ask "+c.Issuer+" who it is", err)
	}
	if err := p.oidc.Claims(&p.metadata); err != nil {
		return nil, fmt.Errorf("read what %s says of itself: %w", c.Issuer, err)
	}
	p.config = oauth2.Config{ClientID: c.ID, Endpoint: p.oidc.Endpoint(), Scopes: p.scopes()}
	for _, where := range []string{p.config.Endpoint.AuthURL, p.config.Endpoint.TokenURL, p.config.Endpoint.DeviceAuthURL, p.metadata.Revoke} {
		if u, err := url.Parse(where); where != "" && (err != nil || u.Scheme != "https" || u.Host == "") {
			return nil, fmt.Errorf("%s names %q as an endpoint, which is no https address", c.Issuer, where)
		}
	}
	if c.SecretFile != "" {
		secret, err := os.ReadFile(c.SecretFile)
		if err != nil {
			return nil, fmt.Errorf("read the client's secret: %w", err)
		}
		p.config.ClientSecret = strings.TrimSpace(string(secret))
	}
	return p, nil
}

// context has what asks the provider.
func (p *Provider) context(ctx context.Context) context.Context {
	return oidc.ClientContext(ctx, p.http)
}

func (p *Provider) scopes() []string {
	if p.client.Scopes != nil {
		return append([]string{oidc.ScopeOpenID}, p.client.Scopes...)
	}
	if slices.Contains(p.metadata.Scopes, oidc.ScopeOfflineAccess) {
		return []string{oidc.ScopeOpenID, oidc.ScopeOfflineAccess}
	}
	return []string{oidc.ScopeOpenID}
}

// options of the first request of a login.
func (p *Provider) options(more ...oauth2.AuthCodeOption) []oauth2.AuthCodeOption {
	if p.client.Resource != "" {
		more = append(more, oauth2.SetAuthURLParam("resource", p.client.Resource))
	}
	if slices.Contains(p.config.Scopes, oidc.ScopeOfflineAccess) {
		more = append(more, oauth2.SetAuthURLParam("prompt", "consent")) // OpenID Connect Core, 11
	}
	return more
}

// redeem is options of the request that brings the token.
func (p *Provider) redeem(more ...oauth2.AuthCodeOption) []oauth2.AuthCodeOption {
	if p.client.Resource != "" {
		more = append(more, oauth2.SetAuthURLParam("resource", p.client.Resource))
	}
	return more
}

// kept is the login that tokens of the provider make. nonce is empty where none was asked for.
func (p *Provider) kept(ctx context.Context, t *oauth2.Token, nonce string) (Kept, error) {
	k := Kept{Client: p.client, Refresh: t.RefreshToken}
	raw, _ := t.Extra("id_token").(string)
	if raw != "" {
		verified, err := p.oidc.Verifier(&oidc.Config{ClientID: p.client.ID}).Verify(p.context(ctx), raw)
		if err != nil {
			return Kept{}, judge("verify the ID token", err)
		}
		if verified.Nonce != nonce {
			return Kept{}, errors.New("verify the ID token: it answers another login")
		}
	}
	k.Token = t.AccessToken
	if p.client.Show == ShowID {
		k.Token = raw
	}
	if k.Token == "" {
		return Kept{}, fmt.Errorf("the provider gave no %s token", p.client.Show)
	}
	return k, k.read()
}

// judge puts a kind to an error of a question to a provider, and takes from it what the provider's answer said beyond its code.
func judge(what string, err error) error {
	if refused, ok := errors.AsType[*oauth2.RetrieveError](err); ok {
		if refused.ErrorCode == "" {
			return fmt.Errorf("%s: %w: %s", what, ErrAway, refused.Response.Status)
		}
		return fmt.Errorf("%s: %w: %q", what, ErrRefused, refused.ErrorCode[:min(len(refused.ErrorCode), 100)])
	}
	if _, ok := errors.AsType[*url.Error](err); ok || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w: %w", what, ErrAway, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func pool(pem string) (*x509.CertPool, error) {
	if pem == "" {
		return nil, nil
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(pem)) {
		return nil, errors.New("there is no certificate in PEM for the provider's CA")
	}
	return roots, nil
}

// Revoke tells the provider that a login is over, where it wants to know (RFC 7009).
func (p *Provider) Revoke(ctx context.Context, k Kept) error {
	if p.metadata.Revoke == "" || k.Refresh == "" {
		return nil
	}
	form := url.Values{"token": {k.Refresh}, "token_type_hint": {"refresh_token"}, "client_id": {p.client.ID}}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, p.metadata.Revoke, strings.NewReader(form.Encode()))
	if err != nil {
		return fmt.Errorf("revoke the login: %w", err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if p.config.ClientSecret != "" {
		r.SetBasicAuth(url.QueryEscape(p.client.ID), url.QueryEscape(p.config.ClientSecret))
	}
	answer, err := p.http.Do(r)
	if err != nil {
		return judge("revoke the login", err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("revoke the login: %w: %s", ErrRefused, answer.Status)
	}
	return nil
}
