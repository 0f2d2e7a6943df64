package collector

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

func (r *running) scrape(t *testing.T) string {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	reply := must(client.Get("http://" + r.metrics.Addr().String() + "/metrics"))(t)
	defer reply.Body.Close()
	return string(must(io.ReadAll(reply.Body))(t))
}

// What was stored, lost and refused is counted once, and no label is what a node said if the collector does not know it.
func TestMetrics(t *testing.T) { onEngines(t, testMetrics) }

func testMetrics(t *testing.T, i ids) {
	r := start(t, i, func(c *Config) { c.Metrics = "127.0.0.1:0" })
	lacks := func(wanted ...string) {
		t.Helper()
		body := r.scrape(t)
		for _, want := range wanted {
			if !strings.Contains(body, "\n"+want+"\n") {
				t.Errorf("metrics lack %s", want)
			}
		}
	}
	lacks(`sallyport_collector_refused_batches_total{cause="gap"} 0`, `sallyport_collector_nodes{state="connected"} 0`,
		`sallyport_collector_lost_records_total{cause="forgotten",class="flow",stage="collector"} 0`)
	n, _ := r.connect(t, "node-1", epoch1)
	first := n.sealed(flows, append(flowEntries(1, 5), lossEntry(15, 10)), nil)
	for range 2 { // again: nothing new
		n.sendBatch(first)
		n.ack()
	}
	odd := lossEntry(18, 3)
	odd.GetLoss().Stage, odd.GetLoss().Cause = "node-1\"}", "x"
	n.store(flows, odd, flowEntry(19, func(f *api.FlowRecord) { f.Verdict = "MAYBE" }))
	n.store(critical, grantEntry(1, "g", "ALARM"), grantEntry(2, "g", "whatever"))
	lacks(`sallyport_collector_nodes{state="connected"} 1`)
	n.batch(flows, flowEntry(99, nil))
	n.refused(codes.FailedPrecondition)
	lacks(
		`sallyport_collector_acknowledged_total{class="flow"} 19`,
		`sallyport_collector_acknowledged_total{class="critical"} 2`,
		`sallyport_collector_flow_records_total{verdict="PROXIED"} 5`,
		`sallyport_collector_flow_records_total{verdict="other"} 1`,
		`sallyport_collector_grant_events_total{step="ALARM"} 1`,
		`sallyport_collector_grant_events_total{step="other"} 1`,
		`sallyport_collector_lost_records_total{cause="full",class="flow",stage="kernel_ring"} 10`,
		`sallyport_collector_lost_records_total{cause="other",class="flow",stage="other"} 3`,
		`sallyport_collector_refused_batches_total{cause="gap"} 1`,
		`sallyport_collector_damaged_days_total 0`,
		`sallyport_collector_days 1`,
	)
}

// A day that was found damaged shows.
func TestMetricsOfDamage(t *testing.T) {
	h := newHistory(t)
	mangle(t, h.path(3), func(b []byte) []byte { return b[:5000] })
	r := start(t, h.ids, func(c *Config) { c.Dir, c.Now, c.Boot, c.Metrics = h.dir, h.at.now, h.at.boot, "127.0.0.1:0" })
	if body := r.scrape(t); !strings.Contains(body, "\nsallyport_collector_damaged_days_total 1\n") || !strings.Contains(body, "\nsallyport_collector_days 2\n") {
		t.Error(body)
	}
}

// A node that was there is missed, also by a collector that was started again since; after a week nobody waits for it.
func TestSilentNodes(t *testing.T) {
	h := newHistory(t)
	r := h.run(t)
	want := func(connected, away, silent int) {
		t.Helper()
		have := r.nodes.count()
		for deadline := time.Now().Add(10 * time.Second); have[nodeConnected] != connected && time.Now().Before(deadline); have = r.nodes.count() {
			<-time.After(10 * time.Millisecond) // a stream's end is seen when it is
		}
		if have[nodeConnected] != connected || have[nodeAway] != away || have[nodeSilent] != silent {
			t.Errorf("nodes are %v, want %d connected, %d away, %d silent", have, connected, away, silent)
		}
	}
	want(0, 1, 0)
	h.at.pass(silentAfter)
	want(0, 0, 1)
	n, _ := r.connect(t, "node-1", epoch1)
	want(1, 0, 0)
	h.at.pass(2 * silentAfter) // it has nothing to say, and is there
	want(1, 0, 0)
	if err := n.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	want(0, 1, 0)
	h.at.pass(silentAfter)
	want(0, 0, 1)
	h.at.pass(forgottenAfter)
	want(0, 0, 0)
}

// A node that sends more than its share waits for its acknowledgement, and loses nothing. Others do not wait, and a new stream does not
// begin a new share.
func TestLimits(t *testing.T) {
	r := start(t, newIDs(t), func(c *Config) { c.Limits = Limits{RecordsPerSecond: 100} })
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 100)...) // the share of a second, at once
	n, _ = r.connect(t, "node-1", epoch1)
	began := time.Now()
	n.batch(flows, flowEntries(101, 250)...)
	other, _ := r.connect(t, "node-2", epoch1)
	other.store(flows, flowEntries(1, 50)...)
	others := time.Since(began)
	if a := n.ack(); a.GetSeq() != 250 {
		t.Errorf("acknowledged was %v", a)
	}
	if own := time.Since(began); own < time.Second {
		t.Errorf("150 records over a share of 100 waited %v, others %v", own, others)
	}
	if got := len(r.flows(t, &api.FlowQuery{Node: "node-1"})); got != 250 {
		t.Errorf("%d records are there", got)
	}
	bytes := newNodes(Limits{BytesPerSecond: 1000}, bootTime, r.log).heard("x", 1)
	bytes.owes(&api.Batch{Seal: make([]byte, 1000)})
	if wait := bytes.owes(&api.Batch{Seal: make([]byte, 2000)}); wait < 1500*time.Millisecond || wait > 2500*time.Millisecond {
		t.Errorf("2000 bytes over a share of 1000 wait %v", wait)
	}
}

// A stop does not wait for those who wait.
func TestLimitsStop(t *testing.T) { onEngines(t, testLimitsStop) }

func testLimitsStop(t *testing.T, i ids) {
	r := start(t, i, func(c *Config) { c.Limits = Limits{RecordsPerSecond: 1} })
	n, _ := r.connect(t, "node-1", epoch1)
	n.batch(flows, flowEntries(1, 1000)...)
	r.stop()
	n.refused(codes.Unavailable)
}
