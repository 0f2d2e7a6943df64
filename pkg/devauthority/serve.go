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
	l, err := listen(socketPath)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, &endpoint{authority: a, id: id})
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

// FetchX509SVID sends the identity, and again whenever it is renewed, rotated or its root changes.
func (e *endpoint) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return e.follow(stream.Context(), func(r root) error {
		svid, err := r.issue(e.id, e.authority.ttl)
		if err != nil {
			return err
		}
		key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
		if err != nil {
			return err
		}
		return stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
			SpiffeId: e.id.String(), X509Svid: svid.Certificates[0].Raw, X509SvidKey: key, Bundle: r.cert.Raw,
		}}})
	})
}

// FetchX509Bundles sends the bundle, and again whenever the root changes.
func (e *endpoint) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return e.follow(stream.Context(), func(r root) error {
		return stream.Send(&workload.X509BundlesResponse{
			Bundles: map[string][]byte{e.authority.trustDomain.IDString(): r.cert.Raw},
		})
	})
}

// follow calls send for every state of the authority, until the identity is withdrawn.
func (e *endpoint) follow(ctx context.Context, send func(root) error) error {
	if header := metadata.ValueFromIncomingContext(ctx, "workload.spiffe.io"); len(header) != 1 || header[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	renew := time.NewTicker(e.authority.ttl / 2)
	defer renew.Stop()
	for {
		r, withdrawn, changed := e.authority.look(e.id)
		if withdrawn {
			return status.Error(codes.PermissionDenied, "no identity issued")
		}
		if err := send(r); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-renew.C:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}
