package agent

import (
	"context"
	"encoding/json"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// Challenge gives one to answer.
func (o *operators) Challenge(context.Context, *api.ChallengeRequest) (*api.ChallengeReply, error) {
	c, err := json.Marshal(o.grants.challenges.mint())
	if err != nil {
		return nil, toStatus(err)
	}
	return &api.ChallengeReply{Challenge: c}, nil
}

// State takes what somebody says of a grant.
func (o *operators) State(ctx context.Context, req *api.StateRequest) (*api.StateReply, error) {
	row, err := o.grants.State(ctx, req.GetStatement(), req.GetEnvelope(), caller(ctx))
	if err != nil {
		return nil, toStatus(err)
	}
	reply := &api.StateReply{}
	if row != nil {
		reply.Grant = o.describe(*row)
	}
	return reply, nil
}

// Vouch ends the doubts about clock and records.
func (o *operators) Vouch(ctx context.Context, req *api.VouchRequest) (*api.VouchReply, error) {
	if err := o.grants.Vouch(ctx, req.GetStatement(), caller(ctx)); err != nil {
		return nil, toStatus(err)
	}
	return &api.VouchReply{}, nil
}

// reviewWords tells who reviewed a grant. Only break-glass has to be.
func reviewWords(row store.GrantRow, reviewed map[string]store.StatementRow) string {
	if s, ok := reviewed[row.Digest]; ok {
		return s.By + " at " + s.At.UTC().Format(time.RFC3339) + ": " + s.Why
	}
	if row.Kind == string(grant.BreakGlass) {
		return "open"
	}
	return ""
}
