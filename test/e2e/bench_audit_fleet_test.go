package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// fleetCommand makes the test binary many nodes, as far as the audit trail goes: each has a store, an identity and a connection to
// the collector of its own. Its argument is a fleet.
const fleetCommand = "simulate-nodes"

// fleet is what that process is told.
type fleet struct {
	Nodes, Records int       // Records are those of all
	First          time.Time // of the records' times, which go on for fleetDay
	IDs, Dir       string    // of the sockets that serve identities, and of what nodes keep
	Collector      string
}

// fleetDay is what the records of a fleet tell of: the collector's file of a day at the end of it.
const fleetDay = 20 * time.Hour

// fleetDone is what that process says at its end.
type fleetDone struct {
	Took, CPU time.Duration
	Resident  int64 // the most that it had in memory
}

// fleetFigures are of many nodes at one collector.
type fleetFigures struct {
	fleetDone
	records        int
	collector      time.Duration // CPU time
	resident, peak int           // of the collector, in KiB
	bytes          int64         // that the records take
}

func simulatedNode(i int) string { return fmt.Sprintf("sim-%03d", i) }

func simulatedIDs(n int) (ids []spiffeid.ID) {
	for i := range n {
		ids = append(ids, spiffeid.RequireFromPath(domain, "/sallyport/agent/"+simulatedNode(i)))
	}
	return ids
}

// measureFleet has simulated nodes deliver their records. What they keep is in memory: they stand for other machines, with disks of their own.
func (w *world) measureFleet(t *testing.T, plan auditPlan, kept storage) (f fleetFigures) {
	t.Helper()
	dir := filepath.Join(w.Dir, "fleet")
	must(t, os.Mkdir(dir, 0o700))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size=8g"))
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	order, err := json.Marshal(fleet{Nodes: plan.nodes, Records: plan.records, First: time.Now().Add(-fleetDay), IDs: filepath.Join(w.Dir, "id"), Dir: dir,
		Collector: "127.0.0.1:9443"})
	must(t, err)
	self, err := os.Executable()
	must(t, err)
	bytes, cpu := kept.bytes(t), kept.cpu(t)
	p, err := w.Node.Start(exec.Command(self, fleetCommand, string(order)))
	must(t, err)
	<-p.Exited()
	if err := json.Unmarshal([]byte(p.Output()), &f.fleetDone); err != nil {
		t.Fatalf("simulated nodes: %s", p.Output())
	}
	f.records, f.collector, f.bytes = plan.records, kept.cpu(t)-cpu, kept.bytes(t)-bytes
	f.resident, f.peak = memoryKiB(t, kept.pid, "VmRSS:"), memoryKiB(t, kept.pid, "VmHWM:")
	return f
}

// runFleet is what the test binary does as a fleet.
func runFleet(order string) int {
	var f fleet
	err := json.Unmarshal([]byte(order), &f)
	var done fleetDone
	if err == nil {
		done, err = f.run(context.Background())
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(done)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		return 1
	}
	return 0
}

func (f fleet) run(ctx context.Context) (done fleetDone, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var nodes []*simulated
	for i := range f.Nodes {
		n, err := f.start(ctx, i)
		if err != nil {
			return done, err
		}
		nodes = append(nodes, n)
	}
	before, began := ownUsage(), time.Now()
	var all errgroup.Group
	for _, n := range nodes {
		all.Go(func() error { return n.deliver(ctx) })
	}
	if err := all.Wait(); err != nil {
		return done, err
	}
	after := ownUsage()
	return fleetDone{Took: time.Since(began), CPU: usedCPU(after) - usedCPU(before), Resident: after.Maxrss << 10}, nil
}

func ownUsage() (u unix.Rusage) {
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u) // it has no other reason to fail
	return u
}

func usedCPU(u unix.Rusage) time.Duration { return time.Duration(u.Utime.Nano() + u.Stime.Nano()) }

// simulated is one node.
type simulated struct {
	fleet
	i        int
	store    *store.Store
	streamer *audit.Streamer
}

// start returns when the collector has answered.
func (f fleet) start(ctx context.Context, i int) (*simulated, error) {
	name := simulatedNode(i)
	source, err := identity.New(identity.Config{Address: "unix://" + filepath.Join(f.IDs, "sallyport-agent-"+name), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	go func() { _ = source.Run(ctx) }()
	if err := source.Wait(ctx); err != nil {
		return nil, err
	}
	n := &simulated{fleet: f, i: i}
	if n.store, err = store.Open(filepath.Join(f.Dir, name, "node.db")); err != nil {
		return nil, err
	}
	n.streamer, err = audit.New(audit.Config{Store: n.store, Node: name, Address: f.Collector, Source: source,
		ServerID: spiffeid.RequireFromPath(domain, "/sallyport/collector"), SpoolDir: filepath.Join(f.Dir, name, "flows"), SpoolBudget: 1 << 30,
		Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	go func() { _ = n.streamer.Run(ctx) }()
	return n, n.await(ctx, func(s audit.Status) bool { return s.Connected })
}

// await polls, which is what there is.
func (n *simulated) await(ctx context.Context, is func(audit.Status) bool) error {
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s, err := n.streamer.Status(ctx)
		if err != nil || is(s) {
			return err
		}
		if s.FlowLost > 0 || !s.Connected && time.Now().After(end) {
			return fmt.Errorf("%s: %+v", simulatedNode(n.i), s)
		}
	}
}

const (
	fleetStep  = 512  // records that a node makes at once
	fleetAhead = 4096 // that it has made and the collector does not have
)

// deliver makes the node's part of the records, as fast as the collector takes them.
func (n *simulated) deliver(ctx context.Context) error {
	mine := n.Records / n.Nodes
	for k := range mine {
		if k%fleetStep == 0 {
			if err := n.await(ctx, func(s audit.Status) bool { return s.CriticalPending+s.FlowPending+s.FlowSpooled < fleetAhead }); err != nil {
				return err
			}
		}
		if ev := drawnEvent(n.i, k, n.at(k)); ev != nil {
			data, err := audit.GrantEntry(ev)
			if err != nil {
				return err
			}
			if _, err := n.store.Append(ctx, data); err != nil {
				return err
			}
			n.streamer.Kick()
			continue
		}
		if err := n.streamer.Critical(ctx, drawnRecord(n.i, k, n.at(k))); err != nil {
			return err
		}
	}
	return n.await(ctx, func(s audit.Status) bool { return s.CriticalPending+s.FlowPending+s.FlowSpooled == 0 })
}

func (n *simulated) at(k int) time.Time {
	return n.First.Add(time.Duration(float64(fleetDay) * float64(k) / float64(n.Records/n.Nodes)))
}

func (f fleetFigures) markdown(b *strings.Builder, p auditPlan) {
	fmt.Fprintf(b, `%[1]d nodes at one collector: the agents' side of the stream with stores and identities of their own, in one process, with generated records: 80 %% of them proxied, 10 %% bypassed (openings are of the class that the node synchronises first), 10 %% denied, two in 1,000 steps of grants with their envelopes. What nodes keep is in memory, for it stands for %[1]d disks.

| %[1]d nodes, %[2]s records | figure |
| --- | --- |
| records a second | %.0[3]f (in %[4]s) |
| the collector's CPU time for a million records, that of its database included | %[5]s |
| the nodes' CPU time for a million records, making them included | %[6]s |
| the collector's own resident memory after it, and the most of it | %[7]d MiB, %[8]d MiB |
| the nodes' resident memory, the most of all together | %[9]s |
| the collector's disk for a million records | %[10]s |

`, p.nodes, thousands(f.records), float64(f.records)/f.Took.Seconds(), f.Took.Round(time.Millisecond), perMillion(f.collector, f.records).Round(10*time.Millisecond),
		perMillion(f.CPU, f.records).Round(10*time.Millisecond), f.resident>>10, f.peak>>10, mebibytes(f.Resident), mebibytes(perMillion(f.bytes, f.records)))
}

// nodeFigures are what a million records take on the node's disk while the collector is away.
type nodeFigures struct {
	spool, critical int64
	records         int
}

// measureNode has a node keep records of both classes. Of critical ones it makes a tenth, for each is a row of a table.
func measureNode(t *testing.T, records int) nodeFigures {
	t.Helper()
	dir := t.TempDir()
	f := nodeFigures{records: records}
	f.spool = perMillion(keptBy(t, filepath.Join(dir, "flow"), func(n *audit.Streamer) {
		for k := range records {
			n.Flow(proxiedRecord(0, k, time.Now()))
		}
	}), records)
	f.critical = perMillion(keptBy(t, filepath.Join(dir, "critical"), func(n *audit.Streamer) {
		for k := range records / 10 {
			must(t, n.Critical(t.Context(), bypassedRecord(0, k, time.Now())))
		}
	}), records/10)
	return f
}

// keptBy is what a node without a collector has on its disk after an orderly stop, above what it has without records.
func keptBy(t *testing.T, dir string, make func(*audit.Streamer)) int64 {
	t.Helper()
	var bytes [2]int64
	for i, make := range []func(*audit.Streamer){func(*audit.Streamer) {}, make} {
		st, err := store.Open(filepath.Join(dir, "node.db"))
		must(t, err)
		n, err := audit.New(audit.Config{Store: st, Node: nodeName, SpoolDir: filepath.Join(dir, "flows"), SpoolBudget: 4 << 30, FlowBuffer: 1 << 20,
			Logger: slog.New(slog.DiscardHandler)})
		must(t, err)
		ctx, stop := context.WithCancel(t.Context())
		ended := goRun(ctx, n)
		make(n)
		stop()
		must(t, errors.Join(<-ended, st.Close()))
		bytes[i] = bytesIn(t, dir)
	}
	return bytes[1] - bytes[0]
}

func goRun(ctx context.Context, n *audit.Streamer) <-chan error {
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	return ended
}

func (f nodeFigures) markdown(b *strings.Builder) {
	fmt.Fprintf(b, `| a node that has no collector | figure |
| --- | --- |
| its disk for a million records of the flow class | %s |
| its disk for a million critical records | %s |

`, mebibytes(f.spool), mebibytes(f.critical))
}
