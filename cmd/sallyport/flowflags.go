package main

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// newestRecords is how many records are shown if nothing else is said.
const newestRecords = 1000

// flowFlags are the flags that choose flow records.
type flowFlags struct {
	q            api.FlowQuery
	since, until string
}

func (f *flowFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.BoolVarP(&f.q.Follow, "follow", "f", false, "go on with new records until interrupted")
	flags.StringVar(&f.q.Node, "node", "", "only of this `NODE` (collector only)")
	flags.StringVar(&f.q.Service, "service", "", "only to this protected `SERVICE`")
	flags.StringVar(&f.q.Client, "client", "", "only from this `ADDRESS`")
	flags.StringVar(&f.q.Identity, "identity", "", "only with this SPIFFE `ID`, or PROVIDER/SUBJECT")
	flags.StringVar(&f.q.Grant, "grant", "", "only under this grant `ID`")
	flags.StringVar(&f.q.Event, "event", "", "only this `EVENT`: open, close, end, deny, update, request, backstop or watched")
	flags.StringVar(&f.q.Verdict, "verdict", "", "only this `VERDICT`: proxied, bypassed or denied; of watched ones, which it did not decide, with --event watched only")
	flags.StringVar(&f.q.Reason, "reason", "", "only this `REASON`")
	flags.StringVar(&f.since, "since", "", "only from this `TIME` on: RFC 3339, or a duration before now")
	flags.StringVar(&f.until, "until", "", "only before this `TIME`")
	flags.Uint32Var(&f.q.Limit, "limit", newestRecords, "the newest `N` records, with --after the oldest")
	flags.StringVar(&f.q.After, "after", "", "only what came after the record with this `CURSOR`, as -o json shows it (collector only)")
	fixed(cmd, "event", eventWords())
	fixed(cmd, "verdict", verdictWords())
	fixed(cmd, "reason", reasonNames())
}

// query checks what the flags say. Durations are counted back from now.
func (f *flowFlags) query(now time.Time) (*api.FlowQuery, error) {
	q := &f.q
	q.Event, q.Verdict, q.Reason = strings.ToUpper(q.Event), strings.ToUpper(q.Verdict), strings.ToUpper(q.Reason)
	checks := []error{
		positive("limit", q.Limit),
		word("event", q.Event, flow.ParseEvent, eventWords()),
		word("verdict", q.Verdict, flow.ParseVerdict, verdictWords()),
		word("reason", q.Reason, flow.ParseReason, reasonNames()),
		instant("since", f.since, now, &q.Since),
		instant("until", f.until, now, &q.Until),
		address("client", q.Client),
	}
	for _, err := range checks {
		if err != nil {
			return nil, &exitError{exitUsage, err}
		}
	}
	return q, nil
}

func positive(flag string, n uint32) error {
	if n > 0 {
		return nil
	}
	return withHint(fmt.Errorf("read --%s: 0 records are none", flag), "write a number from 1 on")
}

// word checks a flag whose value is one of a list of words.
func word[T any](flag, value string, parse func(string) (T, error), words []string) error {
	if value == "" {
		return nil
	}
	if _, err := parse(value); err != nil {
		return withHint(fmt.Errorf("read --%s: %w", flag, err), "write one of: %s", strings.Join(words, " "))
	}
	return nil
}

func eventWords() []string {
	return []string{"open", "close", "end", "deny", "update", "request", "backstop", "watched"}
}

func verdictWords() []string { return []string{"proxied", "bypassed", "denied"} }

func reasonNames() []string {
	var names []string
	for _, r := range flow.Reasons() {
		names = append(names, r.String())
	}
	return names
}

func instant(flag, value string, now time.Time, into **timestamppb.Timestamp) error {
	if value == "" {
		return nil
	}
	if d, err := time.ParseDuration(value); err == nil && d >= 0 {
		*into = timestamppb.New(now.Add(-d))
		return nil
	}
	t, err := time.Parse(time.RFC3339, value)
	if err != nil {
		return withHint(fmt.Errorf("read --%s: %q is no time", flag, value), "write 15m for a quarter of an hour ago, or 2026-07-01T22:00:00Z")
	}
	*into = timestamppb.New(t)
	return nil
}

func address(flag, value string) error {
	if value == "" {
		return nil
	}
	if _, err := netip.ParseAddr(value); err != nil {
		return withHint(fmt.Errorf("read --%s: %q is no address", flag, value), "write an address without port: 10.1.0.2 or fd00::2")
	}
	return nil
}
