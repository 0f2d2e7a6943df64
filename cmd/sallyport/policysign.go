package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func (c *cli) policyDiff() *cobra.Command {
	return &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Say what a set of resources allows beyond another",
		Long: `Compare two sets of resources, each a FILE or a DIR, and list everything in which NEW is looser than OLD. It is
what a node compares that asks for signatures: with nothing on the list it takes NEW unsigned. The node's own set
in force is /run/sallyport/policy.yaml.`,
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
			looser := policy.Loosenings(old, next)
			return c.show(newDiff(old, next, looser), func(t *table) { diffTable(t, old, next, looser) })
		},
	}
}

// policyChange is the outcome of a comparison for machines.
type policyChange struct {
	Same       bool               `json:"same"`
	Looser     bool               `json:"looser"`
	Loosenings []policy.Loosening `json:"loosenings"`
	Version    uint64             `json:"version"`
	Digest     string             `json:"digest"`
}

func newDiff(old, next *policy.Set, looser []policy.Loosening) policyChange {
	return policyChange{Same: old.Digest() == next.Digest(), Looser: len(looser) > 0,
		Loosenings: append([]policy.Loosening{}, looser...), Version: next.Version(), Digest: next.Digest()}
}

func diffTable(t *table, old, next *policy.Set, looser []policy.Loosening) {
	for _, l := range looser {
		t.row("looser", l)
	}
	switch {
	case old.Digest() == next.Digest():
		t.row("signature", "not needed: nothing differs")
	case len(looser) == 0:
		t.row("signature", "not needed: nothing is looser")
	case next.Name() != old.Name():
		t.row("signature", fmt.Sprintf("no node takes it that has the other: it is the set %q, and not %q", next.Name(), old.Name()))
	case next.Version() <= old.Version():
		t.row("signature", fmt.Sprintf("needed, over a higher version than %d: the ResourceSet says %d", old.Version(), next.Version()))
	default:
		t.row("signature", fmt.Sprintf("needed, of %s", plural(old.Signers(), "person")))
	}
}

// signing is one run of `policy sign`.
type signing struct {
	key     string
	inForce []string
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
	f.StringVar(&s.key, "key", "", "`FILE` of the key to sign with: of sallyport keygen, or of OpenSSH, its .pub file for one in an agent or a device")
	f.StringSliceVar(&s.inForce, "in-force", nil, "compare with the resources in these `FILES` or this directory")
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
	if err := c.saySet(s.inForce, set); err != nil {
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
		t.row("next", "sallyport policy verify "+dir)
	})
}

// signedPolicy is what was written, for machines.
type signedPolicy struct {
	File    string `json:"file"`
	Version uint64 `json:"version"`
	Digest  string `json:"digest"`
}

// saySet tells what is about to be signed.
func (c *cli) saySet(inForce []string, set *policy.Set) error {
	t := newTable(c.stderr)
	t.row("set", set.Name())
	t.row("version", set.Version())
	t.row("digest", set.Digest())
	if len(inForce) > 0 {
		old, err := loadPolicy(inForce)
		if err != nil {
			return err
		}
		diffTable(t, old, set, policy.Loosenings(old, set))
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

func (c *cli) policyVerify() *cobra.Command {
	var inForce, pinned []string
	cmd := &cobra.Command{
		Use:   "verify DIR",
		Short: "Say who signed a set of resources, as a node would",
		Long: `Verify the signatures of the set of resources in DIR. They count by the keyrings of --in-force and by the keys of
--pinned (policyKeys of a node's configuration). Without either, by the keyrings of DIR itself, which a node never takes
anybody's word for.`,
		Example: `  sallyport policy verify /etc/sallyport/resources.d --in-force /run/sallyport/policy.yaml`,
		Args:    exactly(1),
		RunE:    func(_ *cobra.Command, args []string) error { return c.verifyPolicy(args[0], inForce, pinned) },
	}
	cmd.Flags().StringSliceVar(&inForce, "in-force", nil, "verify by the keyrings in these `FILES` or this directory")
	cmd.Flags().StringSliceVar(&pinned, "pinned", nil, "verify by this public `KEY`, too; may be repeated")
	return cmd
}

func (c *cli) verifyPolicy(dir string, inForce, pinned []string) error {
	set, err := loadPolicy([]string{dir})
	if err != nil {
		return err
	}
	old, keys := set, set.Keyrings()
	if len(inForce) > 0 {
		if old, err = loadPolicy(inForce); err != nil {
			return err
		}
		keys = old.Keyrings()
	}
	nodes, err := pinnedKeys(pinned)
	if err != nil {
		return err
	}
	if len(pinned) > 0 && len(inForce) == 0 {
		keys = nil
	}
	envelope, err := os.ReadFile(filepath.Join(dir, policy.SignatureFile))
	if err != nil {
		return withHint(fmt.Errorf("read signatures: %w", err), "`sallyport policy sign` makes them")
	}
	wanted := 1
	if len(inForce) > 0 {
		wanted = old.Signers()
	}
	signers, err := grant.VerifyResources(envelope, set, keys, nodes, wanted, c.now())
	if err != nil {
		return explained("verify resources", err)
	}
	return c.show(verifiedPolicy{Version: set.Version(), Digest: set.Digest(), Signers: signers}, func(t *table) {
		t.row("signed by", people(signers))
		t.row("version", set.Version())
		if len(inForce) > 0 {
			diffTable(t, old, set, policy.Loosenings(old, set))
		} else if len(pinned) == 0 {
			t.row("by", "the keyrings of these resources themselves; a node goes by those in force")
		}
	})
}

// verifiedPolicy is the outcome for machines.
type verifiedPolicy struct {
	Version uint64          `json:"version"`
	Digest  string          `json:"digest"`
	Signers []policy.Signer `json:"signers"`
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
