package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// Formats of exports.
const (
	exportBundle = "bundle"
	exportOCSF   = "ocsf"
)

// export is what the flags say.
type export struct {
	since, until, node, grant, record string
	format, out                       string
}

func (c *cli) auditExport() *cobra.Command {
	var e export
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Take records out of the collector: as evidence that anybody can verify, or as OCSF events",
		Long: `Write records of the collector to a new file.

As a bundle (the default) they come with what proves them: "audit verify" needs the file and the log's public key, and nothing else. It has
whole batches, by the time at which the collector received them. With --grant it is a receipt: the grant's events, as they stand in the log,
which does not prove that they are all.
With --record it is one record.

As OCSF events (version ` + ocsfVersion + `, one in JSON on each line) they are for a SIEM, by the time at which they happened, and prove nothing:
flows are Network Activity (4001), grant events Entity Management (3004). An event's metadata.uid is what --record takes, for
the evidence of that one record.`,
		Example: `  sallyport audit export --collector 10.9.0.1:9443 --since 24h --out today.bundle
  sallyport audit export --collector 10.9.0.1:9443 --grant 01J8ZQ4X5M3T9V0Y2B7C6D1E4F --out receipt.bundle
  sallyport audit export --collector 10.9.0.1:9443 --since 15m --format ocsf`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.runExport(cmd.Context(), e) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&e.since, "since", "", "only from this `TIME` on: RFC 3339, or a duration before now")
	f.StringVar(&e.until, "until", "", "only before this `TIME`")
	f.StringVar(&e.node, "node", "", "only of this `NODE`")
	f.StringVar(&e.grant, "grant", "", "only of this grant `ID`")
	f.StringVar(&e.record, "record", "", "only this one: `NODE/EPOCH/CLASS/NUMBER`")
	f.StringVar(&e.format, "format", exportBundle, "write a `FORMAT`: bundle or ocsf")
	f.StringVar(&e.out, "out", "", "new `FILE` for it (default: standard output)")
	fixed(cmd, "format", []string{exportBundle, exportOCSF})
	return cmd
}

func (c *cli) runExport(ctx context.Context, e export) error {
	if err := c.wantsCollector("audit export"); err != nil {
		return err
	}
	request, err := e.request(c)
	if err != nil {
		return err
	}
	if file, ok := c.stdout.(*os.File); ok && e.out == "" && e.format == exportBundle && term.IsTerminal(int(file.Fd())) {
		return withHint(usagef("a bundle is not for a terminal: it is what the collector sends, to the byte"), "name a new file with --out")
	}
	out, err := c.newFile(e.out)
	if err != nil {
		return err
	}
	write := func(ctx context.Context, a *client.Audit) error {
		if e.format == exportOCSF {
			return c.exportEvents(ctx, a, request, out)
		}
		return exportEvidence(ctx, a, request, out)
	}
	return out.close(c.withAudit(ctx, true, write)) // it may take long
}

func (e export) request(c *cli) (*api.EvidenceRequest, error) {
	r := &api.EvidenceRequest{Node: e.node, Grant: e.grant}
	switch {
	case e.format != exportBundle && e.format != exportOCSF:
		return nil, withHint(usagef("read --format: %q is none", e.format), "write one of: %s %s", exportBundle, exportOCSF)
	case e.record != "" && (e.format != exportBundle || e.node+e.grant+e.since+e.until != ""):
		return nil, withHint(usagef("--record is one record, with what proves it"), "give --record alone")
	}
	for _, err := range []error{instant("since", e.since, c.now(), &r.Since), instant("until", e.until, c.now(), &r.Until), readRecordID(e.record, r)} {
		if err != nil {
			return nil, &exitError{exitUsage, err}
		}
	}
	if r.Since != nil && r.Until != nil && !r.Since.AsTime().Before(r.Until.AsTime()) {
		return nil, withHint(usagef("--since %s is not before --until %s", e.since, e.until), "an age counts back from now: the older one is --since")
	}
	return r, nil
}

// recordID names a record: what readRecordID reads.
func recordID(node, epoch, class string, seq uint64) string {
	return strings.Join([]string{node, epoch, class, number(seq)}, "/")
}

func readRecordID(text string, r *api.EvidenceRequest) error {
	if text == "" {
		return nil
	}
	l := strings.Split(text, "/")
	if len(l) == 4 {
		seq, err := strconv.ParseUint(l[3], 10, 63)
		class, ok := map[string]api.Class{proof.ClassCritical: api.Class_CLASS_CRITICAL, proof.ClassFlow: api.Class_CLASS_FLOW}[l[2]]
		if err == nil && seq > 0 && ok && l[0] != "" && l[1] != "" {
			r.Node, r.Epoch, r.Class, r.Seq = l[0], l[1], class, seq
			return nil
		}
	}
	return withHint(fmt.Errorf("read --record: %q names no record", text), "write NODE/EPOCH/CLASS/NUMBER, as metadata.uid of an OCSF event says it")
}

// exportEvidence writes a bundle as it comes. If it breaks off its last line is not there, and that can be told.
func exportEvidence(ctx context.Context, a *client.Audit, r *api.EvidenceRequest, out io.Writer) error {
	for chunk, err := range a.Evidence(ctx, r) {
		if err != nil {
			return err
		}
		if _, err := out.Write(chunk.GetData()); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
	}
	return ctx.Err()
}

// exportEvents writes flows and then grant events, each in order of receipt, and says what is missing from them.
func (c *cli) exportEvents(ctx context.Context, a *client.Audit, r *api.EvidenceRequest, out io.Writer) error {
	flows := &api.FlowQuery{Node: r.GetNode(), Grant: r.GetGrant(), Since: r.GetSince(), Until: r.GetUntil(), Limit: everything}
	if err := writeEvents(out, a.Flows(ctx, flows), ocsfFlow); err != nil {
		return err
	}
	grants := &api.GrantQuery{Node: r.GetNode(), Grant: r.GetGrant(), Since: r.GetSince(), Until: r.GetUntil(), Limit: everything}
	if err := writeEvents(out, a.GrantEvents(ctx, grants), ocsfGrant); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return c.noteLosses(a.Losses(ctx, &api.LossQuery{Node: r.GetNode(), Limit: everything}))
}

func writeEvents[R, E any](out io.Writer, records iter.Seq2[R, error], event func(R) E) error {
	for record, err := range records {
		if err != nil {
			return err
		}
		line, err := encodeJSON(event(record))
		if err != nil {
			return fmt.Errorf("write event: %w", err)
		}
		if _, err := out.Write(line); err != nil {
			return fmt.Errorf("write event: %w", err)
		}
	}
	return nil
}

// everything is as many records as a query can ask for.
const everything = 1<<31 - 1

// newFile is a file that is not kept if what writes to it fails, or standard output.
type newFile struct {
	io.Writer
	file *os.File
}

func (c *cli) newFile(path string) (*newFile, error) {
	if path == "" {
		return &newFile{Writer: c.stdout}, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, withHint(fmt.Errorf("make file: %w", err), "name a new file with --out")
	}
	return &newFile{f, f}, nil
}

// close ends the file after what was done with it.
func (n *newFile) close(err error) error {
	if n.file == nil {
		return err
	}
	if err = errors.Join(err, n.file.Close()); err != nil {
		os.Remove(n.file.Name())
	}
	return err
}
