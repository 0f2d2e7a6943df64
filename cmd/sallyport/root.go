package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/build"
)

// cli is one invocation: the process and what the flags of all commands say.
type cli struct {
	env
	runDir      string
	collector   string
	collectorID string
	workloadAPI string
	output      format
	timeout     time.Duration
}

// run executes one command line. It neither exits nor prints its error.
func run(ctx context.Context, e env, args []string) error {
	root := newRoot(e)
	root.SetArgs(args)
	return root.ExecuteContext(ctx)
}

// Groups of commands in the help.
const (
	groupRead   = "read"
	groupChange = "change"
)

// newRoot makes the command with everything below it. A command is added here and nowhere else.
func newRoot(e env) *cobra.Command {
	c := &cli{env: e, output: formatTable}
	root := &cobra.Command{
		Use:           "sallyport",
		Short:         "Look at and change what may go around the identity proxy",
		Long:          rootHelp,
		Version:       build.Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE:          group,

		SuggestionsMinimumDistance: suggestWithin,
	}
	root.SetIn(e.stdin)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	root.SetFlagErrorFunc(flagError)
	root.SetVersionTemplate(build.Read().Describe(root.Name()))
	root.InitDefaultVersionFlag() // not only once it is executed: documents are held to the flags
	root.CompletionOptions.HiddenDefaultCmd = true
	c.globalFlags(root)
	root.AddGroup(&cobra.Group{ID: groupRead, Title: "Nouns read:"}, &cobra.Group{ID: groupChange, Title: "Verbs change:"})
	addGroup(root, groupRead, c.status(), c.services(), c.flows(), c.grants(), c.paths(), c.explain(), c.canary(), c.audit(), c.console(), c.policy(), c.inventory(), c.whoami())
	addGroup(root, groupChange, c.keygen(), c.grant(), c.exec(), c.forward(), c.connect(), c.login(), c.logout(), c.signal(), c.rollout(), c.panic(), c.drill(), c.demo(), c.uninstall())
	root.AddCommand(c.docs())
	return root
}

const rootHelp = `Sallyport makes an identity-aware proxy unskippable on a node, and makes every way around it
a narrow, signed path that the kernel itself closes on time. This command looks at a node,
signs and activates grants, runs commands with paths of their own, and carries plain clients to protected services.

When something is wrong on a node:
  sallyport status                      is it enforcing, and what does it complain about
  sallyport explain CLIENT SERVICE      what would happen to a new connection, and why
  sallyport flows --verdict denied      what was refused, and why
  sallyport grants                      what goes around the proxy now
  sallyport grant revoke ID --why TEXT  end one grant
  sallyport panic --why TEXT            end every path of the node
  sallyport rollout halt --why TEXT     let no wave of a roll-out begin

` + exitCodesHelp

func (c *cli) globalFlags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.SortFlags = false
	f.StringVar(&c.runDir, "run-dir", c.orElse("SALLYPORT_RUN_DIR", "/run/sallyport"), "the agent's run `DIRECTORY`, with its socket (or SALLYPORT_RUN_DIR)")
	f.StringVar(&c.collector, "collector", c.getenv("SALLYPORT_COLLECTOR"), "ask this collector: `ADDRESS:PORT` or unix:PATH (or SALLYPORT_COLLECTOR)")
	f.StringVar(&c.collectorID, "collector-id", "", "SPIFFE `ID` of the collector (default: /sallyport/collector in our own trust domain)")
	f.StringVar(&c.workloadAPI, "workload-api", c.getenv("SPIFFE_ENDPOINT_SOCKET"), "Workload API that gives us our identity: `unix:///PATH` (or SPIFFE_ENDPOINT_SOCKET)")
	f.VarP(&c.output, "output", "o", "write results in this `FORMAT`: table, json or yaml")
	f.DurationVar(&c.timeout, "timeout", 10*time.Second, "how long to wait for an answer: a `DURATION`")
	fixed(root, "output", formats)
}

// orElse gives the value of a variable of the environment, or a default.
func (c *cli) orElse(key, otherwise string) string {
	if v := c.getenv(key); v != "" {
		return v
	}
	return otherwise
}

func (c *cli) agentSocket() string { return filepath.Join(c.runDir, "agent.sock") }

func addGroup(parent *cobra.Command, id string, commands ...*cobra.Command) {
	for _, command := range commands {
		command.GroupID = id
		parent.AddCommand(command)
	}
}

// suggestWithin is how many letters a command may be from what was typed.
const suggestWithin = 2

// group is the RunE of a command that only has others below it.
func group(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	err := usagef("unknown command %q", cmd.CommandPath()+" "+args[0])
	if names := cmd.SuggestionsFor(args[0]); len(names) > 0 {
		return withHint(err, "did you mean `%s %s`?", cmd.CommandPath(), strings.Join(names, "` or `"+cmd.CommandPath()+" "))
	}
	return withHint(err, "`%s --help` lists the commands", cmd.CommandPath())
}

func flagError(cmd *cobra.Command, err error) error {
	return withHint(&exitError{exitUsage, err}, "`%s --help` shows the flags", cmd.CommandPath())
}

// exactly wants n arguments and names them in its error.
func exactly(n int) cobra.PositionalArgs {
	return between(n, n)
}

func between(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if least <= len(args) && (most < 0 || len(args) <= most) {
			return nil
		}
		return withHint(usagef("%s: wrong number of arguments: %d", cmd.CommandPath(), len(args)),
			"usage: %s", cmd.UseLine())
	}
}

// fixed completes a flag with a fixed list of values.
func fixed(cmd *cobra.Command, flag string, values []string) {
	complete := cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
	if err := cmd.RegisterFlagCompletionFunc(flag, complete); err != nil {
		panic(fmt.Sprintf("complete --%s: %v", flag, err)) // only for a flag that does not exist
	}
}
