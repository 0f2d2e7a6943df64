package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// issue is one run of `grant issue`.
type issue struct {
	terms     terms
	key       string
	resources []string
	pin       bool
	out       string
	yes       bool
}

func (c *cli) grantIssue() *cobra.Command {
	var i issue
	cmd := &cobra.Command{
		Use:     "issue",
		Aliases: []string{"request"},
		Short:   "Sign a grant: who may go around the proxy, to what, for how long, and why",
		Long: `Sign a grant with a key of a keyring. What it allows is said in plain words on standard error
before anything is signed. With --policy the grant is checked first as the node would check it,
and one that policy refuses is not signed. A grant does nothing until it is activated, and it
cannot be made longer: ask for another one.`,
		Example: `  sallyport grant issue --service postgres --client 10.1.0.2 --for 15m --node node-1 \
      --reason "nightly backup" --key alice.key --policy /etc/sallyport/resources.d --out backup.grant
  sallyport grant activate backup.grant --key alice.key`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.issue(cmd.Context(), &i) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	i.terms.add(f)
	f.StringVar(&i.key, "key", "", keyHelp)
	f.StringSliceVar(&i.resources, "policy", nil, "check against the resources in these `FILES` or this directory")
	f.BoolVar(&i.pin, "pin-policy", false, "make it valid only under the very resources of --policy")
	f.StringVar(&i.out, "out", "", "new `FILE` for the signed grant (default: standard output)")
	f.BoolVarP(&i.yes, "yes", "y", false, "do not ask")
	return cmd
}

// keyHelp says what --key takes.
const keyHelp = "`FILE` of the key to sign with: of sallyport keygen, or of OpenSSH, its .pub file for one in an agent or a device"

// issue checks, says, asks, signs and writes, in this order.
func (c *cli) issue(ctx context.Context, i *issue) error {
	key, err := c.readKey(i.key)
	if err != nil {
		return err
	}
	set, err := i.readPolicy()
	if err != nil {
		return err
	}
	p, err := i.payload(c, set, key.Public())
	if err != nil {
		return inFlags("issue grant", err)
	}
	missing, err := c.check(set, p, key.Public())
	if err != nil {
		return inFlags("check grant", err)
	}
	if err := c.say(p, key.Public(), set, missing); err != nil {
		return err
	}
	if !i.yes {
		if err := c.confirm(ctx, "sign this grant?"); err != nil {
			return err
		}
	}
	envelope, err := grant.Sign(ctx, p, key)
	if err != nil {
		return explained("sign grant", err)
	}
	return c.write(i.out, signedGrant{p, envelope, i.key, standing{i.resources, missing}})
}

func (c *cli) readKey(file string) (grant.SigningKey, error) {
	if file == "" {
		return nil, withHint(usagef("read key: no key is named"), "name a file with --key; `sallyport keygen` makes one, and a key of OpenSSH will do")
	}
	key, err := readSigningKey(file, c.stderr)
	return key, explained("read key", err)
}

// readPolicy gives nil where no resources are named.
func (i *issue) readPolicy() (*policy.Set, error) {
	if len(i.resources) > 0 {
		return loadPolicy(i.resources)
	}
	if i.pin {
		return nil, withHint(usagef("issue grant: --pin-policy has nothing to pin"), "name the resources with --policy")
	}
	return nil, nil
}

// payload takes the owner of the key for who asks: a login name is nobody in a keyring.
func (i *issue) payload(c *cli, set *policy.Set, key policy.PublicKey) (grant.Payload, error) {
	var owner string
	switch signer, err := signerOf(set, key, c); {
	case set == nil && i.terms.requester == "":
		return grant.Payload{}, withHint(usagef("nobody knows whose key it is"), "name the resources with --policy, or the key's owner in the Keyring with --requester")
	case set != nil && err != nil:
		return grant.Payload{}, err
	default:
		owner = signer.Person
	}
	if err := i.terms.fill(set); err != nil {
		return grant.Payload{}, err
	}
	p, err := i.terms.payload(c.now(), owner)
	if i.pin {
		p.PolicyDigest = set.Digest()
	}
	named, unnamed := p.Named(c.now())
	if unnamed == nil {
		p = named
	}
	return p, errors.Join(err, unnamed, p.Validate())
}

// check asks the evaluator that the node asks, and tells apart what only others' approval is missing for. Without
// resources the node alone decides.
func (c *cli) check(set *policy.Set, p grant.Payload, key policy.PublicKey) (missing []policy.MissingApproval, err error) {
	if set == nil {
		return nil, nil
	}
	signer, err := signerOf(set, key, c)
	if err != nil {
		return nil, err
	}
	v := grant.Verified{Payload: p, Signers: []policy.Signer{signer}}
	missing, err = c.unapproved(set, v)
	answer := set.Evaluate(v.Facts(nil, time.Time{}))
	if err != nil {
		c.sayRefusal(answer)
	} else if answer.Open != "" {
		fmt.Fprintln(c.stderr, "note: "+answer.Open)
	}
	return missing, err
}

// unapproved gives the approvals that are missing, if nothing else is wrong.
func (c *cli) unapproved(set *policy.Set, v grant.Verified) ([]policy.MissingApproval, error) {
	err := checkVerified(set, v, c)
	for _, e := range policy.Errors(err) {
		if !errors.Is(e, policy.ErrUnapproved) {
			return nil, err
		}
	}
	return set.MissingApprovals(v.Facts(nil, time.Time{}), c.now()), nil
}

// sayRefusal tells what each policy has against a grant, where there are several: the error is that of the nearest.
func (c *cli) sayRefusal(a policy.Answer) {
	if a.Allowed || len(a.Near) < 2 {
		return
	}
	t := newTable(c.stderr)
	answerTable(t, a)
	t.Flush()
}

// checkVerified leaves out what only the node knows: its name, its own addresses, and when it is activated.
func checkVerified(set *policy.Set, v grant.Verified, c *cli) error {
	_, err := set.CheckGrant(v.Facts(nil, time.Time{}))
	return errors.Join(v.Payload.CheckPolicy(set.Digest()), err)
}

// signerOf finds whose key it is.
func signerOf(set *policy.Set, key policy.PublicKey, c *cli) (policy.Signer, error) {
	k, ok := policy.KnownKeys(set.Keyrings())[key.ID()]
	switch {
	case !ok:
		return policy.Signer{}, &policy.Error{Field: "key", Msg: fmt.Sprintf("no Keyring has the key %s", key.ID()), Hint: "add its public key to a Keyring: " + key.String()}
	case k.Revoked:
		return policy.Signer{}, &policy.Error{Field: "key", Msg: fmt.Sprintf("the key %s of %s is revoked", key.ID(), k.Person), Hint: "sign with another key"}
	case k.Ended(c.now()):
		return policy.Signer{}, &policy.Error{Field: "key", Msg: fmt.Sprintf("the key %s of %s ended at %s", key.ID(), k.Person, k.Until.Format(clock)), Hint: "sign with a key that is still valid"}
	}
	return policy.Signer{Person: k.Person, KeyID: key.ID(), Uses: k.Uses}, nil
}

// writeNew writes a file that must not be there yet, and leaves none behind when it fails.
func writeNew(path string, data []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// say tells in plain words what is about to be signed, and by whom.
func (c *cli) say(p grant.Payload, key policy.PublicKey, set *policy.Set, missing []policy.MissingApproval) error {
	t := newTable(c.stderr)
	payloadTable(t, p)
	t.row("signed by", signedBy(set, key, c))
	t.row("policy", choose(set == nil, "not checked here: the node checks at activation (--policy checks now)",
		choose(len(missing) == 0, "allows this", "allows this, once it is approved")))
	missingRows(t, missing)
	t.line("")
	return t.Flush()
}

func signedBy(set *policy.Set, key policy.PublicKey, c *cli) string {
	if set == nil {
		return key.ID()
	}
	signer, err := signerOf(set, key, c)
	if err != nil {
		return key.ID()
	}
	return people([]policy.Signer{signer})
}
