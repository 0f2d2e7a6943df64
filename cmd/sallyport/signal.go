package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func (c *cli) signal() *cobra.Command {
	s := &api.SignalRequest{}
	var lasts, endIn time.Duration
	var maxBytes string
	var all, well bool
	cmd := &cobra.Command{
		Use:   "signal",
		Short: "Say something about grants that takes from them: end sooner, less budget, none at all",
		Long: `Say something about the grants of this node, as one of the sources that their policies name: a
posture check, an incident, a risk engine. What is said counts for a time (--for), about the grants
that fit everything that is given, and takes the place of what the same user said for the source before
about the same.
It never gives anything: what it takes from an active grant stays taken when it lapses. With --ok it
says that all is well, which some policies require.`,
		Example: `  sallyport signal --source posture --client 10.1.0.2 --ok --for 5m
  sallyport signal --source incident --service postgres --end-in 10m --for 1h --reason "INC-7"
  sallyport signal --source risk --requester alice --revoke --for 24h --reason "account taken over"`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if s.Source == "" || lasts <= 0 {
				return withHint(usagef("signal needs --source and --for"), "a signal counts for a time, like 5m, and is given again")
			}
			if takes := s.Revoke || maxBytes != "" || cmd.Flags().Changed("end-in"); takes == well {
				return withHint(usagef("signal takes something, or says that all is well"), "give --revoke, --end-in or --max-bytes; or --ok, which takes the place of what was said before")
			}
			if about := s.Grant + s.Requester + s.Service + s.Clients; (about == "") != all {
				return withHint(usagef("signal is about something, or about every grant"), "give --grant, --requester, --service or --client; or --all")
			}
			s.Until = timestamppb.New(c.now().Add(lasts))
			if cmd.Flags().Changed("end-in") {
				s.End = timestamppb.New(c.now().Add(endIn))
			}
			if err := readBudget(maxBytes, s); err != nil {
				return &exitError{exitUsage, err}
			}
			return c.giveSignal(cmd.Context(), s)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&s.Source, "source", "", "`NAME` of the source, as policies have it")
	f.StringVar(&s.Grant, "grant", "", "about this grant `ID`")
	f.StringVar(&s.Requester, "requester", "", "about the grants of this `NAME`")
	f.StringVar(&s.Service, "service", "", "about grants for this `SERVICE`")
	f.StringVar(&s.Clients, "client", "", "about grants with a client at this `ADDRESS`, or in this prefix")
	f.BoolVar(&all, "all", false, "about every grant")
	f.BoolVar(&s.Revoke, "revoke", false, "revoke them, and refuse others")
	f.DurationVar(&endIn, "end-in", 0, "they end after this `DURATION` from now at the latest")
	f.StringVar(&maxBytes, "max-bytes", "", "no path of them carries more than this `SIZE`")
	f.BoolVar(&well, "ok", false, "all is well")
	f.DurationVar(&lasts, "for", 0, "it counts for this `DURATION`")
	f.StringVar(&s.Reason, "reason", "", "`TEXT` for those whose grants it touches, and for the record")
	return cmd
}

func readBudget(maxBytes string, s *api.SignalRequest) error {
	if maxBytes == "" {
		return nil
	}
	var size policy.Size
	err := size.UnmarshalText([]byte(maxBytes))
	s.Budget = &api.Budget{Bytes: uint64(size)}
	return err
}

// signalled is what a signal concerned, for machines.
type signalled struct {
	Grants []string `json:"grants"`
}

func (c *cli) giveSignal(ctx context.Context, s *api.SignalRequest) error {
	return c.withAgent(ctx, func(ctx context.Context, a *client.Agent) error {
		grants, err := a.Signal(ctx, s)
		if err != nil {
			return err
		}
		return c.show(signalled{append([]string{}, grants...)}, func(t *table) {
			t.row("counts until", stamp(s.GetUntil()))
			t.row("concerns", either(strings.Join(grants, ", "), "no active grant"))
		})
	})
}
