package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func (c *cli) policy() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Look at resource files before a node does",
		Args:  cobra.ArbitraryArgs,
		RunE:  group,

		SuggestionsMinimumDistance: suggestWithin,
	}
	cmd.AddCommand(c.policyCheck(), c.policyTest(), c.policyExplain(), c.policyDiff(), c.policySign(), c.policyVerify(), c.policyReplay())
	return cmd
}

func (c *cli) policyCheck() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "check FILE... | DIR",
		Short: "Check resources as the agent would, without an agent",
		Long: `Check one set of resources: all the FILEs together, or the *.yaml files of DIR. Every problem is
shown at once, with its file and line and what to do. It is the agent's own evaluator. With --config it
also finds what a node of that configuration refuses: a service that nobody of its trust domains could
ever come in at, or whose certificate it does not have. It names the remote services that are closed on that
node alone.`,
		Example: `  sallyport policy check /etc/sallyport/resources.d --config /etc/sallyport/agent.yaml
  sallyport policy check services.yaml bypass.yaml keyring.yaml`,
		Args: between(1, -1),
		RunE: func(_ *cobra.Command, args []string) error {
			set, err := loadPolicy(args)
			var closed []problem
			if err == nil && config != "" {
				closed, err = fitsNode(set, config)
			}
			if c.output == formatTable {
				if err != nil {
					return err
				}
				return c.show(nil, func(t *table) { checkTable(t, set, closed) })
			}
			if err := c.showObject(checked(set, closed, err)); err != nil {
				return err
			}
			return err
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "check them for the node with this AgentConfig, a `FILE`")
	return cmd
}

// fitsNode holds a set to the configuration of a node, and tells what is closed on it.
func fitsNode(set *policy.Set, file string) (closed []problem, err error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, withHint(err, "name the AgentConfig of the node, like /etc/sallyport/agent.yaml")
	}
	node, err := policy.ParseAgentConfig(file, data)
	if err != nil {
		return nil, explained("check resources for the node", err)
	}
	for _, r := range set.RemoteServices() {
		if e := r.Closed(node); e != nil {
			closed = append(closed, asProblem(e))
		}
	}
	return closed, explained("check resources for the node", set.CheckNode(node))
}

func (c *cli) policyTest() *cobra.Command {
	return &cobra.Command{
		Use:   "test FILE... | DIR",
		Short: "Run the tests that policies have in their files",
		Long: `Check one set of resources, and then run the tests that its bypass policies and services have (spec.tests): each is a grant,
or a caller with a request, and what the whole set must make of it. It is the agent's own evaluator. A test that comes out otherwise fails the command.`,
		Example: `  sallyport policy test /etc/sallyport/resources.d`,
		Args:    between(1, -1),
		RunE: func(_ *cobra.Command, args []string) error {
			set, err := loadPolicy(args)
			if err != nil {
				return err
			}
			failed := set.Test()
			outcome := testOutcome{Tests: set.Tests(), Failed: len(policy.Errors(failed))}
			if err := c.show(outcome, func(t *table) {
				t.row("tests", fmt.Sprint(outcome.Tests))
				t.row("failed", fmt.Sprint(outcome.Failed))
			}); err != nil {
				return err
			}
			return explained("test policies", failed)
		},
	}
}

// testOutcome is the outcome of a run of tests for machines.
type testOutcome struct {
	Tests  int `json:"tests"`
	Failed int `json:"failed"`
}

// loadPolicy reads one set of resources from files, or from one directory.
func loadPolicy(paths []string) (*policy.Set, error) {
	load := func() (*policy.Set, error) { return policy.LoadFiles(paths...) }
	if info, err := os.Stat(paths[0]); err == nil && info.IsDir() && len(paths) == 1 {
		load = func() (*policy.Set, error) { return policy.LoadDir(paths[0]) }
	}
	set, err := load()
	return set, explained("check resources", err)
}

func checkTable(t *table, set *policy.Set, closed []problem) {
	t.row("KIND", "NAME", "SOURCE", "WHAT IT SAYS")
	for _, s := range set.Services() {
		says := fmt.Sprintf("%s, ports %s", s.Spec.Target, ports(s.Spec.Ports))
		if open := s.Open(); open != "" {
			says += "; " + open
		}
		if proofs := s.Spec.Proofs(); s.Spec.HTTP != nil {
			says += "; http, authenticates " + strings.Join(proofs.Authenticate, ", ")
		} else if s.Spec.Tokens != nil {
			says += "; authenticates " + strings.Join(proofs.Authenticate, ", ")
		}
		t.row(policy.KindProtectedService, s.Name, s.Source, says)
	}
	for _, b := range set.BypassPolicies() {
		t.row(policy.KindBypassPolicy, b.Name, b.Source, fmt.Sprintf("around %s, %s", strings.Join(b.Spec.Services, ","), b.Terms()))
	}
	for _, k := range set.Keyrings() {
		t.row(policy.KindKeyring, k.Name, k.Source, plural(len(k.Spec.People), "signer"))
	}
	for _, l := range set.DenyLists() {
		t.row(policy.KindDenyList, l.Name, l.Source, l.Spec.Reason)
	}
	for _, g := range set.GrantTemplates() {
		t.row(policy.KindGrantTemplate, g.Name, g.Source, fmt.Sprintf("around %s for at most %s", g.Spec.Service, g.Spec.MaxDuration))
	}
	for _, p := range set.Providers() {
		t.row(policy.KindIdentityProvider, p.Name, p.Source, "tokens of "+p.Spec.Issuer)
	}
	for _, r := range set.RemoteServices() {
		t.row(policy.KindRemoteService, r.Name, r.Source, fmt.Sprintf("%s, for %s, answered by %s, without Sallyport: %s",
			r.Words(), plural(len(r.Spec.Callers), "caller"), strings.Join(r.Spec.Identities, ", "), r.Spec.Without))
	}
	for _, r := range set.Rollouts() {
		t.row(policy.KindRollout, r.Name, r.Source, fmt.Sprintf("%s, in %s, falls back where more is refused than %s", strings.Join(r.Spec.Services, ","),
			plural(len(r.Spec.Waves), "wave"), r.Spec.Budget))
	}
	t.line("")
	if set.Version() > 0 {
		t.row("version", set.Version())
	}
	t.row("digest", set.Digest())
	for _, p := range closed {
		t.row("closed", fmt.Sprintf("%s; %s", p.Message, p.Hint))
	}
}

// checkReport is the outcome of a check for machines.
type checkReport struct {
	OK             bool      `json:"ok"`
	Digest         string    `json:"digest"`
	Services       int       `json:"services"`
	BypassPolicies int       `json:"bypass_policies"`
	Keyrings       int       `json:"keyrings"`
	Problems       []problem `json:"problems"`
	// Closed are remote services that serve nobody on the node of the configuration; what asks for them there is refused.
	Closed []problem `json:"closed,omitempty"`
}

type problem struct {
	File    string `json:"file"`
	Line    int    `json:"line"`
	Field   string `json:"field"`
	Message string `json:"message"`
	Hint    string `json:"hint"`
}

func asProblem(e *policy.Error) problem { return problem{e.File, e.Line, e.Field, e.Msg, e.Hint} }

func checked(set *policy.Set, closed []problem, err error) checkReport {
	report := checkReport{OK: err == nil, Problems: []problem{}, Closed: closed}
	for _, e := range policy.Errors(err) {
		report.Problems = append(report.Problems, asProblem(e))
	}
	if err != nil {
		return report
	}
	report.Digest = set.Digest()
	report.Services = len(set.Services())
	report.BypassPolicies = len(set.BypassPolicies())
	report.Keyrings = len(set.Keyrings())
	return report
}
