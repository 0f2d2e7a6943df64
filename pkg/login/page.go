package login

import (
	"bytes"
	_ "embed"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"strconv"
)

// page is what a person is shown.
type page struct {
	Title, Text, Hint string
	Again             string // where to try again; empty: no such link
	Out               bool   // with a button that logs out
}

//go:embed page.html
var pageText string

var pages = template.Must(template.New("page").Parse(pageText))

// pagePolicy allows a page its style and its button, and nothing else at all.
const pagePolicy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"

// say shows a page. Browsers hold redirects after a form to form-action too, so the provider's host is named there with a button.
func (v visit) say(status int, p page) {
	var text bytes.Buffer
	if err := pages.Execute(&text, p); err != nil {
		v.h.log.Error("show page", "err", err)
	}
	policy := pagePolicy
	if p.Out {
		policy += v.logoutOrigin()
	}
	head := v.w.Header()
	head.Set("Content-Type", "text/html; charset=utf-8")
	head.Set("Content-Length", strconv.Itoa(text.Len()))
	head.Set("Content-Security-Policy", policy)
	head.Set("X-Content-Type-Options", "nosniff")
	head.Set("Referrer-Policy", "same-origin")
	head.Set("Cache-Control", "no-store")
	v.w.WriteHeader(status)
	_, _ = v.w.Write(text.Bytes())
}

func (v visit) logoutOrigin() string {
	m, err := v.h.providers.metadata(v.r.Context(), v.provider, v.now)
	if err != nil || m.Logout == "" {
		return ""
	}
	u, err := url.Parse(m.Logout)
	if err != nil {
		return ""
	}
	return " https://" + u.Host
}

// fail tells the person what, and the log why: the cause can be about the provider's inside.
func (v visit) fail(status int, text string, err error) {
	v.h.log.Warn("login failed", "service", v.service.Name, "provider", v.provider.Name, "status", status, "err", err)
	p := page{Title: "Not logged in", Text: text, Again: loginPath}
	if errors.Is(err, errTooLarge) {
		p.Hint = err.Error()
	}
	v.say(status, p)
}

func (v visit) away(err error) {
	v.w.Header().Set("Retry-After", "5")
	v.fail(http.StatusServiceUnavailable, "The identity provider "+v.provider.Name+" does not answer, so nobody can log in now. Whoever is logged in can go on.", err)
}

// refused tells of a code that was not redeemed, or of a token that does not count.
func (v visit) refused(err error) {
	var network *url.Error
	switch {
	case errors.Is(err, errBusy):
		v.w.Header().Set("Retry-After", "5")
		v.fail(http.StatusServiceUnavailable, "Too many log in at this moment.", err)
	case errors.Is(err, errSecret):
		v.fail(http.StatusInternalServerError, "The login is not set up rightly here, so nobody can log in. Tell who runs this service.", err)
	case errors.Is(err, errClient):
		v.fail(http.StatusBadGateway, "The identity provider "+v.provider.Name+" refuses this service, not you, so nobody can log in. Tell who runs this service.", err)
	case errors.As(err, &network):
		v.away(err)
	default:
		v.fail(http.StatusForbidden, "The provider's answer does not count.", err)
	}
}
