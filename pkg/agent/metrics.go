package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/identity"
)

// desc describes one metric. Every label has few values, none of which comes from outside.
func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("sallyport_"+name, help, labels, nil)
}

// metrics collects at the time of the scrape what the parts count.
type metrics struct {
	node     *node
	unjudged unjudged

	build, ready, proxy, reporting, generation, lease, problems, alarms, devices, xdp, paths, packets, bytes, refused, volume, records, grants, glass, lost, spool, spoolBytes, spoolLimit, shed,
	certificates, providers, modes, seenOpens, seenPackets, seenBytes, panic, failed, identity, longest, widest, unused, unreconciled, callers, wave, phase, canary, canaryClosed *prometheus.Desc
}

func newMetrics(n *node) *metrics {
	return &metrics{
		node:       n,
		unjudged:   unjudged{told: map[uint32]unjudgedOf{}},
		build:      desc("build_info", "Version of the agent; always 1.", "version"),
		ready:      desc("ready", "1 if probes crossed the hooks."),
		proxy:      desc("proxy_listening", "1 if the proxy listens in px."),
		reporting:  desc("proxy_reporting", "1 if a proxy hands over its flow records."),
		generation: desc("services_generation", "Generation of the services table in force."),
		lease:      desc("lease_left_seconds", "How long the kernel admits new bypassed flows without the agent."),
		problems:   desc("problems", "Problems that stand now, by class.", "class"),
		alarms:     desc("alarms_total", "Alarms of this process, by name: something worked against enforcement.", "alarm"),
		devices:    desc("hooked_devices", "Devices that have hooks, by role.", "role"),
		xdp:        desc("uplinks", "Uplinks by the mode of their XDP filter, and why.", "xdp", "cause"),
		paths:      desc("paths", "Path slots in use, by state.", "state"),
		packets:    desc("packets_total", "Packets towards and from protected services, by reason.", "reason"),
		bytes:      desc("bytes_total", "IP bytes towards and from protected services, by reason.", "reason"),
		refused:    desc("backstop_refused_packets_total", "Packets that came around the hooks and were refused at a socket, by device of the node; those of other namespaces are one.", "device"),
		volume:     desc("service_payload_bytes_total", "Payload towards a service that hooks let through and that sockets got, by what explains it.", "service", "by", "at"),
		records:    desc("flow_records_total", "Flow records, by where they come from and what they tell; WATCHED ones have the verdict NONE.", "source", "event", "verdict", "reason"),
		grants:     desc("grant_events_total", "Grant events of this process, by step.", "step"),
		glass:      desc("break_glass_grants", "Break-glass grants that are live, and those that are over and that nobody has reviewed.", "state"),
		lost:       desc("kernel_lost_records_total", "Records that did not fit into a ring, by class of the ring.", "class"),
		spool:      desc("audit_pending_records", "Records that the collector has not acknowledged, by class.", "class"),
		spoolBytes: desc("audit_spool_bytes", "Bytes that flow records take on the disk which the collector has not acknowledged."),
		spoolLimit: desc("audit_spool_limit_bytes", "Bytes that they may take, after which the oldest give way."),
		shed:       desc("audit_shed_records_total", "Flow records that gave way in bounded memory, or on the disk."),
		modes:      desc("services", "Services by mode: only enforced ones are closed.", "mode"),
		seenOpens: desc("watched_opens_total", "SYNs of services that are not enforced, by what Enforce would make of them; NONE while they are observed.",
			"service", "would"),
		seenPackets: desc("watched_packets_total", "Packets of services that are not enforced, by what Enforce would make of them; NONE while they are observed.",
			"service", "would"),
		seenBytes: desc("watched_bytes_total", "IP bytes of services that are not enforced, by what Enforce would make of them; NONE while they are observed.",
			"service", "would"),
		identity:     desc("identity", "1 for the state that the agent's own identity is in; none without a collector and automation.", "state"),
		longest:      desc("grant_longest_seconds", "How long the longest of the active grants lives in all."),
		widest:       desc("grant_widest_paths", "How many paths the widest of the active grants has."),
		unused:       desc("grant_unused_seconds", "How long the paths of that active grant have carried nothing for which it is longest; an agent that has just come counts from its start."),
		unreconciled: desc("unreconciled_bytes", "Bytes by which the kernel's counters of paths and their records differ, by cause, as of the last comparison.", "cause"),

		callers: desc("caller_connections_total", "Connections of clients on this node, by whether the identity of the workload behind the socket was attested.", "attested"),

		certificates: desc("web_certificate_ends_seconds", "Unix time at which the web certificate that the proxy has in use ends.", "certificate"),
		providers:    desc("provider_keys_fetched_seconds", "Unix time at which the proxy last fetched the keys of an identity provider.", "provider"),
		wave:         desc("rollout_wave", "How many waves of a roll-out have begun on this node.", "rollout"),
		phase:        desc("rollout", "1 for the phase that a roll-out is in on this node.", "rollout", "phase"),
		canary:       desc("canary", "1 for the state in which canaries saw an enforced service at the latest round: closed, open or unknown.", "service", "state"),
		canaryClosed: desc("canary_closed_age_seconds", "How long ago canaries last proved that all ports of an enforced service are closed to who proves nothing; since the agent's start while they never did.", "service"),

		panic:  desc("panic", "1 while a panic stands: every path ended, and none is opened."),
		failed: desc("scrape_failed", "1 if some of the kernel's or the store's figures could not be read."),
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.build, m.ready, m.proxy, m.reporting, m.generation, m.lease, m.problems, m.alarms, m.devices, m.xdp, m.paths,
		m.packets, m.bytes, m.refused, m.volume, m.records, m.grants, m.glass, m.lost, m.spool, m.spoolBytes, m.spoolLimit, m.shed,
		m.modes, m.seenOpens, m.seenPackets, m.seenBytes, m.panic, m.failed,
		m.identity, m.longest, m.widest, m.unused, m.unreconciled, m.callers, m.certificates, m.providers, m.wave, m.phase, m.canary, m.canaryClosed} {
		ch <- d
	}
}

// Collect implements prometheus.Collector. Figures that cannot be read are left out, and scrape_failed says so.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	m.own(ch)
	err := errors.Join(m.kernel(ch), m.counters(ch), m.backstop(ch), m.watched(ch), m.auditing(ch))
	gauge(ch, m.failed, truth(err != nil))
}

func gauge(ch chan<- prometheus.Metric, d *prometheus.Desc, v float64, labels ...string) {
	ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func counter(ch chan<- prometheus.Metric, d *prometheus.Desc, v uint64, labels ...string) {
	ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (m *metrics) own(ch chan<- prometheus.Metric) {
	gauge(ch, m.build, 1, m.node.opt.Version)
	gauge(ch, m.ready, truth(m.node.readiness.state() == nil))
	gauge(ch, m.panic, truth(m.node.grants.standing() != ""))
	gauge(ch, m.reporting, truth(m.node.reports.connected()))
	if e := m.node.resources.current(); e != nil {
		gauge(ch, m.generation, float64(e.generation))
	}
	m.collectRollouts(ch)
	for class, n := range m.node.problems.counts() {
		gauge(ch, m.problems, float64(n), string(class))
	}
	raised := make(map[alarmName]uint64)
	for _, a := range m.node.alarms.list() {
		raised[a.name] = a.count
	}
	for _, name := range alarmNames {
		counter(ch, m.alarms, raised[name], string(name))
	}
	roles := make(map[datapath.Role]int)
	for _, d := range m.node.datapath.Devices() {
		roles[d.Role]++
	}
	for role, n := range roles {
		gauge(ch, m.devices, float64(n), string(role))
	}
	filters := make(map[datapath.XDPOutcome]int)
	for _, x := range m.node.datapath.XDP() {
		filters[datapath.XDPOutcome{Mode: x.Mode, Cause: x.Cause}]++
	}
	for x, n := range filters {
		gauge(ch, m.xdp, float64(n), string(x.Mode), string(x.Cause))
	}
	m.grantTerms(ch)
	attested, unattested := m.node.callers.tallies()
	counter(ch, m.callers, attested, "yes")
	counter(ch, m.callers, unattested, "no")
	m.canaries(ch)
	for cause, n := range m.node.tides.unreconciled() {
		gauge(ch, m.unreconciled, float64(n), cause)
	}
	m.proxyParts(ch)
	if m.node.identity != nil {
		now := m.node.identity.Status().State
		for _, s := range identity.States() {
			gauge(ch, m.identity, truth(s == now), string(s))
		}
	}
	live, over := m.node.grants.reviews.counts()
	gauge(ch, m.glass, float64(live), "live")
	gauge(ch, m.glass, float64(over), "unreviewed")
	m.node.flowCounts.each(func(l flowLabels, n uint64) { counter(ch, m.records, n, l.source, l.event, l.verdict, l.reason) })
	m.node.eventCounts.each(func(step string, n uint64) { counter(ch, m.grants, n, step) })
}

// proxyParts shows nothing of what the proxy does not have, or does not tell of.
func (m *metrics) proxyParts(ch chan<- prometheus.Metric) {
	for _, c := range m.node.proxyStates.certificates(m.node.hasCertificate) {
		if c.GetUntil() != nil {
			gauge(ch, m.certificates, float64(c.GetUntil().GetSeconds()), c.GetName())
		}
	}
	for _, p := range m.node.proxyStates.providers(m.node.hasProvider) {
		if p.GetFetched() != nil {
			gauge(ch, m.providers, float64(p.GetFetched().GetSeconds()), p.GetName())
		}
	}
}

// canaries tells of every enforced TCP service, also of one that no canary has seen yet. A service has one label for each state.
func (m *metrics) canaries(ch chan<- prometheus.Metric) {
	begun := m.node.clock.boot() - time.Since(m.node.started)
	for service, c := range m.node.canaries.coverage() {
		for _, state := range []string{canaryClosed, canaryOpen, canaryUnknown} {
			gauge(ch, m.canary, truth(c.state == state), service, state)
		}
		since := max(c.closed, begun)
		gauge(ch, m.canaryClosed, (m.node.clock.boot() - since).Seconds(), service)
	}
}

// grantTerms shows the extremes among the active grants: their ids would be labels without end.
func (m *metrics) grantTerms(ch chan<- prometheus.Metric) {
	longest, widest, unused := m.node.grants.extremes()
	gauge(ch, m.longest, longest.Seconds())
	gauge(ch, m.widest, float64(widest))
	gauge(ch, m.unused, unused.Seconds())
}

// extremes are the longest life and the most paths of an active grant, and the longest time for which one has carried nothing.
func (g *grants) extremes() (longest time.Duration, widest int, unused time.Duration) {
	all, now := g.every(), g.clock.boot()
	_ = inTurns(&g.mu, all, func(h *held) error {
		if h.over != nil {
			return nil
		}
		longest = max(longest, h.row.Deadline.Sub(h.row.Activated))
		widest = max(widest, len(h.row.Slots))
		if h.use.moved != 0 { // it was looked at
			unused = max(unused, now-h.use.moved)
		}
		return nil
	})
	return longest, widest, unused
}

func (m *metrics) kernel(ch chan<- prometheus.Metric) error {
	left, leaseErr := m.node.datapath.LeaseLeft()
	if leaseErr == nil {
		gauge(ch, m.lease, max(left, 0).Seconds())
	}
	listening, proxyErr := proxyListening(m.node.px, m.node.cfg.Spec.Proxy.ListenPort)
	if proxyErr == nil {
		gauge(ch, m.proxy, truth(listening))
	}
	paths, pathErr := m.node.datapath.Paths()
	if pathErr == nil {
		states := map[datapath.PathState]int{datapath.PathActive: 0}
		for _, p := range paths {
			states[p.State]++
		}
		for state, n := range states {
			gauge(ch, m.paths, float64(n), stateName(state))
		}
	}
	return errors.Join(leaseErr, proxyErr, pathErr)
}

func (m *metrics) counters(ch chan<- prometheus.Metric) error {
	counters, countErr := m.node.datapath.Counters()
	if countErr == nil {
		for _, reason := range flow.Reasons() {
			if c, ok := counters[reason]; ok {
				counter(ch, m.packets, c.Packets, reason.String())
				counter(ch, m.bytes, c.Bytes, reason.String())
			}
		}
	}
	losses, lossErr := m.node.datapath.Losses()
	if lossErr == nil {
		counter(ch, m.lost, losses.MustDeliver, "must_deliver")
		counter(ch, m.lost, losses.BestEffort, "best_effort")
	}
	return errors.Join(countErr, lossErr)
}

// elsewhere stands for every device that is not in the host's namespace: their numbers come from outside.
const elsewhere = "elsewhere"

func (m *metrics) backstop(ch chan<- prometheus.Metric) error {
	refusals, err := m.node.datapath.Refused()
	if err != nil {
		return err
	}
	refused := map[string]uint64{elsewhere: 0}
	for _, r := range refusals {
		device := elsewhere
		if r.Host {
			device = r.Device
		}
		refused[device] += r.Packets
	}
	for device, n := range refused {
		counter(ch, m.refused, n, device)
	}
	all, err := m.node.datapath.Traffic()
	for id, t := range all {
		service := m.node.serviceName(id)
		counter(ch, m.volume, t.HookLeg.Bytes, service, kindLeg, "hook")
		counter(ch, m.volume, t.SocketLeg.Bytes, service, kindLeg, "socket")
		counter(ch, m.volume, t.HookPath.Bytes, service, kindPath, "hook")
		counter(ch, m.volume, t.SocketPath.Bytes, service, kindPath, "socket")
	}
	return err
}

func (m *metrics) auditing(ch chan<- prometheus.Metric) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s, err := m.node.audit.Status(ctx)
	if err != nil {
		return err
	}
	gauge(ch, m.spool, float64(s.CriticalPending), "critical")
	gauge(ch, m.spool, float64(s.FlowPending+s.FlowSpooled), "flow")
	gauge(ch, m.spoolBytes, float64(s.SpoolBytes))
	gauge(ch, m.spoolLimit, float64(m.node.cfg.Spec.FlowSpool))
	counter(ch, m.shed, s.FlowShed)
	return nil
}

// listenAgain is how often the metrics' address is tried while it cannot be had.
const listenAgain = time.Second

// metricsServer serves /metrics over plain HTTP on an address that the configuration names. An address that cannot be had,
// because another process has it or because the network is not up yet, is a problem and stops nothing.
type metricsServer struct {
	address  string
	handler  http.Handler
	problems *problems
}

func newMetricsServer(address string, p *problems, c ...prometheus.Collector) (*metricsServer, error) {
	registry := prometheus.NewRegistry()
	c = append(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, collector := range c {
		if err := registry.Register(collector); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	return &metricsServer{address: address, handler: mux, problems: p}, nil
}

// Run serves until ctx ends.
func (m *metricsServer) Run(ctx context.Context) error {
	again := time.NewTicker(listenAgain)
	defer again.Stop()
	for {
		if err := m.serve(ctx); ctx.Err() == nil {
			m.problems.report(problemMetrics, m.address, err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-again.C:
		}
	}
}

// serve listens and serves until ctx ends, or says why it cannot.
func (m *metricsServer) serve(ctx context.Context) error {
	listener, err := net.Listen("tcp", m.address)
	if err != nil {
		return fmt.Errorf("no metrics are served: %w", err)
	}
	m.problems.report(problemMetrics, m.address, nil)
	server := &http.Server{Handler: m.handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}
