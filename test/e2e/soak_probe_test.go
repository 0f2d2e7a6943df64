package e2e_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/packet"
)

const (
	latePort = 8082 // of late-echo, in pods that come and go
	latePods = 4    // how many numbers they have
	// rawPorts are those of raw probes, beyond the ones that sockets are given. There are few, so that the
	// table of legs is never full: a full one drops, and proves nothing.
	firstRawPort, rawPorts = 61000, 2000
	// connectEvery is how many probes there are for one that is a whole connect.
	connectEvery = 8
	// secretEvery is how many connects there are for one with an identity.
	secretEvery = 40
	// connecting bounds the connects under way: a dead proxy lets each wait its whole time.
	connecting = 400
	proberTick = 2 * time.Millisecond
)

// origin sends raw probes from one namespace.
type origin struct {
	*lab.Injector
	from packet.Packet // its MACs
	ns   *lab.Namespace
	next atomic.Uint32
}

// newOrigin sends by the device eth0 to whom the peer device of the node belongs.
func (w *world) newOrigin(ns *lab.Namespace, peer string) (*origin, error) {
	o := &origin{ns: ns}
	var err error
	if o.from.SrcMAC, err = ns.MAC("eth0"); err != nil {
		return nil, err
	}
	if o.from.DstMAC, err = w.Node.MAC(peer); err != nil {
		return nil, err
	}
	o.Injector, err = ns.Injector("eth0")
	return o, err
}

// probe sends one SYN; every tenth is a packet in mid-stream instead.
func (o *origin) probe(src netip.Addr, to netip.AddrPort) error {
	n := o.next.Add(1)
	p := o.from
	p.Src, p.Dst = netip.AddrPortFrom(src, uint16(firstRawPort+n%rawPorts)), to
	p.Flags, p.Seq, p.Window = packet.SYN, n<<12, 64240
	if n%10 == 0 {
		p.Flags, p.Ack, p.Payload = packet.ACK|packet.PSH, n, []byte("who answers?\n")
	}
	return o.Send(p.Bytes())
}

// prober asks services without an identity, at a constant rate, from all sides.
type prober struct {
	*world
	judge   *leakJudge
	rate    float64
	origins []*origin
	ways    []way

	raw, connects atomic.Int64
	busy          chan struct{}

	mu      sync.Mutex // guards the rest
	late    []netip.AddrPort
	answers map[answerer]int
	secured map[answerer]int
	failed  error // of sending
}

func (w *world) newProber(judge *leakJudge, rate float64) (*prober, error) {
	p := &prober{world: w, judge: judge, rate: rate, answers: map[answerer]int{}, secured: map[answerer]int{}, busy: make(chan struct{}, connecting)}
	for ns, peer := range map[*lab.Namespace]string{w.Client: lab.Uplink, w.Pods[1]: lab.PodDevice(1)} {
		o, err := w.newOrigin(ns, peer)
		if err != nil {
			return nil, err
		}
		p.origins = append(p.origins, o)
	}
	for _, service := range services() {
		for _, f := range lab.Families() {
			p.ways = append(p.ways, w.ways(service, f)...)
		}
	}
	return p, nil
}

func (p *prober) close() error {
	var errs []error
	for _, o := range p.origins {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

func (p *prober) total() int { return int(p.raw.Load() + p.connects.Load()) }

// run probes until there were so many more, or ctx ends. It returns when every probe has its answer.
func (p *prober) run(ctx context.Context, probes int, dice *rand.Rand) {
	var wg sync.WaitGroup
	defer wg.Wait()
	began, before := time.Now(), p.total()
	tick := time.NewTicker(proberTick)
	defer tick.Stop()
	for ctx.Err() == nil && p.total()-before < probes {
		// By the clock and not by ticks: a ticker drops those that come too late. The probes of started pods count, too.
		for due := min(int(time.Since(began).Seconds()*p.rate), probes); p.total()-before < due && ctx.Err() == nil; {
			p.one(ctx, &wg, dice)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// one makes one probe: a connect if it is its turn and not too many are under way, a raw one else.
func (p *prober) one(ctx context.Context, wg *sync.WaitGroup, dice *rand.Rand) {
	if dice.IntN(connectEvery) == 0 {
		select {
		case p.busy <- struct{}{}:
			ways := p.allWays()
			way, secured := ways[dice.IntN(len(ways))], dice.IntN(secretEvery) == 0
			p.connects.Add(1)
			wg.Go(func() { defer func() { <-p.busy }(); p.connect(way, secured) })
			return
		default:
		}
	}
	o := p.origins[dice.IntN(len(p.origins))]
	to := p.targets(dice)
	p.send(o, o.ns.Addr(familyOf(to)), to)
}

func (p *prober) send(o *origin, src netip.Addr, to netip.AddrPort) {
	// No room in the queue of the device is no failure, and no probe.
	if err := o.probe(src, to); err != nil && !errors.Is(err, unix.ENOBUFS) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.failed = err
		return
	}
	p.raw.Add(1)
}

// targets picks one of the services as they are now.
func (p *prober) targets(dice *rand.Rand) netip.AddrPort {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := dice.IntN(4 + len(p.late))
	f := lab.Families()[n%2]
	switch {
	case n < 2:
		return netip.AddrPortFrom(p.Node.Addr(f), hostPort)
	case n < 4:
		return netip.AddrPortFrom(p.Pod.Addr(f), podPort)
	}
	return p.late[n-4]
}

// allWays are those of the lasting services, and the client's to pods that were just started.
func (p *prober) allWays() []way {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.ways[:len(p.ways):len(p.ways)]
	for _, to := range p.late {
		all = append(all, way{name: "remote", client: p.Client, from: p.Client.Addr(familyOf(to)), to: to, service: "late-echo"})
	}
	return all
}

func (p *prober) connect(w way, secured bool) {
	ctx, cancel := context.WithTimeout(context.Background(), attemptTime)
	defer cancel()
	if secured {
		p.count(p.secured, w.identified(ctx, p.world, web))
		return
	}
	o := w.plain(ctx)
	p.count(p.answers, o)
	if o.who == direct || o.who == proxied || o.who == stranger && o.err == nil {
		p.judge.leak(leaked{Time: time.Now(), Witness: "client " + w.client.Name, Src: o.own, Dst: w.to})
	}
}

func (p *prober) count(in map[answerer]int, o outcome) {
	p.mu.Lock()
	defer p.mu.Unlock()
	in[o.who]++
}

func (p *prober) addLate(to []netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.late = append(p.late, to...)
}

func (p *prober) dropLate(to []netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.late = slicesWithout(p.late, to)
}

func slicesWithout(all, gone []netip.AddrPort) []netip.AddrPort {
	var left []netip.AddrPort
	for _, a := range all {
		keep := true
		for _, g := range gone {
			keep = keep && a != g
		}
		if keep {
			left = append(left, a)
		}
	}
	return left
}

func familyOf(a netip.AddrPort) lab.Family {
	if a.Addr().Is4() {
		return lab.IPv4
	}
	return lab.IPv6
}
