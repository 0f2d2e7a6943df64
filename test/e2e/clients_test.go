package e2e_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// answerer is who answered a client.
type answerer string

const (
	direct   answerer = "service"  // the service, which saw the client's own address and port
	proxied  answerer = "proxy"    // the service, which saw the client's address with a port of the proxy's
	cut      answerer = "cut"      // nobody: the connection was reset
	ended    answerer = "ended"    // nobody: the connection was closed, as the kernel does for a killed process
	refused  answerer = "refused"  // nobody: the backstop, which takes a SYN's socket away
	denied   answerer = "denied"   // nobody: the proxy said no in TLS
	nobody   answerer = "nobody"   // nobody: silence
	stranger answerer = "stranger" // whatever else
)

// outcome of one connection.
type outcome struct {
	who answerer
	own netip.AddrPort // of the client; invalid if it was not connected
	err error
}

func (o outcome) String() string { return fmt.Sprintf("%s (client %s, %v)", o.who, o.own, o.err) }

// way is one way to reach one service.
type way struct {
	name    string
	client  *lab.Namespace
	from    netip.Addr
	other   netip.Addr // another address, of another client
	to      netip.AddrPort
	service string
}

// silence is how long a client waits for a SYN's answer where none is expected: as long as the kernel sends it again once.
const silence = 1200 * time.Millisecond

// plain connects, sends a line and says who answered.
func (w way) plain(ctx context.Context) outcome {
	own, seen, err := w.client.Ask(ctx, netip.AddrPortFrom(w.from, 0), w.to)
	return judge(own, seen, err)
}

// identified does so inside mTLS, as the identity.
func (w way) identified(ctx context.Context, world *world, id spiffeid.ID) outcome {
	svid, err := world.authority.Issue(id)
	if err != nil {
		return outcome{who: stranger, err: err}
	}
	return w.with(ctx, world, svid)
}

// with does so with a certificate, whoever issued it.
func (w way) with(ctx context.Context, world *world, svid *x509svid.SVID) outcome {
	conn, err := w.dial(ctx)
	if err != nil {
		return judge(netip.AddrPort{}, netip.AddrPort{}, err)
	}
	defer conn.Close()
	own := unmapped(conn.LocalAddr())
	secured, err := world.handshake(ctx, conn, svid)
	if err != nil {
		return judge(own, netip.AddrPort{}, err)
	}
	seen, err := lab.Ask(secured)
	return judge(own, seen, err)
}

func (w way) dial(ctx context.Context) (net.Conn, error) {
	return w.client.Dial(ctx, netip.AddrPortFrom(w.from, 0), w.to)
}

// secure does the handshake as the identity; the other side must be the node's proxy.
func (w *world) secure(ctx context.Context, conn net.Conn, id spiffeid.ID) (*tls.Conn, error) {
	svid, err := w.authority.Issue(id)
	if err != nil {
		return nil, err
	}
	return w.handshake(ctx, conn, svid)
}

func (w *world) handshake(ctx context.Context, conn net.Conn, svid *x509svid.SVID) (*tls.Conn, error) {
	secured := tls.Client(conn, tlsconfig.MTLSClientConfig(svid, w.authority.Bundle(), tlsconfig.AuthorizeID(w.own("proxy"))))
	return secured, secured.HandshakeContext(ctx)
}

// judge tells from what a client got who answered it.
func judge(own, seen netip.AddrPort, err error) outcome {
	o := outcome{who: stranger, own: own, err: err}
	var op *net.OpError
	switch {
	case err == nil && own == seen:
		o.who = direct
	case err == nil && own.Addr() == seen.Addr():
		o.who = proxied
	case err == nil:
		o.err = fmt.Errorf("service saw %s", seen)
	case isReset(err):
		o.who = cut
	case errors.Is(err, syscall.ECONNREFUSED):
		o.who = refused
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		o.who = ended
	case errors.As(err, &op) && op.Op == "remote error": // crypto/tls: an alert
		o.who = denied
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &op) && op.Timeout():
		o.who = nobody
	}
	return o
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func unmapped(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// live is a connection that the service answered directly.
type live struct {
	net.Conn
	own netip.AddrPort
}

// dialDirect opens a connection under a path.
func (w way) dialDirect(t *testing.T) live {
	t.Helper()
	conn, err := w.dial(within(t, patience))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	l := live{conn, unmapped(conn.LocalAddr())}
	if o := l.ask(); o.who != direct {
		t.Fatalf("%s answered by %s, want the service", w.name, o)
	}
	return l
}

// ask asks once more on the same connection.
func (l live) ask() outcome {
	seen, err := lab.Ask(l.Conn)
	return judge(l.own, seen, err)
}

// wantCut asks until the connection is reset: at its next packet, so at most one answer may have been under way.
func (l live) wantCut(t *testing.T) {
	t.Helper()
	for range 2 {
		if o := l.ask(); o.who == cut {
			return
		} else if o.who != direct {
			t.Fatalf("live connection: %s, want a reset", o)
		}
	}
	t.Fatalf("live connection of %s goes on, want a reset", l.own)
}

// ways are all ways to the two services in one family.
func (w *world) ways(service string, f lab.Family) []way {
	host, pod := netip.AddrPortFrom(w.Node.Addr(f), hostPort), netip.AddrPortFrom(w.Pod.Addr(f), podPort)
	second := w.Pods[1]
	if service == "host-echo" {
		return []way{
			{"remote", w.Client, w.Client.Addr(f), w.Client.Other(f), host, service},
			{"pod", second, second.Addr(f), second.Other(f), host, service},
			{"own_address", w.Node, w.Node.Addr(f), w.Node.Other(f), host, service},
			{"loopback", w.Node, f.Loopback(), w.Node.Addr(f), netip.AddrPortFrom(f.Loopback(), hostPort), service},
		}
	}
	return []way{
		{"remote", w.Client, w.Client.Addr(f), w.Client.Other(f), pod, service},
		{"pod", second, second.Addr(f), second.Other(f), pod, service},
		{"node", w.Node, w.Node.Other(f), w.Node.Addr(f), pod, service},
	}
}

// services are the names of the world's services.
func services() []string { return []string{"host-echo", "pod-echo"} }
