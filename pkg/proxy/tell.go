package proxy

import (
	"context"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/token"
)

// tellEvery is how often the agent is told what a process of the proxy works with. It forgets after some times that.
const tellEvery = 5 * time.Second

// Tell tells the agent until ctx ends how it stands with web certificates and providers, and returns nil then. certificates may be nil. An
// agent that is away, or that does not ask for it, is told later.
func (o *Outside) Tell(ctx context.Context, certificates *Certificates, tokens *token.Verifier) error {
	instance := ulid.Make().String()
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		state := &api.ProxyState{Instance: instance, Certificates: certificates.states(time.Now()), Providers: providers(tokens)}
		o.tell(ctx, state)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (o *Outside) tell(ctx context.Context, state *api.ProxyState) {
	ctx, cancel := context.WithTimeout(ctx, tellEvery)
	defer cancel()
	_, _ = api.NewProxyReportClient(o.conn).State(ctx, state) // the reporter logs that the agent is away
}

func providers(tokens *token.Verifier) (all []*api.Provider) {
	for _, s := range tokens.States() {
		p := &api.Provider{Name: s.Provider, Keys: uint32(s.Keys), Problem: s.Problem}
		if !s.Fetched.IsZero() {
			p.Fetched = timestamppb.New(s.Fetched)
		}
		all = append(all, p)
	}
	return all
}
