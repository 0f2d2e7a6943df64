package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// newKey is a key that was made, for people and machines.
type newKey struct {
	PublicKey string `json:"public_key"`
	KeyID     string `json:"key_id"`
	File      string `json:"file"`
}

func (c *cli) keygen() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "keygen",
		Short: "Make a key that signs grants",
		Long: `Make an Ed25519 key. The private half goes to a new file that only its owner can read; the
public half belongs in a Keyring, under the name of the person who holds the key.`,
		Example: `  sallyport keygen --out alice.key`,
		Args:    exactly(0),
		RunE: func(*cobra.Command, []string) error {
			if out == "" {
				return withHint(usagef("keygen: no file for the private key"), "name a new file with --out")
			}
			return c.makeKey(out)
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "new `FILE` for the private key")
	return cmd
}

func (c *cli) makeKey(path string) error {
	key, err := grant.GenerateKey()
	if err != nil {
		return err
	}
	if err := grant.WritePrivateKey(path, key); err != nil {
		return explained("make key", err)
	}
	made := newKey{PublicKey: key.Public().String(), KeyID: key.Public().ID(), File: path}
	return c.show(made, func(t *table) {
		t.row("public key", made.PublicKey)
		t.row("key id", made.KeyID)
		t.row("private key", fmt.Sprintf("%s (keep it; it cannot be made again)", made.File))
	})
}
