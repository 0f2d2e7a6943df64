package proxy

import (
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Headers by which the service learns who comes. What a client sends under these names, and under those that services take for
// the word of a proxy, is taken out.
const (
	headerIdentity = "X-Sallyport-Identity" // SPIFFE ID, or provider/subject
	headerProof    = "X-Sallyport-Proof"    // spiffe, jwt or oidc
	headerGroups   = "X-Sallyport-Groups"   // escaped, with commas between
	headerVia      = "X-Sallyport-Via"      // which proxies a request has come through, for which service
)

// proxysWord are beginnings of names, and names, of headers that are believed as coming from a proxy: who the client is and where,
// and what it "really" asked for. The first ones are ours.
var proxysWord = struct{ prefixes, names []string }{
	prefixes: []string{"x-sallyport-", "x-forwarded-", "x-remote-", "x-auth-request-", "x-authenticated-", "x-client-cert",
		"x-ssl-client-", "ssl-client-", "x-spiffe-", "x-envoy-"},
	names: []string{"forwarded", "remote-user", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip", "x-user",
		"x-forwarded", "x-original-url", "x-original-host", "x-original-uri", "x-rewrite-url", "x-http-method",
		"x-http-method-override", "x-method-override", "proxy"},
}

// isProxysWord also knows the name with _ for -, which many servers take for the same.
func isProxysWord(name string) bool {
	name = strings.ReplaceAll(strings.ToLower(name), "_", "-")
	return slices.Contains(proxysWord.names, name) ||
		slices.ContainsFunc(proxysWord.prefixes, func(p string) bool { return strings.HasPrefix(name, p) })
}

var errTrailers = malformed("the request announces trailers, which are not carried: many servers take them for headers, and nobody has judged them")

// checkHeaders refuses headers that somebody on the way could read as others than they are.
func checkHeaders(r *http.Request) error {
	for name := range r.Header {
		if strings.Contains(name, "_") && isProxysWord(name) {
			return malformed("the header %s looks like one that a proxy sets", name)
		}
		if same := textproto.CanonicalMIMEHeaderKey(strings.ReplaceAll(name, "_", "-")); same != name && len(r.Header[same]) > 0 {
			return malformed("many servers take the headers %s and %s for the same", name, same)
		}
	}
	if len(r.Header["Content-Length"]) > 1 {
		return malformed("the request has several Content-Length fields")
	}
	if len(r.Header["Authorization"]) > 1 {
		return malformed("the request has several Authorization fields")
	}
	if len(r.Trailer) > 0 {
		return errTrailers
	}
	if r.ContentLength != 0 && strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return malformed("a request that switches protocols has a body")
	}
	return nil
}

// removeProxysWord takes out what only a proxy may say.
func removeProxysWord(h http.Header) {
	for name := range h {
		if isProxysWord(name) {
			delete(h, name)
		}
	}
}

// setIdentity tells the service who comes.
func setIdentity(h http.Header, who policy.Caller, t target) {
	h.Set(headerIdentity, fieldValue(who.String()))
	h.Set(headerProof, who.Proof)
	if len(who.Groups) > 0 {
		groups := make([]string, len(who.Groups))
		for i, g := range who.Groups {
			groups[i] = url.PathEscape(g) // one with a comma would be two
		}
		h.Set(headerGroups, strings.Join(groups, ","))
	}
	setForwarded(h, who, t)
}

// setForwarded tells the service what of the client's connection it cannot see.
func setForwarded(h http.Header, who policy.Caller, t target) {
	h.Set("X-Forwarded-For", who.Address.WithZone("").String())
	h.Set("X-Forwarded-Host", t.authority)
	h.Set("X-Forwarded-Proto", "https")
}

func fieldValue(s string) string {
	if httpguts.ValidHeaderFieldValue(s) && s == strings.TrimSpace(s) {
		return s
	}
	return url.PathEscape(s)
}

// ruleHeaders are what rules see of a request: what is sent on, by names in lower case.
func ruleHeaders(h http.Header) map[string][]string {
	out := make(map[string][]string, len(h))
	for name, values := range h {
		if !isProxysWord(name) {
			out[strings.ToLower(name)] = values
		}
	}
	return removeHops(out)
}

// hops are headers between two neighbours, which are not sent on. httputil.ReverseProxy takes the same out.
var hops = []string{"connection", "proxy-connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
	"transfer-encoding", "upgrade"}

func removeHops(h map[string][]string) map[string][]string {
	for _, list := range h["connection"] {
		for name := range strings.SplitSeq(list, ",") {
			delete(h, strings.ToLower(textproto.TrimString(name)))
		}
	}
	for _, name := range hops {
		delete(h, name)
	}
	return h
}

// via are the passages through proxies that a request tells of.
func via(h http.Header) []string {
	var all []string
	for _, list := range h[headerVia] {
		for mark := range strings.SplitSeq(list, ",") {
			all = append(all, textproto.TrimString(mark))
		}
	}
	return all
}
