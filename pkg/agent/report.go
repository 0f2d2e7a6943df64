package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
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
	sink *sink
	lost func(cause string, n uint64)
	log  *slog.Logger

	mu   sync.Mutex
	open int        // guarded by mu; streams
	seen []reporter // guarded by mu; latest last
}

// reporter is one process of the proxy.
type reporter struct {
	instance string
	seq      uint64 // records up to it were taken
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

// take hands over the records that are new, and gives the last sequence that is the agent's now.
func (r *reports) take(instance string, records *api.ProxyRecords) (seq uint64, err error) {
	if records == nil || len(records.Records) > maxBatch {
		return 0, fmt.Errorf("want a frame of at most %d records", maxBatch)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	from := r.reporter(instance)
	for _, wire := range records.Records {
		if wire.GetSeq() <= from.seq {
			continue
		}
		from.seq = wire.GetSeq()
		rec, err := audit.FlowFromAPI(wire)
		if err != nil {
			r.log.Warn("record of the proxy refused", "error", err)
			r.lost(audit.CauseUnreadable, 1)
			continue
		}
		r.sink.take(sourceProxy, fromProxy(rec))
	}
	if records.Lost > 0 {
		r.lost(audit.CauseBufferFull, records.Lost)
	}
	return from.seq, nil
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
