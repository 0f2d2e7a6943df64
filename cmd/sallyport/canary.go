package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

func (c *cli) canary() *cobra.Command {
	var last bool
	cmd := &cobra.Command{
		Use:   "canary",
		Short: "Try every enforced port as somebody who proves nothing",
		Long: `Have the agent connect to every enforced TCP port without a proof of who it is, and show what came of it. A port is closed
when the kernel steered the connection to the proxy and the proxy reset it, or did not answer at all; nothing of it reaches the
service. The agent does this by itself every minute; --last shows what it saw then. The command fails unless every port is closed.`,
		Example: `  sudo sallyport canary
  sudo sallyport canary --last -o json`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAgent(cmd.Context(), func(ctx context.Context, a *client.Agent) error {
				reply, err := a.Canaries(ctx, !last)
				if err != nil {
					return err
				}
				if err := c.show(reply, func(t *table) { canaryTable(t, reply.GetCanaries()) }); err != nil {
					return err
				}
				return notClosed(reply.GetCanaries())
			})
		},
	}
	cmd.Flags().BoolVar(&last, "last", false, "try nothing: show what was seen at the latest round")
	return cmd
}

func canaryTable(t *table, all []*api.Canary) {
	t.row("SERVICE", "ADDRESS", "STATE", "LAST CLOSED", "WHY")
	for _, one := range all {
		t.row(one.GetService(), one.GetAddress(), one.GetState(), stamp(one.GetClosed()), one.GetWhy())
	}
}

// notClosed is the answer in one line for whoever looks at the exit code alone.
func notClosed(all []*api.Canary) error {
	bad := 0
	for _, one := range all {
		if one.GetState() != "closed" {
			bad++
		}
	}
	if bad == 0 {
		return nil
	}
	return withHint(fmt.Errorf("%d of %s not seen closed", bad, plural(len(all), "enforced port")),
		"`sallyport status` says what is wrong with enforcement")
}
