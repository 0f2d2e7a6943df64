package client_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/devauthority"
)

var (
	domain   = spiffeid.RequireTrustDomainFromString("example.org")
	proxyID  = spiffeid.RequireFromString("spiffe://example.org/sallyport/proxy/node-1")
	clientID = spiffeid.RequireFromString("spiffe://example.org/app/web")
)

// world is an authority and a proxy's end of TLS in front of what serve does.
type world struct {
	bundle *x509bundle.Bundle
	client *x509svid.SVID
	server string
}

func newWorld(t *testing.T, serve func(*tls.Conn)) *world {
	t.Helper()
	authority, err := devauthority.New(domain, devauthority.Options{})
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := authority.Issue(proxyID)
	if err != nil {
		t.Fatal(err)
	}
	me, err := authority.Issue(clientID)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{bundle: authority.Bundle(), client: me}
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(proxy, w.bundle, tlsconfig.AuthorizeID(clientID)))
	if err != nil {
		t.Fatal(err)
	}
	w.server = l.Addr().String()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go serve(conn.(*tls.Conn))
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return w
}

func (w *world) tunnel(t *testing.T) *client.Tunnel {
	t.Helper()
	tunnel, err := client.NewTunnel(client.TunnelConfig{
		Server: w.server, TLS: tlsconfig.MTLSClientConfig(w.client, w.bundle, tlsconfig.AuthorizeID(proxyID)), DialTimeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	return tunnel
}

// forward serves the tunnel on loopback until the test ends, and dials it.
func (w *world) forward(t *testing.T) *net.TCPConn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	tunnel := w.tunnel(t)
	go func() { done <- tunnel.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// answerAfterEnd reads to the end and only then answers with what it read.
func answerAfterEnd(conn *tls.Conn) {
	defer conn.Close()
	data, err := io.ReadAll(conn)
	if err == nil {
		fmt.Fprintf(conn, "%s", data)
	}
}

func TestForwardKeepsHalvesApart(t *testing.T) {
	conn := newWorld(t, answerAfterEnd).forward(t)
	sent := make([]byte, 20<<20)
	rand.Read(sent)
	wrote := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		wrote <- errors.Join(err, conn.CloseWrite())
	}()
	h := sha256.New()
	n, err := io.Copy(h, conn)
	if err := errors.Join(err, <-wrote); err != nil || n != int64(len(sent)) {
		t.Fatalf("got %d bytes of %d, %v", n, len(sent), err)
	}
	if want := sha256.Sum256(sent); !bytes.Equal(h.Sum(nil), want[:]) {
		t.Fatal("other bytes came back")
	}
}

func TestServersHalfEndsFirst(t *testing.T) {
	got := make(chan string, 1)
	conn := newWorld(t, func(c *tls.Conn) {
		defer c.Close()
		fmt.Fprint(c, "bye")
		err := c.CloseWrite()
		data, readErr := io.ReadAll(c)
		got <- fmt.Sprint(string(data), errors.Join(err, readErr))
	}).forward(t)
	data, err := io.ReadAll(conn)
	if err != nil || string(data) != "bye" {
		t.Fatalf("got %q, %v", data, err)
	}
	fmt.Fprint(conn, "and yet")
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if last := <-got; last != "and yet<nil>" {
		t.Fatalf("after its end the server got %q", last)
	}
}

// A connection that is cut must not look like one that ended: TLS tells them apart, and so must
// the plain side.
func TestCutIsNoEnd(t *testing.T) {
	conn := newWorld(t, func(c *tls.Conn) {
		io.ReadFull(c, make([]byte, 1)) // the client is there by then
		fmt.Fprint(c, "half of an ans")
		c.NetConn().Close()
	}).forward(t)
	fmt.Fprint(conn, "?")
	data, err := io.ReadAll(conn)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("after %q: got %v, want a reset", data, err)
	}
}

func TestServeCutsLiveConnectionsAtItsEnd(t *testing.T) {
	w := newWorld(t, answerAfterEnd)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	tunnel := w.tunnel(t)
	go func() { done <- tunnel.Serve(ctx, l) }()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "unanswered")
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Fatalf("got %v, want a reset", err)
	}
}

func TestTunnelTrustsOnlyTheNamed(t *testing.T) {
	w := newWorld(t, answerAfterEnd)
	other := spiffeid.RequireFromString("spiffe://example.org/sallyport/proxy/node-2")
	tunnel, err := client.NewTunnel(client.TunnelConfig{Server: w.server, TLS: tlsconfig.MTLSClientConfig(w.client, w.bundle, tlsconfig.AuthorizeID(other))})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tunnel.Dial(t.Context()); !errors.Is(err, client.ErrUntrusted) {
		t.Fatalf("another proxy than node-2's: got %v", err)
	}
}

func TestDialGivesUpOnSilence(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tunnel, err := client.NewTunnel(client.TunnelConfig{Server: l.Addr().String(), TLS: &tls.Config{InsecureSkipVerify: true}, DialTimeout: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tunnel.Dial(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
}

func TestTunnelConfig(t *testing.T) {
	for name, cfg := range map[string]client.TunnelConfig{
		"no port": {Server: "10.2.0.2", TLS: &tls.Config{}},
		"no TLS":  {Server: "10.2.0.2:1"},
	} {
		if _, err := client.NewTunnel(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
