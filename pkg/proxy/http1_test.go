package proxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

// TestHeadsOfOneReadingOnly: what readers differ about is refused before anybody reads it.
func TestHeadsOfOneReadingOnly(t *testing.T) {
	for name, c := range map[string]struct {
		head   string
		status int // 0: taken
	}{
		"plain":                     {"GET / HTTP/1.1\r\nHost: a", 0},
		"length":                    {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5", 0},
		"chunks":                    {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked", 0},
		"length and chunks":         {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked", 400},
		"two lengths":               {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5", 400},
		"list of lengths":           {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5", 400},
		"signed length":             {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5", 400},
		"hexadecimal length":        {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5", 400},
		"empty length":              {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length:", 400},
		"huge length":               {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999", 400},
		"two encodings":             {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked", 400},
		"encoding twice":            {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400},
		"odd encoding":              {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked", 400},
		"space before the colon":    {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked", 400},
		"folded line":               {"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b", 400},
		"folded first field":        {"GET / HTTP/1.1\r\n Host: a", 400},
		"bare LF":                   {"GET / HTTP/1.1\r\nHost: a\nX: b", 400},
		"bare CR":                   {"GET / HTTP/1.1\r\nHost: a\rX: b", 400},
		"NUL":                       {"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b", 400},
		"no colon":                  {"GET / HTTP/1.1\r\nHost: a\r\nX", 400},
		"no name":                   {"GET / HTTP/1.1\r\nHost: a\r\n: x", 400},
		"no host":                   {"GET / HTTP/1.1\r\nX: a", 400},
		"two hosts":                 {"GET / HTTP/1.1\r\nHost: a\r\nhost: b", 400},
		"HTTP/1.0":                  {"GET / HTTP/1.0\r\nHost: a", 505},
		"HTTP/0.9":                  {"GET /", 400},
		"preface of HTTP/2":         {"PRI * HTTP/2.0", 400},
		"two spaces":                {"GET  / HTTP/1.1\r\nHost: a", 400},
		"tab":                       {"GET\t/\tHTTP/1.1\r\nHost: a", 400},
		"empty line in front":       {"\r\nGET / HTTP/1.1\r\nHost: a", 400},
		"method that is no token":   {"GE(T / HTTP/1.1\r\nHost: a", 400},
		"space at the end":          {"GET / HTTP/1.1 \r\nHost: a", 400},
		"PROXY protocol":            {"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET / HTTP/1.1\r\nHost: a", 400},
		"PROXY protocol, version 2": {"\r\n\x00\r\nQUIT\n!\x11\x00\x0c", 400},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := readHead(c.head)
			var bad badRequest
			if errors.As(err, &bad); bad.status != c.status {
				t.Errorf("%d (%v), want %d", bad.status, err, c.status)
			}
		})
	}
}

// guarded runs bytes of a client through the guard, and gives what it lets through and what it refused.
func guarded(t *testing.T, stream string) (string, []badRequest) {
	t.Helper()
	ours, theirs := tlsPair(t)
	var refused []badRequest
	g := &http1{client: ours, limit: 1 << 10, linger: func() {}, refuse: func(b badRequest) { refused = append(refused, b) }}
	go func() {
		_, _ = io.WriteString(theirs, stream)
		_ = theirs.CloseWrite()
		_, _ = io.Copy(io.Discard, theirs)
	}()
	through, err := io.ReadAll(g)
	if err != nil && !errors.Is(err, errTruncated) {
		t.Errorf("read: %v", err)
	}
	return string(through), refused
}

const getRoot = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"

// TestGuardFollowsTheFraming: what comes behind a body is a header again, and is looked at as one.
func TestGuardFollowsTheFraming(t *testing.T) {
	bad := "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"
	for name, c := range map[string]struct {
		before string
		taken  bool
	}{
		"nothing":              {"", true},
		"a request":            {getRoot, true},
		"a body":               {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", true},
		"a body like a header": {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + itoa(len(bad)) + "\r\n\r\n" + bad, true},
		"chunks":               {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\n\r\n", true},
		"trailers":             {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n", false},
		"a chunk too long":     {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello!\r\n0\r\n\r\n", false},
		"a size with 0x":       {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n", false},
		"a negative size":      {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n", false},
		"a size that wraps":    {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000005\r\nhello\r\n0\r\n\r\n", false},
		"a bare LF in chunks":  {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n", false},
		"an odd trailer":       {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n X: y\r\n\r\n", false},
		"a long header":        {"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 1<<10) + "\r\n\r\n", false},
		"an endless line":      {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("0", 1<<10), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			good, refused := guarded(t, c.before+getRoot)
			if c.taken != (len(refused) == 0) || c.taken != (good == c.before+getRoot) {
				t.Errorf("let %q through, refused %v", good, refused)
			}
			good, refused = guarded(t, c.before+bad)
			if len(refused) != 1 || good == c.before+bad {
				t.Errorf("behind it %q went through, refused %v", good, refused)
			}
		})
	}
}

// FuzzGuardAgreesWithTheServer: whatever the guard lets through, net/http reads as the same requests, to the byte.
func FuzzGuardAgreesWithTheServer(f *testing.F) {
	for _, s := range []string{getRoot, getRoot + getRoot, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello" + getRoot,
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nX: y\r\n\r\n" + getRoot} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		g := &http1{limit: 1 << 10, in: stream}
		var ours []int64 // lengths of bodies
		for g.part != partHead || len(g.in) > 0 {
			head := g.part == partHead
			more, err := g.step()
			if err != nil || more && g.clear == 0 {
				return // the rest is refused, or waited for
			}
			if head {
				ours = append(ours, int64(g.left))
				if g.chunked {
					ours[len(ours)-1] = -1
				}
			}
			g.in, g.clear = g.in[g.clear:], 0
		}
		in := bufio.NewReader(strings.NewReader(string(stream)))
		for i, want := range ours {
			r, err := http.ReadRequest(in)
			if err != nil {
				return // net/http is stricter: it ends the connection
			}
			if r.ContentLength != want {
				t.Fatalf("request %d: the guard sees a body of %d, net/http of %d", i, want, r.ContentLength)
			}
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				return
			}
		}
		if rest, _ := io.ReadAll(in); len(rest) > 0 {
			t.Fatalf("net/http leaves %q", rest)
		}
	})
}

var _ net.Conn = (*http1)(nil)
