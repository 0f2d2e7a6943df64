package extauthz

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
)

// Bounds of one door.
const (
	maxStrangers = 64  // that are proving themselves
	maxGateways  = 256 // connections of those who did
)

// door is a listener that hands over connections whose other side has proven that it is a gateway. That is done here and not by who
// serves them: a place among these is taken by nobody who only connects. Strangers push out nobody but each other.
type door struct {
	net.Listener // plain
	tls          *tls.Config
	proven       chan net.Conn
	gateways     atomic.Int32
	broken       chan error // why nobody comes just now
	closed       context.Context
	stop         context.CancelFunc
	running      sync.WaitGroup

	mu        sync.Mutex
	strangers []*stranger // guarded by mu; oldest first
}

// stranger is a connection whose other side has not proven yet who it is.
type stranger struct {
	net.Conn
	from netip.Prefix
}

func newDoor(l net.Listener, config *tls.Config) *door {
	d := &door{Listener: l, tls: config, proven: make(chan net.Conn), broken: make(chan error)}
	d.closed, d.stop = context.WithCancel(context.Background())
	d.running.Go(d.open)
	return d
}

// Accept implements net.Listener.
func (d *door) Accept() (net.Conn, error) {
	select {
	case c := <-d.proven:
		return c, nil
	case err := <-d.broken:
		return nil, err
	case <-d.closed.Done():
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. Nobody is proving anything when it returns.
func (d *door) Close() error {
	d.stop()
	err := d.Listener.Close()
	d.running.Wait()
	return err
}

// open lets strangers in until the door is closed. What goes wrong is told to who accepts, who knows whether to go on.
func (d *door) open() {
	for d.closed.Err() == nil {
		c, err := d.Listener.Accept()
		if err == nil {
			s := d.admit(c)
			d.running.Go(func() { d.prove(s) })
			continue
		}
		select {
		case d.broken <- err:
		case <-d.closed.Done():
		}
	}
}

// admit gives a connection a place among the strangers, if need be that of the oldest from where most of them are.
func (d *door) admit(c net.Conn) *stranger {
	s := &stranger{c, neighbourhood(c)}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.strangers) >= maxStrangers {
		count := map[netip.Prefix]int{}
		for _, o := range d.strangers {
			count[o.from]++
		}
		out := slices.MaxFunc(d.strangers, func(a, b *stranger) int { return count[a.from] - count[b.from] }) // the first of them
		_ = out.Close()
		d.remove(out)
	}
	d.strangers = append(d.strangers, s)
	return s
}

// remove takes a stranger's place back. d.mu is held.
func (d *door) remove(s *stranger) {
	d.strangers = slices.DeleteFunc(d.strangers, func(o *stranger) bool { return o == s })
}

func (d *door) prove(s *stranger) {
	ctx, cancel := context.WithTimeout(d.closed, maxTime)
	defer cancel()
	c := tls.Server(s, d.tls)
	err := c.HandshakeContext(ctx)
	d.mu.Lock()
	d.remove(s)
	d.mu.Unlock()
	if err != nil {
		_ = s.Close()
		return
	}
	g := &gatewayConn{Conn: c, leave: sync.OnceFunc(func() { d.gateways.Add(-1) })}
	if d.gateways.Add(1) > maxGateways {
		_ = g.Close()
		return
	}
	select {
	case d.proven <- g:
	case <-d.closed.Done():
		_ = g.Close()
	}
}

// gatewayConn is a connection whose handshake is done.
type gatewayConn struct {
	*tls.Conn
	leave func()
}

// Close implements net.Conn.
func (c *gatewayConn) Close() error {
	c.leave()
	return c.Conn.Close()
}

// neighbourhood is whom an address belongs to: one of IPv6 is easily changed within its network.
func neighbourhood(c net.Conn) netip.Prefix {
	at, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	a := at.Addr().Unmap().WithZone("")
	bits := 64
	if a.Is4() {
		bits = 32
	}
	p, _ := a.Prefix(bits) // of no address: the zero one
	return p
}

// proven are the credentials behind a door: what was proven there.
type proven struct {
	credentials.TransportCredentials
}

// ServerHandshake implements credentials.TransportCredentials.
func (proven) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, credentials.TLSInfo{State: c.(*gatewayConn).ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}, nil
}

// Clone implements credentials.TransportCredentials.
func (p proven) Clone() credentials.TransportCredentials {
	return proven{p.TransportCredentials.Clone()}
}
