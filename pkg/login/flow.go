package login

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const (
	// patience is how long a person may take at the provider.
	patience = 10 * time.Minute
	// maxBack bounds the address to come back to: it travels in the state, which is in addresses of the provider.
	maxBack = 1024
	// maxParameter bounds what comes back in a parameter.
	maxParameter = 4096
	// maxExchanges bounds the codes that are redeemed at a time.
	maxExchanges = 16
)

// attempt is what a login carries to the provider and back, sealed, as its state. It opens only with the cookie of the browser
// that began, so a browser may have many under way, and nobody can finish another's.
type attempt struct {
	Verifier string    `json:"verifier"` // of PKCE
	Nonce    string    `json:"nonce"`
	Back     string    `json:"back"`
	Begun    time.Time `json:"begun"`
	Issuer   string    `json:"issuer"` // that it was sent to
}

// start sends the browser to the provider.
func (v visit) start(back string) {
	m, err := v.h.providers.metadata(v.r.Context(), v.provider, v.now)
	if err != nil {
		v.away(err)
		return
	}
	browser := v.browser()
	if browser == "" {
		browser = rand.Text()
		http.SetCookie(v.w, newCookie(browserCookie(v.service.Name), browser))
	}
	a := attempt{Verifier: oauth2.GenerateVerifier(), Nonce: rand.Text(), Back: sameSite(back), Begun: v.now, Issuer: v.provider.Spec.Issuer}
	state, err := v.h.keys.seal(v.state(browser), a)
	if err != nil {
		v.fail(http.StatusInternalServerError, "The login could not begin.", err)
		return
	}
	config := v.client(m, "")
	v.see(config.AuthCodeURL(state, oauth2.S256ChallengeOption(a.Verifier), oidc.Nonce(a.Nonce)))
}

func (v visit) state(browser string) use {
	return use{what: "state", service: v.service.Name, host: hostOf(v.r), browser: browser}
}

// browser is what the browser's cookie says, if there is exactly one.
func (v visit) browser() string {
	found := v.r.CookiesNamed(browserCookie(v.service.Name))
	if len(found) != 1 || len(found[0].Value) != len(rand.Text()) {
		return ""
	}
	return found[0].Value
}

func (v visit) client(m metadata, secret string) oauth2.Config {
	scopes := []string{oidc.ScopeOpenID}
	for _, s := range v.provider.Spec.Login.Scopes {
		if !slices.Contains(scopes, s) {
			scopes = append(scopes, s)
		}
	}
	endpoint := m.endpoint
	endpoint.AuthStyle = m.style(secret)
	return oauth2.Config{ClientID: v.provider.Spec.Login.ClientID, ClientSecret: secret, Endpoint: endpoint, Scopes: scopes,
		RedirectURL: (&url.URL{Scheme: "https", Host: strings.ToLower(v.r.Host), Path: callbackPath}).String()}
}

// callback is where the provider sends the browser back to.
func (v visit) callback() {
	q, err := url.ParseQuery(v.r.URL.RawQuery)
	if err != nil {
		v.fail(http.StatusBadRequest, "The answer of the provider cannot be read.", err)
		return
	}
	var a attempt
	if err := v.attempt(q, &a); err != nil {
		v.fail(http.StatusBadRequest, "This login was not begun by this browser, or too long ago.", err)
		return
	}
	if err := v.answered(q, a); err != nil {
		v.fail(http.StatusForbidden, "The provider did not log you in.", err)
		return
	}
	who, err := v.redeem(q.Get("code"), a)
	if err != nil {
		v.refused(err)
		return
	}
	if err := v.enter(who); err != nil {
		v.fail(http.StatusForbidden, "The login does not count.", err)
		return
	}
	v.see(a.Back)
}

// attempt opens the state that comes back.
func (v visit) attempt(q url.Values, a *attempt) error {
	state, err := only(q, "state")
	if err != nil {
		return err
	}
	browser := v.browser()
	if browser == "" {
		return errors.New("the browser brought no cookie of a login")
	}
	if err := v.h.keys.unseal(v.state(browser), state, a); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if v.now.After(a.Begun.Add(patience)) || a.Begun.After(v.now.Add(clockSlack)) {
		return fmt.Errorf("it was begun at %s", a.Begun.Format(time.RFC3339))
	}
	return nil
}

// answered looks at who answers, and whether it is a yes (RFC 9207 has the issuer say its name against mixed-up providers).
func (v visit) answered(q url.Values, a attempt) error {
	if a.Issuer != v.provider.Spec.Issuer {
		return errors.New("the login was begun at another provider")
	}
	m, err := v.h.providers.metadata(v.r.Context(), v.provider, v.now)
	if err != nil {
		return err
	}
	if m.NamesIssuer || q.Has("iss") {
		if iss, err := only(q, "iss"); err != nil || iss != a.Issuer {
			return errors.New("another provider answers, or one that does not say who it is")
		}
	}
	if q.Has("error") {
		return fmt.Errorf("it says %q", q.Get("error")[:min(len(q.Get("error")), 100)])
	}
	_, err = only(q, "code")
	return err
}

// only gives a parameter that there must be one of.
func only(q url.Values, name string) (string, error) {
	if len(q[name]) != 1 || q.Get(name) == "" || len(q.Get(name)) > maxParameter {
		return "", fmt.Errorf("there must be one %s of at most %d bytes", name, maxParameter)
	}
	return q.Get(name), nil
}

var errBusy = errors.New("too many logins at a time")

// redeem gives the code for an ID token and checks that. The other tokens that the provider gives are not kept.
func (v visit) redeem(code string, a attempt) (policy.Caller, error) {
	if !v.h.exchanges.TryAcquire(1) {
		return policy.Caller{}, errBusy
	}
	defer v.h.exchanges.Release(1)
	ctx, cancel := context.WithTimeout(v.r.Context(), fetchTimeout)
	defer cancel()
	m, err := v.h.providers.metadata(ctx, v.provider, v.now)
	if err != nil {
		return policy.Caller{}, err
	}
	secret, err := secretOf(v.provider)
	if err != nil {
		return policy.Caller{}, err
	}
	config := v.client(m, secret)
	tokens, err := config.Exchange(oidc.ClientContext(ctx, m.http), code, oauth2.VerifierOption(a.Verifier))
	if err != nil {
		return policy.Caller{}, shorten(err)
	}
	raw, _ := tokens.Extra("id_token").(string)
	if raw == "" {
		return policy.Caller{}, errors.New("the provider gave no ID token")
	}
	verified, err := v.h.tokens.IDToken(ctx, v.provider.Name, a.Nonce, raw)
	return verified.Caller, err
}

// errClient says that the provider does not take this service for its client. Its causes are the node's: secret, client ID, or what the
// provider has registered.
var errClient = errors.New("the provider refuses this service as its client")

// shorten takes from an error of the exchange what the provider's answer said beyond its code.
func shorten(err error) error {
	var refused *oauth2.RetrieveError
	if errors.As(err, &refused) && refused.ErrorCode != "" {
		if refused.ErrorCode == "invalid_client" || refused.ErrorCode == "unauthorized_client" {
			return fmt.Errorf("%w: %q: compare spec.login.clientID and the file of its secret with what the provider gave out", errClient, refused.ErrorCode)
		}
		return fmt.Errorf("the provider refuses the code: %q", refused.ErrorCode[:min(len(refused.ErrorCode), 100)])
	}
	return err
}

// protocolClaims are about a token, not about whom it was given to.
var protocolClaims = []string{"iss", "aud", "azp", "exp", "iat", "nbf", "jti", "nonce", "at_hash", "c_hash", "s_hash", "auth_time", "sid", "session_expiry"}

// enter begins a session of its own, whatever cookie the browser had.
func (v visit) enter(c policy.Caller) error {
	s := session{ID: rand.Text(), Provider: v.provider.Name, Issuer: v.provider.Spec.Issuer, Client: v.provider.Spec.Login.ClientID,
		Subject: c.Subject, Groups: c.Groups, Claims: map[string]any{}, Begun: v.now, Seen: v.now, Ends: expiry(c.Claims)}
	for name, value := range c.Claims {
		if _, list := value.([]any); slices.Contains(protocolClaims, name) || list && name == v.provider.Spec.GroupsClaim { // caller has it from Groups
			continue
		}
		s.Claims[name] = value
	}
	if s.Subject == "" {
		return errors.New("the ID token names nobody")
	}
	if !s.counts(v.provider, v.now) {
		return errors.New("the provider says that it has ended already")
	}
	if err := v.h.write(v.service, v.w, v.r, s); err != nil {
		return err
	}
	v.h.log.Info("browser logged in", "service", v.service.Name, "caller", s.caller(v.provider).String())
	return nil
}

// expiry is when the provider says that the session ends, not the token that tells of it (session_expiry of OpenID Connect
// Enterprise Extensions). An ID token's own exp is how long it may be shown: it was, at once.
func expiry(claims map[string]any) time.Time {
	if at, ok := claims["session_expiry"].(float64); ok && at > 0 && at < 1<<40 {
		return time.Unix(int64(at), 0)
	}
	return time.Time{}
}

// sameSite gives an address to come back to, of this host and none of the login's own pages; else the root.
func sameSite(back string) string {
	u, err := url.Parse(back)
	switch {
	case err != nil || len(back) > maxBack || u.IsAbs() || u.Host != "" || u.User != nil || u.Opaque != "",
		!strings.HasPrefix(back, "/"), strings.HasPrefix(back, "//"),
		strings.ContainsFunc(back, func(c rune) bool { return c <= ' ' || c == '\\' || c >= 0x7f }), // browsers read \ as /, and drop tabs
		strings.HasPrefix(u.Path, strings.TrimSuffix(Prefix, "/")):
		return "/"
	}
	return back
}

// see sends the browser elsewhere.
func (v visit) see(where string) {
	head := v.w.Header()
	head.Set("Cache-Control", "no-store")
	head.Set("Referrer-Policy", "no-referrer") // addresses of the callback have codes
	head.Set("Location", where)
	v.w.WriteHeader(http.StatusSeeOther)
}
