package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/rollout"
)

func (c *cli) rolloutRun() *cobra.Command {
	var nodes rolloutNodes
	s := statement{step: grant.StepAdvanced, yes: true}
	every := 10 * time.Second
	cmd := &cobra.Command{
		Use:   "run ROLLOUT",
		Short: "Watch all nodes, have each wave begin when the one before has held, and halt all of them when one breaks",
		Long: `Watch every node that --agents names until the roll-out is done on all of them. A Rollout that says advance: Auto has its
next wave begin when the one before has held on all nodes and nothing is foreseen to spend the budget; of another one only what
breaks is looked for. As soon as one node has fallen back or is halted, all others are halted, and the command ends with an
error. While a node is not seen, no wave begins; nor does one without this command.`,
		Example: `  sudo sallyport rollout run databases --agents /mnt/node-1,/mnt/node-2 --key rollout.key --by rollout --why "CHG-12"`,
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if s.key == "" || s.by == "" || every <= 0 {
				return withHint(usagef("rollout run signs by itself: it needs --key and --by"), "make a key of the use rollout for it alone")
			}
			return c.runRollout(cmd.Context(), nodes, args[0], &s, every)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&s.key, "key", "", keyHelp)
	f.StringVar(&s.by, "by", "", "`NAME` of the key's owner in the Keyring")
	f.StringVar(&s.why, "why", "", "`TEXT` for the record")
	f.DurationVar(&every, "every", every, "look so often: a `DURATION`")
	nodes.add(f)
	return cmd
}

func (c *cli) runRollout(ctx context.Context, nodes rolloutNodes, name string, s *statement, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	said := ""
	for {
		all, err := c.seeRollouts(ctx, nodes, name)
		if err != nil {
			return err
		}
		finished, waits, err := c.lookAtRollout(ctx, all, nodes, name, s)
		if finished || err != nil {
			return err
		}
		if waits != said {
			said = waits
			c.note("%s", said)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// lookAtRollout does what there is to do, and says what it waits for.
func (c *cli) lookAtRollout(ctx context.Context, all seenNodes, nodes rolloutNodes, name string, s *statement) (finished bool, waits string, err error) {
	views := all.views(name)
	if broken := rollout.Broken(views); broken != "" {
		err := fmt.Errorf("%s is halted on all nodes that are reached: %s", name, broken)
		return false, "", refused(errors.Join(withHint(err, "mend what broke, and then `sallyport rollout resume %s`", name), c.haltRollout(ctx, nodes, name, broken)))
	}
	if rollout.Finished(views) {
		c.note("%s is done on all nodes: write mode: Enforce into its services, and take the Rollout out", name)
		return true, "", nil
	}
	wave, against, foreseen := rollout.Next(views)
	switch {
	case len(against)+len(foreseen) > 0:
		return false, "waiting: " + strings.Join(append(against, foreseen...), "; "), nil
	case wave == 0:
		return false, "waiting for the last wave to hold", nil
	case !all.auto(name):
		return false, fmt.Sprintf("wave %d may begin: sallyport rollout advance %s", wave, name), nil
	}
	s.why = either(s.why, "the wave before has held")
	return false, fmt.Sprintf("wave %d begins", wave), c.sayRollout(ctx, all, s, grant.Statement{Rollout: name, Digest: views[0].Plan, Wave: uint32(wave)}, "")
}

// auto tells whether all nodes have a Rollout that lets waves begin without a person.
func (all seenNodes) auto(name string) bool {
	for _, s := range all {
		if !s.of(name).GetAuto() {
			return false
		}
	}
	return true
}
