package devauthority

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Serve serves the Workload API of one identity at a Unix socket, until ctx ends, and removes the
// socket. A socket that is left over is replaced. Any user may open it: whoever must not have the
// identity must not be let into its folder, which is made (0755) if it is missing.
func (a *Authority) Serve(ctx context.Context, socketPath string, id spiffeid.ID) error {
	if id.TrustDomain() != a.trustDomain {
		return fmt.Errorf("serve %s: not of trust domain %s", id, a.trustDomain)
	}
	return serveSocket(ctx, socketPath, grpc.NewServer(), func(s *grpc.Server) {
		workload.RegisterSpiffeWorkloadAPIServer(s, &endpoint{authority: a, id: id})
	})
}

// serveSocket serves what is registered until ctx ends.
func serveSocket(ctx context.Context, socketPath string, s *grpc.Server, register func(*grpc.Server)) error {
	l, err := listen(socketPath)
	if err != nil {
		return err
	}
	register(s)
	stop := context.AfterFunc(ctx, s.Stop)
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", socketPath, err)
	}
	return nil
}

func listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make folder of socket: %w", err)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove old socket: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(fmt.Errorf("open socket to users: %w", err), l.Close())
	}
	return l, nil
}

// endpoint is the Workload API of one identity.
type endpoint struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	authority *Authority
	id        spiffeid.ID
}

// FetchX509SVID sends the identity, and again whenever it is renewed, rotated or trust changes.
func (e *endpoint) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return e.follow(stream.Context(), func(m moment) error {
		svid, err := m.root.issue(e.id, e.authority.ttl)
		if err != nil {
			return err
		}
		key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
		if err != nil {
			return err
		}
		return stream.Send(&workload.X509SVIDResponse{FederatedBundles: m.foreign(), Svids: []*workload.X509SVID{{
			SpiffeId: e.id.String(), X509Svid: svid.Certificates[0].Raw, X509SvidKey: key, Bundle: m.root.cert.Raw,
		}}})
	})
}

// FetchX509Bundles sends the bundles, and again whenever they change.
func (e *endpoint) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return e.follow(stream.Context(), func(m moment) error {
		bundles := m.foreign()
		bundles[e.authority.trustDomain.IDString()] = m.root.cert.Raw
		return stream.Send(&workload.X509BundlesResponse{Bundles: bundles})
	})
}

// FetchJWTBundles sends what verifies tokens, and again whenever it changes.
func (e *endpoint) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return e.follow(stream.Context(), func(m moment) error {
		m.federated[e.authority.trustDomain] = e.authority.TrustBundle()
		bundles := map[string][]byte{}
		for td, b := range m.federated {
			raw, err := b.JWTBundle().Marshal()
			if err != nil {
				return err
			}
			bundles[td.IDString()] = raw
		}
		return stream.Send(&workload.JWTBundlesResponse{Bundles: bundles})
	})
}

// FetchJWTSVID gives a token for the audiences.
func (e *endpoint) FetchJWTSVID(ctx context.Context, r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := checkHeader(ctx, "workload.spiffe.io"); err != nil {
		return nil, err
	}
	if len(r.Audience) == 0 {
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	}
	m := e.authority.look()
	if m.withdrawn[e.id] || r.SpiffeId != "" && r.SpiffeId != e.id.String() {
		return nil, errNoIdentity
	}
	token, err := m.root.issueToken(e.id, e.authority.ttl, r.Audience)
	if err != nil {
		return nil, err
	}
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: e.id.String(), Svid: token}}}, nil
}

var errNoIdentity = status.Error(codes.PermissionDenied, "no identity issued")

// follow calls send for every state of the authority, until the identity is withdrawn.
func (e *endpoint) follow(ctx context.Context, send func(moment) error) error {
	if err := checkHeader(ctx, "workload.spiffe.io"); err != nil {
		return err
	}
	return e.authority.follow(ctx, func(m moment) error {
		if m.withdrawn[e.id] {
			return errNoIdentity
		}
		return send(m)
	})
}

// checkHeader wants what a browser or a forwarded request cannot have set.
func checkHeader(ctx context.Context, name string) error {
	if header := metadata.ValueFromIncomingContext(ctx, name); len(header) != 1 || header[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	return nil
}

// follow calls send now, at every change and when identities are due for renewal.
func (a *Authority) follow(ctx context.Context, send func(moment) error) error {
	renew := time.NewTicker(a.ttl / 2)
	defer renew.Stop()
	for {
		m := a.look()
		if err := send(m); err != nil {
			return err
		}
		select {
		case <-m.changed:
		case <-renew.C:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// foreign are the bundles of other trust domains, DER.
func (m moment) foreign() map[string][]byte {
	bundles := map[string][]byte{}
	for td, b := range m.federated {
		bundles[td.IDString()] = der(b)
	}
	return bundles
}

func der(b *spiffebundle.Bundle) []byte {
	var raw []byte
	for _, c := range b.X509Authorities() {
		raw = append(raw, c.Raw...)
	}
	return raw
}
