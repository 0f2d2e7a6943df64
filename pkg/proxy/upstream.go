package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// upstream is the way to the service of one client connection. Connections to the service are kept for further requests of that
// client connection and of no other: the service sees the client's address, and what one client leaves behind in a stream
// meets nobody else.
type upstream struct {
	http.Transport
	s                  *session
	toServer, toClient atomic.Uint64

	mu    sync.Mutex
	conns map[*upstreamConn]struct{} // guarded by mu
	ended bool                       // guarded by mu
}

const (
	// answerHeader is how long the header of an answer may be.
	answerHeader = 256 << 10
	// keepUpstream is how long a connection to the service is kept for the next request.
	keepUpstream = 90 * time.Second
	// upstreamsEach is how many connections one client connection may have to the service.
	upstreamsEach = 32
)

var errUpstreams = errors.New("the proxy has as many connections to services as it may")

func newUpstream(s *session, spec policy.HTTPUpstream, streams uint32) (*upstream, error) {
	u := &upstream{s: s, conns: map[*upstreamConn]struct{}{}}
	u.DialContext = u.dial
	u.DisableCompression = true // bytes are carried as they are
	u.MaxResponseHeaderBytes = answerHeader
	u.IdleConnTimeout = keepUpstream
	u.MaxConnsPerHost = int(min(streams, upstreamsEach))
	u.MaxIdleConnsPerHost = u.MaxConnsPerHost
	u.TLSHandshakeTimeout = s.p.cfg.DialTimeout
	u.ExpectContinueTimeout = time.Second
	u.Protocols = new(http.Protocols)
	switch {
	case spec.H2C:
		u.Protocols.SetUnencryptedHTTP2(true)
	case spec.TLS != nil:
		u.Protocols.SetHTTP1(true)
		u.Protocols.SetHTTP2(true)
	default:
		u.Protocols.SetHTTP1(true)
	}
	return u, u.trust(spec.TLS)
}

func (u *upstream) trust(spec *policy.UpstreamTLS) error {
	if spec == nil {
		return nil
	}
	u.TLSClientConfig = &tls.Config{ServerName: spec.ServerName, MinVersion: tls.VersionTLS12}
	if spec.CA == "" {
		return nil
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(spec.CA)) {
		return errors.New("spec.http.upstream.tls.ca has no certificate in PEM")
	}
	u.TLSClientConfig.RootCAs = roots
	return nil
}

// scheme of requests to the service.
func (u *upstream) scheme() string {
	if u.TLSClientConfig != nil {
		return "https"
	}
	return "http"
}

// dial connects in the client's name, whatever address it is asked for.
func (u *upstream) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	if n := u.s.p.upstreams.Add(1); n > int64(u.s.p.cfg.MaxConnections) {
		u.s.p.upstreams.Add(-1)
		return nil, errUpstreams
	}
	c, err := dial(ctx, u.s.client.Addr(), u.s.server, u.s.p.cfg.DialTimeout)
	if err != nil {
		u.s.p.upstreams.Add(-1)
		return nil, err
	}
	conn := &upstreamConn{TCPConn: c, u: u}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ended {
		u.s.p.upstreams.Add(-1)
		resetClose(c)
		return nil, net.ErrClosed
	}
	u.conns[conn] = struct{}{}
	return conn, nil
}

// close ends what is left, by RST when the session was cut, and tells how much was carried.
func (u *upstream) close(cut bool) (toServer, toClient uint64) {
	u.mu.Lock()
	u.ended = true
	left := u.conns
	u.conns = nil
	u.mu.Unlock()
	u.CloseIdleConnections()
	for c := range left {
		if cut {
			resetClose(c.TCPConn)
		}
		c.release()
	}
	return u.toServer.Load(), u.toClient.Load()
}

// upstreamConn counts what goes through a connection to the service.
type upstreamConn struct {
	*net.TCPConn
	u    *upstream
	once sync.Once
}

// Read implements net.Conn.
func (c *upstreamConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	c.u.toClient.Add(uint64(n))
	return n, err
}

// Write implements net.Conn.
func (c *upstreamConn) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	c.u.toServer.Add(uint64(n))
	return n, err
}

// Close implements net.Conn.
func (c *upstreamConn) Close() error {
	c.u.mu.Lock()
	delete(c.u.conns, c)
	c.u.mu.Unlock()
	c.release()
	return nil
}

func (c *upstreamConn) release() {
	c.once.Do(func() {
		c.u.s.p.upstreams.Add(-1)
		_ = c.TCPConn.Close()
	})
}
