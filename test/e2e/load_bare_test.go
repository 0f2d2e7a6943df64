package e2e_test

import (
	"container/list"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// bareServer is what Go's own TLS and HTTP make of slow clients, as short as it can be: as many places and as much patience as the
// proxy has, the oldest connection goes when there is no place, and nothing of policy, records, fairness, px or a service behind HTTP.
type bareServer struct {
	role   loadRole
	config *tls.Config
	web    chan net.Conn // to the HTTP server

	mu  sync.Mutex
	all list.List // guarded by mu; of connections, the oldest first
}

func (r loadRole) serveBare() error {
	inner := role{At: r.At, To: r.To, PEM: r.PEM[0]}
	config, err := inner.server()
	if err != nil {
		return err
	}
	config.NextProtos = []string{"h2", "http/1.1"}
	b := &bareServer{role: r, config: config, web: make(chan net.Conn)}
	server := http.Server{Handler: http.HandlerFunc(answerWeb), ReadHeaderTimeout: r.Pause, ReadTimeout: r.Pause, IdleTimeout: time.Hour}
	go func() { panic(server.Serve(b)) }()
	return inner.serve(nil, func(c *net.TCPConn) { b.handle(c, inner) })
}

// Accept implements net.Listener for the HTTP server.
func (b *bareServer) Accept() (net.Conn, error) { return <-b.web, nil }

// Close implements net.Listener.
func (b *bareServer) Close() error { return nil }

// Addr implements net.Listener.
func (b *bareServer) Addr() net.Addr { return net.TCPAddrFromAddrPort(b.role.At) }

// guest is a connection that has a place until it is closed.
type guest struct {
	*net.TCPConn
	once  sync.Once
	leave func()
}

// Close resets the connection, as the proxy does with whom it refuses.
func (p *guest) Close() error {
	p.once.Do(p.leave)
	_ = p.SetLinger(0)
	return p.TCPConn.Close()
}

func (b *bareServer) handle(raw *net.TCPConn, inner role) {
	c := b.place(raw)
	_ = c.SetDeadline(time.Now().Add(b.role.Pause))
	secured := tls.Server(c, b.config)
	if secured.Handshake() != nil {
		c.Close()
		return
	}
	_ = c.SetDeadline(time.Time{})
	if secured.ConnectionState().NegotiatedProtocol != "" {
		b.web <- secured
		return
	}
	defer c.Close()
	up, err := inner.dialService(raw)
	if err != nil {
		return
	}
	defer up.Close()
	go func() {
		_, _ = io.Copy(up, secured)
		_ = up.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(secured, up)
}

// place gives a connection a place, if need be the oldest one's.
func (b *bareServer) place(raw *net.TCPConn) *guest {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := &guest{TCPConn: raw}
	here := b.all.PushBack(c)
	c.leave = func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.all.Remove(here)
	}
	if b.all.Len() > b.role.N {
		oldest := b.all.Front().Value.(*guest)
		go oldest.Close()
	}
	return c
}
