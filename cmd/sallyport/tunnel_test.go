package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
)

var (
	domain  = spiffeid.RequireTrustDomainFromString("example.org")
	webID   = spiffeid.RequireFromString("spiffe://example.org/app/web")
	proxyID = spiffeid.RequireFromString("spiffe://example.org/sallyport/proxy/node-1")
)

// world is a Workload API that gives us webID, and a proxy's end of TLS.
type world struct {
	authority   *devauthority.Authority
	workloadAPI string
	server      string
}

func newAuthority(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp") // the path of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	authority, err := devauthority.New(domain, devauthority.Options{})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "api.sock")
	background(t, func(ctx context.Context) error { return authority.Serve(ctx, socket, webID) })
	return &world{authority: authority, workloadAPI: "unix://" + socket}
}

// newWorld makes a server with the identity id, that lets in whom allow allows and answers with
// what it read, after its end.
func newWorld(t *testing.T, id spiffeid.ID, allow tlsconfig.Authorizer) *world {
	t.Helper()
	w := newAuthority(t)
	svid, err := w.authority.Issue(id)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(svid, w.authority.Bundle(), allow))
	if err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { l.Close() })()
		for {
			conn, err := l.Accept()
			if err != nil {
				return nil
			}
			go answerAfterEnd(conn)
		}
	})
	w.server = l.Addr().String()
	return w
}

func answerAfterEnd(conn net.Conn) {
	defer conn.Close()
	data, err := io.ReadAll(conn)
	if err == nil {
		fmt.Fprintf(conn, "you said %s", data)
	}
}

// background runs f until the test ends, and waits for it.
func background(t *testing.T, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func (w *world) vars() map[string]string {
	return map[string]string{"SPIFFE_ENDPOINT_SOCKET": w.workloadAPI}
}

// connect runs `sallyport connect` with text on its standard input.
func (w *world) connect(t *testing.T, text string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	e := env{stdin: strings.NewReader(text), stdout: &out, stderr: &errs, now: time.Now, getenv: func(k string) string { return w.vars()[k] }}
	code := report(&errs, run(t.Context(), e, append([]string{"connect", "--timeout", "5s"}, args...)))
	return result{code, out.String(), errs.String()}
}

func TestConnectCarriesStdio(t *testing.T) {
	w := newWorld(t, proxyID, tlsconfig.AuthorizeID(webID))
	for _, args := range [][]string{
		{w.server},
		{"--to", w.server, "--server-id", proxyID.String()},
		{"--to", w.server, "--trust-domain", "example.org"},
	} {
		if r := w.connect(t, "hello", args...); r.code != exitDone || r.stdout != "you said hello" {
			t.Errorf("%v: %+v", args, r)
		}
	}
}

func TestConnectRefuses(t *testing.T) {
	w := newWorld(t, proxyID, tlsconfig.AuthorizeID(webID))
	impostor := newWorld(t, webID, tlsconfig.AuthorizeAny())
	strict := newWorld(t, proxyID, tlsconfig.AuthorizeID(proxyID))
	plain := plainService(t)
	for name, c := range map[string]struct {
		world *world
		args  []string
		code  int
		says  string
	}{
		"another proxy":          {w, []string{w.server, "--server-id", "spiffe://example.org/sallyport/proxy/node-2"}, exitRefused, "hint: name who may answer with --server-id or --trust-domain"},
		"another trust domain":   {w, []string{w.server, "--trust-domain", "example.com"}, exitRefused, "is no proxy of example.com"},
		"no proxy but a service": {impostor, []string{impostor.server}, exitRefused, "spiffe://example.org/app/web is no proxy of example.org"},
		"proxy refuses us":       {strict, []string{strict.server}, exitRefused, "hint: `sallyport flows --verdict denied`"},
		"plain answer":           {w, []string{plain}, exitFailed, "hint: what answers there is no proxy"},
		"nobody listens":         {w, []string{"127.0.0.1:1"}, exitUnreachable, "hint: check --to"},
		"no service":             {w, nil, exitUsage, "hint: name its address and port"},
		"two services":           {w, []string{w.server, "--to", w.server}, exitUsage, "hint: give the address once"},
		"no port":                {w, []string{"10.2.0.2"}, exitUsage, "hint: write --to 10.2.0.2:5432"},
		"bad server id":          {w, []string{w.server, "--server-id", "node-1"}, exitUsage, "hint: write spiffe://"},
		"no Workload API":        {&world{}, []string{w.server}, exitUsage, "hint: name its socket with --workload-api"},
		"Workload API away":      {&world{workloadAPI: "unix:///nowhere.sock"}, []string{w.server, "--timeout", "100ms"}, exitUnreachable, "hint: check the socket of --workload-api"},
		"bad Workload API":       {&world{workloadAPI: "http://localhost"}, []string{w.server}, exitFailed, "hint: check the socket of --workload-api"},
	} {
		t.Run(name, func(t *testing.T) {
			r := c.world.connect(t, "hello", c.args...)
			if r.code != c.code || !strings.Contains(r.stderr, c.says) || r.stdout != "" {
				t.Errorf("got %+v, want code %d and %q", r, c.code, c.says)
			}
		})
	}
}

// plainService answers in the clear to whatever it is sent.
func plainService(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { l.Close() })()
		for {
			conn, err := l.Accept()
			if err != nil {
				return nil
			}
			fmt.Fprint(conn, "SSH-2.0-plain\r\n")
			defer conn.Close()
		}
	})
	return l.Addr().String()
}

// TestForwardStory starts a forward, uses it twice, and interrupts it.
func TestForwardStory(t *testing.T) {
	w := newWorld(t, proxyID, tlsconfig.AuthorizeID(webID))
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	out, stdout := io.Pipe()
	var errs bytes.Buffer
	e := env{stdin: strings.NewReader(""), stdout: stdout, stderr: &errs, now: time.Now, getenv: func(k string) string { return w.vars()[k] }}
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, e, []string{"forward", "--to", w.server, "--listen", "127.0.0.1:0", "-o", "json"})
		stdout.Close()
	}()
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		t.Fatalf("%v: %v", err, <-done)
	}
	var ready forwarding
	if err := json.Unmarshal(line, &ready); err != nil {
		t.Fatal(err)
	}
	if ready.Server != w.server || ready.Identity != webID.String() {
		t.Errorf("got %+v", ready)
	}
	for range 2 {
		if got := askPlain(t, ready.Listen, "hello"); got != "you said hello" {
			t.Errorf("got %q", got)
		}
	}
	interrupt()
	if err := <-done; err != nil || errs.Len() > 0 {
		t.Errorf("interrupted: %v, %s", err, errs.String())
	}
	if conn, err := net.Dial("tcp", ready.Listen); err == nil {
		conn.Close()
		t.Error("it still listens")
	}
}

func askPlain(t *testing.T, address, question string) string {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, question)
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(answer)
}

func TestListenAddress(t *testing.T) {
	for _, c := range []struct {
		listen, to string
		expose     bool
		want       string
		code       int
	}{
		{"", "10.2.0.2:5432", false, "127.0.0.1:5432", exitDone},
		{"127.0.0.1:7000", "10.2.0.2:5432", false, "127.0.0.1:7000", exitDone},
		{"[::1]:7000", "10.2.0.2:5432", false, "[::1]:7000", exitDone},
		{"0.0.0.0:7000", "10.2.0.2:5432", false, "", exitRefused},
		{"10.0.0.1:7000", "10.2.0.2:5432", false, "", exitRefused},
		{"0.0.0.0:7000", "10.2.0.2:5432", true, "0.0.0.0:7000", exitDone},
		{"7000", "10.2.0.2:5432", false, "", exitUsage},
		{"", "10.2.0.2", false, "", exitUsage},
	} {
		got, err := listenAddress(c.listen, c.to, c.expose)
		if code := report(io.Discard, err); code != c.code || got != c.want {
			t.Errorf("%+v: got %q, %v", c, got, err)
		}
	}
}

// TestCollectorOverTLS asks a collector on the network, with our identity, and only the one that
// has the collector's.
func TestCollectorOverTLS(t *testing.T) {
	for _, c := range []struct {
		id   string
		args []string
		code int
	}{
		{"spiffe://example.org/sallyport/collector", nil, exitDone},
		{"spiffe://example.org/log", []string{"--collector-id", "spiffe://example.org/log"}, exitDone},
		{"spiffe://example.org/log", nil, exitUnreachable},
		{"spiffe://example.org/sallyport/collector", []string{"--collector-id", "log"}, exitUsage},
	} {
		w := newAuthority(t)
		address := w.collector(t, spiffeid.RequireFromString(c.id))
		r := command(t.Context(), w.vars(), append([]string{"flows", "--collector", address, "--timeout", "2s", "-o", "json"}, c.args...)...)
		if r.code != c.code || (r.code == exitDone) != strings.Contains(r.stdout, `"flow_id":"f1"`) {
			t.Errorf("%+v: %+v", c, r)
		}
	}
}

// collector serves the Audit service over mTLS as id.
func (w *world) collector(t *testing.T, id spiffeid.ID) string {
	svid, err := w.authority.Issue(id)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(grpccredentials.MTLSServerCredentials(svid, w.authority.Bundle(), tlsconfig.AuthorizeID(webID))))
	api.RegisterAuditServer(s, newCollector(t))
	background(t, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, s.Stop)()
		return s.Serve(l)
	})
	return l.Addr().String()
}
