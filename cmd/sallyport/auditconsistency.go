package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

func (c *cli) auditConsistency() *cobra.Command {
	var key, save string
	cmd := &cobra.Command{
		Use:   "consistency OLD [NEW]",
		Short: "Does the log still have all that it had when OLD was taken",
		Long: `Hold the log to an older checkpoint: proven means that it only grew, with nothing changed or taken out since. OLD and NEW are
checkpoints, or bundles, whose last checkpoint counts. Without NEW the collector is asked, and --save keeps what it answers in a
new file, for the next time and for others: whoever sees two checkpoints that do not fit has proof that the log has two histories.

` + verdictCodesHelp,
		Example: `  sallyport audit consistency june.bundle --key log.pub --collector 10.9.0.1:9443 --save july.checkpoint
  sallyport audit consistency june.bundle july.checkpoint --key log.pub`,
		Args: between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			k, err := verifierKey(key)
			if err != nil {
				return err
			}
			old, err := c.oldCheckpoint(args[0], k)
			if err != nil {
				return err
			}
			if len(args) == 2 {
				if save != "" {
					return withHint(usagef("--save keeps what the collector answers, and NEW is a file"), "leave one of them out")
				}
				return c.compareFile(args[0], old, args[1], k)
			}
			return c.compareCollector(cmd.Context(), args[0], old, k, save)
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "public `KEY` of the log, or a file with it")
	cmd.Flags().StringVar(&save, "save", "", "keep the collector's checkpoint in this new `FILE`")
	return cmd
}

// oldCheckpoint reads the one to hold the log to. If the key did not sign it nothing can be told by it.
func (c *cli) oldCheckpoint(path string, key note.Verifier) (proof.Checkpoint, error) {
	line, err := c.readCheckpoint(path, noSize)
	if err != nil {
		return proof.Checkpoint{}, err
	}
	old, err := proof.OpenCheckpoint([]byte(line.Note), key)
	if err != nil {
		return proof.Checkpoint{}, judged(proof.CannotTell, path, err.Error())
	}
	return old, nil
}

func (c *cli) compareFile(oldPath string, old proof.Checkpoint, path string, key note.Verifier) error {
	line, err := c.readCheckpoint(path, old.Size)
	if err != nil {
		return err
	}
	return c.compare(oldPath, old, path, line, key)
}

func (c *cli) compareCollector(ctx context.Context, oldPath string, old proof.Checkpoint, key note.Verifier, save string) error {
	if err := c.wantsCollector("audit consistency without NEW"); err != nil {
		return err
	}
	line := proof.Line{Kind: proof.LineCheckpoint, From: old.Size}
	err := c.withAudit(ctx, false, func(ctx context.Context, a *client.Audit) error {
		reply, err := a.Log(ctx, uint64(old.Size))
		if errors.Is(err, client.ErrRefused) { // it is smaller than that: its checkpoint says so, and is signed
			line.From = 0
			reply, err = a.Log(ctx, 0)
		}
		for _, h := range reply.GetGrown().GetProof() {
			if len(h) != tlog.HashSize {
				return errors.New("read log: the collector's proof has no hashes")
			}
			line.Proof = append(line.Proof, tlog.Hash(h))
		}
		line.Note = string(reply.GetGrown().GetCheckpoint())
		return err
	})
	if err != nil {
		return &exitError{exitCannotTell, err}
	}
	if save != "" { // also what does not fit: that is the proof
		data, err := json.Marshal(line)
		if err == nil {
			err = writeNew(save, append(data, '\n'))
		}
		if err != nil {
			return &exitError{exitCannotTell, fmt.Errorf("keep checkpoint: %w", err)}
		}
	}
	return c.compare(oldPath, old, "the collector's log", line, key)
}

// growth is what was found, for machines.
type growth struct {
	Verdict proof.Verdict     `json:"verdict"`
	Why     string            `json:"why,omitempty"`
	Old     proof.Checkpoint  `json:"old"`
	New     *proof.Checkpoint `json:"new,omitempty"`
}

func (c *cli) compare(oldPath string, old proof.Checkpoint, name string, line proof.Line, key note.Verifier) error {
	g := growth{Old: old}
	fresh, err := proof.OpenCheckpoint([]byte(line.Note), key)
	switch {
	case err != nil:
		g.Verdict, g.Why = proof.Disproved, err.Error()
	case fresh.Size > old.Size && old.Size > 0 && line.From != old.Size:
		g.New = &fresh
		g.Verdict, g.Why = proof.CannotTell, fmt.Sprintf("it has no proof of growth from %s on, where %s ends; the collector gives one (--collector)", leaves(old.Size), oldPath)
	default:
		g.New = &fresh
		if err := fresh.Grew(old, line.Proof); err != nil {
			g.Verdict, g.Why = proof.Disproved, err.Error()
		}
	}
	if err := c.show(g, func(t *table) { growthTable(t, g) }); err != nil {
		return err
	}
	return judged(g.Verdict, name, g.Why)
}

func growthTable(t *table, g growth) {
	t.row("verdict", g.Verdict)
	if g.Verdict != proof.Proven {
		t.row("why", g.Why)
	}
	t.row("log", g.Old.Origin)
	t.row("then", fmt.Sprintf("%s, root %s", leaves(g.Old.Size), g.Old.Root))
	if g.New != nil {
		t.row("now", fmt.Sprintf("%s, root %s", leaves(g.New.Size), g.New.Root))
	}
	if g.Verdict == proof.Proven {
		t.line("the log has all that it had, unchanged and in its place")
	}
}

const (
	maxCheckpoint = 1 << 20 // bounds one that stands alone in a file
	noSize        = -1      // of no log
)

// readCheckpoint reads the last one of a bundle, or the one that a file is. One with a proof of growth from the wanted size on comes first.
func (c *cli) readCheckpoint(path string, from int64) (proof.Line, error) {
	in, err := c.openFile(path)
	if err != nil {
		return proof.Line{}, &exitError{exitCannotTell, fmt.Errorf("read checkpoint: %w", err)}
	}
	defer in.Close()
	r := bufio.NewReader(in)
	if first, err := r.Peek(1); err == nil && first[0] != '{' {
		data, err := io.ReadAll(io.LimitReader(r, maxCheckpoint))
		if err != nil {
			return proof.Line{}, &exitError{exitCannotTell, fmt.Errorf("read checkpoint: %w", err)}
		}
		return proof.Line{Kind: proof.LineCheckpoint, Note: string(data)}, nil
	}
	var last, grown proof.Line
	for l, err := range proof.Checkpoints(r) {
		if err != nil {
			return proof.Line{}, judged(proof.CannotTell, path, fmt.Sprintf("it is neither a checkpoint nor a bundle: %v", err))
		}
		if last = l; l.From == from && len(l.Proof) > 0 {
			grown = l
		}
	}
	switch {
	case grown.Kind != "":
		return grown, nil
	case last.Kind == "":
		return proof.Line{}, judged(proof.CannotTell, path, "it has no checkpoint")
	}
	return last, nil
}
