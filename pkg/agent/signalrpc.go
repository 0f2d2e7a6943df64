package agent

import (
	"context"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/signal"
	"google.golang.org/grpc/peer"
)

// Signal takes what a source says about grants.
func (o *operators) Signal(ctx context.Context, req *api.SignalRequest) (*api.SignalReply, error) {
	s := signal.Signal{Source: req.GetSource(), UID: callerUID(ctx), Reason: plain(req.GetReason()), Until: req.GetUntil().AsTime(),
		About:  signal.About{Grant: req.GetGrant(), Requester: req.GetRequester(), Service: req.GetService()},
		Effect: signal.Effect{Revoke: req.GetRevoke(), Budget: budgetFrom(req.GetBudget())}}
	if req.GetEnd() != nil {
		s.Effect.End = req.GetEnd().AsTime()
	}
	if text := req.GetClients(); text != "" {
		var r policy.AddressRange
		if err := r.UnmarshalText([]byte(text)); err != nil {
			return nil, toStatus(&policy.Error{Field: "clients", Msg: err.Error(), Hint: "write 10.1.0.2 or 10.1.0.0/24"})
		}
		s.About.Clients = r.Prefix
	}
	concerned, err := o.grants.Signal(ctx, s, caller(ctx))
	if err != nil {
		return nil, toStatus(err)
	}
	return &api.SignalReply{Grants: concerned}, nil
}

// callerUID is the user whom the kernel vouches for; without one it is nobody's.
func callerUID(ctx context.Context) uint32 {
	if p, ok := peer.FromContext(ctx); ok {
		if cred, ok := p.AuthInfo.(peerCred); ok {
			return cred.Uid
		}
	}
	return 1<<32 - 1
}
