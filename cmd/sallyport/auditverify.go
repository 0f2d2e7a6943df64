package main

import (
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/proof"
)

func (c *cli) auditVerify() *cobra.Command {
	var key string
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Verify exported evidence, with no network: proven, disproved, or cannot tell",
		Long: `Verify a bundle that "audit export" wrote, against the public key of the collector's log. It asks nobody.

Proven means: each record is the one that its node sealed, each seal stands in the log that the key signed, and between the
first and the last number that is shown for a sequence nothing is missing but what the node itself counts as lost. It does not mean
that a node saw everything or told the truth, and it says nothing about records before or behind those numbers. A node and the
collector together could still make up another story for whoever never saw the first: "audit consistency" holds the log to a
checkpoint that you kept.

A receipt ("audit export --grant") has single events of the log: each is one that the log has, and whether they are all, the file cannot
show. An event that was left out, a denial or the end of a grant, is not found by it.

Disproved means that the file is not what the log has, or that the log contradicts itself. If another copy of the file is proven, this
copy was changed; if none is, the collector's log was.

` + verdictCodesHelp,
		Example: `  sallyport audit verify july.bundle --key log.pub
  sallyport audit verify july.bundle --key log.pub -o json`,
		Args: exactly(1),
		RunE: func(_ *cobra.Command, args []string) error { return c.verifyBundle(args[0], key) },
	}
	cmd.Flags().StringVar(&key, "key", "", "public `KEY` of the log, or a file with it")
	return cmd
}

func (c *cli) verifyBundle(path, keyFlag string) error {
	key, err := verifierKey(keyFlag)
	if err != nil {
		return err
	}
	in, err := c.openFile(path)
	if err != nil {
		return &exitError{exitCannotTell, fmt.Errorf("read bundle: %w", err)}
	}
	defer in.Close()
	report, err := proof.Verify(in, key)
	if err != nil {
		return &exitError{exitCannotTell, fmt.Errorf("read bundle: %w", err)}
	}
	if err := c.show(report, func(t *table) { reportTable(t, report) }); err != nil {
		return err
	}
	return judged(report.Verdict, path, report.Why)
}

// openFile reads one, or standard input for "-".
func (c *cli) openFile(path string) (io.ReadCloser, error) {
	if path == "-" {
		return io.NopCloser(c.stdin), nil
	}
	return os.Open(path)
}

func reportTable(t *table, r proof.Report) {
	t.row("verdict", r.Verdict)
	if r.Verdict != proof.Proven {
		t.row("why", r.Why)
		return // what was read until then is no finding
	}
	t.row("log", fmt.Sprintf("%s, at %s", r.Checkpoint.Origin, leaves(r.Checkpoint.Size)))
	t.row("records", choose(r.Records == 0, "none", fmt.Sprintf("%d, each as its node sealed it", r.Records)))
	if r.Events > 0 {
		t.row("grant events", fmt.Sprintf("%d in the log%s", r.Events, choose(alone(r), ", as the collector took them; others of this grant may be missing: the nodes' seals are not in this file", "")))
	}
	t.row("lost", choose(r.Lost == 0, "none", fmt.Sprintf("%d, counted by the nodes themselves", r.Lost)))
	t.line("")
	t.row("NODE", "EPOCH", "CLASS", "NUMBERS", "FROM THE FIRST", "RECORDS", "GRANT EVENTS", "LOST", "BREAKS")
	for _, s := range r.Sequences {
		t.row(s.Node, s.Epoch, s.Class, numbers(s), choose(s.First == 0, "", yesNo(s.Whole)), s.Records, s.Events, s.Lost, s.Breaks)
	}
	for _, s := range r.Sequences {
		for _, l := range s.Losses {
			t.line("lost on %s (%s): %d at %s, %s", s.Node, s.Class, l.Count, l.Stage, l.Cause)
		}
		if s.Breaks > 0 {
			t.line("%s (%s): the collector was set back %s; the node counted what it had forgotten", s.Node, s.Class, times(s.Breaks))
		}
	}
}

// alone tells whether there are grant events of a sequence that the file has no batch of.
func alone(r proof.Report) bool {
	return slices.ContainsFunc(r.Sequences, func(s proof.SequenceReport) bool { return s.Events > 0 && s.Seals == 0 })
}

func numbers(s proof.SequenceReport) string {
	if s.First == 0 {
		return "" // single ones
	}
	return fmt.Sprintf("%d to %d", s.First, s.Last)
}

func leaves(n int64) string {
	if n == 1 {
		return "1 leaf"
	}
	return fmt.Sprintf("%d leaves", n)
}

func times(n uint64) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

func yesNo(is bool) string { return choose(is, "yes", "no") }
