package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
)

// Parts that --ready knows.
const (
	partEnforcement = "enforcement"
	partProxy       = "proxy"
)

func (c *cli) status() *cobra.Command {
	var check bool
	var ready string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "How the node's agent and its enforcement are",
		Example: `  sudo sallyport status
  sudo sallyport status --check   # for scripts: exit code 3 unless all is well
  sallyport status --ready proxy  # for a probe of Kubernetes`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAgent(cmd.Context(), func(ctx context.Context, a *client.Agent) error {
				s, err := a.Status(ctx)
				if err == nil {
					err = partReady(s, ready)
				}
				if err != nil {
					return err
				}
				if err := c.show(s, func(t *table) { statusTable(t, s) }); err != nil || !check {
					return err
				}
				return healthy(s)
			})
		},
	}
	cmd.Flags().BoolVar(&check, "check", false, "for scripts: end with exit code 3 unless the node is ready and has no problem")
	cmd.Flags().StringVar(&ready, "ready", "", "for probes: end with exit code 3 unless this `PART` is ready, whatever problems there are: enforcement, proxy")
	return cmd
}

// partReady refuses what --ready is for. Who waits for the proxy waits for enforcement, too.
func partReady(s *api.StatusReply, part string) error {
	switch {
	case part == "":
		return nil
	case part != partEnforcement && part != partProxy:
		return withHint(usagef("--ready: there is no part %q", part), "write enforcement, or proxy")
	case !s.GetReady():
		return refused(withHint(fmt.Errorf("the node does not enforce: %s", orDash(s.GetNotReadyWhy())), "`sallyport status` has all of it"))
	case part == partProxy && !s.GetProxyListening():
		return refused(withHint(errors.New("the proxy does not listen"), "look at what the proxy logs"))
	}
	return nil
}

// healthy refuses what --check is for.
func healthy(s *api.StatusReply) error {
	switch problems := len(s.GetProblems()); {
	case !s.GetReady():
		return refused(withHint(errors.New("the node is not ready"), "the line `ready` says why"))
	case problems > 0:
		return refused(withHint(fmt.Errorf("the node has %s", plural(problems, "problem")), "each has a line PROBLEM with what to do"))
	case s.GetPanic() != "":
		return refused(withHint(errors.New("a panic stands"), "root lifts it with `sallyport panic --lift --why TEXT`"))
	}
	return nil
}

func statusTable(t *table, s *api.StatusReply) {
	t.row("node", s.GetNode())
	t.row("ready", readiness(s))
	if s.GetPanic() != "" {
		t.row("PANIC", s.GetPanic()+": every path is closed, and none is opened; root lifts it with `sallyport panic --lift --why TEXT`")
	}
	t.row("version", s.GetVersion())
	t.row("started", stamp(s.GetStarted()))
	t.row("identity", s.GetIdentityState())
	t.row("proxy", choose(s.GetProxyListening(), "listening", "NOT LISTENING: proxied traffic is closed; start or look at sallyport-proxy"))
	for _, w := range s.GetWebCertificates() {
		t.row("web certificate", w.GetName()+choose(w.GetUntil() != nil, " until "+stamp(w.GetUntil()), ": NONE"))
	}
	for _, p := range s.GetProviders() {
		t.row("provider", p.GetName()+choose(p.GetFetched() != nil, ", "+plural(uint64(p.GetKeys()), "key")+" as of "+stamp(p.GetFetched()), ": no keys yet"))
	}
	t.row("collector", s.GetCollector())
	t.row("lease left", span(s.GetLeaseLeft()))
	t.row("services", s.GetServices())
	if open := s.GetNotEnforced(); len(open) > 0 {
		t.row("NOT ENFORCED", strings.Join(open, ", ")+": everybody reaches what is there")
	}
	t.row("live paths", s.GetLivePaths())
	t.row("live flows", s.GetLiveFlows())
	t.row("generation", s.GetGeneration())
	t.row("bpffs", s.GetBpffs())
	t.row("spooled", plural(s.GetSpoolCritical(), "grant event")+", "+plural(s.GetSpoolFlow(), "flow record"))
	t.row("lost", plural(s.GetLostFlow(), "flow record"))
	for _, problem := range s.GetProblems() {
		t.row("PROBLEM", problem)
	}
	hooksTable(t, s.GetHooks())
	reasonsTable(t, s.GetReasons())
}

func readiness(s *api.StatusReply) string {
	if s.GetReady() {
		return "yes"
	}
	return "NO: " + orDash(s.GetNotReadyWhy())
}

func hooksTable(t *table, hooks []*api.HookStatus) {
	if len(hooks) == 0 {
		return
	}
	t.line("")
	t.row("DEVICE", "INDEX", "ROLE", "PROGRAMS", "XDP", "BOUND")
	for _, h := range hooks {
		t.row(h.GetDevice(), h.GetIfindex(), h.GetRole(), strings.Join(h.GetPrograms(), " "), h.GetXdp(), h.GetBound())
	}
}

func reasonsTable(t *table, reasons map[string]uint64) {
	if len(reasons) == 0 {
		return
	}
	t.line("")
	t.row("REASON", "PACKETS")
	for _, reason := range slices.Sorted(maps.Keys(reasons)) {
		t.row(reason, reasons[reason])
	}
}
