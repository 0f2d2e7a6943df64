package proxy

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// log keeps records.
type log struct {
	mu      sync.Mutex
	records []flow.Record
}

func (l *log) add(r flow.Record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records = append(l.records, r)
}

func (l *log) counts() (counts []uint64) {
	for _, r := range l.records {
		counts = append(counts, r.Count)
	}
	return counts
}

func denied(client string, reason flow.Reason) flow.Record {
	return flow.Record{
		Event: flow.EventDeny, Verdict: flow.VerdictDenied, Reason: reason, Count: 1,
		Client: netip.MustParseAddrPort(client), Server: netip.MustParseAddrPort("10.2.0.2:5432"),
	}
}

func TestDenialsAreJoined(t *testing.T) {
	var l log
	d := newDenials(l.add)
	for port := range 5 { // equal but for the port
		d.add(denied(fmt.Sprintf("10.1.0.2:%d", 40000+port), flow.ReasonNoTLS))
	}
	d.add(denied("10.1.0.2:1", flow.ReasonNotAuthorised)) // another reason
	d.add(denied("10.1.0.3:1", flow.ReasonNoTLS))         // another client
	if got := fmt.Sprint(l.counts()); got != "[1 1 1]" {
		t.Fatalf("at once: %s", got)
	}
	d.flush()
	if got := fmt.Sprint(l.counts()); got != "[1 1 1 4]" {
		t.Fatalf("after the window: %s", got)
	}
	if last := l.records[3]; last.Client.Port() != 40004 {
		t.Errorf("joined record is not the latest: %s", last.Client)
	}
	d.flush() // quiet for a window: forgotten
	d.add(denied("10.1.0.2:1", flow.ReasonNoTLS))
	if got := fmt.Sprint(l.counts()); got != "[1 1 1 4 1]" {
		t.Errorf("after a quiet window: %s", got)
	}
}

func TestDenialsLoseNoneWhenThereAreTooManyKinds(t *testing.T) {
	var l log
	d := newDenials(l.add)
	const kinds = maxDenials + 100
	for round := range 3 {
		for i := range kinds {
			d.add(denied(fmt.Sprintf("10.%d.%d.%d:%d", i>>16, i>>8&255, i&255, 1000+round), flow.ReasonNoTLS))
		}
	}
	d.flush()
	var sum uint64
	for _, n := range l.counts() {
		sum += n
	}
	if sum != 3*kinds {
		t.Errorf("%d denials are told, want %d", sum, 3*kinds)
	}
	if len(d.seen) > maxDenials {
		t.Errorf("%d kinds held", len(d.seen))
	}
}
