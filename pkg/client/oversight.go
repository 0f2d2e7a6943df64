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
