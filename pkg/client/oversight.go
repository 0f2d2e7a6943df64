package client

import (
	"context"

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
