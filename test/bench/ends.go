package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/test/lab"
)

const groupEnds = "ends of paths"

// What is measured of an end.
const (
	endOvershoot    = "last packet behind enforcement after the deadline, no agent"
	endLate         = "packets behind enforcement after the deadline, no agent"
	endExpiryReset  = "expired: client's next packet to its RST"
	endExpiryServed = "expired: client's next packet to the first byte by the proxy"
	endRevokeReset  = "revoked: client's next packet to its RST"
	endRevokeServed = "revoked: client's next packet to the first byte by the proxy"
	endRevokeLate   = "packets behind enforcement after revoke returned"
	endRevokeLast   = "last packet behind enforcement after revoke returned"
	endOpen         = "open path: call to return"
	overshootPath   = 100 * time.Millisecond
	shortPath       = 20 * time.Millisecond
	revokeAfter     = 30 * time.Millisecond
)

// endRounds are many: these are tails.
func endRounds(p plan) int { return pick(p, 100, 5) }

// endsRig has one client, the service and the copy proxy, and nobody who sweeps: the agent is dead.
type endsRig struct {
	*node
	caller
}

func measureEnds(ctx context.Context, p plan, r *results) (err error) {
	n, err := newNode(ctx, "ends", 1, datapath.Config{})
	if err != nil {
		return err
	}
	defer func() { err = joinClose(err, n.close) }()
	if err := n.protect(); err != nil {
		return err
	}
	if err := n.startProxy(ctx); err != nil {
		return err
	}
	if err := n.start(ctx, n.Pod, "service", n.target(lab.IPv4).String()); err != nil {
		return err
	}
	rig := &endsRig{node: n}
	if rig.caller, err = newCaller(n.world); err != nil {
		return err
	}
	for range endRounds(p) {
		for _, round := range []func(*results) error{rig.overshoot, rig.expire, rig.revoke, rig.revokeUnderLoad} {
			if err := rig.patiently(r, round); err != nil {
				return err
			}
		}
	}
	return nil
}

// patiently takes a round again whose path was over before its connection stood.
func (rig *endsRig) patiently(r *results, round func(*results) error) error {
	for tries := 1; ; tries++ {
		err := round(r)
		if !errors.Is(err, errNotServed) || tries == 5 {
			return err
		}
		r.note("the machine was too busy for a round of the ends of paths, which was taken again: %v", err)
		if err := rig.clear(); err != nil {
			return err
		}
	}
}

// clear ends and frees every path.
func (rig *endsRig) clear() error {
	paths, err := rig.d.Paths()
	if err != nil {
		return err
	}
	for _, s := range paths {
		if err := rig.free(s.Slot, datapath.PathRevoked); err != nil {
			return err
		}
	}
	return nil
}

// open gives the client a path and says how long the call took.
func (rig *endsRig) open(r *results, left time.Duration) (slot uint32, deadline time.Duration, err error) {
	deadline = datapath.BootTime() + left
	began := time.Now()
	slot, err = rig.d.OpenPath(datapath.Path{Grant: "01BENCH", Client: rig.from, ServiceID: serviceID, Service: "measured",
		Ports: []uint16{servicePort}, Deadline: deadline})
	r.add(groupEnds, endOpen, "µs", us(time.Since(began)))
	return slot, deadline, err
}

// free puts the slot back, as the agent would have done.
func (rig *endsRig) free(slot uint32, s datapath.PathState) error {
	if err := rig.d.EndPath(slot, s); err != nil {
		return err
	}
	if err := rig.sweep(); err != nil {
		return err
	}
	return rig.d.FreePath(slot)
}

// bypassing says whether the path in the slot has carried a flow: the benchmark measures what it means to.
func (rig *endsRig) bypassing(slot uint32) error {
	paths, err := rig.d.Paths()
	if err != nil {
		return err
	}
	for _, s := range paths {
		if s.Slot == slot && s.Flows > 0 {
			return nil
		}
	}
	return errors.New("the connection does not use its path")
}

// overshoot sends as fast as it can over the deadline and asks the tap behind enforcement what came last.
func (rig *endsRig) overshoot(r *results) error {
	slot, deadline, err := rig.open(r, overshootPath)
	if err != nil {
		return err
	}
	late, err := rig.flood(func() (time.Duration, error) { return deadline, rig.bypassing(slot) })
	if err != nil {
		return err
	}
	r.add(groupEnds, endLate, "packets", float64(late.packets))
	r.add(groupEnds, endOvershoot, "µs", us(late.last))
	return rig.free(slot, datapath.PathExpired)
}

// revokeUnderLoad is the same for an end that somebody calls for.
func (rig *endsRig) revokeUnderLoad(r *results) error {
	slot, _, err := rig.open(r, time.Minute)
	if err != nil {
		return err
	}
	late, err := rig.flood(func() (time.Duration, error) {
		time.Sleep(revokeAfter) // while packets flow
		err := errors.Join(rig.bypassing(slot), rig.d.EndPath(slot, datapath.PathRevoked))
		return datapath.BootTime(), err
	})
	if err != nil {
		return err
	}
	r.add(groupEnds, endRevokeLate, "packets", float64(late.packets))
	r.add(groupEnds, endRevokeLast, "µs", us(late.last))
	return rig.free(slot, datapath.PathRevoked)
}

// expire measures what a client sees that was silent when its path expired.
func (rig *endsRig) expire(r *results) error {
	slot, deadline, err := rig.open(r, shortPath)
	if err != nil {
		return err
	}
	c, err := rig.dial()
	if err != nil {
		return err
	}
	if err := rig.bypassing(slot); err != nil {
		return joinClose(err, c.Close)
	}
	time.Sleep(deadline + time.Millisecond - datapath.BootTime()) // what is waited for is the clock
	if err := rig.after(r, c, endExpiryReset, endExpiryServed); err != nil {
		return err
	}
	return rig.free(slot, datapath.PathExpired)
}

// revoke measures the same for a path that is revoked.
func (rig *endsRig) revoke(r *results) error {
	slot, _, err := rig.open(r, time.Minute)
	if err != nil {
		return err
	}
	c, err := rig.dial()
	if err != nil {
		return err
	}
	if err := errors.Join(rig.bypassing(slot), rig.d.EndPath(slot, datapath.PathRevoked)); err != nil {
		return joinClose(err, c.Close)
	}
	if err := rig.after(r, c, endRevokeReset, endRevokeServed); err != nil {
		return err
	}
	return rig.free(slot, datapath.PathRevoked)
}

// after sends the next packet, waits for the reset, connects again and waits for the first byte.
func (rig *endsRig) after(r *results, c *os.File, toReset, toServed string) error {
	defer c.Close()
	began := time.Now()
	err := ping(c)
	took := time.Since(began)
	if !reset(err) {
		return fmt.Errorf("send after the end: %v, want a reset", err)
	}
	again, err := rig.dial()
	if err != nil {
		return fmt.Errorf("connect after the end: %w", err)
	}
	served := time.Since(began)
	r.add(groupEnds, toReset, "µs", us(took))
	r.add(groupEnds, toServed, "ms", ms(served))
	return again.Close()
}
