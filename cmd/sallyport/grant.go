package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Groups of commands in the help of grant.
const (
	groupAsk  = "ask"
	groupNode = "node"
	groupSay  = "say"
)

func (c *cli) grant() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "grant",
		Short: "Issue, approve, activate, end and review one grant",
		Long: `A grant is issued by whoever asks for it, approved by others where policy wants that, and activated on its node, where it
opens a path. It ends by itself, or is revoked. Each command says what comes next, and whose approval is missing.`,
		Args: cobra.ArbitraryArgs,
		RunE: group,

		SuggestionsMinimumDistance: suggestWithin,
	}
	cmd.AddGroup(&cobra.Group{ID: groupAsk, Title: "With files, anywhere:"}, &cobra.Group{ID: groupNode, Title: "On the node:"},
		&cobra.Group{ID: groupSay, Title: "Signed words, for good:"})
	addGroup(cmd, groupAsk, c.grantIssue(), c.grantApprove(), c.grantJoin(), c.grantShow(), c.grantAnswer())
	addGroup(cmd, groupNode, c.grantActivate(), c.grantRevoke(), c.grantChallenge(), c.grantRecord())
	addGroup(cmd, groupSay, c.grantWithdraw(), c.grantDeny(), c.grantReview(), c.grantVouch())
	return cmd
}

// refusalHint adds the next step to a refusal in which the agent named none.
func refusalHint(err error) error {
	if !errors.Is(err, client.ErrRefused) || hinted(err) {
		return err
	}
	return withHint(err, "nothing was changed; `sallyport grant show FILE --policy DIR` checks the grant with the resources in DIR")
}

func (c *cli) grantRevoke() *cobra.Command {
	var why string
	var node elsewhere
	cmd := &cobra.Command{
		Use:   "revoke ID",
		Short: "End a grant now: its paths are closed when the command is done",
		Long: `End a grant of this node, or with --node of another, by way of the collector. The collector's configuration says who
may (actors), and the node's whether it takes the collector's word (mayRevoke).`,
		Example: `  sallyport grant revoke 01J8ZQ4X5M3T9V0Y2B7C6D1E4F --why "backup is done"
  sallyport grant revoke 01J8ZQ4X5M3T9V0Y2B7C6D1E4F --collector 10.9.0.1:9443 --node db-1 --why "backup is done"`,
		Args:              exactly(1),
		ValidArgsFunction: c.completeGrant,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := node.check(cmd, c); err != nil {
				return err
			}
			if node != "" {
				return c.revokeThere(cmd.Context(), node, args[0], why)
			}
			return c.withAgent(cmd.Context(), func(ctx context.Context, a *client.Agent) error {
				g, err := a.Revoke(ctx, args[0], why)
				if err != nil {
					return err
				}
				return c.show(g, func(t *table) { grantTable(t, g) })
			})
		},
	}
	cmd.Flags().StringVar(&why, "why", "", "`TEXT` for the record")
	node.add(cmd)
	return cmd
}

func (c *cli) grantShow() *cobra.Command {
	var resources []string
	cmd := &cobra.Command{
		Use:   "show FILE|ID",
		Short: "Say in plain words what a grant allows",
		Long: `Say what a grant allows: of a file (- for standard input) without asking anybody, or by its
id of the node's agent. With --policy the file's signatures are verified, too, and the grant
is checked as the node would.`,
		Example: `  sallyport grant show backup.grant --policy /etc/sallyport/resources.d
  sudo sallyport grant show 01J8ZQ4X5M3T9V0Y2B7C6D1E4F`,
		Args:              exactly(1),
		ValidArgsFunction: cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault),
		RunE: func(cmd *cobra.Command, args []string) error {
			if isGrantID(args[0]) {
				return c.showActivated(cmd.Context(), args[0])
			}
			return c.showEnvelope(args[0], resources)
		},
	}
	cmd.Flags().StringSliceVar(&resources, "policy", nil, "check against the resources in these `FILES` or this directory")
	return cmd
}

// isGrantID tells an id from a file: a file of such a name must be written as ./NAME.
func isGrantID(s string) bool {
	_, err := ulid.ParseStrict(s)
	return err == nil
}

func (c *cli) showActivated(ctx context.Context, id string) error {
	return c.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		g, err := a.Grant(ctx, id)
		if err != nil {
			return err
		}
		return c.show(g, func(t *table) { grantTable(t, g) })
	})
}

func grantTable(t *table, g *api.Grant) {
	t.row("grant", g.GetId())
	t.row("state", g.GetState())
	t.row("service", g.GetService())
	t.row("clients", strings.Join(g.GetClients(), ", "))
	t.row("requester", g.GetRequester())
	t.row("reason", g.GetReason())
	t.row("ticket", g.GetTicket())
	t.row("activated", stamp(g.GetActivated()))
	t.row("deadline", stamp(g.GetDeadline()))
	if g.GetIdleTimeout() != nil {
		t.row("idle", "ends after "+span(g.GetIdleTimeout())+" without a packet")
	}
	t.row("slots", ports(g.GetSlots()))
	t.row("signed by", strings.Join(g.GetSigners(), ", "))
	if g.GetKind() != "" {
		t.row("kind", g.GetKind())
	}
	if g.GetReview() != "" {
		t.row("review", g.GetReview())
	}
	for _, said := range g.GetSignals() {
		t.row("signal", said)
	}
	if g.GetEndedWhy() != "" {
		t.row("ended why", g.GetEndedWhy())
	}
}

// shownGrant is a grant that was not activated yet, for machines.
type shownGrant struct {
	Grant    grant.Payload   `json:"grant"`
	Verified bool            `json:"verified"`
	Signers  []policy.Signer `json:"signers"`
}

func (c *cli) showEnvelope(path string, resources []string) error {
	envelope, err := c.readEnvelope(path)
	if err != nil {
		return err
	}
	if len(resources) > 0 {
		return c.showVerified(envelope, resources)
	}
	p, err := grant.Peek(envelope)
	if err != nil {
		return explained("read grant", err)
	}
	return c.show(shownGrant{Grant: p, Signers: []policy.Signer{}}, func(t *table) {
		payloadTable(t, p)
		t.row("signatures", "not verified: --policy names the resources with the keyring")
	})
}

// showVerified checks a grant as the node would. It knows neither the node's name nor its
// addresses, so those are left to the node.
func (c *cli) showVerified(envelope []byte, resources []string) error {
	set, err := loadPolicy(resources)
	if err != nil {
		return err
	}
	v, err := grant.Verify(envelope, set.Keyrings(), c.now())
	if err != nil {
		return explained("verify grant", err)
	}
	if err := c.show(shownGrant{Grant: v.Payload, Verified: true, Signers: v.Signers}, func(t *table) {
		payloadTable(t, v.Payload)
		t.row("signed by", people(v.Signers))
		answerTable(t, set.Evaluate(v.Facts(nil, time.Time{})))
		missingRows(t, set.MissingApprovals(v.Facts(nil, time.Time{}), c.now()))
	}); err != nil {
		return err
	}
	return explained("check grant", checkVerified(set, v, c))
}

func people(signers []policy.Signer) string {
	var list []string
	for _, s := range signers {
		list = append(list, fmt.Sprintf("%s (%s)", s.Person, s.KeyID))
	}
	return strings.Join(list, ", ")
}

// readEnvelope reads a grant's file, or standard input for "-".
func (c *cli) readEnvelope(path string) ([]byte, error) {
	r := c.stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, withHint(fmt.Errorf("read grant: %w", err), "`sallyport grant issue` writes such a file; - reads standard input")
		}
		defer f.Close()
		r = f
	}
	data, err := io.ReadAll(io.LimitReader(r, grant.MaxEnvelope+1))
	if err != nil {
		return nil, fmt.Errorf("read grant: %w", err)
	}
	return data, nil
}
