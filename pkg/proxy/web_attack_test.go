package proxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// counted counts requests that came to the service.
func counted(n *atomic.Int64) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.Add(1)
		echo(w, r)
	})
}

// lines are the lines of an echo.
func lines(text string) map[string]bool {
	all := map[string]bool{}
	for line := range strings.SplitSeq(text, "\n") {
		all[line] = true
	}
	return all
}

// TestForgedIdentityHeaders: the service hears from the proxy alone who comes.
func TestForgedIdentityHeaders(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo)})
	forged := []string{"X-Sallyport-Identity", "X-Sallyport-Groups", "X-SALLYPORT-Else", "X-Forwarded-Client-Cert", "X-Forwarded-For", "X-Forwarded-Proto",
		"X-Forwarded-User", "Forwarded", "X-Real-Ip", "X-Remote-User", "Remote-User", "X-Auth-Request-Email", "Ssl-Client-S-Dn",
		"X-Original-Url", "X-Rewrite-Url", "X-Http-Method-Override", "Proxy"}
	for _, protocol := range []string{alpnHTTP1, alpnHTTP2} {
		var header []string
		for _, name := range forged {
			header = append(header, name, "forged")
		}
		status, text := l.get(l.client(webID, protocol), "/", append(header, "X-Fine", "kept")...)
		if status != 200 || strings.Contains(text, "forged") || !lines(text)["X-Fine: kept"] {
			t.Errorf("%s: %d %s", protocol, status, text)
		}
		for _, want := range []string{"X-Sallyport-Identity: " + webID.String(), "X-Sallyport-Proof: spiffe", "X-Forwarded-For: 127.0.0.1",
			"X-Forwarded-Proto: https", "X-Forwarded-Host: " + l.addr} {
			if !lines(text)[want] {
				t.Errorf("%s: the service does not hear %q:\n%s", protocol, want, text)
			}
		}
	}
}

// TestLookAlikeHeaders: some servers read _ as -.
func TestLookAlikeHeaders(t *testing.T) {
	t.Parallel()
	var reached atomic.Int64
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: counted(&reached)})
	for _, name := range []string{"X_Sallyport_Identity", "X-Sallyport_Groups", "X_Forwarded_For", "x_remote_user"} {
		for _, protocol := range []string{alpnHTTP1, alpnHTTP2} {
			if status, _ := l.get(l.client(webID, protocol), "/", name, "forged"); status != 400 {
				t.Errorf("%s %s: %d", protocol, name, status)
			}
		}
	}
	if status, _ := l.get(l.client(webID, alpnHTTP1), "/", "My_Header", "fine"); status != 200 || reached.Load() != 1 {
		t.Errorf("a header that is nobody's word: %d; %d requests reached the service", status, reached.Load())
	}
	l.find(flow.EventDeny, flow.ReasonBadRequest)
}

// TestHopByHopTricks: a client cannot name our headers in Connection to have them removed, nor have its own hop headers sent on.
func TestHopByHopTricks(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo)})
	status, text := l.get(l.client(webID, alpnHTTP1), "/", "Connection", "X-Sallyport-Identity, x-forwarded-for, X-Own, close",
		"X-Own", "own", "Keep-Alive", "own", "Te", "own", "Proxy-Authorization", "own", "Proxy-Connection", "own")
	if status != 200 || strings.Contains(text, ": own") {
		t.Errorf("%d %s", status, text)
	}
	for _, want := range []string{"X-Sallyport-Identity: " + webID.String(), "X-Forwarded-For: 127.0.0.1"} {
		if !lines(text)[want] {
			t.Errorf("the service does not hear %q:\n%s", want, text)
		}
	}
}

// TestRulesSeeWhatIsSentOn: a header that Connection names is not there for a rule either.
func TestRulesSeeWhatIsSentOn(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", handler: http.HandlerFunc(echo),
		access: `[{identities: ["spiffe://example.org/app/web"], routes: [{headers: {x-tenant: red}}]}]`})
	c := l.client(webID, alpnHTTP1)
	if status, _ := l.get(c, "/", "X-Tenant", "red"); status != 200 {
		t.Errorf("with the header: %d", status)
	}
	if status, _ := l.get(c, "/", "X-Tenant", "red", "Connection", "X-Tenant"); status != 403 {
		t.Errorf("with a header that goes no further: %d", status)
	}
}

// TestOtherProtocolsAreNotSwitchedTo: behind h2c nothing would be judged.
func TestOtherProtocolsAreNotSwitchedTo(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo)})
	status, text := l.get(l.client(webID, alpnHTTP1), "/", "Connection", "Upgrade, HTTP2-Settings", "Upgrade", "h2c", "HTTP2-Settings", "AAMAAABkAAQAAP__")
	if status != 200 || strings.Contains(text, "h2c") || strings.Contains(text, "Settings") || strings.Contains(text, "Upgrade") {
		t.Errorf("%d %s", status, text)
	}
}

// TestSmuggling: what has two readings is answered with 400, and neither reading reaches the service.
func TestSmuggling(t *testing.T) {
	t.Parallel()
	var reached atomic.Int64
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: counted(&reached)})
	smuggled := "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
	for name, stream := range map[string]string{
		"CL.TE":         "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + itoa(len(smuggled)+5) + "\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled,
		"TE.CL":         "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n1c\r\n" + smuggled + "\r\n0\r\n\r\n",
		"TE.TE":         "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n" + smuggled,
		"CL.CL":         "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: " + itoa(len(smuggled)) + "\r\n\r\n" + smuggled,
		"folded TE":     "POST / HTTP/1.1\r\nHost: a\r\nX: y\r\n Transfer-Encoding: chunked\r\n\r\n" + smuggled,
		"spaced TE":     "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + smuggled,
		"bare LF":       "GET / HTTP/1.1\nHost: a\n\n" + smuggled + "\r\n\r\n",
		"two hosts":     "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
		"absolute form": "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
		"asterisk form": "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
		"CONNECT":       "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := l.dial(webID)
			_, err := io.WriteString(c, stream)
			l.must(err)
			answer, err := http.ReadResponse(bufio.NewReader(c), nil)
			l.must(err)
			if answer.StatusCode != 400 && answer.StatusCode != 405 {
				t.Errorf("answer %s", answer.Status)
			}
		})
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("%d requests reached the service", n)
	}
	if r := l.find(flow.EventDeny, flow.ReasonBadRequest); r.Identity != webID.String() || r.Application != "http/1.1" {
		t.Errorf("record %+v", r)
	}
}

// TestPathTricks: what a rule does not allow is not reached by another spelling.
func TestPathTricks(t *testing.T) {
	t.Parallel()
	var reached atomic.Int64
	l := newWebLab(t, webConfig{http: "{}", handler: counted(&reached),
		access: `[{identities: ["spiffe://example.org/app/web"], routes: [{paths: ["/public/*"]}]}]`})
	for _, path := range []string{"/public/../admin", "/public/%2e%2e/admin", "/public/..%2fadmin", "/public/..%5cadmin", "/public/..;/admin", "/public/;/../admin",
		"/public//../admin", "//admin", "/public/%252e%252e/admin", "/%61dmin", "/public/%00", "/public/./x", "/Public/x", "/public", `/public/..\admin`} {
		for _, protocol := range []string{"", alpnHTTP2} {
			if status := l.rawStatus(protocol, path); status != 400 && status != 403 {
				t.Errorf("%s %q: %d", protocol, path, status)
			}
		}
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("%d requests reached the service", n)
	}
}

// rawStatus asks for a path as it is written. HTTP/2 streams that are reset count as 400.
func (l *webLab) rawStatus(protocol, path string) int {
	l.Helper()
	if protocol != alpnHTTP2 {
		c := l.dial(webID)
		_, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: a\r\n\r\n", path)
		l.must(err)
		answer, err := http.ReadResponse(bufio.NewReader(c), nil)
		l.must(err)
		return answer.StatusCode
	}
	f := l.framer()
	l.must(f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, EndStream: true, BlockFragment: headerBlock(":method", "GET",
		":scheme", "https", ":authority", "a", ":path", path)}))
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for {
		frame, err := f.ReadFrame()
		l.must(err)
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			var status int
			_, err := fmt.Sscan(frame.PseudoValue("status"), &status)
			l.must(err)
			return status
		case *http2.RSTStreamFrame:
			return 400
		}
	}
}

// framer speaks HTTP/2 by hand.
func (l *webLab) framer() *http2.Framer {
	l.Helper()
	c := l.dial(webID, alpnHTTP2)
	_, err := io.WriteString(c, http2.ClientPreface)
	l.must(err)
	f := http2.NewFramer(c, c)
	l.must(f.WriteSettings())
	return f
}

func headerBlock(fields ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(fields); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return b.Bytes()
}

// until reads until the proxy ends the connection, and gives the last GOAWAY's code.
func until(f *http2.Framer) (code http2.ErrCode) {
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			var streamErr http2.StreamError
			if errors.As(err, &streamErr) {
				continue
			}
			return code
		}
		if away, ok := frame.(*http2.GoAwayFrame); ok {
			code = away.ErrCode
		}
	}
}

// TestHTTP2Floods: a client that floods loses its connection, and the next one is served.
func TestHTTP2Floods(t *testing.T) {
	t.Parallel()
	service := newHeld()
	l := newWebLab(t, webConfig{http: "{limits: {streams: 10}}", access: onlyWeb, handler: service})
	block := headerBlock(":method", "GET", ":scheme", "https", ":authority", "a", ":path", "/")
	open := func(f *http2.Framer, id uint32) error {
		return f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, EndStream: true, BlockFragment: block})
	}
	for name, flood := range map[string]func(*http2.Framer) error{
		"rapid reset": func(f *http2.Framer) (err error) {
			for id := uint32(1); err == nil && id < 20000; id += 2 {
				if err = open(f, id); err == nil {
					err = f.WriteRSTStream(id, http2.ErrCodeCancel)
				}
			}
			return err
		},
		"CONTINUATION": func(f *http2.Framer) error {
			err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block})
			for range 20000 {
				if err == nil {
					err = f.WriteContinuation(1, false, headerBlock("x-long", strings.Repeat("x", 1000)))
				}
			}
			return err
		},
		"empty CONTINUATION after too long a header": func(f *http2.Framer) error {
			err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headerBlock("x-long", strings.Repeat("x", 15000))})
			for range 200000 {
				if err == nil {
					err = f.WriteContinuation(1, false, headerBlock("x", strings.Repeat("x", 10)))
				}
			}
			return err
		},
		"uneven stream": func(f *http2.Framer) error { return open(f, 2) },
	} {
		t.Run(name, func(t *testing.T) {
			f := l.framer()
			ended := make(chan http2.ErrCode, 1)
			go func() { ended <- until(f) }()
			_ = flood(f) // a connection that has ended is what is wanted
			select {
			case <-ended:
			case <-time.After(patience):
				t.Error("the connection goes on")
			}
		})
	}
	close(service.end)
	if status, _ := l.get(l.client(webID, alpnHTTP2), "/"); status != 200 {
		t.Errorf("afterwards: %d", status)
	}
	l.find(flow.EventDeny, flow.ReasonBadRequest)
}

// TestStreamsAreLimited: one connection has so many requests at a time and no more.
func TestStreamsAreLimited(t *testing.T) {
	t.Parallel()
	service := newHeld()
	l := newWebLab(t, webConfig{http: "{limits: {streams: 2}}", access: onlyWeb, handler: service})
	f := l.framer()
	block := headerBlock(":method", "GET", ":scheme", "https", ":authority", "a", ":path", "/")
	for id := uint32(1); id <= 5; id += 2 {
		l.must(f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, EndStream: true, BlockFragment: block}))
	}
	for {
		frame, err := f.ReadFrame()
		l.must(err)
		if refused, ok := frame.(*http2.RSTStreamFrame); ok {
			if refused.StreamID != 5 {
				t.Errorf("stream %d is refused", refused.StreamID)
			}
			break
		}
	}
	l.find(flow.EventDeny, flow.ReasonRequestLimit)
	close(service.end)
}

// TestLimits: requests that are too large, too slow or too many are refused in words.
func TestLimits(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{access: onlyWeb, handler: http.HandlerFunc(echo),
		http: "{limits: {headerBytes: 4KiB, bodyBytes: 1KiB, headerTimeout: 1s, bodyTimeout: 1s, bodyRate: 1KiB}}"})
	post := func(body io.Reader) (int, string) {
		r, err := http.NewRequest(http.MethodPost, "https://"+l.addr+"/", body)
		l.must(err)
		return l.do(l.client(webID, alpnHTTP2), r)
	}
	if status, text := post(strings.NewReader(strings.Repeat("x", 1<<10))); status != 200 || !strings.Contains(text, "body 1024 <nil>") {
		t.Errorf("a body within the limit: %d %s", status, text)
	}
	for name, body := range map[string]io.Reader{
		"of known length":   strings.NewReader(strings.Repeat("x", 2<<10)),
		"of unknown length": io.MultiReader(strings.NewReader(strings.Repeat("x", 2<<10))),
	} {
		if status, _ := post(body); status != 413 {
			t.Errorf("a body that is too large, %s: %d", name, status)
		}
	}
	for name, c := range map[string]struct {
		stream string
		more   string // again and again
		status int
	}{
		"header too long":  {"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 8<<10), "", 431},
		"header too slow":  {"GET / HTTP/1.1\r\nHost: a\r\nX: ", "x", 408},
		"body that stops":  {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nx", "", 408},
		"body that drips":  {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nx", "x", 408},
		"chunks that drip": {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n", 408},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := l.dial(webID)
			if _, err := io.WriteString(conn, c.stream); err != nil {
				t.Fatal(err)
			}
			stop := make(chan struct{})
			if c.more != "" {
				go drip(conn, c.more, stop)
			}
			answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
			close(stop)
			if err != nil && c.more != "" {
				return // who goes on writing may find the connection closed before the answer is read
			} else if err != nil {
				t.Fatal(err)
			}
			if answer.StatusCode != c.status {
				text, _ := io.ReadAll(answer.Body)
				t.Errorf("answer %s: %s", answer.Status, text)
			}
		})
	}
	t.Cleanup(func() { l.find(flow.EventDeny, flow.ReasonRequestLimit) })
}

// drip writes a little every now and then.
func drip(c *tls.Conn, bit string, stop chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(50 * time.Millisecond): // is what is tested
			if _, err := io.WriteString(c, bit); err != nil {
				return
			}
		}
	}
}

// TestRequestsPerMinute: of each caller, whatever connections it has.
func TestRequestsPerMinute(t *testing.T) {
	t.Parallel()
	other := spiffeid.RequireFromPath(domain, "/app/other")
	l := newWebLab(t, webConfig{http: "{limits: {requestsPerMinute: 9}}", handler: http.HandlerFunc(echo),
		access: `[{identities: ["spiffe://example.org/app/*"]}]`})
	for i := range 5 {
		want := 200
		if i >= 3 { // a third of a minute's at a time
			want = 429
		}
		if status, _ := l.get(l.client(webID, alpnHTTP1), "/"); status != want {
			t.Errorf("request %d: %d, want %d", i+1, status, want)
		}
	}
	if status, _ := l.get(l.client(other, alpnHTTP1), "/"); status != 200 {
		t.Errorf("another caller: %d", status)
	}
	l.find(flow.EventDeny, flow.ReasonRequestLimit)
}

// TestLoops: a request that comes by a second time for the same service goes no further.
func TestLoops(t *testing.T) {
	t.Parallel()
	var l *webLab
	var rounds atomic.Int64
	var again *http.Client
	l = newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rounds.Add(1) // sends back what it gets, with all its headers
		next, _ := http.NewRequest(http.MethodGet, "https://"+l.addr+"/", nil)
		next.Header = r.Header.Clone()
		status, text := l.do(again, next)
		w.WriteHeader(status)
		fmt.Fprint(w, text)
	})})
	again = l.client(webID, alpnHTTP1)
	if status, text := l.get(l.client(webID, alpnHTTP1), "/"); status != 508 || !strings.Contains(text, "LOOP") {
		t.Errorf("%d %s", status, text)
	}
	if n := rounds.Load(); n != 1 {
		t.Errorf("the service was asked %d times", n)
	}
	l.find(flow.EventDeny, flow.ReasonLoop)
}

// TestHostsOfAService: another name is refused, so that a name that was turned to this address (DNS rebinding) leads nowhere.
func TestHostsOfAService(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{hosts: [web.example.org]}", access: onlyWeb, handler: http.HandlerFunc(echo)})
	for host, want := range map[string]int{"web.example.org": 200, "WEB.example.org:443": 200, "evil.example.com": 421, "a@web.example.org": 400, "": 400} {
		c := l.dial(webID)
		_, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		l.must(err)
		answer, err := http.ReadResponse(bufio.NewReader(c), nil)
		l.must(err)
		if answer.StatusCode != want {
			t.Errorf("%q: %s, want %d", host, answer.Status, want)
		}
	}
}

// TestWrongIdentities: certificates of other authorities and domains, expired ones, none where one is needed.
func TestWrongIdentities(t *testing.T) {
	t.Parallel()
	var reached atomic.Int64
	for _, how := range []string{"{}", byToken} { // where a token would do, a false certificate is not passed over
		wrongIdentities(t, &reached, how)
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("%d requests reached the service", n)
	}
}

func wrongIdentities(t *testing.T, reached *atomic.Int64, how string) {
	l := newWebLab(t, webConfig{http: how, access: onlyWeb, handler: counted(reached)})
	foreign, err := devauthority.New(domain, devauthority.Options{})
	l.must(err)
	elsewhere := spiffeid.RequireTrustDomainFromString("elsewhere.org")
	theirs, err := devauthority.New(elsewhere, devauthority.Options{})
	l.must(err)
	for name, c := range map[string]struct {
		authority *devauthority.Authority
		id        spiffeid.ID
		reason    flow.Reason
	}{
		"nobody":       {nil, nobody, flow.ReasonHandshakeFailed},
		"not allowed":  {l.authority, mallory, flow.ReasonNotAuthorised},
		"foreign":      {foreign, webID, flow.ReasonHandshakeFailed},
		"other domain": {theirs, spiffeid.RequireFromPath(elsewhere, "/app/web"), flow.ReasonHandshakeFailed},
		"longer name":  {l.authority, spiffeid.RequireFromPath(domain, "/app/web2"), flow.ReasonNotAuthorised},
	} {
		if c.authority == nil && how == byToken {
			continue // may come, and is asked for a token
		}
		t.Run(name, func(t *testing.T) {
			config := l.tlsAs(nobody)
			if c.authority != nil {
				svid, err := c.authority.Issue(c.id)
				l.must(err)
				config.Certificates = []tls.Certificate{{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}}
			}
			conn, err := tls.Dial("tcp", l.addr, config)
			if err == nil {
				_, err = conn.Read(make([]byte, 1)) // TLS 1.3: the client is done first
				conn.Close()
			}
			if err == nil {
				t.Error("is let in")
			}
			l.find(flow.EventDeny, c.reason)
		})
	}
}

// TestNoResumption: a session of TLS is no proof of identity, so that none outlives the trust that it began with.
func TestNoResumption(t *testing.T) {
	t.Parallel()
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo)})
	config := l.tlsAs(webID)
	config.ClientSessionCache = tls.NewLRUClientSessionCache(10)
	for range 2 {
		c, err := tls.Dial("tcp", l.addr, config)
		l.must(err)
		_, err = io.WriteString(c, getRoot)
		l.must(err)
		_, err = http.ReadResponse(bufio.NewReader(c), nil)
		l.must(err)
		if c.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		c.Close()
	}
}

// TestTrailersOfRequests: they are refused, and recorded, rather than dropped behind the client's back.
func TestTrailersOfRequests(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{alpnHTTP1, alpnHTTP2} {
		l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo)})
		r, err := http.NewRequest(http.MethodPost, "https://"+l.addr+"/", io.MultiReader(strings.NewReader("body")))
		l.must(err)
		r.Trailer = http.Header{"X-Checksum": {"1"}}
		if status, text := l.do(l.client(webID, protocol), r); status != 400 || !strings.Contains(text, "trailers") {
			t.Errorf("%s: %d %s", protocol, status, text)
		}
		if r := l.find(flow.EventDeny, flow.ReasonBadRequest); !strings.Contains(r.Detail, "announces trailers") || r.Request.Status != 400 {
			t.Errorf("%s: record %+v", protocol, r)
		}
	}
	l := newWebLab(t, webConfig{http: "{}", access: onlyWeb, handler: http.HandlerFunc(echo)})
	c := l.dial(webID, alpnHTTP1)
	_, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Checksum: 1\r\n\r\n")
	l.must(err)
	if text, _ := io.ReadAll(c); strings.Contains(string(text), "HTTP/1.1 200") {
		t.Errorf("a trailer that was not announced: %s", text)
	}
	if r := l.find(flow.EventDeny, flow.ReasonBadRequest); !strings.Contains(r.Detail, "did not announce") {
		t.Errorf("record %+v", r)
	}
}
