package client_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// server is a real Agent service whose answers are its fields.
type server struct {
	api.UnimplementedAgentServer
	err    error
	flows  []*api.FlowRecord
	grants []*api.Grant
}

func (s *server) Status(context.Context, *api.StatusRequest) (*api.StatusReply, error) {
	return &api.StatusReply{Node: "node-1"}, s.err
}

func (s *server) Grants(context.Context, *api.GrantsRequest) (*api.GrantsReply, error) {
	return &api.GrantsReply{Grants: s.grants}, s.err
}

func (s *server) Flows(r *api.AgentFlowsRequest, stream grpc.ServerStreamingServer[api.FlowRecord]) error {
	begin := 0
	if n := int(r.GetLimit()); n > 0 {
		begin = max(0, len(s.flows)-n)
	}
	for _, f := range s.flows[begin:] {
		if err := stream.Send(f); err != nil {
			return err
		}
	}
	if r.Follow {
		<-stream.Context().Done()
	}
	return s.err
}

func dial(t *testing.T, s *server) *client.Agent {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	api.RegisterAgentServer(g, s)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return agentAt(t, path)
}

func agentAt(t *testing.T, path string) *client.Agent {
	t.Helper()
	a, err := client.NewAgent(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func TestErrorsHaveAKind(t *testing.T) {
	for code, want := range map[codes.Code]error{
		codes.Unavailable:        client.ErrUnreachable,
		codes.PermissionDenied:   client.ErrForbidden,
		codes.Unauthenticated:    client.ErrForbidden,
		codes.InvalidArgument:    client.ErrRefused,
		codes.FailedPrecondition: client.ErrRefused,
		codes.AlreadyExists:      client.ErrRefused,
		codes.ResourceExhausted:  client.ErrRefused,
		codes.NotFound:           client.ErrNotFound,
	} {
		_, err := dial(t, &server{err: status.Error(code, "because of this")}).Status(t.Context())
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", code, err, want)
		}
		if !strings.HasPrefix(err.Error(), "read status: ") || !strings.HasSuffix(err.Error(), "because of this") {
			t.Errorf("%s: %q", code, err)
		}
	}
	_, err := dial(t, &server{err: errors.New("unsorted")}).Status(t.Context())
	if e, ok := errors.AsType[*client.CallError](err); !ok || e.Kind != nil {
		t.Errorf("got %#v, want a CallError without a kind", err)
	}
}

// A failed dial keeps the operating system's reason, which decides what to advise.
func TestNobodyThere(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none.sock")
	_, err := agentAt(t, missing).Status(t.Context())
	if !errors.Is(err, client.ErrUnreachable) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no socket: got %v", err)
	}
	dead := filepath.Join(t.TempDir(), "dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	_, err = agentAt(t, dead).Status(t.Context())
	if !errors.Is(err, client.ErrUnreachable) || !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("no listener: got %v", err)
	}
}

func TestSilenceEndsWithTheContext(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "mute.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := agentAt(t, l.Addr().String()).Status(ctx); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("got %v", err)
	}
}

func TestGrantByID(t *testing.T) {
	a := dial(t, &server{grants: []*api.Grant{{Id: "A"}, {Id: "B", Service: "postgres"}}})
	g, err := a.Grant(t.Context(), "B")
	if err != nil || g.GetService() != "postgres" {
		t.Errorf("got %v, %v", g, err)
	}
	if _, err := a.Grant(t.Context(), "C"); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("got %v, want %v", err, client.ErrNotFound)
	}
}

func TestFlows(t *testing.T) {
	s := &server{flows: []*api.FlowRecord{{FlowId: "1", Verdict: "DENIED"}, {FlowId: "2", Verdict: "PROXIED"}, {FlowId: "3", Verdict: "DENIED"}}}
	read := func(q *api.FlowQuery, most int) string {
		var ids string
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		for f, err := range dial(t, s).Flows(ctx, q) {
			if err != nil {
				t.Fatal(err)
			}
			if ids += f.GetFlow().GetFlowId(); len(ids) == most {
				cancel() // the end of the context ends the sequence, without an error
			}
		}
		return ids
	}
	for _, c := range []struct {
		q    *api.FlowQuery
		most int
		want string
	}{
		{&api.FlowQuery{}, 0, "123"},
		{&api.FlowQuery{Verdict: "DENIED"}, 0, "13"},
		{&api.FlowQuery{Verdict: "DENIED", Limit: 1}, 0, "3"},
		{&api.FlowQuery{Limit: 2}, 0, "23"},
		{&api.FlowQuery{Follow: true}, 3, "123"},
		{&api.FlowQuery{Follow: true, Limit: 2}, 2, "23"},
	} {
		if got := read(c.q, c.most); got != c.want {
			t.Errorf("%v: got flows %s, want %s", c.q, got, c.want)
		}
	}
	broken := &server{flows: s.flows, err: status.Error(codes.Internal, "lost it")}
	var last error
	for _, err := range dial(t, broken).Flows(t.Context(), &api.FlowQuery{}) {
		last = err
	}
	if last == nil {
		t.Error("the stream's error is lost")
	}
}

func TestMatchFlow(t *testing.T) {
	at := time.Date(2026, 7, 1, 22, 0, 0, 0, time.UTC)
	r := &api.FlowRecord{
		Event: "OPEN", Time: timestamppb.New(at), Verdict: "PROXIED", Reason: "IDENTITY", Client: "[::ffff:10.1.0.2]:4000",
		Service: "postgres", Identity: "spiffe://example.org/app/web", Grant: "G",
	}
	for _, c := range []struct {
		q    *api.FlowQuery
		want bool
	}{
		{&api.FlowQuery{}, true},
		{&api.FlowQuery{Node: "any", Limit: 1, Follow: true}, true},
		{&api.FlowQuery{Event: "OPEN", Verdict: "PROXIED", Reason: "IDENTITY", Service: "postgres", Grant: "G"}, true},
		{&api.FlowQuery{Event: "CLOSE"}, false},
		{&api.FlowQuery{Verdict: "DENIED"}, false},
		{&api.FlowQuery{Reason: "NO_TLS"}, false},
		{&api.FlowQuery{Service: "post"}, false},
		{&api.FlowQuery{Grant: "H"}, false},
		{&api.FlowQuery{Identity: "spiffe://example.org/app"}, false},
		{&api.FlowQuery{Client: "10.1.0.2"}, true},
		{&api.FlowQuery{Client: "10.1.0.20"}, false},
		{&api.FlowQuery{Client: "nobody"}, false},
		{&api.FlowQuery{Since: timestamppb.New(at)}, true},
		{&api.FlowQuery{Since: timestamppb.New(at.Add(1))}, false},
		{&api.FlowQuery{Until: timestamppb.New(at)}, false},
		{&api.FlowQuery{Until: timestamppb.New(at.Add(1))}, true},
	} {
		if got := client.MatchFlow(c.q, r); got != c.want {
			t.Errorf("%v: got %v", c.q, got)
		}
	}
}

// TestMatchWatched: a verdict asks for what was decided, unless it is asked of what was only watched.
func TestMatchWatched(t *testing.T) {
	watched := &api.FlowRecord{Event: "WATCHED", Verdict: "BYPASSED"}
	for _, c := range []struct {
		q    *api.FlowQuery
		want bool
	}{
		{&api.FlowQuery{}, true},
		{&api.FlowQuery{Verdict: "BYPASSED"}, false},
		{&api.FlowQuery{Event: "WATCHED"}, true},
		{&api.FlowQuery{Event: "WATCHED", Verdict: "BYPASSED"}, true},
		{&api.FlowQuery{Event: "WATCHED", Verdict: "DENIED"}, false},
	} {
		if got := client.MatchFlow(c.q, watched); got != c.want {
			t.Errorf("%v: got %v", c.q, got)
		}
	}
}

func TestNetworkCollectorNeedsAnIdentity(t *testing.T) {
	if _, err := client.NewAudit("10.9.0.1:9443", nil); err == nil {
		t.Error("a collector on the network was taken without an identity")
	}
}
