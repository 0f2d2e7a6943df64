package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/rollout"
)

// rolloutNodes are the nodes that a command about a roll-out speaks to, by the run directories of their agents.
type rolloutNodes []string

func (n *rolloutNodes) add(f *pflag.FlagSet) {
	f.StringSliceVar((*[]string)(n), "agents", nil, "run `DIRECTORIES` of the agents of all nodes, with their sockets (default: --run-dir)")
}

func (c *cli) rollout() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rollout",
		Short: "Take services to Enforce, on some nodes after others, and stop that",
		Long: `Take services to Enforce in the waves of a Rollout. A wave begins on a node by a signature alone, and what breaks
there falls back by itself. docs/rollout.md tells it from the beginning. Stop everything:

  sallyport rollout halt --why TEXT`,
		Args: cobra.ArbitraryArgs,
		RunE: group,

		SuggestionsMinimumDistance: suggestWithin,
	}
	cmd.AddCommand(c.rolloutStatus(), c.rolloutAdvance(), c.rolloutHalt(), c.rolloutResume(), c.rolloutRun(), c.rolloutRecord())
	return cmd
}

func (c *cli) rolloutStatus() *cobra.Command {
	var nodes rolloutNodes
	cmd := &cobra.Command{
		Use:   "status [ROLLOUT]",
		Short: "How far roll-outs have come on each node, and what Enforce would refuse and cut there",
		Example: `  sudo sallyport rollout status
  sudo sallyport rollout status databases --agents /mnt/node-1,/mnt/node-2`,
		Args: between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := c.seeRollouts(cmd.Context(), nodes, strings.Join(args, ""))
			if err != nil {
				return err
			}
			return errors.Join(c.show(all.reply(), func(t *table) { all.table(t) }), all.unseen())
		},
	}
	nodes.add(cmd.Flags())
	return cmd
}

// seenNode is what an agent says of roll-outs, or why it is not known.
type seenNode struct {
	dir   string
	reply *api.RolloutsReply
	err   error
}

type seenNodes []seenNode

// seeRollouts asks every node. Who names one node is told why it does not answer; of several, the others are shown.
func (c *cli) seeRollouts(ctx context.Context, nodes rolloutNodes, name string) (all seenNodes, err error) {
	if len(nodes) == 0 {
		nodes = rolloutNodes{c.runDir}
	}
	for _, dir := range nodes {
		s := seenNode{dir: dir}
		s.err = c.withAgentAt(ctx, dir, func(ctx context.Context, a *client.Agent) (err error) {
			s.reply, err = a.Rollouts(ctx, name)
			return err
		})
		if s.err != nil && len(nodes) == 1 {
			return nil, s.err
		}
		all = append(all, s)
	}
	return all, nil
}

// unseen is what to end with when no node at all has answered: what was shown then says nothing of any roll-out.
func (all seenNodes) unseen() error {
	var errs []error
	for _, s := range all {
		if s.err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", s.dir, s.err))
	}
	return fmt.Errorf("no node was reached:\n%w", errors.Join(errs...))
}

func (c *cli) withAgentAt(ctx context.Context, dir string, f func(context.Context, *client.Agent) error) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	agent, err := client.NewAgent(filepath.Join(dir, filepath.Base(c.agentSocket())))
	if err != nil {
		return err
	}
	defer agent.Close()
	return c.agentHint(f(ctx, agent))
}

// shownNodes is what status shows to machines.
type shownNodes struct {
	Nodes []*shownNode `json:"nodes"`
}

type shownNode struct {
	Agent    string `json:"agent"`
	Error    string `json:"error,omitempty"`
	Rollouts any    `json:"rollouts,omitempty"`
}

func (all seenNodes) reply() (shown shownNodes) {
	for _, s := range all {
		n := &shownNode{Agent: s.dir}
		if s.err != nil {
			n.Error = s.err.Error()
		} else {
			n.Rollouts = plainMessage(s.reply.ProtoReflect())
		}
		shown.Nodes = append(shown.Nodes, n)
	}
	return shown
}

func (all seenNodes) table(t *table) {
	t.row("NODE", "ROLLOUT", "WAVE", "PHASE", "HELD", "SERVICE", "MODE", "WOULD REFUSE", "WOULD CUT", "REFUSED", "SERVED")
	for _, s := range all {
		if s.err != nil {
			t.row(s.dir, "", "", "not known")
		}
		for _, r := range s.reply.GetRollouts() {
			for _, svc := range r.GetServices() {
				t.row(s.reply.GetNode(), r.GetName(), fmt.Sprintf("%d of %d", r.GetWave(), len(r.GetWaves())), r.GetPhase(), yesNo(r.GetBaked()),
					svc.GetName(), svc.GetMode(), wouldRefuse(svc), wouldCut(svc), svc.GetRefused(), svc.GetServed())
			}
		}
	}
	all.details(t)
}

func (all seenNodes) details(t *table) {
	for _, s := range all {
		if s.err != nil {
			t.line("%s: %v", s.dir, s.err)
		}
		for _, r := range s.reply.GetRollouts() {
			if r.GetWhy() != "" {
				t.line("%s: %s since %s, by %s: %s", s.reply.GetNode(), r.GetName(), stamp(r.GetChanged()), r.GetBy(), r.GetWhy())
			}
			for _, svc := range r.GetServices() {
				for _, client := range svc.GetClients() {
					t.line("%s: %s would refuse %s: %s, the last at %s: %s", s.reply.GetNode(), svc.GetName(), client.GetAddress(),
						plural(client.GetOpens(), "connection"), stamp(client.GetLast()), client.GetWhy())
				}
			}
		}
	}
}

func wouldRefuse(s *api.RolloutService) string {
	if s.GetMode() == string(policy.ModeEnforce) {
		return ""
	}
	return fmt.Sprintf("%d since %s", s.GetWouldRefuse(), stamp(s.GetSeenSince()))
}

func wouldCut(s *api.RolloutService) string {
	switch {
	case s.GetMode() == string(policy.ModeEnforce):
		return ""
	case s.GetLiveUnknown() != "":
		return "not known"
	}
	return fmt.Sprint(s.GetLive())
}

// views are what is decided by: how one roll-out stands on each node, and what the next wave would do there.
func (all seenNodes) views(name string) (views []rollout.View) {
	for _, s := range all {
		v := rollout.View{Node: s.reply.GetNode(), Err: s.err}
		if s.err != nil {
			v.Node = s.dir
		} else if r := s.of(name); r == nil {
			v.Err = errors.New("it has no such roll-out")
		} else {
			v.Plan, v.Phase, v.Wave, v.Waves, v.Baked, v.Why = r.GetPlan(), rollout.Phase(r.GetPhase()), int(r.GetWave()), len(r.GetWaves()), r.GetBaked(), r.GetWhy()
			v.Over = overBudget(r, v.Wave+1)
		}
		views = append(views, v)
	}
	return views
}

func (s seenNode) of(name string) *api.Rollout {
	for _, r := range s.reply.GetRollouts() {
		if r.GetName() == name {
			return r
		}
	}
	return nil
}

// overBudget lists the services that go over to Enforce with a wave, and whose budget that would spend.
func overBudget(r *api.Rollout, wave int) (over []string) {
	for _, svc := range entering(r, wave) {
		if svc.GetOverBudget() != "" {
			over = append(over, fmt.Sprintf("%s: under Enforce %s", svc.GetName(), svc.GetOverBudget()))
		}
	}
	return over
}

// entering are the services that go over to Enforce on the node with a wave.
func entering(r *api.Rollout, wave int) (services []*api.RolloutService) {
	if wave > len(r.GetWaves()) || !r.GetWaves()[wave-1].GetHere() || r.GetWaves()[wave-1].GetMode() != string(policy.ModeEnforce) {
		return nil
	}
	for _, svc := range r.GetServices() {
		if svc.GetMode() != string(policy.ModeEnforce) {
			services = append(services, svc)
		}
	}
	return services
}

func (c *cli) rolloutHalt() *cobra.Command {
	var nodes rolloutNodes
	var why string
	cmd := &cobra.Command{
		Use:   "halt [ROLLOUT]",
		Short: "Let no wave begin any more, of one roll-out or of all",
		Long: `Let no wave begin any more, of one roll-out or of all, on every node that --agents names. It needs no key. What is
enforced stays enforced, and still falls back where its budget is spent. "rollout resume" goes on.`,
		Example: `  sudo sallyport rollout halt --why "checkout is slow, INC-7"`,
		Args:    between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.haltRollout(cmd.Context(), nodes, strings.Join(args, ""), why)
		},
	}
	cmd.Flags().StringVar(&why, "why", "", "`TEXT` for the record")
	nodes.add(cmd.Flags())
	return cmd
}

// haltedNodes is what halt did, for machines. A node that is not in it was not halted.
type haltedNodes struct {
	Halted map[string][]string `json:"halted"`
}

// haltRollout goes on where it can: each node that it reaches is one that stops.
func (c *cli) haltRollout(ctx context.Context, nodes rolloutNodes, name, why string) error {
	if len(nodes) == 0 {
		nodes = rolloutNodes{c.runDir}
	}
	done, errs := haltedNodes{map[string][]string{}}, []error(nil)
	for _, dir := range nodes {
		err := c.withAgentAt(ctx, dir, func(ctx context.Context, a *client.Agent) error {
			halted, err := a.HaltRollout(ctx, name, why)
			if err == nil {
				done.Halted[dir] = append([]string{}, halted...)
			}
			return err
		})
		if err != nil {
			err = fmt.Errorf("%s: %w", dir, err)
		}
		errs = append(errs, err)
	}
	shown := c.show(done, func(t *table) {
		for _, dir := range nodes {
			if halted, ok := done.Halted[dir]; ok {
				t.row("halted", dir, either(strings.Join(halted, ", "), "nothing that was running"))
			} else {
				t.row("NOT HALTED", dir, "the error says why")
			}
		}
		t.row("next", "mend what broke, and then: sallyport rollout resume ROLLOUT")
	})
	return errors.Join(append(errs, shown)...)
}

func (c *cli) rolloutAdvance() *cobra.Command {
	var nodes rolloutNodes
	s := statement{step: grant.StepAdvanced}
	despite := false
	cmd := &cobra.Command{
		Use:   "advance ROLLOUT",
		Short: "Have the next wave begin",
		Long: `Have the next wave of a roll-out begin, by the signature of one of its operators with a key of the use rollout. It
shows first what Enforce would refuse and cut on each node. Nothing is signed while a node that --agents names is
not seen, does not run, or has not held the wave before; nor where the budget would be spent by what Shadow has
seen, unless --despite-forecast is given: clients that will prove themselves from then on are among that.`,
		Example: `  sudo sallyport rollout advance databases --key alice.key --by alice --why "a week of Shadow, CHG-12"`,
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.advance(cmd.Context(), nodes, args[0], &s, despite)
		},
	}
	s.addRollout(cmd.Flags())
	cmd.Flags().BoolVar(&despite, "despite-forecast", false, "sign although Enforce would spend the budget by what Shadow has seen")
	nodes.add(cmd.Flags())
	return cmd
}

func (s *statement) addRollout(f *pflag.FlagSet) {
	s.add(f)
	f.Lookup("out").Usage = `only write the statement to this new ` + "`FILE`" + `, for "rollout record" on each node`
}

func (c *cli) advance(ctx context.Context, nodes rolloutNodes, name string, s *statement, despite bool) error {
	all, err := c.seeRollouts(ctx, nodes, name)
	if err != nil {
		return err
	}
	views := all.views(name)
	wave, against, foreseen := rollout.Next(views)
	if err := c.tellPlan(all, name, wave); err != nil {
		return err
	}
	switch {
	case len(against) > 0:
		return refused(withHint(fmt.Errorf("no wave of %s can begin: %s", name, strings.Join(against, "; ")), "`sallyport rollout status %s` shows how it stands", name))
	case wave == 0:
		return refused(withHint(fmt.Errorf("every wave of %s has begun", name), "when it is done, write mode: Enforce into its services, and take the Rollout out"))
	case len(foreseen) > 0 && !despite:
		return refused(withHint(fmt.Errorf("wave %d of %s would spend its budget: %s", wave, name, strings.Join(foreseen, "; ")),
			"`sallyport rollout status %s` names the clients: mend the policy, list those that shall be refused under spec.budget.except, or give --despite-forecast", name))
	}
	return c.sayRollout(ctx, all, s, grant.Statement{Rollout: name, Digest: views[0].Plan, Wave: uint32(wave)}, fmt.Sprintf("begin wave %d of %s?", wave, name))
}

// tellPlan says what a wave does on each node.
func (c *cli) tellPlan(all seenNodes, name string, wave int) error {
	if wave == 0 {
		return nil
	}
	t := newTable(c.stderr)
	t.row("NODE", "SERVICE", "GOES OVER TO", "WOULD REFUSE", "WOULD CUT")
	for _, n := range all {
		r := n.of(name)
		for _, svc := range entering(r, wave) {
			t.row(n.reply.GetNode(), svc.GetName(), string(policy.ModeEnforce), wouldRefuse(svc), wouldCut(svc))
		}
	}
	return t.Flush()
}

func (c *cli) rolloutResume() *cobra.Command {
	var nodes rolloutNodes
	s := statement{step: grant.StepResumed}
	cmd := &cobra.Command{
		Use:   "resume ROLLOUT",
		Short: "Go on after a halt, or after a node has fallen back",
		Long: `Go on after a halt, or after a node has fallen back, by the signature of one of the roll-out's operators with a key
of the use rollout. Services are in the mode of the waves that have begun again, with a new budget.`,
		Example: `  sudo sallyport rollout resume databases --key alice.key --by alice --why "the exporter has an identity now"`,
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := c.seeRollouts(cmd.Context(), nodes, args[0])
			if err != nil {
				return err
			}
			views := all.views(args[0])
			if rollout.Broken(views) == "" {
				return refused(withHint(fmt.Errorf("%s is halted on no node that is seen", args[0]), "`sallyport rollout status %s` shows how it stands", args[0]))
			}
			return c.sayRollout(cmd.Context(), all.halted(args[0]), &s, grant.Statement{Rollout: args[0], Digest: all.plan(args[0])}, fmt.Sprintf("go on with %s?", args[0]))
		},
	}
	s.addRollout(cmd.Flags())
	nodes.add(cmd.Flags())
	return cmd
}

// halted are the nodes on which a roll-out stands still.
func (all seenNodes) halted(name string) (some seenNodes) {
	for _, s := range all {
		if r := s.of(name); r != nil && rollout.Phase(r.GetPhase()) != rollout.Running && rollout.Phase(r.GetPhase()) != rollout.Done {
			some = append(some, s)
		}
	}
	return some
}

func (all seenNodes) plan(name string) string {
	for _, s := range all.halted(name) {
		return s.of(name).GetPlan()
	}
	return ""
}

// sayRollout signs, and hands it to every node.
func (c *cli) sayRollout(ctx context.Context, all seenNodes, s *statement, said grant.Statement, question string) error {
	signed, err := c.sign(ctx, s, policy.GrantFacts{}, said, question)
	if err != nil {
		return err
	}
	if s.out != "" {
		return c.writeSigned(s.out, signed, commandLine("rollout", "record", s.out)+" on each node")
	}
	var nodes rolloutNodes
	for _, n := range all {
		nodes = append(nodes, n.dir)
	}
	return c.handRollout(ctx, nodes, signed)
}

// tookRollout is what nodes made of a statement, for machines.
type tookRollout struct {
	Step  grant.Step        `json:"step"`
	Nodes map[string]string `json:"nodes"` // phase and wave, or that it was not taken
}

func (c *cli) handRollout(ctx context.Context, nodes rolloutNodes, signed []byte) error {
	said, err := grant.PeekStatement(signed)
	if err != nil {
		return explained("read statement", err)
	}
	took, errs := tookRollout{said.Step, map[string]string{}}, []error(nil)
	for _, dir := range nodes {
		err := c.withAgentAt(ctx, dir, func(ctx context.Context, a *client.Agent) error {
			r, err := a.StateRollout(ctx, signed)
			took.Nodes[dir] = fmt.Sprintf("%s, wave %d of %d", r.GetPhase(), r.GetWave(), len(r.GetWaves()))
			return err
		})
		if err != nil {
			took.Nodes[dir], err = "not taken", fmt.Errorf("%s: %w", dir, err)
		}
		errs = append(errs, err)
	}
	shown := c.show(took, func(t *table) {
		for _, dir := range nodes {
			t.row(dir, took.Nodes[dir])
		}
		t.row("next", "sallyport rollout status "+said.Rollout)
	})
	return errors.Join(append(errs, shown)...)
}

func (c *cli) rolloutRecord() *cobra.Command {
	var nodes rolloutNodes
	cmd := &cobra.Command{
		Use:     "record STATEMENT",
		Short:   "Have nodes take a statement that was signed elsewhere",
		Long:    `Hand to nodes what "rollout advance" or "resume" wrote with --out. One statement is good for every node of the roll-out.`,
		Example: `  sudo sallyport rollout record wave-2.advanced`,
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			signed, err := readSmall(args[0], grant.MaxEnvelope, "read statement", "`sallyport rollout advance --out` and resume write such a file")
			if err != nil {
				return err
			}
			if len(nodes) == 0 {
				nodes = rolloutNodes{c.runDir}
			}
			return c.handRollout(cmd.Context(), nodes, signed)
		},
	}
	nodes.add(cmd.Flags())
	return cmd
}
