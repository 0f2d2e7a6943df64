package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Bounds of what the proxy may send.
const (
	maxBatch     = 4096 // records in one frame
	keptReporter = 16   // processes of the proxy whose last sequence is remembered
	maxInstance  = 64   // bytes in the name of a process
)

// reports takes the proxy's flow records, on a socket of its own. It outlives the proxy's processes and streams.
type reports struct {
	api.UnimplementedProxyReportServer
	sink  *sink
	lost  func(cause string, n uint64)
	mark  func(flow.Record) (flow.Record, bool)                                              // nil: no canary is out
	relay *relay                                                                             // nil: it relays nothing
	live  func(service string, client netip.AddrPort, port uint16) (grant string, err error) // nil: nobody knows

	originations *originations // nil: nothing is signed
	states       *proxyStates  // nil: nobody wants to know
	log          *slog.Logger

	mu   sync.Mutex
	open int        // guarded by mu; streams
	seen []reporter // guarded by mu; latest last
}

// reporter is one process of the proxy.
type reporter struct {
	instance string
	seq      uint64 // what numbers up to it stand for was taken
}

// Report takes records until the proxy ends the stream, and acknowledges each frame. A record that comes again, on a new
// stream of the same process, is not taken twice.
func (r *reports) Report(stream api.ProxyReport_ReportServer) error {
	frame, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := frame.GetHello()
	if hello == nil || hello.Instance == "" || len(hello.Instance) > maxInstance {
		return status.Error(codes.InvalidArgument, "first frame: want a hello with an instance")
	}
	r.began(hello)
	defer r.left(hello)
	for {
		frame, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		seq, err := r.take(hello.Instance, frame.GetRecords())
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		if err := stream.Send(&api.ProxyAck{Seq: seq}); err != nil {
			return err
		}
	}
}

// connected tells whether a proxy reports now.
func (r *reports) connected() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.open > 0
}

func (r *reports) began(hello *api.ProxyHello) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open++
	r.log.Info("proxy reports", "instance", plain(hello.Instance), "version", plain(hello.Version))
}

func (r *reports) left(hello *api.ProxyHello) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open--
	r.log.Info("proxy stopped reporting", "instance", plain(hello.Instance))
}

// take hands over the records that are new and counts those that the proxy lost, and gives the last number that is the
// agent's now. A frame that comes again, because its acknowledgement was lost, brings neither a second time.
func (r *reports) take(instance string, f *api.ProxyRecords) (seq uint64, err error) {
	if err := checkFrame(f); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	from := r.reporter(instance)
	// An agent that is new begins where the frame does: what came before is another agent's.
	missing := f.Last - min(max(from.seq, f.Last-f.Lost-uint64(len(f.Records))), f.Last)
	for _, wire := range f.Records {
		if wire.GetSeq() <= from.seq {
			continue
		}
		missing--
		rec, err := audit.FlowFromAPI(wire)
		if err != nil {
			r.log.Warn("record of the proxy refused", "error", err)
			r.lost(audit.CauseUnreadable, 1)
			continue
		}
		rec = fromProxy(rec)
		r.originations.ended(rec)
		source := sourceProxy
		if r.mark != nil {
			if marked, ours := r.mark(rec); ours {
				source, rec = sourceCanary, marked
			}
		}
		r.sink.take(source, rec)
	}
	if missing > 0 {
		r.lost(audit.CauseBufferFull, missing)
	}
	from.seq = max(from.seq, f.Last)
	return from.seq, nil
}

// checkFrame holds that every number of the frame stands for one record or one loss.
func checkFrame(f *api.ProxyRecords) error {
	if f == nil || len(f.Records) > maxBatch {
		return fmt.Errorf("want a frame of at most %d records", maxBatch)
	}
	n := uint64(len(f.Records))
	if f.Lost > f.Last || n > f.Last-f.Lost {
		return fmt.Errorf("frame has %d records and %d losses up to number %d", n, f.Lost, f.Last)
	}
	before := f.Last - f.Lost - n
	for _, rec := range f.Records {
		if rec.GetSeq() <= before || rec.GetSeq() > f.Last {
			return fmt.Errorf("record %d is out of order in a frame up to %d", rec.GetSeq(), f.Last)
		}
		before = rec.GetSeq()
	}
	return nil
}

// reporter finds the process, and forgets the oldest one for a new one. r.mu is held.
func (r *reports) reporter(instance string) *reporter {
	i := slices.IndexFunc(r.seen, func(p reporter) bool { return p.instance == instance })
	if i < 0 {
		if len(r.seen) == keptReporter {
			r.seen = slices.Delete(r.seen, 0, 1)
		}
		r.seen = append(r.seen, reporter{instance: instance})
		i = len(r.seen) - 1
	}
	return &r.seen[i]
}
