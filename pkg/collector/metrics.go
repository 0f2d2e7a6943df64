package collector

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// other stands for what a node says and this collector does not know: labels have few values, and none comes from outside.
const other = "other"

// Stages and causes of losses that have a label of their own.
var (
	lossStages = known("kernel_ring", "proxy_buffer", "agent_spool", "agent_store", "flow_spool", "collector")
	lossCauses = known("full", "must_deliver_full", "best_effort_full", "buffer_full", "spool_full", "agent_restart", "forgotten", "unreadable", "damaged", "several")
	eventSteps = known("ACTIVATED", "REVOKED", "EXPIRED", "SPENT", "IDLE", "WARNED", "SIGNALLED", "REFUSED", "UNINSTALLED", "ALARM", "ROLLED_BACK", "PANIC",
		"LIFTED", "WITHDRAWN", "DENIED", "REVIEWED", "VOUCHED", "ADVANCED", "HALTED", "RESUMED", "FELL_BACK", "ROLLED_OUT")
	verdicts = known(flow.VerdictNone.String(), flow.VerdictProxied.String(), flow.VerdictBypassed.String(), flow.VerdictDenied.String())
)

type vocabulary map[string]bool

func known(words ...string) vocabulary {
	v := vocabulary{}
	for _, w := range words {
		v[w] = true
	}
	return v
}

func (v vocabulary) label(s string) string {
	if v[s] {
		return s
	}
	return other
}

// meters count what the collector does. They belong to one process, and begin with zeros, so that a first loss is seen as a rise.
type meters struct {
	acknowledged, lost, refused, flows, events *prometheus.CounterVec
	delayed                                    prometheus.Counter
}

func newMeters() *meters {
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_collector_" + name, Help: help}, labels)
	}
	m := &meters{
		acknowledged: vec("acknowledged_total", "Numbers of records that were acknowledged, those that losses stand for included, by class.", "class"),
		lost:         vec("lost_records_total", "Records that nodes counted as lost, by class, stage and cause.", "class", "stage", "cause"),
		refused:      vec("refused_batches_total", "Batches that were not taken, by cause, and nodes that could not be greeted (storage); a gap is a sequence that was not continued.", "cause"),
		flows:        vec("flow_records_total", "Flow records that were stored, by verdict.", "verdict"),
		events:       vec("grant_events_total", "Grant events that were stored, by step.", "step"),
		delayed: prometheus.NewCounter(prometheus.CounterOpts{Name: "sallyport_collector_delayed_seconds_total",
			Help: "How long nodes waited because they sent more than their share."}),
	}
	for _, class := range classes {
		m.acknowledged.WithLabelValues(class)
		for stage := range lossStages {
			for cause := range lossCauses {
				m.lost.WithLabelValues(class, stage, cause)
			}
		}
		m.lost.WithLabelValues(class, other, other)
	}
	for _, cause := range []string{refusedGap, refusedMalformed, refusedStorage} {
		m.refused.WithLabelValues(cause)
	}
	for v := range verdicts {
		m.flows.WithLabelValues(v)
	}
	for step := range eventSteps {
		m.events.WithLabelValues(step)
	}
	return m
}

var classes = map[api.Class]string{api.Class_CLASS_CRITICAL: "critical", api.Class_CLASS_FLOW: "flow"}

// Causes for which a batch is refused.
const (
	refusedGap       = "gap"
	refusedMalformed = "malformed"
	refusedStorage   = "storage"
)

// stored counts the entries of a batch that were not there before.
func (m *meters) stored(class api.Class, entries []*api.Entry, before, after uint64) {
	if after > before {
		m.acknowledged.WithLabelValues(classes[class]).Add(float64(after - before))
	}
	for _, e := range entries {
		if e.GetSeq() <= before {
			continue
		}
		switch r := e.GetRecord().(type) {
		case *api.Entry_Flow:
			m.flows.WithLabelValues(verdicts.label(r.Flow.GetVerdict())).Inc()
		case *api.Entry_Grant:
			m.events.WithLabelValues(eventSteps.label(r.Grant.GetStep())).Inc()
		case *api.Entry_Loss:
			m.lost.WithLabelValues(classes[class], lossStages.label(r.Loss.GetStage()), lossCauses.label(r.Loss.GetCause())).Add(float64(r.Loss.GetCount()))
		}
	}
}

// refuse counts a batch that was not stored; one that only came too late is none.
func (m *meters) refuse(err error) {
	switch {
	case errors.Is(err, errStopping), errors.Is(err, errTakenOver):
	case errors.Is(err, errGap):
		m.refused.WithLabelValues(refusedGap).Inc()
	case errors.Is(err, errEntry):
		m.refused.WithLabelValues(refusedMalformed).Inc()
	default:
		m.refused.WithLabelValues(refusedStorage).Inc()
	}
}

// Names of what is read at a scrape.
var (
	descNodes   = prometheus.NewDesc("sallyport_collector_nodes", "Nodes by state: connected, away, or silent for 5 minutes and more.", []string{"state"}, nil)
	descDays    = prometheus.NewDesc("sallyport_collector_days", "Days that have records.", nil, nil)
	descDamaged = prometheus.NewDesc("sallyport_collector_damaged_days_total", "Days that this process found damaged and set aside.", nil, nil)
)

// gauges are read from the parts when somebody scrapes.
type gauges struct {
	engine engine
	nodes  *nodes
}

// Describe implements prometheus.Collector.
func (g gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descNodes, descDays, descDamaged} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (g gauges) Collect(ch chan<- prometheus.Metric) {
	for state, n := range g.nodes.count() {
		ch <- prometheus.MustNewConstMetric(descNodes, prometheus.GaugeValue, float64(n), string(state))
	}
	ctx, cancel := context.WithTimeout(context.Background(), scrapeWithin)
	defer cancel()
	if days, err := g.engine.days(ctx); err == nil {
		ch <- prometheus.MustNewConstMetric(descDays, prometheus.GaugeValue, float64(len(days)))
	}
	ch <- prometheus.MustNewConstMetric(descDamaged, prometheus.CounterValue, float64(g.engine.damaged()))
}

// scrapeWithin is how long a scrape waits for a database.
const scrapeWithin = 5 * time.Second

// serveMetrics answers scrapes until ctx ends.
func (c *Collector) serveMetrics(ctx context.Context, l net.Listener) error {
	registry := prometheus.NewRegistry()
	m := c.meters
	for _, p := range []prometheus.Collector{gauges{c.engine, c.nodes}, m.acknowledged, m.lost, m.refused, m.flows, m.events, m.delayed,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := registry.Register(p); err != nil {
			return err
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
