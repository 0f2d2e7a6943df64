package main

import (
	"context"
	"errors"
	"io/fs"

	"github.com/sallyport-dev/sallyport/pkg/client"
)

// withAgent calls f with a client of the node's agent, within the time that --timeout allows.
func (c *cli) withAgent(ctx context.Context, f func(context.Context, *client.Agent) error) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return c.followAgent(ctx, f)
}

// followAgent calls f with a client of the node's agent, for as long as ctx lives.
func (c *cli) followAgent(ctx context.Context, f func(context.Context, *client.Agent) error) error {
	agent, err := client.NewAgent(c.agentSocket())
	if err != nil {
		return err
	}
	defer agent.Close()
	return c.agentHint(f(ctx, agent))
}

// agentHint adds the next step to what an agent's call gave.
func (c *cli) agentHint(err error) error {
	switch {
	case err == nil, hinted(err):
		return err
	case errors.Is(err, fs.ErrPermission), errors.Is(err, client.ErrForbidden):
		return withHint(err, "run as root, or as one of spec.operators in the agent's configuration")
	case errors.Is(err, fs.ErrNotExist):
		return withHint(err, "start the agent with `systemctl start sallyport-agent`, or name its run directory with --run-dir")
	case errors.Is(err, client.ErrUnreachable):
		return withHint(err, "look at the agent with `systemctl status sallyport-agent`; what it enforces goes on without it")
	case errors.Is(err, client.ErrNotFound):
		return withHint(err, "`sallyport grants` lists the grants of this node")
	}
	return err
}
