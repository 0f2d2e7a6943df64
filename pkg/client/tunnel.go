package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Stream is one end of a tunnel: a connection whose sending half can be closed on its own.
type Stream interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// TunnelConfig says where a tunnel leads and as whom.
type TunnelConfig struct {
	// Server is the address:port of the protected service. The proxy answers there.
	Server string
	// TLS proves our identity and checks the proxy's, by VerifyPeerCertificate as go-spiffe does.
	TLS *tls.Config
	// Bearer gives the token that proves us in place of an identity in TLS; nil: TLS does. Then TLS needs a ServerName.
	Bearer func(context.Context) (string, error)
	// DialTimeout bounds connect and handshake together; 0 is 10 seconds.
	DialTimeout time.Duration
	// Hint says what to do about an error that ended a connection; nil: nobody knows.
	Hint func(error) string
	// Logger gets one line per connection. Nil discards.
	Logger *slog.Logger
}

// Tunnel carries plain connections to a protected service inside mTLS, for clients that do not
// speak it.
type Tunnel struct{ cfg TunnelConfig }

// NewTunnel checks the configuration. It does not dial.
func NewTunnel(cfg TunnelConfig) (*Tunnel, error) {
	if _, _, err := net.SplitHostPort(cfg.Server); err != nil {
		return nil, fmt.Errorf("read server address: %w", err)
	}
	if cfg.TLS == nil {
		return nil, errors.New("open tunnel: no TLS configuration")
	}
	cfg.TLS = cfg.TLS.Clone()
	cfg.TLS.MinVersion = tls.VersionTLS13
	cfg.TLS.SessionTicketsDisabled = true
	if cfg.Bearer != nil {
		cfg.TLS.NextProtos = []string{api.ConnectProtocol}
	}
	markUntrusted(cfg.TLS)
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Tunnel{cfg: cfg}, nil
}

// markUntrusted wraps what the configuration says of the proxy's identity in ErrUntrusted.
func markUntrusted(cfg *tls.Config) {
	verify := cfg.VerifyPeerCertificate
	if verify == nil {
		return
	}
	cfg.VerifyPeerCertificate = func(raw [][]byte, chains [][]*x509.Certificate) error {
		if err := verify(raw, chains); err != nil {
			return fmt.Errorf("%w: %w", ErrUntrusted, err)
		}
		return nil
	}
}

// Dial opens one connection to the service and ends the TLS handshake. A proxy that does not
// accept our identity says so only at the first read: TLS 1.3 has no answer to a client's
// certificate.
func (t *Tunnel) Dial(ctx context.Context) (Stream, error) {
	remote, err := t.dial(ctx)
	if err != nil {
		return nil, err
	}
	return remote, nil
}

func (t *Tunnel) dial(ctx context.Context) (*secured, error) {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.DialTimeout)
	defer cancel()
	token := ""
	if t.cfg.Bearer != nil {
		var err error
		if token, err = t.cfg.Bearer(ctx); err != nil {
			return nil, err
		}
	}
	d := net.Dialer{KeepAlive: 15 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", t.cfg.Server)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", t.cfg.Server, err)
	}
	remote := secure(conn, t.cfg.TLS)
	if err := remote.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("prove identities with %s: %w", t.cfg.Server, err)
	}
	if t.cfg.Bearer == nil {
		return remote, nil
	}
	if remote.ConnectionState().NegotiatedProtocol != api.ConnectProtocol {
		conn.Close()
		return nil, fmt.Errorf("show token to %s: %w", t.cfg.Server, ErrNoTokens)
	}
	if err := show(ctx, remote, t.cfg.Server, token); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", t.cfg.Server, err)
	}
	return remote, nil
}

// Pipe joins local with a new connection to the service until both halves have ended, and
// closes local. When ctx ends it returns at once, even if local's reader cannot be interrupted.
func (t *Tunnel) Pipe(ctx context.Context, local Stream) error {
	remote, err := t.dial(ctx)
	if err != nil {
		abort(local)
		return err
	}
	return join(ctx, local, remote)
}

// Serve accepts on l and pipes each connection until ctx ends, then cuts the live ones. It
// closes l. The end of ctx is no error.
func (t *Tunnel) Serve(ctx context.Context, l net.Listener) error {
	var live sync.WaitGroup
	defer live.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			l.Close()
			return fmt.Errorf("accept connection: %w", err)
		}
		live.Go(func() { t.serve(ctx, conn) })
	}
}

func (t *Tunnel) serve(ctx context.Context, conn net.Conn) {
	local, ok := conn.(Stream)
	if !ok {
		conn.Close()
		return
	}
	start := time.Now()
	err := t.Pipe(ctx, local)
	log := t.cfg.Logger.With("server", t.cfg.Server, "duration", time.Since(start).Round(time.Millisecond))
	if err != nil && ctx.Err() == nil {
		if t.cfg.Hint != nil {
			log = log.With("hint", t.cfg.Hint(err))
		}
		log.Warn("connection ended early", "error", err)
		return
	}
	log.Info("connection ended")
}

// join copies both ways. One half's end is passed on as an end of that half alone; an error
// ends both, and resets the local side so that a cut never looks like an end.
func join(ctx context.Context, local Stream, remote *secured) error {
	defer remote.NetConn().Close()
	halves := make(chan error, 2)
	go func() { halves <- half(remote, local) }()
	go func() { halves <- half(local, remote) }()
	for range 2 {
		select {
		case err := <-halves:
			if err != nil {
				abort(local)
				return err
			}
		case <-ctx.Done():
			abort(local)
			return context.Cause(ctx)
		}
	}
	return local.Close()
}

func half(to, from Stream) error {
	if _, err := io.Copy(to, from); err != nil {
		return err
	}
	err := to.CloseWrite()
	if errors.Is(err, syscall.ENOTCONN) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return nil // it is gone already: the other half tells whether it ended or was cut
	}
	return err
}

// abort closes with a reset where the transport can say so.
func abort(s Stream) {
	if c, ok := s.(interface{ SetLinger(int) error }); ok {
		_ = c.SetLinger(0) // the close that follows is the point
	}
	s.Close()
}
