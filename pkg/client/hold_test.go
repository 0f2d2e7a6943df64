package client_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// holders is a real Automation service, which ends what is given back in its own way.
type holders struct {
	api.UnimplementedAutomationServer
	end func(grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) error
}

func (h *holders) Hold(stream grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) error {
	if err := stream.Send(&api.HoldReply{Is: &api.HoldReply_Opened{Opened: &api.PathOpened{Grant: "G"}}}); err != nil {
		return err
	}
	for {
		switch _, err := stream.Recv(); {
		case errors.Is(err, io.EOF):
			return h.end(stream)
		case err != nil:
			return err
		}
	}
}

// TestCloseTellsTheTruth: a path counts as given back when its agent says so, in one way or another, and not when nobody does.
func TestCloseTellsTheTruth(t *testing.T) {
	var server *grpc.Server
	for _, c := range []struct {
		name   string
		end    func(grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) error
		closed bool
	}{
		{"given back", func(grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) error { return nil }, true},
		{"ended at the same time", func(s grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) error {
			return s.Send(&api.HoldReply{Is: &api.HoldReply_Ended{Ended: &api.PathEnded{Why: "deadline"}}})
		}, true},
		{"the agent cannot close it", func(grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) error {
			return status.Error(codes.Internal, "end path in slot 3: no such file")
		}, false},
		{"the agent stops", func(grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) error {
			return status.Error(codes.Unavailable, "agent stops")
		}, false},
		{"the agent is killed", func(s grpc.BidiStreamingServer[api.HoldRequest, api.HoldReply]) error {
			go server.Stop()
			<-s.Context().Done()
			return s.Context().Err()
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			server = grpc.NewServer()
			api.RegisterAutomationServer(server, &holders{end: c.end})
			go func() { _ = server.Serve(l) }()
			t.Cleanup(server.Stop)
			h, err := client.OpenHold(t.Context(), l.Addr().String(), insecure.NewCredentials(), &api.PathRequest{Service: "postgres"})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := h.Close(ctx); (err == nil) != c.closed {
				t.Errorf("closed with %v", err)
			}
		})
	}
}
