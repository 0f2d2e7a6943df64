package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sync/errgroup"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// ReadEvents hands over every record of both rings, in order within each ring, until ctx ends. f is
// called from two goroutines.
func (d *Datapath) ReadEvents(ctx context.Context, f EventFunc) error {
	g, ctx := errgroup.WithContext(ctx)
	for i, ring := range []*ebpf.Map{d.objs.SpMustDeliver, d.objs.SpBestEffort} {
		r, err := ringbuf.NewReader(ring)
		if err != nil {
			return fmt.Errorf("open ring: %w", err)
		}
		g.Go(func() error {
			<-ctx.Done()
			return r.Close()
		})
		g.Go(func() error { return d.readRing(i, r, f) })
	}
	return g.Wait()
}

// lookInterval is how soon a record is found that follows another closely: the programs wake the reader for
// the first of them only.
const lookInterval = 100 * time.Millisecond

func (d *Datapath) readRing(ring int, r *ringbuf.Reader, f EventFunc) error {
	var rec ringbuf.Record
	for {
		r.SetDeadline(time.Now().Add(lookInterval))
		since := BootTime()
		if err := r.ReadInto(&rec); errors.Is(err, ringbuf.ErrClosed) {
			return nil
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			d.received.upTo[ring].Store(int64(since)) // nothing came since
			continue
		} else if err != nil {
			return fmt.Errorf("read ring: %w", err)
		}
		e, err := decodeEvent(rec.RawSample)
		if err != nil {
			return err
		}
		d.received.read(ring, e)
		record := fromEvent(e)
		if record.Service == "" {
			record.Service = d.serviceAt(record.Server, Protocol(e.Protocol), true)
		}
		f(record)
	}
}

func (d *Datapath) fromDeny(k *bpf.DenyKey, count uint64) flow.Record {
	boot := BootTime()
	server := netip.AddrPortFrom(fromAddr(k.Server), k.ServerPort)
	protocol := Protocol(k.Protocol)
	return flow.Record{
		Event: flow.EventDeny, Time: wall(boot), Boot: boot, CPU: -1, Verdict: flow.VerdictDenied,
		Reason: flow.Reason(k.Reason), Protocol: protocol.String(), Client: netip.AddrPortFrom(fromAddr(k.Client), 0),
		Server: server, Service: d.serviceAt(server, protocol, true), Count: count,
	}
}

// fromSighting tells of what was seen of a service that is not enforced.
func (d *Datapath) fromSighting(k *bpf.DenyKey, count uint64) flow.Record {
	r := d.fromDeny(k, count)
	r.Event, r.Verdict = flow.EventWatched, wouldBe(r.Reason, Protocol(k.Protocol))
	r.Service = d.serviceAt(r.Server, Protocol(k.Protocol), false)
	return r
}

// wouldBe is sp_would_be in Go: what Enforce would have made of a packet, by the reason that it would have given.
func wouldBe(r flow.Reason, p Protocol) flow.Verdict {
	switch {
	case r == flow.ReasonNone:
		return flow.VerdictNone
	case r == flow.ReasonPathOpen:
		return flow.VerdictBypassed
	case r < flow.ReasonPathOpen && p == TCP:
		return flow.VerdictProxied
	}
	return flow.VerdictDenied
}

// Counters gives packets and bytes by reason. Unprotected packets are in none.
func (d *Datapath) Counters() (map[flow.Reason]Counter, error) {
	out := map[flow.Reason]Counter{}
	for _, reason := range flow.Reasons() {
		var perCPU []bpf.Counter
		if err := d.objs.SpCounters.Lookup(uint32(reason), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", reason, err)
		}
		var sum Counter
		for _, c := range perCPU {
			sum.Packets += c.Packets
			sum.Bytes += c.Bytes
		}
		if sum != (Counter{}) {
			out[reason] = sum
		}
	}
	return out, nil
}

// Losses counts the records that did not fit into their ring.
func (d *Datapath) Losses() (Losses, error) {
	m, err := d.Mark()
	return m.Losses(), err
}
