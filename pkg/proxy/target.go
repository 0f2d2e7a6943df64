package proxy

import (
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// target is where a request goes: it is judged, recorded and sent on in this one spelling.
type target struct {
	authority string // host, and port if the client wrote one
	host      string // without port
	path      string // canonical
	query     string // as it came; "" also where there was a ? with nothing behind it
}

// readTarget gives an error for whatever two readers could take for two targets.
func readTarget(r *http.Request, hosts []string) (target, error) {
	var t target
	if r.Method == http.MethodConnect || r.Method == http.MethodTrace {
		return t, badRequest{http.StatusMethodNotAllowed, flow.ReasonBadRequest, r.Method + " is not for services"}
	}
	raw, query, _ := strings.Cut(r.RequestURI, "?")
	if i := strings.IndexFunc(r.RequestURI, func(c rune) bool { return c <= ' ' || c > '~' || c == '#' }); i >= 0 {
		return t, malformed("the target has a byte 0x%02x that has to be escaped", r.RequestURI[i])
	}
	path, err := canonicalPath(raw)
	if err != nil {
		return t, err
	}
	t.path, t.query = path, query
	if t.authority, t.host, err = canonicalHost(r.Host); err != nil {
		return t, err
	}
	for _, other := range r.Header["Host"] { // HTTP/2 may have it beside :authority
		if other != r.Host {
			return t, malformed("Host and :authority differ")
		}
	}
	if len(hosts) > 0 && !slices.Contains(hosts, t.host) {
		return t, badRequest{http.StatusMisdirectedRequest, flow.ReasonBadRequest, "the service is not served under the name " + t.host}
	}
	return t, nil
}

// canonicalPath is stricter than policy's, which makes sense of rules that people write: no client that means well sends . and ..
// and empty segments, since all of them resolve these themselves.
func canonicalPath(raw string) (string, error) {
	if !strings.HasPrefix(raw, "/") {
		return "", malformed("the target is not a path that begins with /")
	}
	lower := strings.ToLower(raw)
	switch {
	case strings.Contains(lower, "%2e"):
		return "", malformed("the path escapes a dot")
	case strings.Contains(raw, "//"):
		return "", malformed("the path has an empty segment")
	}
	for segment := range strings.SplitSeq(raw, "/") {
		if name, _, _ := strings.Cut(segment, ";"); name == "." || name == ".." {
			return "", malformed("the path has a segment %s", name)
		}
	}
	path, err := policy.CanonicalPath(raw)
	if err != nil {
		return "", malformed("%v", err)
	}
	text, err := url.PathUnescape(path)
	if err != nil || !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
		return "", malformed("the path is not UTF-8 text")
	}
	return path, nil
}

// canonicalHost takes the port off, and writes names in lower case.
func canonicalHost(raw string) (authority, host string, err error) {
	authority = strings.ToLower(raw)
	host = authority
	if i := strings.LastIndexByte(authority, ':'); i >= 0 && !strings.HasSuffix(authority, "]") {
		port, portErr := strconv.ParseUint(authority[i+1:], 10, 16)
		if portErr != nil || port == 0 || authority[i+1] == '+' {
			return "", "", malformed("the port of the host is %q", authority[i+1:])
		}
		host = authority[:i]
	}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		addr, addrErr := netip.ParseAddr(strings.TrimSuffix(inner, "]"))
		if addrErr != nil || !addr.Is6() || addr.Zone() != "" || !strings.HasSuffix(host, "]") {
			return "", "", malformed("the host is %q", raw)
		}
		return authority, addr.String(), nil
	}
	if !isHostName(host) {
		return "", "", malformed("the host is %q", raw)
	}
	return authority, host, nil
}

func isHostName(s string) bool {
	odd := func(c rune) bool {
		return !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.')
	}
	return s != "" && len(s) <= 253 && !strings.ContainsFunc(s, odd) && s[0] != '.' &&
		!strings.HasSuffix(s, ".") && !strings.Contains(s, "..")
}
