// Package extauthz answers other proxies over gRPC, by Envoy's ext_authz protocol. It reads their questions, and gives the answers
// of pkg/proxy's judge; it decides nothing.
package extauthz

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/net/http2"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/proxy"
)

// Bounds of what the proxies that ask may cost, all together where it does not say otherwise.
const (
	maxMessage     = 256 << 10 // bytes of one question: headers and a certificate
	maxConnections = 64        // of the socket
	maxStreams     = 256       // of each connection
	maxQuestions   = 1024      // at a time
	maxTime        = 3 * time.Second
	maxAge         = 10 * time.Minute // of a connection: then the other proxy proves itself again
	drainTime      = 2 * time.Second
)

// Identity is what the listeners for other nodes prove themselves with, and verify who asks.
type Identity interface {
	x509svid.Source
	x509bundle.Source
}

// Config of a server. Judge must be set, and Socket or Listen; Identity and Gateways with Listen.
type Config struct {
	Judge *proxy.Judge
	// Socket is the path of a Unix socket, which the group GID may use. A socket that is there already is replaced.
	Socket string
	GID    int
	// Listen are addresses of mTLS, at which Gateways may ask.
	Listen   []string
	Gateways []spiffeid.ID
	Identity Identity
	// BelievePrincipal takes the other proxy's word for who a client is that showed no certificate.
	BelievePrincipal bool
}

// Server is the gRPC service envoy.service.auth.v3.Authorization.
type Server struct {
	authv3.UnimplementedAuthorizationServer
	cfg     Config
	free    chan struct{} // has an element for each question that may be asked now
	serving []serving
}

// serving is one listener.
type serving struct {
	listener net.Listener
	grpc     *grpc.Server
}

func (c Config) validate() error {
	switch {
	case c.Judge == nil || c.Socket == "" && len(c.Listen) == 0:
		return errors.New("configure ext_authz: Judge must be set, and Socket or Listen")
	case len(c.Listen) > 0 && (c.Identity == nil || len(c.Gateways) == 0):
		return errors.New("configure ext_authz: Listen needs Identity and Gateways")
	}
	return nil
}

// New opens all listeners. Run closes them.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, free: make(chan struct{}, maxQuestions)}
	for range maxQuestions {
		s.free <- struct{}{}
	}
	if err := s.open(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *Server) open() error {
	if s.cfg.Socket != "" {
		l, err := listenUnix(s.cfg.Socket, s.cfg.GID)
		if err != nil {
			return err
		}
		s.add(netutil.LimitListener(l, maxConnections), local.NewCredentials()) // the socket's mode says who may connect
	}
	for _, address := range s.cfg.Listen {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("listen for ext_authz: %w", err)
		}
		s.add(newDoor(l, s.tls()), proven{credentials.NewTLS(s.tls())})
	}
	return nil
}

// listenUnix makes a socket that its group alone may use, from its first moment on.
func listenUnix(path string, gid int) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("replace socket of ext_authz: %w", err)
		}
	}
	unready := path + ".new"
	if err := os.Remove(unready); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("make socket of ext_authz: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: unready, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("make socket of ext_authz: %w\nhint: the directory must be there, and this process' user must own it", err)
	}
	l.SetUnlinkOnClose(false) // it has another name then
	err = os.Chown(unready, -1, gid)
	if err != nil {
		err = fmt.Errorf("%w\nhint: this process must be in group %d (SupplementaryGroups= of its unit)", err, gid)
	}
	if err == nil {
		err = os.Chmod(unready, 0o660)
	}
	if err == nil {
		err = os.Rename(unready, path)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("make socket of ext_authz: %w", err)
	}
	return l, nil
}

// tls is of listeners for other nodes: nobody but the gateways gets a word in.
func (s *Server) tls() *tls.Config {
	c := tlsconfig.MTLSServerConfig(s.cfg.Identity, s.cfg.Identity, tlsconfig.AuthorizeOneOf(s.cfg.Gateways...))
	c.MinVersion = tls.VersionTLS13
	c.SessionTicketsDisabled = true // each connection proves itself
	c.NextProtos = []string{http2.NextProtoTLS}
	return c
}

func (s *Server) add(l net.Listener, creds credentials.TransportCredentials) {
	server := grpc.NewServer(grpc.Creds(creds), grpc.UnaryInterceptor(s.bound),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxConcurrentStreams(maxStreams), grpc.MaxHeaderListSize(16<<10),
		grpc.ConnectionTimeout(maxTime), grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: maxAge, MaxConnectionAgeGrace: maxTime}))
	authv3.RegisterAuthorizationServer(server, s)
	s.serving = append(s.serving, serving{l, server})
}

// bound refuses what is too many at a time, which the other proxy takes for a no, and gives each question its time.
func (s *Server) bound(ctx context.Context, q any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	select {
	case <-s.free:
		defer func() { s.free <- struct{}{} }()
	default:
		return nil, status.Errorf(codes.ResourceExhausted, "%d questions are being answered, as many as may be", maxQuestions)
	}
	ctx, cancel := context.WithTimeout(ctx, maxTime)
	defer cancel()
	return handle(ctx, q)
}

// Run serves until ctx ends, and returns nil then, unless a listener broke.
func (s *Server) Run(ctx context.Context) error {
	group, broken := errgroup.WithContext(ctx)
	for _, one := range s.serving {
		group.Go(func() error {
			if err := one.grpc.Serve(one.listener); err != nil && broken.Err() == nil {
				return fmt.Errorf("answer ext_authz on %s: %w", one.listener.Addr(), err)
			}
			return nil
		})
	}
	<-broken.Done()
	s.close()
	return group.Wait()
}

// Addrs are where it listens.
func (s *Server) Addrs() (all []net.Addr) {
	for _, one := range s.serving {
		all = append(all, one.listener.Addr())
	}
	return all
}

// close lets questions that are being answered end. Other proxies keep their connections open.
func (s *Server) close() {
	if s.cfg.Socket != "" {
		_ = os.Remove(s.cfg.Socket)
	}
	for _, one := range s.serving {
		end := time.AfterFunc(drainTime, one.grpc.Stop)
		one.grpc.GracefulStop()
		end.Stop()
		_ = one.listener.Close() // of one that never served
	}
}
