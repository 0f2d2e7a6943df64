package main

import (
	"context"
	"errors"
	"time"

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
		Example: `  sallyport grant approve backup.grant --key ~/.ssh/id_ed25519_sk --policy /etc/sallyport/resources.d --out backup.2.grant`,
		Args:    exactly(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return c.approve(cmd.Context(), &a, args[0]) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&a.key, "key", "", keyHelp)
	f.StringSliceVar(&a.resources, "policy", nil, "check against the resources in these `FILES` or this directory")
	f.StringVar(&a.out, "out", "", "new `FILE` for the approved grant (default: standard output)")
	f.BoolVarP(&a.yes, "yes", "y", false, "do not ask")
	return cmd
}

// approve says, checks, asks, signs and writes, in this order.
func (c *cli) approve(ctx context.Context, a *approval, file string) error {
	key, err := c.readKey(a.key)
	if err != nil {
		return err
	}
	set, err := c.resourcesAt(a.resources)
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
	if err := c.checkApproval(set, envelope, key.Public()); err != nil {
		return err
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
	return c.writeApproved(a.out, a.resources, set, p, envelope)
}

// resourcesAt reads the resources, if any are named.
func (c *cli) resourcesAt(resources []string) (*policy.Set, error) {
	if len(resources) == 0 {
		return nil, nil
	}
	return loadPolicy(resources)
}

// checkApproval refuses an approval that would count for nothing, where resources are at hand.
func (c *cli) checkApproval(set *policy.Set, envelope []byte, key policy.PublicKey) error {
	if set == nil {
		c.note(notChecked)
		return nil
	}
	v, err := grant.Verify(envelope, set.Keyrings(), c.now())
	if err != nil {
		return explained("verify grant", err)
	}
	if err := c.approver(set, key, v.Facts(nil, time.Time{})); err != nil {
		return inFlags("check key", err)
	}
	missing, err := c.missing(set, v)
	if err == nil && len(missing) == 0 {
		c.note("no approval is missing: policy allows this without yours")
	}
	return err
}

// writeApproved writes what has one more signature or several, and says what it still wants.
func (c *cli) writeApproved(out string, resources []string, set *policy.Set, p grant.Payload, envelope []byte) error {
	missing, err := c.sayMissing(envelope, set)
	if err != nil {
		return err
	}
	return c.write(out, signedGrant{p, envelope, othersKey, standing{resources, missing}})
}

func (c *cli) sayPayload(p grant.Payload) {
	t := newTable(c.stderr)
	payloadTable(t, p)
	t.Flush()
}

// missing gives the approvals that the grant still wants. One that is refused for another reason is not worth a signature.
func (c *cli) missing(set *policy.Set, v grant.Verified) ([]policy.MissingApproval, error) {
	missing, err := c.unapproved(set, v)
	return missing, explained("check grant", errors.Join(v.Payload.CheckTime(c.now()), err))
}

// sayMissing tells who has signed it, and whose approval it still wants.
func (c *cli) sayMissing(envelope []byte, set *policy.Set) ([]policy.MissingApproval, error) {
	if set == nil {
		return nil, nil
	}
	v, err := grant.Verify(envelope, set.Keyrings(), c.now())
	if err != nil {
		return nil, explained("verify grant", err)
	}
	missing, err := c.missing(set, v)
	if err != nil {
		return nil, err
	}
	t := newTable(c.stderr)
	t.row("signed by", people(v.Signers))
	t.row("policy", choose(len(missing) == 0, "allows this", "allows this, once it is approved"))
	missingRows(t, missing)
	return missing, t.Flush()
}
