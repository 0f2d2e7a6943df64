package client

import (
	"context"
	"iter"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Panic ends every path of the node, and tells how many there were. When it returns, they are closed, and none is opened
// until LiftPanic.
func (a *Agent) Panic(ctx context.Context, why string) (*api.PanicReply, error) {
	return unary(ctx, a.conn, "panic", a.rpc.Panic, &api.PanicRequest{Why: why})
}

// LiftPanic lets paths be opened again. It gives ErrForbidden to whoever is not root, and ErrNotFound where no panic stands.
func (a *Agent) LiftPanic(ctx context.Context, why string) error {
	_, err := unary(ctx, a.conn, "lift panic", a.rpc.LiftPanic, &api.LiftPanicRequest{Why: why})
	return err
}

// WatchGrants gives what the active grants do, at once and then after each interval, until ctx ends.
func (a *Agent) WatchGrants(ctx context.Context, every time.Duration) iter.Seq2[*api.WatchFrame, error] {
	return streaming(ctx, a.conn, "watch grants", a.rpc.WatchGrants, &api.WatchGrantsRequest{Every: durationpb.New(every)})
}

// UsedGrants compares, for every grant that the node activated, what was granted with what was used.
func (a *Agent) UsedGrants(ctx context.Context) (*api.UsedGrantsReply, error) {
	return unary(ctx, a.conn, "compare grants with their use", a.rpc.UsedGrants, &api.UsedGrantsRequest{})
}

// Signal hands over what a source says about grants, and gives the active ones that it concerns. When it returns, what
// it takes is taken.
func (a *Agent) Signal(ctx context.Context, s *api.SignalRequest) ([]string, error) {
	reply, err := unary(ctx, a.conn, "signal", a.rpc.Signal, s)
	return reply.GetGrants(), err
}
