package proxy

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

const (
	denialWindow = 5 * time.Second
	maxDenials   = 4096 // kinds that are told apart at a time; beyond it each denial is a record
)

// denials turns equal denials into one record: the first is reported at once, those that follow
// within a window as one record with their count. A flood does not push other records out.
type denials struct {
	report func(flow.Record)

	mu   sync.Mutex
	seen map[denial]*flow.Record // guarded by mu; the latest, Count not yet reported
}

// denial is what makes two denials equal: all but time, client port and wording.
type denial struct {
	client   netip.Addr
	server   netip.AddrPort
	service  string
	identity string
	reason   flow.Reason
}

func newDenials(report func(flow.Record)) *denials {
	return &denials{report: report, seen: map[denial]*flow.Record{}}
}

func (d *denials) add(r flow.Record) {
	key := denial{r.Client.Addr(), r.Server, r.Service, r.Identity, r.Reason}
	d.mu.Lock()
	defer d.mu.Unlock()
	held := d.seen[key]
	if held != nil {
		r.Count += held.Count
		*held = r
		return
	}
	d.report(r)
	if len(d.seen) < maxDenials {
		d.seen[key] = &flow.Record{}
	}
}

// run flushes at the end of each window and when ctx ends.
func (d *denials) run(ctx context.Context) {
	window := time.NewTicker(denialWindow)
	defer window.Stop()
	defer d.flush()
	for {
		select {
		case <-window.C:
			d.flush()
		case <-ctx.Done():
			return
		}
	}
}

// flush reports what was counted, and forgets kinds that were not seen since the last flush.
func (d *denials) flush() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, held := range d.seen {
		if held.Count == 0 {
			delete(d.seen, key)
			continue
		}
		d.report(*held)
		*held = flow.Record{}
	}
}
