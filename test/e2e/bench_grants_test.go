package e2e_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/test/leak"
)

const (
	// benchShort is how many paths are held where `make bench-grants` does not say: what a run of all tests has time for.
	benchShort = 100
	// benchAim is what a request may take at the 99th percentile, with 10,000 active paths.
	benchAim = 10 * time.Millisecond
	// benchMemoryAim is what the agent may have in memory with 10,000 active paths, in KiB.
	benchMemoryAim = 64 << 10
	// benchRequests are measured one after the other.
	benchRequests = 1000
	// benchRest is how long nobody asks.
	benchRest = 5 * time.Second
)

// TestBenchGrants measures how long a workload waits for its path while others hold many, each by a connection of its own,
// and what that costs the agent. It prints Markdown, and writes it into the folder that BENCH_PUBLISH names.
func TestBenchGrants(t *testing.T) {
	leak.Check(t)
	b := newGrantBench(t)
	b.fill(t)
	b.measure(t)
	figures := b.markdown()
	t.Log("\n\n" + figures)
	if folder := os.Getenv("BENCH_PUBLISH"); folder != "" {
		must(t, os.WriteFile(filepath.Join(folder, "bench-grants.md"), []byte(figures), 0o644))
	}
}

// grantBench is a world with many paths, and what was measured in it.
type grantBench struct {
	w               *world
	paths, requests int
	rest            time.Duration

	before, after, touched int // what of the agent is in memory, in KiB: without paths, with them, and after the requests
	filled                 time.Duration
	idle                   time.Duration // CPU time in a second
	opens, closes, floor   []time.Duration
	written                uint64
}

func newGrantBench(t *testing.T) *grantBench {
	t.Helper()
	b := &grantBench{paths: benchShort, requests: benchShort, rest: time.Second}
	if v := os.Getenv("BENCH_PATHS"); v != "" {
		var err error
		b.paths, err = strconv.Atoi(v)
		must(t, err)
		b.requests, b.rest = benchRequests, benchRest
	}
	b.w = newWorld(t, options{plain: true, resource: automationPolicy("host-echo"), identities: []spiffeid.ID{nightly},
		config: "  automation: {listen: [\"[::]:9470\"], requestsPerMinute: 1000000, pathsPerIdentity: 65536}\n"})
	for _, d := range []*daemon{b.w.agent, b.w.guard} {
		d.start(t)
	}
	return b
}

// fill has all paths opened but one.
func (b *grantBench) fill(t *testing.T) {
	t.Helper()
	b.before = residentKiB(t, b.w.agent.proc.Pid())
	began := time.Now()
	b.w.holdPaths(t, b.paths-1)
	b.filled = time.Since(began)
	b.standing(t)
	b.after = residentKiB(t, b.w.agent.proc.Pid())
}

func (b *grantBench) standing(t *testing.T) {
	t.Helper()
	if n := b.w.openPaths(t); n != b.paths-1 {
		t.Fatalf("%d paths are open beside the one that is measured, want %d", n, b.paths-1)
	}
}

// measure asks for the last path, and gives it back, again and again.
func (b *grantBench) measure(t *testing.T) {
	t.Helper()
	agent := b.w.agent.proc.Pid()
	one := b.w.member(t, b.paths-1)
	idle := cpuTime(t, agent)
	time.Sleep(b.rest)
	b.idle = (cpuTime(t, agent) - idle) / time.Duration(b.rest/time.Second)
	written := storeWrites(t, b.w.files.run)
	for range b.requests {
		start := time.Now()
		stream, err := one.open(t.Context())
		must(t, err)
		b.opens = append(b.opens, time.Since(start))
		start = time.Now()
		must(t, one.close(stream))
		b.closes = append(b.closes, time.Since(start))
	}
	b.written = storeWrites(t, b.w.files.run) - written
	b.touched = residentKiB(t, agent)
	b.standing(t)
	b.floor = syncFloor(t, b.w.files.state, b.requests)
}

func (b *grantBench) markdown() string {
	var load [3]string
	text, _ := os.ReadFile("/proc/loadavg")
	copy(load[:], strings.Fields(string(text)))
	return fmt.Sprintf(`# Figures of grants for automation

Taken by `+"`make bench-grants`"+` on a machine with %d cores (%s), Linux %s, load %s; %d paths active with the one that is asked for, each held by a workload over a connection of its own, with mTLS. Those that only hold are a process of their own at the lowest priority, for they stand for other machines; who asks shares the cores with the agent, and with them.

| what | p50 | p99 | most |
| --- | --- | --- | --- |
| request to open path, on a connection that is there | %s |
| giving it back to closed path | %s |
| for comparison: one write with its fsync on the disk of stateDir | %s |

| what | figure |
| --- | --- |
| aimed at for a request, p99 | %s: %s |
| aimed at for the agent's resident memory, with 10,000 paths | %d MiB: %s |
| durable transactions for a request and its end, all that the agent wrote meanwhile | %.2f |
| the agent's CPU time in a second in which nobody asks, signs of life of all holders included | %s |
| opening the %d paths, handshakes included, 32 at a time | %s |
| the agent's resident memory before them | %.0f MiB |
| the agent's resident memory with them | %.0f MiB, %.1f KiB for each |
| the agent's resident memory after the requests | %.0f MiB |
`, runtime.NumCPU(), processor(), kernelRelease(), strings.Join(load[:], " "), b.paths, row(b.opens), row(b.closes), row(b.floor),
		benchAim, verdictOn(quantile(b.opens, 99) <= benchAim), benchMemoryAim>>10, memoryVerdict(b.paths, b.before, b.after), float64(b.written)/float64(b.requests), b.idle.Round(time.Millisecond), b.paths, b.filled.Round(time.Millisecond),
		float64(b.before)/1024, float64(b.after)/1024, float64(b.after-b.before)/float64(b.paths), float64(b.touched)/1024)
}

// processor is the name of the machine's first one.
func processor() string {
	text, _ := os.ReadFile("/proc/cpuinfo") // without it nothing is known
	for line := range strings.Lines(string(text)) {
		if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown processor"
}

func kernelRelease() string {
	text, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return strings.TrimSpace(string(text))
}

// memoryVerdict says where the memory is when there is too much of it.
func memoryVerdict(paths, before, after int) string {
	if paths < 10000 {
		return fmt.Sprintf("not judged, with %d paths", paths)
	}
	if after <= benchMemoryAim {
		return verdictOn(true)
	}
	return fmt.Sprintf("missed: %d MiB are there without paths, and each path is held over a connection of its own, with its TLS and gRPC state", before>>10)
}

// residentKiB is what of a process is in memory.
func residentKiB(t *testing.T, pid int) int {
	t.Helper()
	return memoryKiB(t, pid, "VmRSS:")
}

// memoryKiB is a line of a process's status.
func memoryKiB(t *testing.T, pid int, name string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			must(t, err)
			return n
		}
	}
	t.Fatalf("no %s", name)
	return 0
}

// cpuTime is what a process has used of the CPUs.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')'):])) // from the third on
	var ticks int
	for _, f := range fields[12:14] {
		n, err := strconv.Atoi(f)
		must(t, err)
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100 // USER_HZ
}

// storeWrites is how many transactions the agent's store has made, as its witness knows.
func storeWrites(t *testing.T, run string) uint64 {
	t.Helper()
	const offset = 128
	page, err := os.ReadFile(filepath.Join(run, "store.witness"))
	must(t, err)
	return binary.NativeEndian.Uint64(page[offset:])
}

// syncFloor times what no durable record can do without.
func syncFloor(t *testing.T, dir string, n int) (took []time.Duration) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "floor"))
	must(t, err)
	defer os.Remove(f.Name())
	defer f.Close()
	for range n {
		start := time.Now()
		_, err := f.Write(make([]byte, 4096))
		must(t, err)
		must(t, f.Sync())
		took = append(took, time.Since(start))
	}
	return took
}

func verdictOn(met bool) string {
	if met {
		return "met"
	}
	return "missed"
}

func quantile(all []time.Duration, percent int) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)*percent/100, len(sorted)-1)]
}

func row(all []time.Duration) string {
	return fmt.Sprintf("%s | %s | %s", quantile(all, 50).Round(10*time.Microsecond), quantile(all, 99).Round(10*time.Microsecond), quantile(all, 100).Round(10*time.Microsecond))
}
