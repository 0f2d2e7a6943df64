package client

import (
	"context"
	"fmt"
	"iter"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Agent is a client of one node's agent. All methods may be called at the same time; errors are
// *CallError.
type Agent struct {
	conn *connection
	rpc  api.AgentClient
}

// NewAgent makes a client of the agent that listens on the Unix socket. It does not dial; the
// agent knows the caller by its process's credentials. The caller closes it.
func NewAgent(socket string) (*Agent, error) {
	conn, err := connect("unix:"+socket, insecure.NewCredentials())
	if err != nil {
		return nil, err
	}
	return &Agent{conn: conn, rpc: api.NewAgentClient(conn)}, nil
}

// Close frees the connection. Calls under way end with an error.
func (a *Agent) Close() error { return a.conn.Close() }

// Status tells how the agent and its enforcement are.
func (a *Agent) Status(ctx context.Context) (*api.StatusReply, error) {
	return unary(ctx, a.conn, "read status", a.rpc.Status, &api.StatusRequest{})
}

// Services lists the protected services that the node enforces.
func (a *Agent) Services(ctx context.Context) (*api.ServicesReply, error) {
	return unary(ctx, a.conn, "list services", a.rpc.Services, &api.ServicesRequest{})
}

// Canaries tells what canaries saw of each enforced port. With now they try them all first.
func (a *Agent) Canaries(ctx context.Context, now bool) (*api.CanariesReply, error) {
	return unary(ctx, a.conn, "ask the canaries", a.rpc.Canaries, &api.CanariesRequest{Now: now})
}

// Coverage tells how far each service is protected, and what shows it.
func (a *Agent) Coverage(ctx context.Context) (*api.CoverageReply, error) {
	return unary(ctx, a.conn, "ask for coverage", a.rpc.Coverage, &api.CoverageRequest{})
}

// Paths lists the kernel's paths, live and ended.
func (a *Agent) Paths(ctx context.Context) (*api.PathsReply, error) {
	return unary(ctx, a.conn, "list paths", a.rpc.Paths, &api.PathsRequest{})
}

// Grants lists the grants that were activated on the node.
func (a *Agent) Grants(ctx context.Context) (*api.GrantsReply, error) {
	return unary(ctx, a.conn, "list grants", a.rpc.Grants, &api.GrantsRequest{})
}

// Grant finds one grant by its id. It gives ErrNotFound if the node never activated it.
func (a *Agent) Grant(ctx context.Context, id string) (*api.Grant, error) {
	reply, err := a.Grants(ctx)
	if err != nil {
		return nil, err
	}
	for _, g := range reply.Grants {
		if g.GetId() == id {
			return g, nil
		}
	}
	return nil, a.conn.translate("show grant", status.Error(codes.NotFound, fmt.Sprintf("no grant %q on this node", id)))
}

// Challenge asks the node for a challenge to answer, in JSON.
func (a *Agent) Challenge(ctx context.Context) ([]byte, error) {
	reply, err := unary(ctx, a.conn, "ask for a challenge", a.rpc.Challenge, &api.ChallengeRequest{})
	return reply.GetChallenge(), err
}

// Activate hands over a grant's DSSE envelope, with its requester's answer to a challenge of the node. When it returns, the
// path is open.
func (a *Agent) Activate(ctx context.Context, envelope, answer []byte) (*api.Grant, error) {
	reply, err := unary(ctx, a.conn, "activate grant", a.rpc.Activate, &api.ActivateRequest{Envelope: envelope, Answer: answer})
	return reply.GetGrant(), err
}

// State hands over a statement about a grant, with the grant's envelope where the node never activated it. When it returns,
// the statement is durable there. The grant is nil where the node never activated it.
func (a *Agent) State(ctx context.Context, statement, envelope []byte) (*api.Grant, error) {
	reply, err := unary(ctx, a.conn, "record statement", a.rpc.State, &api.StateRequest{Statement: statement, Envelope: envelope})
	return reply.GetGrant(), err
}

// Vouch hands over somebody's word for the node's clock and records.
func (a *Agent) Vouch(ctx context.Context, statement []byte) error {
	_, err := unary(ctx, a.conn, "vouch for the node", a.rpc.Vouch, &api.VouchRequest{Statement: statement})
	return err
}

// Rollouts tells how far roll-outs have come on the node; an empty name is all of them.
func (a *Agent) Rollouts(ctx context.Context, name string) (*api.RolloutsReply, error) {
	return unary(ctx, a.conn, "read roll-outs", a.rpc.Rollouts, &api.RolloutsRequest{Name: name})
}

// StateRollout hands over a signed word about a roll-out. When it returns, it is durable there.
func (a *Agent) StateRollout(ctx context.Context, statement []byte) (*api.Rollout, error) {
	reply, err := unary(ctx, a.conn, "state roll-out", a.rpc.StateRollout, &api.StateRolloutRequest{Statement: statement})
	return reply.GetRollout(), err
}

// HaltRollout lets no wave of a roll-out begin on the node, or of any for an empty name. It gives those that it stopped.
func (a *Agent) HaltRollout(ctx context.Context, name, why string) ([]string, error) {
	reply, err := unary(ctx, a.conn, "halt roll-out", a.rpc.HaltRollout, &api.HaltRolloutRequest{Name: name, Why: why})
	return reply.GetHalted(), err
}

// Revoke ends a grant. When it returns, its paths are closed.
func (a *Agent) Revoke(ctx context.Context, id, why string) (*api.Grant, error) {
	reply, err := unary(ctx, a.conn, "revoke grant", a.rpc.Revoke, &api.RevokeRequest{Grant: id, Why: why})
	return reply.GetGrant(), err
}

// Explain tells what would happen to a new connection, and why.
func (a *Agent) Explain(ctx context.Context, q *api.ExplainRequest) (*api.ExplainReply, error) {
	return unary(ctx, a.conn, "explain", a.rpc.Explain, q)
}

// Flows gives the flow records in the agent's memory that match q, in the collector's form but
// with no node, epoch, sequence or time of receipt: the newest q.Limit of them, oldest first, or
// all for 0. With q.Follow it begins with those of the newest q.Limit records that match, and
// goes on until ctx ends.
func (a *Agent) Flows(ctx context.Context, q *api.FlowQuery) iter.Seq2[*api.StoredFlow, error] {
	if q.GetFollow() {
		return a.matching(ctx, q, &api.AgentFlowsRequest{Follow: true, Limit: q.GetLimit()})
	}
	return newest(q.GetLimit(), a.matching(ctx, q, &api.AgentFlowsRequest{}))
}

// matching chooses on our side: the agent does not.
func (a *Agent) matching(ctx context.Context, q *api.FlowQuery, request *api.AgentFlowsRequest) iter.Seq2[*api.StoredFlow, error] {
	return func(yield func(*api.StoredFlow, error) bool) {
		for record, err := range streaming(ctx, a.conn, "read flows", a.rpc.Flows, request) {
			if err != nil {
				yield(nil, err)
				return
			}
			if MatchFlow(q, record) && !yield(&api.StoredFlow{Flow: record}, nil) {
				return
			}
		}
	}
}

// newest gives the last n of a sequence that ends, or all for 0. An error comes in place of them.
func newest[T any](n uint32, all iter.Seq2[T, error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var kept []T
		for one, err := range all {
			if err != nil {
				yield(one, err)
				return
			}
			if kept = append(kept, one); n > 0 && len(kept) > int(n) {
				kept = kept[1:]
			}
		}
		for _, one := range kept {
			if !yield(one, nil) {
				return
			}
		}
	}
}
