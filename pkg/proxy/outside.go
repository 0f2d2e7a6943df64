package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Outside is the way out of px, by the agent. To identity providers it relays bytes, if policy lists the endpoints: what is said to
// them is between us and them, and whoever dials puts TLS around it. Of workloads on the node it tells who they are, and signs for them. Another proxy's
// questions get the agent's own answers by it.
type Outside struct{ conn *grpc.ClientConn }

// NewOutside makes a way out over the agent's socket. It does not have to be there yet.
func NewOutside(socket string) (*Outside, error) {
	conn, err := grpc.NewClient("unix:"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the agent checks who opened its socket
		grpc.WithNoProxy())
	if err != nil {
		return nil, fmt.Errorf("open agent's socket %s: %w", socket, err)
	}
	return &Outside{conn: conn}, nil
}

// Close ends all connections.
func (o *Outside) Close() error { return o.conn.Close() }

// Dial gives a connection to an endpoint, host:port, that an IdentityProvider in force lists. It waits until the agent has
// reached it; ctx counts until then. Network is tcp.
func (o *Outside) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if network != "tcp" {
		return nil, fmt.Errorf("dial %s: network %q is not relayed", addr, network)
	}
	lasting, cut := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cut)
	stream, err := o.begin(lasting, addr)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		cut()
		return nil, fmt.Errorf("dial %s through the agent: %w", addr, errors.Join(err, ctx.Err()))
	}
	ours, theirs := net.Pipe()
	c := &relayedConn{Conn: ours, endpoint: relayedAddr(addr), cut: cut}
	go c.up(stream, theirs)
	go c.down(stream, theirs)
	return c, nil
}

// Live asks the agent by which grant a client could go around the proxy now, as JudgeConfig.Live wants it.
func (o *Outside) Live(ctx context.Context, service string, client netip.AddrPort, port uint16) (grant string, err error) {
	reply, err := api.NewProxyReportClient(o.conn).Live(ctx, &api.LiveRequest{Service: service, Client: client.String(), Port: uint32(port)})
	return reply.GetGrant(), err
}

func (o *Outside) begin(ctx context.Context, addr string) (api.ProxyReport_RelayClient, error) {
	stream, err := api.NewProxyReportClient(o.conn).Relay(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&api.RelayFrame{Endpoint: addr}); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	_, err = stream.Recv() // tells why, also where sending could not
	return stream, err
}

// relayedConn is one end of a pipe, whose other end is a stream of the agent's. The pipe gives it deadlines.
type relayedConn struct {
	net.Conn
	endpoint relayedAddr
	cut      context.CancelFunc

	mu  sync.Mutex
	why error // guarded by mu; the stream has ended before the provider's bytes did
}

// relayedAddr is an endpoint: its address is known to the agent alone.
type relayedAddr string

// Network implements net.Addr.
func (relayedAddr) Network() string { return "tcp" }

// String implements net.Addr.
func (a relayedAddr) String() string { return string(a) }

// RemoteAddr is the endpoint as it was dialled.
func (c *relayedConn) RemoteAddr() net.Addr { return c.endpoint }

// Read tells a stream that broke from one that the provider has ended.
func (c *relayedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.why != nil {
			err = c.why
		}
	}
	return n, err
}

// Close ends the stream too.
func (c *relayedConn) Close() error {
	err := c.Conn.Close()
	c.cut()
	return err
}

// maxRelayed is how many bytes one frame carries.
const maxRelayed = 32 << 10

// up ends with the pipe, or when the stream does not take any more.
func (c *relayedConn) up(stream api.ProxyReport_RelayClient, from net.Conn) {
	buffer := make([]byte, maxRelayed)
	for {
		n, err := from.Read(buffer)
		if n > 0 && stream.Send(&api.RelayFrame{Data: buffer[:n]}) != nil {
			return // down is told why
		}
		if err != nil {
			return
		}
	}
}

// down ends with the stream, and ends the pipe.
func (c *relayedConn) down(stream api.ProxyReport_RelayClient, to net.Conn) {
	defer c.cut()
	defer to.Close()
	for {
		frame, err := stream.Recv()
		if err != nil || frame.GetEnd() {
			c.ended(err)
			return
		}
		if _, err := to.Write(frame.GetData()); err != nil {
			return // closed by us
		}
	}
}

func (c *relayedConn) ended(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.why = fmt.Errorf("read from %s through the agent: %w", c.endpoint, err)
		if errors.Is(err, io.EOF) {
			c.why = io.ErrUnexpectedEOF
		}
	}
}
