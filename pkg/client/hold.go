package client

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

const (
	// takeUpFor is how long a path without its stream is tried to be taken up again. An agent that was restarted, or has not
	// noticed that the stream is broken, closes the path within 15 s, and says so then.
	takeUpFor   = 20 * time.Second
	takeUpEvery = 250 * time.Millisecond
)

// Hold is a path that an agent opened for us, and keeps while we hold it.
type Hold struct {
	conn   *connection
	opened *api.PathOpened
	cancel context.CancelFunc
	done   chan struct{}

	mu     sync.Mutex
	stream api.Automation_HoldClient // guarded by mu
	given  bool                      // guarded by mu; we gave it back
	why    string                    // read after done is closed
	lost   error                     // read after done is closed; nobody said that the path is closed
}

// OpenHold asks the agent at address, host:port, for a path, with the credentials of our SPIFFE identity. When it returns
// without error the path is open. The caller closes the hold; ctx bounds only the asking. Errors are *CallError.
func OpenHold(ctx context.Context, address string, creds credentials.TransportCredentials, request *api.PathRequest) (*Hold, error) {
	conn, err := connect(address, creds, grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}))
	if err != nil {
		return nil, err
	}
	holding, cancel := context.WithCancel(context.WithoutCancel(ctx))
	h := &Hold{conn: conn, cancel: cancel, done: make(chan struct{})}
	stop := context.AfterFunc(ctx, cancel)
	h.stream, h.opened, err = h.ask(holding, &api.HoldRequest{Want: &api.HoldRequest_Path{Path: request}})
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		if cause := ctx.Err(); cause != nil {
			err = status.FromContextError(cause).Err()
		}
		cancel()
		return nil, errors.Join(conn.translate("open path", err), conn.Close())
	}
	go h.follow(holding)
	return h, nil
}

// Opened tells what was opened.
func (h *Hold) Opened() *api.PathOpened { return h.opened }

// Done is closed when the path has ended, or nobody can say any more whether it has.
func (h *Hold) Done() <-chan struct{} { return h.done }

// Why tells, after Done, how the path ended, in the agent's words.
func (h *Hold) Why() string { <-h.done; return h.why }

// Close gives the path back. It is closed when Close returns without error. A path that has ended is no error; that the agent could
// not be asked, or could not close it, is one.
func (h *Hold) Close(ctx context.Context) error {
	h.mu.Lock()
	h.given = true
	err := h.stream.CloseSend()
	h.mu.Unlock()
	select {
	case <-h.done:
	case <-ctx.Done():
		err = h.conn.translate("give path back", status.FromContextError(ctx.Err()).Err())
	}
	h.cancel()
	<-h.done
	if err == nil {
		err = h.lost
	}
	return errors.Join(err, h.conn.Close())
}

// ask begins a stream and waits for its first word.
func (h *Hold) ask(ctx context.Context, request *api.HoldRequest) (api.Automation_HoldClient, *api.PathOpened, error) {
	stream, err := api.NewAutomationClient(h.conn).Hold(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) { // io.EOF: Recv says why
		return nil, nil, err
	}
	reply, err := stream.Recv()
	if err == nil && reply.GetOpened() == nil {
		err = status.Error(codes.Internal, "the agent's first word is not that the path is open")
	}
	return stream, reply.GetOpened(), err
}

// follow waits for the end of the path, also across a restart of the agent.
func (h *Hold) follow(ctx context.Context) {
	defer close(h.done)
	for {
		reply, err := h.stream.Recv()
		if err == nil && reply.GetEnded() != nil {
			h.why = reply.GetEnded().GetWhy()
			return
		}
		if err == nil {
			continue
		}
		if h.isGiven() || ctx.Err() != nil {
			h.why = "given back"
			if !errors.Is(err, io.EOF) {
				h.lost = h.conn.translate("give path back", err)
			}
			return
		}
		if err := h.takeUp(ctx); err != nil {
			lost := h.conn.translate("hold path", err)
			if h.why = lost.Error(); status.Code(err) != codes.NotFound { // else the agent says that it is over
				h.lost = lost
			}
			return
		}
	}
}

// takeUp tries to hold the path again.
func (h *Hold) takeUp(ctx context.Context) error {
	for end := time.Now().Add(takeUpFor); ; {
		stream, _, err := h.ask(ctx, &api.HoldRequest{Want: &api.HoldRequest_Grant{Grant: h.opened.GetGrant()}})
		if err == nil {
			h.swap(stream)
			return nil
		}
		passes := status.Code(err) == codes.Unavailable || status.Code(err) == codes.ResourceExhausted // others ask again, too
		if !passes || h.isGiven() || time.Now().After(end) {
			return err
		}
		select {
		case <-time.After(takeUpEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (h *Hold) isGiven() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.given
}

// swap puts a new stream in the place of the broken one.
func (h *Hold) swap(stream api.Automation_HoldClient) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stream = stream
	if h.given {
		_ = stream.CloseSend() // else the agent takes it for held
	}
}
