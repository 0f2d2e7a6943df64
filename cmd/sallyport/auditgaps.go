package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

func (c *cli) auditGaps() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use:   "gaps",
		Short: "What is missing from the collector's log, where it went, whose seals do not go on, and what the kernel counted besides",
		Long: `Show how far the collector has the records of each node, and what is missing: a number that is no record is counted as lost,
with its stage and cause, and with the CPU and numbers of the kernel's records where these are known. A break is a seal that
does not follow the one before: the collector was set back, and the node counted what it had forgotten. Once a minute, and at
each path's end, a node compares what its kernel counted with its records: a path of which it counted more, or less, is shown
with the cause. A counted loss is among what is missing; "unexplained" is a record that nobody counts.
This is what the collector says; "audit verify" proves it for what was exported.

Exit codes:
  0  nothing is missing
  1  records are missing, a chain of seals was broken, or the kernel counted what nothing explains`,
		Example: `  sallyport audit gaps --collector 10.9.0.1:9443
  sallyport audit gaps --collector 10.9.0.1:9443 --node worker-3 -o json`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.wantsCollector("audit gaps"); err != nil {
				return err
			}
			return c.withAudit(cmd.Context(), false, func(ctx context.Context, a *client.Audit) error {
				g, err := c.findGaps(ctx, a, node)
				if err != nil {
					return err
				}
				return c.showGaps(g)
			})
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "only of this `NODE`")
	return cmd
}

// gaps is what a collector says is missing.
type gaps struct {
	Missing uint64   `json:"missing"`
	AtMost  bool     `json:"at_most"` // missing is an upper bound: a node lost power
	Breaks  uint64   `json:"chain_breaks"`
	Nodes   []object `json:"nodes"`
	Losses  []*gap   `json:"losses"`
	// Differences are paths of which the kernel counted other volumes than their records say.
	Differences []*difference `json:"differences"`

	states []*api.NodeState
}

// gap is what went one way on one node.
type gap struct {
	Node   string `json:"node"`
	Class  string `json:"class"`
	Stage  string `json:"stage"`
	Cause  string `json:"cause"`
	Count  uint64 `json:"count"`
	AtMost bool   `json:"at_most"`
	From   string `json:"from,omitempty"`
	To     string `json:"to,omitempty"`
	// Ranges are the kernel's numbers of what is missing, where they are known.
	Ranges []cpuRange `json:"ranges,omitempty"`
}

// cpuRange are numbers that a kernel gave to records on one CPU.
type cpuRange struct {
	CPU   int32  `json:"cpu"`
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

func (r cpuRange) String() string {
	if r.First == r.Last {
		return fmt.Sprintf("cpu %d: %d", r.CPU, r.First)
	}
	return fmt.Sprintf("cpu %d: %d to %d", r.CPU, r.First, r.Last)
}

func rangesOf(l *api.LossRecord) (out []cpuRange) {
	for _, r := range l.GetRanges() {
		out = append(out, cpuRange{r.GetCpu(), r.GetFirst(), r.GetLast()})
	}
	return out
}

// shownRanges is how many of them a line has.
const shownRanges = 4

func (l *gap) numbers() string {
	var words []string
	for _, r := range l.Ranges[:min(len(l.Ranges), shownRanges)] {
		words = append(words, r.String())
	}
	if more := len(l.Ranges) - shownRanges; more > 0 {
		words = append(words, fmt.Sprintf("and %d more, with -o json", more))
	}
	return strings.Join(words, ", ")
}

func (c *cli) findGaps(ctx context.Context, a *client.Audit, node string) (*gaps, error) {
	g := &gaps{Nodes: []object{}, Losses: []*gap{}}
	reply, err := a.Nodes(ctx)
	if errors.Is(err, client.ErrUnknownCall) {
		c.note("this collector is of an older version: it knows no seals, and tells counted losses alone")
	} else if err != nil {
		return nil, err
	}
	var lost, counted uint64
	for _, n := range reply.GetNodes() {
		if node == "" || n.GetNode() == node {
			g.states, g.Nodes = append(g.states, n), append(g.Nodes, plain(n))
			lost += n.GetLost()
			g.Breaks += n.GetChainBreaks()
		}
	}
	if node != "" && err == nil && len(g.states) == 0 {
		return nil, withHint(fmt.Errorf("no node %q has sent this collector anything", node), "`sallyport audit gaps` without --node lists those that have")
	}
	for l, err := range a.Losses(ctx, &api.LossQuery{Node: node, Limit: math.MaxInt32}) {
		if err != nil {
			return nil, err
		}
		counted += l.GetLoss().GetCount()
		g.AtMost = g.AtMost || l.GetLoss().GetAtMost()
		g.add(l)
	}
	g.Missing = max(lost, counted) // the sequences still tell of days that are gone
	g.Differences, err = findDifferences(ctx, a, node)
	return g, err
}

// add counts a loss with the others that went the same way.
func (g *gaps) add(s *api.StoredLoss) {
	l, class := s.GetLoss(), className(s.GetClass())
	for _, old := range g.Losses {
		if old.Node == s.GetNode() && old.Class == class && old.Stage == l.GetStage() && old.Cause == l.GetCause() {
			old.Count, old.AtMost = old.Count+l.GetCount(), old.AtMost || l.GetAtMost()
			old.Ranges = append(old.Ranges, rangesOf(l)...)
			if t := stamp(l.GetTo()); t > old.To {
				old.To = t
			}
			return
		}
	}
	g.Losses = append(g.Losses, &gap{s.GetNode(), class, l.GetStage(), l.GetCause(), l.GetCount(), l.GetAtMost(), stamp(l.GetFrom()), stamp(l.GetTo()), rangesOf(l)})
}

// className is a class as seals name it.
func className(class api.Class) string {
	return choose(class == api.Class_CLASS_CRITICAL, proof.ClassCritical, proof.ClassFlow)
}

func (c *cli) showGaps(g *gaps) error {
	if err := c.show(g, func(t *table) { gapsTable(t, g) }); err != nil {
		return err
	}
	missing := choose(g.AtMost, "at most ", "") + plural(g.Missing, "record") + " missing from the log"
	breaks := plural(g.Breaks, "break") + " in the chains of seals"
	var wrong []string
	if g.Missing > 0 {
		wrong = append(wrong, missing)
	}
	if g.Breaks > 0 {
		wrong = append(wrong, breaks)
	}
	if n := g.unexplained(); n > 0 {
		wrong = append(wrong, plural(n, "path")+" of which the kernel counted what nothing explains")
	}
	if len(wrong) == 0 {
		return nil
	}
	return errors.New(strings.Join(wrong, ", and "))
}

func (g *gaps) unexplained() (n int) {
	for _, d := range g.Differences {
		if d.Cause == tideUnexplained {
			n++
		}
	}
	return n
}

func gapsTable(t *table, g *gaps) {
	defer differencesTable(t, g.Differences)
	if len(g.states) > 0 {
		t.row("NODE", "EPOCH", "CLASS", "NUMBERS", "LOST", "SEALS", "BREAKS", "LAST BATCH", "CONNECTED")
		for _, n := range g.states {
			t.row(n.GetNode(), n.GetEpoch(), className(n.GetClass()), fmt.Sprintf("1 to %d", n.GetSeq()), n.GetLost(), n.GetSeals(), n.GetChainBreaks(),
				stamp(n.GetReceived()), yesNo(n.GetConnected()))
		}
		t.line("")
	}
	if len(g.Losses) == 0 {
		t.line("nothing is counted as lost")
		return
	}
	t.row("NODE", "CLASS", "MISSING", "STAGE", "CAUSE", "FROM", "TO", "KERNEL'S NUMBERS")
	for _, l := range g.Losses {
		t.row(l.Node, l.Class, choose(l.AtMost, "at most ", "")+number(l.Count), l.Stage, l.Cause, l.From, l.To, l.numbers())
	}
}
