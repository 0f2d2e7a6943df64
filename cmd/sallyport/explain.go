package main

import (
	"context"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

func (c *cli) explain() *cobra.Command {
	q := &api.ExplainRequest{}
	cmd := &cobra.Command{
		Use:   "explain CLIENT SERVER|SERVICE",
		Short: "What would happen to a new connection, and why",
		Long: `Ask the agent what would happen to a new connection from CLIENT (an address, with or without
port) to SERVER (address:port) or to a protected service by its name. Nothing is sent.`,
		Example: `  sallyport explain 10.1.0.2 10.2.0.2:5432
  sallyport explain 10.1.0.2 postgres --identity spiffe://example.org/app/web`,
		Args:              exactly(2),
		ValidArgsFunction: c.completeExplain,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := readEnds(q, args[0], args[1]); err != nil {
				return err
			}
			return c.withAgent(cmd.Context(), func(ctx context.Context, a *client.Agent) error {
				reply, err := a.Explain(ctx, q)
				if err != nil {
					return err
				}
				return c.show(reply, func(t *table) { explainTable(t, reply) })
			})
		},
	}
	cmd.Flags().StringVar(&q.Identity, "identity", "", "what if the client proved this SPIFFE `ID`")
	return cmd
}

// readEnds puts the two ends into the question: a server with a port, or a service's name.
func readEnds(q *api.ExplainRequest, from, to string) error {
	if _, err := netip.ParseAddrPort(from); err != nil {
		if _, err := netip.ParseAddr(from); err != nil {
			return withHint(usagef("read client %q: neither an address nor address:port", from),
				"write 10.1.0.2, 10.1.0.2:40000, fd00::2 or [fd00::2]:40000")
		}
	}
	q.Client = from
	if _, err := netip.ParseAddrPort(to); err == nil {
		q.Server = to
		return nil
	}
	if _, err := netip.ParseAddr(to); err == nil {
		return withHint(usagef("read server %q: no port", to), "write the port too: 10.2.0.2:5432 or [fd00:2::2]:5432")
	}
	q.Service = to
	return nil
}

func explainTable(t *table, r *api.ExplainReply) {
	t.row("verdict", r.GetVerdict())
	t.row("reason", r.GetReason())
	t.row("service", r.GetService())
	t.row("grant", r.GetGrant())
	for i, line := range r.GetLines() {
		if i == 0 {
			t.line("")
		}
		t.line("%d. %s", i+1, line)
	}
}
