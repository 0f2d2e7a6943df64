package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func (c *cli) policyDiff() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Say in what a set of resources differs from another, and what it allows beyond it",
		Long: `Compare two sets of resources, each a FILE or a DIR, and list every change: what makes NEW looser, what makes it
tighter, and what does neither. It is what a node compares that asks for signatures: with nothing looser it takes NEW
unsigned. The node's own set in force is /run/sallyport/policy.yaml. A signed set counts on nodes of its name alone: of a node that
moves to another set, --set says the name that its configuration has by then.`,
		Example: `  sallyport policy diff /run/sallyport/policy.yaml /etc/sallyport/resources.d`,
		Args:    exactly(2),
		RunE: func(_ *cobra.Command, args []string) error {
			old, err := loadPolicy(args[:1])
			if err != nil {
				return err
			}
			next, err := loadPolicy(args[1:])
			if err != nil {
				return err
			}
			d := newDiff(old, next, name)
			return c.show(d, d.table)
		},
	}
	setFlag(cmd, &name, "OLD")
	return cmd
}

// setFlag takes the name of the set that a node's configuration says, which is what the node goes by, and not the name in force.
func setFlag(cmd *cobra.Command, name *string, inForce string) {
	cmd.Flags().StringVar(name, "set", "", "for a node whose configuration has this `NAME` as policySet (default: that of "+inForce+")")
}

// setInForce reads what nodes have; nil where nobody says it.
func (c *cli) setInForce(files []string, name string) (*policy.Set, error) {
	if len(files) == 0 && name != "" {
		return nil, withHint(usagef("compare resources: --set says of which node, and nobody says what it has"), "name that with --in-force, too")
	}
	return c.resourcesAt(files)
}

// setWords are the flag as it is typed; none for none.
func setWords(name string) []string {
	if name == "" {
		return nil
	}
	return []string{"--set", name}
}

// policyDiff is the outcome of a comparison, for people and machines.
type policyDiff struct {
	Same      bool            `json:"same"`
	Looser    bool            `json:"looser"`
	Changes   []policy.Change `json:"changes"`
	Version   uint64          `json:"version"`
	Digest    string          `json:"digest"`
	Signature string          `json:"signature"` // whether a node asks for one, in words

	refused error // why no signature would do; nil where one would
}

// newDiff compares for a node that has the old set and takes those of a name; none is the old set's.
func newDiff(old, next *policy.Set, name string) policyDiff {
	name = cmp.Or(name, old.Name())
	d := policyDiff{Same: old.Digest() == next.Digest(), Changes: append([]policy.Change{}, policy.Changes(old, next)...),
		Version: next.Version(), Digest: next.Digest()}
	d.Looser = slices.ContainsFunc(d.Changes, func(c policy.Change) bool { return c.Effect == policy.Looser })
	switch {
	case d.Same:
		d.Signature = "not needed: nothing differs"
	case !d.Looser:
		d.Signature = "not needed: nothing is looser"
	case next.Name() != name:
		d.Signature = fmt.Sprintf("no use: this is the set %q, and the node's is %q", next.Name(), name)
		d.refused = withHint(fmt.Errorf("this is the set %q, and the node's is %q: no signature makes the node take it", next.Name(), name),
			"take the set that is meant for the node; of a node whose configuration says policySet: %s ask with %s", next.Name(), strings.Join(setWords(next.Name()), " "))
	case next.Version() <= old.Version():
		d.Signature = fmt.Sprintf("needed, over a higher version than %d: the ResourceSet says %d", old.Version(), next.Version())
		d.refused = withHint(fmt.Errorf("a signature is %s", d.Signature), "raise the version of the ResourceSet, and have it signed with `sallyport policy sign`")
	default:
		d.Signature = fmt.Sprintf("needed, of %s", plural(old.Signers(), "person"))
	}
	return d
}

func (d policyDiff) table(t *table) {
	for _, effect := range []policy.Effect{policy.Looser, policy.Tighter, policy.Neither} {
		for _, change := range d.Changes {
			if change.Effect == effect {
				t.row(effect, change.Loosening)
			}
		}
	}
	t.row("signature", d.Signature)
}

// signing is one run of `policy sign`.
type signing struct {
	key     string
	inForce []string
	name    string // of the node's set; none is the one in force
	yes     bool
}

func (c *cli) policySign() *cobra.Command {
	var s signing
	cmd := &cobra.Command{
		Use:   "sign DIR",
		Short: "Sign a set of resources, for nodes that ask for it",
		Long: `Sign the set of resources in DIR: the digest of all of it, with the name and version of its ResourceSet. Nodes take it
whose configuration says that name (policySet). The signature goes into ` + policy.SignatureFile + ` in DIR, beside those of others
for the same set. With --in-force it says first in what the set is looser than another.`,
		Example: `  sallyport policy sign /etc/sallyport/resources.d --key ~/.ssh/id_ed25519_sk --in-force /run/sallyport/policy.yaml`,
		Args:    exactly(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return c.signPolicy(cmd.Context(), &s, args[0]) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&s.key, "key", "", keyHelp)
	f.StringSliceVar(&s.inForce, "in-force", nil, "compare with the resources in these `FILES` or this directory")
	setFlag(cmd, &s.name, "--in-force")
	f.BoolVarP(&s.yes, "yes", "y", false, "do not ask")
	return cmd
}

// signPolicy says, asks, signs and writes, in this order.
func (c *cli) signPolicy(ctx context.Context, s *signing, dir string) error {
	key, err := c.readKey(s.key)
	if err != nil {
		return err
	}
	set, err := loadPolicy([]string{dir})
	if err != nil {
		return err
	}
	if set.Version() == 0 {
		return withHint(errors.New("sign resources: no ResourceSet gives them a version"), "add one to the directory: kind: ResourceSet, spec: {version: 1}")
	}
	old, err := c.setInForce(s.inForce, s.name)
	if err != nil {
		return err
	}
	if err := c.checkOfficer(old, key.Public()); err != nil {
		return inFlags("check key", err)
	}
	if err := c.saySet(old, set, s.name); err != nil {
		return err
	}
	if !s.yes {
		if err := c.confirm(ctx, "sign these resources?"); err != nil {
			return err
		}
	}
	file := filepath.Join(dir, policy.SignatureFile)
	before, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read signatures: %w", err)
	}
	envelope, err := grant.SignResources(ctx, set, before, key)
	if err != nil {
		return explained("sign resources", err)
	}
	if err := replace(file, append(envelope, '\n')); err != nil {
		return fmt.Errorf("write signatures: %w", err)
	}
	return c.show(signedPolicy{File: file, Version: set.Version(), Digest: set.Digest()}, func(t *table) {
		t.row("file", file)
		t.row("next", commandLine("policy", "verify", dir, repeated("--in-force", s.inForce), setWords(s.name)))
	})
}

// signedPolicy is what was written, for machines.
type signedPolicy struct {
	File    string `json:"file"`
	Version uint64 `json:"version"`
	Digest  string `json:"digest"`
}

// checkOfficer holds that the key may sign resources, by the set that is in force. One that no Keyring has may be of a node's
// own configuration.
func (c *cli) checkOfficer(inForce *policy.Set, key policy.PublicKey) error {
	if inForce == nil {
		c.note("nobody has checked whether this key counts for anything: --in-force names the resources that nodes have")
		return nil
	}
	if _, known := policy.KnownKeys(inForce.Keyrings())[key.ID()]; !known {
		c.note("no Keyring in force has the key %s: it counts only on nodes whose configuration has it (policyKeys)", key.ID())
		return nil
	}
	_, err := c.signerFor(inForce, key, policy.UseResources)
	return err
}

// saySet tells what is about to be signed.
func (c *cli) saySet(old, set *policy.Set, name string) error {
	t := newTable(c.stderr)
	t.row("set", set.Name())
	t.row("version", set.Version())
	t.row("digest", set.Digest())
	if old != nil {
		newDiff(old, set, name).table(t)
	}
	return t.Flush()
}

// replace writes a file as a whole: a node that looks in between sees the old one or the new one.
func replace(path string, data []byte) error {
	beside := path + ".new"
	if err := os.WriteFile(beside, data, 0o644); err != nil {
		return err
	}
	return os.Rename(beside, path)
}

// verifying is one run of `policy verify`.
type verifying struct {
	inForce, pinned []string
	name            string // of the node's set; none is the one in force
}

func (c *cli) policyVerify() *cobra.Command {
	var v verifying
	cmd := &cobra.Command{
		Use:   "verify DIR",
		Short: "Say who signed a set of resources, as a node would",
		Long: `Verify the signatures of the set of resources in DIR. They count by the keyrings of --in-force and by the keys of
--pinned (policyKeys of a node's configuration). With --in-force it answers for a node that has that set and asks for signatures:
every change is listed, and the exit code is 0 if the node takes DIR, signed or not, and 3 if it does not. A node takes signed sets of
the name that its configuration says (policySet): of one that moves to another set, --set says the new name. Without --in-force and
--pinned, signatures count by the keyrings of DIR itself, which a node never takes anybody's word for.`,
		Example: `  sallyport policy verify /etc/sallyport/resources.d --in-force /run/sallyport/policy.yaml`,
		Args:    exactly(1),
		RunE:    func(_ *cobra.Command, args []string) error { return c.verifyPolicy(args[0], v) },
	}
	cmd.Flags().StringSliceVar(&v.inForce, "in-force", nil, "verify by the keyrings in these `FILES` or this directory, as a node that has them")
	cmd.Flags().StringSliceVar(&v.pinned, "pinned", nil, "verify by this public `KEY`, too; may be repeated")
	setFlag(cmd, &v.name, "--in-force")
	return cmd
}

func (c *cli) verifyPolicy(dir string, v verifying) error {
	set, err := loadPolicy([]string{dir})
	if err != nil {
		return err
	}
	old, err := c.setInForce(v.inForce, v.name)
	if err != nil {
		return err
	}
	pinned, err := pinnedKeys(v.pinned)
	if err != nil {
		return err
	}
	signers, unsigned := c.resourceSigners(dir, set, old, pinned)
	if old == nil {
		return c.showSigners(set, len(v.pinned) == 0, signers, unsigned)
	}
	d := newDiff(old, set, v.name)
	takes := verifiedPolicy{Version: set.Version(), Digest: set.Digest(), Signers: append([]policy.Signer{}, signers...), Taken: !d.Looser || unsigned == nil && d.refused == nil, Changes: d.Changes}
	if err := c.show(takes, func(t *table) {
		d.table(t)
		t.row("signed by", people(signers))
		t.row("node", choose(takes.Taken, "takes it", "does not take it"))
	}); err != nil || takes.Taken {
		return err
	}
	if d.refused != nil {
		return refused(fmt.Errorf("verify resources: %w", d.refused))
	}
	return refused(unsigned)
}

// resourceSigners are those whose signatures count: by the set in force, or else by the set itself, and by pinned keys.
func (c *cli) resourceSigners(dir string, set, old *policy.Set, pinned []policy.PublicKey) ([]policy.Signer, error) {
	keys, wanted := set.Keyrings(), 1
	switch {
	case old != nil:
		keys, wanted = old.Keyrings(), old.Signers()
	case len(pinned) > 0:
		keys = nil
	}
	envelope, err := os.ReadFile(filepath.Join(dir, policy.SignatureFile))
	if err != nil {
		return nil, withHint(fmt.Errorf("read signatures: %w", err), "`sallyport policy sign` makes them")
	}
	signers, err := grant.VerifyResources(envelope, set, keys, pinned, wanted, c.now())
	return signers, explained("verify resources", err)
}

// showSigners tells who signed a set where nobody knows what is in force.
func (c *cli) showSigners(set *policy.Set, itself bool, signers []policy.Signer, unsigned error) error {
	if unsigned != nil {
		return unsigned
	}
	v := verifiedPolicy{Version: set.Version(), Digest: set.Digest(), Signers: signers}
	return c.show(v, func(t *table) {
		t.row("signed by", people(signers))
		t.row("version", set.Version())
		if itself {
			t.row("by", "the keyrings of these resources themselves; a node goes by those in force")
		}
	})
}

// verifiedPolicy is the outcome for machines.
type verifiedPolicy struct {
	Version uint64          `json:"version"`
	Digest  string          `json:"digest"`
	Signers []policy.Signer `json:"signers"`
	Taken   bool            `json:"taken"`             // by a node that has the set in force; false where none is named
	Changes []policy.Change `json:"changes,omitempty"` // from the set in force
}

func pinnedKeys(pinned []string) (keys []policy.PublicKey, err error) {
	for _, text := range pinned {
		key, err := policy.ParsePublicKey(text)
		if err != nil {
			return nil, explained("read --pinned", err)
		}
		keys = append(keys, key)
	}
	return keys, nil
}
