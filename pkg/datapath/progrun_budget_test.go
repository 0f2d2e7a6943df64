package datapath_test

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

// budgeted puts an active path with a budget into slot 0. The volume of the limits is in packets of the case.
func budgeted(change func(v *bpf.Path, bytes uint64)) given {
	return func(t testing.TB, r *rig, s scene, p *probe) {
		path(datapath.PathActive, func(_ *bpf.PathKey, _ *bpf.PathRef, v *bpf.Path) { change(v, p.bytes) })(t, r, s, p)
	}
}

// leased gives every CPU a lease of the path in slot 0.
func leased(epoch uint32, bytes, packets uint64) given {
	return func(t testing.TB, r *rig, _ scene, _ *probe) {
		leases := make([]bpf.Budget, ebpf.MustPossibleCPU())
		for i := range leases {
			leases[i] = bpf.Budget{Epoch: epoch, BytesLeft: bytes, PacketsLeft: packets}
		}
		check(t, r.m.SpBudget.Put(uint32(0), leases))
	}
}

// budgetCases: what a budget covers passes, and what it does not ends the path.
func budgetCases() []progCase {
	spentState := []string{"flow 0/0 ended=PATH_SPENT CUT_SERVER", "stray down", "path SPENT"}
	spent := cuts(flow.ReasonPathSpent, towards(packet.RST|ack), spentState...).recorded("END PATH_SPENT 0/0")
	live := pass(flow.ReasonPathLive, "flow 1/0")
	bytes := func(limit, taken uint64) given { // in bytes more than the packet's
		return budgeted(func(v *bpf.Path, n uint64) { v.BytesLimit, v.BytesTaken = limit*n, taken*n })
	}
	exact := budgeted(func(v *bpf.Path, n uint64) { v.BytesLimit, v.BytesTaken = 1000+n, 1000 })
	short := budgeted(func(v *bpf.Path, n uint64) { v.BytesLimit, v.BytesTaken = 1000+n-1, 1000 })
	beyond := budgeted(func(v *bpf.Path, n uint64) { v.BytesLimit, v.BytesTaken = 1000, 2000 })
	packets := func(limit, taken uint64) given {
		return budgeted(func(v *bpf.Path, _ uint64) { v.PacketsLimit, v.PacketsTaken = limit, taken })
	}
	both := budgeted(func(v *bpf.Path, n uint64) { v.BytesLimit, v.PacketsLimit, v.PacketsTaken = 1<<40, 5, 5 })
	toProxy := func(r flow.Reason, more ...string) want { return steer(r, append(more, "leg down", "origin")...) }
	connections := func(limit, taken uint64) given {
		return budgeted(func(v *bpf.Path, _ uint64) { v.ConnectionsLimit, v.ConnectionsTaken = limit, taken })
	}
	rate := func(limit, in uint32, ago time.Duration) given {
		return budgeted(func(v *bpf.Path, _ uint64) {
			v.RateLimit, v.InSecond, v.SecondNs = limit, in, uint64(datapath.BootTime()-ago)
		})
	}
	of := func(name string, send func(scene) probe, w want, g ...given) progCase {
		return progCase{name: "budget/" + name, packet: send, given: g, want: w}
	}
	opened := pass(flow.ReasonPathOpen, "flow 1/0").recorded("OPEN PATH_OPEN 1/0")
	return []progCase{
		of("plenty of bytes", towards(ack), live, bytes(1<<20, 0), bypassed()),
		of("last byte", towards(ack), live, exact, bypassed()),
		of("one byte short", towards(ack), spent, short, bypassed()),
		of("none left", towards(ack), spent, bytes(1, 1), bypassed()),
		of("more taken than there is", towards(ack), spent, beyond, bypassed()),
		of("lease covers it", towards(ack), live, bytes(1, 1), leased(1, 10000, 0), bypassed()),
		of("lease of another path", towards(ack), spent, bytes(1, 1), leased(2, 10000, 0), bypassed()),
		of("the answer counts too", from(ack), cuts(flow.ReasonPathSpent, from(packet.RST|ack),
			"flow 0/0 ended=PATH_SPENT CUT_CLIENT", "stray up", "path SPENT").recorded("END PATH_SPENT 0/0"), short, bypassed()),
		of("last packet", towards(ack), live, packets(5, 4), bypassed()),
		of("no packet left", towards(ack), spent, packets(5, 5), bypassed()),
		of("bytes but no packets", towards(ack), spent, both, bypassed()),
		of("three packets in one, three left", segmented(towards(ack), 3), pass(flow.ReasonPathLive, "flow 3/0"), packets(5, 2), bypassed()),
		of("three packets in one, two left", segmented(towards(ack), 3), spent, packets(5, 3), bypassed()),
		of("syn, one byte short", towards(syn), toProxy(flow.ReasonPathSpent, "path SPENT"), short),
		of("syn, last byte", towards(syn), opened, exact),
		of("last connection", towards(syn), opened, connections(3, 2)),
		of("no connection left", towards(syn), toProxy(flow.ReasonPathConnections), connections(3, 3)),
		of("no connection left, live flow", towards(ack), live, connections(3, 3), bypassed()),
		of("last connection of the second", towards(syn), opened, rate(3, 2, 0)),
		of("no connection left in the second", towards(syn), toProxy(flow.ReasonPathRate), rate(3, 3, 0)),
		of("the next second", towards(syn), opened, rate(3, 3, time.Second)),
	}
}

func TestBudget(t *testing.T) {
	r := newRig(t, 0, 0)
	runCases(t, r, budgetCases())
}

// TestConnectionGivenBack: a connection that finds the table of flows full takes nothing from the budget.
func TestConnectionGivenBack(t *testing.T) {
	r := newRig(t, small, small)
	for _, f := range lab.Families() {
		r.reset(t)
		s := r.scenes(t, f)["host"]
		p := towards(syn)(s)
		fullFlows(t, r, s, &p)
		budgeted(func(v *bpf.Path, _ uint64) {
			v.ConnectionsLimit, v.ConnectionsTaken, v.BytesLimit, v.PacketsLimit = 3, 2, 1000, 10
		})(t, r, s, &p)
		r.send(t, p)
		var v bpf.Path
		check(t, r.m.SpPaths.Lookup(uint32(0), &v))
		var leases []bpf.Budget
		check(t, r.m.SpBudget.Lookup(uint32(0), &leases))
		for _, l := range leases {
			v.BytesTaken, v.PacketsTaken = v.BytesTaken-l.BytesLeft, v.PacketsTaken-l.PacketsLeft
		}
		if v.ConnectionsTaken != 2 || v.InSecond != 0 || v.BytesTaken != 0 || v.PacketsTaken != 0 {
			t.Errorf("%v: %d connections, %d in the second, %d bytes, %d packets are gone, want 2, 0, 0, 0", f, v.ConnectionsTaken,
				v.InSecond, v.BytesTaken, v.PacketsTaken)
		}
	}
}
