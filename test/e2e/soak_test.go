package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport-dev/sallyport/test/lab"
	"github.com/sallyport-dev/sallyport/test/leak"
)

// controlTime is how long the probes run without enforcement.
const controlTime = 3 * time.Second

var clientPorts = fmt.Sprintf("%d %d", firstClientPort, lastClientPort)

// soaked is the report.
type soaked struct {
	Seed     uint64
	Seconds  float64
	Rate     float64
	Probes   int
	Raw      int64
	Connects int64
	Events   map[string]int
	Plain    map[answerer]int `json:"answers"`
	Secured  map[answerer]int `json:"answers_with_identity"`
	ByProxy  int              `json:"packets_by_proxy"`
	Leaked   int
	From     map[string]int `json:"leaked_from"`
	Leaks    []leaked
	Control  control
}

// control is the run without enforcement: how many probes, and how many were seen.
type control struct{ Raw, RawSeen, Connects, Direct int }

// TestSoakLeaks probes protected services without an identity, from a client, a pod, the node and new
// pods, while agent, guard and proxy are killed and replaced, pods come and go, and pins vanish. The
// judges are the services' own sockets, and the answers. Nothing may get there but by the proxy.
func TestSoakLeaks(t *testing.T) {
	leak.Check(t)
	s := soakSettings(t)
	t.Logf("%v", s)
	w := newWorld(t, options{plain: true, resource: lateServices()})
	judge := newJudge(t)
	p, err := w.newProber(judge, s.rate())
	must(t, err)
	t.Cleanup(func() { must(t, p.close()) })
	for _, n := range []*lab.Namespace{w.Client, w.Node, w.Pods[1]} {
		must(t, n.Sysctl("ipv4/ip_local_port_range", clientPorts))
	}
	for _, s := range w.echoes {
		must(t, judge.witness.Watch(s))
	}
	r := soaked{Seed: s.seed, Control: p.control(t)}
	other := buildOther(t, filepath.Join(built.dir, "other"))
	for _, d := range []*daemon{w.collector, w.agent, w.guard, w.proxy} {
		d.start(t)
	}
	p.soak(t, s, &r, [2]string{w.bin, other})
	r.check(t, s)
	judge.blind(t)
	w.afterwards(t)
}

// control runs the same probes on the same lab, with nothing of Sallyport's in it: all must be seen.
func (p *prober) control(t *testing.T) (c control) {
	t.Helper()
	dice := rand.New(rand.NewPCG(1, 1))
	ctx, cancel := context.WithTimeout(t.Context(), controlTime)
	defer cancel()
	p.run(ctx, 1<<30, dice)
	must(t, p.onePod(t.Context(), 0, dice, func(string) {}))
	c = control{Raw: int(p.raw.Swap(0)), Connects: int(p.connects.Swap(0)), RawSeen: p.judge.reset()}
	p.mu.Lock()
	defer p.mu.Unlock()
	c.Direct = p.answers[direct]
	// A few are missing: what a started pod sends before it has addresses does not find its way back.
	if c.RawSeen < c.Raw*95/100 || c.Direct < c.Connects*80/100 {
		t.Errorf("control run: %+v: the judges do not see what arrives", c)
	}
	clear(p.answers)
	clear(p.secured)
	return c
}

// soak runs prober, pods and chaos side by side.
func (p *prober) soak(t *testing.T, s soak, r *soaked, bins [2]string) {
	t.Helper()
	pins, err := p.lastingPins()
	must(t, err)
	dice := func(stream uint64) *rand.Rand { return rand.New(rand.NewPCG(s.seed, stream)) }
	c := &chaos{world: p.world, bins: bins, dice: dice(1), judge: p.judge, pins: pins, counts: map[string]int{}}
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), s.duration*8/7) // forty minutes for the probes of thirty-five
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	probing, done := context.WithCancel(ctx)
	group.Go(func() error { return c.run(probing) })
	group.Go(func() error { return p.pods(probing, dice(2), c.happened) })
	group.Go(func() error { defer done(); p.run(ctx, s.probes, dice(3)); return nil })
	group.Go(func() error { tellProgress(probing, t, p, s); return nil })
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	r.take(p, c, time.Since(began))
	if s.json != "" {
		must(t, r.write(s.json))
	}
}

// tellProgress writes a line now and then, for whoever waits.
func tellProgress(ctx context.Context, t *testing.T, p *prober, s soak) {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			p.judge.mu.Lock()
			leaks := p.judge.count
			p.judge.mu.Unlock()
			t.Logf("%d of %d probes, %d leaked", p.total(), s.probes, leaks)
		}
	}
}

func (r *soaked) take(p *prober, c *chaos, took time.Duration) {
	p.judge.mu.Lock()
	defer p.judge.mu.Unlock()
	r.Seconds, r.Probes, r.Raw, r.Connects = took.Seconds(), p.total(), p.raw.Load(), p.connects.Load()
	r.Rate = float64(r.Probes) / r.Seconds
	r.Events, r.Plain, r.Secured = c.counts, p.answers, p.secured
	r.ByProxy, r.Leaked, r.Leaks, r.From = p.judge.byProxy, p.judge.count, p.judge.leaks, p.judge.from
}

func (r *soaked) write(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

func (r *soaked) check(t *testing.T, s soak) {
	t.Helper()
	t.Logf("%d probes (%d raw, %d connects) in %.0f s, %.0f each second; control: %+v", r.Probes, r.Raw, r.Connects, r.Seconds, r.Rate, r.Control)
	t.Logf("events: %v", r.Events)
	t.Logf("without identity answered by %v; with one by %v; %d packets by the proxy", r.Plain, r.Secured, r.ByProxy)
	t.Logf("%d leaked: %v", r.Leaked, r.From)
	for _, l := range r.Leaks {
		t.Errorf("leaked: %s", l)
	}
	if r.Leaked > 0 {
		t.Errorf("%d leaked: repeat with %v", r.Leaked, s)
	}
	if r.Probes < s.probes {
		t.Errorf("%d probes in %.0f s, want %d", r.Probes, r.Seconds, s.probes)
	}
	if r.Secured[proxied] == 0 || r.Plain[cut] == 0 || r.ByProxy == 0 {
		t.Error("the services were not reached by the proxy either: this proves nothing")
	}
}

// afterwards everything is as it should be.
func (w *world) afterwards(t *testing.T) {
	t.Helper()
	for _, target := range w.chaosTargets() {
		if o := target.identified(within(t, patience), w, web); o.who != proxied {
			t.Errorf("afterwards, %s: %s", target.to, o)
		}
	}
	waitUntil(t, "the agent to be ready", func() bool { return w.status(t).Ready })
}
