package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

func (c *cli) paths() *cobra.Command {
	return &cobra.Command{
		Use:   "paths",
		Short: "The kernel's paths around the proxy, one per grant and client",
		Args:  exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAgent(cmd.Context(), func(ctx context.Context, a *client.Agent) error {
				reply, err := a.Paths(ctx)
				if err != nil {
					return err
				}
				return c.show(reply, func(t *table) { pathsTable(t, reply.GetPaths()) })
			})
		},
	}
}

func pathsTable(t *table, paths []*api.Path) {
	t.row("SLOT", "STATE", "GRANT", "CLIENT", "SERVICE", "DEADLINE", "LEFT", "FLOWS", "TO SERVER", "TO CLIENT")
	for _, p := range paths {
		t.row(p.GetSlot(), p.GetState(), p.GetGrant(), p.GetClient(), p.GetService(),
			stamp(p.GetDeadline()), span(p.GetLeft()), p.GetFlows(),
			volume(p.GetBytesToServer(), p.GetPacketsToServer()),
			volume(p.GetBytesToClient(), p.GetPacketsToClient()))
	}
}
