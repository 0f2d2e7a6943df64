package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// kind is what a client does for a while.
type kind struct {
	name  string // of the role's argument
	group string
	time  time.Duration // of one cell in a full run
}

// Kinds of traffic.
var (
	bulk       = kind{"bulk", "throughput, one stream", 1500 * time.Millisecond}
	connects   = kind{"connects", "connections, one after the other", time.Second}
	concurrent = kind{"concurrent", "connections, eight at a time", time.Second}
	pingPong   = kind{"pingpong", "ping-pong", time.Second}
)

// shortTime is a cell of a short run.
const shortTime = 150 * time.Millisecond

// way is one way from a client to the service.
type way struct {
	name  string
	world *world
	from  netip.Addr
}

// loadResult is what the client role reports.
type loadResult struct {
	BitsPerSecond float64 `json:"bits_per_second,omitempty"`
	PerSecond     float64 `json:"per_second,omitempty"`
	P50           float64 `json:"p50_us,omitempty"`
	P99           float64 `json:"p99_us,omitempty"`
	Failed        int     `json:"failed,omitempty"`
}

// load runs one client of the way to its end.
func (w way) load(ctx context.Context, k kind, d time.Duration) (loadResult, error) {
	var res loadResult
	out, err := w.world.Client.Run(ctx, w.world.self, "load", k.name, w.from.String(), w.world.target(lab.IPv4).String(), d.String())
	if err == nil {
		err = json.NewDecoder(strings.NewReader(out)).Decode(&res)
	}
	if err == nil && res.Failed > 0 {
		err = fmt.Errorf("%d connections failed", res.Failed)
	}
	if err != nil {
		return res, fmt.Errorf("load %s, %s: %w", w.name, k.name, err)
	}
	return res, nil
}

// record adds the result to the series of the way.
func (k kind) record(r *results, name string, res loadResult) {
	switch k.name {
	case bulk.name:
		r.add(k.group, name, "Gbit/s", res.BitsPerSecond/1e9)
	case pingPong.name:
		r.add(k.group+", p50", name, "µs", res.P50)
		r.add(k.group+", p99", name, "µs", res.P99)
	default:
		r.add(k.group, name, "/s", res.PerSecond)
	}
}

// measureTraffic compares ways: no program at all, around the proxy, and through a plain copy proxy that is
// steered to by us, by iptables and by nftables.
func measureTraffic(ctx context.Context, p plan, r *results) (err error) {
	t, err := newTerrain(ctx)
	if err != nil {
		return err
	}
	defer func() { err = joinClose(err, t.close) }()
	ways := []way{t.direct, t.bypassed, t.steered}
	for _, peer := range t.peers {
		if err := peer.steer(ctx, 1); err != nil {
			r.note("%s does not work on this machine and is left out: %v", peer.kind, err)
			continue
		}
		ways = append(ways, peer.way())
	}
	return takeTurns(ctx, p, r, p.rounds, ways, []kind{bulk, connects, concurrent, pingPong}, func(w way) string { return w.name })
}

// takeTurns runs every kind of every way in each round; the order of the ways turns with the rounds.
func takeTurns(ctx context.Context, p plan, r *results, rounds int, ways []way, kinds []kind, name func(way) string) error {
	for round := range rounds {
		for _, k := range kinds {
			for i := range ways {
				w := ways[(i+round)%len(ways)]
				res, err := w.load(ctx, k, pick(p, k.time, shortTime))
				if err != nil {
					r.note("a cell was taken again: %v", err)
					res, err = w.load(ctx, k, pick(p, k.time, shortTime))
				}
				if err != nil {
					return err
				}
				k.record(r, name(w), res)
			}
		}
	}
	return nil
}

// terrain is all worlds of the traffic: each has its own client, node and service, and idles while another
// is measured.
type terrain struct {
	direct, bypassed, steered way
	ours                      *node
	peers                     []*peer
	plain                     *world
	closers                   []func() error
}

// newTerrain leaves nothing behind when it fails.
func newTerrain(ctx context.Context) (t *terrain, err error) {
	t = &terrain{}
	defer func() {
		if err != nil {
			err = joinClose(err, t.close)
		}
	}()
	if t.plain, err = newWorld("direct", 1); err != nil {
		return t, err
	}
	t.closers = append(t.closers, t.plain.Close)
	if t.ours, err = newNode(ctx, "sallyport", 1, datapath.Config{}); err != nil {
		return t, err
	}
	t.closers = append(t.closers, t.ours.close)
	if err := t.fillOurs(ctx); err != nil {
		return t, err
	}
	for _, k := range peerKinds() {
		p, err := newPeer(ctx, k)
		if err != nil {
			return t, err
		}
		t.peers = append(t.peers, p)
		t.closers = append(t.closers, p.Close)
	}
	return t, t.serve(ctx)
}

// fillOurs has two clients: the first has a path, the second has none.
func (t *terrain) fillOurs(ctx context.Context) error {
	if err := t.ours.protect(); err != nil {
		return err
	}
	first, second := t.ours.Client.Addr(lab.IPv4), t.ours.Client.Other(lab.IPv4)
	if _, err := t.ours.openPath(first, 50*time.Minute); err != nil {
		return err
	}
	t.ours.keep(ctx)
	t.direct = way{"direct", t.plain, t.plain.Client.Addr(lab.IPv4)}
	t.bypassed = way{"bypassed", t.ours.world, first}
	t.steered = way{"steered", t.ours.world, second}
	return t.ours.startProxy(ctx)
}

// serve starts the service of every world.
func (t *terrain) serve(ctx context.Context) error {
	worlds := []*world{t.plain, t.ours.world}
	for _, p := range t.peers {
		worlds = append(worlds, p.world)
	}
	for _, w := range worlds {
		if err := w.start(ctx, w.Pod, "service", w.target(lab.IPv4).String()); err != nil {
			return err
		}
	}
	return nil
}

func (t *terrain) close() error {
	var err error
	for i := len(t.closers) - 1; i >= 0; i-- {
		err = joinClose(err, t.closers[i])
	}
	return err
}
