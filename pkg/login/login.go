// Package login logs browsers in at an identity provider, for services that speak HTTP: the authorization code flow of OpenID
// Connect with PKCE. What a browser keeps is sealed, so that nothing is kept here for whoever only comes by.
package login

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// Prefix is where the login's own pages are, on every service that has one. The service itself cannot be asked there.
const Prefix = "/.sallyport/"

const (
	loginPath    = Prefix + "login"
	callbackPath = Prefix + "callback"
	logoutPath   = Prefix + "logout"
)

// Config is what a Handler works with.
type Config struct {
	// Policy gives the set in force.
	Policy func() *policy.Set
	// Tokens verifies ID tokens.
	Tokens *token.Verifier
	// Dial reaches providers.
	Dial token.Dialer
	// Keys seal what browsers keep.
	Keys *Keys
	// Log is told of logins and of what hinders them.
	Log *slog.Logger
}

// Handler logs browsers in and out, for all services. It is safe for many requests at a time.
type Handler struct {
	policy    func() *policy.Set
	tokens    *token.Verifier
	keys      *Keys
	log       *slog.Logger
	providers providers
	exchanges *semaphore.Weighted // bounds the codes that are being redeemed
	ended     endings
	crossSite *http.CrossOriginProtection
}

// New makes a Handler. It asks nobody for anything yet.
func New(c Config) *Handler {
	return &Handler{policy: c.Policy, tokens: c.Tokens, keys: c.Keys, log: c.Log, providers: providers{dial: c.Dial, known: map[string]*known{}},
		exchanges: semaphore.NewWeighted(maxExchanges), ended: endings{at: map[string]time.Time{}}, crossSite: http.NewCrossOriginProtection()}
}

// provider is where browsers log in for the service, if they can.
func (h *Handler) provider(service policy.ProtectedService) (policy.IdentityProvider, bool) {
	if service.Spec.HTTP == nil || service.Spec.HTTP.Login == "" {
		return policy.IdentityProvider{}, false
	}
	p, ok := h.policy().Provider(service.Spec.HTTP.Login)
	return p, ok && p.Spec.Login != nil
}

// Serve answers what is the login's own, and says whether the request was: everything below Prefix of a service with login.
func (h *Handler) Serve(service policy.ProtectedService, w http.ResponseWriter, r *http.Request, now time.Time) bool {
	p, ok := h.provider(service)
	if !ok || !strings.HasPrefix(r.URL.Path, Prefix) {
		return false
	}
	visit := visit{h, service, p, w, r, now}
	switch {
	case r.URL.Path == loginPath && r.Method == http.MethodGet:
		visit.start(r.URL.Query().Get("to"))
	case r.URL.Path == callbackPath && r.Method == http.MethodGet:
		visit.callback()
	case r.URL.Path == logoutPath && r.Method == http.MethodGet:
		visit.askLogout()
	case r.URL.Path == logoutPath && r.Method == http.MethodPost:
		visit.logout()
	case r.URL.Path == loginPath, r.URL.Path == callbackPath, r.URL.Path == logoutPath:
		visit.say(http.StatusMethodNotAllowed, page{Title: "Not like this", Text: "This page is not asked in this way."})
	default:
		visit.say(http.StatusNotFound, page{Title: "Not found", Text: "There is no such page of the login."})
	}
	return true
}

// Redirect sends a browser that goes to a page to the provider, and says whether it did. What is not a person's browser on its
// way to a page is left to the caller, who refuses it.
func (h *Handler) Redirect(service policy.ProtectedService, w http.ResponseWriter, r *http.Request, now time.Time) bool {
	p, ok := h.provider(service)
	if !ok || !navigates(r) {
		return false
	}
	v := visit{h, service, p, w, r, now}
	v.start(r.URL.RequestURI())
	return true
}

// navigates says whether a browser asks for a page to show. Browsers say so themselves; of older ones it is guessed by what they accept.
func navigates(r *http.Request) bool {
	if r.Method != http.MethodGet {
		return false
	}
	if mode := r.Header.Get("Sec-Fetch-Mode"); mode != "" {
		dest := r.Header.Get("Sec-Fetch-Dest")
		return mode == "navigate" && (dest == "" || dest == "document")
	}
	return strings.Contains(r.Header.Get("Accept"), "text/html") && r.Header.Get("X-Requested-With") == ""
}

// visit is one request that the login answers.
type visit struct {
	h        *Handler
	service  policy.ProtectedService
	provider policy.IdentityProvider
	w        http.ResponseWriter
	r        *http.Request
	now      time.Time
}

// hostOf is the request's host, as things are sealed for it: browsers keep cookies by it, whatever the port.
func hostOf(r *http.Request) string {
	host := strings.ToLower(r.Host)
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return host
}

// errTooLarge says that a provider tells more of a person than a browser keeps.
var errTooLarge = errors.New("the provider says more of you than your browser can keep; have it send fewer groups or claims to this client")
