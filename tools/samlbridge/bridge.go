package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/crewjam/saml"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

const (
	patience  = 10 * time.Minute // of a person at the identity provider
	codeLife  = time.Minute
	tokenLife = 5 * time.Minute
	maxBody   = 1 << 20
	cookie    = "__Host-samlbridge"
)

type config struct {
	issuer          string
	idp             *saml.EntityDescriptor
	clients         clients
	groups, subject string
	log             *slog.Logger
}

// bridge is both: an OpenID provider for clients, and a service of the SAML identity provider.
type bridge struct {
	http.Handler
	config
	saml    saml.ServiceProvider
	key     jose.JSONWebKey // made at the start: who verifies tokens asks for a new one
	signer  jose.Signer
	pending shelf[attempt]
	codes   shelf[grant]
	seen    shelf[struct{}] // ids of assertions
}

// attempt is a login that a client began.
type attempt struct {
	client, back, state, nonce, challenge string
	request                               string // id of the SAML request
	browser                               string // cookie of the browser that began
}

// grant is what a code stands for.
type grant struct {
	attempt
	person
}

func newBridge(c config) (*bridge, error) {
	issuer, err := url.Parse(c.issuer)
	if err != nil || issuer.Scheme != "https" || issuer.Host == "" || strings.HasSuffix(c.issuer, "/") {
		return nil, fmt.Errorf("issuer %q is no https address without a slash at its end", c.issuer)
	}
	if len(c.clients) == 0 {
		return nil, errors.New("there is no client; name one with -client")
	}
	if c.idp.EntityID == "" || len(c.idp.IDPSSODescriptors) == 0 {
		return nil, errors.New("the metadata is of no identity provider")
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	b := &bridge{config: c, saml: serviceProvider(issuer, c.idp), key: jose.JSONWebKey{Key: private, KeyID: rand.Text(), Algorithm: string(jose.ES256), Use: "sig"}}
	if b.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: b.key}, (&jose.SignerOptions{}).WithType("JWT")); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+issuer.Path+"/.well-known/openid-configuration", b.discovery)
	mux.HandleFunc("GET "+issuer.Path+"/jwks", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{b.key.Public()}})
	})
	mux.HandleFunc("GET "+issuer.Path+"/authorize", b.authorize)
	mux.HandleFunc("POST "+issuer.Path+"/token", b.token)
	mux.HandleFunc("GET "+issuer.Path+"/saml/metadata", b.metadata)
	mux.HandleFunc("POST "+issuer.Path+"/saml/acs", b.consume)
	b.Handler = http.MaxBytesHandler(mux, maxBody)
	return b, nil
}

func (b *bridge) discovery(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, map[string]any{
		"issuer": b.issuer, "authorization_endpoint": b.issuer + "/authorize", "token_endpoint": b.issuer + "/token", "jwks_uri": b.issuer + "/jwks",
		"response_types_supported": []string{"code"}, "subject_types_supported": []string{"public"}, "scopes_supported": []string{"openid"},
		"id_token_signing_alg_values_supported": []string{string(jose.ES256)}, "code_challenge_methods_supported": []string{"S256"},
		"token_endpoint_auth_methods_supported": []string{"none"}, "authorization_response_iss_parameter_supported": true,
	})
}

func (b *bridge) metadata(w http.ResponseWriter, _ *http.Request) {
	text, err := xml.MarshalIndent(b.saml.Metadata(), "", "  ")
	if err != nil {
		b.refuse(w, http.StatusInternalServerError, err)
		return
	}
	w.Header().Set("Content-Type", "application/samlmetadata+xml")
	_, _ = w.Write(text)
}

// authorize is where a client sends a browser. It is sent back only to where the client is known to be.
func (b *bridge) authorize(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	l := attempt{client: q.Get("client_id"), back: q.Get("redirect_uri"), state: q.Get("state"), nonce: q.Get("nonce"), challenge: q.Get("code_challenge")}
	if !slices.Contains(b.clients[l.client], l.back) {
		b.refuse(w, http.StatusBadRequest, fmt.Errorf("client %q is not known to be at %q", l.client, l.back))
		return
	}
	if q.Get("response_type") != "code" || q.Get("code_challenge_method") != "S256" || len(l.challenge) != 43 || !slices.Contains(strings.Fields(q.Get("scope")), "openid") {
		b.refuse(w, http.StatusBadRequest, errors.New("only the code flow of OpenID Connect with PKCE (S256) is spoken here"))
		return
	}
	request, err := b.saml.MakeAuthenticationRequest(b.saml.GetSSOBindingLocation(saml.HTTPRedirectBinding), saml.HTTPRedirectBinding, saml.HTTPPostBinding)
	if err != nil {
		b.refuse(w, http.StatusInternalServerError, err)
		return
	}
	l.request, l.browser = request.ID, rand.Text()
	if c, err := r.Cookie(cookie); err == nil && len(c.Value) == len(l.browser) {
		l.browser = c.Value // of another tab
	}
	now := time.Now()
	relay := b.pending.put(l, now, now.Add(patience))
	if relay == "" {
		b.refuse(w, http.StatusServiceUnavailable, errors.New("too many people are logging in"))
		return
	}
	where, err := request.Redirect(relay, &b.saml)
	if err != nil {
		b.refuse(w, http.StatusInternalServerError, err)
		return
	}
	// The answer comes as a form that another site has the browser send: without SameSite=None it would come without the cookie.
	http.SetCookie(w, &http.Cookie{Name: cookie, Value: l.browser, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteNoneMode})
	w.Header().Set("Cache-Control", "no-store")
	http.Redirect(w, r, where.String(), http.StatusSeeOther)
}

// consume takes the answer of the identity provider and sends the browser on with a code.
func (b *bridge) consume(w http.ResponseWriter, r *http.Request) {
	now := time.Now()
	l, ok := b.pending.take(r.PostFormValue("RelayState"), now)
	if !ok {
		b.refuse(w, http.StatusBadRequest, errors.New("this login was not begun here, took too long, or is over"))
		return
	}
	if c, err := r.Cookie(cookie); err != nil || subtle.ConstantTimeCompare([]byte(c.Value), []byte(l.browser)) != 1 {
		b.refuse(w, http.StatusBadRequest, errors.New("this login was begun by another browser"))
		return
	}
	p, err := b.judge(r.PostFormValue("SAMLResponse"), l.request, now)
	if err != nil {
		b.refuse(w, http.StatusForbidden, err)
		return
	}
	code := b.codes.put(grant{l, p}, now, now.Add(codeLife))
	back, err := url.Parse(l.back)
	if err != nil || code == "" {
		b.refuse(w, http.StatusServiceUnavailable, errors.New("too many people are logging in"))
		return
	}
	q := back.Query()
	q.Set("code", code)
	q.Set("state", l.state)
	q.Set("iss", b.issuer)
	back.RawQuery = q.Encode()
	b.log.Info("logged in", "client", l.client, "subject", p.subject)
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Referrer-Policy", "no-referrer")
	http.Redirect(w, r, back.String(), http.StatusSeeOther)
}

// token gives an ID token for a code, once, to whoever knows what its challenge was made of.
func (b *bridge) token(w http.ResponseWriter, r *http.Request) {
	now := time.Now()
	g, ok := b.codes.take(r.PostFormValue("code"), now)
	sum := sha256.Sum256([]byte(r.PostFormValue("code_verifier")))
	proof := base64.RawURLEncoding.EncodeToString(sum[:])
	switch {
	case r.PostFormValue("grant_type") != "authorization_code":
		reply(w, http.StatusBadRequest, map[string]string{"error": "unsupported_grant_type"})
		return
	case !ok || r.PostFormValue("client_id") != g.client || r.PostFormValue("redirect_uri") != g.back || subtle.ConstantTimeCompare([]byte(proof), []byte(g.challenge)) != 1:
		reply(w, http.StatusBadRequest, map[string]string{"error": "invalid_grant"})
		return
	}
	id, err := b.idToken(g, now)
	if err != nil {
		b.refuse(w, http.StatusInternalServerError, err)
		return
	}
	// OAuth wants an access token in the answer; this one opens nothing.
	reply(w, http.StatusOK, map[string]any{"id_token": id, "access_token": rand.Text(), "token_type": "Bearer", "expires_in": int(tokenLife.Seconds())})
}

func (b *bridge) idToken(g grant, now time.Time) (string, error) {
	claims := map[string]any{"iss": b.issuer, "sub": g.subject, "aud": g.client, "iat": now.Unix(), "exp": now.Add(tokenLife).Unix(), "auth_time": g.at.Unix()}
	if g.nonce != "" {
		claims["nonce"] = g.nonce
	}
	if len(g.groups) > 0 {
		claims["groups"] = g.groups
	}
	if !g.ends.IsZero() {
		claims["session_expiry"] = g.ends.Unix()
	}
	return jwt.Signed(b.signer).Claims(claims).Serialize()
}

func reply(w http.ResponseWriter, status int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(value)
}

// refuse tells the browser that it was not to be, and the log why.
func (b *bridge) refuse(w http.ResponseWriter, status int, err error) {
	b.log.Warn("refused", "status", status, "err", err)
	text := "The login is refused; the log of samlbridge says why. Go back to where you came from and begin again."
	w.Header().Set("X-Content-Type-Options", "nosniff")
	http.Error(w, text, status)
}
