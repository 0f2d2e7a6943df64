package collector

import (
	"context"
	"io"

	"google.golang.org/grpc"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// inside is a client of an Audit service in this process: what the service decides by the context of a call, it decides by that of
// whoever calls it here.
type inside struct{ service api.AuditServer }

// Flows, and what follows it, are those of the service.
func (i inside) Flows(ctx context.Context, r *api.FlowQuery, _ ...grpc.CallOption) (grpc.ServerStreamingClient[api.StoredFlow], error) {
	return pull(ctx, r, i.service.Flows), nil
}

func (i inside) GrantEvents(ctx context.Context, r *api.GrantQuery, _ ...grpc.CallOption) (grpc.ServerStreamingClient[api.StoredGrantEvent], error) {
	return pull(ctx, r, i.service.GrantEvents), nil
}

func (i inside) Losses(ctx context.Context, r *api.LossQuery, _ ...grpc.CallOption) (grpc.ServerStreamingClient[api.StoredLoss], error) {
	return pull(ctx, r, i.service.Losses), nil
}

func (i inside) Tides(ctx context.Context, r *api.TideQuery, _ ...grpc.CallOption) (grpc.ServerStreamingClient[api.StoredTide], error) {
	return pull(ctx, r, i.service.Tides), nil
}

func (i inside) Evidence(ctx context.Context, r *api.EvidenceRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[api.EvidenceChunk], error) {
	return pull(ctx, r, i.service.Evidence), nil
}

func (i inside) Nodes(ctx context.Context, r *api.NodesRequest, _ ...grpc.CallOption) (*api.NodesReply, error) {
	return i.service.Nodes(ctx, r)
}

func (i inside) Log(ctx context.Context, r *api.LogRequest, _ ...grpc.CallOption) (*api.LogReply, error) {
	return i.service.Log(ctx, r)
}

func (i inside) Act(ctx context.Context, r *api.ActRequest, _ ...grpc.CallOption) (*api.ActReply, error) {
	return i.service.Act(ctx, r)
}

// sending is the service's end of a stream, and receiving the caller's. The service's ends when the context does.
type sending[M any] struct {
	grpc.ServerStream
	ctx context.Context
	out chan<- *M
}

type receiving[M any] struct {
	grpc.ClientStream
	in  <-chan *M
	end *error // set before in is closed
}

func pull[Q, M any](ctx context.Context, q *Q, serve func(*Q, grpc.ServerStreamingServer[M]) error) receiving[M] {
	between, end := make(chan *M), new(error)
	go func() {
		defer close(between)
		if *end = serve(q, sending[M]{ctx: ctx, out: between}); *end == nil {
			*end = io.EOF
		}
	}()
	return receiving[M]{in: between, end: end}
}

// Context is the caller's.
func (s sending[M]) Context() context.Context { return s.ctx }

// Send hands a message over, or gives up with the caller.
func (s sending[M]) Send(m *M) error {
	select {
	case s.out <- m:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// Recv takes the next message. At the end it is io.EOF, or what the service said.
func (r receiving[M]) Recv() (*M, error) {
	if m, ok := <-r.in; ok {
		return m, nil
	}
	return nil, *r.end
}
