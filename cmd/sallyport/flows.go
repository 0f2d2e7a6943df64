package main

import (
	"context"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

func (c *cli) flows() *cobra.Command {
	var flags flowFlags
	var losses bool
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "Flow records: what went through the proxy, around it, or nowhere",
		Long: `Show flow records. Without --collector they come from the agent's memory, which holds the
latest of this node; the collector has the whole log of every node. Losses are part of the
log: where records are missing, a note says how many.`,
		Example: `  sallyport flows --follow
  sallyport flows --verdict denied --since 15m
  sallyport flows --collector 10.9.0.1:9443 --grant 01J8ZQ4X5M3T9V0Y2B7C6D1E4F -o json`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := flags.query(c.now())
			if err != nil {
				return err
			}
			if losses && q.GetAfter() != "" {
				return withHint(usagef("--losses --after: losses have no cursors"), "leave --after out")
			}
			if losses {
				return c.showLosses(cmd.Context(), &api.LossQuery{Node: q.Node, Limit: q.Limit})
			}
			if c.collector == "" {
				return c.agentFlows(cmd.Context(), q)
			}
			return c.collectorFlows(cmd.Context(), q)
		},
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&losses, "losses", false, "show what is missing from the collector's log instead")
	return cmd
}

func (c *cli) agentFlows(ctx context.Context, q *api.FlowQuery) error {
	if q.GetAfter() != "" {
		return withHint(usagef("--after needs the collector: the agent's memory has no cursors"), "name the collector with --collector")
	}
	if q.GetNode() != "" {
		return withHint(usagef("--node needs the collector: the agent knows its own node only"), "name the collector with --collector")
	}
	read := c.withAgent
	if q.GetFollow() {
		read = c.followAgent
	}
	return read(ctx, func(ctx context.Context, a *client.Agent) error {
		return c.showFlows(q, a.Flows(ctx, q))
	})
}

func (c *cli) collectorFlows(ctx context.Context, q *api.FlowQuery) error {
	return c.withAudit(ctx, q.GetFollow(), func(ctx context.Context, a *client.Audit) error {
		if err := c.showFlows(q, a.Flows(ctx, q)); err != nil || ctx.Err() != nil {
			return err
		}
		return c.noteLosses(a.Losses(ctx, &api.LossQuery{Node: q.GetNode(), Limit: math.MaxInt32}))
	})
}

var flowColumns = []column{
	{"TIME", 24}, {"NODE", 8}, {"EVENT", 8}, {"VERDICT", 8}, {"REASON", 17}, {"CLIENT", 21}, {"SERVER", 21},
	{"SERVICE", 12}, {"TO SERVER", 12}, {"TO CLIENT", 12}, {"COUNT", 5}, {"IDENTITY OR GRANT", 26}, {"DETAIL", 0},
}

// showFlows says so where the limit may have left older records out.
func (c *cli) showFlows(q *api.FlowQuery, flows iter.Seq2[*api.StoredFlow, error]) error {
	last := ""
	shown, err := showStream(c, flowColumns, flows, func(s *api.StoredFlow) []string { last = s.GetCursor(); return flowCells(s) })
	switch {
	case err != nil || q.GetFollow() || shown != int(q.GetLimit()):
	case q.GetAfter() == "":
		c.note("only the newest %s; --limit shows more", plural(shown, "record"))
	case last != "":
		c.note("only the oldest %s; --after %s shows those that follow", plural(shown, "record"), last)
	}
	return err
}

func flowCells(s *api.StoredFlow) []string {
	r := s.GetFlow()
	return []string{
		stamp(r.GetTime()), s.GetNode(), r.GetEvent(), r.GetVerdict(), r.GetReason(), r.GetClient(), r.GetServer(), r.GetService(),
		volume(r.GetBytesToServer(), r.GetPacketsToServer()), volume(r.GetBytesToClient(), r.GetPacketsToClient()),
		number(r.GetCount()), either(r.GetGrant(), r.GetIdentity()), flowDetail(r),
	}
}

// flowDetail says what no other column does: the request, why, and whose socket a client of the node has.
func flowDetail(r *api.FlowRecord) string {
	parts := []string{requestWords(r), r.GetDetail(), callerWords(r.GetCaller())}
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), "; ")
}

// requestWords names a request as a refusal does to its client: by flow and number.
func requestWords(r *api.FlowRecord) string {
	q := r.GetRequest()
	if q == nil {
		return ""
	}
	says := fmt.Sprintf("%s %s%s", q.GetMethod(), q.GetHost(), q.GetPath())
	if q.GetStatus() != 0 {
		says += fmt.Sprintf(" %d", q.GetStatus())
	}
	says += fmt.Sprintf(" (flow %s, request %d)", r.GetFlowId(), q.GetNumber())
	if q.GetRule() != "" {
		says += " by " + q.GetRule()
	}
	return says
}

func callerWords(w *api.Workload) string {
	if w == nil {
		return ""
	}
	says := "socket of " + choose(w.GetPid() != 0, fmt.Sprintf("process %d", w.GetPid()), "somebody on the node")
	if w.GetPod() != "" {
		says = "socket of pod " + w.GetPod()
	}
	if w.GetIdentity() != "" {
		return says + ", " + w.GetIdentity()
	}
	return says + ", unattested: " + either(w.GetWhy(), "no broker was asked")
}

var lossColumns = []column{
	{"NODE", 8}, {"CLASS", 14}, {"SEQ", 8}, {"MISSING", 16}, {"STAGE", 12}, {"CAUSE", 20}, {"FROM", 24}, {"TO", 24},
}

func (c *cli) showLosses(ctx context.Context, q *api.LossQuery) error {
	if c.collector == "" {
		return withHint(usagef("--losses needs the collector"), "name the collector with --collector; `sallyport status` counts this node's losses")
	}
	return c.withAudit(ctx, false, func(ctx context.Context, a *client.Audit) error {
		_, err := showStream(c, lossColumns, a.Losses(ctx, q), lossCells)
		return err
	})
}

func lossCells(s *api.StoredLoss) []string {
	l := s.GetLoss()
	return []string{
		s.GetNode(), s.GetClass().String(), number(s.GetSeq()), choose(l.GetAtMost(), "at most ", "") + number(l.GetCount()), l.GetStage(), l.GetCause(),
		stamp(l.GetFrom()), stamp(l.GetTo()),
	}
}

// noteLosses says what is missing from a log that was just shown.
func (c *cli) noteLosses(losses iter.Seq2[*api.StoredLoss, error]) error {
	var missing uint64
	var atMost bool
	for loss, err := range losses {
		if err != nil {
			return err
		}
		missing += loss.GetLoss().GetCount()
		atMost = atMost || loss.GetLoss().GetAtMost()
	}
	if missing > 0 {
		c.note("%s%s missing from this log; `sallyport flows --losses` says where they went", choose(atMost, "at most ", ""), plural(missing, "flow record"))
	}
	return nil
}
