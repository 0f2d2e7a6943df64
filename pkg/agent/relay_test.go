package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proxy"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// relaying is the agent's socket with its relay, and the proxy's way out over it.
type relaying struct {
	t *testing.T
	*relay
	*proxy.Outside
	socket string

	mu   sync.Mutex
	list []string     // guarded by mu; the endpoints in force
	log  bytes.Buffer // guarded by mu
}

// Write implements io.Writer for the log.
func (r *relaying) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.Write(p)
}

func (r *relaying) logged() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

func (r *relaying) inForce() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.list
}

func (r *relaying) put(endpoints ...string) {
	r.mu.Lock()
	r.list = endpoints
	r.mu.Unlock()
	r.recheck()
}

func newRelaying(t *testing.T, change func(*relayLimits)) *relaying {
	t.Helper()
	limits := defaultRelayLimits
	if change != nil {
		change(&limits)
	}
	r := &relaying{t: t}
	r.relay = newRelay(r.inForce, limits, slog.New(slog.NewTextHandler(r, nil)))
	server := &reports{relay: r.relay, log: slog.New(slog.DiscardHandler)}
	ep, err := newEndpoint(filepath.Join(t.TempDir(), "proxy.sock"), callers{uids: []uint32{0}},
		func(reg grpc.ServiceRegistrar) { api.RegisterProxyReportServer(reg, server) })
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ep.Run(ctx) }()
	r.socket = ep.path
	r.Outside, err = proxy.NewOutside(ep.path)
	must(t, err)
	t.Cleanup(func() {
		must(t, r.Close())
		cancel()
		must(t, <-done)
		if n := r.streams(); n > 0 {
			t.Errorf("%d streams are left", n)
		}
	})
	return r
}

func (r *relaying) streams() int {
	r.relay.mu.Lock()
	defer r.relay.mu.Unlock()
	return len(r.live)
}

func (r *relaying) dial(endpoint string) (net.Conn, error) {
	return r.Dial(r.t.Context(), "tcp", endpoint)
}

// open dials what must be reached.
func (r *relaying) open(endpoint string) net.Conn {
	r.t.Helper()
	conn, err := r.dial(endpoint)
	must(r.t, err)
	r.t.Cleanup(func() { conn.Close() })
	return conn
}

// until polls what has no event of its own.
func (r *relaying) until(what string, ok func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			r.t.Fatalf("not in time: %s\n%s", what, r.logged())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// echo answers every byte with itself, and says when a connection to it has ended.
func echo(t *testing.T) (endpoint string, ended <-chan error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	over := make(chan error, 64)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, err := io.Copy(c, c)
				c.Close()
				over <- err
			}()
		}
	}()
	return l.Addr().String(), over
}

func exchange(t *testing.T, c net.Conn, say string) {
	t.Helper()
	_, err := io.WriteString(c, say)
	must(t, err)
	got := make([]byte, len(say))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != say {
		t.Fatalf("answer %q, %v", got, err)
	}
}

// TestRelayCarriesTLS: the proxy speaks TLS with the provider itself, and the log says what was carried.
func TestRelayCarriesTLS(t *testing.T) {
	t.Parallel()
	r := newRelaying(t, nil)
	body := make([]byte, 1<<20)
	rand.Read(body)
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { io.Copy(w, req.Body) }))
	t.Cleanup(server.Close)
	r.put(server.Listener.Addr().String())
	trust := server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	client := http.Client{Transport: &http.Transport{DialContext: r.Dial, TLSClientConfig: &tls.Config{RootCAs: trust}, DisableKeepAlives: true}}
	response, err := client.Post(server.URL, "application/octet-stream", bytes.NewReader(body))
	must(t, err)
	got, err := io.ReadAll(response.Body)
	must(t, err)
	must(t, response.Body.Close())
	if !bytes.Equal(got, body) {
		t.Errorf("%d bytes came back, and not those of %d", len(got), len(body))
	}
	r.until("the log tells", func() bool {
		return contains(r.logged(), "relayed for the proxy", "endpoint="+server.Listener.Addr().String(), "up=10", "down=10")
	})
}

// TestRelayRefuses: nothing but what policy lists is reached, and by a name nothing that is the node's own.
func TestRelayRefuses(t *testing.T) {
	t.Parallel()
	r := newRelaying(t, nil)
	endpoint, _ := echo(t)
	_, port, err := net.SplitHostPort(endpoint)
	must(t, err)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, closed.Close())
	r.put("login.example.org:443", "localhost:"+port, closed.Addr().String())
	for endpoint, why := range map[string]string{
		endpoint:                 "no IdentityProvider in force lists",
		"":                       "no IdentityProvider in force lists",
		"login.example.org:80":   "no IdentityProvider in force lists",
		"LOGIN.example.org:443":  "no IdentityProvider in force lists",
		"169.254.169.254:80":     "no IdentityProvider in force lists",
		"localhost:" + port:      "must be listed by its address",
		closed.Addr().String():   "connection refused",
		"login.example.org:443 ": "no IdentityProvider in force lists",
	} {
		if c, err := r.dial(endpoint); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("dial %q: %v, %v; want %q", endpoint, c, err, why)
		}
	}
	if _, err := r.Dial(t.Context(), "udp", endpoint); err == nil {
		t.Error("datagrams are relayed")
	}
	r.put(endpoint)
	exchange(t, r.open(endpoint), "listed now")
}

// TestNodeOnly: addresses that a name must not lead to.
func TestNodeOnly(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]bool{
		"127.0.0.1": true, "127.8.8.8": true, "::1": true, "0.0.0.0": true, "::": true, "169.254.169.254": true, "fe80::1": true,
		"fe80::1%eth0": true, "224.0.0.1": true, "ff02::1": true, "255.255.255.255": true, "::ffff:127.0.0.1": true,
		"::ffff:169.254.169.254": true, "64:ff9b::a9fe:a9fe": true, "fd00:ec2::254": true, "100.100.100.200": true,
		"168.63.129.16": true, "10.1.2.3": false, "192.0.2.7": false, "fd00::7": false, "2001:db8::7": false, "64:ff9b::c000:207": false,
	} {
		if got := nodeOnly(netip.MustParseAddr(address)); got != want {
			t.Errorf("nodeOnly(%s) = %v", address, got)
		}
	}
}

// TestRelayEndsWithPolicy: what policy does not list any more is cut, and the rest goes on.
func TestRelayEndsWithPolicy(t *testing.T) {
	t.Parallel()
	r := newRelaying(t, nil)
	one, ended := echo(t)
	other, _ := echo(t)
	r.put(one, other)
	cut, stays := r.open(one), r.open(other)
	exchange(t, cut, "before")
	r.put(other)
	if _, err := cut.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "any more") {
		t.Errorf("read after the cut: %v", err)
	}
	<-ended
	exchange(t, stays, "goes on")
	if _, err := r.dial(one); err == nil {
		t.Error("what policy does not list any more is reached")
	}
}

// TestRelayLimits: streams, bytes and time are bounded, each with its own word, and what ended makes room.
func TestRelayLimits(t *testing.T) {
	t.Parallel()
	endpoint, ended := echo(t)
	t.Run("streams", func(t *testing.T) {
		r := newRelaying(t, func(l *relayLimits) { l.streams = 2 })
		r.put(endpoint)
		first := r.open(endpoint)
		r.open(endpoint)
		if _, err := r.dial(endpoint); err == nil || !strings.Contains(err.Error(), "as many streams") {
			t.Errorf("third of two: %v", err)
		}
		must(t, first.Close())
		<-ended
		r.until("there is room", func() bool { return r.streams() == 1 })
		r.until("and time has gone on", func() bool { c, err := r.dial(endpoint); return err == nil && c.Close() == nil })
	})
	t.Run("begun in a second", func(t *testing.T) {
		r := newRelaying(t, func(l *relayLimits) { l.streams, l.perSec = 3, 0.001 })
		r.put(endpoint)
		for range 3 {
			must(t, r.open(endpoint).Close())
		}
		if _, err := r.dial(endpoint); err == nil || !strings.Contains(err.Error(), "as many streams") {
			t.Errorf("fourth of three: %v", err)
		}
	})
	t.Run("bytes", func(t *testing.T) {
		r := newRelaying(t, func(l *relayLimits) { l.bytes = 1000 })
		r.put(endpoint)
		c := r.open(endpoint)
		exchange(t, c, strings.Repeat("x", 1000))
		go c.Write([]byte("y"))
		if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "as many bytes") {
			t.Errorf("read beyond the bound: %v", err)
		}
	})
	t.Run("bytes of the answer", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		defer l.Close()
		r := newRelaying(t, func(l *relayLimits) { l.bytes = 1000 })
		r.put(l.Addr().String())
		c := r.open(l.Addr().String())
		server, err := l.Accept()
		must(t, err)
		_, err = server.Write(make([]byte, 1001)) // nobody has asked for anything
		must(t, errors.Join(err, server.Close()))
		got, err := io.ReadAll(c)
		if err == nil || !strings.Contains(err.Error(), "as many bytes") || len(got) > 1000 {
			t.Errorf("%d bytes were read of the bound's 1000: %v", len(got), err)
		}
	})
	t.Run("time", func(t *testing.T) {
		r := newRelaying(t, func(l *relayLimits) { l.time = 200 * time.Millisecond })
		r.put(endpoint)
		if _, err := r.open(endpoint).Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "had its time") {
			t.Errorf("read beyond its time: %v", err)
		}
	})
}

// TestOutsideIsAConnection: deadlines, contexts and ends are those of any other.
func TestOutsideIsAConnection(t *testing.T) {
	t.Parallel()
	r := newRelaying(t, nil)
	endpoint, ended := echo(t)
	r.put(endpoint)
	ctx, cancel := context.WithCancel(t.Context())
	c, err := r.Dial(ctx, "tcp", endpoint)
	must(t, err)
	cancel() // counts until it is reached
	exchange(t, c, "hello")
	if c.RemoteAddr().String() != endpoint || c.RemoteAddr().Network() != "tcp" {
		t.Errorf("remote address %v", c.RemoteAddr())
	}
	must(t, c.SetReadDeadline(time.Now().Add(-time.Second)))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read past the deadline: %v", err)
	}
	must(t, c.SetReadDeadline(time.Time{}))
	exchange(t, c, "and again")
	must(t, c.Close())
	<-ended
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a closed connection can be read")
	}
	if _, err := r.Dial(ctx, "tcp", endpoint); !errors.Is(err, context.Canceled) {
		t.Errorf("dial with a context that has ended: %v", err)
	}
	nobody, err := proxy.NewOutside(filepath.Join(t.TempDir(), "none.sock"))
	must(t, err)
	if _, err := nobody.Dial(t.Context(), "tcp", endpoint); err == nil {
		t.Error("an agent that is away relays")
	}
	must(t, nobody.Close())
}

// TestProviderEnds: an orderly end is an end, and a reset is not.
func TestProviderEnds(t *testing.T) {
	t.Parallel()
	r := newRelaying(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	r.put(l.Addr().String())
	for _, reset := range []bool{false, true} {
		c := r.open(l.Addr().String())
		server, err := l.Accept()
		must(t, err)
		_, err = server.Write([]byte("bye"))
		must(t, err)
		got := make([]byte, 3)
		_, err = io.ReadFull(c, got)
		must(t, err)
		if reset {
			must(t, server.(*net.TCPConn).SetLinger(0))
		}
		must(t, server.Close())
		if _, err := c.Read(got); errors.Is(err, io.EOF) == reset || err == nil {
			t.Errorf("reset %v: read %v", reset, err)
		}
	}
}

// TestRelaySilence: a stream that names no endpoint does not keep its place for ever.
func TestRelaySilence(t *testing.T) {
	t.Parallel()
	r := newRelaying(t, func(l *relayLimits) { l.time = 100 * time.Millisecond })
	conn, err := grpc.NewClient("unix:"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	stream, err := api.NewProxyReportClient(conn).Relay(t.Context())
	must(t, err)
	if _, err := stream.Recv(); err == nil || !strings.Contains(err.Error(), "had its time") {
		t.Errorf("silent stream ends with %v", err)
	}
}

// testRelay: the running agent relays for the proxy's user what its resources list, and ends it with them.
func (in *installed) testRelay() {
	t := in.t
	l, err := in.lab.Node.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	must(t, err)
	defer l.Close()
	good, endpoint := in.signer.resources("15m"), l.Addr().String()
	must(t, os.Chmod(in.lab.Dir, 0o755)) // as /run is
	conn, err := grpc.NewClient("unix:"+in.cfg.ProxySocket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			return dialAs(in.cfg.Spec.Proxy.UID, in.cfg.ProxySocket())
		}))
	must(t, err)
	defer conn.Close()
	begin := func() (api.ProxyReport_RelayClient, error) {
		stream, err := api.NewProxyReportClient(conn).Relay(t.Context())
		must(t, err)
		must(t, stream.Send(&api.RelayFrame{Endpoint: endpoint}))
		_, err = stream.Recv()
		return stream, err
	}
	if _, err := begin(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("what no provider lists: %v", err)
	}
	in.resources(good + "---\napiVersion: sallyport.dev/v1alpha1\nkind: IdentityProvider\nmetadata: {name: corp}\n" +
		"spec: {issuer: \"https://" + endpoint + "\", audiences: [a]}\n")
	var stream api.ProxyReport_RelayClient
	in.eventually("what a provider lists is reached", func() bool {
		stream, err = begin()
		return err == nil
	})
	in.resources(good)
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied || !contains(err.Error(), "any more") {
		t.Errorf("what no provider lists any more: %v", err)
	}
}

// dialAs connects as another user, on a thread that ends with that.
func dialAs(uid uint32, path string) (conn net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		const same = ^uintptr(0)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, same, uintptr(uid), same); errno != 0 {
			err = errno
			return
		}
		conn, err = net.Dial("unix", path)
	}()
	<-done
	return conn, err
}
