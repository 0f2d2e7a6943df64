package collector

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

const (
	actWithin  = 30 * time.Second // for the node's answer
	maxActs    = 16               // under way to one node
	maxSigned  = 64 << 10         // bytes of a statement, and of an envelope: nodes look at no larger one
	maxGrantID = 64
	maxWhy     = 1024
	maxRefusal = 8 << 10 // bytes of a node's words that are passed on
)

// acts are what a node was asked for and has not answered. Safe for concurrent use.
type acts struct {
	taken bool          // by the node, at all
	out   chan *api.Act // to the stream's goroutine

	mu      sync.Mutex
	last    uint64                     // id that was given out; guarded by mu
	waiting map[uint64]chan *api.Acted // by id; guarded by mu
}

func newActs(taken bool) *acts {
	return &acts{taken: taken, out: make(chan *api.Act), waiting: map[uint64]chan *api.Acted{}}
}

// begin gives an act its id, and where its answer comes. The caller calls end.
func (a *acts) begin() (uint64, <-chan *api.Acted, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.waiting) >= maxActs {
		return 0, nil, false
	}
	a.last++
	answer := make(chan *api.Acted, 1)
	a.waiting[a.last] = answer
	return a.last, answer, true
}

func (a *acts) end(id uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.waiting, id)
}

// answer hands over the first answer to an act. A second one, and one that nobody waits for, says nothing.
func (a *acts) answer(acted *api.Acted) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if answer, ok := a.waiting[acted.GetId()]; ok {
		answer <- acted
		delete(a.waiting, acted.GetId())
	}
}

// Act has a node do what a caller wants ended.
func (q *query) Act(ctx context.Context, r *api.ActRequest) (*api.ActReply, error) {
	return q.acts(ctx, r)
}

// actsOf serves Act for callers of one kind: actor names who was proven, or refuses.
func (g *ingest) actsOf(actor func(context.Context) (string, error)) func(context.Context, *api.ActRequest) (*api.ActReply, error) {
	return func(ctx context.Context, r *api.ActRequest) (*api.ActReply, error) {
		who, err := actor(ctx)
		if err != nil {
			g.log.WarnContext(ctx, "act refused", "node", r.GetNode(), "err", err)
			return nil, err
		}
		act, err := actOf(r, who)
		if err != nil {
			return nil, err
		}
		acted, err := g.act(ctx, r.GetNode(), act)
		if err == nil {
			err = refused(r.GetNode(), acted)
		}
		g.log.InfoContext(ctx, "act", "actor", who, "node", r.GetNode(), "grant", r.GetRevoke().GetGrant(), "why", r.GetRevoke().GetWhy(),
			"statement", len(r.GetStatement()) > 0, "err", err)
		if err != nil {
			return nil, err
		}
		return &api.ActReply{Grant: acted.GetGrant()}, nil
	}
}

// actOf is what the node is told. What the statement says, and who may say it, is the node's to judge.
func actOf(r *api.ActRequest, actor string) (*api.Act, error) {
	act := &api.Act{Actor: actor, Envelope: r.GetEnvelope()}
	var wrong string
	switch what := r.GetWhat().(type) {
	case *api.ActRequest_Revoke:
		act.What = &api.Act_Revoke{Revoke: what.Revoke}
		switch id, why := what.Revoke.GetGrant(), what.Revoke.GetWhy(); {
		case id == "" || len(id) > maxGrantID:
			wrong = "grant: it is named by its id\nhint: `sallyport grants --collector ADDRESS` lists them"
		case strings.TrimSpace(why) == "" || len(why) > maxWhy:
			wrong = fmt.Sprintf("why: for the record it has to be said, in at most %d bytes", maxWhy)
		case len(r.GetEnvelope()) > 0:
			wrong = "envelope: it goes with a statement alone"
		}
	case *api.ActRequest_Statement:
		act.What = &api.Act_Statement{Statement: what.Statement}
		if n := max(len(what.Statement), len(r.GetEnvelope())); len(what.Statement) == 0 || n > maxSigned {
			wrong = fmt.Sprintf("statement: it and its grant have from 1 to %d bytes", maxSigned)
		}
	default:
		wrong = "what: neither a grant to revoke nor a statement"
	}
	if r.GetNode() == "" {
		wrong = "node: none is named"
	}
	if wrong != "" {
		return nil, status.Error(codes.InvalidArgument, wrong)
	}
	return act, nil
}

// act has the node do it, and gives what it says. An error tells whether the node was asked. A stop ends the streams, and this with them.
func (g *ingest) act(ctx context.Context, node string, act *api.Act) (*api.Acted, error) {
	ctx, cancel := context.WithTimeout(ctx, actPatience(ctx))
	defer cancel()
	g.mu.Lock()
	s := g.active[node]
	g.mu.Unlock()
	switch {
	case s == nil:
		return nil, status.Errorf(codes.FailedPrecondition, "node %q is not connected to this collector\nhint: log in to the node: %s", node, onNode(act))
	case !s.acts.taken:
		return nil, status.Errorf(codes.FailedPrecondition, "the agent of node %q is of a version that takes nothing from a collector\nhint: log in to the node: %s", node, onNode(act))
	}
	id, answer, ok := s.acts.begin()
	if !ok {
		return nil, status.Errorf(codes.ResourceExhausted, "node %q was asked for %d things and has not answered\nhint: try again, or log in to the node: %s", node, maxActs, onNode(act))
	}
	defer s.acts.end(id)
	act.Id = id
	select {
	case s.acts.out <- act:
		return s.await(ctx, answer)
	case <-s.gone:
	case <-ctx.Done():
	}
	return nil, status.Errorf(codes.Aborted, "node %q cannot be asked at the moment: nothing was done\nhint: try again, or log in to the node: %s", node, onNode(act))
}

// await gives the answer of a node that was asked.
func (s *session) await(ctx context.Context, answer <-chan *api.Acted) (*api.Acted, error) {
	why := "has not answered in time"
	select {
	case acted := <-answer:
		return acted, nil
	case <-s.gone:
		why = "was cut off before it answered"
	case <-ctx.Done():
	}
	return nil, status.Errorf(codes.Aborted, "node %q %s: it may have done it\nhint: ask again, which does no harm; `sallyport grants --collector ADDRESS --node %s` has its record", s.node, why, s.node)
}

// actPatience is shorter than the caller's, who shall hear how it went.
func actPatience(ctx context.Context) time.Duration {
	if until, ok := ctx.Deadline(); ok {
		return min(actWithin, time.Until(until)*9/10)
	}
	return actWithin
}

// onNode is the same, where no collector is needed.
func onNode(act *api.Act) string {
	if r := act.GetRevoke(); r != nil {
		return "`sallyport grant revoke " + r.GetGrant() + " --why TEXT`"
	}
	return "`sallyport grant record STATEMENT` takes it there"
}

// refused is the node's no, in its words. Other codes than those of a refusal would speak of the collector.
func refused(node string, a *api.Acted) error {
	code := codes.Code(a.GetCode())
	switch code {
	case codes.OK:
		return nil
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition, codes.ResourceExhausted, codes.Internal:
	default:
		code = codes.FailedPrecondition
	}
	words := a.GetRefusal()
	words = strings.ToValidUTF8(words[:min(len(words), maxRefusal)], "")
	return status.Errorf(code, "node %q: %s", node, words)
}

// actor names a caller who may act, or refuses one who may not.
func (p peers) actor(ctx context.Context) (string, error) {
	id, ok := grpccredentials.PeerIDFromContext(ctx)
	if !ok {
		return "", status.Error(codes.Unauthenticated, "no SPIFFE ID proven")
	}
	if !p.actors.has(id) {
		return "", status.Errorf(codes.PermissionDenied, "%s is not among the collector's actors", id)
	}
	return id.String(), nil
}

// localActor names the user at the other end of a Unix socket, who was admitted to it.
func localActor(ctx context.Context) (string, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if cred, ok := p.AuthInfo.(peerCredInfo); ok {
			return fmt.Sprintf("uid:%d@collector", cred.uid), nil
		}
	}
	return "", status.Error(codes.Unauthenticated, "no user proven")
}
