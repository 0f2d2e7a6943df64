package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// agent is a ProxyReport server that keeps what it got, and can break streams.
type agent struct {
	api.UnimplementedProxyReportServer
	mu         sync.Mutex
	seqs       []uint64          // guarded by mu; records as they came, repetitions left out
	repeated   int               // guarded by mu
	lost       uint64            // guarded by mu
	hellos     []*api.ProxyHello // guarded by mu
	seen       uint64            // guarded by mu; the last number accounted for
	breakAfter int               // guarded by mu; frames until a stream ends unacknowledged; 0: never
	deaf       bool              // guarded by mu; that frame is not taken either
}

func (a *agent) Report(stream api.ProxyReport_ReportServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.hellos = append(a.hellos, first.GetHello())
	a.mu.Unlock()
	for frames := 1; ; frames++ {
		frame, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		ack, broken := a.take(frame.GetRecords(), frames)
		if broken {
			return status.Error(codes.Unavailable, "test breaks the stream")
		}
		if err := stream.Send(&api.ProxyAck{Seq: ack}); err != nil {
			return err
		}
	}
}

func (a *agent) take(r *api.ProxyRecords, frames int) (ack uint64, broken bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	broken = a.breakAfter > 0 && frames >= a.breakAfter
	if broken && a.deaf {
		return 0, true
	}
	fresh := r.GetLast() - max(a.seen, r.GetLast()-r.GetLost()-uint64(len(r.GetRecords())))
	for _, rec := range r.GetRecords() {
		if rec.Seq <= a.seen {
			a.repeated++
			continue
		}
		fresh--
		a.seqs = append(a.seqs, rec.Seq)
	}
	a.lost += fresh
	a.seen = r.GetLast()
	return a.seen, broken
}

func (a *agent) look(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// start serves the agent until the test ends or stop is called.
func (a *agent) start(t *testing.T, socket string) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	api.RegisterProxyReportServer(s, a)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	stop = sync.OnceFunc(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func newReporter(t *testing.T, hold int) (r *Reporter, socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "proxy.sock")
	return NewReporter(ReporterConfig{Socket: socket, Version: "test", Hold: hold}), socket
}

func runReporter(t *testing.T, r *Reporter) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func flush(t *testing.T, r *Reporter) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

func upTo(n uint64) (all []uint64) {
	for i := uint64(1); i <= n; i++ {
		all = append(all, i)
	}
	return all
}

func TestReporterDelivers(t *testing.T) {
	r, socket := newReporter(t, 0)
	var a agent
	a.start(t, socket)
	runReporter(t, r)
	for range 3000 {
		r.Report(flow.Record{})
	}
	flush(t, r)
	a.look(func() {
		if !slices.Equal(a.seqs, upTo(3000)) || a.lost != 0 || a.repeated != 0 {
			t.Errorf("%d records, %d lost, %d repeated", len(a.seqs), a.lost, a.repeated)
		}
		if h := a.hellos[0]; h.Instance == "" || h.Version != "test" || h.Started == nil {
			t.Errorf("hello %v", h)
		}
	})
}

func TestReporterOutlivesTheAgent(t *testing.T) {
	r, socket := newReporter(t, 0)
	runReporter(t, r)
	for range 100 {
		r.Report(flow.Record{})
	}
	var first, second agent
	stop := first.start(t, socket)
	flush(t, r)
	stop()
	for range 100 {
		r.Report(flow.Record{})
	}
	second.start(t, socket)
	flush(t, r)
	if !slices.Equal(first.seqs, upTo(100)) || len(second.seqs) != 100 || second.seqs[0] != 101 {
		t.Errorf("first agent got %d records, second %d", len(first.seqs), len(second.seqs))
	}
	if first.hellos[0].Instance != second.hellos[0].Instance {
		t.Error("one process, two instances")
	}
}

// A frame that arrived but was not acknowledged comes again, with the same numbers.
func TestReporterRepeatsWhatWasNotAcknowledged(t *testing.T) {
	r, socket := newReporter(t, 0)
	a := agent{breakAfter: 2}
	for range 2000 {
		r.Report(flow.Record{})
	}
	a.start(t, socket)
	runReporter(t, r)
	deadline := time.Now().Add(10 * time.Second)
	for repeated := 0; repeated == 0; a.look(func() { repeated = a.repeated }) {
		if time.Now().After(deadline) {
			t.Fatal("nothing was repeated")
		}
		time.Sleep(5 * time.Millisecond)
	}
	a.look(func() { a.breakAfter = 0 })
	flush(t, r)
	a.look(func() {
		if !slices.Equal(a.seqs, upTo(2000)) || len(a.hellos) < 2 {
			t.Errorf("%d records over %d streams", len(a.seqs), len(a.hellos))
		}
	})
}

// A loss that the agent was told of in vain is told again.
func TestReporterRepeatsLosses(t *testing.T) {
	r, socket := newReporter(t, 100)
	a := agent{breakAfter: 2, deaf: true} // the second frame tells of the losses at the end
	for range 250 {
		r.Report(flow.Record{})
	}
	a.start(t, socket)
	runReporter(t, r)
	flush(t, r)
	a.look(func() {
		if !slices.Equal(a.seqs, upTo(100)) || a.lost != 150 || len(a.hellos) != 2 {
			t.Errorf("%d records and %d losses over %d streams, want 100 and 150 over 2", len(a.seqs), a.lost, len(a.hellos))
		}
	})
}

// produced = delivered + counted lost, to the unit, also when the latest are the lost ones.
func TestReporterCountsLosses(t *testing.T) {
	cases := map[string]struct{ before, hold, after int }{
		"lost in between":   {before: 1000, hold: 100, after: 50},
		"lost at the end":   {before: 1000, hold: 100, after: 0},
		"nothing lost":      {before: 100, hold: 100, after: 5},
		"one record's room": {before: 10, hold: 1, after: 1},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			r, socket := newReporter(t, c.hold)
			for range c.before {
				r.Report(flow.Record{})
			}
			var a agent
			a.start(t, socket)
			runReporter(t, r)
			flush(t, r)
			for range c.after {
				r.Report(flow.Record{})
				flush(t, r)
			}
			deadline := time.Now().Add(10 * time.Second)
			for {
				var total uint64
				a.look(func() { total = uint64(len(a.seqs)) + a.lost })
				if total == uint64(c.before+c.after) {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%d of %d accounted for", total, c.before+c.after)
				}
				time.Sleep(5 * time.Millisecond)
			}
			if want := uint64(max(c.before-c.hold, 0)); r.Lost() != want || a.lost != want {
				t.Errorf("reporter lost %d, agent was told %d, want %d", r.Lost(), a.lost, want)
			}
		})
	}
}
