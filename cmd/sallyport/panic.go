package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/client"
)

// endAllByHand is a line for a shell that ends every path with bpftool alone. ARCHITECTURE.md has it, too.
const endAllByHand = `M=/sys/fs/bpf/sallyport/v4/maps/sp_path_state; bpftool map dump pinned $M | awk -v m=$M '/"key"/ {k = int($2)} /SP_PATH_ACTIVE/ {print "map update pinned", m, "key", k % 256, int(k / 256) % 256, int(k / 65536), 0, "value 3 0 0 0"}' | bpftool batch file -`

func (c *cli) panic() *cobra.Command {
	var why string
	var lift bool
	cmd := &cobra.Command{
		Use:   "panic",
		Short: "End every path of this node at once, and let none be opened",
		Long: `End every path of this node at once: live connections are cut, and their clients are on the proxy
again. Nothing is asked first, for nothing is lost but the ways around the proxy. It is recorded with
who called it and why. No grant is activated on this node, also after a reboot, until root lifts the
panic; grants that it ended stay ended.

Where no agent runs, root ends every path with bpftool alone (M names the pins, if they are elsewhere):

  ` + endAllByHand + `

While no agent runs nothing new is opened; call panic when one does.`,
		Example: `  sallyport panic --why "credentials of the backup leaked"
  sallyport panic --lift --why "rotated, see OPS-17"`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := c.withAgent(cmd.Context(), func(ctx context.Context, a *client.Agent) error {
				if lift {
					return c.liftPanic(ctx, a, why)
				}
				return c.callPanic(ctx, a, why)
			})
			if errors.Is(err, client.ErrUnreachable) && !lift {
				return withHint(fmt.Errorf("it is not known whether paths were closed: %w", err),
					"live paths run to their deadlines: `systemctl restart sallyport-agent` and call it again, or end all of them by hand, as root: %s", endAllByHand)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&why, "why", "", "`TEXT` for the record; --lift needs one")
	f.BoolVar(&lift, "lift", false, "let grants be activated again (root only)")
	return cmd
}

func (c *cli) callPanic(ctx context.Context, a *client.Agent, why string) error {
	reply, err := a.Panic(ctx, why)
	if err != nil {
		return err
	}
	return c.show(reply, func(t *table) {
		t.row("ended", plural(uint64(reply.GetEnded()), "path"))
		t.row("from now on", "no grant is activated on this node")
		t.row("next", "sallyport panic --lift --why TEXT, as root, when it is over")
	})
}

// lifted is what --lift did, for machines.
type lifted struct {
	Lifted bool `json:"lifted"`
}

func (c *cli) liftPanic(ctx context.Context, a *client.Agent, why string) error {
	if why == "" {
		return withHint(usagef("--lift needs --why"), "say what makes it safe: it is recorded")
	}
	if err := a.LiftPanic(ctx, why); err != nil {
		return err
	}
	return c.show(lifted{true}, func(t *table) {
		t.row("lifted", "grants can be activated again; those that the panic ended stay ended")
	})
}
