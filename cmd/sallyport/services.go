package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func (c *cli) services() *cobra.Command {
	var coverage bool
	cmd := &cobra.Command{
		Use:   "services",
		Short: "The protected services of the node, and who may come through the proxy",
		Long: `Show the protected services of the node, and who may come through the proxy. With --coverage it tells how far each is protected instead:
its mode and since when it has that, when its clients were last proxied, bypassed and denied, and whether canaries see it closed. Times are
of the life of the agent.`,
		Example: `  sudo sallyport services
  sudo sallyport services --coverage`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAgent(cmd.Context(), func(ctx context.Context, a *client.Agent) error {
				if coverage {
					return c.showCoverage(ctx, a)
				}
				reply, err := a.Services(ctx)
				if err != nil {
					return err
				}
				return c.show(reply, func(t *table) { servicesTable(t, reply.GetServices()) })
			})
		},
	}
	cmd.Flags().BoolVar(&coverage, "coverage", false, "tell how far each is protected, and what shows it")
	return cmd
}

func (c *cli) showCoverage(ctx context.Context, a *client.Agent) error {
	reply, err := a.Coverage(ctx)
	if err != nil {
		return err
	}
	return c.show(reply, func(t *table) {
		t.row("NAME", "MODE", "SINCE", "LAST PROXIED", "LAST BYPASSED", "LAST DENIED", "CANARY", "LAST CLOSED", "WHY")
		for _, s := range reply.GetServices() {
			t.row(s.GetService(), s.GetMode(), stamp(s.GetSince()), stamp(s.GetProxied()), stamp(s.GetBypassed()), stamp(s.GetDenied()),
				s.GetCanary(), stamp(s.GetClosed()), s.GetWhy())
		}
	})
}

func servicesTable(t *table, services []*api.Service) {
	t.row("NAME", "ID", "MODE", "TARGET", "PROTOCOL", "PORTS", "ADDRESSES", "DEVICE", "ALLOW", "SOURCE")
	for _, s := range services {
		addresses := s.GetAddresses()
		switch {
		case len(addresses) > 0:
		case s.GetTarget() == string(policy.TargetHost):
			addresses = []string{"every local"}
		default:
			addresses = []string{"none yet"} // no pod that it chooses is here
		}
		allow := s.GetAllow()
		if len(allow) == 0 {
			allow = []string{"nobody"}
		}
		t.row(s.GetName(), s.GetId(), s.GetMode(), s.GetTarget(), s.GetProtocol(), ports(s.GetPorts()),
			strings.Join(addresses, ","), s.GetDevice(), strings.Join(allow, ","), s.GetSource())
	}
	watchedTable(t, services)
}

// watchedTable tells what was seen of services that are not enforced, and of what came while they were shadowed what Enforce would have
// made of it.
func watchedTable(t *table, services []*api.Service) {
	begun := false
	for _, s := range services {
		w := s.GetWatched()
		if w == nil {
			continue
		}
		if !begun {
			t.line("")
			t.row("NOT ENFORCED", "MODE", "SEEN", "WOULD BE PROXIED", "BYPASSED", "DENIED")
			begun = true
		}
		would := []string{"-", "-", "-"}
		judged := w.GetProxied().GetPackets()+w.GetBypassed().GetPackets()+w.GetDenied().GetPackets() > 0
		if s.GetMode() == string(policy.ModeShadow) || judged {
			would = []string{seenText(w.GetProxied()), seenText(w.GetBypassed()), seenText(w.GetDenied())}
		}
		t.row(s.GetName(), s.GetMode(), seenText(w.GetSeen()), would[0], would[1], would[2])
	}
}

func seenText(s *api.Seen) string {
	return fmt.Sprintf("%s, %s, %s", plural(s.GetOpens(), "SYN"), plural(s.GetPackets(), "packet"), plural(s.GetBytes(), "byte"))
}

func ports[T ~uint32 | ~uint16](all []T) string {
	var texts []string
	for _, p := range all {
		texts = append(texts, fmt.Sprint(p))
	}
	return strings.Join(texts, ",")
}
