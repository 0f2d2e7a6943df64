package client

import (
	"context"
	"errors"
	"iter"
	"strings"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Audit is a client of a collector's Audit service. All methods may be called at the same time;
// errors are *CallError. The sequences end with what the collector holds, or with ctx when the
// query follows.
type Audit struct {
	conn *connection
	rpc  api.AuditClient
}

// NewAudit makes a client of the collector at address: unix:PATH, where the collector knows the
// caller by its process's credentials and creds is nil, or host:port with the credentials of a
// SPIFFE identity. It does not dial. The caller closes it.
func NewAudit(address string, creds credentials.TransportCredentials) (*Audit, error) {
	local := strings.HasPrefix(address, "unix:")
	if !local && creds == nil {
		return nil, errors.New("connect to collector: a network address needs an identity")
	}
	if local {
		creds = insecure.NewCredentials()
	}
	conn, err := connect(address, creds)
	if err != nil {
		return nil, err
	}
	return &Audit{conn: conn, rpc: api.NewAuditClient(conn)}, nil
}

// Service is the collector's interface as it is, whose errors are gRPC's. It lives as long as the client.
func (a *Audit) Service() api.AuditClient { return a.rpc }

// Close frees the connection.
func (a *Audit) Close() error { return a.conn.Close() }

// Flows gives the stored flow records that match.
func (a *Audit) Flows(ctx context.Context, q *api.FlowQuery) iter.Seq2[*api.StoredFlow, error] {
	return streaming(ctx, a.conn, "read flows", a.rpc.Flows, q)
}

// GrantEvents gives the stored grant events that match.
func (a *Audit) GrantEvents(ctx context.Context, q *api.GrantQuery) iter.Seq2[*api.StoredGrantEvent, error] {
	return streaming(ctx, a.conn, "read grant events", a.rpc.GrantEvents, q)
}

// Losses gives the stored losses: what is missing from the log, and where it went.
func (a *Audit) Losses(ctx context.Context, q *api.LossQuery) iter.Seq2[*api.StoredLoss, error] {
	return streaming(ctx, a.conn, "read losses", a.rpc.Losses, q)
}

// Tides gives the stored tides that match: how far the kernel's counters came, beside what the records say.
func (a *Audit) Tides(ctx context.Context, q *api.TideQuery) iter.Seq2[*api.StoredTide, error] {
	return streaming(ctx, a.conn, "read tides", a.rpc.Tides, q)
}

// Nodes gives what the collector has of each sequence of each node.
func (a *Audit) Nodes(ctx context.Context) (*api.NodesReply, error) {
	return unary(ctx, a.conn, "read nodes", a.rpc.Nodes, &api.NodesRequest{})
}

// Log gives the collector's latest checkpoint, with the proof that the log has all that it had at a size; 0 asks for no proof. The caller
// holds it against the log's key (pkg/proof).
func (a *Audit) Log(ctx context.Context, from uint64) (*api.LogReply, error) {
	return unary(ctx, a.conn, "read log", a.rpc.Log, &api.LogRequest{From: from})
}

// Evidence gives a bundle piece by piece, for proof.Verify.
func (a *Audit) Evidence(ctx context.Context, r *api.EvidenceRequest) iter.Seq2[*api.EvidenceChunk, error] {
	return streaming(ctx, a.conn, "read evidence", a.rpc.Evidence, r)
}

// Revoke has a node end a grant, by way of the collector. When it returns without error, the grant's paths are closed there.
func (a *Audit) Revoke(ctx context.Context, node, id, why string) (*api.Grant, error) {
	reply, err := unary(ctx, a.conn, "revoke grant", a.rpc.Act, &api.ActRequest{Node: node, What: &api.ActRequest_Revoke{Revoke: &api.Revocation{Grant: id, Why: why}}})
	return reply.GetGrant(), err
}

// State hands a statement about a grant to a node, by way of the collector, with the grant's envelope where that node may never have activated
// it. When it returns without error, the statement is durable there. The grant is nil where the node never activated it.
func (a *Audit) State(ctx context.Context, node string, statement, envelope []byte) (*api.Grant, error) {
	reply, err := unary(ctx, a.conn, "record statement", a.rpc.Act, &api.ActRequest{Node: node, What: &api.ActRequest_Statement{Statement: statement}, Envelope: envelope})
	return reply.GetGrant(), err
}
