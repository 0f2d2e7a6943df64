package agent

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Caller tells the proxy whose socket a connection comes from that it has taken, and of one to a remote service by which certificates
// its workload is known. That the broker gives that workload no identity is an error then: PermissionDenied.
func (r *reports) Caller(ctx context.Context, q *api.CallerRequest) (*api.CallerReply, error) {
	c, err := readConnection(q)
	if err != nil {
		return nil, err
	}
	if r.sink.callers == nil {
		return nil, status.Error(codes.Unavailable, "nobody looks at callers yet")
	}
	found, told := r.sink.callers.who(ctx, c.client, c.server)
	reply := &api.CallerReply{}
	if r.originations != nil {
		as, err := readIdentity(q.GetIdentity())
		if err != nil {
			return nil, err
		}
		if reply.Chain, err = r.originations.chain(c, found, told, as); err != nil {
			return nil, err
		}
	}
	reply.Caller = audit.WorkloadToAPI(told)
	return reply, nil
}

// readIdentity gives zero for none.
func readIdentity(text string) (spiffeid.ID, error) {
	if text == "" {
		return spiffeid.ID{}, nil
	}
	id, err := spiffeid.FromString(text)
	if err != nil {
		return spiffeid.ID{}, status.Errorf(codes.InvalidArgument, "identity %q: want a SPIFFE ID", plain(text))
	}
	return id, nil
}

func readConnection(q *api.CallerRequest) (connection, error) {
	client, err := netip.ParseAddrPort(q.GetClient())
	if err != nil {
		return connection{}, status.Errorf(codes.InvalidArgument, "client %q: want address:port", plain(q.GetClient()))
	}
	server, err := netip.ParseAddrPort(q.GetServer())
	if err != nil {
		return connection{}, status.Errorf(codes.InvalidArgument, "server %q: want address:port", plain(q.GetServer()))
	}
	if q.GetProtocol() != datapath.TCP.String() {
		return connection{}, status.Errorf(codes.InvalidArgument, "protocol %q: %s; want tcp", plain(q.GetProtocol()), whyDatagrams)
	}
	return connection{plainAddr(client), plainAddr(server)}, nil
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
