package agent

import (
	"context"
	"math"
	"net/netip"
	"slices"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Live tells by which grant a client could go around the proxy now, for another proxy that already has its request.
func (r *reports) Live(_ context.Context, q *api.LiveRequest) (*api.LiveReply, error) {
	client, err := netip.ParseAddrPort(q.GetClient())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "client %q: want address:port", plain(q.GetClient()))
	}
	if q.GetPort() == 0 || q.GetPort() > math.MaxUint16 {
		return nil, status.Errorf(codes.InvalidArgument, "port %d: want one of the service's", q.GetPort())
	}
	if r.live == nil {
		return nil, status.Error(codes.Unavailable, "nobody looks after grants yet")
	}
	id, err := r.live(q.GetService(), plainAddr(client), uint16(q.GetPort()))
	if err != nil {
		return nil, toStatus(err)
	}
	return &api.LiveReply{Grant: id}, nil
}

// liveFor finds a grant whose path is live for the client and the port of the service; empty: there is none. The kernel's state counts,
// as it does for packets.
func (g *grants) liveFor(service string, client netip.AddrPort, port uint16) (string, error) {
	for _, slot := range g.goodElsewhere(clientOf{service, client.Addr()}) {
		p, err := g.datapath.Path(slot.number)
		if err != nil {
			return "", err
		}
		if p.Grant == slot.grant && p.State == datapath.PathActive && p.Client == client.Addr() &&
			slices.Contains(p.Ports, port) && g.clock.boot() < p.Deadline {
			return slot.grant, nil
		}
	}
	return "", nil
}

// slotOf is a slot in which a grant has had a path.
type slotOf struct {
	grant  string
	number uint32
}

// goodElsewhere lists where the client's paths are that another proxy may go by. What they are is asked of the kernel without the lock:
// questions of every request would hold up who ends a grant.
func (g *grants) goodElsewhere(c clientOf) (slots []slotOf) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, h := range g.serving[c] {
		if !h.elsewhere() {
			continue
		}
		for _, n := range h.row.Slots {
			slots = append(slots, slotOf{h.row.ID, n})
		}
	}
	return slots
}

// elsewhere tells whether a grant is good for what another proxy carries: the kernel sees no packet of it that it could count, nor
// the device or the socket that it comes from.
func (h *held) elsewhere() bool {
	l := h.live()
	return h.over == nil && h.payload.Binding == policy.BindingAddress && l.budget == datapath.Budget{} &&
		l.ingress == datapath.IngressAny && l.port == 0 && l.cgroup == 0
}
