package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"google.golang.org/grpc/codes"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

var (
	// ErrMayNotRevoke says that this node ends no grant on the collector's word.
	ErrMayNotRevoke = errors.New("this node ends no grant on the collector's word")
	// ErrStarting says that the agent does not know its grants yet.
	ErrStarting = errors.New("the agent is just starting")
)

// viaCollector marks an actor in the record whom only the collector has seen.
const viaCollector = " via collector"

// acts does what somebody at the collector wants ended. It only ever takes. The stream by which acts come is to the collector of the
// configuration, proven by mTLS (audit); whom it names is its word alone.
type acts struct {
	mayRevoke bool
	log       *slog.Logger
	grants    atomic.Pointer[grants] // nil until they are adopted
}

// do answers when what is asked for is durable and done, as operators are answered on the node.
func (a *acts) do(ctx context.Context, act *api.Act) *api.Acted {
	actor := plain(act.GetActor()) + viaCollector
	row, err := a.take(ctx, act, actor)
	if err != nil {
		a.log.InfoContext(ctx, "act refused", "actor", actor, "err", err)
		return &api.Acted{Code: uint32(codeOf(err)), Refusal: Describe(err)}
	}
	acted := &api.Acted{Code: uint32(codes.OK)}
	if row != nil {
		p, _ := readPayload(*row) // one that cannot be read says so
		acted.Grant = describeRow(*row, p)
	}
	return acted
}

func (a *acts) take(ctx context.Context, act *api.Act, actor string) (*store.GrantRow, error) {
	g := a.grants.Load()
	if g == nil {
		return nil, ErrStarting
	}
	if r := act.GetRevoke(); r != nil {
		return a.revoke(ctx, g, r, actor)
	}
	return g.State(ctx, act.GetStatement(), act.GetEnvelope(), actor) // who says so has signed it
}

// revoke says of a grant that is over how it ended: the answer to an earlier asking may have been lost on its way.
func (a *acts) revoke(ctx context.Context, g *grants, r *api.Revocation, actor string) (*store.GrantRow, error) {
	id := plain(r.GetGrant())
	if !a.mayRevoke {
		return nil, fmt.Errorf("revoke %q: %w", id, ErrMayNotRevoke)
	}
	row, err := g.Revoke(ctx, id, plain(r.GetWhy()), actor)
	if errors.Is(err, ErrNoGrant) {
		if before, read := g.store.Grant(ctx, id); read == nil && before.State != store.StateActive {
			err = fmt.Errorf("revoke %q: it is %s: %s: %w", id, before.State, before.EndedWhy, store.ErrEnded)
		}
	}
	return &row, err
}
