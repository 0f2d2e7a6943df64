package main

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

func (n *node) Panic(_ context.Context, r *api.PanicRequest) (*api.PanicReply, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	reply := &api.PanicReply{}
	for _, g := range n.grants {
		if g.State == "active" {
			g.State, g.EndedWhy = "revoked", "panic: "+r.Why
			reply.Ended++
		}
	}
	if n.panicked == "" {
		n.panicked = "since 2026-07-01T22:00:00Z, by uid:0: " + r.Why
	}
	return reply, nil
}

func (n *node) LiftPanic(context.Context, *api.LiftPanicRequest) (*api.LiftPanicReply, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.panicked == "" {
		return nil, status.Error(codes.NotFound, "no panic stands on this node\nhint: `sallyport status` tells of one that stands")
	}
	n.panicked = ""
	return &api.LiftPanicReply{}, nil
}
