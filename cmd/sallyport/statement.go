package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// statement is one run of a command that has somebody say something.
type statement struct {
	step      grant.Step
	key       string
	by        string
	why       string
	resources []string
	challenge string
	out       string
	yes       bool
	node      elsewhere
}

func (s *statement) add(f *pflag.FlagSet) {
	f.SortFlags = false
	f.StringVar(&s.key, "key", "", keyHelp)
	f.StringVar(&s.why, "why", "", "`TEXT` for the record")
	f.StringVar(&s.by, "by", "", "`NAME` of the key's owner in the Keyring (default: what --policy says)")
	f.StringSliceVar(&s.resources, "policy", nil, "look up the owner of the key in these `FILES` or this directory")
	f.StringVar(&s.out, "out", "", "only write the statement to this new `FILE`, for \"grant record\" on a node")
	f.BoolVarP(&s.yes, "yes", "y", false, "do not ask")
}

func (c *cli) grantWithdraw() *cobra.Command {
	return c.about(grant.StepWithdrawn, &cobra.Command{
		Use:   "withdraw GRANT",
		Short: "Say that what you asked for is not wanted any more",
		Long: `Say that a grant that you asked for is not wanted any more. On the nodes that have taken this it can never be
activated, and ends if it is active. GRANT is its file, or its id where the node activated it. ` + thereHelp,
		Example: `  sallyport grant withdraw backup.grant --key alice.key --why "the backup went through"`,
	})
}

func (c *cli) grantDeny() *cobra.Command {
	return c.about(grant.StepDenied, &cobra.Command{
		Use:   "deny GRANT",
		Short: "Say that what somebody else asks for shall not be",
		Long: `Say that a grant shall not be. Whoever could approve it may deny it. On the nodes that have taken this it can
never be activated, and ends if it is active. GRANT is its file, or its id where the node activated it. ` + thereHelp,
		Example: `  sallyport grant deny backup.grant --key bob.key --by bob --why "not during the migration"`,
	})
}

func (c *cli) grantReview() *cobra.Command {
	return c.about(grant.StepReviewed, &cobra.Command{
		Use:   "review GRANT",
		Short: "Say that you looked at what was done with a grant",
		Long: `Say that you looked at what was done with a grant, after its end. Policy names the reviewers; who asked for it
or approved it is none. Whoever signed a break-glass grant can sign no other on the node before this
one was reviewed, and its alarm lasts until then. GRANT is its id, or its file. ` + thereHelp,
		Example: `  sallyport grant review 01J8ZQ4X5M3T9V0Y2B7C6D1E4F --key carol.key --by carol --why "restarted the primary, nothing else"
  sallyport grant review 01J8ZQ4X5M3T9V0Y2B7C6D1E4F --collector 10.9.0.1:9443 --node db-1 --key carol.key --by carol --why "as agreed"`,
	})
}

const thereHelp = `With --node it
is handed to that node by way of the collector, whose configuration says who may (actors).`

// about is a command that says something about a grant.
func (c *cli) about(step grant.Step, cmd *cobra.Command) *cobra.Command {
	s := statement{step: step}
	cmd.Args = exactly(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := s.node.check(cmd, c); err != nil {
			return err
		}
		return c.sayAbout(cmd.Context(), &s, args[0])
	}
	s.add(cmd.Flags())
	s.node.add(cmd)
	return cmd
}

// target is the grant that a statement is about.
type target struct {
	id, digest, requester string
	envelope              []byte // nil where only the node has it
	facts                 policy.GrantFacts
	tell                  func(*table)
}

// find reads a grant's file, or asks the node by its id.
func (c *cli) find(ctx context.Context, node elsewhere, name string) (t target, err error) {
	if isGrantID(name) && node != "" {
		return c.findThere(ctx, node, name)
	}
	if isGrantID(name) {
		err = c.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
			g, err := a.Grant(ctx, name)
			t = target{id: g.GetId(), digest: g.GetDigest(), requester: g.GetRequester(), facts: factsOf(g), tell: func(t *table) { grantTable(t, g) }}
			return err
		})
		return t, err
	}
	envelope, err := c.readEnvelope(name)
	if err != nil {
		return t, err
	}
	return describedBy(envelope)
}

// factsOf is what the node says of a grant that it activated.
func factsOf(g *api.Grant) policy.GrantFacts {
	facts := policy.GrantFacts{ID: g.GetId(), Service: g.GetService(), Requester: g.GetRequester(), BreakGlass: g.GetKind() == string(grant.BreakGlass)}
	for _, name := range g.GetPeople() {
		facts.Signers = append(facts.Signers, policy.Signer{Person: name})
	}
	return facts
}

func (c *cli) sayAbout(ctx context.Context, s *statement, name string) error {
	about, err := c.find(ctx, s.node, name)
	if err != nil {
		return err
	}
	if s.step == grant.StepWithdrawn && len(s.resources) == 0 {
		s.by = either(s.by, about.requester)
	}
	t := newTable(c.stderr)
	about.tell(t)
	if err := t.Flush(); err != nil {
		return err
	}
	signed, err := c.sign(ctx, s, about.facts, grant.Statement{Grant: about.id, Digest: about.digest}, fmt.Sprintf("say that it is %s, for good?", s.step))
	if err != nil {
		return err
	}
	if s.step == grant.StepWithdrawn && s.by != about.requester {
		return refused(withHint(fmt.Errorf("%s asked for it, and %s cannot withdraw it", about.requester, s.by), "`sallyport grant deny` is for those who could approve it"))
	}
	if s.out != "" {
		return c.writeSigned(s.out, signed, commandLine("grant", "record", s.out, name))
	}
	return c.record(ctx, s.node, signed, about.envelope)
}

// sign checks that it counts, asks, and makes the statement.
func (c *cli) sign(ctx context.Context, s *statement, facts policy.GrantFacts, said grant.Statement, question string) ([]byte, error) {
	key, err := c.readKey(s.key)
	if err != nil {
		return nil, err
	}
	if err := c.speaker(s, key.Public(), facts); err != nil {
		return nil, err
	}
	id, err := grant.NewID(c.now())
	if err != nil {
		return nil, err
	}
	said.ID, said.Step, said.By, said.Why, said.At = id, s.step, s.by, s.why, c.now()
	if err := said.Validate(); err != nil {
		return nil, inFlags("make statement", err)
	}
	if !s.yes {
		if err := c.confirm(ctx, question); err != nil {
			return nil, err
		}
	}
	signed, err := grant.SignStatement(ctx, said, key)
	return signed, explained("sign statement", err)
}

// speaker finds who says so, by the key. Where no resources are at hand, it has to be said, and the node alone checks.
func (c *cli) speaker(s *statement, key policy.PublicKey, facts policy.GrantFacts) error {
	set, err := c.resourcesAt(s.resources)
	switch {
	case err != nil:
		return err
	case set == nil && s.by == "":
		return withHint(usagef("make statement: nobody knows whose key it is"), "name the resources with --policy, or the key's owner in the Keyring with --by")
	case set == nil && s.out != "":
		c.note(notChecked)
		return nil
	case set == nil:
		return nil // the node says so at once
	}
	owner, err := c.signerOfStep(set, key, s.step, facts)
	if err == nil && s.by != "" && s.by != owner.Person {
		err = &policy.Error{Field: "by", Msg: fmt.Sprintf("the key %s is of %s, not of %s", key.ID(), owner.Person, s.by), Hint: "leave --by out"}
	}
	s.by = owner.Person
	return inFlags("check key", err)
}

func (c *cli) grantVouch() *cobra.Command {
	s := statement{step: grant.StepVouched}
	cmd := &cobra.Command{
		Use:   "vouch",
		Short: "Say that the node's clock is right and its records are its own",
		Long: `A node activates nothing while its clock is behind what it saw before, or while its records come from another
node or from before: it cannot tell what was used. "sallyport status" says so. Look at why, set the
clock right, and then vouch for the node with a key of the use resources, in answer to its challenge.
Grants that begin before then are not activated where records may be missing.`,
		Example: `  sallyport grant vouch --key security.key --by carol --why "the clock battery was replaced"`,
		Args:    exactly(0),
		RunE:    func(cmd *cobra.Command, _ []string) error { return c.vouch(cmd.Context(), &s) },
	}
	s.add(cmd.Flags())
	cmd.Flags().StringVar(&s.challenge, "challenge", "", "answer the challenge in this `FILE` (default: ask the node)")
	return cmd
}

func (c *cli) vouch(ctx context.Context, s *statement) error {
	asked, err := c.challengeFrom(ctx, s.challenge)
	if err != nil {
		return err
	}
	challenge, err := grant.ParseChallenge(asked)
	if err != nil {
		return explained("read challenge", err)
	}
	signed, err := c.sign(ctx, s, policy.GrantFacts{}, grant.Statement{Challenge: challenge}, fmt.Sprintf("vouch for the clock and the records of %s?", challenge.Node))
	if err != nil {
		return err
	}
	if s.out != "" {
		return c.writeSigned(s.out, signed, commandLine("grant", "record", s.out))
	}
	return c.record(ctx, "", signed, nil)
}

func (c *cli) challengeFrom(ctx context.Context, file string) ([]byte, error) {
	if file == "" {
		return c.challenge(ctx)
	}
	return readSmall(file, grant.MaxChallenge, "read challenge", "`sallyport grant challenge` writes such a file")
}

func (c *cli) grantRecord() *cobra.Command {
	var node elsewhere
	cmd := &cobra.Command{
		Use:   "record STATEMENT [GRANT]",
		Short: "Have the node take a statement that was signed elsewhere",
		Long: `Hand a statement to the node's agent: what "grant withdraw", "deny", "review" and "vouch" wrote with --out.
GRANT is the file of the grant that it is about; where the node activated the grant, none is needed. ` + thereHelp,
		Example: `  sallyport grant deny backup.grant --key bob.key --by bob --why "not during the migration" --out backup.denied
  sudo sallyport grant record backup.denied backup.grant`,
		Args: between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := node.check(cmd, c); err != nil {
				return err
			}
			signed, err := readSmall(args[0], grant.MaxEnvelope, "read statement", "`sallyport grant withdraw --out`, deny, review and vouch write such a file")
			if err != nil {
				return err
			}
			var envelope []byte
			if len(args) == 2 && !isGrantID(args[1]) {
				if envelope, err = c.readEnvelope(args[1]); err != nil {
					return err
				}
			}
			return c.record(cmd.Context(), node, signed, envelope)
		},
	}
	node.add(cmd)
	return cmd
}

// recorded is what the node took, for machines.
type recorded struct {
	Step  grant.Step `json:"step"`
	By    string     `json:"by"`
	Grant string     `json:"grant,omitempty"`
	State string     `json:"state,omitempty"`
}

// record hands a statement to the node, by what it says.
func (c *cli) record(ctx context.Context, node elsewhere, signed, envelope []byte) error {
	said, err := grant.PeekStatement(signed)
	if err != nil {
		return explained("read statement", err)
	}
	return c.hand(ctx, node, said.Step, signed, envelope, func(g *api.Grant) error {
		return c.show(recorded{said.Step, said.By, said.Grant, g.GetState()}, func(t *table) {
			t.row("recorded", fmt.Sprintf("%s by %s, for good", said.Step, said.By))
			if said.Step == grant.StepVouched {
				t.row("next", "grants that begin from now on: sallyport grant issue --not-before "+stamp(timestamppb.New(c.now()))+"; older ones are signed anew")
			}
			if said.Grant != "" {
				t.row("grant", said.Grant)
				t.row("state", either(g.GetState(), "never activated on this node"))
			}
		})
	})
}
