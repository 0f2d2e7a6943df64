package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// stopGrace is how long a stopping server waits for calls under way; followers are cut after it.
const stopGrace = 2 * time.Second

// endpoint is a gRPC server on a Unix socket that only named callers may use.
type endpoint struct {
	path     string
	listener net.Listener
	server   *grpc.Server
}

// newEndpoint listens at path. A socket that is there belongs to a dead agent, for we hold the lock: it is replaced. Where
// one user alone may call, the file is that user's; else only the kernel's word on the caller decides.
func newEndpoint(path string, allow callers, register func(grpc.ServiceRegistrar)) (*endpoint, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("replace socket: %w", err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := fence(path, allow); err != nil {
		listener.Close()
		return nil, fmt.Errorf("set mode of socket: %w", err)
	}
	server := grpc.NewServer(
		grpc.Creds(peerTransport{allow: allow}),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.ConnectionTimeout(5*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute}),
	)
	register(server)
	return &endpoint{path: path, listener: listener, server: server}, nil
}

// maxMessage bounds one message of a caller: an envelope or a batch of records.
const maxMessage = 1 << 20

func fence(path string, allow callers) error {
	if uid, sole := allow.sole(); sole {
		return errors.Join(os.Chmod(path, 0o600), os.Chown(path, int(uid), -1))
	}
	return os.Chmod(path, 0o666)
}

// Run serves until ctx ends, then lets calls under way finish for stopGrace. The socket's file goes with the listener.
func (e *endpoint) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, e.stop)()
	if err := e.server.Serve(e.listener); err != nil {
		return fmt.Errorf("serve %s: %w", e.path, err)
	}
	return nil
}

func (e *endpoint) stop() {
	cut := time.AfterFunc(stopGrace, e.server.Stop)
	defer cut.Stop()
	e.server.GracefulStop()
}
