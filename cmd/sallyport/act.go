package main

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// elsewhere is the node that a command is about, where that is not this one: the collector speaks to it.
type elsewhere string

func (e *elsewhere) add(cmd *cobra.Command) {
	cmd.Flags().StringVar((*string)(e), "node", "", "on this `NODE`, by way of --collector (default: on this node)")
}

// check refuses half of it: SALLYPORT_COLLECTOR alone does not move a command to another machine.
func (e elsewhere) check(cmd *cobra.Command, c *cli) error {
	if e != "" {
		return c.wantsCollector(cmd.CommandPath() + " --node")
	}
	if cmd.Flags().Changed("collector") {
		return withHint(usagef("%s --collector: no node is named", cmd.CommandPath()), "name it with --node; `sallyport audit gaps` lists the nodes that the collector knows")
	}
	return nil
}

func (c *cli) revokeThere(ctx context.Context, node elsewhere, id, why string) error {
	if why == "" {
		return withHint(usagef("revoke %s on %s: nothing says why", id, node), "say it with --why: your name and that are in the record")
	}
	return c.withAudit(ctx, false, func(ctx context.Context, a *client.Audit) error {
		g, err := a.Revoke(ctx, string(node), id, why)
		if err != nil {
			return err
		}
		return c.show(g, func(t *table) { grantTable(t, g) })
	})
}

// findThere takes a grant that another node activated from the collector's log. The grant itself shows that it is the one: its id is made of
// what it says.
func (c *cli) findThere(ctx context.Context, node elsewhere, id string) (t target, err error) {
	var envelope []byte
	err = c.withAudit(ctx, false, func(ctx context.Context, a *client.Audit) error {
		for e, err := range a.GrantEvents(ctx, &api.GrantQuery{Node: string(node), Grant: id, Limit: math.MaxInt32}) {
			if err != nil {
				return err
			}
			if e.GetEvent().GetStep() == "ACTIVATED" {
				envelope = e.GetEvent().GetEnvelope()
			}
		}
		return nil
	})
	if err != nil {
		return t, err
	}
	if envelope == nil {
		return t, withHint(fmt.Errorf("find grant: the collector has none of the id %s that %s activated", id, node),
			"`sallyport grants --collector %s` lists what it has; a grant that was never activated is named by its file", c.collector)
	}
	p, err := grant.Peek(envelope)
	if err != nil || p.ID != id || p.CheckID() != nil {
		return t, withHint(fmt.Errorf("find grant: what the collector shows for %s is not that grant", id), "name the grant's file instead, and do not trust the collector before it is known why")
	}
	return describedBy(envelope)
}

// describedBy is the target that a grant's envelope describes.
func describedBy(envelope []byte) (target, error) {
	p, err := grant.Peek(envelope)
	if err != nil {
		return target{}, explained("read grant", err)
	}
	digest, err := grant.Digest(envelope)
	facts := grant.Verified{Payload: p}.Facts(nil, time.Time{})
	return target{p.ID, digest, p.Requester, envelope, facts, func(t *table) { payloadTable(t, p) }}, explained("read grant", err)
}

// hand gives a statement to the node: this one, or another by way of the collector.
func (c *cli) hand(ctx context.Context, node elsewhere, step grant.Step, signed, envelope []byte, show func(*api.Grant) error) error {
	if node != "" {
		return c.withAudit(ctx, false, func(ctx context.Context, a *client.Audit) error {
			g, err := a.State(ctx, string(node), signed, envelope)
			if err != nil {
				return err
			}
			return show(g)
		})
	}
	return c.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		var g *api.Grant
		var err error
		if step == grant.StepVouched {
			err = a.Vouch(ctx, signed)
		} else {
			g, err = a.State(ctx, signed, envelope)
		}
		if err != nil {
			return err
		}
		return show(g)
	})
}
