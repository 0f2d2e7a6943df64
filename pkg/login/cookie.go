package login

import (
	"net/http"
	"strconv"
	"strings"
)

// cookiePrefix begins the names of all cookies of ours. A browser takes one with __Host- only over TLS, from this host, for
// all of it, so that no neighbour of the host can plant one.
const cookiePrefix = "__Host-sallyport-"

// Bounds of what a browser is asked to keep. It takes 4096 bytes for a cookie with its name and attributes.
const (
	maxPart  = 3600
	maxParts = 4
)

// Names of the cookies of a service. The service is in them since a browser keeps cookies by host, whatever the port.
func sessionCookie(service string) string { return cookiePrefix + "session-" + service }
func browserCookie(service string) string { return cookiePrefix + "browser-" + service }

func newCookie(name, value string) *http.Cookie {
	return &http.Cookie{Name: name, Value: value, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode}
}

// partName is the name of the i-th part of a text that is too long for one cookie.
func partName(name string, i int) string {
	if i == 0 {
		return name
	}
	return name + "." + strconv.Itoa(i)
}

// setParts has the browser keep the text in as many cookies as it takes, and forget parts that are left of a longer one.
func setParts(w http.ResponseWriter, r *http.Request, name, text string) {
	for i := range maxParts {
		part := text[:min(len(text), maxPart)]
		text = text[len(part):]
		if part != "" {
			http.SetCookie(w, newCookie(partName(name, i), part))
		} else if _, err := r.Cookie(partName(name, i)); err == nil {
			forget(w, partName(name, i))
		}
	}
}

// parts puts the text together again. A cookie that comes twice was planted or mixed up: it counts as none.
func parts(r *http.Request, name string) (string, bool) {
	var text strings.Builder
	for i := range maxParts {
		found := r.CookiesNamed(partName(name, i))
		if len(found) == 0 {
			break
		}
		if len(found) > 1 || len(found[0].Value) > maxPart {
			return "", false
		}
		text.WriteString(found[0].Value)
	}
	return text.String(), text.Len() > 0
}

func forget(w http.ResponseWriter, name string) {
	c := newCookie(name, "")
	c.MaxAge = -1
	http.SetCookie(w, c)
}

// Strip takes our cookies out of a request's header before the service sees it: it could go on with them as the browser.
// Browsers compare the prefix of a name without regard to case, and so does it.
func Strip(h http.Header) {
	lines := h["Cookie"]
	kept := lines[:0:0]
	for _, line := range lines {
		var others []string
		for pair := range strings.SplitSeq(line, ";") {
			if !ours(pair) {
				others = append(others, strings.TrimSpace(pair))
			}
		}
		if len(others) > 0 {
			kept = append(kept, strings.Join(others, "; "))
		}
	}
	if len(kept) == 0 {
		h.Del("Cookie")
		return
	}
	h["Cookie"] = kept
}

// StripAnswer takes cookies with our names out of a service's answer: it has no say in who is logged in.
func StripAnswer(h http.Header) {
	lines := h["Set-Cookie"]
	kept := lines[:0:0]
	for _, line := range lines {
		if !ours(line) {
			kept = append(kept, line)
		}
	}
	if len(kept) == 0 {
		h.Del("Set-Cookie")
		return
	}
	h["Set-Cookie"] = kept
}

func ours(pair string) bool {
	pair = strings.TrimSpace(pair)
	return len(pair) >= len(cookiePrefix) && strings.EqualFold(pair[:len(cookiePrefix)], cookiePrefix)
}
