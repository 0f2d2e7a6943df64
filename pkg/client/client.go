// Package client speaks to the agent's socket, to the collector, and to protected services through the proxy.
package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"strings"
	"sync"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// maxMessage bounds one answer: a node with 65,536 paths fits.
const maxMessage = 64 << 20

// connection is a gRPC connection that keeps the operating system's reason for a failed dial,
// which a gRPC status only carries as text.
type connection struct {
	*grpc.ClientConn
	address string

	mu      sync.Mutex
	failed  error // of the latest dial, or nil
	reached bool  // a dial succeeded, or was refused: somebody is there
}

// connect prepares a connection to address, which is host:port or unix:PATH. Nothing is dialled
// before the first call.
func connect(address string, creds credentials.TransportCredentials, more ...grpc.DialOption) (*connection, error) {
	c := &connection{address: address}
	conn, err := grpc.NewClient("passthrough:///"+address, append(more,
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(c.dial),
		grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))...)
	if err != nil {
		return nil, fmt.Errorf("prepare connection to %s: %w", address, err)
	}
	c.ClientConn = conn
	return c, nil
}

func (c *connection) dial(ctx context.Context, address string) (net.Conn, error) {
	network := "tcp"
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, address = "unix", path
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, address)
	c.mu.Lock()
	c.failed = err
	c.reached = c.reached || err == nil || errors.Is(err, syscall.ECONNREFUSED)
	c.mu.Unlock()
	return conn, err
}

func (c *connection) isReached() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reached
}

func (c *connection) dialError() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failed
}

// unary calls one method and translates its error.
func unary[Request, Reply any](ctx context.Context, c *connection, op string, call func(context.Context, *Request, ...grpc.CallOption) (*Reply, error), request *Request) (*Reply, error) {
	reply, err := call(ctx, request)
	if err != nil {
		return nil, c.translate(op, err)
	}
	return reply, nil
}

// streaming calls one method with many replies. The sequence ends with the stream, with the
// first error, or with ctx, whose end is no error.
func streaming[Request, Reply any](ctx context.Context, c *connection, op string, call func(context.Context, *Request, ...grpc.CallOption) (grpc.ServerStreamingClient[Reply], error), request *Request) iter.Seq2[*Reply, error] {
	return func(yield func(*Reply, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := call(ctx, request)
		for err == nil {
			var reply *Reply
			if reply, err = stream.Recv(); err == nil && !yield(reply, nil) {
				return
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(ctx.Err(), context.Canceled) {
			return
		}
		yield(nil, c.translate(op, err))
	}
}
