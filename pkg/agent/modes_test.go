package agent

import (
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// in gives the resources of the tests with their service in a mode.
func (s signer) in(mode policy.Mode) string {
	return strings.Replace(s.resources("15m"), "  target: Host\n", "  target: Host\n  mode: "+string(mode)+"\n", 1)
}

// TestModesOfAnAgent: a service that is shadowed is open, and status, services, flows, explain and metrics say so; a grant for it
// may be active, and goes on when the service is enforced, which cuts a connection that stands.
func TestModesOfAnAgent(t *testing.T) {
	in := install(t)
	in.resources(in.signer.in(policy.ModeShadow))
	agent := in.ready("run")
	operator := in.agent()
	for _, f := range lab.Families() {
		_, err := in.lab.Node.WhoAnswers(netip.AddrPortFrom(in.lab.Node.Addr(f), 5432))
		must(t, err)
		in.answersFrom(f)
	}
	if s := in.status(); !s.Ready || len(s.Problems) != 0 || strings.Join(s.NotEnforced, " ") != "postgres (Shadow)" {
		t.Errorf("status: %v", s)
	}
	in.seen(operator, "PROXIED", func(w watchedCounts) bool { return w.proxied == 2 && w.bypassed == 0 && w.seen == 2 })
	_, err := in.activate(t.Context(), operator, in.signer.envelope(t, two))
	must(t, err)
	for _, f := range lab.Families() {
		in.answersFrom(f)
	}
	in.seen(operator, "BYPASSED", func(w watchedCounts) bool { return w.proxied == 2 && w.bypassed == 2 && w.seen == 4 })
	in.explains(operator, "NONE", "postgres is not enforced (mode: Shadow)", "if it were enforced: "+clientA.String()+" has a live path")
	if body := in.scrape(); !contains(body, `sallyport_services{mode="Shadow"} 1`, `sallyport_services{mode="Enforce"} 0`,
		`sallyport_watched_opens_total{service="postgres",would="PROXIED"} 2`, `sallyport_watched_opens_total{service="postgres",would="BYPASSED"} 2`,
		`sallyport_watched_packets_total{service="postgres",would="DENIED"} 0`, `sallyport_watched_bytes_total{service="postgres",would="PROXIED"} `,
		"sallyport_scrape_failed 0") {
		t.Errorf("metrics:\n%s", body)
	}

	in.resources(in.signer.in(policy.ModeObserve))
	in.eventually("the service is observed", func() bool { return strings.Join(in.status().NotEnforced, " ") == "postgres (Observe)" })
	in.answersFrom(lab.IPv4)
	if body := in.scrape(); !contains(body, `sallyport_watched_opens_total{service="postgres",would="NONE"} 1`,
		`sallyport_watched_opens_total{service="postgres",would="PROXIED"} 2`, `sallyport_watched_opens_total{service="postgres",would="BYPASSED"} 2`) {
		t.Errorf("metrics of a service that is observed after it was shadowed:\n%s", body)
	}

	conn, err := in.lab.Client.Dial(t.Context(), netip.AddrPortFrom(clientA, 0), netip.AddrPortFrom(in.lab.Node.Addr(lab.IPv4), 5432))
	must(t, err)
	defer conn.Close()
	in.resources(in.signer.in(policy.ModeEnforce))
	in.eventually("the service is enforced", func() bool { return len(in.status().NotEnforced) == 0 })
	in.explains(operator, "BYPASSED", "has a live path")
	must(t, conn.SetDeadline(time.Now().Add(5*time.Second)))
	if _, err := lab.Ask(conn); err == nil {
		t.Error("a connection from before is served")
	}
	in.answersFrom(lab.IPv4) // under the grant's path
	in.resources(in.signer.in(policy.ModeObserve))
	in.eventually("the service is observed", func() bool { return strings.Join(in.status().NotEnforced, " ") == "postgres (Observe)" })
	in.answersFrom(lab.IPv6)
	in.seen(operator, "NONE", func(w watchedCounts) bool { return w.seen == 1 && w.proxied == 0 && w.bypassed == 0 })
	if body := in.scrape(); !contains(body, `sallyport_watched_opens_total{service="postgres",would="NONE"} 1`) {
		t.Errorf("metrics of an observed service:\n%s", body)
	}
	must(t, agent.Stop(10*time.Second))
	in.uninstall()
}

// answersFrom asks the service of the node from its client: the service itself answers.
func (in *installed) answersFrom(f lab.Family) {
	in.t.Helper()
	client := map[lab.Family]netip.Addr{lab.IPv4: clientA, lab.IPv6: clientB}[f]
	own, seen, err := in.lab.Client.Ask(in.t.Context(), netip.AddrPortFrom(client, 0), netip.AddrPortFrom(in.lab.Node.Addr(f), 5432))
	if err != nil || own != seen {
		in.t.Errorf("%v: service saw %v, not %v (%v)", f, seen, own, err)
	}
}

// watchedCounts are SYNs.
type watchedCounts struct{ seen, proxied, bypassed, denied uint64 }

// seen waits for these counts, and for a record of the verdict.
func (in *installed) seen(agent api.AgentClient, verdict string, want func(watchedCounts) bool) {
	in.t.Helper()
	services, err := agent.Services(in.t.Context(), &api.ServicesRequest{})
	must(in.t, err)
	w := services.Services[0].Watched
	have := watchedCounts{w.GetSeen().GetOpens(), w.GetProxied().GetOpens(), w.GetBypassed().GetOpens(), w.GetDenied().GetOpens()}
	if !want(have) {
		in.t.Errorf("services: %+v", have)
	}
	in.eventually("a record of what would be "+verdict, func() bool {
		stream, err := agent.Flows(in.t.Context(), &api.AgentFlowsRequest{Limit: 50})
		must(in.t, err)
		for {
			rec, err := stream.Recv()
			if err != nil {
				return false
			}
			if rec.Event == flow.EventWatched.String() && rec.Verdict == verdict && rec.Service == "postgres" && rec.Count >= 1 {
				return true
			}
		}
	})
}

func (in *installed) explains(agent api.AgentClient, verdict string, phrases ...string) {
	in.t.Helper()
	e, err := agent.Explain(in.t.Context(), &api.ExplainRequest{Client: clientA.String(), Server: in.lab.Node.Addr(lab.IPv4).String() + ":5432"})
	must(in.t, err)
	if e.Verdict != verdict || !contains(strings.Join(e.Lines, "\n"), phrases...) {
		in.t.Errorf("explain: %v, want %s and %q", e, verdict, phrases)
	}
}

// TestUnjudged: what was seen and not judged is told beside the verdicts, each packet once, and goes back only when the row began anew.
func TestUnjudged(t *testing.T) {
	seen := func(n uint64) datapath.Seen { return datapath.Seen{Opens: n, Packets: 10 * n, Bytes: 100 * n} }
	u := unjudged{told: map[uint32]unjudgedOf{}}
	for _, c := range []struct {
		name string
		w    datapath.Watched
		want uint64
	}{
		{"observed", datapath.Watched{Seen: seen(5)}, 5},
		{"and shadowed", datapath.Watched{Seen: seen(11), Proxied: seen(3), Bypassed: seen(2), Denied: seen(1)}, 5},
		{"read while the kernel counts", datapath.Watched{Seen: seen(11), Proxied: seen(4), Bypassed: seen(2), Denied: seen(1)}, 5},
		{"observed again", datapath.Watched{Seen: seen(14), Proxied: seen(4), Bypassed: seen(2), Denied: seen(1)}, 7},
		{"anew", datapath.Watched{Seen: seen(2), Proxied: seen(1)}, 1},
		{"anew, read while the kernel counts", datapath.Watched{Seen: seen(1), Proxied: seen(2)}, 0},
	} {
		u.keep(map[uint32]datapath.Watched{7: c.w})
		if got := u.of(7, c.w); got != seen(c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, seen(c.want))
		}
	}
	u.keep(nil)
	if len(u.told) != 0 {
		t.Errorf("kept: %v", u.told)
	}
}

// TestWatchedIsNotCountedAsDecided: the verdict of a record that is only watched is no label of those that were decided.
func TestWatchedIsNotCountedAsDecided(t *testing.T) {
	c := newFlowCounter()
	c.count(sourceKernel, flow.Record{Event: flow.EventWatched, Verdict: flow.VerdictBypassed, Reason: flow.ReasonPathOpen, Count: 3})
	c.count(sourceKernel, flow.Record{Event: flow.EventOpen, Verdict: flow.VerdictBypassed, Reason: flow.ReasonPathOpen})
	got := map[flowLabels]uint64{}
	c.each(func(l flowLabels, n uint64) { got[l] = n })
	want := map[flowLabels]uint64{{sourceKernel, "WATCHED", "NONE", "PATH_OPEN"}: 3, {sourceKernel, "OPEN", "BYPASSED", "PATH_OPEN"}: 1}
	if !maps.Equal(got, want) {
		t.Errorf("counted %v", got)
	}
}

// TestRowsOfAMode: what a service says of its mode is in the kernel's table, and a change of it is one of the table.
func TestRowsOfAMode(t *testing.T) {
	const service = "apiVersion: sallyport.dev/v1alpha1\nkind: ProtectedService\nmetadata: {name: a}\nspec: {target: Host, ports: [53]%s}\n"
	d := newDirectory(t)
	for i, c := range []struct {
		says string
		want datapath.Mode
	}{{"", datapath.Enforce}, {", mode: Observe", datapath.Observe}, {", mode: Shadow", datapath.Shadow}, {", mode: Enforce", datapath.Enforce}} {
		d.write("a.yaml", "")
		d.write("a.yaml", strings.Replace(service, "%s", c.says, 1))
		if i == 0 {
			must(t, d.load())
		} else {
			d.reload()
		}
		if len(d.applied) != i+1 || d.applied[i][0].Mode != c.want || d.applied[i][0].ID != d.applied[0][0].ID {
			t.Errorf("%q: applied %+v", c.says, d.applied)
		}
	}
}

// TestModesAndGrants: another mode is no other instance of a service, and only enforced ones are asked whether hooks are crossed.
func TestModesAndGrants(t *testing.T) {
	enforced := datapath.Service{Name: "a", ID: 1, Target: datapath.TargetHost, Ports: []uint16{5432}}
	shadowed := enforced
	shadowed.Mode = datapath.Shadow
	if !sameInstance(enforced, shadowed) || sameService(enforced, shadowed) {
		t.Error("a mode makes another instance, or none another table")
	}
	if got := probeTargets(inForce([]datapath.Service{shadowed})); len(got) != 0 {
		t.Errorf("a service that is open would be probed: %v", got)
	}
	if got := inForce([]datapath.Service{shadowed, enforced}); len(got) != 1 || got[0].Mode != datapath.Enforce {
		t.Errorf("in force: %+v", got)
	}
}
