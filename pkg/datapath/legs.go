package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
)

// legLingers are how long legs stay after their last packet.
type legLingers struct {
	closed  time.Duration // the proxy's last ACKs and its TIME_WAIT answers
	opening time.Duration // from the SYN on, without a handshake
}

// While a table is more than half full, what carries no data makes room: a flood must send more than this lets go of to keep
// others out. A client whose SYN-ACK takes that long sends its SYN again.
var (
	calmLegs   = legLingers{closed: 10 * time.Second, opening: 30 * time.Second}
	hastedLegs = legLingers{closed: time.Second, opening: 3 * time.Second}
)

const (
	goneLegLinger  = time.Second      // late packets of a connection that the proxy has no more
	resetLegLinger = 40 * time.Second // where nobody can tell that: two keepalives of the proxy, which undo a forged RST
	idleLegLinger  = 15 * time.Minute // the proxy keeps live legs busy with keepalives every 15 s
)

// sweepLegs removes the legs that are over.
func (d *Datapath) sweepLegs() error {
	keys, legs, err := entries[bpf.LegKey, bpf.Leg](d.objs.SpLegs)
	if err != nil {
		return err
	}
	lingers := calmLegs
	if uint32(len(keys)) > d.objs.SpLegs.MaxEntries()/2 {
		lingers = hastedLegs
	}
	proxy := proxySockets{file: d.cfg.PxNetns}
	defer proxy.close()
	for i := range keys {
		over := lingers.over(&legs[i]) || isReset(&legs[i]) && proxy.hasNot(&keys[i])
		if !over {
			continue
		}
		if _, _, err := take(d.objs.SpLegs, &keys[i], func(l *bpf.Leg) bool { return l.OpenedNs == legs[i].OpenedNs && l.LastNs == legs[i].LastNs }); err != nil {
			return fmt.Errorf("take leg: %w", err)
		}
	}
	return nil
}

// over tells it by the leg alone.
func (g legLingers) over(l *bpf.Leg) bool {
	const fins = uint32(bpf.SallyportSpFlagsSP_FIN_CLIENT | bpf.SallyportSpFlagsSP_FIN_SERVER)
	idle := legIdle(l)
	reset := l.Flags&uint32(bpf.SallyportSpFlagsSP_RST) != 0
	answered := l.Flags&uint32(bpf.SallyportSpFlagsSP_ANSWERED) != 0
	switch {
	case l.Flags&fins == fins, reset && !answered:
		return idle > g.closed
	case reset:
		return idle > resetLegLinger
	case !answered:
		return BootTime()-time.Duration(l.OpenedNs) > g.opening // a SYN-ACK sent again does not count
	}
	return idle > idleLegLinger
}

// isReset tells whether a RST has said for long enough that it is over. Anybody who knows the tuple can send one.
func isReset(l *bpf.Leg) bool {
	return l.Flags&uint32(bpf.SallyportSpFlagsSP_RST) != 0 && legIdle(l) > goneLegLinger
}

func legIdle(l *bpf.Leg) time.Duration { return BootTime() - time.Duration(l.LastNs) }

// proxySockets asks px which connections the proxy has. It is opened with the first question.
type proxySockets struct {
	file  string
	asked bool
	in    *sockets // nil where px cannot be reached
}

func (p *proxySockets) close() {
	if p.in != nil {
		p.in.Close()
	}
}

// hasNot tells whether the proxy has no connection of this leg, for certain: one that only knocks is none yet.
func (p *proxySockets) hasNot(k *bpf.LegKey) bool {
	if !p.asked {
		p.asked = true
		p.in = socketsOf(p.file)
	}
	client, server := netip.AddrPortFrom(fromAddr(k.Client), k.ClientPort), netip.AddrPortFrom(fromAddr(k.Server), k.ServerPort)
	if p.in == nil || client.Addr().IsLinkLocalUnicast() || server.Addr().IsLinkLocalUnicast() { // these are of a device, too
		return false
	}
	local, remote := server, client
	if k.Side == bpf.SallyportSpLegSideSP_LEG_UP {
		local, remote = client, server
	}
	found, err := p.in.ask(nl.SOCK_DIAG_BY_FAMILY, 0, diagOf(local, remote, 0))
	switch {
	case errors.Is(err, unix.ENOENT):
		return true
	case err != nil:
		return false
	}
	return found.State == tcpListen || found.State == tcpTimeWait || found.State == tcpSynReceived
}

// socketsOf opens the sockets of a namespace that is kept by a file; nil where there is none.
func socketsOf(file string) *sockets {
	ns, err := netns.GetFromPath(file)
	if err != nil {
		return nil
	}
	defer ns.Close()
	s, err := openSockets(ns)
	if err != nil {
		return nil
	}
	return s
}
