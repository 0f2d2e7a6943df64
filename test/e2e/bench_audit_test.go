package e2e_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// auditPlan is how much of the audit trail is measured.
type auditPlan struct {
	engines []string
	records int // that simulated nodes deliver, and queries look through
	nodes   int
	knocks  int           // connections whose records go from the kernel to the disk at the highest rate
	steady  time.Duration // at a rate that is no effort
	queries int           // of each kind at most
	patient time.Duration // for queries of one kind
}

// auditShort is what a run of all tests has time for; `make bench-audit` says more.
var auditShort = auditPlan{engines: []string{"sqlite"}, records: 10_000, nodes: 5, knocks: 1000, steady: time.Second, queries: 3, patient: time.Second}

func newAuditPlan(t *testing.T) auditPlan {
	t.Helper()
	records := os.Getenv("BENCH_RECORDS")
	if records == "" {
		return auditShort
	}
	n, err := strconv.Atoi(records)
	must(t, err)
	return auditPlan{engines: strings.Split(os.Getenv("BENCH_ENGINES"), ","), records: n, nodes: 100, knocks: max(n/50, 1000), steady: 20 * time.Second,
		queries: 200, patient: 10 * time.Second}
}

// TestBenchAudit measures the way of records from the kernel to the collector's disk, what they cost there, and how long questions
// take. It prints Markdown, and writes it into the folder that BENCH_PUBLISH names.
func TestBenchAudit(t *testing.T) {
	leak.Check(t)
	plan := newAuditPlan(t)
	var all []auditFigures
	for _, name := range plan.engines {
		t.Run(name, func(t *testing.T) { all = append(all, measureAudit(t, plan, name)) })
	}
	if t.Failed() {
		return
	}
	figures := plan.markdown(all)
	t.Log("\n\n" + figures)
	if folder := os.Getenv("BENCH_PUBLISH"); folder != "" {
		must(t, os.WriteFile(filepath.Join(folder, "bench-audit.md"), []byte(figures), 0o644))
	}
}

// auditFigures are of one engine.
type auditFigures struct {
	engine string
	ring   ringFigures
	fleet  fleetFigures
	node   nodeFigures
	asked  []questionFigures
	floor  []time.Duration // of one write with its fsync
}

// engine starts a collector that keeps its records in a certain way.
type engine func(*testing.T, *world) storage

var engines = map[string]engine{"sqlite": startSQLite, "postgres": startOnPostgres}

// storage is a collector that serves, and what it keeps its records in.
type storage struct {
	pid    int
	server *lab.Process // of a database; nil: there is none
	dir    string       // where records lie
}

func (s storage) bytes(t *testing.T) int64 {
	t.Helper()
	return bytesIn(t, s.dir)
}

// cpu is the CPU time of the collector, with that of its database.
func (s storage) cpu(t *testing.T) time.Duration {
	t.Helper()
	sum := cpuTime(t, s.pid)
	for _, pid := range s.servers(t) {
		sum += cpuTime(t, pid)
	}
	return sum
}

// servers are the processes of the database that are there.
func (s storage) servers(t *testing.T) (pids []int) {
	t.Helper()
	if s.server == nil {
		return nil
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", s.server.Pid()))
	must(t, err)
	for _, text := range append(strings.Fields(string(children)), strconv.Itoa(s.server.Pid())) {
		pid, err := strconv.Atoi(text)
		must(t, err)
		pids = append(pids, pid)
	}
	return pids
}

func startSQLite(t *testing.T, w *world) storage {
	t.Helper()
	w.configureCollector(t, "")
	w.collector.start(t)
	return storage{pid: w.collector.proc.Pid(), dir: w.files.records}
}

// startOnPostgres has an unchanged server beside the collector, with a buffer as its manual recommends for a machine of that size.
func startOnPostgres(t *testing.T, w *world) storage {
	t.Helper()
	p, dir := w.startPostgres(t, w.Node, "-h", "", "-c", "shared_buffers=1GB", "-c", "max_wal_size=4GB")
	w.configureCollector(t, fmt.Sprintf("  postgres: {url: \"host=%s port=%d user=postgres dbname=postgres\"}\n", dir, postgresPort))
	w.collector.start(t)
	return storage{pid: w.collector.proc.Pid(), server: p, dir: filepath.Join(dir, "data", "base")}
}

// configureCollector sets no limit to a node, for what is measured is what limits it by itself.
func (w *world) configureCollector(t *testing.T, more string) {
	t.Helper()
	text, err := os.ReadFile(w.files.collector)
	must(t, err)
	write(t, w.files.collector, string(text)+"  limits: {recordsPerSecond: 0, bytesPerSecond: 0}\n"+more)
}

func measureAudit(t *testing.T, plan auditPlan, name string) auditFigures {
	t.Helper()
	start, ok := engines[name]
	if !ok {
		t.Fatalf("ENGINE names %q; there are sqlite and postgres", name)
	}
	w := newWorld(t, options{plain: true, identities: simulatedIDs(plan.nodes)})
	kept := start(t, w)
	records, err := client.NewAudit("unix:"+w.files.recordsSocket, nil)
	must(t, err)
	defer records.Close()
	f := auditFigures{engine: name}
	f.ring = w.measureRing(t, plan, kept, records)
	f.fleet = w.measureFleet(t, plan, kept)
	f.asked = measureQuestions(t, plan, records)
	f.node = measureNode(t, min(plan.records, 200_000))
	f.floor = syncFloor(t, w.Dir, 200)
	return f
}

func bytesIn(t *testing.T, dir string) (n int64) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		var info fs.FileInfo
		if err == nil && !e.IsDir() {
			if info, err = e.Info(); err == nil {
				n += info.Size()
			}
		}
		if errors.Is(err, fs.ErrNotExist) { // a database has files that come and go
			return nil
		}
		return err
	}))
	return n
}

func (p auditPlan) markdown(all []auditFigures) string {
	var b strings.Builder
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Fprintf(&b, `# Figures of the audit trail

Taken by `+"`make bench-audit`"+` on a machine with %d cores (%s), Linux %s, load %s. Agent, collector, simulated nodes and those who ask share the cores, so all rates are those of the whole. Connections between nodes and the collector are mTLS, each acknowledgement comes after the collector's write was synchronised to its disk, and the limits that a collector sets to a node by default (20,000 records a second) are off.

`, runtime.NumCPU(), processor(), kernelRelease(), strings.Join(strings.Fields(string(load))[:3], " "))
	for _, f := range all {
		f.markdown(&b, p)
	}
	return b.String()
}

func (f auditFigures) markdown(b *strings.Builder, p auditPlan) {
	fmt.Fprintf(b, "## %s\n\n", map[string]string{"sqlite": "SQLite", "postgres": "PostgreSQL"}[f.engine])
	f.ring.markdown(b)
	f.fleet.markdown(b, p)
	f.node.markdown(b)
	fmt.Fprintf(b, "For comparison: one write with its fsync on that disk takes %s (p50), %s (p99).\n\n", quantile(f.floor, 50).Round(10*time.Microsecond),
		quantile(f.floor, 99).Round(10*time.Microsecond))
	fmt.Fprintf(b, "Questions to the collector with %s records, over its Unix socket, one at a time, until the last record has come. Each asks for something else, at random.\n\n"+
		"| question | p50 | p99 | most | asked | records in an answer |\n| --- | --- | --- | --- | --- | --- |\n", thousands(p.records))
	for _, q := range f.asked {
		fmt.Fprintf(b, "| %s | %s | %d | %d |\n", q.name, row(q.took), len(q.took), q.rows/max(len(q.took), 1))
	}
	b.WriteString("\n")
}

// thousands writes a number as people read it.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// perMillion is what a million takes where n took all of it.
func perMillion[T ~int64](all T, n int) T { return T(float64(all) / float64(max(n, 1)) * 1e6) }

func mebibytes(n int64) string { return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20)) }
