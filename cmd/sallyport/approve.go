package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// approval is one run of `grant approve`.
type approval struct {
	key       string
	resources []string
	out       string
	yes       bool
}

func (c *cli) grantApprove() *cobra.Command {
	var a approval
	cmd := &cobra.Command{
		Use:   "approve FILE",
		Short: "Add your signature to what somebody else asks for",
		Long: `Add a signature to a grant that somebody else asked for. It says in the same plain words what the grant allows
before anything is signed. With --policy it also says whose approval is still missing after yours. FILE - is standard input.`,
		Example: `  sallyport grant approve backup.grant --key ~/.ssh/id_ed25519_sk --policy /etc/sallyport/resources.d --out approved.grant`,
		Args:    exactly(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return c.approve(cmd.Context(), &a, args[0]) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&a.key, "key", "", "`FILE` of the key to sign with: of sallyport keygen, or of OpenSSH, its .pub file for one in an agent or a device")
	f.StringSliceVar(&a.resources, "policy", nil, "check against the resources in these `FILES` or this directory")
	f.StringVar(&a.out, "out", "", "new `FILE` for the approved grant (default: standard output)")
	f.BoolVarP(&a.yes, "yes", "y", false, "do not ask")
	return cmd
}

// approve says, asks, signs, checks and writes, in this order.
func (c *cli) approve(ctx context.Context, a *approval, file string) error {
	key, err := c.readKey(a.key)
	if err != nil {
		return err
	}
	set, err := c.approverIn(a.resources, key.Public())
	if err != nil {
		return err
	}
	envelope, err := c.readEnvelope(file)
	if err != nil {
		return err
	}
	p, err := grant.Peek(envelope)
	if err != nil {
		return explained("read grant", err)
	}
	c.sayPayload(p)
	if !a.yes {
		if err := c.confirm(ctx, "approve this?"); err != nil {
			return err
		}
	}
	if envelope, err = grant.Approve(ctx, envelope, key); err != nil {
		return explained("approve grant", err)
	}
	if err := c.sayMissing(envelope, set); err != nil {
		return err
	}
	return c.writeGrant(a.out, p.ID, envelope, "KEY, by "+p.Requester)
}

// approverIn reads the resources, if any are named, and holds that the key is one that they know.
func (c *cli) approverIn(resources []string, key policy.PublicKey) (*policy.Set, error) {
	if len(resources) == 0 {
		return nil, nil
	}
	set, err := loadPolicy(resources)
	if err != nil {
		return nil, err
	}
	_, err = signerOf(set, key, c)
	return set, inFlags("check key", err)
}

func (c *cli) sayPayload(p grant.Payload) {
	t := newTable(c.stderr)
	payloadTable(t, p)
	t.Flush()
}

// sayMissing tells whose approval the grant still wants. One that is refused for another reason is not worth another signature.
func (c *cli) sayMissing(envelope []byte, set *policy.Set) error {
	if set == nil {
		return nil
	}
	v, err := grant.Verify(envelope, set.Keyrings(), c.now())
	if err != nil {
		return explained("verify grant", err)
	}
	missing, err := unapproved(errors.Join(v.Payload.CheckTime(c.now()), checkVerified(set, v, c)))
	if err != nil {
		return explained("check grant", err)
	}
	t := newTable(c.stderr)
	t.row("signed by", people(v.Signers))
	for _, e := range missing {
		t.row("missing", e.Hint)
	}
	if len(missing) == 0 {
		t.row("policy", "allows this")
	}
	return t.Flush()
}
