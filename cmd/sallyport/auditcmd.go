package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// Exit codes of what verifies: those of proof.Verdict. A command line that is wrong cannot tell either.
const (
	exitDisproved  = int(proof.Disproved)
	exitCannotTell = int(proof.CannotTell)
)

const verdictCodesHelp = `Exit codes:
  0  proven
  1  disproved: something was changed, taken out or put in, or the log has two histories
  2  cannot tell: a file is missing, cut off or of another kind, or the command line is wrong`

func (c *cli) audit() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "The log: is it whole, and is it what the nodes sealed",
		Long: `Look after the collector's log. Nodes seal what they send, and the collector appends each seal to a log that can only
grow. What "audit export" writes can be verified by anybody, with no network, who has the log's public key. That
key is in the collector's data directory as log.pub: get it from there, or from whoever runs the collector, and keep it.`,
		Args: cobra.ArbitraryArgs,
		RunE: group,
	}
	cmd.AddCommand(c.auditVerify(), c.auditConsistency(), c.auditGaps(), c.auditExport(), c.auditKey())
	return cmd
}

func (c *cli) auditKey() *cobra.Command {
	return &cobra.Command{
		Use:   "key",
		Short: "The public key of the collector's log, as the collector tells it",
		Long: `Show the key that the collector says its checkpoints are signed with. This is its own word: to verify against it shows
that the log agrees with itself. Compare the key with log.pub in the collector's data directory once, and keep it.`,
		Example: `  sallyport audit key --collector 10.9.0.1:9443`,
		Args:    exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.wantsCollector("audit key"); err != nil {
				return err
			}
			return c.withAudit(cmd.Context(), false, func(ctx context.Context, a *client.Audit) error {
				reply, err := a.Log(ctx, 0)
				if err != nil {
					return err
				}
				return c.showKey(reply)
			})
		},
	}
}

// logKey is the key of a log, for machines.
type logKey struct {
	Key    string `json:"key"`
	Origin string `json:"origin"`
	Size   int64  `json:"size"`
}

func (c *cli) showKey(reply *api.LogReply) error {
	key, err := note.NewVerifier(reply.GetKey())
	if err != nil {
		return fmt.Errorf("read the collector's key: %w", err)
	}
	head, err := proof.OpenCheckpoint(reply.GetGrown().GetCheckpoint(), key)
	if err != nil {
		return withHint(&exitError{exitDisproved, fmt.Errorf("the collector's checkpoint is not signed by its own key: %w", err)},
			"do not trust this log before it is known why")
	}
	if c.output == formatTable {
		fmt.Fprintln(c.stdout, escape(reply.GetKey()))
		c.note("this is the collector's own word; compare it with log.pub in its data directory")
		return nil
	}
	return c.showObject(logKey{reply.GetKey(), head.Origin, head.Size})
}

func (c *cli) wantsCollector(command string) error {
	if c.collector != "" {
		return nil
	}
	return withHint(usagef("%s needs the collector", command), "name the collector with --collector, or SALLYPORT_COLLECTOR")
}

// verifierKey reads the log's key from a flag: the key itself, or a file with it. Without it nothing can be told.
func verifierKey(flag string) (note.Verifier, error) {
	key, _, err := readVerifierKey(flag)
	return key, err
}

// readVerifierKey gives the key's text, too.
func readVerifierKey(flag string) (note.Verifier, string, error) {
	const hint = "give the log's public key, or the collector's log.pub, with --key"
	if flag == "" {
		return nil, "", withHint(usagef("no key to verify with"), hint)
	}
	text := flag
	if !strings.Contains(flag, "+") || isFile(flag) {
		data, err := os.ReadFile(flag)
		if err != nil {
			return nil, "", withHint(&exitError{exitCannotTell, fmt.Errorf("read key: %w", err)}, hint)
		}
		text = string(data)
	}
	text = strings.TrimSpace(text)
	key, err := note.NewVerifier(text)
	if err != nil {
		return nil, "", withHint(&exitError{exitCannotTell, fmt.Errorf("read key: %w", err)}, hint)
	}
	return key, text, nil
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// judged makes a verdict that is not proven an error with its exit code.
func judged(v proof.Verdict, what, why string) error {
	err := errors.New(why)
	switch v {
	case proof.Proven:
		return nil
	case proof.Disproved:
		return withHint(&exitError{exitDisproved, fmt.Errorf("%s is disproved: %w", what, err)},
			"check that --key is that log's; if it is, keep the file as it is, and compare it with another copy: `sallyport audit verify --help` says what this can mean")
	}
	return withHint(&exitError{exitCannotTell, fmt.Errorf("cannot tell whether %s is true: %w", what, err)},
		"export it again with `sallyport audit export`, and check that --key is that log's")
}
