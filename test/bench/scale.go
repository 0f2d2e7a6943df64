package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// Groups of the scale, behind the group of what is measured.
const (
	overServices   = ", over services"
	overExceptions = ", over exceptions"
)

// measureScale has more and more services, and then more and more exceptions, in ours and in each peer. Each begins in namespaces of its
// own: what is left there of proxied connections with the client's address was in the way of the peers' direct ones, and an exception would be
// measured by that.
func measureScale(ctx context.Context, p plan, r *results) error {
	return errors.Join(overScales(ctx, p, r, (*terrain).scaleServices), overScales(ctx, p, r, (*terrain).scaleExceptions))
}

func overScales(ctx context.Context, p plan, r *results, measure func(*terrain, context.Context, plan, *results, int) error) (err error) {
	t, err := newTerrain(ctx)
	if err != nil {
		return err
	}
	defer func() { err = joinClose(err, t.close) }()
	for _, n := range scales(p) {
		if err := measure(t, ctx, p, r, n); err != nil {
			return err
		}
	}
	return nil
}

func scales(p plan) []int { return pick(p, []int{1, 100, 10000}, []int{1, 100}) }

// scaleName is a series' name in a group over a number.
func scaleName(name string, n int) string { return fmt.Sprintf("%s, %s", name, thousands(n)) }

// scaleRounds are fewer than those of the plain traffic: there are many cells.
func scaleRounds(p plan) int { return max(1, p.rounds*2/3) }

func (t *terrain) scaleServices(ctx context.Context, p plan, r *results, n int) error {
	if err := t.ours.protectAmong(n); err != nil {
		return err
	}
	ways := []way{t.steered}
	for _, peer := range t.peers {
		if err := peer.steer(ctx, n); err != nil {
			r.note("%s with %s is left out: %v", peer.kind, counted(n, "service"), err)
			continue
		}
		ways = append(ways, peer.way())
	}
	return takeTurns(ctx, p, r, scaleRounds(p), ways, inGroup(overServices, bulk, connects), func(w way) string { return scaleName(w.name, n) })
}

// scaleExceptions: an exception of ours is a path.
func (t *terrain) scaleExceptions(ctx context.Context, p plan, r *results, n int) error {
	if err := t.ours.protect(); err != nil {
		return err
	}
	if err := t.pathsUpTo(n); err != nil {
		return err
	}
	ways := []way{t.bypassed}
	for _, peer := range t.peers {
		if err := peer.except(ctx, n); err != nil {
			r.note("%s with %s is left out: %v", peer.kind, counted(n, "exception"), err)
			continue
		}
		ways = append(ways, peer.way())
	}
	return takeTurns(ctx, p, r, scaleRounds(p), ways, inGroup(overExceptions, bulk, connects, pingPong),
		func(w way) string { return scaleName(w.name, n) })
}

// pathsUpTo opens paths until there are n, beside the one of the client.
func (t *terrain) pathsUpTo(n int) error {
	all := among(t.ours.Client.Addr(lab.IPv4), n)
	have, err := t.ours.d.Paths()
	if err != nil {
		return err
	}
	for _, s := range have {
		all = slices.DeleteFunc(all, func(a netip.Addr) bool { return a == s.Client })
	}
	for _, a := range all {
		if _, err := t.ours.openPath(a, 50*time.Minute); err != nil {
			return err
		}
	}
	return nil
}

// inGroup puts kinds into a group of their own, in which cells are short: there are many.
func inGroup(suffix string, kinds ...kind) []kind {
	for i := range kinds {
		kinds[i].group += suffix
		kinds[i].time = 700 * time.Millisecond
	}
	return kinds
}
