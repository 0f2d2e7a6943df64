package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// completion asks the agent for words to complete with. It is silent and short: without an
// agent there is nothing to offer.
func (c *cli) completion(ask func(context.Context, *client.Agent) []string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	agent, err := client.NewAgent(c.agentSocket())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer agent.Close()
	return ask(ctx, agent), cobra.ShellCompDirectiveNoFileComp
}

func (c *cli) completeExplain(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) != 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return c.completion(func(ctx context.Context, a *client.Agent) []string {
		reply, err := a.Services(ctx)
		if err != nil {
			return nil
		}
		return names(reply.GetServices(), (*api.Service).GetName)
	})
}

func (c *cli) completeGrant(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) != 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return c.completion(func(ctx context.Context, a *client.Agent) []string {
		reply, err := a.Grants(ctx)
		if err != nil {
			return nil
		}
		return names(reply.GetGrants(), (*api.Grant).GetId)
	})
}

func names[T any](all []T, name func(T) string) []string {
	var list []string
	for _, one := range all {
		list = append(list, name(one))
	}
	return list
}
