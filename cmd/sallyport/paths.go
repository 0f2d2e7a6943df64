package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func (c *cli) paths() *cobra.Command {
	return &cobra.Command{
		Use:   "paths",
		Short: "The kernel's paths around the proxy, one per grant and client",
		Example: `  sudo sallyport paths
  sudo sallyport paths -o json`,
		Args: exactly(0),
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
	t.row("SLOT", "STATE", "GRANT", "CLIENT", "SERVICE", "DEADLINE", "LEFT", "FLOWS", "TO SERVER", "TO CLIENT", "USED")
	for _, p := range paths {
		t.row(p.GetSlot(), p.GetState(), p.GetGrant(), p.GetClient(), p.GetService(),
			stamp(p.GetDeadline()), span(p.GetLeft()), p.GetFlows(),
			volume(p.GetBytesToServer(), p.GetPacketsToServer()),
			volume(p.GetBytesToClient(), p.GetPacketsToClient()), used(p))
	}
}

// used tells how much of each limit of a path is gone.
func used(p *api.Path) string {
	b := p.GetBudget()
	var parts []string
	part := func(have, limit uint64, unit string, most any) {
		if limit != 0 {
			parts = append(parts, fmt.Sprintf("%d%s of %v", have, unit, most))
		}
	}
	part(p.GetBytesToServer()+p.GetBytesToClient(), b.GetBytes(), " B", policy.Size(b.GetBytes()))
	part(p.GetPacketsToServer()+p.GetPacketsToClient(), b.GetPackets(), " packets", b.GetPackets())
	part(p.GetFlows(), b.GetConnections(), " connections", b.GetConnections())
	if rate := b.GetConnectionsPerSecond(); rate != 0 {
		parts = append(parts, fmt.Sprintf("%d connections a second", rate))
	}
	return strings.Join(parts, ", ")
}
