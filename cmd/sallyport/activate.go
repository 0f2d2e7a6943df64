package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/grant"
)

// activate is one run of `grant activate`.
type activate struct {
	key, answer string
	yes         bool
}

func (c *cli) grantActivate() *cobra.Command {
	var a activate
	cmd := &cobra.Command{
		Use:   "activate FILE",
		Short: "Open the path of a signed grant on this node",
		Long: `Hand a signed grant (FILE, or - for standard input) to the node's agent. The node asks who asked for the
grant to sign that it begins, here and now; --key does that in one go, after it has said what opens
and asked. Where the key is elsewhere, "grant challenge" on the node and "grant answer" beside the key
make a file for --answer. When the command is done, the path is open, the grant is in the durable
record, and its deadline runs.`,
		Example: `  sallyport grant activate backup.grant --key alice.key
  sallyport grant activate backup.grant --answer backup.answer`,
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error { return c.activate(cmd.Context(), a, args[0]) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&a.key, "key", "", "`FILE` of the requester's key, to answer the node's challenge with")
	f.StringVar(&a.answer, "answer", "", "`FILE` that \"grant answer\" wrote")
	f.BoolVarP(&a.yes, "yes", "y", false, "do not ask")
	cmd.MarkFlagsMutuallyExclusive("key", "answer")
	return cmd
}

func (c *cli) activate(ctx context.Context, a activate, file string) error {
	envelope, err := c.readEnvelope(file)
	if err != nil {
		return err
	}
	answer, err := c.answerFor(ctx, a, envelope)
	if err != nil {
		return err
	}
	return c.withAgent(ctx, func(ctx context.Context, agent *client.Agent) error {
		g, err := agent.Activate(ctx, envelope, answer)
		if err != nil {
			return refusalHint(err)
		}
		return c.show(g, func(t *table) {
			grantTable(t, g)
			t.row("to end it", commandLine("grant", "revoke", g.GetId(), "--why", "TEXT"))
		})
	})
}

// answerFor reads the answer, or makes it here. A person may take time to touch a key, so that does not count as the node's.
func (c *cli) answerFor(ctx context.Context, a activate, envelope []byte) ([]byte, error) {
	switch {
	case a.answer != "":
		return readSmall(a.answer, grant.MaxEnvelope, "read answer", "`sallyport grant answer` writes such a file")
	case a.key == "":
		return nil, withHint(usagef("activate grant: nobody answers the node's challenge"),
			"name the requester's key with --key, or see `sallyport grant challenge --help` where it is not at hand")
	}
	key, err := c.readKey(a.key)
	if err != nil {
		return nil, err
	}
	if err := c.agree(ctx, envelope, a.yes); err != nil {
		return nil, err
	}
	challenge, err := c.challenge(ctx)
	if err != nil {
		return nil, err
	}
	answer, err := grant.Answer(ctx, envelope, challenge, key, c.now())
	return answer, explained("activate grant", err)
}

// agree says what is about to begin, and asks.
func (c *cli) agree(ctx context.Context, envelope []byte, yes bool) error {
	p, err := grant.Peek(envelope)
	if err != nil {
		return explained("read grant", err)
	}
	t := newTable(c.stderr)
	payloadTable(t, p)
	t.row("opens", fmt.Sprintf("now, on %s, until %s", p.Audience, p.Deadline(c.now()).UTC().Format(time.RFC3339)))
	if err := t.Flush(); err != nil || yes {
		return err
	}
	return c.confirm(ctx, "begin this?")
}

func (c *cli) challenge(ctx context.Context) (challenge []byte, err error) {
	err = c.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		challenge, err = a.Challenge(ctx)
		return err
	})
	return challenge, err
}

func (c *cli) grantChallenge() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "challenge",
		Short: "Ask the node for a challenge, for a key that is not at hand",
		Long: `Ask the node's agent for a challenge. Whoever activates a grant, or vouches for the node, answers one: once,
within a quarter of an hour, and before the agent is restarted. It is no secret.`,
		Example: `  node$   sallyport grant challenge --out node-1.challenge
  laptop$ sallyport grant answer backup.grant --challenge node-1.challenge --key alice.key --out backup.answer
  node$   sallyport grant activate backup.grant --answer backup.answer`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			challenge, err := c.challenge(cmd.Context())
			if err != nil {
				return err
			}
			return c.writeSigned(out, challenge, commandLine("grant", "answer", "GRANT", "--challenge", out, "--key", othersKey))
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "new `FILE` for the challenge (default: standard output)")
	return cmd
}

func (c *cli) grantAnswer() *cobra.Command {
	var challenge, key, out string
	var yes bool
	cmd := &cobra.Command{
		Use:   "answer FILE",
		Short: "Sign that a grant begins, in answer to a node's challenge",
		Long: `Sign that the grant in FILE begins now on the node that made the challenge, with a key of whoever asked
for the grant. It needs no node and no network. FILE - is standard input.`,
		Example: `  sallyport grant answer backup.grant --challenge node-1.challenge --key alice.key --out backup.answer`,
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			signer, err := c.readKey(key)
			if err != nil {
				return err
			}
			envelope, err := c.readEnvelope(args[0])
			if err != nil {
				return err
			}
			asked, err := readSmall(challenge, grant.MaxChallenge, "read challenge", "name the file that `sallyport grant challenge` wrote with --challenge")
			if err != nil {
				return err
			}
			if err := c.agree(cmd.Context(), envelope, yes); err != nil {
				return err
			}
			answer, err := grant.Answer(cmd.Context(), envelope, asked, signer, c.now())
			if err != nil {
				return explained("answer challenge", err)
			}
			return c.writeSigned(out, answer, commandLine("grant", "activate", args[0], "--answer", out))
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&challenge, "challenge", "", "`FILE` with the node's challenge")
	f.StringVar(&key, "key", "", "`FILE` of a key of whoever asked for the grant")
	f.StringVar(&out, "out", "", "new `FILE` for the answer (default: standard output)")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// writtenFile is what was written, for machines.
type writtenFile struct {
	File string `json:"file"`
}

// writeSigned writes to a new file, or to standard output where none is named.
func (c *cli) writeSigned(path string, data []byte, next string) error {
	data = append(data, '\n')
	if path == "" {
		_, err := c.stdout.Write(data)
		return err
	}
	if err := writeNew(path, data); err != nil {
		return withHint(fmt.Errorf("write file: %w", err), "name a new file with --out")
	}
	return c.show(writtenFile{path}, func(t *table) {
		t.row("file", path)
		t.row("next", next)
	})
}

// readSmall reads a file up to a size; what is longer is for its reader to refuse.
func readSmall(path string, most int64, what, hint string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, withHint(fmt.Errorf("%s: %w", what, err), "%s", hint)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return data, nil
}
