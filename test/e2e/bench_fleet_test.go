package e2e_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// paceCommand makes the test binary some nodes of many that have a few records each. Its argument is a trickle.
const paceCommand = "simulate-pace"

// trickle is what that process is told. It says ready when all its nodes are connected, and begins when its standard input ends.
type trickle struct {
	fleet                   // Records are those of the burst, of all its nodes
	FirstNode int           // of this process
	Every     time.Duration // between two records of a node
	Steady    time.Duration // of that; then each node makes its part of the burst at once
}

// paceDone is what it says at its end.
type paceDone struct {
	Acks     []time.Duration // from making a record to its acknowledgement, of one node in sampledNodes
	Records  int             // of the steady time
	Burst    time.Duration   // until the last record of it was acknowledged
	CPU      time.Duration
	Resident int64
}

const (
	sampledNodes    = 50
	nodesOfProcess  = 250
	collectorSocket = "127.0.0.1:9443"
)

// paceFigures are of one engine.
type paceFigures struct {
	engine         string
	nodes, burst   int // records of the burst
	every, steady  time.Duration
	done           []paceDone
	connections    int
	idle, calm, up usageOfCollector // with all connected, after the steady time, after the burst
	took           time.Duration    // of the steady time, as it came out
	joined         time.Duration    // until all nodes were connected
}

// usageOfCollector is what it has used at a moment, its database included in the CPU time.
type usageOfCollector struct {
	cpu            time.Duration
	resident, peak int // KiB
	files          int
}

// TestBenchFleet measures a collector with many nodes that have little to say each, and then all have much at once. It prints Markdown, and adds
// it to bench-scale.md in the folder that BENCH_PUBLISH names.
func TestBenchFleet(t *testing.T) {
	leak.Check(t)
	f := paceFigures{nodes: 10, every: 20 * time.Millisecond, steady: time.Second, burst: 2000}
	names := []string{"sqlite"}
	if text := os.Getenv("BENCH_NODES"); text != "" {
		n, err := strconv.Atoi(text)
		must(t, err)
		f = paceFigures{nodes: n, every: 200 * time.Millisecond, steady: time.Minute, burst: n * 500}
		names = strings.Split(os.Getenv("BENCH_ENGINES"), ",")
	}
	text := "\n## The collector\n\n" + f.preamble()
	for _, name := range names {
		t.Run(name, func(t *testing.T) { text += measurePace(t, name, f).markdown() })
	}
	t.Log("\n\n" + text)
	if folder := os.Getenv("BENCH_PUBLISH"); folder != "" && !t.Failed() {
		file, err := os.OpenFile(filepath.Join(folder, "bench-scale.md"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		must(t, err)
		_, err = file.WriteString(text)
		must(t, err)
		must(t, file.Close())
	}
}

func measurePace(t *testing.T, name string, f paceFigures) paceFigures {
	t.Helper()
	start, ok := engines[name]
	if !ok {
		t.Fatalf("BENCH_ENGINES names %q; there are sqlite and postgres", name)
	}
	w := newWorld(t, options{plain: true, identities: simulatedIDs(f.nodes)})
	kept := start(t, w)
	f.engine = name
	dir := filepath.Join(w.Dir, "fleet")
	must(t, os.Mkdir(dir, 0o700))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size=8g")) // it stands for the disks of other machines
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	began := time.Now()
	crew := w.launchPace(t, f, dir)
	f.joined = time.Since(began)
	f.connections, f.idle = connectionsOf(t, kept.pid), kept.usage(t)
	began = time.Now()
	for _, c := range crew {
		must(t, c.begin.Close())
	}
	for time.Until(began.Add(f.steady)) > 0 {
		<-time.After(time.Until(began.Add(f.steady)))
	}
	f.calm, f.took = kept.usage(t), time.Since(began)
	for _, c := range crew {
		<-c.proc.Exited()
		var done paceDone
		if _, last, ok := strings.Cut(c.proc.Output(), paceReady); !ok || json.Unmarshal([]byte(last), &done) != nil {
			t.Fatalf("simulated nodes: %s", c.proc.Output())
		}
		f.done = append(f.done, done)
	}
	f.up = kept.usage(t)
	return f
}

const paceReady = "ready\n"

// crew is one process of nodes.
type crew struct {
	proc  *lab.Process
	begin *os.File
}

// launchPace returns when all nodes are connected.
func (w *world) launchPace(t *testing.T, f paceFigures, dir string) (all []crew) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	for first := 0; first < f.nodes; first += nodesOfProcess {
		n := min(nodesOfProcess, f.nodes-first)
		order, err := json.Marshal(trickle{fleet: fleet{Nodes: n, Records: f.burst / f.nodes * n, First: time.Now(), IDs: filepath.Join(w.Dir, "id"), Dir: dir,
			Collector: collectorSocket}, FirstNode: first, Every: f.every, Steady: f.steady})
		must(t, err)
		r, begin, err := os.Pipe()
		must(t, err)
		cmd := exec.Command(self, paceCommand, string(order))
		cmd.Stdin = r
		p, err := w.Node.Start(cmd)
		must(t, err)
		must(t, r.Close())
		all = append(all, crew{p, begin})
	}
	for _, c := range all {
		c.await(t)
	}
	return all
}

// await polls until its nodes are connected.
func (c crew) await(t *testing.T) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(5 * time.Minute); !strings.Contains(c.proc.Output(), paceReady); {
		select {
		case <-tick.C:
		case <-c.proc.Exited():
			t.Fatalf("simulated nodes: %s", c.proc.Output())
		case <-deadline:
			t.Fatalf("simulated nodes are not connected: %s", c.proc.Output())
		}
	}
}

func (s storage) usage(t *testing.T) usageOfCollector {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.pid))
	must(t, err)
	return usageOfCollector{cpu: s.cpu(t), resident: memoryKiB(t, s.pid, "VmRSS:"), peak: memoryKiB(t, s.pid, "VmHWM:"), files: len(files)}
}

// connectionsOf counts those that are established to the collector's port.
func connectionsOf(t *testing.T, pid int) (n int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", pid))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", 9443)) && fields[3] == "01" {
			n++
		}
	}
	return n
}

// runPace is what the test binary does as such nodes.
func runPace(order string) int {
	var p trickle
	err := json.Unmarshal([]byte(order), &p)
	var done paceDone
	if err == nil {
		done, err = p.run(context.Background())
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(done)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "pace:", err)
		return 1
	}
	return 0
}

func (p trickle) run(ctx context.Context) (done paceDone, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	nodes := make([]*simulated, p.Nodes)
	var all errgroup.Group
	all.SetLimit(8)
	for i := range nodes {
		all.Go(func() (err error) { nodes[i], err = p.start(ctx, p.FirstNode+i); return err })
	}
	if err := all.Wait(); err != nil {
		return done, err
	}
	fmt.Print(paceReady)
	_, _ = bufio.NewReader(os.Stdin).ReadByte() // it ends, and that is the sign
	before, began := ownUsage(), time.Now()
	acks := make([][]time.Duration, p.Nodes)
	counts := make([]int, p.Nodes)
	for i, n := range nodes {
		all.SetLimit(-1)
		all.Go(func() (err error) { acks[i], counts[i], err = p.steadily(ctx, n, began); return err })
	}
	if err := all.Wait(); err != nil {
		return done, err
	}
	for _, n := range nodes {
		all.Go(func() error { return n.deliver(ctx) })
	}
	err = all.Wait()
	after := ownUsage()
	done = paceDone{Burst: time.Since(began) - p.Steady, CPU: usedCPU(after) - usedCPU(before), Resident: after.Maxrss << 10}
	for i := range nodes {
		done.Acks, done.Records = append(done.Acks, acks[i]...), done.Records+counts[i]
	}
	return done, err
}

// steadily makes a record now and then, and looks how long it takes to be acknowledged.
func (p trickle) steadily(ctx context.Context, n *simulated, began time.Time) (acks []time.Duration, k int, err error) {
	for next := began.Add(p.Every * time.Duration(n.i%97) / 97); next.Before(began.Add(p.Steady)); next = next.Add(p.Every) {
		<-time.After(time.Until(next))
		made := time.Now()
		if err := n.streamer.Critical(ctx, drawnRecord(n.i, 1<<20+k, made)); err != nil {
			return nil, k, err
		}
		k++
		if n.i%sampledNodes != 0 {
			continue
		}
		if err := n.await(ctx, func(s audit.Status) bool { return s.CriticalPending+s.FlowPending+s.FlowSpooled == 0 }); err != nil {
			return nil, k, err
		}
		acks = append(acks, time.Since(made))
	}
	return acks, k, nil
}

func (f paceFigures) preamble() string {
	return fmt.Sprintf(`Taken by the same command on a machine with %d cores (%s), Linux %s: %d nodes at one collector, in processes of %d. Each is the agents' side of the stream with a store, an identity and a mutual TLS connection
of its own, and makes a record each %s for %s; then each has %d records at once. Collector and nodes share the cores. What nodes keep is in memory, for it stands for their disks; each
acknowledgement comes after the collector's write was synchronised to its disk.

`, runtime.NumCPU(), processor(), kernelRelease(), f.nodes, min(nodesOfProcess, f.nodes), f.every, f.steady, f.burst/f.nodes)
}

func (f paceFigures) markdown() string {
	var acks []time.Duration
	var records int
	var burst, cpu time.Duration
	var resident int64
	for _, d := range f.done {
		acks, records, burst, cpu, resident = append(acks, d.Acks...), records+d.Records, max(burst, d.Burst), cpu+d.CPU, resident+d.Resident
	}
	calm, up := f.calm.cpu-f.idle.cpu, f.up.cpu-f.calm.cpu
	return fmt.Sprintf(`| %[1]d nodes, %[2]s | figure |
| --- | ---: |
| all start: until all are connected | %[3]s |
| connections at the collector; its open files | %[4]d; %[5]d |
| its memory with all connected | %[6]d MiB |
| steady: records a second | %.0[7]f |
| steady: a record made → acknowledged, p50, p99, most of %[8]s | %[9]s, %[10]s, %[11]s |
| steady: the collector's CPU, its database included | %.2[12]f cores |
| burst: records a second | %.0[13]f (%[14]s in %[15]s) |
| burst: the collector's CPU time for a million records | %[16]s |
| its memory after it, and the most of it | %[17]d MiB, %[18]d MiB |
| the nodes' CPU time, all of it together; their memory, the most of all | %[19]s; %[20]s |

`, f.nodes, map[string]string{"sqlite": "SQLite", "postgres": "PostgreSQL"}[f.engine], f.joined.Round(100*time.Millisecond), f.connections, f.idle.files, f.idle.resident>>10,
		float64(records)/f.steady.Seconds(), thousands(len(acks)), quantile(acks, 50).Round(100*time.Microsecond), quantile(acks, 99).Round(100*time.Microsecond),
		quantile(acks, 100).Round(100*time.Microsecond), calm.Seconds()/f.took.Seconds(), float64(f.burst)/burst.Seconds(), thousands(f.burst), burst.Round(time.Millisecond),
		perMillion(up, f.burst).Round(10*time.Millisecond), f.up.resident>>10, f.up.peak>>10, cpu.Round(10*time.Millisecond), mebibytes(resident))
}
