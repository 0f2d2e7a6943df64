package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

const (
	chaosRounds = 20
	chaosRate   = 500             // connection attempts per second
	chaosTime   = 5 * time.Minute // a bound; it takes about one on two cores
	// attemptTime bounds one attempt: a dead proxy answers nothing.
	attemptTime = 400 * time.Millisecond
	// secureEvery is how many plain attempts there are for one with an identity.
	secureEvery = 20
	// firstClientPort begins the range of clients' ports. The proxy's is below (ip_local_port_range of px).
	firstClientPort = 40000
	lastClientPort  = 60999
)

// TestKillsUnderLoad kills agent, guard and proxy at random moments, again and again, while clients try both services in
// both families. No path is open, so nothing of a client may reach a service but through the proxy. Three witnesses that
// know nothing of Sallyport are asked: the clients, the services themselves, and packets: a tap in the pod and a counter
// behind the hooks of the node.
func TestKillsUnderLoad(t *testing.T) {
	leak.Check(t)
	w := startWorld(t, options{})
	watch := w.watchDirect(t)
	must(t, w.Client.Sysctl("ipv4/ip_local_port_range", fmt.Sprintf("%d %d", firstClientPort, lastClientPort)))
	ctx, cancel := context.WithTimeout(t.Context(), chaosTime)
	defer cancel()
	load := &load{world: w, targets: w.chaosTargets()}
	done := make(chan struct{})
	go func() { defer close(done); load.run(ctx) }()
	rounds := 0
	for ; rounds < chaosRounds && ctx.Err() == nil; rounds++ {
		must(t, w.killAll(ctx))
	}
	cancel()
	<-done
	load.report(t)
	if rounds < chaosRounds {
		t.Errorf("%d rounds in %v, want %d", rounds, chaosTime, chaosRounds)
	}
	watch.check(t)
	for _, target := range load.targets { // and after all that, everything is as it should be
		if o := target.identified(within(t, patience), w, web); o.who != proxied {
			t.Errorf("afterwards, %s: %s", target.to, o)
		}
		if o := target.plain(within(t, patience)); o.who != cut {
			t.Errorf("afterwards, %s: %s", target.to, o)
		}
	}
	if s := w.status(t); !s.Ready || len(s.Problems) > 0 {
		t.Errorf("afterwards: %+v", s)
	}
}

func (w *world) chaosTargets() (all []way) {
	for _, service := range services() {
		for _, f := range lab.Families() {
			all = append(all, w.ways(service, f)[0])
		}
	}
	return all
}

// killAll kills agent, guard and proxy, each at a random moment of its own, and starts them again as a service manager
// does. Sometimes it kills in the middle of the start. It returns when all are ready.
func (w *world) killAll(ctx context.Context) error {
	var group errgroup.Group
	for _, d := range []*daemon{w.agent, w.guard, w.proxy} {
		group.Go(func() error {
			kills := 1 + rand.IntN(2)
			for range kills {
				moment(ctx)
				if err := d.proc.Kill(); err != nil {
					return err
				}
				moment(ctx)
				if err := d.launch(); err != nil {
					return err
				}
			}
			return d.wait()
		})
	}
	return group.Wait()
}

// moment lets up to four tenths of a second pass: when it ends is what the test is about.
func moment(ctx context.Context) {
	select {
	case <-time.After(time.Duration(rand.Int64N(int64(400 * time.Millisecond)))):
	case <-ctx.Done():
	}
}

// load tries to connect, at a constant rate.
type load struct {
	*world
	targets []way

	mu      sync.Mutex
	answers map[answerer]int // guarded by mu
	secured map[answerer]int // guarded by mu; of attempts with an identity
	wrong   []outcome        // guarded by mu; answered in no way that may be
	took    time.Duration
}

func (l *load) run(ctx context.Context) {
	l.answers, l.secured = map[answerer]int{}, map[answerer]int{}
	began := time.Now()
	var wg sync.WaitGroup
	tick := time.NewTicker(time.Second / chaosRate)
	defer tick.Stop()
	for made := 0; ctx.Err() == nil; {
		// By the clock and not by ticks: a ticker drops those that come too late.
		for due := int(time.Since(began).Seconds() * chaosRate); made < due; made++ {
			number := made
			wg.Go(func() { l.attempt(number) })
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	l.took = time.Since(began)
	wg.Wait()
}

func (l *load) attempt(i int) {
	ctx, cancel := context.WithTimeout(context.Background(), attemptTime)
	defer cancel()
	target := l.targets[i%len(l.targets)]
	secured := i/len(l.targets)%secureEvery == 0
	var o outcome
	if secured {
		o = target.identified(ctx, l.world, web)
	} else {
		o = target.plain(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if secured {
		l.secured[o.who]++
	} else {
		l.answers[o.who]++
	}
	if o.who == direct || o.who == stranger || o.who == proxied && !secured {
		l.wrong = append(l.wrong, o)
	}
}

func (l *load) report(t *testing.T) {
	t.Helper()
	n := 0
	for _, m := range []map[answerer]int{l.answers, l.secured} {
		for _, count := range m {
			n += count
		}
	}
	t.Logf("%d attempts in %v; plain: %v; with an identity: %v", n, l.took.Round(time.Second), l.answers, l.secured)
	for _, o := range l.wrong {
		t.Errorf("answered by %s", o)
	}
	if rate := float64(n) / l.took.Seconds(); rate < chaosRate*0.9 {
		t.Errorf("%.0f attempts per second, want %d", rate, chaosRate)
	}
	if l.secured[proxied] == 0 || l.answers[cut] == 0 {
		t.Errorf("not what a load does: plain %v, with an identity %v", l.answers, l.secured)
	}
}

// directWatch counts what reaches a service from a client's own port.
type directWatch struct {
	*world
	pod    *lab.Tap
	client *lab.Tap
}

// fromClients are the packets behind the hooks, in the words of nft.
const fromClients = `table inet watch {
	counter direct { }
	counter byproxy { }
	chain in {
		type filter hook input priority 300;
		iifname != "lo" tcp dport %[1]d tcp sport %[2]d-%[3]d counter name direct
		iifname != "lo" tcp dport %[1]d tcp sport < %[2]d counter name byproxy
	}
}`

func (w *world) watchDirect(t *testing.T) *directWatch {
	t.Helper()
	rules := w.Dir + "/watch.nft"
	write(t, rules, fmt.Sprintf(fromClients, hostPort, firstClientPort, lastClientPort))
	_, err := w.Node.Run(within(t, patience), "nft", "-f", rules)
	must(t, err)
	d := &directWatch{world: w}
	d.pod, err = w.Pod.Tap(podPort)
	must(t, err)
	d.client, err = w.Client.Tap(podPort, hostPort)
	must(t, err)
	return d
}

func isClientPort(p uint16) bool { return p >= firstClientPort && p <= lastClientPort }

// check asks the witnesses. Each must also have seen what went through the proxy, or it saw nothing at all.
func (d *directWatch) check(t *testing.T) {
	t.Helper()
	byProxy, direct := d.counted(t, "watch", "byproxy"), d.counted(t, "watch", "direct")
	if direct > 0 || byProxy == 0 {
		t.Errorf("host service: %d packets came directly, %d by the proxy", direct, byProxy)
	}
	in, err := d.pod.Packets()
	must(t, err)
	fromProxy := 0
	for _, p := range in {
		switch {
		case p.Outgoing:
		case isClientPort(p.Src.Port()):
			t.Errorf("pod: %+v came directly", p)
		default:
			fromProxy++
		}
	}
	if fromProxy == 0 {
		t.Error("pod: the tap saw nothing")
	}
	words := 0
	seen, err := d.client.Packets()
	must(t, err)
	for _, p := range seen {
		if !p.Outgoing && strings.HasPrefix(string(p.Head), "service saw") {
			t.Errorf("client: %+v is the service's word in clear", p)
		}
		if p.Outgoing && strings.HasPrefix(string(p.Head), "who answers?") {
			words++
		}
	}
	if words == 0 {
		t.Error("client: the tap saw no question")
	}
	for _, tap := range []*lab.Tap{d.pod, d.client} {
		if lost, err := tap.Lost(); err != nil || lost > 0 {
			t.Errorf("a tap lost %d packets, %v", lost, err)
		}
	}
	for _, s := range d.echoes {
		if i := slices.IndexFunc(s.Peers(), func(p netip.AddrPort) bool { return isClientPort(p.Port()) }); i >= 0 {
			t.Errorf("service %s was reached by %s", s.Addr, s.Peers()[i])
		}
	}
}

// counted reads a named counter of nft in the node.
func (w *world) counted(t *testing.T, table, name string) (packets uint64) {
	t.Helper()
	out, err := w.Node.Run(within(t, patience), "nft", "--json", "list", "counter", "inet", table, name)
	must(t, err)
	var reply struct {
		Nftables []struct{ Counter struct{ Packets uint64 } }
	}
	must(t, json.Unmarshal([]byte(out), &reply))
	for _, o := range reply.Nftables {
		packets += o.Counter.Packets
	}
	return packets
}
