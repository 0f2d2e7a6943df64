package agent

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Caller tells the proxy whose socket a connection that it has just taken comes from. Our proxy does not ask yet: nobody is let in by
// the answer.
func (r *reports) Caller(ctx context.Context, q *api.CallerRequest) (*api.CallerReply, error) {
	client, err := netip.ParseAddrPort(q.GetClient())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "client %q: want address:port", plain(q.GetClient()))
	}
	server, err := netip.ParseAddrPort(q.GetServer())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "server %q: want address:port", plain(q.GetServer()))
	}
	if q.GetProtocol() != datapath.TCP.String() {
		return nil, status.Errorf(codes.InvalidArgument, "protocol %q: %s; want tcp", plain(q.GetProtocol()), whyDatagrams)
	}
	if r.sink.callers == nil {
		return nil, status.Error(codes.Unavailable, "nobody looks at callers yet")
	}
	return &api.CallerReply{Caller: audit.WorkloadToAPI(r.sink.callers.who(ctx, plainAddr(client), plainAddr(server)))}, nil
}

// plainAddr makes an IPv4 address one that is not mapped.
func plainAddr(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// describeCallers adds to the state of the agent's own identity how many callers of this node were attested.
func describeCallers(own string, attested, unattested uint64) string {
	if attested+unattested == 0 {
		return own
	}
	return fmt.Sprintf("%s; connections of this node: %d attested, %d unattested", own, attested, unattested)
}
