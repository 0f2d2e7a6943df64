package agent

import (
	"fmt"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// look is what was found beside the kernel's counters of a path at one moment.
type look struct {
	tally datapath.Tally
	live  datapath.Carried // by flows that are not over
}

// sum is what these explain.
func (l look) sum() datapath.Carried {
	all := l.tally.Recorded
	all.Add(l.tally.Excused)
	all.Add(l.live)
	return all
}

// reckoning is one path, between a look before and one after its counters were read. These only rise, and so must the sums.
type reckoning struct {
	look
	path      datapath.PathStatus
	over      bool             // it has ended, and so have its flows
	parted    bool             // it has left its slot
	doubtful  bool             // what neither look explains may yet be
	apart     apart            // what neither look explains
	moving    uint64           // bytes that went between the looks
	inherited datapath.Carried // what was recorded before there were tallies
	cause     string
}

func reckon(p datapath.PathStatus, before, after look) *reckoning {
	r := &reckoning{look: after, path: p}
	r.over = !isOpen(p) && after.live.Flows == 0
	if after.tally.Inherited {
		r.inherit(before)
		return r
	}
	kernel, low, high := p.Carried(), before.sum(), after.sum()
	if kernel == low {
		r.look = before
		return r
	}
	r.apart = outside(kernel, low, high)
	if r.apart == (apart{}) && kernel != high {
		r.moving, r.cause = outside(kernel, high, high).bytes(), audit.TideMoving
	}
	return r
}

// inherit takes what the kernel counted, and live flows do not explain, for recorded by a version that kept no tally: once nothing
// moves between the looks.
func (r *reckoning) inherit(before look) {
	if before != r.look {
		r.cause = audit.TideMoving
		return
	}
	r.inherited = less(r.path.Carried(), r.sum())
	r.tally.Recorded.Add(r.inherited)
	r.tally.Inherited = false
}

func (r *reckoning) use() datapath.Use { return datapath.Use{Slot: r.path.Slot, Epoch: r.path.Epoch} }

// judge says why the sums differ, and how many of the records that are counted as lost it excuses.
func (r *reckoning) judge(allowed uint64) (excused uint64) {
	switch missing, whole := r.apart.missing(); {
	case r.apart == apart{} && r.cause == "" && r.tally.Excused != datapath.Carried{}:
		r.cause = audit.TideCountedLoss
	case r.apart == apart{}:
	case whole && missing.Flows > 0 && missing.Flows <= allowed:
		r.tally.Excused.Add(missing)
		r.apart, r.cause = apart{}, audit.TideCountedLoss
		return missing.Flows
	default:
		r.cause = audit.TideUnexplained
	}
	return 0
}

func (r *reckoning) tide() *api.PathTide {
	return &api.PathTide{Slot: r.path.Slot, Grant: r.path.Grant, Service: r.path.Service, Client: r.path.Client.String(), Ended: r.over,
		Kernel: volume(r.path.Carried()), Recorded: volume(r.tally.Recorded), Live: volume(r.live), Cause: r.cause}
}

func volume(c datapath.Carried) *api.Volume {
	return &api.Volume{Flows: c.Flows, BytesToServer: c.BytesToServer, BytesToClient: c.BytesToClient,
		PacketsToServer: c.PacketsToServer, PacketsToClient: c.PacketsToClient}
}

// String is for people.
func (r *reckoning) String() string {
	return fmt.Sprintf("path of %s to %s in slot %d, grant %s: the kernel counted %s than records and live flows say", r.path.Client,
		r.path.Service, r.path.Slot, r.path.Grant, r.apart)
}

// apart is by how much the kernel counted more than is explained, or less.
type apart struct{ flows, toServer, toClient, packetsToServer, packetsToClient int64 }

func (a apart) String() string {
	return fmt.Sprintf("%+d flows, %+d bytes and %+d packets to the server, %+d bytes and %+d packets to the client more", a.flows,
		a.toServer, a.packetsToServer, a.toClient, a.packetsToClient)
}

func (a apart) bytes() uint64 {
	return uint64(max(a.toServer, -a.toServer) + max(a.toClient, -a.toClient))
}

// missing is what records would have to tell; it is not the whole of it where they tell too much of anything.
func (a apart) missing() (c datapath.Carried, whole bool) {
	whole = min(a.flows, a.toServer, a.toClient, a.packetsToServer, a.packetsToClient) >= 0
	return datapath.Carried{Flows: uint64(a.flows), BytesToServer: uint64(a.toServer), BytesToClient: uint64(a.toClient),
		PacketsToServer: uint64(a.packetsToServer), PacketsToClient: uint64(a.packetsToClient)}, whole
}

// outside is by how much the kernel's counters are out of bounds.
func outside(kernel, low, high datapath.Carried) apart {
	by := func(k, l, h uint64) int64 {
		switch {
		case k > h:
			return int64(k - h)
		case k < l:
			return -int64(l - k)
		}
		return 0
	}
	return apart{by(kernel.Flows, low.Flows, high.Flows), by(kernel.BytesToServer, low.BytesToServer, high.BytesToServer),
		by(kernel.BytesToClient, low.BytesToClient, high.BytesToClient),
		by(kernel.PacketsToServer, low.PacketsToServer, high.PacketsToServer),
		by(kernel.PacketsToClient, low.PacketsToClient, high.PacketsToClient)}
}

// less is a without b, and nothing where b has more.
func less(a, b datapath.Carried) datapath.Carried {
	by := func(a, b uint64) uint64 { return a - min(a, b) }
	return datapath.Carried{Flows: by(a.Flows, b.Flows), BytesToServer: by(a.BytesToServer, b.BytesToServer),
		BytesToClient: by(a.BytesToClient, b.BytesToClient), PacketsToServer: by(a.PacketsToServer, b.PacketsToServer),
		PacketsToClient: by(a.PacketsToClient, b.PacketsToClient)}
}
