package main

import (
	"context"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// usedGrants shows what was granted beside what was used.
func (c *cli) usedGrants(ctx context.Context) error {
	return c.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		reply, err := a.UsedGrants(ctx)
		if err != nil {
			return err
		}
		return c.show(reply, func(t *table) {
			usedTable(t, reply.GetGrants())
			suggestionTable(t, reply.GetGrants())
		})
	})
}

func usedTable(t *table, grants []*api.UsedGrant) {
	t.row("GRANT", "STATE", "SERVICE", "REQUESTER", "GRANTED", "OPEN", "BUSY", "VOLUME", "FLOWS", "CLIENTS")
	for _, u := range grants {
		g := u.GetGrant()
		known := []any{"", "", "", "", "not known"}
		if u.GetKnown() {
			known = []any{inSeconds(u.GetOpen()), inSeconds(u.GetBusy()), volume(u.GetBytes(), u.GetPackets()), u.GetFlows(), strings.Join(u.GetClients(), ",")}
		}
		t.row(append([]any{g.GetId(), g.GetState(), g.GetService(), g.GetRequester(), inSeconds(u.GetGranted())}, known...)...)
	}
}

// suggestionTable says what would have been enough, in the terms of `grant issue`.
func suggestionTable(t *table, grants []*api.UsedGrant) {
	headed := false
	for _, u := range grants {
		for _, s := range u.GetSuggestions() {
			if !headed {
				t.line("")
				t.row("GRANT", "ENOUGH WOULD BE", "GRANTED WAS", "BECAUSE")
				headed = true
			}
			t.row(u.GetGrant().GetId(), strings.TrimSpace(s.GetField()+" "+s.GetSuggested()), s.GetGranted(), s.GetWords())
		}
	}
}
