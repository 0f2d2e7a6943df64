package e2e_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/identity"
	"github.com/sallyport-dev/sallyport/test/lab"
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
	paths, requests, rest := benchShort, benchShort, time.Second
	if v := os.Getenv("BENCH_PATHS"); v != "" {
		var err error
		paths, err = strconv.Atoi(v)
		must(t, err)
		requests, rest = benchRequests, benchRest
	}
	w := newWorld(t, options{plain: true, resource: automationPolicy("host-echo"), identities: []spiffeid.ID{nightly},
		config: "  automation: {listen: [\"[::]:9470\"], requestsPerMinute: 1000000, pathsPerIdentity: 65536}\n"})
	for _, d := range []*daemon{w.agent, w.guard} {
		d.start(t)
	}
	b := newCrowd(t, w)
	before := residentKiB(t, w.agent.proc.Pid())
	began := time.Now()
	var crowd errgroup.Group
	crowd.SetLimit(32)
	for i := range paths - 1 { // the last one is asked for, and given back, again and again
		crowd.Go(func() error {
			h, err := b.member(t.Context(), i)
			if err != nil {
				return fmt.Errorf("path %d: %w", i, err)
			}
			_, err = h.open(t.Context())
			return err
		})
	}
	must(t, crowd.Wait())
	filled := time.Since(began)
	standing := func() {
		if n := w.openPaths(t); n != paths-1 {
			t.Fatalf("%d paths are open beside the one that is measured, want %d", n, paths-1)
		}
	}
	standing()
	after := residentKiB(t, w.agent.proc.Pid())

	one, err := b.member(t.Context(), paths-1)
	must(t, err)
	var opens, closes []time.Duration
	idle := cpuTime(t, w.agent.proc.Pid())
	time.Sleep(rest)
	idle = (cpuTime(t, w.agent.proc.Pid()) - idle) / time.Duration(rest/time.Second)
	written := storeWrites(t, w.files.run)
	for range requests {
		start := time.Now()
		stream, err := one.open(t.Context())
		must(t, err)
		opens = append(opens, time.Since(start))
		start = time.Now()
		must(t, one.close(stream))
		closes = append(closes, time.Since(start))
	}
	written = storeWrites(t, w.files.run) - written
	standing()
	floor := syncFloor(t, w.files.state, requests)
	var load [3]string
	text, _ := os.ReadFile("/proc/loadavg")
	copy(load[:], strings.Fields(string(text)))
	figures := fmt.Sprintf(`# Figures of grants for automation

Taken by `+"`make bench-grants`"+` on a machine with %d cores (%s), Linux %s, load %s; %d paths active with the one that is asked for, each held by a workload of its own over mTLS.

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
`, runtime.NumCPU(), processor(), kernelRelease(), strings.Join(load[:], " "), paths, row(opens), row(closes), row(floor),
		benchAim, verdictOn(quantile(opens, 99) <= benchAim), benchMemoryAim>>10, memoryVerdict(paths, before, after), float64(written)/float64(requests), idle.Round(time.Millisecond), paths, filled.Round(time.Millisecond),
		float64(before)/1024, float64(after)/1024, float64(after-before)/float64(paths))
	t.Log("\n\n" + figures)
	if folder := os.Getenv("BENCH_PUBLISH"); folder != "" {
		must(t, os.WriteFile(filepath.Join(folder, "bench-grants.md"), []byte(figures), 0o644))
	}
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

// crowd is many workloads with addresses of their own, behind the client.
type crowd struct {
	w      *world
	source *identity.Source
}

func newCrowd(t *testing.T, w *world) *crowd {
	t.Helper()
	_, behind, _ := net.ParseCIDR("10.64.0.0/12")
	lo, err := w.Client.Netlink.LinkByName("lo")
	must(t, err)
	must(t, w.Client.Netlink.LinkSetUp(lo))
	must(t, w.Client.Netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: behind, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: unix.RT_SCOPE_HOST}))
	must(t, w.Node.Netlink.RouteAdd(&netlink.Route{Dst: behind, Gw: w.Client.Addr(lab.IPv4).AsSlice()}))
	c := &crowd{w: w}
	c.source, err = identity.New(identity.Config{Address: "unix://" + w.socket(nightly), MinRetry: 10 * time.Millisecond})
	must(t, err)
	background(t, c.source.Run)
	must(t, c.source.Wait(within(t, patience)))
	return c
}

// benchMember is one workload with its connection.
type benchMember struct{ rpc api.AutomationClient }

// member connects the i-th, with its handshake.
func (c *crowd) member(ctx context.Context, i int) (*benchMember, error) {
	local := netip.AddrFrom4([4]byte{10, byte(64 + i>>16), byte(i >> 8), byte(i)})
	to := netip.AddrPortFrom(c.w.Node.Addr(lab.IPv4), 9470)
	agent := spiffeid.RequireFromPath(domain, "/sallyport/agent/"+nodeName)
	conn, err := grpc.NewClient("passthrough:///"+to.String(),
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(c.source, c.source, tlsconfig.AuthorizeID(agent)))),
		grpc.WithReadBufferSize(1<<10), grpc.WithWriteBufferSize(1<<10),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return c.w.Client.Dial(ctx, netip.AddrPortFrom(local, 0), to)
		}))
	if err != nil {
		return nil, err
	}
	conn.Connect()
	context.AfterFunc(ctx, func() { conn.Close() })
	for state := conn.GetState(); state.String() != "READY"; state = conn.GetState() {
		if !conn.WaitForStateChange(ctx, state) {
			return nil, ctx.Err()
		}
	}
	return &benchMember{api.NewAutomationClient(conn)}, nil
}

func (m *benchMember) open(ctx context.Context) (api.Automation_HoldClient, error) {
	stream, err := m.rpc.Hold(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&api.HoldRequest{Want: &api.HoldRequest_Path{Path: &api.PathRequest{Service: "host-echo",
		Duration: durationpb.New(10 * time.Minute), Reason: "measured"}}})
	if err != nil {
		return nil, err
	}
	_, err = stream.Recv()
	return stream, err
}

func (m *benchMember) close(stream api.Automation_HoldClient) error {
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := stream.Recv(); err == nil {
		return fmt.Errorf("another word after the path was given back")
	}
	return nil
}

// residentKiB is what of a process is in memory.
func residentKiB(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			must(t, err)
			return n
		}
	}
	t.Fatal("no VmRSS")
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
