package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// reporting is the proxy's socket with what stands behind it.
type reporting struct {
	t      *testing.T
	sink   *sink
	lost   map[string]uint64
	client api.ProxyReportClient
	server *reports
}

func newReporting(t *testing.T, changes ...func(*sink)) *reporting {
	t.Helper()
	dir := t.TempDir()
	s, err := store.Open(filepath.Join(dir, "node.db"))
	must(t, err)
	streamer, err := audit.New(audit.Config{Store: s, Node: testNode})
	must(t, err)
	r := &reporting{t: t, lost: make(map[string]uint64),
		sink: &sink{audit: streamer, recent: newRecent(64), counts: newFlowCounter()}}
	for _, change := range changes {
		change(r.sink)
	}
	r.server = &reports{sink: r.sink, log: slog.New(slog.DiscardHandler), lost: func(cause string, n uint64) { r.lost[cause] += n }}
	ep, err := newEndpoint(filepath.Join(dir, "proxy.sock"), callers{uids: []uint32{0}},
		func(reg grpc.ServiceRegistrar) { api.RegisterProxyReportServer(reg, r.server) })
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ep.Run(ctx) }()
	conn, err := grpc.NewClient("unix:"+ep.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	r.client = api.NewProxyReportClient(conn)
	t.Cleanup(func() {
		must(t, conn.Close())
		cancel()
		must(t, <-done)
		must(t, s.Close())
	})
	return r
}

func (r *reporting) stream(instance string) grpc.BidiStreamingClient[api.ProxyFrame, api.ProxyAck] {
	r.t.Helper()
	stream, err := r.client.Report(r.t.Context())
	must(r.t, err)
	must(r.t, stream.Send(&api.ProxyFrame{Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{Instance: instance}}}))
	return stream
}

func records(lost uint64, list ...*api.FlowRecord) *api.ProxyFrame {
	last := lost
	if len(list) > 0 {
		last = list[len(list)-1].GetSeq()
	}
	return frameUpTo(last, lost, list...)
}

// frameUpTo accounts for numbers up to last, of which so many were lost.
func frameUpTo(last, lost uint64, list ...*api.FlowRecord) *api.ProxyFrame {
	return &api.ProxyFrame{Frame: &api.ProxyFrame_Records{Records: &api.ProxyRecords{Records: list, Lost: lost, Last: last}}}
}

func proxied(seq uint64) *api.FlowRecord {
	return audit.FlowToAPI(flow.Record{Event: flow.EventOpen, CPU: -1, Seq: seq, Verdict: flow.VerdictProxied, Reason: flow.ReasonIdentity,
		Protocol: "tcp", Client: netip.MustParseAddrPort("10.1.0.2:4000"), Server: netip.MustParseAddrPort("10.2.0.2:5432"),
		Service: "postgres", Identity: "spiffe://example.org/app", Count: 1})
}

func TestReportTakesEachRecordOnce(t *testing.T) {
	r := newReporting(t)
	for _, c := range []struct {
		instance string
		frame    *api.ProxyFrame
		ack      uint64
		want     []uint64 // everything taken so far
	}{
		{"a", records(0, proxied(1), proxied(2)), 2, []uint64{1, 2}},
		{"a", records(0, proxied(1), proxied(2), proxied(3)), 3, []uint64{1, 2, 3}}, // the ack was lost
		{"b", records(0, proxied(1)), 1, []uint64{1, 2, 3, 1}},                      // another process
		{"a", records(0, proxied(4)), 4, []uint64{1, 2, 3, 1, 4}},
	} {
		stream := r.stream(c.instance)
		must(t, stream.Send(c.frame))
		ack, err := stream.Recv()
		must(t, err)
		if got := seqs(r.sink.recent.last(0)); ack.Seq != c.ack || !slices.Equal(got, c.want) {
			t.Errorf("ack %d, taken %v; want %d, %v", ack.Seq, got, c.ack, c.want)
		}
		must(t, stream.CloseSend())
	}
}

// A loss is counted once, like a record: also when the frame that tells of it comes again, alone or with more, and by an
// agent that took over.
func TestReportCountsEachLossOnce(t *testing.T) {
	r := newReporting(t)
	for _, c := range []struct {
		name     string
		instance string
		frame    *api.ProxyFrame
		lost     uint64 // so far
	}{
		{"in between", "a", frameUpTo(5, 3, proxied(1), proxied(5)), 3},
		{"in between, again", "a", frameUpTo(5, 3, proxied(1), proxied(5)), 3},
		{"at the end", "a", frameUpTo(9, 4), 7},
		{"at the end, again", "a", frameUpTo(9, 4), 7},
		{"at the end, again and more", "a", frameUpTo(12, 6, proxied(11)), 9},
		{"first of this agent", "b", frameUpTo(108, 2, proxied(107)), 11},
	} {
		stream := r.stream(c.instance)
		must(t, stream.Send(c.frame))
		ack, err := stream.Recv()
		must(t, err)
		if want := c.frame.GetRecords().GetLast(); ack.Seq != want || r.lost[audit.CauseBufferFull] != c.lost {
			t.Errorf("%s: ack %d, lost %d; want %d, %d", c.name, ack.Seq, r.lost[audit.CauseBufferFull], want, c.lost)
		}
		must(t, stream.CloseSend())
	}
}

func TestReportOfATakenOverProxy(t *testing.T) {
	r := newReporting(t)
	stream := r.stream("a")
	liar := proxied(1)
	liar.Verdict, liar.Reason, liar.Grant, liar.Slot, liar.Cpu = "BYPASSED", "PATH_OPEN", "01J", 3, 0
	nonsense := proxied(2)
	nonsense.Verdict = "WHATEVER"
	must(t, stream.Send(records(7, liar, nonsense, proxied(10))))
	ack, err := stream.Recv()
	must(t, err)
	got := r.sink.recent.last(0)
	if ack.Seq != 10 || len(got) != 2 || got[0].Verdict != flow.VerdictDenied || got[0].Grant != "" || got[0].CPU != -1 {
		t.Errorf("ack %d, taken %+v", ack.Seq, got)
	}
	if r.lost[audit.CauseBufferFull] != 7 || r.lost[audit.CauseUnreadable] != 1 {
		t.Errorf("counted lost: %v", r.lost)
	}
}

func TestReportRefusesWhatIsNoReport(t *testing.T) {
	r := newReporting(t)
	for name, frames := range map[string][]*api.ProxyFrame{
		"no hello":       {records(0, proxied(1))},
		"no instance":    {{Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{}}}},
		"long instance":  {{Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{Instance: strings.Repeat("x", 100)}}}},
		"hello again":    {{Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{Instance: "a"}}}, {Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{Instance: "a"}}}},
		"too many":       {{Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{Instance: "a"}}}, records(0, make([]*api.FlowRecord, maxBatch+1)...)},
		"a number twice": {{Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{Instance: "a"}}}, frameUpTo(2, 0, proxied(2), proxied(2))},
		"beyond its end": {{Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{Instance: "a"}}}, frameUpTo(2, 1, proxied(3))},
		"more than none": {{Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{Instance: "a"}}}, frameUpTo(0, 1)},
		"an empty frame": {{Frame: &api.ProxyFrame_Hello{Hello: &api.ProxyHello{Instance: "a"}}}, {}},
	} {
		stream, err := r.client.Report(t.Context())
		must(t, err)
		for _, f := range frames {
			must(t, stream.Send(f))
		}
		if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := r.sink.recent.last(0); len(got) != 0 {
		t.Errorf("taken: %+v", got)
	}
}
