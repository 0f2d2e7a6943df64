package agent

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// transit is the longest that a packet may be on its way from a hook to a socket. One that has not arrived by then never
// will.
const transit = 5 * time.Second

// detector finds traffic that reached sockets of protected services without having passed a hook, though its tuple is
// that of a leg or of a live path: forged on a device that has no hooks.
//
// A hook counts a packet before a socket does, so at every moment: let through >= arrived. The difference is what is on
// its way and what was lost on it. What is on its way arrives or is lost within transit, so
//
//	lost >= let through until transit ago - arrived until now
//
// and what is lost arrives never. The detector takes that much off what was let through, for good: a quiet moment leaves
// no room in which something forged could hide behind losses. It compares measures that stay the same when packets are
// segmented or merged on the way (GSO, GRO): bytes of payload, packets without payload, and SYNs. What is sent again is
// counted again in both places.
type detector struct {
	balances map[balanceKey]*balance
}

// Kinds of traffic that hooks let through.
const (
	kindLeg  = "leg"
	kindPath = "path"
)

type balanceKey struct {
	service uint32
	kind    string
	measure string // of volume
}

// finding is what sockets of a service got too much.
type finding struct {
	service uint32
	kind    string
	more    excess
}

// excess is how much it was, in each measure.
type excess struct{ opens, packets, bytes uint64 }

func (e excess) String() string {
	return fmt.Sprintf("%d bytes, %d packets and %d SYNs", e.bytes, e.packets, e.opens)
}

func newDetector() detector { return detector{balances: make(map[balanceKey]*balance)} }

// look compares once. now is boot time, which never goes back; services that are gone are forgotten.
func (d detector) look(now time.Duration, traffic map[uint32]datapath.Traffic) []finding {
	var found []finding
	for service, t := range traffic {
		for kind, sides := range map[string][2]datapath.Volume{kindLeg: {t.HookLeg, t.SocketLeg}, kindPath: {t.HookPath, t.SocketPath}} {
			hook, socket := sides[0], sides[1]
			at := func(measure string, passed, arrived uint64) uint64 {
				return d.balance(balanceKey{service, kind, measure}).look(now, passed, arrived)
			}
			more := excess{at("opens", hook.Opens, socket.Opens), at("packets", hook.Packets, socket.Packets), at("bytes", hook.Bytes, socket.Bytes)}
			if more != (excess{}) {
				found = append(found, finding{service, kind, more})
			}
		}
	}
	for k := range d.balances {
		if _, ok := traffic[k.service]; !ok {
			delete(d.balances, k)
		}
	}
	slices.SortFunc(found, func(a, b finding) int { return cmp.Or(cmp.Compare(a.service, b.service), cmp.Compare(a.kind, b.kind)) })
	return found
}

func (d detector) balance(k balanceKey) *balance {
	b, ok := d.balances[k]
	if !ok {
		b = &balance{}
		d.balances[k] = b
	}
	return b
}

// balance is one measure of one kind of traffic of one service.
type balance struct {
	past  []passedAt // oldest first, as far back as transit and one more
	lost  uint64     // of what was let through, never to arrive
	known uint64     // that arrived too much, and was told
}

type passedAt struct {
	at     time.Duration
	passed uint64
}

// look gives what arrived too much since the last look.
func (b *balance) look(now time.Duration, passed, arrived uint64) (more uint64) {
	b.past = append(b.past, passedAt{now, passed})
	for len(b.past) > 1 && now-b.past[1].at >= transit {
		b.past = b.past[1:]
	}
	arrived -= min(b.known, arrived)
	if now-b.past[0].at >= transit && b.past[0].passed > arrived {
		b.lost = max(b.lost, b.past[0].passed-arrived)
	}
	if arrived+b.lost <= passed {
		return 0
	}
	more = arrived + b.lost - passed
	b.known += more
	return more
}
