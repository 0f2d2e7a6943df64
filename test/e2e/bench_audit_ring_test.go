package e2e_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/client"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

const (
	// ringAhead is how many connections may be opened whose records are not acknowledged: the ring has room for them.
	ringAhead = 8192
	// steadyRate is how many connections a second are opened at a rate that is no effort. Each makes two records.
	steadyRate = 250
	// ringAim is how many records a second make 10 minutes enough for an hour of 500 a second, while those go on coming.
	ringAim = 3500
)

// ringFigures are of one node: from the kernel's ring to the collector's disk.
type ringFigures struct {
	records          int
	took             time.Duration
	agent, collector time.Duration // CPU time
	refused          int           // connections that found no room
	stored, seen     []time.Duration
}

// measureRing opens bypassed connections, each of which is an OPEN and an END on the kernel's ring.
func (w *world) measureRing(t *testing.T, plan auditPlan, kept storage, records *client.Audit) ringFigures {
	t.Helper()
	for _, d := range []*daemon{w.agent, w.guard} {
		d.start(t)
	}
	k := w.newKnocker(t)
	defer k.Close()
	var f ringFigures
	w.steadily(t, k, plan, records, &f)
	w.flatOut(t, k, plan, kept, records, &f)
	if s := w.status(t); s.LostFlow != 0 {
		t.Errorf("%d records lost", s.LostFlow)
	}
	w.agent.stop(t)
	w.guard.stop(t)
	return f
}

// knocker opens connections to host-echo under a path with one packet each: the client's kernel knows nothing of them, and resets what
// the service answers.
type knocker struct {
	*origin
	src netip.Addr
	to  []netip.AddrPort
	n   int
}

func (w *world) newKnocker(t *testing.T) *knocker {
	t.Helper()
	o, err := w.newOrigin(w.Client, lab.Uplink)
	must(t, err)
	k := &knocker{origin: o, src: w.Client.Addr(lab.IPv4)}
	for _, port := range []uint16{hostPort, sinkPort} {
		k.to = append(k.to, netip.AddrPortFrom(w.Node.Addr(lab.IPv4), port))
	}
	_, err = w.Node.WhoAnswers(k.to[1])
	must(t, err)
	w.open(t, wanted{"host-echo", k.src, "10m"})
	return k
}

func (k *knocker) knock() error {
	const ports = 60000
	p := k.from
	p.Src, p.Dst = netip.AddrPortFrom(k.src, uint16(2000+k.n%ports)), k.to[k.n/ports%len(k.to)]
	p.Flags, p.Seq, p.Window = packet.SYN, uint32(k.n)<<12, 64240
	k.n++
	return k.Send(p.Bytes())
}

// atRate knocks n times.
func (k *knocker) atRate(n int) error {
	tick := time.NewTicker(time.Second / steadyRate)
	defer tick.Stop()
	for range n {
		<-tick.C
		if err := k.knock(); err != nil {
			return err
		}
	}
	return nil
}

// storedOf is how many numbers of the node's records the collector has.
func storedOf(t *testing.T, records *client.Audit) (n int) {
	t.Helper()
	reply, err := records.Nodes(t.Context())
	must(t, err)
	for _, s := range reply.GetNodes() {
		if s.GetNode() == nodeName {
			n += int(s.GetSeq())
		}
	}
	return n
}

// flatOut opens as many connections as the way of their records takes.
func (w *world) flatOut(t *testing.T, k *knocker, plan auditPlan, kept storage, records *client.Audit, f *ringFigures) {
	t.Helper()
	before, refused := storedOf(t, records), w.refusals(t)
	agent, collector := cpuTime(t, w.agent.proc.Pid()), kept.cpu(t)
	began := time.Now()
	end := began
	for sent, have := 0, 0; have < 2*(plan.knocks-f.refused); time.Sleep(time.Millisecond) { // how often it is looked
		for ; sent < plan.knocks && sent-f.refused-have/2 < ringAhead; sent++ {
			must(t, k.knock())
		}
		if now := storedOf(t, records) - before; now != have {
			have, end = now, time.Now()
		} else if time.Since(end) > time.Second { // some found no room
			f.refused = w.refusals(t) - refused
		}
		if f.records = have; time.Since(end) > patience {
			t.Fatalf("of %d connections, %d refused, %d records are stored: %v", sent, f.refused, have, w.counters(t))
		}
	}
	f.took = end.Sub(began)
	f.agent, f.collector = cpuTime(t, w.agent.proc.Pid())-agent, kept.cpu(t)-collector
}

// refusals are first packets that found no room, in the ring or among the flows.
func (w *world) refusals(t *testing.T) int {
	t.Helper()
	c := w.counters(t)
	return int(c["RING_FULL"] + c["FLOWS_FULL"])
}

// steadily opens connections at a modest rate, and looks on as somebody who follows the log does.
func (w *world) steadily(t *testing.T, k *knocker, plan auditPlan, records *client.Audit, f *ringFigures) {
	t.Helper()
	want := 2 * int(plan.steady.Seconds()*steadyRate)
	must(t, k.knock()) // what follows has something to begin with
	waitUntil(t, "the first record", func() bool { return storedOf(t, records) >= 2 })
	ctx, cancel := context.WithTimeout(t.Context(), plan.steady+patience)
	defer cancel()
	began := datapath.BootTime()
	knocked := make(chan error, 1)
	go func() { knocked <- k.atRate(want / 2) }()
	defer func() { must(t, <-knocked) }()
	for r, err := range records.Flows(ctx, &api.FlowQuery{Service: "host-echo", Verdict: "BYPASSED", Limit: 1, Follow: true}) {
		must(t, err)
		boot := r.GetFlow().GetBoot().AsDuration()
		if boot < began {
			continue
		}
		f.seen = append(f.seen, datapath.BootTime()-boot)
		f.stored = append(f.stored, r.GetReceived().AsTime().Sub(r.GetFlow().GetTime().AsTime()))
		if len(f.seen) == want {
			return
		}
	}
}

func (f ringFigures) rate() float64 { return float64(f.records) / f.took.Seconds() }

func (f ringFigures) markdown(b *strings.Builder) {
	fmt.Fprintf(b, `One node: bypassed connections, each with an opening and an end on the kernel's ring, the agent with its store, and the collector. One process opens them as fast as records are acknowledged.

| from the kernel's ring to the acknowledgement, one node | figure |
| --- | --- |
| records a second | %.0f (%s records in %s) |
| aimed at, so that an hour of 500 a second is delivered within 10 minutes while they go on coming | %d: %s |
| the agent's CPU time for a million records | %s |
| the collector's CPU time for a million records, that of its database included | %s |
| connections that found no room in the ring, and were not let by | %d |

| at %d records a second | p50 | p99 | most |
| --- | --- | --- | --- |
| from the kernel's time stamp to the transaction at the collector | %s |
| from the kernel's time stamp to whoever follows the log, after the fsync | %s |

`, f.rate(), thousands(f.records), f.took.Round(time.Millisecond), ringAim, verdictOn(f.rate() >= ringAim), perMillion(f.agent, f.records).Round(10*time.Millisecond),
		perMillion(f.collector, f.records).Round(10*time.Millisecond), f.refused, 2*steadyRate, row(f.stored), row(f.seen))
}
