package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func (c *cli) grants() *cobra.Command {
	var q api.GrantQuery
	var since string
	var look looks
	cmd := &cobra.Command{
		Use:   "grants",
		Short: "The grants of the node, or with --collector the log of every node's grant events",
		Example: `  sallyport grants
  sallyport grants --watch
  sallyport grants --used
  sallyport grants --collector 10.9.0.1:9443 --follow`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if look.watch || look.used {
				if err := nodeOnly(cmd, look); err != nil {
					return err
				}
			}
			if look.watch {
				return c.watchGrants(cmd.Context())
			}
			if look.used {
				return c.usedGrants(cmd.Context())
			}
			if c.collector == "" {
				return c.nodeGrants(cmd.Context(), cmd)
			}
			if err := instant("since", since, c.now(), &q.Since); err != nil {
				return &exitError{exitUsage, err}
			}
			return c.withAudit(cmd.Context(), q.Follow, func(ctx context.Context, a *client.Audit) error {
				_, err := showStream(c, grantEventColumns, a.GrantEvents(ctx, &q), grantEventCells)
				return err
			})
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	look.add(f)
	f.BoolVarP(&q.Follow, "follow", "f", false, "go on with new events until interrupted (collector only)")
	f.StringVar(&q.Node, "node", "", "only of this `NODE` (collector only)")
	f.StringVar(&q.Grant, "grant", "", "only of this grant `ID` (collector only)")
	f.StringVar(&since, "since", "", "only from this `TIME` on: RFC 3339, or a duration before now (collector only)")
	f.Uint32Var(&q.Limit, "limit", newestRecords, "the newest `N` events, with --after the oldest (collector only)")
	f.StringVar(&q.After, "after", "", "only what came after the event with this `CURSOR`, as -o json shows it (collector only)")
	return cmd
}

// nodeOnly refuses what would ask another place than this node's agent.
func nodeOnly(cmd *cobra.Command, look looks) error {
	if look.watch && look.used {
		return withHint(usagef("--watch and --used are two views"), "give one of them")
	}
	for _, flag := range []string{"collector", "follow", "node", "grant", "since", "limit", "after"} {
		if cmd.Flags().Changed(flag) {
			return withHint(usagef("--%s asks the collector; --watch and --used show the grants of this node", flag), "leave one of them out")
		}
	}
	return nil
}

// nodeGrants shows the grants that the agent knows.
func (c *cli) nodeGrants(ctx context.Context, cmd *cobra.Command) error {
	for _, flag := range []string{"follow", "node", "grant", "since", "limit", "after"} {
		if cmd.Flags().Changed(flag) {
			return withHint(usagef("--%s needs the collector", flag), "name the collector with --collector, or SALLYPORT_COLLECTOR")
		}
	}
	return c.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		reply, err := a.Grants(ctx)
		if err != nil {
			return err
		}
		return c.show(reply, func(t *table) { grantsTable(t, reply.GetGrants()) })
	})
}

func grantsTable(t *table, grants []*api.Grant) {
	t.row("ID", "STATE", "SERVICE", "CLIENTS", "REQUESTER", "DEADLINE", "BUDGET", "REASON", "TICKET", "KIND", "REVIEW", "ENDED WHY")
	for _, g := range grants {
		t.row(g.GetId(), g.GetState(), g.GetService(), strings.Join(g.GetClients(), ","), g.GetRequester(),
			stamp(g.GetDeadline()), budgetWords(g.GetBudget()), g.GetReason(), g.GetTicket(), g.GetKind(), g.GetReview(), g.GetEndedWhy())
	}
}

// budgetWords is empty for a grant without a limit.
func budgetWords(b *api.Budget) string {
	if b == nil {
		return ""
	}
	return policy.Budget{Bytes: policy.Size(b.GetBytes()), Packets: b.GetPackets(), Connections: b.GetConnections(),
		ConnectionsPerSecond: b.GetConnectionsPerSecond()}.String()
}

var grantEventColumns = []column{
	{"TIME", 24}, {"NODE", 8}, {"STEP", 11}, {"GRANT", 26}, {"SERVICE", 12}, {"CLIENTS", 21}, {"REQUESTER", 12},
	{"ACTOR", 8}, {"DEADLINE", 24}, {"WHY", 0},
}

func grantEventCells(s *api.StoredGrantEvent) []string {
	e := s.GetEvent()
	return []string{
		stamp(e.GetTime()), s.GetNode(), e.GetStep(), e.GetGrant(), e.GetService(), strings.Join(e.GetClients(), ","),
		e.GetRequester(), e.GetActor(), stamp(e.GetDeadline()), e.GetWhy(),
	}
}
