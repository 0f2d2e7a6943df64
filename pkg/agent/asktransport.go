package agent

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
)

// maxAskConnections bounds the connections of workloads in all.
const maxAskConnections = 16384

// askConnections is how many there may be at a time: half of what the process may have open, so that the store and the people on
// the agent's own socket always find a descriptor.
func askConnections() int {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return maxAskConnections / 16
	}
	return int(min(files.Cur/2, maxAskConnections))
}

// handshakesPerSecond bounds what those cost who have not proven anything yet. As many may come at once as
// there may be: the holders of all paths, when the agent was restarted.
const handshakesPerSecond = 500

// pacedListener hands connections on at a bounded rate; the others wait in the kernel's queue.
type pacedListener struct {
	net.Listener
	pace   *rate.Limiter
	open   context.Context
	closed context.CancelFunc
}

func paced(l net.Listener, pace *rate.Limiter) *pacedListener {
	open, closed := context.WithCancel(context.Background())
	return &pacedListener{l, pace, open, closed}
}

// Accept waits for its turn, and then for a connection.
func (l *pacedListener) Accept() (net.Conn, error) {
	if err := l.pace.Wait(l.open); err != nil {
		return nil, net.ErrClosed
	}
	return l.Listener.Accept()
}

// Close ends both waits.
func (l *pacedListener) Close() error {
	l.closed()
	return l.Listener.Close()
}

// askTransport takes no more connections of one identity than it may have, once they have proven whose they are.
type askTransport struct {
	credentials.TransportCredentials
	limits *askLimits
	clock  clock
}

// ServerHandshake proves who connects, and counts the connection until it is closed.
func (t askTransport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	id, err := provenID(info)
	if err == nil {
		err = t.limits.connect(id, t.clock.boot())
	}
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return &countedConn{conn, sync.OnceFunc(func() { t.limits.disconnect(id) })}, info, nil
}

// Clone gives one that counts together with this one.
func (t askTransport) Clone() credentials.TransportCredentials {
	return askTransport{t.TransportCredentials.Clone(), t.limits, t.clock}
}

func provenID(info credentials.AuthInfo) (spiffeid.ID, error) {
	tls, ok := info.(credentials.TLSInfo)
	if !ok || len(tls.State.PeerCertificates) == 0 {
		return spiffeid.ID{}, errors.New("no certificate was shown")
	}
	return x509svid.IDFromCert(tls.State.PeerCertificates[0])
}

// countedConn is a connection that counts until it is closed.
type countedConn struct {
	net.Conn
	gone func()
}

// Close closes it, and counts it no more.
func (c *countedConn) Close() error {
	defer c.gone()
	return c.Conn.Close()
}
