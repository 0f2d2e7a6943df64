package audit

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

const (
	actsWaiting = 16        // that a collector may ask for ahead
	maxAct      = 160 << 10 // bytes: a statement, an envelope and who asks
	actPatience = 20 * time.Second
	// A collector that asks for more has the rest wait: signatures cost time, and a taken-over one may ask without end.
	actsPerSecond, actsAtOnce = 50, 100
)

// order is an act that came by a stream.
type order struct {
	act     *api.Act
	stream  context.Context // when it is over, nobody hears the answer
	answers chan<- *api.Acted
}

// answer drops what a stream is behind with: more than a collector of ours asks for at a time.
func (o order) answer(a *api.Acted) {
	a.Id = o.act.GetId()
	select {
	case o.answers <- a:
	default:
	}
}

// order has an act done, or refuses it, and does not wait: acknowledgements come by the same stream. Who asks has proven to be the
// collector of our configuration, or there would be no stream (connect).
func (ss *session) order(ctx context.Context, act *api.Act) {
	o := order{act, ctx, ss.answers}
	switch {
	case ss.cfg.Act == nil:
		o.answer(refuse(codes.FailedPrecondition, "nothing is taken from a collector here"))
	case act.GetWhat() == nil:
		o.answer(refuse(codes.InvalidArgument, "what is asked for is nothing that this version knows"))
	case proto.Size(act) > maxAct:
		o.answer(refuse(codes.InvalidArgument, fmt.Sprintf("it has %d bytes, the most is %d", proto.Size(act), maxAct)))
	default:
		select {
		case ss.orders <- o:
		default:
			o.answer(refuse(codes.ResourceExhausted, "too much is asked for at a time"))
		}
	}
}

func refuse(code codes.Code, words string) *api.Acted {
	return &api.Acted{Code: uint32(code), Refusal: words}
}

// runActs does one after the other. What was begun is brought to its end; what waits when its stream ends is not begun.
func (s *Streamer) runActs(ctx context.Context) {
	pace := rate.NewLimiter(actsPerSecond, actsAtOnce)
	for pace.Wait(ctx) == nil {
		select {
		case o := <-s.orders:
			if o.stream.Err() == nil {
				o.answer(s.act(ctx, o.act))
			}
		case <-ctx.Done():
			return
		}
	}
}

func (s *Streamer) act(ctx context.Context, act *api.Act) *api.Acted {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), actPatience)
	defer cancel()
	return s.cfg.Act(ctx, act)
}
