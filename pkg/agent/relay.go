package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// relayLimits bound what a proxy that was taken over could do with the relay.
type relayLimits struct {
	streams int           // at a time
	perSec  rate.Limit    // streams begun a second
	bytes   int64         // of one stream, in each direction
	time    time.Duration // of one stream, all of it
	dial    time.Duration // all addresses of an endpoint together
}

var defaultRelayLimits = relayLimits{streams: 32, perSec: 20, bytes: 8 << 20, time: time.Minute, dial: 10 * time.Second}

// relay carries the proxy's bytes to the endpoints of identity providers, which cannot be reached inside px. It reads none
// of them: TLS is between proxy and provider.
type relay struct {
	listed func() []string // the endpoints of the resources in force, host:port
	limits relayLimits
	rate   *rate.Limiter
	log    *slog.Logger

	mu   sync.Mutex
	live map[*relayed]struct{} // guarded by mu
}

// relayed is one stream.
type relayed struct {
	endpoint string
	address  string
	up, down atomic.Int64
	cut      context.CancelCauseFunc
}

func newRelay(listed func() []string, limits relayLimits, log *slog.Logger) *relay {
	return &relay{listed: listed, limits: limits, rate: rate.NewLimiter(limits.perSec, limits.streams), log: log,
		live: make(map[*relayed]struct{})}
}

// listedEndpoints are those of the resources in force; none before there are any.
func (n *node) listedEndpoints() (list []string) {
	if n.resources == nil || n.resources.current() == nil {
		return nil
	}
	for _, p := range n.resources.current().set.Providers() {
		list = append(list, p.Spec.Endpoints...)
	}
	return list
}

// Relay carries one connection. Its first frame names the endpoint; the first one back says that it is reached.
func (r *reports) Relay(stream api.ProxyReport_RelayServer) error {
	if r.relay == nil {
		return status.Error(codes.Unimplemented, "this agent relays nothing")
	}
	return r.relay.serve(stream)
}

// Why a stream ends that nobody ended.
var (
	errRelayTime   = status.Error(codes.DeadlineExceeded, "the stream has had its time")
	errRelayBytes  = status.Error(codes.ResourceExhausted, "the stream has carried as many bytes as one may")
	errRelayFull   = status.Error(codes.ResourceExhausted, "as many streams are open, or were begun this second, as may be")
	errRelayPolicy = status.Error(codes.PermissionDenied, "no IdentityProvider in force lists the endpoint any more")
)

func (r *relay) serve(stream api.ProxyReport_RelayServer) error {
	ctx, cancel := context.WithTimeoutCause(stream.Context(), r.limits.time, errRelayTime)
	defer cancel()
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	one := &relayed{cut: cut}
	if !r.enter(one) {
		return errRelayFull
	}
	defer r.leave(one)
	began, done := time.Now(), make(chan error, 1)
	go func() { done <- r.carry(ctx, one, stream) }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done(): // returning ends what the stream's calls wait for
		err = context.Cause(ctx)
	}
	r.tell(one, time.Since(began), err)
	return err
}

// tell leaves a line for whoever asks later what the proxy had to do with the outside.
func (r *relay) tell(one *relayed, took time.Duration, err error) {
	r.mu.Lock()
	endpoint, address := one.endpoint, one.address
	r.mu.Unlock()
	r.log.Info("relayed for the proxy", "endpoint", plain(endpoint), "address", address, "up", one.up.Load(), "down", one.down.Load(),
		"took", took.Round(time.Millisecond), "error", err)
}

// enter counts a stream in, if there may be one more.
func (r *relay) enter(one *relayed) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.live) >= r.limits.streams || !r.rate.Allow() {
		return false
	}
	r.live[one] = struct{}{}
	return true
}

func (r *relay) leave(one *relayed) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.live, one)
}

// admit holds that policy lists the endpoint, with the stream counted so that a change from now on cuts it.
func (r *relay) admit(one *relayed, endpoint string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	one.endpoint = endpoint
	if !slices.Contains(r.listed(), endpoint) {
		return status.Error(codes.PermissionDenied, "no IdentityProvider in force lists this endpoint")
	}
	return nil
}

// recheck cuts the streams to what policy does not list any more.
func (r *relay) recheck() {
	r.mu.Lock()
	defer r.mu.Unlock()
	listed := r.listed()
	for one := range r.live {
		if one.endpoint != "" && !slices.Contains(listed, one.endpoint) {
			one.cut(errRelayPolicy)
		}
	}
}

func (r *relay) carry(ctx context.Context, one *relayed, stream api.ProxyReport_RelayServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := r.admit(one, first.GetEndpoint()); err != nil {
		return err
	}
	conn, err := r.dial(ctx, first.GetEndpoint())
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	r.mu.Lock()
	one.address = conn.RemoteAddr().String()
	r.mu.Unlock()
	if err := stream.Send(&api.RelayFrame{}); err != nil {
		return err
	}
	up := make(chan error, 1)
	go func() { up <- r.carryUp(one, stream, conn) }()
	down := make(chan error, 1)
	go func() { down <- r.carryDown(one, stream, conn) }()
	select {
	case err := <-down: // whoever asked has its answer, or there will be none
		return err
	case err := <-up:
		if err != nil {
			return err
		}
	}
	return <-down
}

// carryUp ends without an error where the proxy has nothing more to say.
func (r *relay) carryUp(one *relayed, stream api.ProxyReport_RelayServer, conn *net.TCPConn) error {
	for {
		frame, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return conn.CloseWrite()
		}
		if err != nil {
			return err
		}
		if one.up.Add(int64(len(frame.GetData()))) > r.limits.bytes {
			return errRelayBytes
		}
		if _, err := conn.Write(frame.GetData()); err != nil {
			return status.Error(codes.Unavailable, err.Error())
		}
		if frame.GetEnd() {
			return conn.CloseWrite()
		}
	}
}

func (r *relay) carryDown(one *relayed, stream api.ProxyReport_RelayServer, conn *net.TCPConn) error {
	buffer := make([]byte, 32<<10)
	for {
		n, err := conn.Read(buffer)
		if one.down.Add(int64(n)) > r.limits.bytes {
			return errRelayBytes
		}
		if n > 0 {
			if err := stream.Send(&api.RelayFrame{Data: buffer[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return stream.Send(&api.RelayFrame{End: true})
		}
		if err != nil {
			return status.Error(codes.Unavailable, err.Error())
		}
	}
}

// dial resolves the endpoint itself, so that what is checked is what is dialled.
func (r *relay) dial(ctx context.Context, endpoint string) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, r.limits.dial)
	defer cancel()
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil {
		return nil, err
	}
	addresses, err := resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, a := range addresses {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(a.String(), port))
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// resolve gives the addresses of a host. A name, which is as good as the DNS, leads to nothing that only the node itself
// should reach; whoever wants that writes the address into policy.
func resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	allowed := slices.DeleteFunc(slices.Clone(found), nodeOnly)
	if len(allowed) == 0 {
		return nil, fmt.Errorf("%s has the addresses %v, which are the node's own, link-local or a cloud's metadata: "+
			"an endpoint there must be listed by its address", host, found)
	}
	return allowed, nil
}

// nat64 is the prefix of IPv4 addresses written as IPv6 ones, RFC 6052.
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// metadata are addresses at which clouds tell a node its secrets, as far as they are not link-local.
var metadata = []netip.Addr{
	netip.MustParseAddr("100.100.100.200"), netip.MustParseAddr("168.63.129.16"), netip.MustParseAddr("192.0.0.192"),
	netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("fd20:ce::254"),
}

func nodeOnly(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if nat64.Contains(a) {
		raw := a.As16()
		a = netip.AddrFrom4([4]byte(raw[12:]))
	}
	return !a.IsGlobalUnicast() || slices.Contains(metadata, a)
}
