package collector

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

func TestFilters(t *testing.T) { onEngines(t, testFilters) }

func testFilters(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows,
		flowEntry(1, nil),
		flowEntry(2, func(f *api.FlowRecord) { f.Verdict, f.Reason, f.Event = "DENIED", "NO_TLS", "DENY" }),
		flowEntry(3, func(f *api.FlowRecord) { f.Service = "redis" }),
		flowEntry(4, func(f *api.FlowRecord) { f.Identity = "spiffe://example.org/app/web" }),
		flowEntry(5, func(f *api.FlowRecord) { f.Verdict, f.Grant = "BYPASSED", "01G" }),
		flowEntry(6, func(f *api.FlowRecord) { f.Client = "[fd00:1::2]:99" }),
		flowEntry(7, func(f *api.FlowRecord) { f.Client = "" }),
		flowEntry(8, func(f *api.FlowRecord) { f.Event, f.Verdict, f.Reason = "WATCHED", "DENIED", "BAD_FLAGS" }),
	)
	other, _ := r.connect(t, "node-2", epoch1)
	other.store(flows, flowEntry(1, func(f *api.FlowRecord) { f.FlowId = "other" }))
	second := func(n int64) *timestamppb.Timestamp { return timestamppb.New(time.Unix(1700000000+n, 0)) }
	for name, c := range map[string]struct {
		query *api.FlowQuery
		want  []uint64
	}{
		"everything":    {&api.FlowQuery{}, []uint64{1, 2, 3, 4, 5, 6, 7, 8, 1}},
		"node":          {&api.FlowQuery{Node: "node-2"}, []uint64{1}},
		"verdict":       {&api.FlowQuery{Verdict: "denied"}, []uint64{2}},
		"watched":       {&api.FlowQuery{Event: "watched", Verdict: "denied"}, []uint64{8}},
		"all watched":   {&api.FlowQuery{Event: "watched"}, []uint64{8}},
		"reason":        {&api.FlowQuery{Reason: "NO_TLS"}, []uint64{2}},
		"event":         {&api.FlowQuery{Event: "DENY"}, []uint64{2}},
		"service":       {&api.FlowQuery{Service: "redis"}, []uint64{3}},
		"identity":      {&api.FlowQuery{Identity: "spiffe://example.org/app/web"}, []uint64{4}},
		"grant":         {&api.FlowQuery{Grant: "01G"}, []uint64{5}},
		"client":        {&api.FlowQuery{Client: "fd00:1:0::2"}, []uint64{6}},
		"mapped client": {&api.FlowQuery{Client: "::ffff:10.1.0.2", Service: "redis"}, []uint64{3}},
		"since":         {&api.FlowQuery{Since: second(6)}, []uint64{6, 7, 8}},
		"until":         {&api.FlowQuery{Until: second(3), Node: "node-1"}, []uint64{1, 2}},
		"since, until":  {&api.FlowQuery{Since: second(3), Until: second(5)}, []uint64{3, 4}},
		"newest":        {&api.FlowQuery{Limit: 3}, []uint64{7, 8, 1}},
		"newest of":     {&api.FlowQuery{Limit: 2, Node: "node-1", Verdict: "PROXIED"}, []uint64{6, 7}},
		"nothing":       {&api.FlowQuery{Service: "' OR 1=1 --"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got := seqs(r.flows(t, c.query)); !reflect.DeepEqual(got, c.want) {
				t.Errorf("have %v, want %v", got, c.want)
			}
		})
	}
	for name, q := range map[string]*api.FlowQuery{
		"client with port": {Client: "10.1.0.2:4000"},
		"since":            {Since: &timestamppb.Timestamp{Nanos: -1}},
	} {
		stream, err := r.reader(t).Flows(t.Context(), q)
		if _, err = drain(stream, err); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// More rows than a page holds, over several days, in order.
func TestPages(t *testing.T) { onEngines(t, testPages) }

func testPages(t *testing.T, i ids) {
	at := &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	r := start(t, i, func(c *Config) { c.Now = at.now })
	n, _ := r.connect(t, "node-1", epoch1)
	const perDay = pageRows + 100
	for day := range uint64(3) {
		n.store(flows, flowEntries(day*perDay+1, (day+1)*perDay)...)
		at.set(at.now().Add(24 * time.Hour))
	}
	got := r.flows(t, &api.FlowQuery{Limit: 3*perDay - 50})
	if len(got) != 3*perDay-50 {
		t.Fatalf("%d records", len(got))
	}
	for i, f := range got {
		if f.GetSeq() != uint64(i+51) {
			t.Fatalf("record %d has number %d", i, f.GetSeq())
		}
	}
}

// One who follows sees each record once, in order, also when the day changes under way.
func TestFollow(t *testing.T) { onEngines(t, testFollow) }

func testFollow(t *testing.T, i ids) {
	at := &clock{t: time.Date(2026, 3, 1, 23, 0, 0, 0, time.UTC)}
	r := start(t, i, func(c *Config) { c.Now = at.now })
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 10)...)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	all := must(r.reader(t).Flows(ctx, &api.FlowQuery{Follow: true, Limit: 4}))(t)
	some := must(r.reader(t).Flows(ctx, &api.FlowQuery{Follow: true, Service: "redis"}))(t)
	// The followers are known to be there when they have shown something of before.
	if first := must(all.Recv())(t); first.GetSeq() != 7 {
		t.Fatalf("first is %d, want 7", first.GetSeq())
	}
	var storing sync.WaitGroup
	storing.Go(func() {
		for seq := uint64(11); seq <= 200; seq++ {
			at.set(at.now().Add(15 * time.Minute))
			n.store(flows, flowEntry(seq, func(f *api.FlowRecord) {
				if seq%50 == 0 {
					f.Service = "redis"
				}
			}))
		}
	})
	for want := uint64(8); want <= 200; want++ {
		if f := must(all.Recv())(t); f.GetSeq() != want {
			t.Fatalf("have %d, want %d", f.GetSeq(), want)
		}
	}
	for want := uint64(50); want <= 200; want += 50 {
		if f := must(some.Recv())(t); f.GetSeq() != want {
			t.Fatalf("have %d of redis, want %d", f.GetSeq(), want)
		}
	}
	storing.Wait() // a follower may see a record before the node hears that it is stored
	r.stop()
	if _, err := all.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("after the stop: %v", err)
	}
}

// One who follows an empty collector sees the first record.
func TestFollowFromNothing(t *testing.T) { onEngines(t, testFollowFromNothing) }

func testFollowFromNothing(t *testing.T, i ids) {
	r := start(t, i, nil)
	stream := must(r.reader(t).GrantEvents(t.Context(), &api.GrantQuery{Follow: true}))(t)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(critical, grantEntry(1, "g", "ACTIVATED"))
	if e := must(stream.Recv())(t); e.GetSeq() != 1 || e.GetEvent().GetStep() != "ACTIVATED" {
		t.Errorf("have %v", e)
	}
}

func TestRetain(t *testing.T) { onEngines(t, testRetain) }

func testRetain(t *testing.T, i ids) {
	at := &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	r := start(t, i, func(c *Config) { c.Now, c.Boot, c.Retain = at.now, at.boot, 48*time.Hour })
	n, _ := r.connect(t, "node-1", epoch1)
	for seq := uint64(1); seq <= 10; seq++ {
		n.store(flows, flowEntry(seq, nil))
		at.pass(24 * time.Hour)
	}
	if got := seqs(r.flows(t, &api.FlowQuery{})); !reflect.DeepEqual(got, []uint64{8, 9, 10}) {
		t.Errorf("have %v", got)
	}
	if days := r.dayNames(t); !reflect.DeepEqual(days, []string{"2026-03-08", "2026-03-09", "2026-03-10"}) {
		t.Errorf("days are %v", days)
	}
	if files := must(filepath.Glob(filepath.Join(r.cfg.Dir, "2026-*")))(t); len(files) > 3*3 {
		t.Errorf("files are %v", files)
	}
	if _, w := r.connect(t, "node-1", epoch1); w.GetFlowSeq() != 10 { // the marks outlive their day
		t.Errorf("welcome: %v", w)
	}
}

const childEnv = "SALLYPORT_COLLECTOR_TEST_SOCKET"

func TestMain(m *testing.M) {
	if dir := os.Getenv(killEnv); dir != "" {
		fmt.Fprintln(os.Stderr, work(dir, os.Getenv(killAtEnv)))
		os.Exit(1)
	}
	if path := os.Getenv(childEnv); path != "" {
		n, err := readLocal(path)
		fmt.Println(n, status.Code(err))
		os.Exit(0)
	}
	code := m.Run()
	stopShared()
	os.Exit(code)
}

func readLocal(path string) (int, error) {
	conn, err := dialUnix(path)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	stream, err := api.NewAuditClient(conn).Flows(context.Background(), &api.FlowQuery{})
	got, err := drain(stream, err)
	return len(got), err
}

// The local socket serves those whom the kernel knows by their uid, and takes no records from anybody.
func TestLocalSocket(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to be another user")
	}
	dir := must(os.MkdirTemp("/tmp", "sallyport-test-"))(t) // others must be able to reach it
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "reader")
	if err := os.WriteFile(exe, must(os.ReadFile(os.Args[0]))(t), 0o755); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "collector.sock")
	r := start(t, newIDs(t), func(c *Config) { c.Socket, c.SocketUIDs = socket, []uint32{0, 4711} })
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 3)...)
	for uid, want := range map[uint32]string{0: "3 OK\n", 4711: "3 OK\n", 4712: "0 Unavailable\n"} {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), childEnv+"="+socket)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		if out, err := cmd.Output(); err != nil || string(out) != want {
			t.Errorf("uid %d: %q, %v; want %q", uid, out, err, want)
		}
	}
	conn := must(dialUnix(socket))(t)
	defer conn.Close()
	if got := tryWrite(t, api.NewAuditIngestClient(conn)); got != codes.Unimplemented {
		t.Errorf("write on the local socket: %s", got)
	}
}
